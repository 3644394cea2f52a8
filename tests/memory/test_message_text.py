from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.memory.message_text import (
    MIN_SPLIT_TOKENS,
    message_text,
    modality_of,
    prefix_of,
    split_text,
)
from proxy.memory.models import ContextPrefix, Modality

MESSAGES: list[tuple[dict[str, Any], str, Modality]] = [
    ({"role": "user", "content": "hi"}, "hi", Modality.TEXT),
    ({"role": "assistant", "content": None}, "", Modality.TEXT),
    (
        {"role": "user", "content": [
            {"type": "text", "text": "look:"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
            {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
            {"type": "file", "file": {"filename": "a.pdf", "file_data": "AAAA"}},
        ]},
        "look:\n[image]\n[audio]\n[file a.pdf]",
        Modality.TEXT,
    ),
    (
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y"}}]},
        "[image]",
        Modality.IMAGE,
    ),
    ({"role": "user", "content": [{"type": "file", "file": {"file_id": "f-1"}}]}, "[file f-1]",
     Modality.TEXT),
    ({"role": "assistant", "content": None, "refusal": "I can't."}, "I can't.", Modality.TEXT),
    (
        {"role": "assistant", "content": "Let me see.", "tool_calls": [
            {"id": "c1", "type": "function",
             "function": {"name": "weather", "arguments": '{"city":"Bern"}'}},
            {"id": "c2", "type": "custom", "custom": {"name": "sql", "input": "select 1"}},
        ]},
        'Let me see.\nweather({"city":"Bern"})\nsql(select 1)',
        Modality.TEXT,
    ),
    ({"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
     "f({})", Modality.TEXT),
    ({"role": "assistant", "content": None, "audio": {"id": "a", "transcript": "Good day"}},
     "[audio] Good day", Modality.AUDIO),
    ({"role": "tool", "tool_call_id": "c1", "content": '{"t": 21}'}, '{"t": 21}',
     Modality.STRUCTURED),
    ({"role": "tool", "tool_call_id": "c1", "content": "21 degrees"}, "21 degrees", Modality.TEXT),
    ({"role": "tool", "content": [{"type": "text", "text": "21"}]}, "21", Modality.TEXT),
]  # fmt: skip


@pytest.mark.parametrize(("message", "text", "modality"), MESSAGES)
def test_every_kind_of_message_has_text_and_modality(
    message: dict[str, Any], text: str, modality: Modality
) -> None:
    assert message_text(message) == text
    assert modality_of(message) is modality


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["role", "content", "type", "text", "tool_calls", "function", "custom", "file",
             "image_url", "audio", "refusal", "function_call", "name", "arguments"]
        ),
        inner,
        max_size=5,
    ),
    max_leaves=15,
)  # fmt: skip


@given(
    st.dictionaries(
        st.sampled_from(["role", "content", "tool_calls", "audio", "refusal", "function_call"]),
        _json,
    )
)
def test_invariant_01_no_message_however_odd_raises(message: dict[str, Any]) -> None:
    assert isinstance(message_text(message), str)
    assert isinstance(modality_of(message), Modality)


def test_prefixes() -> None:
    assert prefix_of("user") is ContextPrefix.USER
    assert prefix_of("assistant") is ContextPrefix.ASSISTANT
    assert prefix_of("tool") is ContextPrefix.TOOL
    assert prefix_of("summary") is ContextPrefix.SUMMARY
    assert prefix_of("user", Modality.AUDIO) is ContextPrefix.AUDIO
    assert prefix_of("tool", Modality.STRUCTURED) is ContextPrefix.STRUCTURED


def count_bytes(text: str) -> int:
    """A counter with several tokens for one character, as real ones have."""
    return (len(text.encode("utf-8", "surrogatepass")) + 2) // 3


@given(
    st.text(max_size=600) | st.text(alphabet="ab .\n👍汉", max_size=600),
    st.integers(MIN_SPLIT_TOKENS, 64),
    st.sampled_from([count_bytes, len, lambda s: len(s.split()) + len(s) // 50]),
)
@example("x" * 5000, 8, len)
@example(" " * 5000, 8, lambda s: 1 + len(s) // 500)
def test_split_text_loses_nothing_and_keeps_the_limit(
    text: str, max_tokens: int, count: Any
) -> None:
    parts = split_text(text, max_tokens, count)
    assert "".join(parts) == text
    assert all(count(part) <= max_tokens for part in parts)
    assert all(parts) or parts == [""]


def test_split_text_cuts_at_the_strongest_boundary() -> None:
    paragraph = "One short sentence. Another one here.\nA line of it.\n\n"
    parts = split_text(paragraph * 20, 60, count_bytes)
    assert all(part.endswith("\n\n") for part in parts)
    words = split_text("word " * 500, 50, count_bytes)
    assert all(part.endswith(" ") for part in words)
    sentences = split_text("It is so. " * 100, 50, count_bytes)
    assert all(part.endswith(". ") for part in sentences)


@pytest.mark.parametrize("text", ["a" * 1_000_000, "ab \n" * 250_000, "汉" * 400_000, " " * 10**6])
def test_invariant_10_a_megabyte_is_counted_a_few_times_only(text: str) -> None:
    counted = 0

    def count(part: str) -> int:
        nonlocal counted
        counted += len(part)
        return count_bytes(part)

    parts = split_text(text, 1024, count)
    assert counted <= 3 * len(text)
    assert len(parts) <= 1.5 * count_bytes(text) / 1024 + 1


def test_a_limit_below_one_character_is_refused() -> None:
    with pytest.raises(ValueError, match="at least"):
        split_text("x", MIN_SPLIT_TOKENS - 1, len)
