"""Usage: what was asked for, and nothing else."""

from __future__ import annotations

import json
from typing import Any

from tests.contract import say
from tests.contract.model import (
    BOTH,
    PAGED,
    SHORT_STREAM,
    STREAMS,
    check,
    equal,
    expect,
    quote,
)
from tests.contract.play import Play

USAGE = {
    "prompt_tokens": 31, "completion_tokens": 9, "total_tokens": 40,
    "prompt_tokens_details": {"cached_tokens": 12, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 4, "accepted_prediction_tokens": 1},
    "cost": 0.00125, "queue_time": 0.5,
}


@check("usage.whole", "usage of one round comes back with its details and unknown fields", BOTH)
async def whole(play: Play) -> None:
    play.says(lambda request: say.answer(request, say.text("Yes."), usage=USAGE), inner=0)
    got = (await play.chat()).json().get("usage") or {}
    for key, value in play.wire.usage(USAGE).items():
        equal(got.get(key), value, f"usage.{key}")


@check("usage.rounds", "over rounds: completion_tokens is the sum, prompt_tokens the last round's, "
       "total_tokens their sum", PAGED, needs="loop")
async def rounds(play: Play) -> None:
    play.says(say.text("Yes."), inner=2)
    fields: dict[str, Any] = {"stream_options": {"include_usage": True}} if play.stream else {}
    reply = await play.chat(**fields)
    play.looped(3)
    usage = (reply.chunks()[-1] if play.stream else reply.json()).get("usage") or {}
    last = say.prompt_tokens(play.last.json)
    completion = say.COMPLETION_TOKENS * len(play.calls)
    equal(usage.get("completion_tokens"), completion, "usage.completion_tokens")
    equal(usage.get("prompt_tokens"), last, "usage.prompt_tokens")
    equal(usage.get("total_tokens"), last + completion, "usage.total_tokens")


@check("usage.not_asked", "a stream whose client did not ask for usage has none", STREAMS)
async def not_asked(play: Play) -> None:
    play.says(say.text("Yes."))
    reply = await play.chat()
    for chunk in reply.chunks():
        expect("usage" not in chunk, f"a chunk has usage: {quote(chunk)}")
        expect(chunk["choices"], f"a chunk has no choices: {quote(chunk)}")


@check("usage.refused", "include_usage false: no usage", STREAMS)
async def refused(play: Play) -> None:
    play.says(say.text("Yes."))
    reply = await play.chat(stream_options={"include_usage": False})
    for chunk in reply.chunks():
        expect(not chunk.get("usage"), f"a chunk has usage: {quote(chunk)}")
        expect(chunk["choices"], f"a chunk has no choices: {quote(chunk)}")


@check("usage.asked", "include_usage: usage null on every chunk, then one chunk with choices [] and "
       "usage, then [DONE]", STREAMS)
async def asked(play: Play) -> None:
    play.says(say.text("The code is amber."))
    reply = await play.chat(stream_options={"include_usage": True})
    chunks = reply.chunks()
    for chunk in chunks[:-1]:
        expect("usage" in chunk and chunk["usage"] is None, f"usage is not null: {quote(chunk)}")
        expect(chunk["choices"], f"no choices before the last chunk: {quote(chunk)}")
    equal(chunks[-1]["choices"], [], "choices of the last chunk")
    usage = chunks[-1].get("usage") or {}
    equal(usage.get("prompt_tokens"), say.prompt_tokens(play.last.json), "usage.prompt_tokens")
    equal(reply.events()[-1], "[DONE]", "the last event")


@check("usage.asked_upstream", "what the client asked about usage reaches upstream in every round", STREAMS)
async def asked_upstream(play: Play) -> None:
    play.says(say.text("Yes."))
    await play.chat(stream_options={"include_usage": True, "include_obfuscation": False})
    play.every("stream_options", {"include_usage": True, "include_obfuscation": False})


@check("usage.with_finish", "usage in the chunk of the finish reason (some providers) is not lost", STREAMS)
async def with_finish(play: Play) -> None:
    def odd(request: dict[str, Any]) -> Any:
        events = say.chunks({**request, "stream_options": None}, say.text("Yes."))
        last = json.loads(events[-2][6:])
        return say.streamed([*events[:-2], say.event({**last, "usage": USAGE}), say.DONE])

    play.says(odd, inner=0)
    reply = await play.chat(stream_options={"include_usage": True})
    found = [c["usage"] for c in reply.chunks() if c.get("usage")]
    expect(found, "no chunk has usage")
    equal(found[-1].get("prompt_tokens"), 31, "usage.prompt_tokens")
    equal(reply.finish(), "stop", "finish_reason")


@check("usage.continuous", "usage that grows with every chunk (vLLM) ends with the last", (SHORT_STREAM,))
async def continuous(play: Play) -> None:
    def odd(request: dict[str, Any]) -> Any:
        events = []
        for i, event in enumerate(say.chunks({**request, "stream_options": None}, say.text("Yes."))[:-1]):
            chunk = json.loads(event[6:])
            events.append(say.event({**chunk, "usage": {**USAGE, "completion_tokens": i}}))
        last = {**chunk, "choices": [], "usage": USAGE}
        return say.streamed([*events, say.event(last), say.DONE])

    play.says(odd)
    asked = {"include_usage": True, "continuous_usage_stats": True}
    chunks = (await play.chat(stream_options=asked)).chunks()
    equal((chunks[-1].get("usage") or {}).get("completion_tokens"), 9, "the last completion_tokens")
