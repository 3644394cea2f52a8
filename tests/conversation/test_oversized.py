"""Newest messages larger than the window: media give way first, and what is not shown is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.epoch import Epoch
from proxy.conversation.oversized import cut_message, cut_newest, fair_shares
from proxy.conversation.window import Entry
from proxy.memory.planner import Group
from proxy.tokens import get_counter
from tests.conversation.player import Message, Player, call, calls, limits_of, says, script
from tests.conversation.test_epoch import epoch_of, loaded
from tests.e2e.rules import check_openai_rules, count_request_tokens
from tests.examples import examples
from tests.media import samples

COUNTER = get_counter("gpt-4o")
PICTURE = samples.image_part(samples.png(1024, 768))  # 765 tokens, 85 at low detail
SOUND = samples.audio_part(samples.wav(40))  # 400 tokens
FILM = samples.video_part(samples.mp4(2, 4.0, rate=5))  # 680 tokens
TEXT = {"type": "text", "text": "Compare these."}


def user(*parts: Any) -> Message:
    return {"role": "user", "content": list(parts)}


def cut(messages: list[Message], limit: int, **changes: Any) -> dict[int, Message]:
    """The messages that were cut, as they are shown."""
    asked = epoch_of(messages, 4000, **changes)
    dialogue = cut_newest(asked, [group_of(asked, messages)], limit)
    entries: dict[tuple[int, int], Entry] = loaded(dialogue, asked)
    for (position, _), entry in entries.items():
        assert entry.tokens == COUNTER.message(json.loads(entry.raw))
        assert entry.position == position
    return {position: json.loads(entry.raw) for (position, _), entry in entries.items()}


def group_of(asked: Epoch, messages: list[Message]) -> Group:
    ids = tuple(i for position in range(len(messages)) for i in asked.pages[position].ids)
    tokens = sum(asked.pages.tokens(position) for position in range(len(messages)))
    return Group(0, len(messages), tokens, ids, mandatory=True)


def kinds(message: Message) -> list[str]:
    return [part["type"] for part in message["content"]]


@pytest.mark.parametrize(
    ("limit", "level"), [(4000, 0), (1000, 1), (200, 2), (70, 3)], ids=["fits", "1", "2", "3"]
)
def test_media_go_to_the_first_level_at_which_the_message_fits(limit: int, level: int) -> None:
    message = user(TEXT, PICTURE, PICTURE)
    shown = cut([message], limit)
    if level == 0:
        assert shown == {}
        return
    (now,) = shown.values()
    assert COUNTER.message(now) <= limit
    assert now["content"][0] == TEXT
    text = json.dumps(now)
    for number in (1, 2):
        assert f"(img_0001_{number}, level {level})" in text
    assert text.count("<VM:CONTEXT>") == 1, "pictures side by side share one block"
    details = [p["image_url"]["detail"] for p in now["content"] if p["type"] == "image_url"]
    assert details == (["low"] * 2 if level == 1 else [])


def test_the_words_around_media_stay_where_they_are() -> None:
    after = {"type": "text", "text": "And this one?"}
    shown = cut([user(PICTURE, TEXT, PICTURE, after, SOUND)], 700)[0]
    texts = [part["text"] for part in shown["content"] if part["type"] == "text"]
    assert TEXT["text"] in texts
    assert after["text"] in texts
    order = [texts.index(TEXT["text"]), texts.index(after["text"])]
    first, second, sound = (
        next(i for i, t in enumerate(texts) if f"({name}, level" in t)
        for name in ("img_0001_1", "img_0001_2", "aud_0001_3")
    )
    assert first < order[0] < second < order[1] < sound


def test_media_give_way_before_words() -> None:
    words = {"type": "text", "text": "Every word of this question counts. " * 60}
    shown = cut([user(words, PICTURE, FILM, SOUND)], 1400)[0]
    assert shown["content"][0] == words
    assert "video_url" not in kinds(shown)


def test_words_are_cut_when_the_media_have_gone_as_low_as_they_go() -> None:
    words = {"type": "text", "text": "Every word of this question counts. " * 200}
    shown = cut([user(words, PICTURE)], 500)[0]
    assert COUNTER.message(shown) <= 500
    assert "image_url" not in kinds(shown)
    assert "tokens are not shown; the whole is in msg_0001" in shown["content"][0]["text"]


def test_a_call_stays_as_it_is_and_its_results_are_cut() -> None:
    result = {"role": "tool", "tool_call_id": "a", "content": "one row, " * 900}
    messages = [calls(call("look", {"w": 1}, "a")), result]
    shown = cut(messages, 400)
    assert shown[0] == messages[0]
    assert COUNTER.message(shown[1]) <= 400
    assert shown[1]["tool_call_id"] == "a"


def test_what_was_sent_in_this_turn_keeps_its_bytes() -> None:
    raw = json.dumps(user(TEXT)).encode()
    sent = Entry(raw, 12, 0)
    assert cut([user(TEXT, PICTURE, PICTURE)], 300, newest=sent) == {}


@examples(6)
@given(
    st.lists(st.sampled_from([PICTURE, SOUND, FILM, TEXT]), min_size=1, max_size=5),
    st.integers(1300, 3000),
)
def test_invariant_03_a_turn_with_any_media_is_valid_and_within_its_budget(
    parts: list[Message], budget: int
) -> None:
    """Through a whole turn, with a fault of the first medium."""
    limits = limits_of(budget)
    fault = calls(call("page_fault", {"page_id": "msg_0001", "target_level": 0}, "c1"))
    history = [user(TEXT), says("Yes."), user(*parts, *parts)]
    played = Player(limits).ask(history, script(fault, says("Done.")))
    assert played.message is not None
    for recorded in played.requests:
        assert check_openai_rules(recorded) == []
        if "<VM:RULES>" in json.dumps(recorded):
            assert count_request_tokens(recorded) <= limits.budget_tokens


# -- a text by its ends

many = examples(30)


@many
@given(st.lists(st.integers(0, 1000), max_size=8), st.integers(-10, 4000))
def test_fair_shares_fit_and_take_from_the_largest(sizes: list[int], budget: int) -> None:
    shares = fair_shares(sizes, budget)
    assert sum(shares) <= max(budget, 0) or not sizes
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    cut = [share for share, size in zip(shares, sizes, strict=True) if share < size]
    assert all(share <= min(cut) + len(sizes) for share in shares if cut and share not in cut)
    assert (sum(sizes) <= budget) == (not cut) or not sizes


@many
@given(st.text(min_size=1, max_size=60), st.integers(1, 60), st.integers(100, 600), st.booleans())
def test_a_cut_message_fits_and_keeps_its_ends(piece: str, times: int, limit: int, listed: bool) -> None:
    text = f"BEGIN {piece * times} END"
    content = [{"type": "image_url"}, {"type": "text", "text": text}] if listed else text
    message = {"role": "user", "content": content, "x": 1}
    cut = cut_message(message, ["msg_0001.1", "msg_0001.2"], limit + 1445 * listed, COUNTER)
    assert cut["x"] == 1 and cut["role"] == "user"
    if COUNTER.message(message) <= limit + 1445 * listed:
        assert cut == message
        return
    shown = cut["content"][1]["text"] if listed else cut["content"]
    assert shown.startswith("BEGIN") and "msg_0001.1 to msg_0001.2" in shown
    assert COUNTER.message(cut) <= limit + 1445 * listed + 8
    if listed:
        assert cut["content"][0] == {"type": "image_url"}


def test_what_has_no_text_stays() -> None:
    for content in (None, [], [{"type": "image_url"}]):
        message = {"role": "user", "content": content}
        assert cut_message(message, ["msg_0001"], 1, COUNTER) == message
