"""Headers between a client and a provider that is called through litellm. Pure.

Promises: of the client's headers the provider gets those about tracing, repetition and its own
betas, and custom ones (`x-*`), never a credential of anybody's; the client gets the provider's, with
request id and rate limits also under the names that OpenAI's clients read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from proxy.upstream import Header
from proxy.upstream.routing import end_to_end

_PASSED: Final = frozenset((b"traceparent", b"tracestate", b"idempotency-key", b"anthropic-beta"))
_KEPT_BACK: Final = (  # beginnings: credentials, and what hops say of each other
    b"x-api-key",
    b"x-goog-",
    b"x-amz-",
    b"x-ms-",
    b"x-forwarded-",
    b"x-real-ip",
    b"x-llm-pager",
)
_NOT_RELAYED: Final = frozenset(
    (
        # of the body that litellm read, and of its connection
        b"content-encoding", b"content-length", b"content-type", b"date", b"server", b"set-cookie",
        # an exception of litellm's may hold the request's headers: no credential ever comes back
        b"authorization", b"api-key", b"cookie", b"host", b"user-agent", b"x-amz-security-token",
        b"x-api-key", b"x-goog-api-key",
    )
)  # fmt: skip
_PREFIX: Final = "llm_provider-"  # litellm's, before the provider's own names
_LIMITS: Final = re.compile(rb"anthropic-ratelimit-(requests|tokens)-(limit|remaining|reset)")


def request_headers(headers: Sequence[Header]) -> dict[str, str]:
    """What goes to the provider beside litellm's own headers. `headers`: names in lower case."""
    return {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in end_to_end(headers)
        if name in _PASSED or (name.startswith(b"x-") and not name.startswith(_KEPT_BACK))
    }


def reply_headers(result: Any, told: Mapping[str, str] | None = None) -> list[Header]:
    """What the provider's answer said, from litellm's answer or stream. `told`: the headers as they
    came, where litellm keeps none."""
    if told:
        return [*relayed(told)]
    hidden: Any = getattr(result, "_hidden_params", None)
    found = hidden.get("additional_headers") if hasattr(hidden, "get") else None
    if not isinstance(found, Mapping):
        return []
    raw = {str(name).removeprefix(_PREFIX): value for name, value in found.items()}
    return [*relayed(raw)]


def relayed(headers: Mapping[str, Any]) -> Iterator[Header]:
    """A provider's headers as the client gets them; the first of each name."""
    raw = [
        (name.lower().encode("latin-1", "replace"), str(value).encode("latin-1", "replace"))
        for name, value in headers.items()
        if value is not None
    ]
    out: dict[bytes, bytes] = {}
    for name, value in end_to_end(raw):
        if name in _NOT_RELAYED or name.startswith(b"x-litellm-"):
            continue
        out.setdefault(name, value)
        limit = _LIMITS.fullmatch(name)
        if limit is not None:
            out.setdefault(b"x-ratelimit-%b-%b" % (limit[2], limit[1]), value)
        elif name == b"request-id":
            out.setdefault(b"x-request-id", value)
    yield from out.items()
