"""The forward proxy that the environment names for a URL, as curl and httpx read it. Pure.

Promises: HTTPS_PROXY, HTTP_PROXY and ALL_PROXY, in lower case first; NO_PROXY with names, domains
with and without a dot or a star in front, ports, addresses, networks and `*`. There is no exception
for this machine: whoever has a local upstream behind a proxy's variables names it in NO_PROXY.
Credentials in the proxy's URL become a header and stand in no message.
"""

from __future__ import annotations

import base64
import ipaddress
import re
from collections.abc import Mapping
from typing import Final, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

_PORTS: Final = {"http": 80, "https": 443}


class Proxy(NamedTuple):
    url: str  # http://host:port or https://..., without credentials
    authorization: str | None  # of the proxy, ready for its header


def proxy_for(url: str, environ: Mapping[str, str]) -> Proxy | None:
    """None: straight there. ValueError, one sentence, for a proxy that cannot be used."""
    target = urlsplit(url)
    name, value = _named(target.scheme, environ)
    if not value or _is_excepted(target, _variable("no_proxy", environ)):
        return None
    parts = urlsplit(value if "://" in value else f"http://{value}")
    if parts.scheme not in _PORTS or not parts.hostname:
        raise ValueError(
            f"{name} names a proxy that is no http:// or https:// URL; provider openai cannot use"
            " it. Change it, or name the upstream's host in NO_PROXY."
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    where = f"{parts.scheme}://{host}:{parts.port or _PORTS[parts.scheme]}"
    if parts.username is None:
        return Proxy(where, None)
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
    return Proxy(where, "Basic " + base64.b64encode(pair).decode())


def _named(scheme: str, environ: Mapping[str, str]) -> tuple[str, str]:
    for name in (f"{scheme}_proxy", "all_proxy"):
        if value := _variable(name, environ):
            return name.upper(), value
    return "", ""


def _variable(name: str, environ: Mapping[str, str]) -> str:
    value = environ.get(name)
    return (environ.get(name.upper(), "") if value is None else value).strip()


def _is_excepted(target: SplitResult, no_proxy: str) -> bool:
    host = (target.hostname or "").rstrip(".").lower()
    port = target.port or _PORTS.get(target.scheme)
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    for entry in re.split(r"[,\s]+", no_proxy.lower()):
        name = entry.rpartition("://")[2].rstrip("/") if "://" in entry else entry
        if not name:
            continue
        if name == "*":
            return True
        if address is not None and _has(name, address):
            return True
        name, wanted = _split_port(name)
        if wanted is not None and wanted != port:
            continue
        if address is not None:
            if _has(name, address):
                return True
            continue
        name = name.removeprefix("*").strip(".")
        if name and (host == name or host.endswith("." + name)):
            return True
    return False


def _has(name: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an entry is this address, or a network that it is in."""
    try:
        return address in ipaddress.ip_network(name.strip("[]"), strict=False)
    except ValueError:
        return False


def _split_port(name: str) -> tuple[str, int | None]:
    found = re.fullmatch(r"(\[[^\]]*\]|[^:]*):(\d+)", name)
    return (found[1], int(found[2])) if found else (name, None)
