"""Server-sent events: every byte comes back once, wherever the stream is cut, in linear time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.sse import EventParser, EventTooLong
from tests.cpu import cpu_within
from tests.examples import examples

many = examples(90)

lines = st.lists(
    st.sampled_from(["data: {}", "data:x", ": ping", "event: a", "data: [DONE]", "id: 1", "data: "]),
    min_size=1, max_size=3,
)
streams = st.lists(st.tuples(lines, st.sampled_from(["\n", "\r\n", "\r"])), max_size=6)


def bytes_of(stream: list[tuple[list[str], str]]) -> bytes:
    return "".join(end.join([*block, ""]) + end for block, end in stream).encode()


@many
@given(streams, st.lists(st.integers(0, 200), max_size=6), st.booleans())
def test_events_are_the_same_wherever_a_stream_is_cut(
    stream: list[tuple[list[str], str]], cuts: list[int], open_end: bool
) -> None:
    data = bytes_of(stream) + (b"data: last" if open_end else b"")
    whole = EventParser()
    expected = [*whole.feed(data), *whole.close()]
    parser, events, at = EventParser(), [], 0
    for cut in [*sorted(cuts), len(data)]:
        events += parser.feed(data[at:cut])
        at = max(at, cut)
    events += parser.close()
    assert b"".join(e.raw for e in events) == data
    if b"\r" not in data.replace(b"\r\n", b""):  # lone CRs may be read either way while they arrive
        assert events == expected
        wanted = ["\n".join(ln[5:].removeprefix(" ") for ln in block if ln.startswith("data:"))
                  for block, _ in stream] + ["last"] * open_end
        assert [e.data.decode() for e in events] == wanted


def test_event_without_its_blank_line_is_read_line_by_line() -> None:
    parser = EventParser()
    parser.feed(b"data: a\nevent: x")
    assert parser.close()[0].data == b"a"


def test_event_ends_at_bare_carriage_returns_at_once_and_a_byte_order_mark_is_none_of_it() -> None:
    parser = EventParser()
    events = parser.feed(b'\xef\xbb\xbfdata: {"a":1}\r\rdata: 2\r') + parser.feed(b"\rdata: 3\r\r")
    assert [event.data for event in events] == [b'{"a":1}', b"2", b"3"]


@examples(25)
@given(st.lists(st.binary(max_size=40), max_size=8))
def test_bytes_of_any_kind_come_back_once(pieces: list[bytes]) -> None:
    parser = EventParser()
    events = [event for piece in pieces for event in parser.feed(piece)]
    events += parser.close()
    whole = b"".join(pieces)
    assert whole.startswith(joined := b"".join(event.raw for event in events))
    assert not whole[len(joined) :].strip()


@pytest.mark.parametrize("piece", [1 << 12, 1 << 14, 1 << 25])
@pytest.mark.parametrize("ending", [b"\n\n", b"\r\n\r\n"])
def test_event_of_20_mb_is_read_in_linear_time(piece: int, ending: bytes) -> None:
    data = b"data: " + b"x" * 20_000_000 + ending
    parser = EventParser()
    with cpu_within(0.5):
        events = [event for at in range(0, len(data), piece) for event in parser.feed(data[at : at + piece])]
    assert [len(event.data) for event in events] == [20_000_000] and events[0].raw == data


def test_event_beyond_the_limit_is_refused_however_it_comes() -> None:
    for size in (1, 7, 1000):
        parser, data = EventParser(100), b"data: a\n\ndata: " + b"x" * 200
        with pytest.raises(EventTooLong, match="longer than 100 bytes"):
            for at in range(0, len(data), size):
                parser.feed(data[at : at + size])
        assert parser.open_bytes <= 100 + size


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_blank_lines_by_the_million_cost_no_event_each(end: bytes) -> None:
    data = b"data: a\n\n" + end * 2_000_000 + b"data: b\n\n"
    parser = EventParser()
    with cpu_within(0.5):  # measured 0.03; an event for each of them, 1.2
        events = [event for at in range(0, len(data), 1 << 16) for event in parser.feed(data[at : at + (1 << 16)])]
    assert [event.data for event in events if event.data] == [b"a", b"b"] and len(events) < 200
    assert b"".join(event.raw for event in events) == data


def test_event_byte_by_byte_is_read_in_linear_time() -> None:
    parser = EventParser(1 << 18)
    with cpu_within(2), pytest.raises(EventTooLong):  # measured 0.4
        for _ in range(1 << 19):
            parser.feed(b"x")
    assert parser.open_bytes <= (1 << 18) + 1
