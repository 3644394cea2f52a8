"""Where a path is upstream: below base_url, or below the server root that base_url belongs to. Pure.

Promises: a path never becomes part of the host's name; the client's bytes stay as they came, but for
what base_url and the path both name, which is there once.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import urlsplit

from proxy.upstream import CHAT_PATH, RootPath

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
