"""`llm-pager backup DIR`: a copy of the storage as it stands at one moment, while servers go on.

Promises: the copy is whole, or the one that stood there before is still there; it holds no row that was erased before
it; a server that is started on it says from when it is. The keys of an encrypted storage are not in it (docs/backups.md says why):
`--keys` copies them, and nothing else, to a directory of their own.
"""

from __future__ import annotations

from pathlib import Path

from proxy.config import Config
from proxy.errors import ConfigError, StorageError
from proxy.storage.sqlite import DATABASE, Failure, back_up
from proxy.terminal import progress, tell_json


def run(config: Config, directory: Path, keys_only: bool, as_json: bool) -> int:
    """Raises ConfigError and StorageError."""
    encryption, l2 = config.storage.encryption, config.tiers.l2
    keys = Path(encryption.key_store or l2.path / "keys").expanduser()
    if keys_only and not encryption.keys:
        raise ConfigError("storage.encryption.keys is empty: there are no keys to copy.")
    if "://" in (encryption.key_store or l2.url or "") if keys_only else l2.url is not None:
        raise ConfigError("What stands in PostgreSQL is copied by its own tools (pg_dump): docs/backups.md says how.")
    source = keys if keys_only else l2.path
    try:
        with progress("copying", not as_json):
            rows, size = back_up(source, directory)
    except (OSError, Failure) as error:
        raise StorageError(f"The backup was not made: {error}.") from error
    what, file = "keys" if keys_only else "data", directory / DATABASE
    if as_json:
        tell_json({"what": what, "rows": rows, "bytes": size, "file": str(file)})
        return 0
    print(f"{what}       {rows} rows, {size / 1e6:.1f} MB in {file}")
    if encryption.keys and not keys_only:
        print(f"keys       not in it, as they should not be: llm-pager backup --keys copies {keys}")
    if config.tiers.l3.url is not None or config.tiers.l4.url is not None:
        print("objects    not in it: back them up behind it, by their own store's means")
    return 0
