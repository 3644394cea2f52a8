"""Anthropic's and Gemini's models behind the proxy, over real sockets and through litellm.

Each server is strict about its provider's rules and records what came; the client is the official
one, so it keeps of an answer what that keeps. One server process serves both: importing litellm
takes seconds.
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from proxy.memory.context import CONTEXT_CLOSE, CONTEXT_OPEN
from tests.conversation.checks import without_evidence
from tests.e2e.answers import Response, Stream
from tests.e2e.processes import ServerProcess
from tests.e2e.providers import Call, Json, Said, texts_of
from tests.e2e.providers.anthropic import (
    LOOKBACK_BLOCKS,
    MAX_MARKERS,
    AnthropicServer,
    marker_positions,
    prefix_hashes,
    prompt_blocks,
)
from tests.e2e.providers.gemini import GeminiServer
from tests.e2e.providers.talk import PAGED, outgrow, said_in
from tests.e2e.schema import judged
from tests.e2e.script import LOOKUP, SYSTEM, Chat, filler

pytestmark = pytest.mark.asyncio(loop_scope="module")

CLAUDE, GEMINI = "anthropic/claude-sonnet-4-5", "gemini/gemini-3-pro-preview"
PIXEL = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8"
        "cfc0000003010100c9fe92ef0000000049454e44ae426082"
    )
).decode()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def servers() -> AsyncIterator[dict[str, Any]]:
    async with AnthropicServer() as claude, GeminiServer() as gemini:
        config = {
            "upstream": {"provider": "litellm"},
            **PAGED,
            "models": {
                "anthropic/*": {"api_base": claude.base_url},
                "gemini/*": {"api_base": gemini.base_url},
            },
        }
        with ServerProcess(config) as server:
            yield {CLAUDE: claude, GEMINI: gemini, "proxy": server}


@pytest.fixture(params=[CLAUDE, GEMINI])
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest_asyncio.fixture(loop_scope="module")
async def client(
    servers: dict[str, Any], request: pytest.FixtureRequest
) -> AsyncIterator[AsyncOpenAI]:
    """Each test's own key: no test sees another's history. At its end the servers are checked, and
    what the client got has to fit the API's own schema."""
    for name in (CLAUDE, GEMINI):
        servers[name].plan()
    async with judged() as http:
        yield AsyncOpenAI(
            api_key=request.node.name, base_url=servers["proxy"].base_url, max_retries=0, http_client=http
        )
    for name in (CLAUDE, GEMINI):
        servers[name].check()


def at(servers: dict[str, Any], model: str) -> Any:
    return servers[model]


def fault(*pages: str, **more: Any) -> Said:
    calls = [Call(f"toolu_{page}", "page_fault", {"page_id": page}) for page in pages]
    return Said(calls=calls, **more)


async def test_a_long_conversation_is_paged(
    servers: dict[str, Any], client: AsyncOpenAI, model: str
) -> None:
    server = at(servers, model)
    chat = Chat(client, model=model)
    await outgrow(chat, server, 8)
    first, *_, last = server.bodies()
    assert not said_in(first, "<VM:RULES>")
    assert said_in(last, "<VM:RULES>") and said_in(last, "page_fault")
    assert said_in(last, str(SYSTEM["content"]))


@pytest.mark.parametrize("stream", [False, True])
async def test_faults_and_searches_stay_inside(
    servers: dict[str, Any], client: AsyncOpenAI, model: str, stream: bool
) -> None:
    server = at(servers, model)
    chat = Chat(client, model=model)
    await outgrow(chat, server)
    server.plan(
        fault("msg_0001", "msg_0002", text="Let me look.", thinking="The first note, I think."),
        Said(calls=[Call("toolu_s", "search_pages", {"query": "Noted a2q"})], thinking="And one more."),
        Said("It was u0q.", thinking="Now I know."),
    )
    got = await chat.say("What did I note first?", "", stream=stream)
    assert (got.text, got.finish, got.calls) == ("It was u0q.", "stop", [])
    one, two, three = server.bodies()
    assert not said_in(one["messages" if model == CLAUDE else "contents"][-1], "a0q")
    new = two["messages" if model == CLAUDE else "contents"][-1]
    assert said_in(new, "u0q") and said_in(new, "a0q")
    found = three["messages" if model == CLAUDE else "contents"][-1]
    assert said_in(found, "msg_0006")
    server.plan(Said("Yes."))
    assert (await chat.say("Are you sure?", "", stream=stream)).text == "Yes."


@pytest.mark.parametrize("stream", [False, True])
async def test_thinking_goes_back_as_it_was_signed(
    servers: dict[str, Any], client: AsyncOpenAI, stream: bool
) -> None:
    """The server refuses thinking that is not what it signed, and a tool round without any."""
    server: AnthropicServer = at(servers, CLAUDE)
    chat = Chat(client, model=CLAUDE, reasoning_effort="low")
    await outgrow(chat, server)
    thinking = "The user wants the first note.\n\nI do not have it: it is in another page."
    server.plan(fault("msg_0001", thinking=thinking), Said("It was u0q.", thinking="Found."))
    got = await chat.say("What did I note first?", "", stream=stream)
    assert got.text == "It was u0q."
    _, second = server.bodies()
    assert second["thinking"]["type"] in ("enabled", "adaptive")
    called = second["messages"][-2]["content"]
    assert [block["type"] for block in called] == ["thinking", "tool_use"]
    assert called[0]["thinking"] == thinking
    assert server.signed[called[0]["signature"]] == thinking


@pytest.mark.parametrize("stream", [False, True])
async def test_a_functions_thought_signature_goes_back(
    servers: dict[str, Any], client: AsyncOpenAI, stream: bool
) -> None:
    server: GeminiServer = at(servers, GEMINI)
    chat = Chat(client, model=GEMINI)
    await outgrow(chat, server)
    server.plan(fault("msg_0001", "msg_0002", thinking="The first."), Said("It was u0q."))
    assert (await chat.say("What did I note first?", "", stream=stream)).text == "It was u0q."
    called = server.bodies()[1]["contents"][-2]["parts"]
    assert server.signed[next(p["thoughtSignature"] for p in called if "functionCall" in p)]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_clients_own_tools_in_parallel(
    servers: dict[str, Any], client: AsyncOpenAI, model: str, stream: bool
) -> None:
    server = at(servers, model)
    chat = Chat(client, model=model, tools=[LOOKUP], reasoning_effort="low")
    await outgrow(chat, server)
    asked = [Call("toolu_a", "lookup", {"word": "fjord"}), Call("toolu_b", "lookup", {"word": "kelp"})]
    server.plan(Said("Looking both up.", asked, thinking="Two words."), Said("A fjord has kelp."))
    got = await chat.say("Look both up.", "", stream=stream)
    assert got.finish == "tool_calls" and got.text == "Looking both up."
    assert [json.loads(c["function"]["arguments"]) for c in got.calls] == [c.input for c in asked]
    chat.messages.append(
        {"role": "tool", "tool_call_id": got.calls[0]["id"], "content": "an inlet"}
    )
    answered = await chat.result(got.calls[1]["id"], "a weed", "", stream=stream)
    assert answered.text == "A fjord has kelp."
    assert said_in(server.bodies()[-1], "an inlet")


async def test_an_agents_long_loop_outgrows_its_window(
    servers: dict[str, Any], client: AsyncOpenAI, model: str
) -> None:
    """Calls and results stay in pairs and in their turns, wherever a window begins."""
    server = at(servers, model)
    chat = Chat(client, model=model, tools=[LOOKUP])
    paged: list[Json] = []
    for question in range(4):
        calls = [Call(f"toolu_{question}_{i}", "lookup", {"word": f"w{i}"}) for i in range(3)]
        server.plan(*(Said(calls=[call], thinking="Next.") for call in calls), Said("Found."))
        got = await chat.say(f"Look three more words up: {question}.", "")
        for i in range(3):
            found = f"Word {i}: {filler(f'w{question}{i}', 160)}"
            got = await chat.result(got.calls[0]["id"], found, "", stream=i % 2 == 0)
        assert (got.text, got.finish) == ("Found.", "stop")
        server.check()
        paged += [body for body in server.bodies() if said_in(body, "<VM:RULES>")]
    assert len(paged) >= 6


@pytest.mark.parametrize("stream", [False, True])
async def test_mixed_calls_are_put_together_again(
    servers: dict[str, Any], client: AsyncOpenAI, model: str, stream: bool
) -> None:
    """The client sees its own call alone; the provider gets back what its model said, thinking and
    all, though the client has kept none of it."""
    server = at(servers, model)
    thinks = {"reasoning_effort": "low"} if model == CLAUDE else {}
    chat = Chat(client, model=model, tools=[LOOKUP], **thinks)
    await outgrow(chat, server)
    page = Call("toolu_page", "page_fault", {"page_id": "msg_0001"})
    word = Call("toolu_word", "lookup", {"word": "fjord"})
    server.plan(Said(calls=[page, word], thinking="Both at once."), Said("u0q, an inlet."))
    got = await chat.say("The first note, and a word.", "", stream=stream)
    assert [c["function"]["name"] for c in got.calls] == ["lookup"]
    assert got.finish == "tool_calls"
    answered = await chat.result(got.calls[0]["id"], "an inlet", "", stream=stream)
    assert answered.text == "u0q, an inlet."
    last = server.bodies()[-1]
    exchange = last["messages" if model == CLAUDE else "contents"][-2:]
    assert said_in(exchange[0], "page_fault") and said_in(exchange[0], "lookup")
    assert said_in(exchange[1], "u0q") and said_in(exchange[1], "an inlet")
    if model == CLAUDE:
        assert exchange[0]["content"][0]["thinking"] == "Both at once."


async def test_an_image_of_the_newest_message_is_seen(
    servers: dict[str, Any], client: AsyncOpenAI, model: str
) -> None:
    server = at(servers, model)
    chat = Chat(client, model=model)
    await outgrow(chat, server)
    server.plan(Said("A black pixel."))
    url = {"url": f"data:image/png;base64,{PIXEL}"}
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": url}]
    got = await chat.send({"role": "user", "content": parts}, "")
    assert got.text == "A black pixel."
    assert said_in(server.bodies()[0], PIXEL)


async def test_a_forced_tool_brings_pages_in_before_the_call(
    servers: dict[str, Any], client: AsyncOpenAI, model: str
) -> None:
    server = at(servers, model)
    chat = Chat(client, model=model, tools=[LOOKUP])
    await outgrow(chat, server)
    server.plan(Said(calls=[Call("toolu_w", "lookup", {"word": "fjord"})]))
    chat.fields["tool_choice"] = "required"
    got = await chat.say("Look u0q up.", "")
    assert [c["function"]["name"] for c in got.calls] == ["lookup"]
    assert not said_in(server.bodies()[0]["tools"], "page_fault")


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_in_a_schema(
    servers: dict[str, Any], client: AsyncOpenAI, model: str, stream: bool
) -> None:
    """Past the budget, too, what the client gets parses, and the model may fault before it."""
    server = at(servers, model)
    schema = {"type": "object", "properties": {"note": {"type": "string"}}, "required": ["note"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "note", "schema": schema}}
    chat = Chat(client, model=model)
    await outgrow(chat, server)
    chat.fields["response_format"] = wanted

    def answered(body: Json) -> Said:
        """As the provider would: by the tool that litellm forces on older models, or as text."""
        forced = (body.get("tool_choice") or {}).get("name")
        note = {"note": "u0q"}
        return Said(calls=[Call("toolu_j", forced, note)]) if forced else Said(json.dumps(note))

    server.plan(answered)
    got = await chat.say("The first note?", "", stream=stream)
    assert json.loads(got.text) == {"note": "u0q"} and got.finish == "stop"
    assert said_in(server.bodies()[0], "<VM:RULES>")


async def test_system_messages_in_the_middle_and_forbidden_tools(
    servers: dict[str, Any], client: AsyncOpenAI, model: str
) -> None:
    server = at(servers, model)
    chat = Chat(client, model=model, tools=[LOOKUP])
    await outgrow(chat, server)
    server.plan(Said("Short."), Said("Shorter."))
    chat.messages.append({"role": "system", "content": "From now on be brief."})
    assert (await chat.say("And now?", "")).text == "Short."
    chat.fields["tool_choice"] = "none"
    assert (await chat.say("And now?", "", stream=True)).text == "Shorter."
    for body in server.bodies():
        assert said_in(body, "From now on be brief.") and said_in(body, "<VM:RULES>")


# ---------------------------------------------------------------- the cache


async def test_the_marked_prefix_of_each_request_is_in_the_next(
    servers: dict[str, Any], client: AsyncOpenAI
) -> None:
    """Within an epoch a turn's requests go on with all that stood before, and the next turn's with what stood in
    front of this turn's message, which was marked: the server's cache finds it. Where that message has nothing
    shown in front, the next turn goes on with all of it."""
    server: AnthropicServer = at(servers, CLAUDE)
    chat = Chat(client, model=CLAUDE)
    await outgrow(chat, server)
    rounds = []
    for turn in range(12):
        rounds += [fault(f"msg_{turn + 1:04d}")] if turn % 3 == 0 else []
        rounds += [Said(f"Answer {turn}. {filler(f'z{turn}', 30)}")]
    server.plan(*rounds)
    for turn in range(12):
        await chat.say(f"And {turn}? {filler(f'y{turn}', 20)}", "", stream=turn % 2 == 0)
    bodies = [body for body in server.bodies() if said_in(body, "<VM:RULES>")]
    epochs = [next(t for t in texts_of(body["system"]) if "<VM:RULES>" in t) for body in bodies]
    within = shown = 0
    for before, after, one, other in zip(bodies, bodies[1:], epochs, epochs[1:], strict=False):
        blocks, markers = prompt_blocks(before), marker_positions(before)
        assert 2 <= len(markers) <= MAX_MARKERS
        assert markers[-1] == len(blocks), "the end of the last turn"
        assert blocks[markers[0] - 1]["at"] == "system"
        asked = max(i for i, block in enumerate(blocks) if (block["at"], block["type"]) == ("user", "text"))
        assert asked in markers, "what stands in front of the newest message"
        if one == other:
            within += 1
            later, shared = prompt_blocks(after), len(blocks)
            if later[:shared] != blocks:
                shown += 1
                assert CONTEXT_OPEN in blocks[asked]["text"], "only what was shown is taken out"
                said = blocks[asked]["text"].partition(f"{CONTEXT_CLOSE}\n\n")[2]
                assert later[:shared] == [*blocks[:asked], {**blocks[asked], "text": said}, *blocks[asked + 1 :]]
                shared = asked
            assert cached_blocks(before, after) == shared
    assert within >= 8 and len(set(epochs)) >= 2 and shown


def cached_blocks(before: Json, after: Json) -> int:
    """How many blocks of the prompt the cache has for the later request, of what the earlier one marked."""
    known = {prefix_hashes(before)[end - 1] for end in marker_positions(before)}
    hashes = prefix_hashes(after)
    looked = (at for end in marker_positions(after) for at in range(end, max(end - LOOKBACK_BLOCKS, 0), -1))
    return max((at for at in looked if hashes[at - 1] in known), default=0)


async def test_geminis_contents_only_grow_within_an_epoch(
    servers: dict[str, Any], client: AsyncOpenAI
) -> None:
    """Its cache needs no markers: what was sent has to stand there again, signatures and all."""
    server: GeminiServer = at(servers, GEMINI)
    chat = Chat(client, model=GEMINI)
    await outgrow(chat, server)
    server.plan(*(Said(f"Answer {turn}.") for turn in range(2)), fault("msg_0001", thinking="Hm."))
    for turn in range(4):
        await chat.say(f"And {turn}? {filler(f'y{turn}', 10)}", "", stream=turn % 2 == 0)
    bodies = server.bodies()
    assert len({json.dumps(body["systemInstruction"]) for body in bodies}) == 1
    for before, after in pairwise(bodies):
        assert [without_evidence(m) for m in after["contents"]][: len(before["contents"])] == before["contents"]
        assert after["tools"] == before["tools"]


async def test_what_fits_gets_no_markers_and_a_clients_own_win(
    servers: dict[str, Any], client: AsyncOpenAI
) -> None:
    server: AnthropicServer = at(servers, CLAUDE)
    chat = Chat(client, model=CLAUDE)
    server.plan(Said("Hello."))
    await chat.say("Hi.", "")
    assert marker_positions(server.bodies()[0]) == []
    await outgrow(chat, server)
    mark = {"cache_control": {"type": "ephemeral"}}
    server.plan(Said("Good."))
    await chat.send({"role": "user", "content": [{"type": "text", "text": "Mine.", **mark}]}, "")
    body = server.bodies()[0]
    assert said_in(body, "<VM:RULES>")
    assert marker_positions(body) == [len(prompt_blocks(body))]


async def test_cached_tokens_are_told_to_the_client(
    servers: dict[str, Any], client: AsyncOpenAI
) -> None:
    server: AnthropicServer = at(servers, CLAUDE)
    chat = Chat(client, model=CLAUDE)
    await outgrow(chat, server, 6)  # the last begins an epoch, which this turn goes on with
    server.plan(fault("msg_0001"), Said("u0q."))
    messages = [*chat.messages, {"role": "user", "content": "The first?"}]
    reply = await client.chat.completions.create(model=CLAUDE, messages=messages)  # type: ignore[arg-type]
    assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
    assert (reply.usage.prompt_tokens_details.cached_tokens or 0) > 500
    billed: Any = reply.usage.model_extra or {}
    vm = billed["vm"]
    assert vm["rounds"] == 2 and vm["cached_tokens"] > 500 and vm["written_tokens"] > 100
    assert vm["prompt_tokens"] >= vm["cached_tokens"] + vm["written_tokens"]


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("status", "raised", "kind"),
    [
        (429, openai.RateLimitError, "rate_limit_error"),
        (529, openai.InternalServerError, "api_error"),
        (401, openai.AuthenticationError, "invalid_request_error"),
        (400, openai.BadRequestError, "invalid_request_error"),
    ],
)
async def test_a_providers_error_in_openais_shape(
    servers: dict[str, Any], client: AsyncOpenAI, model: str, stream: bool, status: int,
    raised: type[openai.APIStatusError], kind: str,
) -> None:  # fmt: skip
    server = at(servers, model)
    refusal: Response = server.refuse(status, "No, not now.")
    headers = (*refusal.headers, (b"retry-after", b"7"))
    server.plan(Response(refusal.body, status, headers))
    with pytest.raises(raised) as caught:
        await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Hi."}], stream=stream
        )
    error = caught.value
    assert error.status_code == status and error.type == kind
    assert error.body["message"] == "No, not now."  # type: ignore[index]
    assert error.response.headers["retry-after"] == "7"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_of_the_memorys_tools_is_repaired(
    servers: dict[str, Any], client: AsyncOpenAI, model: str, stream: bool
) -> None:
    """Invariant 1: what we changed and the provider refuses goes once more as the client sent it."""
    server = at(servers, model)
    chat = Chat(client, model=model)
    await outgrow(chat, server)
    server.plan(server.refuse(400, "this model does not support tools"), Said("Fine."))
    assert (await chat.say("Go on.", "", stream=stream)).text == "Fine."
    changed, unchanged = server.bodies()
    assert said_in(changed, "<VM:RULES>") and not said_in(unchanged, "<VM:RULES>")
    assert said_in(unchanged, "u0q.")
    server.plan(Said("Better."))
    assert (await chat.say("And now?", "", stream=stream)).text == "Better."
    (learned,) = server.bodies()
    assert said_in(learned, "<VM:RULES>") and "tools" not in learned


async def test_an_error_within_the_stream_reaches_the_client(
    servers: dict[str, Any], client: AsyncOpenAI
) -> None:
    server: AnthropicServer = at(servers, CLAUDE)

    def broken(body: Json) -> Stream:
        whole = server.put(server.calls[-1], Said("The beginning of a longer answer."))
        assert isinstance(whole, Stream)
        detail = {"type": "overloaded_error", "message": "Overloaded"}
        event = f"event: error\ndata: {json.dumps({'type': 'error', 'error': detail})}\n\n"
        return Stream([*whole.steps[:5], event.encode()])

    server.plan(broken)
    stream = await client.chat.completions.create(
        model=CLAUDE, messages=[{"role": "user", "content": "Hi."}], stream=True
    )
    with pytest.raises(openai.APIError, match="Overloaded"):
        async for _ in stream:
            pass
