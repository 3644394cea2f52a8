"""Who asks: what a request presents that may tell callers apart, and the session that it names.

Promises: a header, a query parameter, a cookie or a field counts by what its name speaks of, because
nobody can list the names that gateways and front ends use; what changes with every request (trace
ids, dates, idempotency keys) does not count, because it would cut a conversation at every turn; all
that counts counts together, because upstream checks one credential, and one that it does not check
must not choose whose history is seen. A session's name is any text: it is hashed, never refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import msgspec

from proxy.config import SessionsConfig
from proxy.upstream import Header

DELTA_HEADER = b"x-llm-pager-session"  # its client sends only what is new

# What lets a caller in. `tokens` are the model's, not a caller's.
_CREDENTIAL = re.compile(r"key|token(?!s)|secret|credential|passw|passphrase|jwt|cert|^(?:code|sig)$")
_AUTH = re.compile(r"auth|oidc")  # by itself; beside a person it says who vouches for it
# Who it is, or whose account it spends.
_PERSON = re.compile(
    r"user|usr|account|acct|tenant|project|organi[sz]ation|org(?![a-z])|cookie|customer|consumer"
    r"|client[-_. ]?(?:id|name|principal|dn|s[-_]dn)|principal|identi|subject|subscri|e?mail|login"
    r"|member|owner|employee|person|compan|team|group|workspace|(?<![a-z])(?:uid|sub|sid|upn|dn)(?![a-z])|^from$"
)
# What belongs to one request, to its time, or to the program that sends it.
_PASSING = re.compile(
    r"(?:request|trace|span|correlation|transaction|idempot\w*|message|invocation|csrf|xsrf|nonce|websocket|cache)"
    r"[-_.]?(?:id|uuid|key|token)?$"
    r"|(?:^|[-_. ])(?:agent|date|time|timestamp|expires|version|length|count|signature|digest|hash)$|^sec-"
)
_SESSION_COOKIE = re.compile(r"sess|(?<![a-z])s?sid|sso|remember")
# Parts of a signed Authorization that are new with every request (SigV4, Digest, HMAC).
_SIGNED = re.compile(r"(?<=[,\s])(?:signature|nonce|cnonce|nc|response|timestamp|ts|mac)=[^,\s]*", re.IGNORECASE)

_NAME_CHARS = 200  # a longer name is no usual one: it counts, and is not looked into
_MOST_FIELDS = 256  # of a body, and of its metadata, that are looked at
_NAMES_CHARS = 1024  # of a body's fields, that are kept
_USERS, _METADATA = ("user", "safety_identifier"), "metadata."  # wherever they stand

Pair = tuple[str, str]


class Caller(NamedTuple):
    """`credentials` and `person` are texts to hash, and "" where there are none. `label` is the
    session's name; with `delta` its client sends only what is new."""

    credentials: str
    person: str
    label: str | None = None
    delta: bool = False


def _kind(name: str | bytes) -> str | None:
    """What a name speaks of: a credential, a person, or neither."""
    return "person" if len(name) > _NAME_CHARS else _kind_of(name)


@lru_cache(maxsize=4096)
def _kind_of(name: str | bytes) -> str | None:
    name = (name if isinstance(name, str) else name.decode("latin-1")).lower()
    if _PASSING.search(name):
        return None
    if _CREDENTIAL.search(name):
        return "credential"
    if _PERSON.search(name):
        return "person"
    return "credential" if _AUTH.search(name) else None


@lru_cache(maxsize=256)
def _personal(names: tuple[str, ...]) -> tuple[str, ...]:
    """Of a body's fields those that tell its user; most bodies have the same."""
    return tuple(name for name in dict.fromkeys(names) if _kind(name) == "person")


def caller(
    headers: Sequence[Header],
    query: Iterable[Pair] = (),
    session_headers: Collection[bytes] = (),
    delta_headers: Collection[bytes] = (),
) -> Caller:
    """Who sends a request with these headers and query parameters. Names of headers are in lower case."""
    found: list[tuple[str | None, str, str]] = []
    label: str | None = None
    delta = False
    for name, raw in headers:
        kind = _kind(name)
        if raw[:1] == b"{" and (members := _members(raw)):  # metadata of a gateway
            found.extend((_kind(n), f"{name!r} {n}", v) for n, v in members)
        elif name == b"cookie":
            found.extend(("person", f"cookie {n}", v) for n, v in _cookies(raw.decode("latin-1")))
        elif kind is not None:
            value = raw.decode("latin-1")
            value = _SIGNED.sub("", value) if "ignature=" in value else value
            found.append((kind, name.decode("latin-1"), value))
        if name == DELTA_HEADER or name in delta_headers:
            label, delta = label if delta else raw.decode("latin-1"), True
        elif label is None and name in session_headers:
            label = raw.decode("latin-1")
    found.extend((_kind(name), f"?{name}", value) for name, value in query)
    texts = [_text((name, value) for kind, name, value in found if kind == wanted)
             for wanted in ("credential", "person")]  # fmt: skip
    return Caller(texts[0], texts[1], label or None, delta and bool(label))


def with_body(caller: Caller, body: Mapping[str, Any]) -> Caller:
    """The same with what the request says of its user (`user`, `safety_identifier` ... and metadata) and
    its session. The names of top-level fields that speak of keys and tokens are the API's own."""
    metadata = body.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    names = (*islice(body, _MOST_FIELDS), *_USERS)
    personal = _personal if sum(map(len, names)) < _NAMES_CHARS else _personal.__wrapped__
    told = [(name, str(value)) for name in personal(names) if (value := body.get(name)) is not None]
    told += [
        (f"metadata.{name}", str(value))
        for name, value in islice(metadata.items(), _MOST_FIELDS)
        if _kind(name) is not None
    ]
    label, session = caller.label, metadata.get("session_id")
    if label is None and session is not None:
        label = str(session) or None
    return caller._replace(person=caller.person + _text(told), label=label)


def caller_of(headers: Sequence[Header], query: Sequence[Pair], sessions: SessionsConfig) -> Caller:
    """Who asks for something of ours, by the same rule as on the chat path: what a chat body would say of its user
    stands in ?user=, ?safety_identifier= and ?metadata.NAME=."""
    body: dict[str, Any] = {name: value for name, value in query if name in _USERS}
    body["metadata"] = {n.removeprefix(_METADATA): value for n, value in query if n.startswith(_METADATA)}
    rest = [(n, v) for n, v in query if n not in body and not n.startswith(_METADATA)]
    return with_body(caller(headers, rest, encoded(sessions.headers), encoded(sessions.delta_headers)), body)


def encoded(names: Iterable[str]) -> tuple[bytes, ...]:
    """Names of headers as they are on the wire."""
    return tuple(name.encode() for name in names)


def parameters(query: bytes) -> list[Pair]:
    """The parameters of a query string as it came."""
    return parse_qsl(query.decode("latin-1"), keep_blank_values=True) if query else []


def _text(pairs: Iterable[Pair]) -> str:
    """JSON, so that no value can pass for two."""
    told = sorted(pairs)
    return json.dumps(told) if told else ""


def _cookies(header: str) -> list[Pair]:
    """The cookies that name a caller; where none does by its name, all of them. A balancer's or a
    counter's cookie is a new one in every answer."""
    pairs = [(n.strip(), v) for n, _, v in (piece.partition("=") for piece in header.split(";"))]
    telling = [p for p in pairs if _kind(p[0]) or _SESSION_COOKIE.search(p[0].lower())]
    return telling or pairs


def _members(value: bytes) -> list[Pair]:
    try:
        members = msgspec.json.decode(value)
    except (ValueError, RecursionError):
        return []
    return [(str(name), str(member)) for name, member in members.items()]
