"""Framings of one answer, cut anywhere: no byte of text lost or doubled, no hang.

Whatever a provider does to its stream that the specification of server-sent events allows (and some
that it does not), what the client reads is what the model said.
"""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.channel import TOOLS, Channel, vm_names
from proxy.conversation.sieve import Sieve
from proxy.conversation.sse import EventParser, MessageBuilder, Tee, choices_of, decode_chunk
from tests.examples import examples

CLIENT = ["lookup", "page", "p", "page_faults", "search"]
OURS = Channel(TOOLS, True, vm_names(None), frozenset(CLIENT), True)
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


@examples(100)
@given(framed(), st.booleans(), st.integers(0, 30))
def test_a_sieved_stream_says_what_the_model_said(
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


@examples(80)
@given(framed())
def test_invariant_02_a_stream_that_passes_is_the_same_bytes_and_is_understood(
    stream: tuple[list[bytes], str, list[tuple[str, str]], str]
) -> None:
    pieces, text, made, _ = stream
    tee = Tee()
    out = b"".join(tee.feed(piece) for piece in pieces)
    assert out + tee.held == b"".join(pieces)
    (message,) = tee.messages()
    same(message, text, made)


@examples(80)
@given(st.lists(st.binary(max_size=40), max_size=8))
def test_any_bytes_come_back_once(pieces: list[bytes]) -> None:
    parser = EventParser()
    events = [event for piece in pieces for event in parser.feed(piece)]
    events += parser.close()
    whole = b"".join(pieces)
    assert whole.startswith(joined := b"".join(event.raw for event in events))
    assert not whole[len(joined) :].strip()


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


@examples(100)
@given(st.lists(st.dictionaries(st.sampled_from(["choices", "usage", "id", "model", "error"]), values)))
def test_no_chunk_whatever_its_shape_breaks_the_sieve(chunks: list[dict[str, Any]]) -> None:
    sieve, tee = Sieve(OURS, 4, 500, False, True, len), Tee()
    sieve.begin_round(True)
    for chunk in chunks:
        data = b"data: " + json.dumps(chunk).encode() + b"\n\n"
        sieve.feed(data, 0.0)
        tee.feed(data)
    ended, _ = sieve.end_round()
    last = b"".join(sieve.finish(ended.finish_reason, {"prompt_tokens": 1}))
    assert last.endswith(b"data: [DONE]\n\n")
    assert all(message["role"] == "assistant" for message in tee.messages())
