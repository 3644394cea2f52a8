"""Chunks assemble to the message; a stream that passes keeps its bytes and is understood; nothing hangs.

Whatever a provider does to its stream that the specification of server-sent events allows (and some
that it does not), what the client reads is what the model said.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.channel import TOOLS, Channel, vm_names
from proxy.conversation.chunks import (
    MessageBuilder,
    Tee,
    as_event,
    choices_of,
    decode_chunk,
    error_in,
)
from proxy.conversation.sieve import Sieve
from proxy.sse import EventParser
from tests.cpu import cpu_within
from tests.examples import examples

many = examples(30)
LIMIT = 1 << 20


def tee(*pieces: bytes, patient: bool = False) -> tuple[Tee, bytes]:
    """A tee that these pieces went through to their end, and what passed."""
    one = Tee(patient, LIMIT)
    out = b"".join(one.feed(piece) for piece in pieces)
    return one, out + (b"" if one.error is not None else one.close())


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def test_message_is_assembled_with_unknown_fields() -> None:
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


@pytest.mark.parametrize("key", ["content", "arguments", "audio"])
def test_message_of_20_mb_in_pieces_is_assembled_in_linear_time(key: str) -> None:
    builder, piece = MessageBuilder(), "x" * 4096
    with cpu_within(0.5):
        for _ in range(5000):
            if key == "arguments":
                builder.add_call({"index": 0, "function": {"arguments": piece}})
            else:
                builder.add({key: piece if key == "content" else {"data": piece}})
        built = builder.build()
    found = built["tool_calls"][0]["function"]["arguments"] if key == "arguments" else built[key]
    assert len(found if key != "audio" else found["data"]) == 20_480_000
    builder.add({"content": "y"})
    assert str(builder.build()["content"]).endswith("y")


def test_chunk_is_a_json_object_or_nothing() -> None:
    assert decode_chunk(b'{"a":1}') == {"a": 1}
    assert [decode_chunk(d) for d in (b"", b"[]", b"{", b'"\xff"')] == [None] * 4


def stream_of(text: str, ending: str = "\n\n") -> bytes:
    chunks = [{"choices": [{"index": 0, "delta": {"content": c}, "finish_reason": None}]} for c in text]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    return "".join(f"data: {json.dumps(c)}{ending}" for c in chunks).encode()


@many
@given(st.text(max_size=5), st.lists(st.integers(0, 600), max_size=5), st.sampled_from(["\n\n", "\r\n\r\n"]),
       st.booleans())
def test_invariant_02_tee_lets_every_byte_through_and_holds_the_end(
    text: str, cuts: list[int], ending: str, patient: bool
) -> None:
    data = stream_of(text, ending) + f"data: [DONE]{ending}".encode()
    at = sorted(min(c, len(data)) for c in cuts)
    one, out = tee(*(data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)), patient=patient)
    assert out + one.held == data
    assert one.done and one.held and b"[DONE]" not in out
    assert one.messages()[0].get("content") == (text or None)


def test_tee_is_not_fooled_by_done_in_a_text() -> None:
    inner = b'data: {"choices":[{"delta":{"content":"data: [DONE]"}}]}\n\n'
    for at in range(len(inner)):
        one, out = tee(inner[:at], inner[at:])
        assert out == inner and not one.done
        assert one.feed(b"x") == b"x"


def test_tee_does_not_remember_a_stream_that_breaks_or_fails() -> None:
    for data in (stream_of("abc")[:-40], b'data: {"error":{}}\n\n', b"data: nonsense\n\n", b""):
        assert tee(data)[0].messages() == []


def test_tee_lets_an_event_of_20_mb_through_at_once_and_remembers_it() -> None:
    image = {"type": "image_url", "image_url": {"url": "x" * 20_000_000}}
    choice = {"index": 0, "delta": {"content": "", "images": [image]}, "finish_reason": "stop"}
    data = b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\ndata: [DONE]\n\n"
    pieces = cut(data, 1 << 14)
    one = Tee(False, 64 << 20)
    with cpu_within(0.5):
        out = b"".join(one.feed(piece) for piece in pieces)
    assert out + one.held == data and one.messages()[0]["images"] == [image]


@pytest.mark.parametrize("piece", [64, 600_000])
def test_invariant_10_comments_before_an_answer_pass_in_linear_time(piece: int) -> None:
    """A proxy that keeps a slow stream alive sends no end of them: 2.4 MB held the event loop for seconds."""
    comments = b": ping\n\n" * 300_000
    with cpu_within(2):
        one, out = tee(*cut(comments, piece))
    assert out == comments and not one.held


def test_tee_lets_an_event_beyond_its_limit_through_and_forgets_it() -> None:
    data = stream_of("a")[:-20] + b"x" * LIMIT + b"\n\n" + b"data: [DONE]\n\n"
    one, out = tee(*cut(data, 1 << 14))
    assert out + one.held == data and one.done and one.messages() == []


def test_whole_response_as_an_event_says_the_same() -> None:
    function = {"name": "f", "arguments": "{}"}
    message = {
        "role": "assistant", "content": "x", "refusal": None, "annotations": [], "odd": {"a": 1},
        "tool_calls": [{"id": i, "type": "function", "function": function} for i in ("a", "b")],
    }
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    response = {"id": "c", "object": "chat.completion", "choices": [choice], "usage": {"total_tokens": 1}}
    event = as_event(response)
    kept = {k: v for k, v in message.items() if k not in ("refusal", "annotations")}
    assert tee(event)[0].messages() == [kept]
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
def test_tee_holds_an_error_in_every_form_wherever_it_is_cut(raw: bytes) -> None:
    """First, behind a comment, behind the role, which has left by then."""
    for before, size in itertools.product((b"", b": wait\n\n", ROLE), (1, 7, 10_000)):
        data = before + raw
        one, out = tee(*cut(data, size), patient=True)
        assert one.error is not None and (b"no" in one.error or b'"error"' in one.error)
        assert out == before and one.opening == (before if before == ROLE else b"")
        assert out + one.held == data


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("patient", [True, False])
def test_tee_gives_back_every_byte_of_an_answer(size: int, patient: bool) -> None:
    data = b": wait\r\n\r\n" + ROLE + NO_ERRORS["nothing yet"] + WORD + b"data: [DONE]\n\n  \n"
    one, out = tee(*cut(data, size), patient=patient)
    assert one.error is None and out + one.held == data


def test_tee_waits_for_a_word_only_where_it_may_matter() -> None:
    assert Tee(False, LIMIT).feed(ROLE) == ROLE
    patient = Tee(True, LIMIT, opens=False)
    assert patient.feed(ROLE) == b"" and patient.feed(WORD) == ROLE + WORD


def test_tee_does_not_hold_a_long_event_back() -> None:
    assert Tee(True, LIMIT).feed(b"data: " + b"x" * 70_000)


@pytest.mark.parametrize("raw", NO_ERRORS.values(), ids=NO_ERRORS.keys())
def test_error_is_not_seen_in_what_is_none(raw: bytes) -> None:
    (event,) = EventParser().feed(raw)
    assert error_in(event) is None


# -- framings of one answer, cut anywhere


CLIENT = ["lookup", "page", "p", "page_faults", "search"]
OURS = Channel(TOOLS, True, vm_names(), frozenset(CLIENT), True)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
line_ends = st.sampled_from([b"\n", b"\r\n", b"\r"])
noise = st.sampled_from([b": ping", b":", b"event: message", b"id: 7", b"retry: 100", b"data"])


@st.composite
def answers(draw: st.DrawFn) -> tuple[list[str], list[tuple[str, list[str]]], str]:
    """Pieces of text, calls of the client's tools (name, pieces of arguments), a finish reason."""
    pieces = draw(st.lists(texts, max_size=6))
    names = st.sampled_from([*CLIENT, "of nobody"])
    made = draw(st.lists(st.tuples(names, st.lists(texts, min_size=1, max_size=3)), max_size=3))
    return pieces, made, draw(st.sampled_from(["stop", "tool_calls", "length"]))


@st.composite
def framed(draw: st.DrawFn) -> tuple[list[bytes], str, list[tuple[str, str]], str]:
    """(the stream's pieces, its text, its calls, the finish reason)."""
    pieces, made, reason = draw(answers())
    deltas: list[dict[str, Any]] = [{"content": piece} for piece in pieces]
    whole, indexed = draw(st.booleans()), draw(st.booleans())
    for index, (name, arguments) in enumerate(made):
        where = {"index": index} if indexed else {}
        head = {**where, "id": f"c{index}", "type": "function"}
        if whole:
            function = {"name": name, "arguments": "".join(arguments)}
            deltas.append({"tool_calls": [{**head, "function": function}]})
            continue
        deltas.append({"tool_calls": [{**head, "function": {"name": name, "arguments": ""}}]})
        deltas += [{"tool_calls": [{**where, "function": {"arguments": a}}]} for a in arguments]
    if draw(st.booleans()) or not deltas:
        deltas.insert(0, {"role": "assistant", "content": ""})
    chunks = [_chunk(delta, None) for delta in deltas]
    if draw(st.booleans()):  # the finish reason beside the last piece
        chunks[-1]["choices"][0]["finish_reason"] = reason
    else:
        chunks.append(_chunk({}, reason))
    if draw(st.booleans()):
        chunks.insert(0, {"id": "", "object": "", "choices": [], "prompt_filter_results": []})
    if draw(st.booleans()):
        chunks.append({**_chunk({}, None), "choices": [], "usage": {"prompt_tokens": 3}})
    stream = b"".join(_event(draw, json.dumps(chunk).encode()) for chunk in chunks)
    if draw(st.booleans()):
        stream += _event(draw, b"[DONE]")
    if draw(st.booleans()):
        stream = stream.rstrip(b"\r\n")
    cuts = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    ends = [*cuts, len(stream)]
    split = [stream[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    return split, "".join(pieces), [(n, "".join(a)) for n, a in made], reason


def _chunk(delta: dict[str, Any], finish: str | None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


def _event(draw: st.DrawFn, data: bytes) -> bytes:
    """One event with this data: its line ends, its lines and what else stands in it."""
    end = draw(line_ends)
    lines = [b"data:" + (b" " if draw(st.booleans()) else b"") + data]
    at = data.find(b', "') + 1  # white space of the JSON: a line may end there
    if at > 0 and draw(st.booleans()):
        lines = [b"data: " + data[:at], b"data: " + data[at:]]
    lines[:0] = draw(st.lists(noise, max_size=2))
    return end.join(lines) + end + end * draw(st.integers(1, 2))


def read(stream: bytes) -> tuple[dict[str, Any], list[str], list[bytes]]:
    """(message, finish reasons, what is neither a chunk nor a comment)."""
    parser, builder = EventParser(), MessageBuilder()
    finishes: list[str] = []
    odd: list[bytes] = []
    for event in [*parser.feed(stream), *parser.close()]:
        chunk = decode_chunk(event.data) if event.data else {}
        if chunk is None:
            odd.append(event.data)
            continue
        for choice in choices_of(chunk):
            builder.add(choice["delta"])
            if choice.get("finish_reason"):
                finishes.append(choice["finish_reason"])
    return builder.build(), finishes, odd


def same(message: dict[str, Any], text: str, made: list[tuple[str, str]]) -> None:
    assert (message.get("content") or "") == text
    calls = [c["function"] for c in message.get("tool_calls") or ()]
    assert [(c["name"], c["arguments"]) for c in calls] == made


@examples(30)
@given(framed(), st.booleans(), st.integers(0, 30))
def test_stream_says_what_the_model_said_when_it_is_sieved(
    stream: tuple[list[bytes], str, list[tuple[str, str]], str], offer: bool, hold: int
) -> None:
    pieces, text, made, reason = stream
    sieve = Sieve(OURS, hold, 500, False, False, len)
    sieve.begin_round(offer)
    out: list[bytes] = []
    for piece in pieces:
        out += sieve.feed(piece, 0.0)
    ended, ready = sieve.end_round()
    out += [*ready, *sieve.finish(ended.finish_reason, None)]
    assert ended.complete and ended.error is None
    same(ended.message, text, made)
    message, finishes, odd = read(b"".join(out))
    same(message, text, made)
    same(sieve.shown(), text, made)
    assert finishes == [reason]
    assert odd == [b"[DONE]"]


@examples(25)
@given(framed())
def test_invariant_02_tee_passes_the_same_bytes_and_understands_them(
    stream: tuple[list[bytes], str, list[tuple[str, str]], str]
) -> None:
    pieces, text, made, _ = stream
    one, out = tee(*pieces)
    assert out + one.held == b"".join(pieces)
    (message,) = one.messages()
    same(message, text, made)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "a", "stop", "page_fault"]),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(
        st.sampled_from(["index", "id", "function", "name", "arguments", "delta", "content", "role",
                         "tool_calls", "finish_reason", "type", "usage", "text", "thinking"]),
        inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@examples(30)
@given(st.lists(st.dictionaries(st.sampled_from(["choices", "usage", "id", "model", "error"]), values)))
def test_chunk_of_any_shape_breaks_nothing(chunks: list[dict[str, Any]]) -> None:
    sieve, passing = Sieve(OURS, 4, 500, False, True, len), Tee(False, LIMIT)
    sieve.begin_round(True)
    for chunk in chunks:
        data = b"data: " + json.dumps(chunk).encode() + b"\n\n"
        sieve.feed(data, 0.0)
        passing.feed(data)
    ended, _ = sieve.end_round()
    last = b"".join(sieve.finish(ended.finish_reason, {"prompt_tokens": 1}))
    assert last.endswith(b"data: [DONE]\n\n")
    assert all(message["role"] == "assistant" for message in passing.messages())


def test_tee_holds_no_more_than_an_opening_and_comments_cost_their_bytes() -> None:
    role = b'data: {"choices":[{"delta":{"role":"assistant"}}]}\n\n' * 20_000
    tee, passed, most = Tee(True, 1 << 20), 0, 0
    for at in range(0, len(role), 4096):
        passed += len(tee.feed(role[at : at + 4096]))
        most = max(most, len(tee.held))
    assert most < 80_000 and passed + len(tee.held) == len(role)
    tee, comments = Tee(True, 1 << 20), b":\n\n" * 200_000
    with cpu_within(2):  # measured 0.5
        assert b"".join(tee.feed(comments[at : at + (1 << 16)]) for at in range(0, len(comments), 1 << 16)) == comments


def test_items_of_a_list_by_the_ten_thousand_are_put_together_in_linear_time() -> None:
    builder = MessageBuilder()
    with cpu_within(2):  # measured 0.2; each beside all others, 19
        for number in range(20_000):
            builder.add({"annotations": [{"index": number, "type": "x", "text": "a"}]})
            builder.add({"annotations": [{"index": number, "text": "b"}]})
    items = builder.build()["annotations"]
    assert len(items) == 20_000 and items[-1]["text"] == "ab"
