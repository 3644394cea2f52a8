"""What becomes of an exception of litellm; that real ones look like these is shown in
tests/e2e/test_providers.py."""

from __future__ import annotations

import json

import pytest

from proxy.conversation.refusals import learn
from proxy.upstream.litellm_errors import caused_by, error_headers, error_object, provider_status
from tests.conversation.player import limits_of


class _Told(Exception):
    def __init__(self, message: str, status: int | None = None, **more: object) -> None:
        super().__init__(message)
        self.message = message
        if status is not None:
            self.status_code = status
        self.__dict__.update(more)


class ContextWindowExceededError(_Told):
    """Named like litellm's."""


def behind(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


ANTHROPIC = "litellm.X: AnthropicException - b'{\"type\":\"error\",\"error\":{\"type\":\"%s\",\"message\":\"%s\"}}'"


def test_the_providers_own_status_and_sentence() -> None:
    error = behind(_Told(ANTHROPIC % ("overloaded_error", "Overloaded"), 500), _Told("x", 529))
    assert provider_status(error) == 529
    assert error_object(error) == {
        "message": "Overloaded", "type": "api_error", "param": None, "code": "overloaded_error",
    }  # fmt: skip


def test_a_wrapped_error_is_unwrapped() -> None:
    inner = _Told(ANTHROPIC % ("rate_limit_error", "Slow."), 429, headers={"retry-after": "7"})
    error = _Told("litellm.MidStreamFallbackError", 503, original_exception=inner)
    assert provider_status(error) == 429
    assert error_object(error)["code"] == "rate_limit_exceeded"
    assert error_object(error)["message"] == "Slow."
    assert error_headers(error) == [(b"retry-after", b"7")]


@pytest.mark.parametrize("message", ["prompt is too long: 9 tokens", "it's \\\\ \"too\" long"])
def test_too_small_a_window_has_openais_code(message: str) -> None:
    error = ContextWindowExceededError(message, 400)
    assert error_object(error) == {
        "message": message, "type": "invalid_request_error", "param": None,
        "code": "context_length_exceeded",
    }  # fmt: skip


def test_geminis_status_becomes_a_code() -> None:
    text = 'GeminiException - {"error": {"code": 400, "message": "Bad.", "status": "INVALID_ARGUMENT"}}'
    assert error_object(_Told(text, 400)) == {
        "message": "Bad.", "type": "invalid_request_error", "param": None, "code": "invalid_argument",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "(no words)"),
        ("{", "{"),
        ("b'{\\xff'", "{\ufffd"),
        ('b"{\'a\': 1}"', "{'a': 1}"),
        ("{} {}", "{} {}"),
        ("b'\\x'", "b'\\x'"),
        ("litellm.BadGatewayError: AnthropicException BadGatewayError - <p>No.</p>\n", "<p>No.</p>"),
        ("litellm.ServiceUnavailableError: XException - . Handle with `litellm.ServiceUnavailableError`.",
         "(no words)"),
        ("litellm.APIConnectionError: 'function'\nTraceback (most recent call last):\n  File \"a.py\"",
         "'function'"),
    ],
)  # fmt: skip
def test_odd_messages_are_told_without_litellms_frame(text: str, told: str) -> None:
    assert error_object(_Told(text, 418))["message"] == told


def test_fields_that_a_provider_does_not_have_are_named_with_what_to_do() -> None:
    said = (
        "litellm.UnsupportedParamsError: anthropic does not support parameters: ['seed', 'n'], for model=m."
        " To drop these, set `litellm.drop_params=True` or for proxy:\n\n`litellm_settings:\n drop_params: true`"
    )
    assert error_object(_Told(said, 400)) == {
        "message": "anthropic does not support ['seed', 'n']. Remove them from the request, or set"
        " upstream.drop_params: true, so that what a provider does not have is left out.",
        "type": "invalid_request_error", "param": "seed", "code": "unsupported_parameter",
    }  # fmt: skip


def test_an_endless_chain_ends() -> None:
    one, two = _Told("one"), _Told("two")
    one.original_exception, two.original_exception = two, one  # type: ignore[attr-defined]
    assert provider_status(one) is None
    assert caused_by(one, _Told) and not caused_by(one, KeyError)


def test_a_model_without_tools_is_learned_from_litellms_own_refusal() -> None:
    said = "litellm.UnsupportedParamsError: x does not support parameters: ['tools', 'tool_choice'], for model=m."
    body = json.dumps({"error": error_object(_Told(said, 400))}).encode()
    assert learn(body, limits_of(1500)) == {"tools": False}
