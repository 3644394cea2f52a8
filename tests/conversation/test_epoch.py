"""The rebuild of a window: it fits, the newest is in it, and what is outside is said to be."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Generator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from proxy.conversation.epoch_request import EpochRequest

from proxy.conversation.effects import Effect, Load
from proxy.conversation.epoch import Epoch, begin_epoch
from proxy.conversation.tree import Anchor
from proxy.conversation.window import NATIVE
from proxy.errors import ApiError
from proxy.memory import (
    ImportanceWeightedLRU,
    PageTable,
    StorageTier,
    VMMode,
)
from proxy.memory.pins import PinnedSet
from proxy.tokens import get_counter
from tests.bench.token_error import png_part
from tests.conversation.player import Message, call, calls, check_pairs, limits_of
from tests.conversation.scenario import text_of
from tests.conversation.test_pathpages import pages_of
from tests.examples import examples
from tests.memory.doors import register_id

COUNTER = get_counter("gpt-4o")
many = examples(40)


def request(
    messages: list[Message], room: int, anchors: Sequence[Anchor] = (), **changes: Any
) -> EpochRequest:
    pages = pages_of(messages, 200, anchors=anchors)
    table = PageTable()
    for position in range(len(messages)):
        for i, tokens in zip(pages.ids(position), pages.sizes(position), strict=True):
            register_id(table, i, tokens, position, tier=StorageTier.L0)
    values: dict[str, Any] = {
        "pages": pages, "table": table, "policy": ImportanceWeightedLRU(), "pins": PinnedSet(), "counter": COUNTER,
        "limits": limits_of(room), "substitutes": lambda _: (), "names": {},
        "mode": VMMode.RELAXED, "turn": 9, "epoch": 2, "floor": 0, "room_tokens": room,
        "apply": table.apply,
    }
    return EpochRequest(**{**values, **changes})


def loaded(dialogue: Generator[Effect, Any, Any], asked: EpochRequest) -> Any:
    """What the dialogue comes to, with every page that it wants made on the spot."""
    page = None
    try:
        while True:
            wanted = dialogue.send(page)
            assert isinstance(wanted, Load)
            page = asked.pages.at(wanted.page_id, wanted.level)
    except StopIteration as end:
        return end.value


def rebuild(asked: EpochRequest) -> Epoch:
    epoch: Epoch = loaded(begin_epoch(asked), asked)
    return epoch


@st.composite
def histories(draw: st.DrawFn) -> list[Message]:
    rng = random.Random(draw(st.integers(0, 9999)))
    messages: list[Message] = []
    for i in range(draw(st.integers(0, 12))):
        words = rng.choice((3, 40, 200, 900))
        messages.append({"role": "user", "content": text_of(rng, words, f"user{i}x")})
        if rng.random() < 0.3:
            messages.append(calls(call("look", {"w": i}, f"c{i}")))
            messages.append({"role": "tool", "tool_call_id": f"c{i}", "content": text_of(rng, words, "r")})
        messages.append({"role": "assistant", "content": text_of(rng, words, f"answer{i}x")})
    return [*messages, {"role": "user", "content": text_of(rng, draw(st.integers(1, 3000)), "last")}]


@many
@given(histories(), st.integers(700, 8000), st.integers(0, 20))
def test_invariant_03_a_new_window_fits_its_room_and_has_the_newest(
    messages: list[Message], room: int, floor: int
) -> None:
    asked = request(messages, room)
    asked.floor = min(floor, len(messages) - 1)
    while messages[asked.floor]["role"] == "tool":
        asked.floor -= 1
    epoch = rebuild(asked)
    window = epoch.window
    assert window.tokens <= room and window.covered == len(messages)
    natives = [json.loads(e.raw) for e in window.entries]
    check_pairs({"messages": natives})
    assert natives[-1]["role"] == "user" and natives[-1]["content"].startswith("last")
    positions = [e.position for e in window.entries if e.kind == NATIVE]
    assert positions == sorted(positions) and positions[-1] == len(messages) - 1
    assert [p for p in positions if p >= window.native_from] == list(range(window.native_from, len(messages)))
    assert window.native_from >= asked.floor
    again = request(messages, room, floor=asked.floor)
    assert rebuild(again) == epoch  # the same history gives the same window


@many
@given(histories(), st.integers(900, 4000))
def test_the_manifest_counts_what_is_outside(messages: list[Message], room: int) -> None:
    asked = request(messages, room)
    epoch = rebuild(asked)
    outside = {e.position for e in asked.table if e.tier is not StorageTier.L0 and e.position >= 0}
    found = re.search(r"<VM:MANIFEST_JSON>\n(.*)\n</VM", epoch.window.developer)
    if found is None:
        return
    manifest = json.loads(found.group(1))
    assert manifest.get("total_available", 0) >= len(outside)
    named = {int(p["page_id"][4:8]) - 1 for p in manifest.get("available_pages", [])}
    assert named <= outside


def cut_epoch() -> tuple[EpochRequest, Epoch]:
    messages = [{"role": "user", "content": text_of(random.Random(1), 4000, "big")}]
    asked = request(messages, 1200)
    return asked, rebuild(asked)


def test_invariant_04_a_cut_messages_pages_are_outside_the_window() -> None:
    asked, epoch = cut_epoch()
    evicted = epoch.evicted
    assert evicted == list(asked.pages.ids(0)) and len(evicted) > 1
    assert "msg_0001.1" in epoch.window.developer


def test_system_messages_come_before_what_they_stood_before_and_behind_the_newest() -> None:
    messages: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                               {"role": "user", "content": "c"}]
    anchors = [Anchor(p, json.dumps({"role": "system", "content": f"n{p}"}).encode()) for p in (1, 3)]
    window = rebuild(request(messages, 2000, anchors=anchors)).window
    assert [json.loads(e.raw)["content"] for e in window.entries] == ["a", "n1", "b", "c", "n3"]


def test_what_cannot_fit_is_refused_in_openais_words() -> None:
    with pytest.raises(ApiError) as caught:
        rebuild(request([{"role": "user", "content": "hi"}], 60))
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"


def test_invariant_03_pages_that_another_models_tokens_priced_too_low_are_left_out() -> None:
    """The table has the sizes of the model that was asked when a page came."""
    parts = [png_part(600 + i, 600) for i in range(12)]
    messages: list[Message] = [
        {"role": "user", "content": [part]} for part in parts
    ] + [{"role": "user", "content": "and now?"}]
    asked = request(messages, 1100, limits=limits_of(1100, summary_tokens=0, max_claims=0))
    for entry in asked.table:
        entry.size_tokens = 2
    epoch = rebuild(asked)
    assert epoch.window.tokens <= 1100
    assert {i for i in epoch.evicted if i.startswith("img")} == {f"img_{n:04d}_1" for n in range(1, 13)}
