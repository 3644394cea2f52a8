"""What upstream bills corrects what we count: budgets follow it, per key and model, over restarts."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest

from proxy.tokens import PER_REPLY, get_counter
from proxy.upstream import BytesReply
from tests.api.test_chat import JSON, Client, answered, body, client
from tests.conversation.scenario import text_of

KEY = (b"authorization", b"Bearer k")
LONG = 600  # words: more than the bytes of the window could hold uncounted


def billed(prompt_tokens: int) -> BytesReply:
    message = {"role": "assistant", "content": "ok"}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 1, "total_tokens": prompt_tokens + 1}
    whole = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice],
             "usage": usage}  # fmt: skip
    return BytesReply(200, JSON, json.dumps(whole).encode())


async def ask_and_be_billed(one: Client, factor: float, times: int, model: str = "house-model") -> None:
    for i in range(times):
        text = text_of(random.Random(i), LONG, f"q{i}x")
        request = body([{"role": "user", "content": text}], model=model)
        one.upstream.replies.append(billed(int(count(request) * factor)))
        status, _ = await one.ask(request, KEY)
        assert status == 200


def count(request: dict[str, Any]) -> int:
    counter = get_counter(request["model"])
    return PER_REPLY + sum(counter.message(m) for m in request["messages"])


@pytest.mark.parametrize("factor", [1.25, 0.8])
async def test_budgets_follow_the_bills_also_after_a_restart(tmp_path: Path, factor: float) -> None:
    sections = {"tiers": {"l0.tokens": 4000}}
    async with client(tmp_path, **sections) as one:
        before = await budget(one)
        await ask_and_be_billed(one, factor, 20)
        after = await budget(one)
        assert after == pytest.approx(before / factor, rel=0.02)
    async with client(tmp_path, **sections) as again:
        assert await budget(again) == after
        assert await budget(again, key=(b"authorization", b"Bearer other")) == before


async def budget(one: Client, key: tuple[bytes, bytes] = KEY) -> int:
    one.upstream.replies.append(answered())
    await one.ask(body(model="house-model"), key)
    return one.reports[-1].budget_tokens


async def test_a_bill_far_below_the_prompt_is_said_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with client(tmp_path, tiers={"l0.tokens": 4000}) as one:
        with caplog.at_level(logging.WARNING):
            await ask_and_be_billed(one, 0.3, 1)
        assert "does it cut prompts" in caplog.text
        before = await budget(one)
        await ask_and_be_billed(one, 0.3, 20)
        assert await budget(one) == before  # a server that cuts does not talk us into sending more
