"""A chat request as it comes: its bytes, its top-level fields, and what is wrong with them.

Promises: a body over the limit is not read to its end; whatever we rely on ourselves is checked, and
a request that fails the check is the upstream's to judge, unchanged (`is_upstreams_to_judge`); only
its size is refused here, in OpenAI's error shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from proxy.api.passthrough import Receive, Scope
from proxy.conversation.body import Fields
from proxy.errors import ApiError

# Codes of `read_body` and `validate`: the request as such.
_UNREADABLE = ("invalid_json", "invalid_type", "missing_required_parameter", "empty_array")


class Decoded(Mapping[str, Any]):
    """The request's top-level fields, each decoded when it is asked for. `model`: what the path names,
    for a body without one (Azure's deployments)."""

    def __init__(self, fields: Fields, model: str | None = None) -> None:
        self._fields = fields
        self._values: dict[str, Any] = {}
        if model is not None and bytes(fields.get("model", b"null")) in (b"null", b'""'):
            self._values["model"] = model

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            self._values[name] = msgspec.json.decode(self._fields[name])
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


async def read_bytes(scope: Scope, receive: Receive, limit_bytes: int) -> bytes:
    """The whole body; ApiError 413 as soon as it is known to be larger."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > limit_bytes:
            raise _too_large(limit_bytes)
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "The client left while it sent the body.")
        part = message.get("body", b"")
        size += len(part)
        if size > limit_bytes:
            raise _too_large(limit_bytes)
        parts.append(part)
        if not message.get("more_body"):
            return bytes(part) if len(parts) == 1 else b"".join(parts)


def is_upstreams_to_judge(error: ApiError) -> bool:
    """The body was not what we can page; what it is, the upstream says best."""
    return error.status == 400 and error.code in _UNREADABLE


def _too_large(limit_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"The request body is larger than {limit_bytes} bytes (server.body_limit_bytes).",
        code="request_too_large",
    )


def validate(decoded: Mapping[str, Any]) -> None:
    """What we rely on ourselves. ApiError 400 for what we cannot page."""
    model = decoded.get("model")
    if not model:
        raise ApiError(400, "you must provide a model parameter", param="model",
                       code="missing_required_parameter")
    if not isinstance(model, str):
        raise ApiError(400, "Invalid type for 'model': expected a string.", param="model",
                       code="invalid_type")
    expected: tuple[tuple[str, type | tuple[type, ...], str], ...] = (
        ("stream", bool, "a boolean"),
        ("n", (int, float), "an integer"),  # 1.0 is a whole number too
        ("tools", list, "an array"),
        ("metadata", dict, "an object"),
        ("stream_options", dict, "an object"),
        ("response_format", dict, "an object"),
    )
    for name, kind, words in expected:
        value = decoded.get(name)
        if value is not None and not isinstance(value, kind):
            raise ApiError(
                400, f"Invalid type for '{name}': expected {words}.", param=name, code="invalid_type"
            )
