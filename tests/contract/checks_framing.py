"""Server-sent events as providers really write them: the client reads the same message."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.contract import say
from tests.contract.model import (
    LONG_STREAM,
    SHORT_STREAM,
    STREAMS,
    Check,
    Scenario,
    add,
    check,
    equal,
)
from tests.contract.play import Play

TEXT = "The code of café \U0001f600 is amber00003, as was noted on the first day of the voyage. " * 3
LOOK = say.tool("look")
CALLS = [say.call("call_1", "look", '{"word": "é"}'), say.call("call_2", "look", "{}")]
Events = list[bytes]
Json = dict[str, Any]


def _joined(events: Events) -> bytes:
    return b"".join(events)


def _bytes(events: Events) -> Events:
    whole = _joined(events)
    return [whole[i : i + 1] for i in range(len(whole))]


def _sevens(events: Events) -> Events:
    whole = _joined(events)
    return [whole[i : i + 7] for i in range(0, len(whole), 7)]


def _multi_line(events: Events) -> Events:
    out = []
    for event in events:
        data = event[6:-2]
        if data != b"[DONE]":
            written = json.dumps(json.loads(data), indent=1, ensure_ascii=False)
            data = written.encode().replace(b"\n", b"\ndata: ")
        out.append(b"data: " + data + b"\n\n")
    return out


def _comments(events: Events) -> Events:
    out = [b": OPENROUTER PROCESSING\n\n"]
    for event in events:
        out += [b":\n\n", b": inside\n" + event, b": ping - 2024\n\n"]
    return out


def _crlf(events: Events) -> Events:
    return [e.replace(b"\n", b"\r\n") for e in events]


def _cr(events: Events) -> Events:
    return [e.replace(b"\n", b"\r") for e in events]


def _crlf_split(events: Events) -> Events:
    """CRLF with every pair cut in two."""
    out = []
    for event in _crlf(events):
        out += [event[:-3], event[-3:-2], event[-2:-1], event[-1:]]
    return out


def _no_space(events: Events) -> Events:
    return [e.replace(b"data: ", b"data:", 1) for e in events]


def _other_fields(events: Events) -> Events:
    return [b"event: message\nid: %d\nretry: 100\n" % i + e for i, e in enumerate(events)]


def _blank_lines(events: Events) -> Events:
    return [b"\n\n" + e + b"\n" for e in events]


def _changed(events: Events, change: Callable[[Json, int], Json]) -> Events:
    """Each chunk with a choice changed; usage and [DONE] stay."""
    return [
        say.event(change(json.loads(e[6:]), i)) if b'"delta"' in e else e
        for i, e in enumerate(events)
    ]


def _azure(events: Events) -> Events:
    head: Json = {"id": "", "object": "", "created": 0, "model": "", "choices": []}
    filters = {"prompt_index": 0, "content_filter_results": {"hate": {"filtered": False}}}
    first = say.event({**head, "prompt_filter_results": [filters]})
    return [first, *events]


def _null_fields(events: Events) -> Events:
    def change(chunk: Json, i: int) -> Json:
        delta = {"role": None, "content": None, "tool_calls": None, "function_call": None,
                 "refusal": None, **chunk["choices"][0]["delta"]}
        choice = {**chunk["choices"][0], "delta": delta}
        return {**chunk, "usage": None, "choices": [choice]}

    return _changed(events, change)


def _roles(events: Events) -> Events:
    def change(chunk: Json, i: int) -> Json:
        choice = chunk["choices"][0]
        return {**chunk, "choices": [{**choice, "delta": {**choice["delta"], "role": "assistant"}}]}

    return _changed(events, change)


def _finish_with_text(events: Events) -> Events:
    """The finish reason in the chunk with the last piece."""
    end = max(i for i, e in enumerate(events) if b'"delta"' in e)
    last, finish = json.loads(events[end - 1][6:]), json.loads(events[end][6:])
    last["choices"][0]["finish_reason"] = finish["choices"][0]["finish_reason"]
    return [*events[: end - 1], say.event(last), *events[end + 1 :]]


def _empty_finish(events: Events) -> Events:
    """finish_reason "" in place of null, as some servers write it."""
    def change(chunk: Json, i: int) -> Json:
        choice = chunk["choices"][0]
        return {**chunk, "choices": [{**choice, "finish_reason": choice["finish_reason"] or ""}]}

    return _changed(events, change)


def _null_delta(events: Events) -> Events:
    """`delta: null` beside the finish reason."""
    def change(chunk: Json, i: int) -> Json:
        choice = chunk["choices"][0]
        return {**chunk, "choices": [{**choice, "delta": choice["delta"] or None}]}

    return _changed(events, change)


def _no_index(events: Events) -> Events:
    """Choices without an index."""
    def change(chunk: Json, i: int) -> Json:
        return {**chunk, "choices": [{k: v for k, v in c.items() if k != "index"} for c in chunk["choices"]]}

    return _changed(events, change)


def _null_choices(events: Events) -> Events:
    about: Json = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    odd = say.event({**about, "choices": None})
    return [odd, *events[:-1], odd, events[-1]]


def _bare_chunks(events: Events) -> Events:
    """Chunks with choices and nothing else."""
    return _changed(events, lambda chunk, i: {"choices": chunk["choices"]})


FRAMINGS: dict[str, tuple[str, Callable[[Events], Events]]] = {
    "every_byte": ("each byte in a packet of its own", _bytes),
    "sevens": ("packets of seven bytes", _sevens),
    "one_packet": ("everything in one packet", lambda events: [_joined(events)]),
    "multi_line": ("data over several lines", _multi_line),
    "comments": ("comments before, within and after events", _comments),
    "crlf": ("CRLF line ends", _crlf),
    "crlf_split": ("CRLF line ends cut between CR and LF", _crlf_split),
    "cr": ("CR line ends", _cr),
    "no_space": ("no space after the colon", _no_space),
    "other_fields": ("event, id and retry lines", _other_fields),
    "blank_lines": ("more blank lines than needed", _blank_lines),
    "empty_choices": ("a first chunk with empty choices, id and model (Azure)", _azure),
    "null_fields": ("null for what a delta does not have", _null_fields),
    "roles": ("a role in every delta", _roles),
    "finish_with_text": ("the finish reason beside the last text", _finish_with_text),
    "empty_finish": ("an empty finish_reason until the end", _empty_finish),
    "null_delta": ("delta null at the end", _null_delta),
    "no_index": ("choices without an index", _no_index),
    "null_choices": ("chunks with choices null", _null_choices),
    "bare_chunks": ("chunks without id, model and date", _bare_chunks),
    "no_done": ("no [DONE] at the end", lambda events: events[:-1]),
    "no_last_blank": ("no blank line at the end", lambda events: [*events[:-1], b"data: [DONE]"]),
}


def _same(frame: Callable[[Events], Events], message: Json, fields: Json) -> Scenario:
    async def scenario(play: Play) -> None:
        play.says(lambda request: say.streamed(frame(say.chunks(request, message))))
        reply = await play.chat(**fields)
        got = reply.message()
        equal(got.get("content") or None, message.get("content"), "the text")
        play.same_calls(got.get("tool_calls"), message.get("tool_calls"), "the tool calls")
        equal(reply.finish(), say.finish_of(message), "finish_reason")

    return scenario


for _name, (_promise, _frame) in FRAMINGS.items():
    add(Check(f"framing.{_name}", f"{_promise}: the text is whole",
              _same(_frame, say.text(TEXT), {}), STREAMS))
    if _name != "finish_with_text":
        add(Check(f"framing.{_name}_calls", f"{_promise}: calls are whole",
                  _same(_frame, say.calling(*CALLS), {"tools": [LOOK]}), STREAMS))


# ---------------------------------------------------------------- tool call deltas


def calls_chunks(request: Json, deltas: list[Json], finish: str = "tool_calls") -> Any:
    about = say.head(request, 9, "chat.completion.chunk")
    all_deltas: list[Json] = [{"role": "assistant", "content": None}, *deltas]
    events = [
        say.event({**about, "choices": [{"index": 0, "delta": d, "finish_reason": None}]})
        for d in all_deltas
    ]
    end = {"index": 0, "delta": {}, "finish_reason": finish}
    return say.streamed([*events, say.event({**about, "choices": [end]}), say.DONE])


def _without_index(call: Json) -> list[Json]:
    opening = {**call, "function": {**call["function"], "arguments": ""}}
    parts = say.pieces(call["function"]["arguments"], 5)
    return [{"tool_calls": [opening]}, *({"tool_calls": [{"function": {"arguments": p}}]} for p in parts)]


DELTAS: dict[str, tuple[str, list[Json]]] = {
    "indexless": (
        "deltas without an index",
        [d for call in CALLS for d in _without_index(call)],
    ),
    "whole_calls": (
        "each call whole in one chunk",
        [{"tool_calls": [{**call, "index": i}]} for i, call in enumerate(CALLS)],
    ),
    "calls_at_once": (
        "all calls in one chunk",
        [{"tool_calls": [{**call, "index": i} for i, call in enumerate(CALLS)]}],
    ),
    "indexless_whole": (
        "whole calls without an index in one chunk",
        [{"tool_calls": CALLS}],
    ),
    "index_gap": (
        "indexes that begin at 1 and leave a gap",
        [{"tool_calls": [{**call, "index": 1 + 2 * i}]} for i, call in enumerate(CALLS)],
    ),
    "interleaved": (
        "arguments of two calls in turns",
        [
            {"tool_calls": [{**c, "index": i, "function": {"name": "look", "arguments": ""}}]}
            for i, c in enumerate(CALLS)
        ]
        + [
            {"tool_calls": [{"index": i, "function": {"arguments": part}}]}
            for i, part in ((0, '{"wo'), (1, "{"), (0, 'rd": "é"}'), (1, "}"))
        ],
    ),
    "repeated_ids": (
        "id, type and name in every delta",
        [
            {"tool_calls": [{**c, "index": i, "function": {"name": "look", "arguments": part}}]}
            for i, c in enumerate(CALLS)
            for part in say.pieces(c["function"]["arguments"], 5)
        ],
    ),
}


def _same_calls(deltas: list[Json]) -> Scenario:
    async def scenario(play: Play) -> None:
        play.says(lambda request: calls_chunks(request, deltas))
        reply = await play.chat(tools=[LOOK])
        play.same_calls(reply.message().get("tool_calls"), CALLS, "the tool calls")
        equal(reply.finish(), "tool_calls", "finish_reason")

    return scenario


for _name, (_promise, _deltas) in DELTAS.items():
    add(Check(f"framing.{_name}", f"tool calls as {_promise}", _same_calls(_deltas), STREAMS))


@check("framing.finish_stop", "streamed calls with finish_reason stop", STREAMS)
async def finish_stop(play: Play) -> None:
    play.says(lambda request: calls_chunks(request, DELTAS["whole_calls"][1], "stop"))
    reply = await play.chat(tools=[LOOK])
    play.same_calls(reply.message().get("tool_calls"), CALLS, "the tool calls")
    equal(reply.finish(), "stop", "finish_reason")


@check("framing.long_line", "an event of 300 KB in one line", STREAMS)
async def long_line(play: Play) -> None:
    text = "winding sentence " * 18_000
    play.says(lambda request: say.streamed(say.chunks(request, say.text(text), piece=2**20)))
    reply = await play.chat()
    equal(len(reply.content() or ""), len(text), "characters of the text")


@check("framing.json_for_stream", "a whole JSON answer to a stream's request is readable",
       (SHORT_STREAM, LONG_STREAM))
async def json_for_stream(play: Play) -> None:
    play.says(lambda request: say.whole(request, say.text("It is amber.")))
    equal((await play.chat()).content(), "It is amber.", "the text")
