"""`llm-pager api-key`: a new key for this server, and the hash of it that the configuration has.

Promises: the key is printed once and kept nowhere.
"""

from __future__ import annotations

import argparse
import secrets
from hashlib import sha256
from typing import Any

COMMAND = "api-key"
_BYTES = 32


def add_parser(commands: Any) -> None:
    commands.add_parser(COMMAND, help="make a key for server.keys or server.admin_key, and its hash")


def run(args: argparse.Namespace) -> int:
    key = f"lp-{secrets.token_urlsafe(_BYTES)}"
    print(f"key   {key}\nhash  {key_hash(key)}")
    return 0


def key_hash(key: str) -> str:
    """As the configuration has it. (A key is long and random, so its hash needs no salt and no slow function.)"""
    return f"sha256:{sha256(key.encode()).hexdigest()}"
