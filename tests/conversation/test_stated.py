"""What an upstream's list of models states, in many servers' words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.stated import stated_windows, window_of


def listed(*models: dict[str, Any]) -> bytes:
    return json.dumps({"object": "list", "data": list(models)}).encode()


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"max_model_len": 16384, "created": 1_700_000_000}, 16384),  # vLLM
        ({"meta": {"n_ctx": 8192, "n_ctx_train": 131072, "n_vocab": 128256, "n_params": 8_030_000_000}}, 8192),
        ({"meta": {"n_ctx_train": 131072, "n_embd": 4096, "size": 4_900_000_000}}, None),  # llama.cpp, older
        ({"context_window": 131072, "max_completion_tokens": 32768}, 131072),  # Groq
        ({"max_context_length": 32768, "capabilities": {"completion_chat": True}}, 32768),  # Mistral
        (
            {"context_length": 200_000, "pricing": {"prompt": "0.1"}, "per_request_limits": {"prompt_tokens": 900},
             "top_provider": {"context_length": 128_000, "max_completion_tokens": 8192}},
            128_000,
        ),  # OpenRouter
        (
            {"capabilities": {"limits": {"max_context_window_tokens": 128_000, "max_prompt_tokens": 64_000,
             "max_output_tokens": 16_384}}},
            64_000,
        ),  # Copilot
        ({"inputTokenLimit": 1_048_576, "outputTokenLimit": 65_536}, 1_048_576),  # Gemini
        ({"loaded_context_length": 4096, "max_context_length": 131_072}, 4096),  # LM Studio
        ({"metadata": {"context_length": 40_960, "max_tokens": 40_960}}, 40_960),  # DeepInfra
        ({"providers": [{"context_length": 65_536}, {"context_length": 131_072}]}, 65_536),  # Hugging Face
        ({"limits": {"max_input_tokens": 9000}}, 9000),
        ({"owned_by": "openai", "created": 1_715_367_049}, None),
        ({"context_length": None, "context_window": True, "max_model_len": 0}, None),
    ],
)
def test_a_window_is_what_the_keys_speak_of(fields: dict[str, Any], window: int | None) -> None:
    stated = stated_windows(listed({"id": "Org/Some-Model", **fields}, {"id": "another"}))
    assert window_of("Org/Some-Model", stated) == window


def test_a_model_is_found_by_its_name_its_alias_or_as_the_only_one() -> None:
    stated = stated_windows(listed({"id": "openai/gpt-4o", "context_length": 9000}, {"id": "m", "context_length": 8000, "aliases": ["n"]}))
    assert [window_of(n, stated) for n in ("openai/gpt-4o", "openai/gpt-4o:online", "GPT-4o", "m", "n", "o")] == [
        9000, 9000, 9000, 8000, 8000, None,
    ]  # fmt: skip
    alone = stated_windows(b'{"models": [{"name": "/models/a.gguf", "meta": {"n_ctx": 4096}}]}')
    assert window_of("gpt-3.5-turbo", alone) == 4096
    assert window_of("x", stated_windows(b'[{"id": "x", "context_length": 4096}, {"id": "y"}]')) == 4096


def test_names_alike_have_the_smallest_window_but_for_the_exact_one() -> None:
    stated = stated_windows(listed({"id": "a/m", "max_model_len": 9000}, {"id": "b/m", "max_model_len": 4000}))
    assert [window_of(n, stated) for n in ("a/m", "b/m", "m")] == [9000, 4000, 4000]


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["id", "data", "context_length", "meta"]), inner, max_size=4),
)


@given(JSON.map(json.dumps).map(str.encode) | st.binary(max_size=60))
def test_any_body_is_read_without_a_failure(body: bytes) -> None:
    assert all(isinstance(window, int) and window >= 512 for window in stated_windows(body).values())
