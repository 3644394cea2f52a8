"""What is pinned and what is dear."""

from __future__ import annotations

import pytest

from proxy.memory.importance import (
    PIN_TOKENS,
    PREFERENCE_IMPORTANCE,
    importance_of,
    is_standing,
)
from proxy.memory.models import DEFAULT_IMPORTANCE


@pytest.mark.parametrize(
    "text",
    ["Always cite sources.", "please never use tabs", "Fine. From now on answer in French", "ok\nremember that I fly",
     "And whenever I ask, be brief", "Don't ever apologise"],
)
def test_a_standing_instruction_of_the_users_is_pinned(text: str) -> None:
    assert is_standing("user", text, 10)
    assert not is_standing("assistant", text, 10) and not is_standing("user", text, PIN_TOKENS + 1)


@pytest.mark.parametrize("text", ["I always walk home.", "She never came", "Do you remember Paris?", ""])
def test_a_story_is_not_an_instruction(text: str) -> None:
    assert not is_standing("user", text, 10)


def test_preferences_are_dear() -> None:
    for text in ("I'd prefer tea", "my name is Ada", "I am allergic to nuts", "Call me Al"):
        assert importance_of("user", text) == PREFERENCE_IMPORTANCE
        assert importance_of("assistant", text) == DEFAULT_IMPORTANCE
    assert importance_of("user", "hello") == DEFAULT_IMPORTANCE
    assert importance_of("user", "x" * 10_000 + " my name is Ada") == DEFAULT_IMPORTANCE
