"""Structured output: the client parses what it gets, always."""

from __future__ import annotations

import json
from typing import Any

from tests.contract import say
from tests.contract.checks_fields import SCHEMA
from tests.contract.model import ALL, PAGED, Failed, check, equal, quote
from tests.contract.play import Play

OBJECT = {"code": "amber00003", "why": "it is written in a long and winding sentence " * 4}
CHATTER = '{"thinking": "' + "let me look " * 40 + '"}'
FORMATS: dict[str, dict[str, Any]] = {
    "text": {"type": "text"},
    "json_object": {"type": "json_object"},
    "json_schema": {"type": "json_schema", "json_schema": SCHEMA},
}


async def _parses(play: Play, kind: str, wanted: Any = OBJECT) -> None:
    reply = await play.chat(response_format=FORMATS[kind])
    content = reply.content()
    try:
        got = json.loads(content or "")
    except ValueError:
        raise Failed(f"the client cannot parse {quote(content)}") from None
    equal(got, wanted, "the object")
    play.every("response_format", FORMATS[kind])


@check("formats.json_object", "json_object: the object comes back and nothing else", ALL)
async def json_object(play: Play) -> None:
    play.says(say.text(json.dumps(OBJECT)))
    await _parses(play, "json_object")


@check("formats.json_schema", "json_schema: the object comes back and nothing else", ALL)
async def json_schema(play: Play) -> None:
    play.says(say.text(json.dumps(OBJECT)))
    await _parses(play, "json_schema")


@check("formats.text", "text: the text comes back", ALL)
async def plain(play: Play) -> None:
    play.says(say.text("It is amber."))
    equal((await play.chat(response_format=FORMATS["text"])).content(), "It is amber.", "the text")


@check("formats.preamble", "words of an inner round never stand before the object", PAGED, needs="loop")
async def preamble(play: Play) -> None:
    play.script.inner_message = {"content": CHATTER}
    play.says(say.text(json.dumps(OBJECT)))
    await _parses(play, "json_object")
    play.looped()


@check("formats.short_preamble", "a few words before a call of the gateway's own are not shown", PAGED,
       needs="loop")
async def short_preamble(play: Play) -> None:
    play.script.inner_message = {"content": "Let me look."}
    play.says(say.text("It is amber."))
    reply = await play.chat()
    play.looped()
    equal(reply.content(), "It is amber.", "the text")


@check("formats.spaces", "an answer's spaces and line ends are kept", ALL)
async def spaces(play: Play) -> None:
    text = "  \n```json\n{ \"a\" :\t1 }\n```\r\n \n"
    play.says(say.text(text))
    equal((await play.chat()).content(), text, "the text")
