"""What a message says, apart from how it is written: the bytes that identity is made of.

Promises: two renderings of one message, such as the provider's answer and the client's echo of it
without `refusal`, `annotations`, reasoning or null fields, have equal canonical bytes; messages
that say different things do not. Never raises for any JSON value.
"""

from __future__ import annotations

from typing import Any

import msgspec

_encode = msgspec.json.Encoder(order="sorted").encode


def canonical(message: dict[str, Any]) -> bytes:
    """Canonical bytes of one Chat Completions message.

    Roles, names, text, media, tool calls and their ids count; whitespace around an assistant's text
    and the formatting of JSON arguments do not (clients strip the one and re-encode the other).
    """
    role = message.get("role")
    content = _content(message.get("content"))
    if role == "assistant":
        content = [part.strip() if isinstance(part, str) else part for part in content]
        content = [part for part in content if part != ""]
        refusal = message.get("refusal")
        if not content and isinstance(refusal, str):
            content = [refusal.strip()]
        audio = message.get("audio")
        if isinstance(audio, dict) and audio.get("id"):
            content.append({"audio": audio["id"]})
        calls = message.get("tool_calls") or ()
        said: list[Any] = [role, content]
        if isinstance(calls, list) and calls:
            said.append([_call(call) for call in calls])
        if message.get("function_call"):
            said.append({"function_call": _function(message["function_call"])})
        return _encode(said)
    said = [role, content]
    for key in ("tool_call_id", "name"):
        if message.get(key):
            said.append([key, message[key]])
    return _encode(said)


def _content(content: Any) -> list[Any]:
    """A string and an array with one text part say the same; null and empty say nothing."""
    if isinstance(content, str):
        return [content] if content else []
    if not isinstance(content, list):
        return [] if content is None else [content]
    return [_part(part) for part in content]


def _part(part: Any) -> Any:
    if isinstance(part, dict) and part.get("type") in ("text", "refusal"):
        text = part.get(part["type"])
        if isinstance(text, str):
            return text
    return part


def _call(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    body = call.get("function")
    if isinstance(body, dict):
        return [call.get("id"), _function(body)]
    return [call.get("id"), call.get("custom")]


def _function(function: Any) -> Any:
    if not isinstance(function, dict):
        return function
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments)
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            pass  # cut or malformed arguments are compared as they are
    return [function.get("name"), arguments]
