"""litellm's exceptions, told as the provider said it and in OpenAI's shape.

Promises: the provider's own status (litellm makes 500 of Anthropic's 529), its own sentence without
litellm's frame, and the provider's hints when to try again. A window that is too small has OpenAI's
code `context_length_exceeded`, whatever the provider calls it.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from proxy.upstream.litellm_headers import relayed

_CHAIN_LIMIT: Final = 16  # exceptions looked at behind one error
_BYTES: Final = re.compile(r"b'(?:[^'\\]|\\.)*'|b\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_OVERFLOW: Final = "ContextWindowExceededError"
# litellm's words around a provider's.
_FRAME: Final = re.compile(r"^(?:litellm\.\w+: )+(?:\w+: )?(?:\w+Exception(?: \w+)? - )?")
_ADVICE: Final = re.compile(r"\.? Handle with `litellm\.\w+`\.$")
_UNSUPPORTED: Final = re.compile(r"(\w+) does not support parameters: (\['(\w+)'[^\]]*\])")
# An error within a stream of Gemini's, as litellm tells it.
_WITHIN: Final = re.compile(r"([A-Z]+(?:_[A-Z]+)*) - (.+)", re.DOTALL)
_TRACEBACK: Final = "\nTraceback (most recent call last)"


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what is behind it, nearest first."""
    at: BaseException | None = error
    for _ in range(_CHAIN_LIMIT):
        if at is None:
            return
        yield at
        inner = getattr(at, "original_exception", None)
        at = inner if isinstance(inner, BaseException) else at.__cause__ or at.__context__


def caused_by(error: Exception, kind: type[BaseException]) -> bool:
    return any(isinstance(cause, kind) for cause in chain(error))


def provider_status(error: Exception) -> int | None:
    """The provider's HTTP status, else the one that litellm gave; None: there was no answer."""
    found: int | None = None
    for cause in chain(error):  # the farthest is the provider's own
        response = getattr(cause, "response", None)
        for status in (getattr(cause, "status_code", None), getattr(response, "status_code", None)):
            if isinstance(status, int) and 400 <= status <= 599:
                found = status
    return found


def error_headers(error: Exception) -> list[tuple[bytes, bytes]]:
    """The provider's headers of a refusal; litellm puts them in several places."""
    found: dict[str, Any] = {}
    for cause in chain(error):
        for headers in (
            getattr(cause, "litellm_response_headers", None),
            getattr(getattr(cause, "response", None), "headers", None),
            getattr(cause, "headers", None),
        ):
            if isinstance(headers, Mapping):
                for name, value in headers.items():
                    found.setdefault(str(name).lower(), value)
    return [*relayed(found)]


def error_object(error: Exception) -> Mapping[str, Any]:
    """What stands under `error` in OpenAI's shape."""
    unknown = _UNSUPPORTED.search(str(getattr(error, "message", None) or error))
    if unknown is not None:
        return {
            "message": f"{unknown[1]} does not support {unknown[2]}. Remove them from the request, or set"
            " upstream.drop_params: true, so that what a provider does not have is left out.",
            "type": "invalid_request_error",
            "param": unknown[3],
            "code": "unsupported_parameter",
        }
    status = provider_status(error)
    said = _said(error)
    code = said.get("code") or getattr(error, "code", None)
    code = None if code is None or str(code).isdigit() else str(code)
    kind = said.get("type") or said.get("status")  # Anthropic's word, Gemini's word
    if any(type(cause).__name__ == _OVERFLOW for cause in chain(error)):
        code = "context_length_exceeded"
    elif code is None and status == 429:
        code = "rate_limit_exceeded"
    elif code is None and isinstance(kind, str) and kind != "invalid_request_error":
        code = kind.lower()
    return {
        "message": str(said.get("message") or _words(error)),
        "type": _type(status),
        "param": getattr(error, "param", None),
        "code": code,
    }


def _words(error: Exception) -> str:
    """What the provider wrote, where that is no error object; else what litellm says, without the
    place in its own code."""
    text = str(getattr(error, "message", None) or error).partition(_TRACEBACK)[0]
    return _unquoted(_ADVICE.sub("", _FRAME.sub("", text))).strip() or "(no words)"


def _type(status: int | None) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status is not None and status < 500 else "api_error"


def _said(error: Exception) -> Mapping[str, Any]:
    """The error object in the provider's body, which litellm quotes in its message."""
    for cause in chain(error):
        text = _unquoted(str(getattr(cause, "message", None) or cause))
        if within := _WITHIN.fullmatch(text):
            return {"status": within[1], "message": within[2]}
        start = text.find("{")
        if start < 0:
            continue
        try:
            body, _ = json.JSONDecoder().raw_decode(text, start)
        except ValueError:
            continue
        found = body.get("error") if isinstance(body, dict) else None
        if isinstance(found, dict) and found.get("message"):
            return found
    return {}


def _unquoted(text: str) -> str:
    """The body in a message such as `AnthropicException - b'{...}'`; else the message."""
    quoted = _BYTES.search(text)
    if quoted is None:
        return text
    try:
        return bytes(ast.literal_eval(quoted.group())).decode("utf-8", "replace")
    except (ValueError, SyntaxError):
        return text
