"""What a model's name says: its plain forms, its card, its window."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.tokens import encoding_is_known, get_counter, model_card
from proxy.tokens.cards import normal_name, plain_name


@pytest.mark.parametrize(
    ("written", "model"),
    [
        ("OpenAI/GPT-4o-Mini:online", "gpt-4o-mini"),
        ("openrouter/openai/o3:floor", "o3"),
        ("ft:gpt-4.1-2025-04-14:acme:helpdesk:Ab12", "gpt-4.1-2025-04-14"),
        ("gpt-3.5-turbo-1106:ft-acme-2024-02-03-10-00-00", "gpt-3.5-turbo-1106"),
        ("gpt-4o-2024-08-06.ft-0a1b2c", "gpt-4o-2024-08-06"),
        ("claude-3-5-sonnet@20241022", "claude-3-5-sonnet"),
        ("anthropic.claude-3-5-haiku-20241022-v1:0", "anthropic.claude-3-5-haiku-20241022"),
        ("llama3.1:latest", "llama3.1"),
        ("llama3.1:8b-instruct-q4_K_M", "llama3.1:8b-instruct-q4_k_m"),
        ("qwen3:0.6b", "qwen3:0.6b"),
    ],
)
def test_a_plain_name_is_the_model_without_its_gateway(written: str, model: str) -> None:
    assert plain_name(written) == model


@given(st.text(max_size=80))
def test_any_text_has_a_name_and_a_card(text: str) -> None:
    assert len(plain_name(text)) <= 3 * len(text)
    assert normal_name(normal_name(text)) == normal_name(text) or ":" in text or "@" in text
    assert model_card(text).window_tokens > 0


@pytest.mark.parametrize(
    ("written", "row"),
    [
        ("Claude-Opus-4.5", "claude-opus-4-5"),
        ("openrouter/google/gemini-2.5-flash:thinking", "gemini-2.5-flash"),
        ("eu.anthropic.claude-sonnet-4-5", "claude-sonnet-4-5"),
        ("claude-sonnet-4.5-20250929", "claude-sonnet-4-5-20250929"),
        ("mistral-medium-latest", "mistral/mistral-medium-latest"),
        ("openai/gpt-oss-20b:free", "groq/openai/gpt-oss-20b"),
        ("my-gateway/eu/gpt-4.1:nitro", "gpt-4.1"),
    ],
)
def test_a_window_is_found_by_any_spelling(written: str, row: str) -> None:
    card = model_card(written)
    assert (card.known, card.window_tokens) == (True, model_card(row).window_tokens)


def test_a_window_is_the_one_that_most_providers_state() -> None:
    """One of them sells the model with 12k, one Copilot's gpt-4o has 64k."""
    assert model_card("llama-3.3-70b-instruct").window_tokens >= 128_000
    assert model_card("gpt-4O").window_tokens == 128_000


@pytest.mark.parametrize("name", ["gpt-oss:120b", "llama3.3:70b", "qwen2.5:7b-instruct-q8_0", "nobody/has-it"])
def test_a_name_of_other_weights_is_unknown(name: str) -> None:
    """An ollama tag is served with a window of its own, mostly a small one."""
    assert not model_card(name).known


def test_a_name_decides_every_fact_alike() -> None:
    for name in ("openai/gpt-4o:online", "ft:gpt-4o-2024-08-06:acme::1", "GPT-4o", "gpt-4o-2024-08-06.ft-1"):
        card = model_card(name)
        assert card.developer_role == "developer", name
        assert get_counter(name) == get_counter("gpt-4o") and encoding_is_known(name), name
    assert get_counter("openai/GPT-4:free") == get_counter("gpt-4")
