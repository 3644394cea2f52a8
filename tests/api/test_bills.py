"""What upstream bills corrects what we count: budgets follow it, per key and model, over restarts; and
it shows an upstream that reads less than it is sent."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proxy.api.caller import caller
from proxy.conversation.calibration import Calibration
from proxy.tokens import PER_REPLY, get_counter
from proxy.upstream import BytesReply
from tests.api.test_chat import JSON, Client, answered, body, client
from tests.conversation.checks import goes_on
from tests.conversation.player import messages_bytes
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


# -- stored with the turn, once

def calibration(one: Client, model: str = "house-model") -> Calibration:
    scope = one.memory.identity.tenant(caller([KEY]).credentials, "")
    return one.memory.calibration(scope, model, get_counter(model).name, False)


async def test_a_turn_that_is_stored_already_was_billed_before(tmp_path: Path) -> None:
    """A client that lost the answer asks again, and upstream says the same."""
    async with client(tmp_path, tiers={"l0.tokens": 4000}) as one:
        await ask_and_be_billed(one, 1.3, 3)
        taught = calibration(one)
        assert taught.samples == 3
        await ask_and_be_billed(one, 1.3, 3)
        assert calibration(one) == taught


async def test_a_bill_takes_no_transaction_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits: list[int] = []
    async with client(tmp_path, tiers={"l0.tokens": 4000}) as one:
        commit = one.memory.store.commit

        async def counted(*args: Any) -> Any:
            commits.append(len(one.upstream.bodies))
            return await commit(*args)

        monkeypatch.setattr(one.memory.store, "commit", counted)
        await ask_and_be_billed(one, 1.3, 9)
    assert commits == list(range(1, 10))


async def test_an_epoch_keeps_the_factor_that_it_began_with(tmp_path: Path) -> None:
    """What other conversations teach meanwhile counts from the next epoch on: the log goes on growing."""
    async with client(tmp_path, tiers={"l0.tokens": 4000}) as one:
        talk = Talk(one, lambda counted: counted)
        await talk.turns(25, words=90)
        first = one.reports[-1]
        assert first.epoch >= 1
        await ask_and_be_billed(one, 1.5, 64)
        await talk.turns(1, words=10)
        same = one.reports[-1]
        assert (same.epoch, same.budget_tokens) == (first.epoch, first.budget_tokens)
        assert goes_on(talk.sent[-2], talk.sent[-1])
        await talk.turns(40, words=90)
        last = one.reports[-1]
        assert last.epoch > first.epoch and last.budget_tokens < first.budget_tokens / 1.1
    with_it = last.budget_tokens
    async with client(tmp_path, tiers={"l0.tokens": 4000}) as again:
        talk.one = again
        await talk.turns(1, words=10)
        assert again.reports[-1].budget_tokens == with_it


# -- upstreams that cut prompts

class Talk:
    """A conversation at an upstream that bills as `bill` says of the counted tokens."""

    def __init__(self, one: Client, bill: Callable[[int], int], model: str = "house-model") -> None:
        self.one, self.bill, self.model = one, bill, model
        self.messages: list[dict[str, Any]] = []
        self.sent: list[bytes] = []  # each request's messages
        self.counted: list[int] = []

    async def turns(self, count_: int, words: int) -> None:
        for _ in range(count_):
            number = len(self.messages)
            text = text_of(random.Random(number), words, f"m{number}x")
            self.messages.append({"role": "user", "content": text})
            self.one.upstream.replies.append(Billing(self))
            status, said = await self.one.ask(body(self.messages, model=self.model), KEY)
            assert status == 200
            self.messages.append(said["choices"][0]["message"])


class Billing:
    """An answer that looks at its request."""

    def __init__(self, talk: Talk) -> None:
        sent = talk.one.upstream
        self.status, self.headers = 200, JSON
        self._talk, self._sent = talk, sent

    async def read(self, limit_bytes: int) -> bytes:
        talk, raw = self._talk, self._sent.bodies[-1]
        request = json.loads(raw)
        talk.sent.append(messages_bytes(raw))
        tokens = count(request) + get_counter(request["model"]).tools(request.get("tools") or [])
        talk.counted.append(tokens)
        whole = json.loads(billed(talk.bill(tokens))._body)
        whole["choices"][0]["message"]["content"] = f"ok {len(talk.messages)}"
        return json.dumps(whole).encode()

    async def close(self) -> None:
        pass


async def test_a_large_prompt_billed_far_too_low_is_believed_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with client(tmp_path) as one:
        talk = Talk(one, lambda tokens: min(tokens, 4096))
        with caplog.at_level(logging.WARNING):
            await talk.turns(1, words=9000)
            await talk.turns(3, words=40)
        assert talk.counted[0] > 8000 and max(talk.counted[1:]) <= 4096, talk.counted
        assert "reads 4096 of a longer one" in caplog.text


@pytest.mark.parametrize("model", ["house-model", "gpt-4o"])
@pytest.mark.parametrize("wobble", [0, 2])
async def test_a_cut_is_found_in_three_turns_of_slow_growth(
    tmp_path: Path, model: str, wobble: int
) -> None:
    """Also where nothing was counted, because it was surely small for the window that the model has."""
    async with client(tmp_path) as one:
        talk = Talk(one, lambda tokens: min(tokens, 4096 - random.Random(tokens).randint(0, wobble)), model)
        await talk.turns(1, words=3000)
        while talk.counted[-1] <= 4096:
            await talk.turns(1, words=40)
            assert b"<VM:RULES>" not in talk.sent[-1]
        await talk.turns(3, words=40)
        assert talk.counted[-1] <= 4096 and b"<VM:RULES>" in talk.sent[-1], talk.counted


async def test_a_surely_small_body_is_counted_when_its_bill_is_odd(tmp_path: Path) -> None:
    """Its model has a known window, so it has to happen twice."""
    async with client(tmp_path) as one:
        talk = Talk(one, lambda tokens: min(tokens, 2048), "gpt-4o")
        await talk.turns(2, words=9000)
        await talk.turns(1, words=40)
        assert talk.counted[1] > 8000 and talk.counted[2] <= 2048, talk.counted
