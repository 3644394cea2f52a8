"""A session's client sends its newest message once more: it is one turn, not two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.api.test_chat import answered, body, client

SESSION = (b"x-llm-pager-session", b"s1")
AGAIN = (b"x-stainless-retry-count", b"1")
LONG = " ".join(f"word{i}" for i in range(60))
SMALL = {"tiers.l0": {"tokens": 2000, "reserve_tokens": 500}}


@pytest.mark.parametrize("paged", [False, True])
async def test_a_retry_stands_where_the_first_try_stood(tmp_path: Path, paged: bool) -> None:
    turns = 14 if paged else 2
    async with client(tmp_path, *(answered(f"a{i}") for i in range(turns + 4)), **SMALL) as one:
        for i in range(turns):
            await one.ask(body([{"role": "user", "content": f"turn {i} {LONG}"}]), SESSION)
        last = one.upstream.bodies[-1]
        again = body([{"role": "user", "content": f"turn {turns - 1} {LONG}"}])
        await one.ask(again, SESSION, AGAIN)
        assert one.upstream.bodies[-1] == last, "the same request, byte for byte"
        await one.ask(body([{"role": "user", "content": "and now?"}]), SESSION)
        sent = json.loads(one.upstream.bodies[-1])["messages"]
        assert (b"<VM:RULES>" in one.upstream.bodies[-1]) == paged
        assert sum(f"turn {turns - 1} " in str(m["content"]) for m in sent if m["role"] == "user") == 1
        assert sent[-2]["content"] == f"a{turns}", "the answer that was read, not the lost one"


async def test_the_same_words_without_the_header_are_another_turn(tmp_path: Path) -> None:
    async with client(tmp_path, *(answered(f"a{i}") for i in range(4))) as one:
        for words in ("hello", "go on", "go on"):
            await one.ask(body([{"role": "user", "content": words}]), SESSION)
        sent = json.loads(one.upstream.bodies[-1])["messages"]
        assert [m["content"] for m in sent] == ["hello", "a0", "go on", "a1", "go on"]
        other = body([{"role": "user", "content": "never said before"}])
        await one.ask(other, SESSION, AGAIN)
        assert len(json.loads(one.upstream.bodies[-1])["messages"]) == 7
