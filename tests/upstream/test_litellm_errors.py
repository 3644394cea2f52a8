"""What becomes of an exception of litellm; that real ones look like these is shown in
tests/e2e/test_providers.py."""

from __future__ import annotations

import pytest

from proxy.upstream.litellm_errors import caused_by, error_object, provider_status, retry_headers


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
    assert retry_headers(error) == [(b"retry-after", b"7")]


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


@pytest.mark.parametrize("text", ["", "{", "b'{\\xff'", 'b"{\'a\': 1}"', "{} {}", "b'\\x'"])
def test_odd_messages_are_told_as_they_are(text: str) -> None:
    assert error_object(_Told(text, 418))["message"] == text


def test_an_endless_chain_ends() -> None:
    one, two = _Told("one"), _Told("two")
    one.original_exception, two.original_exception = two, one  # type: ignore[attr-defined]
    assert provider_status(one) is None
    assert caused_by(one, _Told) and not caused_by(one, KeyError)
