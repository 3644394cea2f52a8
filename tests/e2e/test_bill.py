"""The bill over HTTP: what `/vm/bill` and `usage.vm` say is what upstream billed, after a SIGKILL too, and
for nobody but its owner (invariants 5 and 6).
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import pytest

from proxy.demo.bill import PromptCache
from proxy.tokens import get_counter, prices
from tests.e2e.harness import (
    Answer,
    RecordingUpstream,
    Response,
    answer,
    count_request_tokens,
    message_of,
)
from tests.e2e.processes import ServerProcess
from tests.e2e.recording import Stream
from tests.e2e.script import MODEL, SYSTEM, fault, filler, paged_config

pytestmark = pytest.mark.asyncio(loop_scope="module")

TURNS = 18
_UNTOLD = re.compile(rb'"cached_tokens": ?0')
Message = dict[str, Any]


class Provider:
    """An upstream that keeps a cache, and adds up what it told that it billed."""

    def __init__(self) -> None:
        self.upstream = RecordingUpstream(self._respond)
        self.cache = PromptCache(get_counter(MODEL))
        self.prompt_tokens = self.cached_tokens = self.untold = 0

    def _respond(self, request: Message, index: int) -> Answer:
        last = request["messages"][-1]
        wants = last["role"] == "user" and str(last["content"]).endswith("Remember?")
        reply = answer(request, fault("msg_0001") if wants else message_of(f"Noted. {filler(str(index), 60)}"))
        _, cached = self.cache.tokens(request)
        options = request.get("stream_options") or {}
        if request.get("stream") and not options.get("include_usage"):
            self.untold += 1
            return reply
        self.prompt_tokens += count_request_tokens(request)
        self.cached_tokens += cached
        told = b'"cached_tokens": %d' % cached
        if isinstance(reply, Response):
            return Response(_UNTOLD.sub(told, reply.body))
        return Stream([_UNTOLD.sub(told, step) for step in reply.steps if isinstance(step, bytes)])


class Client:
    """An application with a history, and its bill."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http
        self.history: list[Message] = []

    async def say(self, text: str, stream: bool = False) -> httpx.Response:
        self.history.append({"role": "user", "content": text})
        body = {"model": MODEL, "messages": [SYSTEM, *self.history], "stream": stream}
        reply = await self.http.post("/v1/chat/completions", json=body, headers={"x-session-id": "books"})
        assert reply.status_code == 200, reply.text
        if stream:
            events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
            deltas = [choice["delta"].get("content") for event in events for choice in event["choices"]]
            said = "".join(delta or "" for delta in deltas)
        else:
            said = reply.json()["choices"][0]["message"]["content"]
        self.history.append(message_of(said))
        return reply

    async def bill(self, **params: str) -> Message:
        reply = await self.http.get("/vm/bill", params=params)
        assert reply.status_code == 200, reply.text
        found: Message = reply.json()
        return found


async def test_invariants_5_and_6_a_bill_is_what_upstream_billed_and_its_owners_alone() -> None:
    provider = Provider()
    async with provider.upstream:
        with ServerProcess(paged_config(provider.upstream)) as server:
            root = server.base_url.removesuffix("/v1")
            async with httpx.AsyncClient(base_url=root, headers={"authorization": "Bearer own"}, timeout=20) as http:
                client = Client(http)
                for turn in range(TURNS):
                    ask = "Remember?" if turn in (11, 15) else ""
                    text = f"Note {turn}. {filler(f'u{turn}', 60)} {ask}".strip()
                    reply = await client.say(text, stream=turn % 3 == 1)
                conversation, vm = reply.headers["x-llm-pager-conversation"], reply.json()["usage"]["vm"]
                bill = await client.bill(session="books")
                _is_upstreams(bill, vm, provider)
                assert await client.bill(conversation=conversation) == bill
                process = await client.bill()  # nobody else has asked it anything
                assert process == {name: bill[name] for name in process}

                server.kill()
                await asyncio.to_thread(server.restart)
                assert await client.bill(session="books") == await client.bill(conversation=conversation) == bill
                process = await client.bill()
                assert (process["turns"], process["llm_pager"]["cost_usd"]) == (0, 0)
                for headers in ({"authorization": "Bearer other"}, {"x-openwebui-user-id": "eve"}):
                    for params in ({"session": "books"}, {"conversation": conversation}):
                        refused = await http.get("/vm/bill", params=params, headers=headers)
                        assert refused.status_code == 404, refused.text
                for odd in ("00", "zz" * 6, "00" * 6, "0" * 4000, "../..", "é"):
                    refused = await http.get("/vm/bill", params={"conversation": odd})
                    assert refused.json()["error"]["code"] == "conversation_not_found", odd

                await client.say("One more.")
                assert (await client.bill(session="books"))["turns"] == TURNS + 1


def _is_upstreams(bill: Message, vm: Message, provider: Provider) -> None:
    ours, sliding, full = bill["llm_pager"], bill["sliding_window"], bill["full_history"]
    assert bill["turns"] == TURNS and bill["turns_without_usage"] == provider.untold > 0
    assert (ours["prompt_tokens"], ours["cached_tokens"]) == (provider.prompt_tokens, provider.cached_tokens)
    price = prices(MODEL)
    assert price is not None and ours["cached_tokens"] > 10_000
    for side in (ours, sliding, full):
        assert side["billed_prompt_tokens"] == side["prompt_tokens"] - side["cached_tokens"] / 2  # gpt-4o's price
        cost = side["billed_prompt_tokens"] * price.prompt + side["completion_tokens"] * price.completion
        assert side["cost_usd"] == pytest.approx(cost, abs=1e-6)
    assert full["prompt_tokens"] > ours["prompt_tokens"] and sliding["cached_tokens"] < ours["cached_tokens"]
    assert ours["completion_tokens"] > full["completion_tokens"] == sliding["completion_tokens"]  # two faults
    assert vm["conversation_billed_tokens"] == ours["billed_prompt_tokens"]
    assert vm["sliding_window_billed_tokens"] == sliding["billed_prompt_tokens"]
    assert vm["full_history_billed_tokens"] == full["billed_prompt_tokens"]
    epochs = bill["cache_breaks"]["epoch"]
    assert epochs["turns"] > 1 and epochs["lost_tokens"] > 1000
    assert bill["latest_breaks"][-1]["reason"] == "epoch"
    assert len(bill["latest_breaks"]) == sum(one["turns"] for one in bill["cache_breaks"].values())
    assert bill["models"][0]["usd_per_million_tokens"]["prompt"] == pytest.approx(price.prompt * 1e6)
