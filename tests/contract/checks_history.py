"""Histories as clients really send them: edited, regenerated, forked, repeated, huge, at once."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
from typing import Any

from PIL import Image

from tests.contract import say
from tests.contract.model import ALL, BOTH, PAGED, SHORT, check, equal, expect, quote
from tests.contract.play import Play, encode

LOOK = say.tool("look")


def _texts(play: Play) -> list[Any]:
    return [m.get("content") for m in play.last.json["messages"]]


def _times(play: Play, ending: str) -> int:
    return sum(isinstance(t, str) and t.endswith(ending) for t in _texts(play))


@check("history.edited", "an edited question replaces the old one: upstream sees the new one alone")
async def edited(play: Play) -> None:
    play.says(say.text("Noted: teal."), inner=0)
    messages = play.ask("My colour is teal.")
    await play.chat(messages)
    more = [*play.ask("My colour is ochre."), say.text("Noted: ochre."), _user("Which is it?")]
    await play.chat(more)
    equal(_times(play, "My colour is ochre."), 1, "times that the new text stands upstream")
    expect("teal" not in json.dumps(play.last.json), "the old text went upstream")


@check("history.regenerated", "after a second answer the first one is not upstream")
async def regenerated(play: Play) -> None:
    play.says(say.text("First try: teal."), say.text("Second try: ochre."), say.text("Yes."), inner=0)
    messages = play.ask("Name a colour.")
    await play.chat(messages)
    await play.chat(messages)
    await play.chat([*messages, say.text("Second try: ochre."), _user("Sure?")])
    equal(_texts(play).count("Second try: ochre."), 1, "times that the second answer stands upstream")
    expect("First try" not in json.dumps(play.last.json), "the first answer went upstream")


@check("history.reused_ids", "tool call ids that repeat in every turn (call_0) keep to their own turn", ALL)
async def reused_ids(play: Play) -> None:
    messages = play.ask("Look one up.")
    for number in range(3):
        messages += [
            say.calling(say.call("call_0", "look", json.dumps({"word": f"w{number}"}))),
            {"role": "tool", "tool_call_id": "call_0", "content": f"found {number}"},
            say.text(f"It is {number}."),
            _user(f"And the next, {number}?"),
        ]
    play.says(say.text("Done."), inner=0)
    await play.chat(messages, tools=[LOOK])
    play.newest(messages, 12)
    results = [m["content"] for m in play.last.json["messages"] if m["role"] == "tool"]
    equal(results, ["found 0", "found 1", "found 2"], "tool results upstream")


@check("history.prefill", "an assistant's message at the end (to be continued) stays at the end", ALL)
async def prefill(play: Play) -> None:
    begun = say.text("The code is")
    play.says(say.text(" amber."), inner=0)
    reply = await play.chat(play.ask("Which code?", begun))
    equal(play.last.json["messages"][-1], begun, "the last message upstream")
    equal(reply.content(), " amber.", "the text")


@check("history.only_system", "a request with nothing but a system message goes upstream", (SHORT,))
async def only_system(play: Play) -> None:
    play.says(say.text("Hello."))
    messages = play.ask()[:1]
    await play.chat(messages)
    if play.wire.verbatim:
        equal(play.last.json["messages"], messages, "messages upstream")
    play.newest(messages, 1)


@check("history.at_once", "four requests of one conversation at once are all answered", ALL)
async def at_once(play: Play) -> None:
    play.says(say.text("Yes."), inner=0)
    replies = await asyncio.gather(*(play.chat() for _ in range(4)))
    equal([reply.content() for reply in replies], ["Yes."] * 4, "the answers")
    bodies = {recorded.body for recorded in play.calls}
    equal(len(bodies), 1, "different upstream requests")


@check("history.huge_message", "a message larger than the window is cut to fit it and answered", PAGED,
       needs="window")
async def huge_message(play: Play) -> None:
    play.says(say.text("Yes."), inner=0)
    words = " ".join(f"barrel{i} of tar" for i in range(3000))
    reply = await play.chat(play.ask(f"Read this: {words}. What is it about?"))
    equal(reply.content(), "Yes.", "the answer")
    tokens = play.wire.tokens(play.calls[0].json)
    most = play.target.window_tokens
    expect(tokens <= most, f"the request has {tokens} tokens, more than {most}")


@check("history.large_image", "an image of 1 MB goes upstream as it is", (SHORT,))
async def large_image(play: Play) -> None:
    data = base64.b64encode(_noise(600)).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    play.says(say.text("Yes."))
    messages = play.ask({"role": "user", "content": [image]})
    body = encode(play.body(messages))
    (await play.send(body)).ok()
    if play.wire.verbatim:
        expect(play.last.body == body, f"upstream got {len(play.last.body)} bytes of {len(body)}")
    expect(data.encode() in play.last.body, "the image's data is not upstream")


def _noise(side_px: int) -> bytes:
    """A PNG that no encoder makes small."""
    pixels = Image.frombytes("RGB", (side_px, side_px), random.Random(1).randbytes(3 * side_px**2))
    file = io.BytesIO()
    pixels.save(file, "PNG")
    return file.getvalue()


@check("history.whitespace", "a body with spaces and line ends around everything is understood", BOTH)
async def whitespace(play: Play) -> None:
    play.says(say.text("Yes."))
    written = "\n \t" + json.dumps(play.body(temperature=0.25), indent=3) + "\r\n"
    (await play.send(written.encode())).ok()
    play.every("temperature", 0.25)


@check("history.escaped", "a body in pure ASCII escapes is understood", BOTH)
async def escaped(play: Play) -> None:
    play.says(say.text("Yes."))
    (await play.send(json.dumps(play.body(play.ask("Café \U0001f600?"))).encode())).ok()
    equal(_times(play, "Café \U0001f600?"), 1, "times that the text stands upstream")


@check("history.chunked", "a request body without a length (chunked) is understood", BOTH)
async def chunked(play: Play) -> None:
    play.says(say.text("Yes."))
    body = encode(play.body())

    async def pieces() -> Any:
        for at in range(0, len(body), 1000):
            yield body[at : at + 1000]

    reply = (await (await play.open(pieces())).rest()).ok()
    equal(reply.content(), "Yes.", "the answer")


@check("history.null_tools", "tools null and tool_choice null are no tools", ALL)
async def null_tools(play: Play) -> None:
    play.says(say.text("Yes."), inner=0)
    reply = await play.chat(tools=None, tool_choice=None)
    equal(reply.content(), "Yes.", f"the answer; upstream got {quote(play.last.json.get('tools'))}")


@check("history.retry_of_rounds", "a request sent again after its second round failed: the turn is upstream "
       "once", PAGED, needs="loop")
async def retry_of_rounds(play: Play) -> None:
    play.says(say.error(501, "Oops."), say.text("The code is amber."), say.text("Bye."))
    messages = play.ask("What was the code, please?")
    first = await play.send(play.body(messages))
    play.looped()
    expect(first.status == 501 or '"error"' in first.text, f"no error: {quote(first.text)}")
    started = play.calls[0].body
    play.script.calls.clear()
    await play.chat(messages)
    equal(play.calls[0].body, started, "the second try's first request upstream")
    play.script.inner = 0
    await play.chat([*messages, say.text("The code is amber."), _user("Good bye.")])
    equal(_times(play, "What was the code, please?"), 1, "times that the question stands upstream")
    equal(_texts(play).count("The code is amber."), 1, "times that the answer stands upstream")


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
