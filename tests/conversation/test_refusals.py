"""Refusals: which may be tried again without our changes, and what they say of the model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.effects import Refused
from proxy.conversation.refusals import by_numbers, excluded_by, is_something_else, learn, overflow
from tests.conversation.player import Player, limits_of, script
from tests.conversation.scenario import grown
from tests.examples import examples


@pytest.mark.parametrize(
    ("status", "window", "tries"), [(400, 1600, 1), (429, 128_000, 1), (500, 128_000, 1), (422, 128_000, 2)]
)
def test_invariant_01_refusal_is_repaired_only_where_the_request_would_fit_and_is_tried_again(
    status: int, window: int, tries: int
) -> None:
    player = Player(limits_of(1500, window_tokens=window))
    messages = [*grown(player, 12), {"role": "user", "content": "and now?"}]
    stored = dict(player.values)
    played = player.ask(messages, script(Refused(status, b"no")))
    assert len(played.bodies) == tries
    assert played.answer.refused == Refused(status, b"no")
    assert player.values == stored  # nothing of a refused turn is remembered


def test_refusal_says_what_the_model_takes() -> None:
    limits = limits_of(1500)
    assert learn(b"Unsupported role: developer", limits) == {"developer_role": "system"}
    for refusal in (
        b"FUNCTION calling is not supported by this model",
        b'{"error":{"message":"registry/x does not support tools"}}',
        b'"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set',
    ):
        assert learn(refusal, limits) == {"tools": False}, refusal
    flagged = b"Your prompt was flagged: 'tool abuse'"
    assert learn(flagged, limits) == {}
    error = b'{"error": {"message": "%s", "type": "invalid_request_error"}}' % flagged
    assert learn(error, limits) == {}
    assert learn(b"\xff", limits) == {}


TOO_LONG: list[tuple[str, str, int | None, int | None]] = [
    ("openai", "This model's maximum context length is 8192 tokens. However, your messages resulted in "
     "9000 tokens. Please reduce the length of the messages.", 8192, 9000),
    ("openai with an answer", "This model's maximum context length is 4097 tokens. However, you requested "
     "5000 tokens (4000 in the messages, 1000 in the completion).", 4097, 4000),
    ("openai, newer", "Input tokens exceed the configured limit of 272000 tokens. Your messages resulted "
     "in 300000 tokens.", 272000, 300000),
    ("openai without numbers", "Your input exceeds the context window of this model.", None, None),
    ("vllm", "This model's maximum context length is 4096 tokens. However, your request has 5000 input "
     "tokens.", 4096, 5000),
    ("vllm with max_tokens", "'max_tokens' or 'max_completion_tokens' is too large: 2000. This model's "
     "maximum context length is 4096 tokens and your request has 3000 input tokens (2000 > 4096 - "
     "3000).", 4096, 3000),
    ("vllm, older", "The decoder prompt (length 5000) is longer than the maximum model length of 4096.",
     4096, 5000),
    ("llama.cpp", '{"error":{"code":400,"message":"the request exceeds the available context size, try '
     'increasing it","type":"exceed_context_size_error","n_prompt_tokens":9000,"n_ctx":4096}}',
     4096, 9000),
    ("llama.cpp, newer", "request (9000 tokens) exceeds the available context size (4096 tokens), try "
     "increasing it", 4096, 9000),
    ("mistral", "Prompt contains 40000 tokens and 0 draft tokens, too large for model with 32768 maximum "
     "context length", 32768, 40000),
    ("groq", "Please reduce the length of the messages or completion.", None, None),
    ("cerebras", "Please reduce the length of the messages or completion. Current length is 9000 while "
     "limit is 8192", 8192, 9000),
    ("anthropic", "prompt is too long: 210000 tokens > 200000 maximum", 200000, 210000),
    ("anthropic with max_tokens", "input length and `max_tokens` exceed context limit: 190000 + 20000 > "
     "200000, decrease input length", 200000, 190000),
    ("gemini", "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).",
     1048576, 1200000),
    ("openrouter", "This endpoint's maximum context length is 131072 tokens. However, you requested about "
     "140000 tokens (139000 of text input, 1000 in the output).", 131072, 139000),
    ("bedrock", "Input is too long for requested model.", None, None),
    ("tgi", "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4097. Given: 5000 "
     "`inputs` tokens and 512 `max_new_tokens`", 4097, 5000),
    ("cohere", "too many tokens: total number of tokens in the prompt cannot exceed 4081 - received 5000.",
     4081, 5000),
    ("xai", "This model's maximum prompt length is 131072 but the request contains 140000 tokens.",
     131072, 140000),
    ("fireworks", "The prompt is too long: 140000, model maximum context length: 131072", 131072, 140000),
    ("lm studio", "Trying to keep the first 5000 tokens when context the overflows. However, the model is "
     "loaded with context length of only 4096 tokens, which is not enough.", 4096, None),
    ("sglang", "The input (5000 tokens) is longer than the model's context length (4096 tokens).",
     4096, 5000),
    ("dashscope", "Range of input length should be [1, 30720]", 30720, None),
    ("moonshot", "Invalid request: Your request exceeded model token limit: 8192", 8192, None),
    ("copilot", "prompt token count of 140000 exceeds the limit of 128000", 128000, 140000),
    ("github models", "Request body too large for gpt-4o model. Max size: 8000 tokens.", 8000, None),
    ("with commas", "maximum context length is 131,072 tokens", 131072, None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "window", "sent"), [t[1:] for t in TOO_LONG], ids=[t[0] for t in TOO_LONG])
def test_prompt_too_long_in_every_providers_words(
    text: str, window: int | None, sent: int | None
) -> None:
    found = overflow(Refused(400, text.encode()))
    assert found is not None
    assert (found.window_tokens, found.sent_tokens) == (window, sent)


def test_ollama_says_by_how_much() -> None:
    found = overflow(Refused(500, b"prompt too long; exceeded max context length by 1000 tokens"))
    assert found is not None and found.excess_tokens == 1000


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (429, "Rate limit reached for gpt-4o on tokens per min (TPM): Limit 30000, Used 29000, Requested "
         "9000. Please try again in 16s."),
        (429, "Rate limit reached on requests per day (RPD): Limit 5000, Used 5000, Requested 1."),
        (429, "This request would exceed your organization's rate limit of 40,000 input tokens per minute."),
        (429, "You exceeded your current quota, please check your plan and billing details."),
        (402, "This request requires more credits: you requested 9000 tokens, but can only afford 8000."),
        (400, "max_tokens is too large: 100000. This model supports at most 16384 completion tokens"),
        (400, "Invalid type for 'messages[3].content'"),
        (404, "The model `x` does not exist"),
    ],
)
def test_limit_of_another_kind_is_no_window(status: int, text: str) -> None:
    assert overflow(Refused(status, text.encode()), sent_tokens=9000) is None


@pytest.mark.parametrize(
    ("status", "text", "window"),
    [
        (429, "Request too large for gpt-4o in organization org-x on tokens per min (TPM): Limit 30000, "
         "Requested 40000. The input or output tokens must be reduced in order to run successfully.", 30000),
        (413, "Request too large for model `x` on tokens per minute (TPM): Limit 6000, Requested 9000", 6000),
        (429, "This request would exceed your organization's rate limit of 20,000 input tokens per minute.",
         20000),
    ],
)  # fmt: skip
def test_limit_per_minute_that_the_request_can_never_meet_is_a_window(
    status: int, text: str, window: int
) -> None:
    assert overflow(Refused(status, text.encode()), sent_tokens=39_000) == (window, None, None)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 429, 500, 503])
def test_windows_words_are_understood_under_every_status(status: int) -> None:
    text = b"This model's maximum context length is 8192 tokens."
    assert overflow(Refused(status, text)) == (8192, None, None)


@pytest.mark.parametrize(
    ("text", "window"),
    [
        ('{"code": 20015, "message": "longueur de la demande 12443, longueur permise 8192", "data": null}', 8192),
        ("Anfrage mit 12.443 Zeichen", None),  # no number is like ours
        ('{"error": {"message": "12443 + 512 > 8192"}}', 8192),
        ('{"detail": [{"msg": "n=12443.0, m=8192.0"}]}', 8192),
        ('{"error": {"message": "request req-12443 failed on port 8192"}}', None),
        ("12,443 against 8,192", 8192),
        ('{"error": {"code": 12443, "message": "8192"}}', None),
        ("", None),
        ("12443 is above 64", None),  # no window is so small
    ],
)
def test_two_numbers_say_what_no_words_do(text: str, window: int | None) -> None:
    assert by_numbers(Refused(400, text.encode()), 14_000).window_tokens == window


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (401, "Incorrect API key provided: sk-12345678."),
        (401, "Your authentication token has expired."),
        (403, '{"error": {"message": "Country not supported"}}'),
        (402, "Too many tokens for your balance"),
        (404, "The model `x` does not exist"),
        (429, ""),
        (429, "Rate limit reached ... on tokens per min (TPM): Limit 30000, Requested 9. Try again in 2s."),
        (400, '{"error": {"message": "No.", "code": "insufficient_quota"}}'),
        (400, '{"error": {"message": "No.", "type": "content_filter"}}'),
        (400, '{"error": {"message": "maximum is 2", "param": "temperature"}}'),
        (400, '{"error": {"message": "not an image", "param": "messages[3].content[0].image_url"}}'),
        (422, '{"detail": [{"loc": ["body", "top_p"], "msg": "ensure this value is less than 1"}]}'),
    ],
)  # fmt: skip
def test_refusal_that_is_surely_not_about_size(status: int, text: str) -> None:
    assert is_something_else(Refused(status, text.encode()))


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (400, ""),
        (400, '{"error": "400 status code (no body)"}'),
        (400, '{"error": {"message": "模型处理失败", "type": "invalid_request_error", "param": null}}'),
        (400, '{"error": {"message": "no", "param": "messages"}}'),
        (401, '{"error": {"message": "only 8K context", "type": "invalid_authentication_error"}}'),
        (413, "<html>Request Entity Too Large</html>"),
        (422, '{"detail": [{"loc": ["body", "messages"], "msg": "no"}]}'),
        (429, "The request is too large for this tier."),
        (500, "Internal Server Error"),
        (500, '{"error": {"message": "?", "type": "unknown_error"}}'),
        (503, '{"error": null}'),
    ],
)  # fmt: skip
def test_refusal_that_may_be_about_size(status: int, text: str) -> None:
    assert not is_something_else(Refused(status, text.encode()))


@given(st.integers(400, 599), st.one_of(st.binary(max_size=300), st.text(max_size=300).map(str.encode)))
@examples(60)
def test_refusal_of_any_kind_can_be_read(status: int, body: bytes) -> None:
    refused = Refused(status, body)
    for read in (overflow(refused, 9000), by_numbers(refused, 9000)):
        assert read is None or all(n is None or n >= 0 for n in read)
    assert isinstance(is_something_else(refused), bool)


def test_refusal_of_our_additions_is_understood() -> None:
    limits = limits_of(1500)
    for refusal, fact in (
        ("Unknown parameter: 'stream_options'.", {"stream_usage": False}),
        ("stream_options.include_usage is not supported", {"stream_usage": False}),
        ("[{'type': 'extra_forbidden', 'loc': ('body', 'stream_options')}]", {"stream_usage": False}),
        ("Unrecognized request argument supplied: prompt_cache_key", {"prompt_cache_key": False}),
        ("System message must be at the beginning.", {"mid_system": False}),
        ("Function calling with a response mime type: 'application/json' is unsupported",
         {"tools_with_json": False}),
        ("response_format json_schema is not supported together with tools", {"tools_with_json": False}),
        ("json mode cannot be used: unsupported with function calling", {"tools_with_json": False}),
        ("Tool use with function calling is unsupported", {}),
        ("Only one system message is supported", {"mid_system": False}),
        ("Unexpected role 'system' after role 'user'", {"mid_system": False}),
        ("System role not supported", {"system_role": False}),
        ("This model does not support system messages", {"system_role": False}),
        ("Conversation roles must alternate user/assistant/user/assistant/...", {"alternate": True}),
        ("After the optional system message, conversation roles must alternate user and assistant", {"alternate": True}),
        ("After the (optional) system message(s), user message(s) should alternate with assistant message(s)",
         {"alternate": True}),
        ('messages: roles must alternate between "user" and "assistant"', {"alternate": True}),
        ("Please ensure that multiturn requests alternate between user and model.", {"alternate": True}),
        ("No endpoints found that support tool use.", {"tools": False}),
    ):
        assert learn(refusal.encode(), limits) == fact, refusal


@pytest.mark.parametrize(
    ("refusal", "names"),
    [
        ("Cannot use custom grammar constraints with tools.", ["grammar"]),
        ("tools cannot be combined with beam_width or dry_run", ["beam_width", "dry_run"]),
        ("Streaming is unavailable when tools are in use", []),
        ("No endpoints found that support tool use. To learn more about provider routing, see the guide", []),
        ("this model does not support tools", []),
        ("grammar: unexpected end of input", []),
    ],
)
def test_refusal_names_the_fields_that_exclude_tools(refusal: str, names: list[str]) -> None:
    fields = ["model", "messages", "tools", "stream", "grammar", "provider", "dry_run", "beam_width"]
    assert excluded_by(refusal.encode(), fields) == names
