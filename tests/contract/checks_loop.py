"""Rounds inside: what a gateway does between a client's question and its answer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

from tests.contract import say
from tests.contract.checks_framing import calls_chunks
from tests.contract.model import (
    LONG,
    LONG_STREAM,
    PAGED,
    Check,
    Scenario,
    add,
    check,
    equal,
    expect,
    quote,
)
from tests.contract.play import Play, fact
from tests.contract.wires import items_of

CACHED_SHARE = 0.9
MOST_ROUNDS = 32  # of a turn whose model never stops calling
THINKING = [{"type": "thinking", "thinking": "Hm.", "signature": "c2ln"},
            {"type": "redacted_thinking", "data": "ZW5j"}]
REASONING: dict[str, dict[str, Any]] = {
    "reasoning_content": {"reasoning_content": "I should look the code up first."},
    "reasoning": {"reasoning": "I look.", "reasoning_details": [
        {"type": "reasoning.encrypted", "data": "QUJD", "format": "x", "index": 0}]},
    "thinking_blocks": {"thinking_blocks": THINKING},
    "extra_content": {"extra_content": {"google": {"thought_signature": "QUJD"}}},
}


def _replayed(keys: dict[str, Any]) -> Scenario:
    async def scenario(play: Play) -> None:
        play.script.inner_message = keys
        play.says(say.text("It is amber."))
        await play.chat()
        play.looped()
        said = [m for m in play.last.json["messages"] if m.get("tool_calls")]
        expect(said, "the message with the call is not in the next round")
        for key, value in keys.items():
            equal(said[-1].get(key), value, f"{key} in the next round")

    return scenario


for _name, _keys in REASONING.items():
    add(Check(f"loop.{_name}", f"{', '.join(_keys)} of an inner round: replayed verbatim in the next",
              _replayed(_keys), PAGED, "loop"))


@check("loop.call_signature", "unknown keys of an inner call (thought_signature) are replayed verbatim",
       PAGED, needs="loop")
async def call_signature(play: Play) -> None:
    extra = {"google": {"thought_signature": "QUJD"}}

    def step(request: dict[str, Any], inner: dict[str, Any]) -> Any:
        return say.answer(request, say.calling({**inner, "extra_content": extra}))

    play.script.inner_step = step
    play.says(say.text("It is amber."))
    await play.chat()
    play.looped()
    said = [m for m in play.last.json["messages"] if m.get("tool_calls")]
    equal(said[-1]["tool_calls"][0].get("extra_content"), extra, "extra_content of the call")


@check("loop.prefix", "each round's messages begin with those of the round before, byte for byte", PAGED,
       needs="loop")
async def prefix(play: Play) -> None:
    play.says(say.text("Yes."), inner=2)
    await play.chat()
    play.looped(3)
    prompts = [play.wire.prompt(recorded) for recorded in play.calls]
    for number, (before, after) in enumerate(itertools.pairwise(prompts), start=1):
        expect(after.startswith(before), f"round {number} does not begin with the one before")


@check("loop.next_turn_prefix", "the next turn's request begins with this turn's, byte for byte, but for what was "
       "put in front of its newest user message", PAGED, needs="loop")
async def next_turn_prefix(play: Play) -> None:
    play.says(say.text("Yes."))
    messages = play.ask()
    await play.chat(messages)
    play.looped()
    before = play.wire.prompt(play.last)
    play.script.inner = 0
    await play.chat([*messages, say.text("Yes."), {"role": "user", "content": "And now?"}])
    after = play.wire.prompt(play.last)
    if after.startswith(before):
        return
    start, end, asked = [found for found in items_of(before) if found[2].get("role") == "user"][-1]
    expect(after[:start] == before[:start], "what stands before the newest user message changed")
    later = {begins: (ends, item) for begins, ends, item in items_of(after)}
    ends, got = later.get(start, (0, None))
    equal(got, _as_said(asked, messages[-1]["content"]), "that message in the next turn")
    expect(after[ends:].startswith(before[end:]), "what stands behind that message changed")


def _as_said(value: Any, said: str) -> Any:
    """A user's message without what was put in front of its text."""
    if isinstance(value, dict):
        return {key: _as_said(inner, said) for key, inner in value.items()}
    if isinstance(value, list):
        return [_as_said(inner, said) for inner in value]
    return said if isinstance(value, str) and value.endswith(said) else value


@check("loop.cache", f"the provider's cache has at least {CACHED_SHARE:.0%} of what stands before a turn's newest "
       "user message for the next turn (with cache markers where it asks for them)", PAGED, needs="window")
async def cache(play: Play) -> None:
    play.says(say.text("Yes."), inner=0)
    messages = play.ask()
    await play.chat(messages)
    before = play.last
    await play.chat([*messages, say.text("Yes."), {"role": "user", "content": "And now?"}])
    share = play.wire.cached_share(before, play.last)
    expect(share >= CACHED_SHARE, f"it has {share:.0%}")


@check("loop.window", "every upstream request fits the window", PAGED, needs="window")
async def window(play: Play) -> None:
    play.says(say.text("Yes."), inner=3)
    await play.chat()
    for number, recorded in enumerate(play.calls):
        tokens = play.wire.tokens(recorded.json)
        most = play.target.window_tokens
        expect(tokens <= most, f"round {number} has {tokens} tokens, more than {most}")


@check("loop.recall", "what an old message says is at hand when it is asked for", PAGED, needs="window")
async def recall(play: Play) -> None:
    play.says(say.text("Yes."))
    await play.chat(play.ask("Which code has depot 3?"))
    seen = json.dumps(play.last.json["messages"])
    expect(fact(3) in seen, f"{fact(3)} is not in the last round's request")


@check("loop.ends", f"a model that never stops calling is stopped within {MOST_ROUNDS} rounds, and the "
       "client gets an answer", PAGED, needs="loop")
async def ends(play: Play) -> None:
    play.says(say.text("It is amber."), inner=1000)
    reply = await play.chat()
    expect(len(play.calls) <= MOST_ROUNDS, f"{len(play.calls)} rounds")
    expect("call_inner" not in reply.text, f"an inner call leaked: {quote(reply.text)}")


def _inner_shape(finish: str | None, arguments: str | None) -> Scenario:
    async def scenario(play: Play) -> None:
        def step(request: dict[str, Any], inner: dict[str, Any]) -> Any:
            body = {**inner["function"], **({"arguments": arguments} if arguments is not None else {})}
            message = say.calling({**inner, "function": body})
            return say.answer(request, message, finish=finish or "tool_calls")

        play.script.inner_step = step
        play.says(say.text("It is amber."))
        reply = await play.chat()
        play.looped()
        equal(reply.content(), "It is amber.", "the answer")
        equal(reply.finish(), "stop", "finish_reason")
        expect("call_inner" not in reply.text, f"an inner call leaked: {quote(reply.text)}")

    return scenario


SHAPES: dict[str, tuple[str, str | None, str | None]] = {
    "finish_stop": ("with finish_reason stop", "stop", None),
    "cut_by_length": ("cut by the token limit", "length", '{"query": "dep'),
    "cut_by_stop": ("cut by a stop word", "stop", '{"page_id": "msg_'),
    "no_arguments": ("without arguments", None, ""),
    "bad_arguments": ("with arguments that are no JSON", None, "depot 3"),
    "wrong_arguments": ("with unknown arguments", None, '{"x": [1]}'),
}
for _name, (_promise, _finish, _arguments) in SHAPES.items():
    add(Check(f"loop.{_name}", f"a call of the gateway's own {_promise}: the client gets the answer",
              _inner_shape(_finish, _arguments), PAGED, "loop"))


def _odd_calls(change: Callable[[dict[str, Any]], list[dict[str, Any]]]) -> Scenario:
    async def scenario(play: Play) -> None:
        def step(request: dict[str, Any], inner: dict[str, Any]) -> Any:
            if not play.stream:
                return say.answer(request, say.calling(*change(inner)))
            deltas = [{"tool_calls": [{**one, "index": i}]} for i, one in enumerate(change(inner))]
            return calls_chunks(request, deltas)

        play.script.inner_step = step
        play.says(say.text("It is amber."))
        reply = await play.chat()
        play.looped()
        equal(reply.content(), "It is amber.", "the answer")

    return scenario


def _without_id(inner: dict[str, Any]) -> list[dict[str, Any]]:
    return [{k: v for k, v in inner.items() if k != "id"}]


ODD: dict[str, tuple[str, Callable[[dict[str, Any]], list[dict[str, Any]]]]] = {
    "no_id": ("without an id", _without_id),
    "empty_id": ("with an empty id", lambda inner: [{**inner, "id": ""}]),
    "same_ids": ("twice with one id", lambda inner: [inner, inner]),
    "no_type": ("without a type", lambda inner: [{k: v for k, v in inner.items() if k != "type"}]),
}
for _name, (_promise, _change) in ODD.items():
    add(Check(f"loop.{_name}", f"a call of the gateway's own {_promise}: the next request is valid and the "
              "client gets the answer", _odd_calls(_change), PAGED, "loop"))


@check("loop.indexless", "streamed calls of the gateway's own without an index", (LONG_STREAM,), needs="loop")
async def indexless(play: Play) -> None:
    def step(request: dict[str, Any], inner: dict[str, Any]) -> Any:
        opening = {**inner, "function": {**inner["function"], "arguments": ""}}
        parts = say.pieces(inner["function"]["arguments"], 4)
        deltas = [{"tool_calls": [{"function": {"arguments": part}}]} for part in parts]
        return calls_chunks(request, [{"tool_calls": [opening]}, *deltas], "stop")

    play.script.inner_step = step
    play.says(say.text("It is amber."))
    reply = await play.chat()
    play.looped()
    equal(reply.content(), "It is amber.", "the answer")


@check("loop.object_arguments", "arguments of the gateway's own call as an object (not a string)", (LONG,),
       needs="loop")
async def object_arguments(play: Play) -> None:
    def step(request: dict[str, Any], inner: dict[str, Any]) -> Any:
        body = {**inner["function"], "arguments": json.loads(inner["function"]["arguments"])}
        return say.whole(request, say.calling({**inner, "function": body}))

    play.script.inner_step = step
    play.says(say.text("It is amber."))
    reply = await play.chat()
    play.looped()
    equal(reply.content(), "It is amber.", "the answer")


@check("loop.cut_is_reasked", "stop words that cut a call of the gateway's own: asked again without its tools",
       PAGED, needs="loop")
async def cut_is_reasked(play: Play) -> None:
    def step(request: dict[str, Any], inner: dict[str, Any]) -> Any:
        body = {**inner["function"], "arguments": '{"query": "dep'}
        return say.answer(request, say.calling({**inner, "function": body}), finish="stop")

    play.script.inner_step = step
    play.says(say.text("It is amber."))
    reply = await play.chat(stop=["ot"])
    play.looped()
    equal(reply.content(), "It is amber.", "the answer")
    again = play.last.json
    off = again.get("tool_choice") == "none" or not play.script.own_tools(again)
    expect(off, "its tools are on offer again")


@check("loop.calls_at_once", "several calls of the gateway's own in one message are all answered", PAGED,
       needs="loop")
async def calls_at_once(play: Play) -> None:
    def step(request: dict[str, Any], inner: dict[str, Any]) -> Any:
        return say.answer(request, say.calling(inner, {**inner, "id": "call_inner_b"}))

    play.script.inner_step = step
    play.says(say.text("It is amber."))
    await play.chat()
    play.looped()
    ids = [m.get("tool_call_id") for m in play.last.json["messages"] if m["role"] == "tool"]
    equal(len(ids), 2, "results in the next round")


@check("loop.required_after", "under required, rounds go on until a client's tool is called", PAGED)
async def required_after(play: Play) -> None:
    wanted = say.call("call_1", "look")
    play.says(say.calling(wanted))
    reply = await play.chat(tools=[say.tool("look")], tool_choice="required")
    play.same_calls(reply.message().get("tool_calls"), [wanted], "the client's tool calls")
    equal(play.last.json.get("tool_choice"), "required", "tool_choice of the last round")


@check("loop.first_identity", "the answer has the id and created of the first round", (LONG,), needs="loop")
async def first_identity(play: Play) -> None:
    play.says(say.text("Yes."))
    reply = await play.chat()
    play.looped()
    first = json.loads(bytes(play.calls[0].sent))
    got = reply.json()
    equal([got["id"], got["created"]], [first["id"], first["created"]], "id and created")


@check("loop.audio_expired", "an expired audio id of an earlier answer is replaced by its transcript",
       (LONG,), needs="window")
async def audio_expired(play: Play) -> None:
    audio = {"id": "audio_old", "data": "UklGRg==", "expires_at": 1, "transcript": "The code is amber."}
    fields = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}
    play.says(say.text(None, audio=audio), say.text("Yes."), inner=0)
    messages = play.ask()
    await play.chat(messages, **fields)
    echoed = {"role": "assistant", "audio": {"id": "audio_old"}}
    await play.chat([*messages, echoed, {"role": "user", "content": "Again?"}], **fields)
    sent = json.dumps(play.last.json["messages"])
    expect('"audio_old"' not in sent, "the expired id went upstream")
    expect("The code is amber." in sent, "its transcript did not go upstream")


@check("loop.inner_error_event", "an error event in an inner round reaches the client", (LONG_STREAM,),
       needs="loop")
async def inner_error_event(play: Play) -> None:
    late = say.event({"error": {"message": "Inner trouble.", "type": "server_error", "code": None}})

    def step(request: dict[str, Any], inner: dict[str, Any]) -> Any:
        return say.streamed([*say.chunks(request, say.calling(inner))[:3], late])

    play.script.inner_step = step
    reply = await play.send(play.body())
    expect("Inner trouble." in reply.text, f"no error: {quote(reply.text)}")
    expect("call_inner" not in reply.text, f"an inner call leaked: {quote(reply.text)}")
