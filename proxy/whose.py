"""The options by which a command names whose conversations it means: as the client's requests do, since no credential is
stored.

Promises: what names a caller here names the same one as on the chat path, also where this server has keys of its own. Nothing
else is imported before somebody is named.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from proxy.errors import ConfigError

if TYPE_CHECKING:
    from proxy.api.caller import Caller
    from proxy.config import SessionsConfig


def options() -> argparse.ArgumentParser:
    """For `parents`."""
    whose = argparse.ArgumentParser(add_help=False)
    whose.add_argument("--header", action="append", default=[], metavar="'NAME: VALUE'",
                       help="a header that the client sends ('': it sends no key); @FILE: one a line. It is not stored")
    whose.add_argument("--field", action="append", default=[], metavar="NAME=VALUE",
                       help="likewise a query parameter, or of the body user, safety_identifier, metadata.NAME")
    whose.add_argument("--user", metavar="NAME", help="the same as --field user=...")
    whose.add_argument("--key", metavar="NAME", help="in place of a header with it: a key of server.keys, by its name")
    return whose


def caller_asked(
    args: argparse.Namespace, sessions: SessionsConfig, server_keys: Mapping[str, str], secret: bytes
) -> Caller | None:
    """Whom the `options` name; None: nobody. `secret`: of the store. Raises ConfigError."""
    fields = [(name, value) for name, _, value in (field.partition("=") for field in args.field)]
    fields += [("user", args.user)] if args.user is not None else []
    if not (args.header or fields or args.key is not None):
        return None
    from proxy.api.caller import caller_of
    from proxy.api_key import key_name, named_header, with_name

    headers = headers_of(args.header)
    if args.key is not None:
        if args.key not in server_keys:
            raise ConfigError(f"--key {args.key} is none of the names in server.keys.")
        headers.append(named_header(args.key, secret))
    elif (name := next(filter(None, (key_name(header, server_keys) for header in headers)), None)) is not None:
        headers = with_name(headers, name, secret)
    return caller_of(headers, fields, sessions)


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
