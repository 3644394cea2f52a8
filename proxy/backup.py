"""`llm-pager backup DIR`: a copy of the storage as it stands at one moment, while servers go on.

Promises: the copy is whole, or the one that stood there before is still there; it holds no row that was erased before
it; a server that is started on it says from when it is. The keys of an encrypted storage are not in it (docs/backups.md says why):
`--keys` copies them, and nothing else, to a directory of their own.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from proxy.errors import ConfigError, StorageError


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    backup = commands.add_parser("backup", help="copy the storage to a directory, while servers run")
    backup.add_argument("directory", type=Path, metavar="DIR", help="where to; an older copy there is replaced")
    backup.add_argument("--keys", action="store_true", help="the key store of an encrypted storage instead")
    backup.add_argument("--config", type=Path, metavar="FILE", help="instead of ./config.yaml, which may be absent")


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError and StorageError."""
    from proxy.config import load_config
    from proxy.storage.sqlite import DATABASE, Failure, back_up

    config = load_config(args.config, os.environ, {})
    encryption, l2 = config.storage.encryption, config.tiers.l2
    keys = Path(encryption.key_store or l2.path / "keys").expanduser()
    if args.keys and not encryption.keys:
        raise ConfigError("storage.encryption.keys is empty: there are no keys to copy.")
    if "://" in (encryption.key_store or l2.url or "") if args.keys else l2.url is not None:
        raise ConfigError("What stands in PostgreSQL is copied by its own tools (pg_dump): docs/backups.md says how.")
    source = keys if args.keys else l2.path
    try:
        rows, size = back_up(source, args.directory)
    except (OSError, Failure) as error:
        raise StorageError(f"The backup was not made: {error}.") from error
    print(f"{'keys' if args.keys else 'data'}       {rows} rows, {size / 1e6:.1f} MB in {args.directory / DATABASE}")
    if encryption.keys and not args.keys:
        print(f"keys       not in it, as they should not be: llm-pager backup --keys copies {keys}")
    if config.tiers.l3.url is not None or config.tiers.l4.url is not None:
        print("objects    not in it: back them up behind it, by their own store's means")
    return 0
