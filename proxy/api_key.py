"""This server's own keys: a new one (`llm-pager api-key`), the hash that the configuration has of it, and whom one names.

Promises: a key is printed once and kept nowhere. Its caller is known by the key's name, so a new key of that name goes on
where the old one was; no client can write what stands for a name, also where the server has no keys any more.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping, Sequence
from hashlib import blake2b, sha256

KEY_HEADERS = (b"authorization", b"api-key", b"x-api-key")  # OpenAI's, Azure's, Anthropic's
_BYTES = 32
_Header = tuple[bytes, bytes]


def new_key() -> str:
    return f"lp-{secrets.token_urlsafe(_BYTES)}"


def key_hash(key: str) -> str:
    """As the configuration has it. (A key is long and random, so its hash needs no salt and no slow function.)"""
    return f"sha256:{sha256(key.encode()).hexdigest()}"


def bearer(value: bytes) -> str:
    """The key in a header's value."""
    text = value.decode("latin-1").strip()
    return text[7:].strip() if text[:7].lower() == "bearer " else text


def key_name(header: _Header, keys: Mapping[str, str]) -> str | None:
    """The name of the key in a header, of these (names and hashes); in constant time."""
    if header[0] not in KEY_HEADERS:
        return None
    hashed, found = key_hash(bearer(header[1])), None
    for name, known in keys.items():
        if hmac.compare_digest(hashed, known):
            found = name
    return found


def with_name(headers: Sequence[_Header], name: str, secret: bytes) -> list[_Header]:
    """The headers of a request with the name of its key in place of the key."""
    return [*(header for header in headers if header[0] not in KEY_HEADERS), named_header(name, secret)]


def named_header(name: str, secret: bytes) -> _Header:
    """What stands for the key of that name; `secret`: of the store."""
    proof = blake2b(name.encode(), digest_size=16, key=secret).hexdigest()
    return b"authorization", f"Bearer llm-pager:{name}:{proof}".encode()
