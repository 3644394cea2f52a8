"""`llm-pager forget`: an operator erases a conversation, a message, a user or a credential from the configured storage.

Promises: servers may run meanwhile, and forget within about a second; nothing is erased before somebody said yes. A user or
credential is named as its requests name it, by their headers and fields, since no credential is stored. Exit status 0: it is
gone; 1: there is nothing of that, the answer was no, or the storage refuses (what has begun is then finished by a server
or the next `forget`); 2: wrong arguments or configuration.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from proxy.errors import ConfigError, StorageError
from proxy.whose import caller_asked, options

if TYPE_CHECKING:  # heavy, and not needed for the parser
    from proxy.api.erasure import Erasures
    from proxy.config import Config
    from proxy.conversation.tree import Identity

COMMAND = "forget"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(COMMAND, help="erase a conversation, a message, a user or a credential for good")
    whose = options()
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    conversation = what.add_parser("conversation", parents=[whose], help="all of it, with its branches")
    message = what.add_parser("message", parents=[whose], help="one message, wherever its conversation says the same")
    for one in (conversation, message):
        one.add_argument("id", help="as the header x-llm-pager-conversation and the log have it")
    message.add_argument("page", help="as /vm/context and the model have it, such as msg_0042")
    user = what.add_parser("user", parents=[whose], help="all conversations of a user of a credential")
    key = what.add_parser("key", parents=[whose], help="all that is stored of a credential, and of all of its users")
    for one in (conversation, message, user, key):
        one.add_argument("--config", type=Path, metavar="FILE", help="instead of ./config.yaml, which may be absent")
        one.add_argument("--yes", action="store_true", help="do not ask")
        one.add_argument("--json", action="store_true", help="print the receipt as JSON")


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError."""
    from proxy.config import load_config

    config = load_config(args.config, os.environ, {})
    try:
        return asyncio.run(_forget(args, config))
    except StorageError as error:
        print(f"llm-pager: {error}", file=sys.stderr)
        return 1


async def _forget(args: argparse.Namespace, config: Config) -> int:
    from proxy.api.erasure import Erasures
    from proxy.conversation import keys
    from proxy.conversation.tree import Identity
    from proxy.storage import open_store

    store = open_store(config, keys)
    try:
        store.look()
        identity = Identity(store.secret(), store.erased)
        erasures, content = Erasures(store, store.objects_of), b""
        owner = _owner(args, config, identity, erasures)
        if args.what == "message" and owner is not None:
            content = erasures.content_of(owner, args.page) or b""
        if owner is None or not erasures.has(owner) or (args.what == "message" and not content):
            print(f"llm-pager: there is no such {args.what} in the storage.", file=sys.stderr)
            return 1
        if not args.yes and not _confirmed(args, sum(1 for _ in erasures.conversations(owner))):
            return 1
        done = await erasures.erase(args.what, "operator", [owner], content)
        told = done.told()
        if args.json:
            print(json.dumps(told, indent=2))
        else:
            counted = ", ".join(f"{count} x {kind}" for kind, count in told["values"].items())
            print(f"erased     {args.what}: {len(told['messages_sha256'])} messages")
            print(f"values     {counted or 'none'}\nreceipt    {told['id']} (GET /vm/erasures)")
        return 0
    finally:
        await store.close()


def _owner(args: argparse.Namespace, config: Config, identity: Identity, erasures: Erasures) -> bytes | None:
    """Whose the keys are of what is to go; None: nobody's. Raises ConfigError."""
    from proxy.api.memory import owner_named
    from proxy.conversation import keys
    from proxy.conversation.records import conversation_name

    who = caller_asked(args, config.sessions, config.server.keys, identity.secret)
    if who is None:
        if args.what in ("user", "key"):
            raise ConfigError("Say whose: --header 'authorization: Bearer ...', as the client sends it, or --key NAME.")
        named = (owner for owner, _ in erasures.conversations(b"") if conversation_name(owner) == args.id.lower())
        return next(named, None)
    if args.what == "key":
        return identity.scope(who.credentials)[: keys.SCOPE_BYTES]
    tenant = identity.tenant(who.credentials, who.person)
    if args.what == "user":
        return tenant[: keys.TENANT_BYTES]
    return owner_named(tenant, args.id)


def _confirmed(args: argparse.Namespace, conversations: int) -> bool:
    what = {"conversation": "this conversation", "message": "this message"}.get(args.what, f"{conversations} conversations")
    if not sys.stdin.isatty():
        raise ConfigError(f"Nobody can be asked whether {what} shall be erased; add --yes.")
    print(f"Erase {what} for good? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
