"""Counts by the providers' published rules, and model cards; all from local files."""

from __future__ import annotations

import base64
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
    encoding_is_known,
    get_counter,
    model_card,
    tokens_upper_bound,
)
from tests.bench.token_error import (
    Published,
    counts,
    data_sets,
    png_part,
    wav_part,
)
from tests.examples import examples

Message = dict[str, Any]

COUNTER = get_counter("gpt-4o")
PUBLISHED = {model: Published(model) for model in ("gpt-4o", "gpt-4")}
many = examples(30)

texts = st.text(max_size=60) | st.sampled_from(
    ["naïve café", "こんにちは世界", "مرحبا", "🧑‍🚀👩‍👩‍👧", "<|endoftext|>", "a" * 50, "0x1f 3.14159"]
)
names = st.text(alphabet="abcxyz_09", min_size=1, max_size=12)
calls = st.builds(
    lambda id, name, arguments: {
        "id": id, "type": "function", "function": {"name": name, "arguments": arguments}
    },
    names, names, texts | st.dictionaries(names, texts, max_size=3).map(json.dumps),
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"])},
    optional={
        "content": texts | st.none() | st.lists(texts.map(lambda t: {"type": "text", "text": t}), max_size=3),
        "name": names,
        "tool_calls": st.lists(calls, max_size=3),
        "tool_call_id": names,
    },
)
tool_arrays = st.lists(
    st.builds(
        lambda name, words, properties: {
            "type": "function",
            "function": {
                "name": name, "description": words, "parameters": {"type": "object", "properties": properties}
            },
        },
        names, texts,
        st.dictionaries(
            names,
            st.fixed_dictionaries(
                {"type": st.sampled_from(["string", "integer"]), "description": texts},
                optional={"enum": st.lists(names, min_size=1, max_size=4)},
            ),
            max_size=4,
        ),
    ),
    max_size=3,
)


@many
@given(st.text(max_size=200))
def test_text_is_counted_as_tiktoken_does_special_tokens_included(text: str) -> None:
    wanted = len(tiktoken.get_encoding("o200k_base").encode(text, disallowed_special=()))
    assert COUNTER.text(text) == wanted
    assert COUNTER.text(text + "<|endoftext|>") > wanted


@many
@given(st.lists(messages, max_size=4), tool_arrays, st.sampled_from(["gpt-4o", "gpt-4"]))
def test_invariant_03_no_count_is_below_the_published_rules(
    history: list[Message], tools: list[Message], model: str
) -> None:
    counter, published = get_counter(model), PUBLISHED[model]
    for message in history:
        assert counter.message(message) >= published.message(message)
    assert counter.tools(tools) == published.tools(tools)


# -- the bound that needs no parsing

media = st.sampled_from(
    [png_part(600, 500), png_part(300, 900, "low"), wav_part(2.0),
     {"type": "image_url", "image_url": {"url": "https://a/b.png"}}, {"type": "image_url", "image_url": "x"},
     {"type": "input_image", "image_url": "https://a/b.png"}, {"image_url": {"url": "https://a/b.png"}},
     {"type": "image", "source": {"type": "base64", "data": "eA=="}}, {"type": "image"},
     {"type": "file", "file": {"file_id": "f"}}, {"type": "document", "source": {"data": "x"}},
     {"type": "file", "file": {"filename": "a.txt", "file_data": "data:text/plain;base64,8J+nkeKAjfCfmoA="}},
     {"type": "file", "file": {"file_data": "data:application/pdf;base64," + base64.b64encode(
         b"%PDF-1.4" + b"/Type/Page " * 40).decode()}},
     {"type": "video_url", "video_url": {"url": "https://a/b.mp4"}}, {"type": "input_video", "video": "x"},
     {"type": "input_audio", "input_audio": {"data": "x" * 900, "format": "pcm16"}},
     {"type": "input_audio", "input_audio": {"data": "?", "format": "wav"}}, {"type": "audio_url", "audio_url": "x"},
     {"type": "odd", "x": [1, 2.5, None, {"y": "z"}]}, {"type": "refusal", "refusal": "no"}]
)  # fmt: skip
spoken = st.fixed_dictionaries({"id": names}, optional={"transcript": texts, "data": st.just("x" * 400)})


@many
@given(
    st.lists(messages, max_size=3), st.lists(media, max_size=3), spoken | st.none(), tool_arrays,
    st.sampled_from(["gpt-4o", "gpt-4o-mini", "gpt-5-nano", "claude-sonnet-4-5", "gemini-2.5-pro", "unknown"]),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_invariant_02_the_upper_bound_is_never_below_the_count(
    history: list[Message], parts: list[Message], audio: Message | None, tools: list[Message],
    model: str, ascii_only: bool, hidden: bool,
) -> None:  # fmt: skip
    history = [*history, {"role": "user", "content": parts}]
    if audio is not None:
        history.append({"role": "assistant", "content": None, "audio": audio})
    request = {"model": model, "messages": history, **({"tools": tools} if tools else {})}
    body = json.dumps(request, separators=(",", ":"), ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    if hidden:  # JSON may spell any letter as an escape
        for word in (b'"image', b'"input_', b'"file', b'"audio', b'"video', b'"transcript'):
            body = body.replace(word, word[:2] + b"\\u%04x" % word[2] + word[3:])
        assert json.loads(body) == json.loads(json.dumps(request))
    counter = get_counter(model)
    count = sum(counter.message(m) for m in history) + 3 + counter.tools(tools)
    bound = tokens_upper_bound(body, counter)
    assert count <= bound


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
    assert COUNTER.tools([]) == 0 < COUNTER.tools([{"function": {"name": "f"}}])


# -- messages and tools


def test_a_tool_call_costs_its_words_not_its_json() -> None:
    arguments = json.dumps({"path": "a/b", "text": 'say "hi"\n' * 20})
    call = {"id": "c1", "type": "function", "function": {"name": "write", "arguments": arguments}}
    count = COUNTER.message({"role": "assistant", "content": None, "tool_calls": [call]})
    assert count == 4 + 3 + sum(COUNTER.text(word) for word in ("c1", "write", arguments))
    custom = {"id": "c1", "type": "custom", "custom": {"name": "write", "input": arguments}}
    assert COUNTER.message({"role": "assistant", "tool_calls": [custom]}) == count
    legacy = {"role": "assistant", "function_call": {"name": "write", "arguments": arguments}}
    assert COUNTER.message(legacy) == count - COUNTER.text("c1")


def test_a_signature_that_litellm_hangs_on_an_id_costs_no_text() -> None:
    signed = "call_1__thought__" + "QUJD" * 400
    for made in (
        lambda id: {"role": "tool", "tool_call_id": id, "content": "found"},
        lambda id: {"role": "assistant", "tool_calls": [{"id": id, "function": {"name": "f", "arguments": "{}"}}]},
    ):
        assert COUNTER.message(made(signed)) == COUNTER.message(made("call_1"))


def _tool(parameters: Any, **more: Any) -> list[Message]:
    function = {"name": "f", "description": "Does it.", "parameters": parameters, **more}
    return [{"type": "function", "function": function}]


WORDS = "The zebra quickly jumps over lazy dogs"
DEEP: Message = {"type": "object", "properties": {"end": {"type": "string", "description": WORDS}}}
for _ in range(200):
    DEEP = {"type": "object", "properties": {"k": DEEP}}


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object", "properties": {"a": {"type": "string", "description": WORDS}}},
        {"type": "object", "properties": {"a": {"type": "object", "properties": {
            "b": {"type": "string", "description": WORDS}}}}},
        {"type": "object", "properties": {"a": {"type": "array", "items": {"description": WORDS}}}},
        {"type": "object", "properties": {"a": {"anyOf": [{"type": "null"}, {"description": WORDS}]}}},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"description": WORDS}}},
        {"type": "object", "additionalProperties": {"type": "string", "description": WORDS}},
        {"type": "object", "properties": {"a": {"type": "string", "default": WORDS}}},
        {"type": "object", "properties": {"a": {"enum": [1, 2, WORDS]}}},
        {"type": "object", "properties": {"a": {"items": {"items": {"prefixItems": [{"const": WORDS}]}}}}},
        DEEP,
    ],
)  # fmt: skip
def test_no_word_of_a_nested_schema_is_missed(parameters: Message) -> None:
    without = json.loads(json.dumps(parameters).replace(WORDS, ""))
    more = COUNTER.tools(_tool(parameters)) - COUNTER.tools(_tool(without))
    assert more >= COUNTER.text(WORDS) - 1


@pytest.mark.parametrize(
    "tools",
    [[None], ["f"], [{}], [{"function": "f"}], _tool(7), _tool({"properties": [1]}), _tool({"properties": {"a": 3}}),
     _tool({"properties": {"a": {"type": ["string", "null"], "enum": "x", "items": 4, "anyOf": [5]}}}),
     [{"type": "web_search"}], [{"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}]],
)  # fmt: skip
def test_invariant_01_no_tool_raises(tools: list[Any]) -> None:
    for model in ("gpt-4o", "gpt-4", "claude-3-5-sonnet", "llama"):
        assert get_counter(model).tools(tools) > 0


def test_other_providers_are_shown_the_json_of_a_tool() -> None:
    tools = _tool({"type": "object", "properties": {"a": {"type": "string", "description": WORDS}}})
    raw = COUNTER.text(json.dumps(tools[0], separators=(",", ":")))
    assert COUNTER.tools(tools) < raw <= get_counter("llama-3").tools(tools)
    assert get_counter("claude-sonnet-4-5").tools(tools) >= raw + 346
    answer_format = [{"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}]
    assert get_counter("claude-sonnet-4-5").tools(answer_format) < 60


# -- the real conversations


@pytest.mark.parametrize("data", ["locomo", "beam", "trajectories"])
def test_the_error_against_the_published_rules_is_below_2_percent(data: str) -> None:
    for conversation in data_sets()[data]:
        ours, published = counts(conversation, "gpt-4o")
        assert 0 <= ours - published < 0.02 * published, conversation.id


# -- encodings and cards


def test_a_long_text_is_counted_in_bounded_pieces() -> None:
    text = "word " * 60_000
    assert abs(COUNTER.text(text) - 60_000) < 10


@pytest.mark.parametrize(
    ("model", "encoding"),
    [("gpt-4o-mini", "o200k_base"), ("openai/gpt-4", "cl100k_base"), ("qwen3", DEFAULT_ENCODING)],
)
def test_the_encoding_of_a_model(model: str, encoding: str) -> None:
    assert get_counter(model).encoding_name == encoding
    assert get_counter(model, "cl100k_base").encoding_name == "cl100k_base"


def test_counters_of_one_rule_are_one_and_its_name_says_which() -> None:
    assert get_counter("gpt-4o") is get_counter("openai/gpt-4.1-2025-04-14")
    assert get_counter("gpt-4o") != get_counter("gpt-4o-mini")
    assert len({get_counter(model) for model in ("gpt-4o", "gpt-4.1", "gpt-4", "o3")}) == 3
    names = [get_counter(model).name for model in ("gpt-4o", "gpt-4", "qwen3")]
    assert names == ["o200k_base/tile-85-170", "cl100k_base/tile-85-170", "o200k_base/tile-85-170/json-tools"]
    assert [encoding_is_known(model) for model in ("gpt-4o", "openai/gpt-4", "qwen3")] == [True, True, False]


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
    assert (card.window_tokens, card.known, card.developer_role) == (128_000, True, "developer")
    assert model_card("gpt-3.5-turbo").developer_role == "system"
    model_card.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            unknown = model_card("nobody/knows-it")
    assert (unknown.window_tokens, unknown.known) == (UNKNOWN_WINDOW_TOKENS, False)
    assert caplog.text.count("nobody/knows-it") == 1


@many
@given(st.lists(st.text(st.characters(exclude_characters="\r\n"), max_size=30), max_size=4), texts)
def test_tokens_of_whole_lines_add(lines: list[str], text: str) -> None:
    """Where the counter says so; a line that begins like the window's own: with a letter."""
    for model in ("gpt-4o", "gpt-4"):
        counter = get_counter(model)
        told = [f'U (msg_0001): "{line}"\n' for line in lines]
        if counter.adds_lines(text, sum(map(len, told))):
            assert counter.text("".join(told) + text) == sum(map(counter.text, told)) + counter.text(text)
