"""A gateway's tools stay its own: however a model spells a call of them, the client never sees it and never
gets an empty answer; and what only looks like one is the client's.

A scenario takes the call that the suite would have made and has the model spell it otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from tests.contract import say
from tests.contract.model import ALL, PAGED, Check, Scenario, add, check, equal, expect, quote
from tests.contract.play import Play
from tests.contract.wire import Json, Reply
from tests.e2e.answers import Answer

ANSWER = "It is amber."
PIECE = 5  # characters of a streamed piece: marks are cut in the middle


def _answered(play: Play, reply: Reply, most: int = 4) -> None:
    """The client got the answer, and nothing of the gateway's own."""
    own = {name for recorded in play.calls for name in play.script.own_tools(recorded.json)}
    message = reply.ok().message()
    equal(message.get("tool_calls") or None, None, "the client's tool calls")
    content = message.get("content")
    expect(content, f"the client got an empty answer: {quote(reply.text)}")
    leaked = [name for name in own if _squeezed(name) in _squeezed(reply.text)]
    expect(not leaked, f"{leaked} reached the client: {quote(content)}")
    expect(str(content).endswith(ANSWER), f"the answer is {quote(content)}")
    expect(len(play.calls) <= most, f"{len(play.calls)} upstream calls")


def _squeezed(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _camel(name: str) -> str:
    return "".join(part.title() for part in name.split("_"))


SPELLINGS: dict[str, tuple[str, Callable[[str], str]]] = {
    "namespace": ("in a namespace", lambda name: f"namespace.functions.{name}"),
    "tools_dot": ("under `tools.`", lambda name: f"tools.{name}"),
    "colon": ("behind a colon", lambda name: f"default_api:{name}"),
    "number": ("with a number behind it", lambda name: f"{name}:2"),
    "channel": ("with a channel behind it", lambda name: f"{name}<|channel|>analysis"),
    "message": ("with a mark behind it", lambda name: f"functions.{name}<|message|>"),
    "slash": ("behind a slash", lambda name: f"memory/{name}"),
    "camel": ("in camel case", lambda name: _camel(name)[:1].lower() + _camel(name)[1:]),
    "upper": ("in capitals", str.upper),
    "kebab": ("with dashes, and a suffix", lambda name: name.replace("_", "-") + "-tool"),
    "spaces": ("with spaces around it", lambda name: f" {name}\n"),
    "brackets": ("with brackets behind it", lambda name: f"{name}()"),
}


def _respelled(spell: Callable[[str], str]) -> Scenario:
    async def scenario(play: Play) -> None:
        def step(request: Json, inner: Json) -> Answer:
            body = {**inner["function"], "name": spell(inner["function"]["name"])}
            return say.answer(request, say.calling({**inner, "function": body}))

        play.script.inner_step = step
        play.says(say.text(ANSWER))
        reply = await play.chat()
        play.looped()
        _answered(play, reply)

    return scenario


for _id, (_what, _spell) in SPELLINGS.items():
    add(Check(f"calls.name_{_id}", f"a call of the gateway's own tool {_what}: served, or asked again; never the "
              "client's", _respelled(_spell), PAGED, "loop"))


# ---------------------------------------------------------------- calls written as text


def _json(name: str, arguments: str) -> str:
    return f'{{"name": "{name}", "arguments": {arguments}}}'


def _pythonic(name: str, arguments: str) -> str:
    pairs = ", ".join(f"{key}={value!r}" for key, value in json.loads(arguments).items())
    return f"[{name}({pairs})]"


TEXTS: dict[str, tuple[str, Callable[[str, str], str]]] = {
    "bare": ("bare JSON", _json),
    "parameters": ("JSON with `parameters`, over several lines",
                   lambda n, a: json.dumps({"name": n, "parameters": json.loads(a)}, indent=2)),
    "function": ("JSON with a `function` in it",
                 lambda n, a: f'{{"type": "function", "function": {_json(n, a)}}}'),
    "list": ("a list of one call", lambda n, a: f"[{_json(n, a)}]"),
    "string_arguments": ("JSON whose arguments are a text", lambda n, a: _json(n, json.dumps(a))),
    "tool_call": ("<tool_call>", lambda n, a: f"<tool_call>\n{_json(n, a)}\n</tool_call>"),
    "tool_call_open": ("<tool_call> that is never closed", lambda n, a: f"<tool_call>{_json(n, a)}"),
    "two_tool_calls": ("two <tool_call>", lambda n, a: f"<tool_call>{_json(n, a)}</tool_call>\n" * 2),
    "tool_calls_mark": ("[TOOL_CALLS]", lambda n, a: f"[TOOL_CALLS] [{_json(n, a)}]"),
    "python_tag": ("<|python_tag|>", lambda n, a: f"<|python_tag|>{_json(n, a)}<|eom_id|>"),
    "fenced": ("a fenced block", lambda n, a: f"```json\n{_json(n, a)}\n```"),
    "doubled": ("doubled braces", lambda n, a: f"{{{_json(n, a)}}}"),
    "function_tag": ("<function=...>", lambda n, a: f"<function={n}>{a}</function>"),
    "pythonic": ("a call in Python", _pythonic),
}


def _written(write: Callable[[str, str], str], rounds: int = 1) -> Scenario:
    async def scenario(play: Play) -> None:
        def step(request: Json, inner: Json) -> Answer:
            if request.get("tool_choice") == "none":  # it may not call: it answers
                return say.answer(request, say.text(ANSWER))
            body = inner["function"]
            return say.answer(request, say.text(write(body["name"], body["arguments"])), piece=PIECE)

        play.script.inner_step = step
        play.says(say.text(ANSWER), inner=rounds)
        reply = await play.chat()
        play.offered()
        _answered(play, reply, 4 if rounds == 1 else 32)

    return scenario


for _id, (_what, _write) in TEXTS.items():
    add(Check(f"calls.text_{_id}", f"a call of the gateway's own tool as text, {_what}: served, or asked again; "
              "never the answer", _written(_write), PAGED, "loop"))
add(Check("calls.text_forever", "a model that writes calls of the gateway's own tools as text as long as it may: the "
          "client gets an answer", _written(_json, 1000), PAGED, "loop"))

# ---------------------------------------------------------------- nobody's tools


def _nobodys(name: str, fields: Json) -> Scenario:
    async def scenario(play: Play) -> None:
        play.says(say.calling(say.call("call_nobody", name, '{"query": "depot 3"}')), say.text(ANSWER), inner=0)
        reply = await play.chat(**fields)
        play.offered()
        _answered(play, reply)

    return scenario


for _id, _name in {"search": "web_search", "python": "python", "final": "final_answer"}.items():
    add(Check(f"calls.nobodys_{_id}", f"a call of {_name}, which nobody has offered, to a client without tools: it gets "
              "an answer", _nobodys(_name, {}), PAGED, "loop"))


# ---------------------------------------------------------------- what only looks like one

LOOK = say.tool("look")
ALIKE: dict[str, tuple[str, str, Json]] = {
    "json": ("JSON with a name and arguments", '{"name": "Ada Byron", "arguments": ["for", "against"]}', {}),
    "fenced": ("a fenced example of a call", "Call it so:\n```json\n" + _json("look", '{"word": "x"}') + "\n```", {}),
    "client_tool": ("a call of the client's own tool, as text",
                    f"<tool_call>{_json('look', '{}')}</tool_call>", {"tools": [LOOK]}),
    "marks": ("marks of calls without a call", "The mark [TOOL_CALLS] stands before calls, <tool_call> around them.",
              {}),
    "code": ("code with braces", "{{ page }} in a template; [look(word='x')] in a list; {\"a\": {\"b\": 1}}", {}),
}


def _alike(text: str, fields: Json) -> Scenario:
    async def scenario(play: Play) -> None:
        play.says(lambda request: say.answer(request, say.text(text), piece=PIECE), inner=0)
        reply = await play.chat(**fields)
        equal(reply.content(), text, "the text")
        equal(len(play.calls), 1, "upstream calls")

    return scenario


for _id, (_what, _text, _fields) in ALIKE.items():
    add(Check(f"calls.alike_{_id}", f"{_what} is the client's answer as it stands", _alike(_text, _fields), ALL))


@check("calls.client_namespaced", "a client's own tool whose name ends like another's is called by its own name", ALL)
async def client_namespaced(play: Play) -> None:
    wanted = say.call("call_1", "my_page_fault", '{"word": "x"}')
    play.says(say.calling(wanted), inner=0)
    reply = await play.chat(tools=[say.tool("my_page_fault"), say.tool("search-pages")])
    play.same_calls(reply.message().get("tool_calls"), [wanted], "the client's tool calls")


@check("calls.client_twins", "a client that has a tool with the name of the gateway's own gets its calls", ALL)
async def client_twins(play: Play) -> None:
    names = [end for end, _ in play.target.arguments] or ["page_fault"]
    tools: list[Any] = [say.tool(name) for name in names]
    wanted = say.call("call_1", names[0], '{"word": "x"}')
    play.says(say.calling(wanted), inner=0)
    reply = await play.chat(tools=tools)
    play.same_calls(reply.message().get("tool_calls"), [wanted], "the client's tool calls")
