"""The lists and views of /vm over a store that real turns left: sorted, searched, paged, and only one's own."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from proxy.api.caller import caller
from proxy.api.memory import Memory
from proxy.api.views import Views, Who
from proxy.config import Config
from proxy.errors import ApiError
from proxy.keys import TENANT_BYTES
from tests.conversation.player import Message, Player, limits_of, says

WORDS = "lantern violin harbour comet walnut meadow " * 6
MINE, OTHERS = (caller([(b"authorization", key)]).credentials for key in (b"mine", b"others"))


def told(player: Player, key: str, first: str, turns: int) -> None:
    messages: list[Message] = []
    for number in range(turns):
        player.now_s += 10
        messages.append({"role": "user", "content": f"{first} {number}: {WORDS}"})
        played = player.ask(messages, lambda _: says(WORDS), key=key)
        assert played.answer.refused is None
        messages.append(says(WORDS))


@asynccontextmanager
async def views(folder: Path, player: Player) -> AsyncIterator[tuple[Views, Who]]:
    config = Config.model_validate_json(json.dumps({"tiers": {"l2": {"path": str(folder / "data")}}}))
    memory = Memory(config)
    memory.identity = player.identity
    await memory.store.commit(list(player.values.items()))
    try:
        yield Views(config, memory), Who(player.identity.tenant(MINE, "")[:TENANT_BYTES])
    finally:
        await memory.close()


async def test_conversations_are_sorted_searched_and_paged_and_ones_own(tmp_path: Path) -> None:
    player = Player(limits_of(2000))
    player.now_s = 1000
    for first in ("Banana bread", "apple pie", "Cherry cake"):
        told(player, MINE, first, 2)
    told(player, OTHERS, "Secret soup", 1)
    async with views(tmp_path, player) as (looked, who):

        def titles(**asked: object) -> list[str]:
            return [row["title"].split()[0] for row in looked.conversations(who, **asked)["conversations"]]  # type: ignore[arg-type]

        assert titles() == ["Cherry", "apple", "Banana"] and titles(sort="title") == ["apple", "Banana", "Cherry"]
        assert titles(sort="began") == ["Cherry", "apple", "Banana"]
        assert titles(query="BREAD banana") == ["Banana"] and titles(query="soup") == []
        first = looked.conversations(who, limit=2)
        assert first["total"] == 3 and titles(limit=2, cursor=first["next_cursor"]) == ["Banana"]
        everything = looked.conversations(Who(b"", operator=True))
        assert everything["total"] == 4
        theirs = next(row for row in everything["conversations"] if row["title"].startswith("Secret"))
        for name in (theirs["conversation"], theirs["conversation"][24:], "", "zz", "00" * 6):
            with pytest.raises(ApiError) as refused:
                looked.turns(who, name)
            assert refused.value.status == 404
        for wrong in ("x", "AAAA"):
            with pytest.raises(ApiError):
                looked.conversations(who, cursor=wrong)


async def test_views_of_a_paged_conversation_agree_with_each_other(tmp_path: Path) -> None:
    player = Player(limits_of(2000))
    told(player, MINE, "Harbour notes", 30)
    async with views(tmp_path, player) as (looked, who):
        (row,) = looked.conversations(who)["conversations"]
        at = looked.turns(who, row["conversation"])
        whole = looked.conversation(at, limit=100)
        assert [one["turn"] for one in whole["turn_rows"]] == list(range(30, 0, -1)) and row["turns"] == 30
        assert [one["turn"] for one in looked.timeline(at)] == list(range(1, 31))
        assert [looked._at(at, n).turn for n in range(1, 31)] == list(range(1, 31))
        paged = looked.conversation(at, limit=7)
        rest = looked.conversation(at, before=paged["next_before"], limit=100)
        assert paged["turn_rows"] + rest["turn_rows"] == whole["turn_rows"] and rest["next_before"] is None
        memory = looked.map(at)
        for turn in (5, 19, 30):  # whichever way it is asked for, the same pages are in the window
            seen = {p["page"] for p in memory["pages"] if any(a <= turn <= b for a, b, _ in p["runs"])}
            told_of = looked.turn(at, turn)
            inside = {p["page"] for p in told_of["pages_in"]} or {f"msg_{n:04d}" for n in range(1, 2 * turn)}
            assert seen == inside and told_of["request"]["exact"]
            for page in sorted(inside)[:3]:
                assert looked.explain(at, page, turn)["in_window"]
            for out in told_of["pages_out"][:3]:
                why = looked.explain(at, out["page"], turn)
                assert (not why["in_window"] and "epoch" in why["why"]) or "out of the window" in why["why"]
        assert looked.explain(at, "msg_0060", 5)["why"] == "msg_0060 was said after turn 5, so it could not be in its window."
        for turn in (0, 31):
            with pytest.raises(ApiError):
                looked.turn(at, turn)
        with pytest.raises(ApiError):
            looked.explain(at, "msg_0999")
