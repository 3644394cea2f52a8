"""The commands' arguments. Nothing else is imported before one is given."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proxy.whose import options

COMMANDS = ("export", "import", "migrate")


def add_parsers(commands: Any) -> None:
    config = argparse.ArgumentParser(add_help=False)
    config.add_argument("--config", type=Path, metavar="FILE", help="instead of ./config.yaml, which may be absent")
    config.add_argument("--json", action="store_true", help="tell the result as JSON, and show no progress")
    whose = options()

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


def run(args: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Raises ConfigError and StorageError."""
    if args.command == "migrate":
        from proxy.transfer import migrate

        return migrate.run(args)
    from proxy.config import load_config

    config = load_config(args.config, environment, {})
    if args.command == "export":
        from proxy.transfer import exports

        return exports.run(args, config)
    from proxy.transfer import imports

    return imports.run(args, config)
