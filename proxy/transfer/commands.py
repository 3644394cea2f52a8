"""The commands' arguments, and what they have in common: whose it is, the store, a progress bar."""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxy.errors import ConfigError

if TYPE_CHECKING:
    from proxy.config import Config
    from proxy.conversation.tree import Identity, TenantKey
    from proxy.storage import Store

DONE, LEFT_OUT = 0, 3  # exit statuses
Advance = Callable[[int, int], None]  # done so far, of how many


def add_parsers(commands: Any) -> None:
    config = argparse.ArgumentParser(add_help=False)
    config.add_argument("--config", type=Path, metavar="FILE", help="instead of ./config.yaml, which may be absent")
    config.add_argument("--json", action="store_true", help="tell the result as JSON, and show no progress")
    whose = argparse.ArgumentParser(add_help=False)
    whose.add_argument("--header", action="append", default=[], metavar="'NAME: VALUE'",
                       help="a header that the client sends; @FILE: one a line. Not stored, but hashed")
    whose.add_argument("--user", metavar="NAME", help="what the client's requests have as `user`")

    export = commands.add_parser("export", parents=[config, whose], help="write conversations to a file")
    export.add_argument("conversation", nargs="?", help="its id (x-llm-pager-conversation); default: all")
    export.add_argument("--tenant", metavar="HEX", help="one tenant's, by the name that an export gives it")
    export.add_argument("--out", required=True, metavar="FILE", help="JSON Lines; .zst: compressed; -: standard output")
    import_ = commands.add_parser("import", parents=[config, whose],
                                  help="read an export of ours, of ChatGPT or of Claude, for a client to go on with")
    import_.add_argument("file", type=Path)
    import_.add_argument("--tenant", metavar="HEX", help="of a file with several tenants' conversations, this one's")
    import_.add_argument("--session-prefix", metavar="TEXT",
                         help="begins the names (x-llm-pager-session) by which new messages go on: its id, its title")
    import_.add_argument("--to", metavar="FILE", help="write what would be stored to a file, and store nothing")
    migrate = commands.add_parser("migrate", help="move a whole store; no server may run on either")
    migrate.add_argument("source", metavar="FROM", help="a directory (tiers.l2.path) or postgresql://...")
    migrate.add_argument("target", metavar="TO", help="an empty one of either, or one that this has begun to fill")
    migrate.add_argument("--json", action="store_true", help="tell the result as JSON, and show no progress")
    for option in ("--header", "--user"):
        migrate.add_argument(option, action="append", default=[], metavar="...",
                             help="of an older version's store: a client's, as for import")  # fmt: skip


def run(args: argparse.Namespace, environment: Any) -> int:
    """Raises ConfigError and StorageError."""
    if args.command == "migrate":
        from proxy.transfer import migrate

        return migrate.run(args)
    from proxy.config import load_config
    from proxy.transfer import exports, imports

    config = load_config(args.config, environment, {})
    work = exports.export if args.command == "export" else imports.import_file
    return with_store(config, lambda desk: work(args, config, desk))


class Desk:
    """A store for one command's thread."""

    def __init__(self, store: Store, identity: Identity, loop: asyncio.AbstractEventLoop) -> None:
        self.store, self.identity = store, identity
        self._loop = loop
        self.stopped = threading.Event()

    def commit(self, **what: Any) -> frozenset[bytes]:
        """As the store's. Raises StorageError."""
        if self.stopped.is_set():
            raise KeyboardInterrupt
        done = asyncio.run_coroutine_threadsafe(self.store.commit(**what), self._loop)
        return done.result()


def with_store(config: Config, work: Callable[[Desk], int]) -> int:
    """Run it, in a thread beside the store's event loop."""
    from proxy.conversation import keys
    from proxy.conversation.tree import Identity
    from proxy.storage import open_store

    async def main() -> int:
        store = open_store(config, keys.KINDS)
        try:
            store.look()
            desk = Desk(store, Identity(store.secret(), store.erased), asyncio.get_running_loop())
            try:
                return await asyncio.to_thread(work, desk)
            finally:
                desk.stopped.set()
        finally:
            await store.close()

    return asyncio.run(main())


def tenant_of(args: argparse.Namespace, config: Config, identity: Identity) -> TenantKey | None:
    """Whose requests have these headers and this user, by the rule of the chat path; None: nobody's were named."""
    from proxy.api.caller import caller, encoded, with_body

    if not args.header and args.user is None:
        return None
    sessions = config.sessions
    who = caller(headers_of(args.header), (), encoded(sessions.headers), encoded(sessions.delta_headers))
    who = with_body(who, {"user": args.user} if args.user is not None else {})
    return identity.tenant(who.credentials, who.person)


def headers_of(given: Sequence[str]) -> list[tuple[bytes, bytes]]:
    """Raises ConfigError."""
    lines: list[str] = []
    for header in given:
        try:
            lines += Path(header[1:]).read_text("utf-8").splitlines() if header.startswith("@") else [header]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--header {header}: the file cannot be read ({error}).") from error
    headers: list[tuple[bytes, bytes]] = []
    for line in filter(str.strip, lines):
        name, colon, value = line.partition(":")
        if not colon:
            raise ConfigError("--header has a name, a colon and a value, such as 'authorization: Bearer sk-...'.")
        headers.append((name.strip().lower().encode(), value.strip().encode()))
    return headers


@contextmanager
def progress(what: str, shown: bool) -> Iterator[Advance]:
    """A bar on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not (shown and sys.stderr.isatty()), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
