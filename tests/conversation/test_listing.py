"""The manifest says of every page outside the window that it is there, at a bounded cost."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.closing import close_segment
from proxy.conversation.epoch_request import EpochRequest
from proxy.conversation.listing import manifest_of
from proxy.conversation.pathpages import PathPages
from proxy.memory import VMMode
from proxy.memory.manifest import MIN_MANIFEST_TOKENS
from proxy.memory.pages import parse_page_id
from proxy.tokens import get_counter
from tests.conversation.player import Message, limits_of
from tests.conversation.test_epoch import request
from tests.examples import examples

COUNTER = get_counter("gpt-4o")


def messages_of(count: int) -> list[Message]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": f"Harbour{n} is near lantern{n}."} for n in range(count)]


def asked_of(count: int, ends: list[int]) -> EpochRequest:
    """A request over a path in which a segment was closed before each of `ends`."""
    asked = request(messages_of(count), 4000)
    for turn, end in enumerate(ends, 1):
        close_segment(asked.pages, end, limits_of(4000), turn, COUNTER)
    return asked


def listed(asked: EpochRequest, native_from: int, resident: set[int], tokens: int, cut: set[int]) -> dict[str, Any]:
    text = manifest_of(asked, native_from, resident, cut, tokens)
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


@examples(80)
@given(windows(), st.integers(600, 2500))
def test_every_page_outside_is_listed_or_in_one_segments_range(
    window: tuple[int, list[int], int, set[int], set[int]], tokens: int
) -> None:
    count, ends, native_from, resident, cut = window
    manifest = listed(asked_of(count, ends), native_from, resident, tokens, cut)
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
    asked = request([{"role": "user", "content": f"Wax{n}"} for n in range(200)], 4000)
    for turn, end in enumerate((60, 120), 1):
        close_segment(asked.pages, end, limits_of(4000), turn, COUNTER)
    manifest = listed(asked, 190, set(range(190, 200)), 1024, set())
    named = [at(entry["page_id"]) for entry in manifest["available_pages"]]
    assert named == list(range(189, 189 - len(named), -1)) and len(named) > 20
    topics = [asked.pages.derived.pages[f"index_seg_{n:02d}"].text().partition("): ")[2] for n in (1, 2)]
    assert all(topics) and topics == [segment["hint"] for segment in manifest["segments"]][:2]
    ranges = [(segment["first"], segment["last"]) for segment in manifest["segments"]]
    assert ranges[0] == ("msg_0001", "msg_0060") and ranges[1][0] == "msg_0061"


def test_a_cut_message_is_listed_first() -> None:
    manifest = listed(asked_of(40, []), 38, {38}, 600, {39})
    assert manifest["available_pages"][0]["page_id"] == "msg_0040" and manifest["total_available"] == 39


@pytest.mark.parametrize(("mode", "tokens"), [(VMMode.PASSIVE, 600), (VMMode.RELAXED, MIN_MANIFEST_TOKENS - 1)])
def test_without_faults_or_without_room_there_is_none(mode: VMMode, tokens: int) -> None:
    asked = request(messages_of(40), 4000, mode=mode)
    assert manifest_of(asked, 30, set(), set(), tokens) == ""


class Counted:
    """A counter that notes how many texts it was asked about, and how long they were."""

    def __init__(self) -> None:
        self.texts = 0
        self.chars = 0

    def text(self, text: str) -> int:
        self.texts += 1
        self.chars += len(text)
        return COUNTER.text(text)


class Read(PathPages):
    """Notes which messages are looked at."""

    def parts(self, position: int) -> list[str]:
        self.__dict__.setdefault("seen", set()).add(position)
        return super().parts(position)


def work(count: int, segments: int) -> tuple[int, int, int]:
    """(texts counted, characters counted, messages read) for a manifest of so long a history."""
    asked = asked_of(count, [count * n // (segments + 1) for n in range(1, segments + 1)])
    pages = Read(asked.pages.path, COUNTER, 200, asked.pages.derived)
    counter: Any = Counted()
    asked.pages, asked.counter = pages, counter
    manifest_of(asked, count - 10, set(range(count - 10, count)), set(), 1024)
    return counter.texts, counter.chars, len(pages.__dict__["seen"])


def test_its_cost_does_not_grow_with_the_history() -> None:
    texts, chars, seen = work(200, 10)
    assert texts <= 2 * 64 + 16 and seen <= 64 + 1
    for count, segments in ((1000, 10), (3000, 40)):
        more_texts, more_chars, more_seen = work(count, segments)
        assert more_texts <= texts + 4 and more_seen <= seen
        assert more_chars <= 1.25 * chars  # longer page numbers
