"""`llm-pager export`: conversations as a file (conversation/exported.py is its layout)."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import zstandard

from proxy import keys
from proxy.config import Config
from proxy.conversation.exported import exported, header, owners
from proxy.conversation.records import conversation_key
from proxy.conversation.tree import NodeId
from proxy.errors import ConfigError
from proxy.storage.sqlite import DATABASE
from proxy.terminal import progress, tell_json
from proxy.transfer.desk import DONE, LEFT_OUT, Desk, with_store
from proxy.whose import Whose, conversation_asked, tenant_asked


def run(config: Config, whose: Whose, conversation: str, tenant: str, out: str, as_json: bool) -> int:
    """One conversation, or all; of `whose`, of the tenant that exports call so, or everybody's. Raises ConfigError and StorageError."""
    if config.tiers.l2.url is None and not (config.tiers.l2.path / DATABASE).exists():
        raise ConfigError(f"There is no storage in {config.tiers.l2.path}; nothing was written.")
    return with_store(config, lambda desk: _export(desk, _asked(desk, config, whose, conversation, tenant), out, as_json))


def _asked(desk: Desk, config: Config, whose: Whose, conversation: str, tenant: str) -> list[bytes]:
    named = tenant_named(tenant) if tenant else b""
    if conversation:
        owner = conversation_asked(conversation, whose, config, desk.identity, desk.store.scan)
        there = owner is not None and owner.startswith(named) and desk.store.get(conversation_key(owner)) is not None
        return [owner] if owner is not None and there else []
    whole: bytes = tenant_asked(whose, config, desk.identity) or named
    return list(owners(desk.store.scan, whole[: keys.TENANT_BYTES]))


def _export(desk: Desk, found: list[bytes], to: str, as_json: bool) -> int:
    if not found:
        raise ConfigError("There is no such conversation in the store; nothing was written.")
    messages, lost = 0, list[NodeId]()
    with whole_file(to) as out, progress("exported", not as_json) as advance:
        out.write(header(found, int(time.time())))
        for number, owner in enumerate(found):
            for line in exported(owner, desk.store.scan, desk.get, desk.identity, lost):
                out.write(line)
                messages += 1
            messages -= 1  # its heading
            advance(number + 1, len(found))
    told = {"conversations": len(found), "messages": messages, "lost": len(lost)}
    if as_json:
        tell_json(told, sys.stderr if to == "-" else sys.stdout)
    else:
        print(f"{len(found)} conversations with {messages} messages are in {to}.", file=sys.stderr)
    if lost:
        print(f"llm-pager: {len(lost)} answers cannot be read and are left out; llm-pager check --storage says why.",
              file=sys.stderr)  # fmt: skip
    return LEFT_OUT if lost else DONE


def tenant_named(name: str) -> bytes:
    """Raises ConfigError."""
    try:
        tenant = bytes.fromhex(name)
    except ValueError:
        tenant = b""
    if len(tenant) != keys.TENANT_BYTES:
        raise ConfigError(f"--tenant has {2 * keys.TENANT_BYTES} hexadecimal digits, as an export's `tenants` have.")
    return tenant


@contextmanager
def whole_file(name: str) -> Iterator[BinaryIO]:
    """A file that is there whole or not at all, for its owner only. Raises ConfigError."""
    if name == "-":
        yield sys.stdout.buffer
        return
    beside = Path(f"{name}.{os.getpid()}")
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            if name.endswith(".zst"):
                with zstandard.ZstdCompressor(level=9).stream_writer(file, closefd=False) as packed:
                    yield packed
            else:
                yield file
        os.replace(beside, name)
    except OSError as error:
        raise ConfigError(f"{name} cannot be written: {error.strerror}.") from error
    finally:
        beside.unlink(missing_ok=True)
