"""Whose conversations a command means: named as the client's requests name them, since no credential is stored.

Promises: what names a caller here names the same one as on the chat path, also where this server has keys of its own. Nothing
else is imported before somebody is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from proxy.errors import ConfigError

if TYPE_CHECKING:
    from proxy.api.caller import Caller
    from proxy.config import Config
    from proxy.conversation.tree import Identity, TenantKey
    from proxy.keys import Scan


class Whose(NamedTuple):
    """The options --header, --field, --user and --key, as they were given."""

    headers: Sequence[str] = ()
    fields: Sequence[str] = ()
    user: str | None = None
    key: str | None = None


def caller_asked(whose: Whose, config: Config, secret: bytes) -> Caller | None:
    """Whom the options name; None: nobody. `secret`: of the store. Raises ConfigError."""
    fields = [(name, value) for name, _, value in (field.partition("=") for field in whose.fields)]
    fields += [("user", whose.user)] if whose.user is not None else []
    if not (whose.headers or fields or whose.key is not None):
        return None
    from proxy.api.caller import caller_of
    from proxy.api_key import key_name, named_header, with_name

    headers, server_keys = headers_of(whose.headers), config.server.keys
    if whose.key is not None:
        if whose.key not in server_keys:
            raise ConfigError(f"--key {whose.key} is none of the names in server.keys.")
        headers.append(named_header(whose.key, secret))
    elif (name := next(filter(None, (key_name(header, server_keys) for header in headers)), None)) is not None:
        headers = with_name(headers, name, secret)
    return caller_of(headers, fields, config.sessions)


def tenant_asked(whose: Whose, config: Config, identity: Identity) -> TenantKey | None:
    """None: the options name nobody. Raises ConfigError."""
    who = caller_asked(whose, config, identity.secret)
    return None if who is None else identity.tenant(who.credentials, who.person)


def conversation_asked(name: str, whose: Whose, config: Config, identity: Identity, scan: Scan[tuple[bytes, bytes]]) -> bytes | None:
    """The owner of a conversation: of that tenant's, or of anybody's. It is named as in the header x-llm-pager-conversation, or
    whole, as an operator's /vm has it. None: there is none; a tenant's may not be there. Raises ConfigError."""
    from proxy.api.memory import owner_named
    from proxy.conversation.exported import owners
    from proxy.conversation.records import conversation_name

    if (tenant := tenant_asked(whose, config, identity)) is not None:
        return owner_named(tenant, name)
    name = name.lower()
    found = [owner for owner in owners(scan) if name in (conversation_name(owner), owner.hex())]
    if len(found) > 1:
        raise ConfigError(f"Several tenants have a conversation {name}: say whose (--header), or name it whole, as sessions --json does.")
    return found[0] if found else None


def headers_of(given: Sequence[str]) -> list[tuple[bytes, bytes]]:
    """Raises ConfigError."""
    headers: list[tuple[bytes, bytes]] = []
    for line in lines_of("--header", given):
        name, colon, value = line.partition(":")
        if not colon:
            raise ConfigError("--header has a name, a colon and a value, such as 'authorization: Bearer sk-...'.")
        headers.append((name.strip().lower().encode(), value.strip().encode()))
    return headers


def lines_of(option: str, given: Sequence[str]) -> list[str]:
    """What was given, or stands in the file that was: command lines can be read by others. Raises ConfigError."""
    lines: list[str] = []
    for text in given:
        try:
            lines += Path(text[1:]).read_text("utf-8").splitlines() if text.startswith("@") else [text]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{option} {text}: the file cannot be read ({error}).") from error
    return list(filter(str.strip, lines))
