"""Counts and model cards, from local files only."""

from __future__ import annotations

import json
import logging
import socket
from typing import Any

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from proxy.tokens import (
    DEFAULT_ENCODING,
    UNKNOWN_WINDOW_TOKENS,
    encoding_of,
    get_counter,
    model_card,
    tokens_upper_bound,
)
from tests.examples import examples

COUNTER = get_counter("gpt-4o")
many = examples(100)


@many
@given(st.text(max_size=200))
def test_text_is_counted_as_tiktoken_does_special_tokens_included(text: str) -> None:
    wanted = len(tiktoken.get_encoding("o200k_base").encode(text, disallowed_special=()))
    assert COUNTER.text(text) == wanted
    assert COUNTER.text(text + "<|endoftext|>") > wanted


@many
@given(st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": st.text(max_size=50)}), max_size=4))
def test_invariant_02_the_upper_bound_is_never_below_the_count(messages: list[dict[str, Any]]) -> None:
    messages = [*messages, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    body = json.dumps({"model": "m", "messages": messages}, separators=(",", ":")).encode()
    assert sum(COUNTER.message(m) for m in messages) + 3 <= tokens_upper_bound(body)


@pytest.mark.parametrize(
    "message",
    [{}, {"content": None}, {"content": 7}, {"content": [7, None, {"type": "text"}, {"type": "odd", "x": [1]}]},
     {"tool_calls": "odd"}, {"tool_calls": [None, {"a": 1}]}, {"function_call": 3}, {"name": 5}],
)
def test_invariant_01_no_message_raises(message: dict[str, Any]) -> None:
    assert COUNTER.message(message) >= 4


def test_everything_that_a_message_carries_counts() -> None:
    bare = COUNTER.message({"role": "assistant", "content": "hi"})
    more: list[dict[str, Any]] = [
        {"name": "bob"}, {"refusal": "no"}, {"tool_call_id": "c1"}, {"reasoning_content": "hm"},
        {"tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]}, {"function_call": {"name": "f"}},
    ]
    for extra in more:
        assert COUNTER.message({"role": "assistant", "content": "hi", **extra}) > bare
    low, high, audio = (
        COUNTER.message({"content": [part]}) for part in (
            {"type": "image_url", "image_url": {"url": "x" * 9999, "detail": "low"}},
            {"type": "image_url", "image_url": {"url": "x" * 9999}},
            {"type": "input_audio", "input_audio": {"data": "x" * 102_400}},
        )
    )
    assert (low, high) == (4 + 85, 4 + 1445) and 150 < audio < 300
    assert COUNTER.tools([]) == 0 < COUNTER.tools([{"function": {"name": "f"}}])


def test_a_long_text_is_counted_in_bounded_pieces() -> None:
    text = "word " * 60_000
    assert abs(COUNTER.text(text) - 60_000) < 10


@pytest.mark.parametrize(
    ("model", "encoding"),
    [("gpt-4o-mini", "o200k_base"), ("openai/gpt-4", "cl100k_base"), ("qwen3", DEFAULT_ENCODING)],
)
def test_the_encoding_of_a_model(model: str, encoding: str) -> None:
    assert encoding_of(model) == encoding
    assert get_counter(model).encoding_name == encoding
    assert get_counter(model, "cl100k_base").encoding_name == "cl100k_base"


def test_no_network_and_no_exception_for_an_encoding_that_is_not_here(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert get_counter("m", "no_such_encoding").encoding_name == DEFAULT_ENCODING
    assert "no_such_encoding" in caplog.text


def test_model_cards(caplog: pytest.LogCaptureFixture) -> None:
    card = model_card("gpt-4o")
    assert (card.window_tokens, card.known, card.tools, card.developer_role) == (128_000, True, True, "developer")
    assert model_card("gpt-3.5-turbo").developer_role == "system"
    model_card.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            unknown = model_card("nobody/knows-it")
    assert (unknown.window_tokens, unknown.known, unknown.tools) == (UNKNOWN_WINDOW_TOKENS, False, True)
    assert caplog.text.count("nobody/knows-it") == 1
