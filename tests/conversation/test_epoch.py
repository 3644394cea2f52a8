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

from proxy.conversation.body import Body
from proxy.conversation.channel import PASSIVE, TOOLS, Channel, vm_names
from proxy.conversation.context import TurnContext
from proxy.conversation.derived import derive
from proxy.conversation.effects import Effect, Load
from proxy.conversation.epoch import Epoch
from proxy.conversation.identify import Place
from proxy.conversation.limits import Limits
from proxy.conversation.report import TurnReport
from proxy.conversation.tree import Anchor, Identity
from proxy.conversation.turn_window import TurnWindow
from proxy.conversation.window import NATIVE, Entry, Window
from proxy.errors import ApiError
from proxy.memory import ImportanceWeightedLRU, PageTable, StorageTier, VMMode, WorkingSetConfig
from proxy.memory.ids import parse_page_id
from proxy.memory.manifest import MIN_MANIFEST_TOKENS
from proxy.tokens import get_counter
from tests.bench.token_error import png_part
from tests.conversation.player import SECRET, Message, call, calls, check_pairs, limits_of
from tests.conversation.scenario import text_of
from tests.conversation.test_pages import pages_of
from tests.examples import examples
from tests.memory.doors import register_id

COUNTER = get_counter("gpt-4o")
many = examples(12)


def turn_window(
    messages: list[Message], room: int, offer: bool = True, anchors: Sequence[Anchor] = (),
    limits: Limits | None = None, floor: int = 0, tier: StorageTier = StorageTier.L0,
) -> TurnWindow:
    """A turn's window of `room` tokens over these messages, whose pages are all in `tier`."""
    pages = pages_of(messages, 200, anchors=anchors)
    table = PageTable()
    for position in range(len(messages)):
        for page in pages[position].pages:
            register_id(table, page.id, page.tokens, position, tier=tier)
    limits = limits_of(room) if limits is None else limits
    context = TurnContext(
        body=b"", sent=Body({}, [], [], None, 0, [], None), decoded={"model": "gpt-4o"},
        place=Place(list(pages.path), 0, floor, list(anchors), None), state=None, limits=limits, counter=COUNTER,
        policy=ImportanceWeightedLRU(), identity=Identity(SECRET), tenant=b"", fixed_tokens=lambda: 0,
        substitutes=lambda _: (), get_record=lambda _: None,
    )
    channel = Channel(TOOLS if offer else PASSIVE, offer, vm_names(()))
    report = TurnReport("gpt-4o", channel.name, 9)
    turn = TurnWindow(context, pages, table, channel, limits, None, 0, report)
    turn._whole_room_tokens = room
    turn.window = Window(1, "", 0, 0, 0, (), 0)
    return turn


def epoch_of(messages: list[Message], room: int, newest: Entry | None = None, **changes: Any) -> Epoch:
    turn = turn_window(messages, room, **changes)
    return Epoch(turn, turn.pages, 2, room, (), 0, {} if newest is None else {newest.position: newest})


def loaded(dialogue: Generator[Effect, Any, Any], epoch: Epoch) -> Any:
    """What the dialogue comes to, with every page that it wants made on the spot."""
    page = None
    try:
        while True:
            wanted = dialogue.send(page)
            assert isinstance(wanted, Load)
            page = epoch.pages.at(wanted.page_id, wanted.level)
    except StopIteration as end:
        return end.value


def rebuilt(epoch: Epoch) -> Window:
    window: Window = loaded(epoch.begin(), epoch)
    return window


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
    floor = min(floor, len(messages) - 1)
    while messages[floor]["role"] == "tool":
        floor -= 1
    epoch = epoch_of(messages, room, floor=floor)
    window = rebuilt(epoch)
    assert window.tokens <= room and window.covered == len(messages)
    natives = [json.loads(e.raw) for e in window.entries]
    check_pairs({"messages": natives})
    assert natives[-1]["role"] == "user" and natives[-1]["content"].startswith("last")
    positions = [e.position for e in window.entries if e.kind == NATIVE]
    assert positions == sorted(positions) and positions[-1] == len(messages) - 1
    assert [p for p in positions if p >= window.native_from] == list(range(window.native_from, len(messages)))
    assert window.native_from >= floor
    again = epoch_of(messages, room, floor=floor)
    assert rebuilt(again) == window and again.evicted == epoch.evicted  # the same history gives the same window


@many
@given(histories(), st.integers(900, 4000))
def test_the_manifest_counts_what_is_outside(messages: list[Message], room: int) -> None:
    epoch = epoch_of(messages, room)
    window = rebuilt(epoch)
    outside = {e.position for e in epoch.turn.table if e.tier is not StorageTier.L0 and e.position >= 0}
    found = re.search(r"<VM:MANIFEST_JSON>\n(.*)\n</VM", window.developer)
    if found is None:
        return
    manifest = json.loads(found.group(1))
    assert manifest.get("total_available", 0) >= len(outside)
    named = {int(p["page_id"][4:8]) - 1 for p in manifest.get("available_pages", [])}
    assert named <= outside


@many
@given(histories(), st.integers(4000, 40_000))
def test_the_memorys_own_texts_take_at_most_a_tenth_of_the_window(messages: list[Message], l0: int) -> None:
    limits = limits_of(l0 - 1100, working_set=WorkingSetConfig(max_l0_tokens=l0, reserved_tokens=1000))
    epoch = epoch_of(messages * 9, l0 - 1100, limits=limits)
    own = rebuilt(epoch).developer.partition("\n\n<VM:CONTEXT>")[0]
    assert COUNTER.text(own) + epoch.turn.tools_tokens <= l0 // 10


def test_invariant_04_a_cut_messages_pages_are_outside_the_window() -> None:
    epoch = epoch_of([{"role": "user", "content": text_of(random.Random(1), 4000, "big")}], 1200)
    window = rebuilt(epoch)
    assert epoch.evicted == list(epoch.pages[0].ids) and len(epoch.evicted) > 1
    assert b"the whole is in msg_0001.1 to" in window.entries[-1].raw


def test_system_messages_come_before_what_they_stood_before_and_behind_the_newest() -> None:
    messages: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                               {"role": "user", "content": "c"}]
    anchors = [Anchor(p, json.dumps({"role": "system", "content": f"n{p}"}).encode()) for p in (1, 3)]
    window = rebuilt(epoch_of(messages, 2000, anchors=anchors))
    assert [json.loads(e.raw)["content"] for e in window.entries] == ["a", "n1", "b", "c", "n3"]


def test_what_cannot_fit_is_refused_in_openais_words() -> None:
    with pytest.raises(ApiError) as caught:
        rebuilt(epoch_of([{"role": "user", "content": "hi"}], 60))
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"


def test_invariant_03_pages_that_another_models_tokens_priced_too_low_are_left_out() -> None:
    """The table has the sizes of the model that was asked when a page came."""
    parts = [png_part(600 + i, 600) for i in range(12)]
    messages: list[Message] = [
        {"role": "user", "content": [part]} for part in parts
    ] + [{"role": "user", "content": "and now?"}]
    epoch = epoch_of(messages, 1100, limits=limits_of(1100))
    for entry in epoch.turn.table:
        entry.size_tokens = 2
    assert rebuilt(epoch).tokens <= 1100
    assert {i for i in epoch.evicted if i.startswith("img")} == {f"img_{n:04d}_1" for n in range(1, 12)}


# -- the manifest says of every page outside the window that it is there, at a bounded cost

def messages_of(count: int) -> list[Message]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": f"Harbour{n} is near lantern{n}."} for n in range(count)]


def told_of(count: int, ends: list[int]) -> Epoch:
    """A request over a path in which a segment was closed before each of `ends`."""
    asked = epoch_of(messages_of(count), 4000)
    for end in ends:
        list(derive(asked.pages, end, limits_of(4000), COUNTER))
    return asked


def listed(asked: Epoch, native_from: int, resident: set[int], tokens: int, cut: set[int]) -> dict[str, Any]:
    text = asked._manifest(native_from, resident, cut, tokens)
    assert COUNTER.text(text) <= tokens
    found: dict[str, Any] = json.loads(text)
    return found


def at(page_id: str) -> int:
    place = parse_page_id(page_id)
    assert place is not None
    return place[0]


@st.composite
def windows(draw: st.DrawFn) -> tuple[int, list[int], int, set[int], set[int]]:
    count = draw(st.integers(1, 150))
    ends = sorted(draw(st.sets(st.integers(1, count), max_size=14)))
    native_from = draw(st.integers(0, count))
    resident = draw(st.sets(st.integers(0, count - 1), max_size=20)) | set(range(native_from, count))
    cut = draw(st.sets(st.integers(native_from, count - 1), max_size=2)) if native_from < count else set()
    return count, ends, native_from, resident - cut, cut


@examples(25)
@given(windows(), st.integers(600, 2500))
def test_every_page_outside_is_listed_or_in_one_segments_range(
    window: tuple[int, list[int], int, set[int], set[int]], tokens: int
) -> None:
    count, ends, native_from, resident, cut = window
    manifest = listed(told_of(count, ends), native_from, resident, tokens, cut)
    outside = {p for p in range(count) if p not in resident}
    assert manifest.get("total_available", 0) == len(outside)
    named = [at(entry["page_id"]) for entry in manifest.get("available_pages", [])]
    assert len(set(named)) == len(named) and set(named) <= outside
    covered = set(named)
    end = -1
    for segment in manifest.get("segments", []):
        first, last = at(segment["first"]), at(segment["last"])
        assert end < first <= last, "the ranges come in order and do not meet"
        inside = {p for p in outside if first <= p <= last} - covered
        assert segment["pages"] == len(inside)
        covered |= inside
        end = last
    assert covered == outside


def test_the_nearest_pages_have_entries_and_a_segments_line_its_topics() -> None:
    asked = epoch_of([{"role": "user", "content": f"Wax{n}"} for n in range(200)], 4000)
    for end in (60, 120):
        list(derive(asked.pages, end, limits_of(4000), COUNTER))
    manifest = listed(asked, 190, set(range(190, 200)), 1024, set())
    named = [at(entry["page_id"]) for entry in manifest["available_pages"]]
    assert named == list(range(189, 189 - len(named), -1)) and len(named) > 20
    topics = [asked.pages.derived.pages[f"index_seg_{n:02d}"].text().partition("): ")[2] for n in (1, 2)]
    assert all(topics) and topics == [segment["hint"] for segment in manifest["segments"]][:2]
    ranges = [(segment["first"], segment["last"]) for segment in manifest["segments"]]
    assert ranges[0] == ("msg_0001", "msg_0060") and ranges[1][0] == "msg_0061"


def test_a_cut_message_is_listed_first() -> None:
    manifest = listed(told_of(40, []), 38, {38}, 600, {39})
    assert manifest["available_pages"][0]["page_id"] == "msg_0040" and manifest["total_available"] == 39


@pytest.mark.parametrize(("mode", "tokens"), [(VMMode.PASSIVE, 600), (VMMode.RELAXED, MIN_MANIFEST_TOKENS - 1)])
def test_without_faults_or_without_room_there_is_none(mode: VMMode, tokens: int) -> None:
    asked = epoch_of(messages_of(40), 4000, limits=limits_of(4000, mode=mode))
    assert asked._manifest(30, set(), set(), tokens) == ""


class Counted:
    """A counter that notes how many texts it was asked about, and how long they were."""

    def __init__(self) -> None:
        self.texts = 0
        self.chars = 0

    def text(self, text: str) -> int:
        self.texts += 1
        self.chars += len(text)
        return COUNTER.text(text)


def work(count: int, segments: int) -> tuple[int, int, int]:
    """(texts counted, characters counted, messages read) for a manifest of so long a history."""
    asked = told_of(count, [count * n // (segments + 1) for n in range(1, segments + 1)])
    asked.pages._messages.clear()
    counter: Any = Counted()
    asked.turn.context.counter = counter
    asked._manifest(count - 10, set(range(count - 10, count)), set(), 1024)
    return counter.texts, counter.chars, len(asked.pages._messages)


def test_its_cost_does_not_grow_with_the_history() -> None:
    texts, chars, seen = work(200, 10)
    assert texts <= 2 * 64 + 16 and seen <= 64 + 1
    for count, segments in ((1000, 10), (3000, 40)):
        more_texts, more_chars, more_seen = work(count, segments)
        assert more_texts <= texts + 4 and more_seen <= seen + 9  # one for each range
        assert more_chars <= 1.25 * chars  # longer page numbers
