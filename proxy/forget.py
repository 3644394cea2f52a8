"""`llm-pager forget`: an operator erases a conversation, a message, a user or a credential from the configured storage.

Promises: servers may run meanwhile, and forget within about a second; nothing is erased before somebody said yes. A user or
credential is named as its requests name it, by their headers and fields, since no credential is stored. Exit status 0: it is
gone; 1: there is nothing of that, the answer was no, or the storage refuses (what has begun is then finished by a server
or the next `forget`); 2: wrong arguments or configuration.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Literal, NamedTuple

from proxy import keys
from proxy.api.erasure import Erasures
from proxy.config import Config
from proxy.conversation.tree import Identity
from proxy.errors import ConfigError
from proxy.keys import Scan
from proxy.storage import opened_store
from proxy.terminal import progress, tell_json
from proxy.whose import Whose, caller_asked, conversation_asked

Kind = Literal["conversation", "message", "user", "key"]


class What(NamedTuple):
    """A conversation and a message have a conversation's name, a message its page, too."""

    kind: Kind
    name: str = ""
    page: str = ""


def run(what: What, whose: Whose, config: Config, yes: bool, as_json: bool) -> int:
    """Raises ConfigError and StorageError."""
    return asyncio.run(_forget(what, whose, config, yes, as_json))


async def _forget(what: What, whose: Whose, config: Config, yes: bool, as_json: bool) -> int:
    async with opened_store(config) as store:
        identity = Identity(store.secret(), store.erased)
        erasures, content = Erasures(store, store.objects_of), b""
        owner = _owner(what, whose, config, identity, store.scan)
        if what.kind == "message" and owner is not None:
            content = erasures.content_of(owner, what.page) or b""
        if owner is None or not erasures.has(owner) or (what.kind == "message" and not content):
            print(f"llm-pager: there is no such {what.kind} in the storage.", file=sys.stderr)
            return 1
        if not yes and not _confirmed(what, sum(1 for _ in erasures.conversations(owner))):
            return 1
        with progress("values", not as_json) as advance:
            erasures = Erasures(store, store.objects_of, lambda count: advance(count, None))
            told = (await erasures.erase(what.kind, "operator", [owner], content)).told()
        if as_json:
            tell_json(told)
        else:
            counted = ", ".join(f"{count} x {kind}" for kind, count in told["values"].items())
            print(f"erased     {what.kind}: {len(told['messages_sha256'])} messages")
            print(f"values     {counted or 'none'}\nreceipt    {told['id']} (GET /vm/erasures)")
        return 0


def _owner(what: What, whose: Whose, config: Config, identity: Identity, scan: Scan[tuple[bytes, bytes]]) -> bytes | None:
    """Whose the keys are of what is to go; None: nobody's. Raises ConfigError."""
    if what.name:
        return conversation_asked(what.name, whose, config, identity, scan)
    who = caller_asked(whose, config, identity.secret)
    if who is None:
        raise ConfigError("Say whose: --header 'authorization: Bearer ...', as the client sends it, or --key NAME.")
    if what.kind == "key":
        return identity.scope(who.credentials)[: keys.SCOPE_BYTES]
    return identity.tenant(who.credentials, who.person)[: keys.TENANT_BYTES]


def _confirmed(asked: What, conversations: int) -> bool:
    what = f"this {asked.kind}" if asked.name else f"{conversations} conversations"
    if not sys.stdin.isatty():
        raise ConfigError(f"Nobody can be asked whether {what} shall be erased; add --yes.")
    print(f"Erase {what} for good? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
