"""The way of a request: its URL upstream, the forward proxy, and the headers that end at a hop. Pure.

Promises: a path never becomes part of the host's name; the client's bytes stay as they came, but for
what base_url and the path both name, which is there once. Proxies are as curl and httpx read them:
HTTPS_PROXY, HTTP_PROXY and ALL_PROXY, in lower case first; NO_PROXY with names, domains with and
without a dot or a star in front, ports, addresses, networks and `*`. There is no exception for this
machine: whoever has a local upstream behind a proxy's variables names it in NO_PROXY. Credentials in
the proxy's URL become a header and stand in no message.

By hand, because urllib's and aiohttp's NO_PROXY know no networks and no stars, and aiohttp's
`trust_env` would also send what is in ~/.netrc.
"""

from __future__ import annotations

import base64
import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

from proxy.upstream import CHAT_PATH, Header, RootPath

# ---------------------------------------------------------------- headers

# Of one connection and not of the message: RFC 9110, 7.6.1, and its forerunners.
HOP_BY_HOP: Final = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding upgrade".split()
)


def end_to_end(headers: Sequence[Header], drops: frozenset[bytes] = HOP_BY_HOP) -> list[Header]:
    """Without `drops` and what the connection header names. `headers`: names in lower case."""
    for name, value in headers:
        if name == b"connection" and value.lower() not in (b"keep-alive", b"close"):
            drops = drops | {named.strip().lower() for named in value.split(b",")}
    return [header for header in headers if header[0] not in drops]


# ---------------------------------------------------------------- URLs

# What makes a URL the API's on a server: a last segment such as /v1, or Azure's deployment.
_VERSION: Final = re.compile(r"/v[0-9]+(?:(?:alpha|beta)[0-9]*)?$")
_DEPLOYMENT: Final = re.compile(r"/openai/deployments/[^/]+$")


def server_root(base_url: str) -> str:
    """http://h:8080/v1 -> http://h:8080; a URL without a version is its own root."""
    return _DEPLOYMENT.sub("", _VERSION.sub("", base_url))


def chat_url(base_url: str, path: str) -> str:
    """Where a chat request goes."""
    if isinstance(path, RootPath):
        return _below(server_root(base_url), path)
    return base_url + path if path == CHAT_PATH else _below(base_url, path)


def forward_url(base_url: str, path: str) -> str:
    """Where any other request goes."""
    if isinstance(path, RootPath):
        return _below(server_root(base_url), path)
    return base_url + (path if path.startswith("/") or not path else "/" + path)


def _below(base: str, path: str) -> str:
    """`path` below `base`: the /openai of .../openai and of /openai/deployments/x is one."""
    above = [segment for segment in urlsplit(base).path.split("/") if segment]
    segments = path.split("/")[1:]
    for length in range(min(len(above), len(segments)), 0, -1):
        if above[-length:] == segments[:length]:
            return "/".join((base, *segments[length:]))
    return base + path


# ---------------------------------------------------------------- forward proxies

_PORTS: Final = {"http": 80, "https": 443}
_HOST_PORT: Final = re.compile(r"(\[[^\]]*\]|[^:]*):(\d+)")


class Proxy(NamedTuple):
    url: str  # http://host:port or https://..., without credentials
    authorization: str | None  # of the proxy, ready for its header


def proxy_for(url: str, environ: Mapping[str, str]) -> Proxy | None:
    """None: straight there. ValueError, one sentence, for a proxy that cannot be used."""
    target = urlsplit(url)
    names = (f"{target.scheme}_proxy", "all_proxy")
    name = next((name for name in names if _variable(name, environ)), None)
    if name is None or _is_excepted(target, _variable("no_proxy", environ)):
        return None
    value = _variable(name, environ)
    parts = urlsplit(value if "://" in value else f"http://{value}")
    if parts.scheme not in _PORTS or not parts.hostname:
        raise ValueError(
            f"{name.upper()} names a proxy that is no http:// or https:// URL; provider openai cannot use"
            " it. Change it, or name the upstream's host in NO_PROXY."
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    where = f"{parts.scheme}://{host}:{parts.port or _PORTS[parts.scheme]}"
    if parts.username is None:
        return Proxy(where, None)
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
    return Proxy(where, "Basic " + base64.b64encode(pair).decode())


def _variable(name: str, environ: Mapping[str, str]) -> str:
    return environ.get(name, environ.get(name.upper(), "")).strip()


def _is_excepted(target: SplitResult, no_proxy: str) -> bool:
    host = (target.hostname or "").rstrip(".").lower()
    port = target.port or _PORTS.get(target.scheme)
    for entry in filter(None, re.split(r"[,\s]+", no_proxy.lower())):
        name = entry.rpartition("://")[2].rstrip("/") if "://" in entry else entry
        if name == "*" or _has(name, host):
            return True
        if found := _HOST_PORT.fullmatch(name):
            if int(found[2]) != port:
                continue
            name = found[1]
        if _has(name, host):
            return True
        name = name.removeprefix("*").strip(".")
        if name and (host == name or host.endswith("." + name)) and not _has(host, host):
            return True
    return False


def _has(name: str, host: str) -> bool:
    """Whether an entry is this address, or a network that it is in."""
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(name.strip("[]"), strict=False)
    except ValueError:
        return False
