"""Tools: what is offered, what may be chosen, and what comes back when the model calls."""

from __future__ import annotations

import json
from typing import Any

from tests.contract import say
from tests.contract.model import (
    ALL,
    BOTH,
    LONG,
    LONG_STREAM,
    PAGED,
    Failed,
    check,
    equal,
    expect,
    quote,
)
from tests.contract.play import Play, encode, fact
from tests.contract.wire import Reply

LOOK = say.tool("look", description="Looks a word up.")
WRITE = say.tool("write", strict=True)
CUSTOM = {"type": "custom", "custom": {"name": "sql", "format": {"type": "grammar", "grammar": {
    "syntax": "lark", "definition": "start: /.+/"}}}}
NAMED = {"type": "function", "function": {"name": "look"}}
ODD = '{ "word" :"caf\\u00e9 \\n\\"x\\"" ,"n":1.0}'


def _client_tools_first(play: Play, tools: list[dict[str, Any]]) -> None:
    for number, recorded in enumerate(play.calls):
        got = recorded.json.get("tools") or []
        mine = play.wire.tools(got[: len(tools)])
        equal(mine, play.wire.tools(tools), f"the client's tools in round {number}")
        expect(len(got) <= 128, f"{len(got)} tools in round {number}, more than 128")


@check("tools.order", "the client's tools stand first, in their order, key by key, in every round")
async def order(play: Play) -> None:
    custom = [] if play.wire.why_absent("tools.custom", "") else [CUSTOM]
    tools = [WRITE, LOOK, *custom, say.tool("zeta", x_vendor={"a": 1})]
    play.says(say.text("No need."))
    await play.chat(tools=tools)
    _client_tools_first(play, tools)
    for recorded in play.calls if play.wire.verbatim else ():
        inside = encode({"tools": tools})[len('{"tools":[') : -2]
        expect(inside in recorded.body, "the tools' bytes changed")


@check("tools.strict", "strict and its schema stay as they are")
async def strict(play: Play) -> None:
    play.says(say.text("No need."))
    await play.chat(tools=[WRITE])
    _client_tools_first(play, [WRITE])


@check("tools.custom", "custom tools with a grammar go upstream")
async def custom(play: Play) -> None:
    play.says(say.text("No need."))
    await play.chat(tools=[CUSTOM])
    _client_tools_first(play, [CUSTOM])


@check("tools.limit", "128 tools of the client go upstream, and never more than 128 in all")
async def limit(play: Play) -> None:
    tools = [{"type": "function", "function": {"name": f"t{i}"}} for i in range(128)]
    play.says(say.text("No need."))
    await play.chat(tools=tools)
    _client_tools_first(play, tools)


@check("tools.collision", "client tools with the names of the gateway's own are the client's", ALL)
async def collision(play: Play) -> None:
    names = ["page_fault", "search_pages", "headroom_retrieve", "vc_expand_topic", "memory_search"]
    tools = [say.tool(name) for name in names]
    wanted = say.call("call_c", "page_fault", '{"word":"mine"}')
    play.says(say.calling(wanted))
    reply = await play.chat(tools=tools)
    _client_tools_first(play, tools)
    play.same_calls(reply.message().get("tool_calls"), [wanted], "the client's tool calls")


@check("tools.choice_none", "tool_choice none stays, and nothing but text comes back")
async def choice_none(play: Play) -> None:
    play.says(say.text("Text."))
    reply = await play.chat(tools=[LOOK], tool_choice="none")
    play.every("tool_choice", "none")
    equal(reply.content(), "Text.", "the answer")


@check("tools.choice_auto", "tool_choice auto goes upstream")
async def choice_auto(play: Play) -> None:
    play.says(say.text("Text."))
    await play.chat(tools=[LOOK], tool_choice="auto")
    play.every("tool_choice", "auto")


async def _forced(play: Play, choice: Any) -> None:
    wanted = say.call("call_1", "look", ODD)
    play.says(say.calling(wanted))
    reply = await play.chat(tools=[LOOK, WRITE], tool_choice=choice)
    play.every("tool_choice", choice)
    play.same_calls(reply.message().get("tool_calls"), [wanted], "the client's tool calls")


@check("tools.choice_required", "required is kept in every round and met by a client's tool only", ALL)
async def choice_required(play: Play) -> None:
    await _forced(play, "required")


@check("tools.choice_named", "a named choice is kept in every round and met by that tool", ALL)
async def choice_named(play: Play) -> None:
    await _forced(play, NAMED)


@check("tools.choice_allowed", "allowed_tools goes upstream as it is", ALL)
async def choice_allowed(play: Play) -> None:
    inside = {"mode": "required", "tools": [NAMED]}
    await _forced(play, {"type": "allowed_tools", "allowed_tools": inside})


@check("tools.parallel_false", "parallel_tool_calls false goes upstream in every round")
async def parallel_false(play: Play) -> None:
    play.says(say.text("Text."))
    await play.chat(tools=[LOOK], parallel_tool_calls=False)
    play.every("parallel_tool_calls", False)


@check("tools.parallel_true", "parallel_tool_calls true goes upstream in every round")
async def parallel_true(play: Play) -> None:
    play.says(say.text("Text."))
    await play.chat(tools=[LOOK], parallel_tool_calls=True)
    play.every("parallel_tool_calls", True)


@check("tools.parallel_calls", "several calls come back whole, in order, arguments as written", ALL)
async def parallel_calls(play: Play) -> None:
    calls = [say.call("call_1", "look", ODD), say.call("call_2", "write", ""), say.call("call_3", "look")]
    play.says(say.calling(*calls, content="Let me see."))
    reply = await play.chat(tools=[LOOK, WRITE])
    play.same_calls(reply.message().get("tool_calls"), calls, "the tool calls")
    equal(reply.content(), "Let me see.", "the text beside them")
    equal(reply.finish(), "tool_calls", "finish_reason")


@check("tools.call_extra", "unknown keys of a call (thought signatures) come back", ALL)
async def call_extra(play: Play) -> None:
    wanted = say.call("call_1", "look", extra_content={"google": {"thought_signature": "QUJD"}})
    play.says(say.calling(wanted))
    reply = await play.chat(tools=[LOOK])
    play.same_calls(reply.message().get("tool_calls"), [wanted], "the tool calls")


@check("tools.custom_calls", "calls of custom tools come back with their input", ALL)
async def custom_calls(play: Play) -> None:
    wanted = {"id": "call_1", "type": "custom", "custom": {"name": "sql", "input": "SELECT 'é';\n"}}
    play.says(say.calling(wanted))
    reply = await play.chat(tools=[CUSTOM])
    play.same_calls(reply.message().get("tool_calls"), [wanted], "the tool calls")


@check("tools.function_call", "a legacy function_call comes back", ALL)
async def function_call(play: Play) -> None:
    wanted = {"name": "look", "arguments": ODD}
    play.says(say.text(None, function_call=wanted))
    functions = [{"name": "look", "parameters": {"type": "object", "properties": {}}}]
    reply = await play.chat(functions=functions)
    equal(reply.message().get("function_call"), wanted, "function_call")
    equal(reply.finish(), "function_call", "finish_reason")


@check("tools.finish_stop", "tool calls with finish_reason stop come back as upstream said", ALL)
async def finish_stop(play: Play) -> None:
    wanted = say.call("call_1", "look")
    play.says(lambda request: say.answer(request, say.calling(wanted), finish="stop"))
    reply = await play.chat(tools=[LOOK])
    play.same_calls(reply.message().get("tool_calls"), [wanted], "the tool calls")
    equal(reply.finish(), "stop", "finish_reason")


@check("tools.result_turn", "call, result, answer: the exchange stands whole in the next request", ALL)
async def result_turn(play: Play) -> None:
    wanted = say.call("call_1", "look", ODD)
    play.says(say.calling(wanted), say.text("It is found."))
    first = play.ask()
    await play.chat(first, tools=[LOOK])
    result = {"role": "tool", "tool_call_id": "call_1", "content": "found"}
    play.script.calls.clear()
    reply = await play.chat([*first, say.calling(wanted), result], tools=[LOOK])
    play.newest([say.calling(wanted), result], 2)
    equal(reply.content(), "It is found.", "the answer")


def _mixed(play: Play, reply: Reply, wanted: dict[str, Any]) -> None:
    play.same_calls(reply.message().get("tool_calls"), [wanted], "the client's calls")
    equal(reply.finish(), "tool_calls", "finish_reason")
    if play.stream:
        deltas = [c["choices"][0]["delta"] for c in reply.chunks() if c["choices"]]
        indexes = {d["index"] for delta in deltas for d in delta.get("tool_calls") or ()}
        equal(indexes, {0}, "indexes of the client's one call")


@check("tools.mixed", "a call of the gateway's beside one of the client's: the client's alone comes "
       "back, re-indexed; with its result both are put back", PAGED, needs="loop")
async def mixed(play: Play) -> None:
    wanted = say.call("call_c", "look", ODD)
    made: list[dict[str, Any]] = []

    def both(request: dict[str, Any], inner: dict[str, Any]) -> Any:
        made.append(inner)
        return say.answer(request, say.calling(inner, wanted), len(play.calls))

    play.says(say.text("It is found."))
    play.script.inner_step = both
    first = play.ask()
    reply = await play.chat(first, tools=[LOOK])
    play.offered()
    expect(made, "the tool on offer was not called")
    _mixed(play, reply, wanted)
    play.script.inner = 0
    play.script.calls.clear()
    result = {"role": "tool", "tool_call_id": "call_c", "content": "found"}
    await play.chat([*first, say.calling(wanted), result], tools=[LOOK])
    tail = play.calls[0].json["messages"][-3:]
    ids = [c["id"] for c in tail[0].get("tool_calls") or ()]
    equal(ids, [made[0]["id"], "call_c"], "calls of the message that is put back")
    equal([m.get("tool_call_id") for m in tail[1:]], ids, "results that are put back")


@check("tools.foreign_call", "a call of a tool that nobody offered comes back to the client", BOTH)
async def foreign_call(play: Play) -> None:
    wanted = say.call("call_1", "unheard_of")
    play.says(say.calling(wanted))
    reply = await play.chat(tools=[LOOK])
    play.same_calls(reply.message().get("tool_calls"), [wanted], "the tool calls")


@check("tools.no_leak", "nothing of the gateway's own tools or memory reaches the client", PAGED,
       needs="loop")
async def no_leak(play: Play) -> None:
    play.says(say.text("It is " + fact(3)))
    reply = await play.chat(tools=[LOOK])
    play.looped()
    own = play.script.own_tools(play.calls[0].json)
    for word in [*own, "call_inner", "<VM:", "VM:CONTEXT"]:
        if word in reply.text:
            raise Failed(f"{word!r} is in {quote(reply.text)}")
    equal(reply.content(), "It is " + fact(3), "the answer")


@check("tools.same_array", "the tools array is the same in every round", (LONG, LONG_STREAM), needs="loop")
async def same_array(play: Play) -> None:
    play.says(say.text("Yes."), inner=2)
    await play.chat(tools=[LOOK])
    play.looped(3)
    arrays = {json.dumps(recorded.json.get("tools")) for recorded in play.calls}
    equal(len(arrays), 1, "different tools arrays in one turn")
