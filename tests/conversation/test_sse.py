"""Server-sent events: every byte comes back once, and deltas assemble to the message."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.sse import (
    EventParser,
    MessageBuilder,
    Opening,
    Tee,
    as_event,
    decode_chunk,
    error_in,
)
from tests.examples import examples

many = examples(100)

lines = st.lists(
    st.sampled_from(["data: {}", "data:x", ": ping", "event: a", "data: [DONE]", "id: 1", "data: "]),
    min_size=1, max_size=3,
)
streams = st.lists(st.tuples(lines, st.sampled_from(["\n", "\r\n", "\r"])), max_size=6)


def bytes_of(stream: list[tuple[list[str], str]]) -> bytes:
    return "".join(end.join([*block, ""]) + end for block, end in stream).encode()


@many
@given(streams, st.lists(st.integers(0, 200), max_size=6), st.booleans())
def test_every_byte_comes_back_once_wherever_it_is_cut(
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


def test_a_last_event_without_its_blank_line_is_read_line_by_line() -> None:
    parser = EventParser()
    parser.feed(b"data: a\nevent: x")
    assert parser.close()[0].data == b"a"


def test_deltas_assemble_to_the_message_with_unknown_fields() -> None:
    builder = MessageBuilder()
    for delta in [
        {"role": "assistant", "content": ""}, {"content": "He"}, {"content": "llo", "x": {"a": "1"}},
        {"reasoning_content": "hm"}, {"x": {"a": "2", "b": [1]}}, {"x": {"b": [2]}}, {"y": None},
    ]:
        builder.add(delta)
    assert builder.build() == {
        "role": "assistant", "content": "Hello", "x": {"a": "12", "b": [1, 2]},
        "reasoning_content": "hm", "y": None,
    }


@many
@given(st.lists(st.tuples(st.sampled_from(["f", "g"]), st.text("ab", max_size=6)), min_size=1, max_size=4),
       st.sampled_from(["index", "id", "name"]))
def test_calls_assemble_with_an_index_an_id_or_a_name_alone(
    wanted: list[tuple[str, str]], known_by: str
) -> None:
    builder = MessageBuilder()
    for i, (name, arguments) in enumerate(wanted):
        where: dict[str, Any] = {"index": i} if known_by == "index" else {}
        ident = {} if known_by == "name" else {"id": f"c{i}"}
        builder.add_call({**where, **ident, "function": {"name": name, "arguments": ""}})
        for piece in arguments:
            builder.add_call({**where, "function": {"arguments": piece}})
    built = builder.build()["tool_calls"]
    assert [(c["function"]["name"], c["function"]["arguments"]) for c in built] == wanted
    assert all(c["type"] == "function" for c in built)


def test_a_chunk_is_a_json_object_or_nothing() -> None:
    assert decode_chunk(b'{"a":1}') == {"a": 1}
    assert [decode_chunk(d) for d in (b"", b"[]", b"{", b'"\xff"')] == [None] * 4


def stream_of(text: str, ending: str = "\n\n") -> bytes:
    chunks = [{"choices": [{"index": 0, "delta": {"content": c}, "finish_reason": None}]} for c in text]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    return "".join(f"data: {json.dumps(c)}{ending}" for c in chunks).encode()


@many
@given(st.text(max_size=5), st.lists(st.integers(0, 600), max_size=5), st.sampled_from(["\n\n", "\r\n\r\n"]))
def test_invariant_02_a_tee_lets_every_byte_through_and_holds_the_end(
    text: str, cuts: list[int], ending: str
) -> None:
    data = stream_of(text, ending) + f"data: [DONE]{ending}".encode()
    tee, out, at = Tee(), b"", 0
    for cut in [*sorted(cuts), len(data)]:
        out += tee.feed(data[at:cut])
        at = max(at, cut)
    assert out + tee.held == data
    assert tee.held and b"[DONE]" not in out
    assert tee.messages()[0].get("content") == (text or None)


def test_a_tee_is_not_fooled_by_done_in_a_text() -> None:
    inner = b'data: {"choices":[{"delta":{"content":"data: [DONE]"}}]}\n\n'
    for cut in range(len(inner)):
        tee = Tee()
        assert tee.feed(inner[:cut]) + tee.feed(inner[cut:]) == inner
        assert tee.feed(b"x") == b"x"


def test_a_stream_that_breaks_or_fails_is_not_remembered() -> None:
    for data in (stream_of("abc")[:-40], b'data: {"error":{}}\n\n', b"data: nonsense\n\n", b""):
        tee = Tee()
        tee.feed(data)
        assert tee.messages() == []


def test_a_whole_response_as_an_event_says_the_same() -> None:
    function = {"name": "f", "arguments": "{}"}
    message = {
        "role": "assistant", "content": "x", "refusal": None, "annotations": [], "odd": {"a": 1},
        "tool_calls": [{"id": i, "type": "function", "function": function} for i in ("a", "b")],
    }
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    response = {"id": "c", "object": "chat.completion", "choices": [choice], "usage": {"total_tokens": 1}}
    tee = Tee()
    event = as_event(response)
    tee.feed(event)
    kept = {k: v for k, v in message.items() if k not in ("refusal", "annotations")}
    assert tee.messages() == [kept]
    assert b"usage" not in event and b'"chat.completion.chunk"' in event
    assert choice["message"] is message  # the response is as it was


def test_pieces_of_thinking_are_put_together_and_whole_items_stay_apart() -> None:
    builder = MessageBuilder()
    for delta in (
        {"thinking_blocks": [{"type": "thinking", "thinking": "Let "}]},
        {"thinking_blocks": [{"type": "thinking", "thinking": "me see."}]},
        {"thinking_blocks": [{"type": "thinking", "thinking": "", "signature": "s1"}]},
        {"thinking_blocks": [{"type": "redacted_thinking", "data": "x"}]},
        {"thinking_blocks": [{"type": "thinking", "thinking": "More."}]},
        {"reasoning_details": [{"type": "reasoning.text", "text": "a", "index": 0, "id": "r"}]},
        {"reasoning_details": [{"type": "reasoning.text", "text": "b", "index": 0, "id": "r"}]},
        {"reasoning_details": [{"type": "reasoning.encrypted", "data": "z", "index": 1}]},
        {"annotations": [{"type": "url_citation", "url_citation": {"url": "a"}}]},
        {"annotations": [{"type": "url_citation", "url_citation": {"url": "a"}}]},
        {"extra_content": {"google": {"thought_signature": "g1"}}},
        {"extra_content": {"google": {"thought_signature": "g1"}}},
        {"reasoning_content": "ha"}, {"reasoning_content": "ha"},
        {"audio": {"id": "a1", "data": "UkI="}}, {"audio": {"id": "a1", "transcript": "he"}},
        {"audio": {"transcript": "llo", "expires_at": 9}},
    ):  # fmt: skip
        builder.add(delta)
    citation = {"type": "url_citation", "url_citation": {"url": "a"}}
    assert builder.build() == {
        "role": "assistant",
        "content": None,
        "thinking_blocks": [
            {"type": "thinking", "thinking": "Let me see.", "signature": "s1"},
            {"type": "redacted_thinking", "data": "x"},
            {"type": "thinking", "thinking": "More."},
        ],
        "reasoning_details": [
            {"type": "reasoning.text", "text": "ab", "index": 0, "id": "r"},
            {"type": "reasoning.encrypted", "data": "z", "index": 1},
        ],
        "annotations": [citation, citation],
        "extra_content": {"google": {"thought_signature": "g1"}},
        "reasoning_content": "haha",
        "audio": {"id": "a1", "data": "UkI=", "transcript": "hello", "expires_at": 9},
    }


def test_content_of_parts_and_of_text_goes_together() -> None:
    builder = MessageBuilder()
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    for content in ("a", [thinking], [thinking], "b", "c"):
        builder.add({"content": content})
    (first, thought, last) = builder.build()["content"]
    assert (first, last) == ({"type": "text", "text": "a"}, {"type": "text", "text": "bc"})
    assert thought == {"type": "thinking", "thinking": [{"type": "text", "text": "hmhm"}]}


def test_arguments_as_an_object_become_their_text() -> None:
    builder = MessageBuilder()
    builder.add_call({"index": 0, "id": "c", "function": {"name": "f", "arguments": {"a": 1}}})
    assert builder.build()["tool_calls"][0]["function"]["arguments"] == '{"a":1}'


def test_a_byte_order_mark_and_bare_carriage_returns_are_framing() -> None:
    parser = EventParser()
    events = parser.feed(b'\xef\xbb\xbfdata: {"a":1}\r\rdata: 2\r') + parser.feed(b"\r\ndata: 3\r\n\r\n")
    assert [event.data for event in events] == [b'{"a":1}', b"2", b"3"]


# -- an error in place of an answer


ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
WORD = b'data: {"choices":[{"index":0,"delta":{"content":"error is a word"},"finish_reason":null}]}\n\n'
ERRORS = {
    "data": b'data: {"error": {"message": "no"}}\n\n',
    "data with empty choices": b'data: {"choices": [], "error": {"message": "no"}}\n\n',
    "data beside an empty delta": b'data: {"choices":[{"index":0,"delta":{"content":""},"finish_reason":"error"}],'
    b'"error":{"code":400,"message":"no"}}\n\n',
    "a finish reason": b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"error"}]}\n\n',
    "a line": b'error: {"message": "no"}\n\n',
    "a named event": b'event: error\ndata: {"message": "no"}\n\n',
    "a gateway's own form": b'data: {"code": 20015, "message": "no", "data": null}\n\n',
    "its object says so": b'data: {"object": "error", "message": "no", "code": 400}\n\n',
    "bare JSON": b'{"error": {"message": "no"}}\n',
    "a list": b'{"success": false, "errors": [{"message": "no"}]}',
}
NO_ERRORS = {
    "a word": WORD,
    "a role": ROLE,
    "nothing yet": b'data: {"choices": [], "prompt_filter_results": []}\n\n',
    "a comment": b": error in a comment\n\n",
    "the end": b"data: [DONE]\n\n",
    "null": b'data: {"error": null, "choices": [{"index":0,"delta":{"content":"x"}}]}\n\n',
    "an answer beside a warning": b'data: {"error": "slow", "choices": [{"index":0,"delta":{"content":"x"}}]}\n\n',
}


@pytest.mark.parametrize("raw", ERRORS.values(), ids=ERRORS.keys())
@pytest.mark.parametrize("before", [b"", b": wait\n\n", ROLE], ids=["first", "after a comment", "after the role"])
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_an_opening_finds_an_error_in_every_form_wherever_it_is_cut(raw: bytes, before: bytes, size: int) -> None:
    opening, out = Opening(patient=True), b""
    data = before + raw
    for i in range(0, len(data), size):
        out += opening.feed(data[i : i + size])
    if opening.error is None:
        out += opening.close()
    assert opening.error is not None and (b"no" in opening.error or b'"error"' in opening.error)
    assert out == (before if before.startswith(b":") else b"")
    assert out + opening.rest() == data


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("patient", [True, False])
def test_an_opening_gives_back_every_byte_of_an_answer(size: int, patient: bool) -> None:
    data = b": wait\r\n\r\n" + ROLE + NO_ERRORS["nothing yet"] + WORD + b"data: [DONE]\n\n  \n"
    opening, out = Opening(patient), b""
    for i in range(0, len(data), size):
        if opening.over:
            out += data[i:]
            break
        out += opening.feed(data[i : i + size])
    assert opening.over and out == data


def test_an_opening_waits_for_a_word_only_where_it_may_matter() -> None:
    assert Opening(patient=False).feed(ROLE) == ROLE
    patient = Opening(patient=True)
    assert patient.feed(ROLE) == b"" and patient.feed(WORD) == ROLE + WORD


def test_an_opening_holds_no_endless_event() -> None:
    opening = Opening(patient=True)
    assert opening.feed(b"data: " + b"x" * 70_000) and opening.over


@pytest.mark.parametrize("raw", NO_ERRORS.values(), ids=NO_ERRORS.keys())
def test_an_event_that_is_no_error(raw: bytes) -> None:
    (event,) = EventParser().feed(raw)
    assert error_in(event) is None
