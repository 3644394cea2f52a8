"""A stream as the client sees it: one stream, whatever it took to make it."""

from __future__ import annotations

from tests.contract import say
from tests.contract.model import LONG_STREAM, STREAMS, Failed, check, equal, expect, quote
from tests.contract.play import Play
from tests.contract.wire import Reply
from tests.e2e.answers import Break, Drop

TEXT = "The code of depot 3 is amber, as was noted on the first day of this long voyage. " * 3


def _well_formed(reply: Reply) -> None:
    chunks = reply.chunks()
    for key in ("id", "created", "model", "system_fingerprint"):
        values = {str(chunk.get(key)) for chunk in chunks}
        equal(len(values), 1, f"different values of {key} in one stream ({sorted(values)})")
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    roles = sum(bool(c["delta"].get("role")) for c in choices)
    equal(roles, 1, "role deltas in one stream")
    reasons = [c.get("finish_reason") for c in choices]
    equal([r is not None for r in reasons], [False] * (len(reasons) - 1) + [True], "finish reasons")
    equal(reply.events().count("[DONE]"), 1, "[DONE] events")
    equal(reply.events()[-1], "[DONE]", "the last event")


@check("streams.identity", "one id, created, model and fingerprint; one role, one finish reason, "
       "one [DONE], last", STREAMS)
async def identity(play: Play) -> None:
    play.says(say.text(TEXT))
    reply = await play.chat()
    if play.target.loops and play.long:
        play.looped()
    _well_formed(reply)
    equal(reply.content(), TEXT, "the text")


@check("streams.identity_calls", "the same of a stream that ends in tool calls, numbered from 0", STREAMS)
async def identity_calls(play: Play) -> None:
    calls = [say.call("call_1", "look"), say.call("call_2", "look")]
    play.says(say.calling(*calls, content="Let me see what there is. " * 10))
    reply = await play.chat(tools=[say.tool("look")])
    _well_formed(reply)
    deltas = [c["choices"][0]["delta"] for c in reply.chunks() if c["choices"]]
    indexes = [t["index"] for d in deltas for t in d.get("tool_calls") or ()]
    equal(list(dict.fromkeys(indexes)), [0, 1], "indexes of the calls")


@check("streams.content_type", "a stream's content-type is text/event-stream", STREAMS)
async def content_type(play: Play) -> None:
    play.says(say.text("Yes."))
    got = (await play.chat()).header("content-type") or ""
    expect(got.startswith("text/event-stream"), f"content-type is {got}")


@check("streams.uncompressed", "a stream is not compressed, whatever the client accepts", STREAMS)
async def uncompressed(play: Play) -> None:
    play.says(say.text(TEXT * 20))
    accepts = [("Accept-Encoding", "gzip, deflate, br, zstd")]
    reply = (await play.send(play.body(), accepts)).ok()
    equal(reply.header("content-encoding"), None, "content-encoding")
    equal(reply.content(), TEXT * 20, "the text")


@check("streams.late_error", "an error event in mid-stream reaches the client, and no end after it", STREAMS)
async def late_error(play: Play) -> None:
    late = say.event({"error": {"message": "The engine is overloaded.", "type": "server_error",
                                "param": None, "code": "overloaded"}})
    play.says(lambda request: say.streamed([*say.chunks(request, say.text(TEXT))[:6], late]))
    reply = await play.send(play.body())
    expect("The engine is overloaded." in reply.text, f"no error: {quote(reply.text[-400:])}")
    _no_clean_end(reply)


@check("streams.first_error", "an error event as the first one reaches the client", STREAMS)
async def first_error(play: Play) -> None:
    late = say.event({"error": {"message": "No capacity.", "type": "server_error", "code": 503}})
    play.says(lambda request: say.streamed([late]))
    reply = await play.send(play.body())
    expect("No capacity." in reply.text, f"no error: {reply.status} {quote(reply.text[-400:])}")
    _no_clean_end(reply)


@check("streams.broken", "a stream that upstream cuts off does not look whole to the client", STREAMS)
async def broken(play: Play) -> None:
    play.says(lambda request: say.streamed([*say.chunks(request, say.text(TEXT))[:8], Break()]))
    reply = await play.send(play.body())
    expect(reply.broken or '"error"' in reply.text, f"it ended well: {quote(reply.text[-400:])}")
    _no_clean_end(reply)


def _no_clean_end(reply: Reply) -> None:
    if reply.status != 200:
        return
    for data in reply.events():
        for reason in ('"finish_reason":"stop"', '"finish_reason": "stop"'):
            if reason in data:
                raise Failed(f"a finish reason was made up: {quote(data)}")


@check("streams.no_finish", "a stream with [DONE] and no finish reason: the text is whole", STREAMS)
async def no_finish(play: Play) -> None:
    def short(request: dict[str, object]) -> object:
        events = say.chunks(request, say.text(TEXT))
        return say.streamed([*events[:-2], events[-1]])

    play.says(short)  # type: ignore[arg-type]
    equal((await play.chat()).content(), TEXT, "the text")


@check("streams.later_drop", "upstream drops the connection of a later round: the client is told",
       (LONG_STREAM,), needs="loop")
async def later_drop(play: Play) -> None:
    play.says(Drop())
    reply = await play.send(play.body())
    play.looped()
    told = reply.broken or reply.status >= 500 or '"error"' in reply.text
    expect(told, f"it ended well: {quote(reply.text[-400:])}")
    _no_clean_end(reply)


@check("streams.text_of_rounds", "text of an inner round longer than what may be held is not said twice",
       (LONG_STREAM,), needs="loop")
async def text_of_rounds(play: Play) -> None:
    play.script.inner_message = {"content": "I will look this up in what was noted before. " * 6}
    play.says(say.text("It is amber."))
    reply = await play.chat()
    play.looped()
    content = reply.content() or ""
    expect(content.endswith("It is amber."), f"the text ends in {quote(content[-80:])}")
    expect(content.count("It is amber.") == 1, "the answer is said twice")
