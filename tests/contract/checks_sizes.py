"""No refusal of a gateway's own: what upstream would answer is answered, whatever it is called and however
large that part of it is which no memory can shrink.

Scenarios of large parts run where the window is small (`Play.long`), with and without a long history.
"""

from __future__ import annotations

import json
from typing import Any

from tests.contract import say
from tests.contract.model import (
    LONG,
    PAGED,
    SHORT,
    Check,
    Scenario,
    add,
    check,
    equal,
    expect,
    quote,
)
from tests.contract.play import Play, history
from tests.contract.scripted import tag_text
from tests.contract.talks import user
from tests.contract.wire import Json

UNKNOWN_MODEL = "harbour-9b-instruct"  # in no table
NAMES: dict[str, str] = {
    "empty": "",
    "braces": "{chat:7}",
    "colons": "agent:main#topic 4/7",
    "unicode": "Unterhaltung № 7 – 港",
    "long": "s" * 200,
    "json": '{"device": "d1", "session": ["a", 1]}',
    "dots": "../../etc/passwd",
    "quotes": "Bob's \"best\" chat; DROP TABLE x",
    "percent": "%7Bchat%7D%00",
}


def _named(name: str) -> Scenario:
    async def scenario(play: Play) -> None:
        play.says(say.text("Yes."))
        for key in ("session_id", "chat_id", "conversation_id"):
            reply = await play.chat(metadata={key: name})
            equal(reply.content(), "Yes.", f"the answer to metadata.{key}")
        if not name.isascii() or not name.isprintable():
            return
        for header in ("X-Session-Id", "X-OpenWebUI-Chat-Id", "X-Conversation-Id", "Helicone-Session-Id"):
            reply = (await play.send(play.body(), [(header, name)])).ok()
            equal(reply.content(), "Yes.", f"the answer to {header}")

    return scenario


for _id, _name in NAMES.items():
    add(Check(f"sizes.session_{_id}", f"a session called {quote(_name, 40)!r} is answered, in a header as in "
              "metadata", _named(_name), (SHORT,)))


@check("sizes.session_no_text", "a session's name that is a number, null, a list or an object: the answer is "
       "upstream's", (SHORT,))
async def no_text(play: Play) -> None:
    play.valid = False
    play.says(say.text("Yes."))
    for value in (7, None, True, ["a"], {"id": "a"}):
        reply = await play.chat(metadata={"session_id": value})
        equal(reply.content(), "Yes.", f"the answer to {value!r}")
    reply = await play.chat(metadata=None)
    equal(reply.content(), "Yes.", "the answer to metadata: null")


# ---------------------------------------------------------------- what cannot be paged


def _words(name: str, count: int) -> str:
    return " ".join(f"{name}{i % 97}" for i in range(count))


def _tools() -> list[Json]:
    out = []
    for number in range(36):
        made = say.tool(f"crane_{number}")
        made["function"]["description"] = _words(f"lift{number}x", 60)
        out.append(made)
    return out


def _schema() -> Json:
    fields = {f"berth_{i}": {"type": "string", "description": _words("mooring", 40)} for i in range(60)}
    schema = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    return {"type": "json_schema", "json_schema": {"name": "berths", "strict": True, "schema": schema}}


def _fixed(**fields: Any) -> Scenario:
    async def scenario(play: Play) -> None:
        text = "{}" if "response_format" in fields else "Yes."
        play.says(say.text(text), inner=0)
        for messages in ([*play.ask()[:1], user("Hello?")], play.ask("Hello?")):
            play.script.calls.clear()
            reply = await play.chat(messages, **fields)
            equal(reply.content(), text, "the answer")
            for name, value in fields.items():
                if name == "tools":
                    got = play.wire.tools(play.last.json["tools"])[: len(value)]
                    expect(got == play.wire.tools(value), "the client's tools are not upstream as they were")
                else:
                    play.every(name, value)
            play.newest(messages, 1)

    return scenario


FIXED: dict[str, tuple[str, Scenario]] = {
    "tools": ("tools larger than the window", _fixed(tools=_tools())),
    "schema": ("a schema larger than the window", _fixed(response_format=_schema())),
    "max_tokens": ("max_tokens 8000, twice the window", _fixed(max_tokens=8000)),
    "max_completion_tokens": ("max_completion_tokens 16000, four times the window",
                              _fixed(max_completion_tokens=16_000)),
    "coding_agent": ("a coding agent's tools and max_tokens 8000", _fixed(tools=_tools(), max_tokens=8000)),
}
for _id, (_what, _scenario) in FIXED.items():
    add(Check(f"sizes.{_id}", f"{_what}: they go up as they are and the client gets upstream's answer", _scenario,
              PAGED))


@check("sizes.system", "a system message larger than the window goes up whole and the client gets upstream's "
       "answer", PAGED)
async def system(play: Play) -> None:
    play.says(say.text("Yes."), inner=0)
    words = f"{tag_text(play.tag)} {_words('rule', 5000)}"
    for rest in ([user("Hello?")], [*history(play.tag, 12), user("And now?")]):
        play.script.calls.clear()
        messages = [{"role": "system", "content": words}, *rest]
        reply = await play.chat(messages)
        equal(reply.content(), "Yes.", "the answer")
        expect(words in json.dumps(play.last.json["messages"]), "the system message is not upstream whole")
        play.newest(messages, 1)


def _notes(role: str, text: str) -> Scenario:
    async def scenario(play: Play) -> None:
        play.says(say.text("Yes."), inner=0)
        messages = play.ask()[:1]
        for number in range(24):
            messages += [user(f"Look into hold {number}."), say.text(f"I run `look {number}`."),
                         {"role": role, "content": text.format(n=number) + _words("crate", 100)}]
        messages.append(user("What was in them?"))
        reply = await play.chat(messages)
        equal(reply.content(), "Yes.", "the answer")
        play.newest(messages, 1)
        expect(play.tag in json.dumps(play.last.json["messages"]), "the first system message is not upstream")
        if play.target.window_tokens:
            tokens, most = play.wire.tokens(play.last.json), play.target.window_tokens
            expect(tokens <= most, f"the request has {tokens} tokens, more than {most}")

    return scenario


add(Check("sizes.system_outputs", "tool outputs as system messages in mid-history, more than the window: paged like "
          "others", _notes("system", "Output of look {n}:\n"), PAGED))
add(Check("sizes.developer_notes", "developer messages in mid-history, more than the window: paged like others",
          _notes("developer", "Note {n}: "), PAGED))


@check("sizes.unknown_model", "a model that nobody knows, and a request larger than what one would assume of it: "
       "upstream says whether it is too large", (SHORT,))
async def unknown_model(play: Play) -> None:
    play.says(say.text("Yes."))
    messages = play.ask()[:1]
    messages[0]["content"] += " " + _words("rule", 16_000)
    reply = await play.chat([*messages, user("Hello?")], model=UNKNOWN_MODEL)
    equal(reply.content(), "Yes.", "the answer")


@check("sizes.only_tools", "a hundred small tools and a short question go up as they are and are answered", (LONG,))
async def only_tools(play: Play) -> None:
    play.says(say.text("Yes."))
    tools = [say.tool(f"winch_{number}") for number in range(100)]
    reply = await play.chat([*play.ask()[:1], user("Hello? " * 40)], tools=tools)
    equal(reply.content(), "Yes.", "the answer")
