"""Browsers: whose pages may read our answers, and whose requests may spend the operator's key.

Promises: without `server.cors_origins` an answer's CORS headers are upstream's own, and an error of ours
is as readable as upstream's answers to the same origin were; a provider without an HTTP face of its own
lets pages of this machine read, as long as we listen for this machine only. Where the server has a
key of its own, a web page that is none of these is refused, and so is, on a loopback address, a
host name that could be an attacker's (DNS rebinding); programs, which send no Origin, pass.
Standard: Fetch, 3.2 (CORS protocol).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from proxy.api.passthrough import Message, Scope, Send
from proxy.errors import ApiError
from proxy.upstream import Header

if TYPE_CHECKING:
    from proxy.config import Config

_ALLOW_ORIGIN: Final = b"access-control-allow-origin"
_REPEATED: Final = (_ALLOW_ORIGIN, b"access-control-allow-credentials")
_CORS: Final = b"access-control-"
_EXPOSED: Final = (
    b"*, x-llm-pager-channel, x-llm-pager-window-tokens, x-llm-pager-epoch, x-llm-pager-conversation,"
    b" x-llm-pager-rounds, x-llm-pager-billed-prompt-tokens, x-llm-pager-warning, x-request-id"
)
_PRIVATE_NETWORK: Final = b"access-control-allow-private-network"
_PREFLIGHT_S: Final = b"600"
_SEEN_ORIGINS: Final = 256  # that upstream's word is remembered of
_SEEN_CHARS: Final = 256
# Names that nobody can own in the public DNS (RFC 6761, 6762; ICANN for .internal).
_PRIVATE: Final = (".localhost", ".local", ".internal")


class Origins:
    """One per process."""

    def __init__(self, config: Config) -> None:
        server, upstream = config.server, config.upstream
        self._cors = frozenset(origin.lower() for origin in server.cors_origins)
        self._hosts = frozenset(host.lower() for host in (*server.allowed_hosts, server.host))
        self._listed = bool(server.allowed_hosts)
        self._loopback = _is_loopback(server.host)
        self._has_key = upstream.api_key is not None
        self._finds_keys = upstream.provider == "litellm"  # in the environment
        self._asks_upstream = upstream.provider == "openai" and not self._cors
        self._seen: dict[bytes, list[Header]] = {}

    # -- who may spend our key

    def refusal(self, scope: Scope) -> ApiError | None:
        """Why a request is not served, if it is not."""
        if not self._has_key and not self._finds_keys:
            return None
        host = origin = site = b""
        for name, value in scope["headers"]:
            if name == b"host":
                host = value
            elif name == b"origin":
                origin = value
            elif name == b"sec-fetch-site":
                site = value
            elif name == b"authorization" and not self._has_key:
                return None  # litellm takes this key, and none of ours
        if not self._is_our_name(host):
            return ApiError(
                403,
                f"This server has a key of its own and does not go by the name {_shown(host)}; if it"
                " is yours, add it to server.allowed_hosts.",
                code="unknown_host",
            )
        # A browser's own word, that a page cannot forge: behind a reverse proxy it knows better than Host.
        if site in (b"same-origin", b"none"):
            return None
        if not (self._is_trusted(origin, host) if origin else site != b"cross-site"):
            return ApiError(
                403,
                f"A web page of {_shown(origin) if origin else 'another site'} cannot use this server's"
                " key; if it is yours, add its origin to server.cors_origins.",
                code="cross_site_request",
            )
        return None

    def _is_our_name(self, value: bytes) -> bool:
        if not value or not (self._loopback or self._listed):
            return True  # behind a load balancer any name may be ours
        name = _host_name(value.decode("latin-1"))
        return (
            "." not in name  # no name in the public DNS: a container's, a machine's
            or name in self._hosts
            or name.endswith(_PRIVATE)
            or _address(name) is not None
        )

    def _is_trusted(self, origin: bytes, host: bytes = b"") -> bool:
        """Whether pages of `origin` may use the server: listed, its own, of this machine, or none of
        the web's (a browser's extension, a desktop application)."""
        text = origin.decode("latin-1").lower()
        if text in self._cors or "*" in self._cors:
            return True
        try:
            parts = urlsplit(text)
            name = parts.hostname or ""
        except ValueError:
            return False
        if parts.scheme not in ("http", "https"):
            return bool(parts.scheme)  # "null" has none
        if host and parts.netloc == host.decode("latin-1").lower():
            return True
        return self._loopback and _is_loopback(name)

    # -- who may read our answers

    def preflight(self, scope: Scope, origin: bytes) -> list[Header] | None:
        """The head of the answer to a preflight, which is ours to give; None: upstream's, or no
        preflight at all."""
        if scope["method"] != "OPTIONS" or self._asks_upstream or not self._is_trusted(origin):
            return None
        asked = {name: value for name, value in scope["headers"] if name.startswith(_CORS)}
        method = asked.get(b"access-control-request-method")
        if method is None:
            return None
        return [
            *self._allowing(origin),
            (b"access-control-allow-methods", method),
            (b"access-control-allow-headers", asked.get(b"access-control-request-headers", b"*")),
            (b"access-control-max-age", _PREFLIGHT_S),
            *([(_PRIVATE_NETWORK, b"true")] if b"access-control-request-private-network" in asked else []),
        ]

    def readable(self, origin: bytes, send: Send) -> Send:
        """`send` for a request of a browser's page: heads say what its script may read."""

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = self._labelled(origin, message["status"], message.get("headers", ()))
                message = {**message, "headers": headers}
            await send(message)

        return labelled

    def _labelled(self, origin: bytes, status: int, headers: Sequence[Header]) -> list[Header]:
        if not self._asks_upstream:
            allowing = self._allowing(origin) if self._is_trusted(origin) else []
            return [*(h for h in headers if not h[0].startswith(_CORS)), *allowing]
        said = [header for header in headers if header[0] in _REPEATED]
        if said:
            if len(self._seen) < _SEEN_ORIGINS and len(origin) <= _SEEN_CHARS:
                self._seen[origin] = said
        elif status >= 400:  # as a rule an error of ours: upstream's own have them
            said = self._seen.get(origin, [])
            return [*headers, *said]
        return [*headers]

    def _allowing(self, origin: bytes) -> list[Header]:
        everybody = "*" in self._cors
        return [
            (_ALLOW_ORIGIN, b"*" if everybody else origin),
            (b"access-control-expose-headers", _EXPOSED),
            *([] if everybody else [(b"vary", b"Origin")]),
        ]


def _host_name(value: str) -> str:
    """The name in a Host header: without port, brackets and the root's dot."""
    name = value.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].rstrip(".")


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _is_loopback(name: str) -> bool:
    address = _address(name.strip("[]"))
    if address is not None:
        return address.is_loopback
    return name.lower() == "localhost" or name.lower().endswith(".localhost")


def _shown(value: bytes) -> str:
    return repr(value[:_SEEN_CHARS].decode("latin-1"))
