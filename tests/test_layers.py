"""The walls of the house, read from the imports of every module under proxy/ (DESIGN.md).

Imports point down: app -> api -> conversation -> memory. `memory` and `conversation` are pure: no
I/O, no clock, no random number, and of other people's libraries only those that hold or split data.
Each library has one importing package, so that replacing it touches one place.

A failure names the file, the line and the rule. To move a wall, change the tables below, and say why.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

BELOW_APP = {"api", "conversation", "media", "memory", "storage", "search", "upstream"}
BASE = {"config", "errors", "keys", "sse", "tokens"}

# Unit (a package or module directly under proxy/) -> the units that it may import, besides itself.
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": {"library"},  # `from proxy import SessionManager`, when it is asked for
    "__main__": {"cli"},
    "check": {"config", "conversation", "errors", "keys", "memory", "storage", "terminal"},  # knows what a sound record is
    "cli": {
        "api_key", "backup", "bench", "check", "config", "demo", "errors", "forget", "keyring", "readable", "serve", "show", "terminal", "top",
        "transfer", "whose",
    },
    "serve": {"config", "config_text", "errors", "readable", "storage", "terminal"},  # the app is named to uvicorn as a string
    "backup": {"config", "errors", "storage", "terminal"},
    "bench": {"demo", "errors", "terminal"},  # the demo's words
    "keyring": {"config", "errors", "keys", "storage", "terminal"},
    "forget": {"api", "config", "conversation", "errors", "keys", "storage", "terminal", "whose"},  # erases as the endpoints do
    "show": {"api", "config", "conversation", "errors", "keys", "readable", "storage", "terminal", "whose"},  # what /vm shows
    "top": {"api", "errors", "readable", "terminal"},
    "terminal": {"readable"},
    "readable": set(),
    "transfer": {"api", "config", "conversation", "errors", "keys", "media", "memory", "storage", "terminal", "whose"},  # `api`: who asks
    "model_limits": {"config", "conversation", "memory", "tokens"},  # a turn's bounds, for admission and the library
    "demo": {"app", "terminal", *BELOW_APP, *BASE},
    "app": {"ui", *BELOW_APP, *BASE, "demo", "process", "server"},  # its upstream is one to choose
    "process": set(),
    "server": {"config", "errors"},
    "decoder": {"media"},  # a process of its own: media are decoded in it
    "api": {*BELOW_APP, *BASE, "api_key", "model_limits"},
    "ui": {"api", "conversation", "memory", "readable", *BASE},  # the dashboard: pages over what the API reads
    "library": {"conversation", "model_limits", "memory", "search", *BASE},  # for callers without a server
    "conversation": {"errors", "keys", "media", "memory", "sse", "tokens"},
    "memory": {"media"},
    "media": set(),
    "storage": {"memory", *BASE},
    "search": {"memory", *BASE},
    "upstream": {"memory", *BASE},
    "tokens": {"media"},
    "config": {"errors", "config_text"},
    "config_text": {"errors"},
    "api_key": set(),
    "whose": {"api", "api_key", "config", "conversation", "errors", "keys"},  # `api`: who asks
    "errors": set(),
    "keys": set(),  # the key space of the store: what is stored is named and moved by it
    "sse": set(),  # read on both sides of the conversation: by it, and by upstreams
}

# `from proxy.memory import MemoryManager`, as the seeds have it, when it is asked for.
DOORS = {"proxy/memory/__init__.py": {"library"}}

# Third-party library -> the units that import it. A library that is not here is not used.
IMPORTERS: dict[str, set[str]] = {
    "PIL": {"media"},
    "aiohttp": {"upstream"},
    "asyncpg": {"storage"},  # the extra [postgres]
    "av": {"media"},
    "brotli": {"api"},  # compressed request bodies
    "cachetools": {"api", "conversation", "memory", "search", "storage"},  # bounded caches: data
    "cryptography": {"storage"},  # the extra [encryption]
    "diskcache": {"storage"},
    "fastapi": {"api", "ui"},  # our own endpoints
    "greenlet": {"storage"},  # the extra [postgres]
    "httpx": {"upstream"},  # litellm's client, for its timeouts and errors; ours is aiohttp
    "jinja2": {"ui"},
    "litellm": {"upstream"},
    # Splits and encodes JSON: data, not I/O, so wherever bytes are read.
    "msgspec": {"api", "conversation", "library", "memory", "search", "storage", "tokens", "upstream", "check", "transfer"},
    "obstore": {"storage"},  # the extra [objects]
    "opentelemetry": {"api"},  # the extra [telemetry]
    "numpy": {"search"},  # the extra [semantic]
    "prometheus_client": {"api"},
    "pypdf": {"media"},
    "pydantic": {"api", "config", "config_text", "library", "memory"},  # the doors and the seeds' models
    "pydantic_settings": {"config"},  # the sources of the settings
    "rich": {"demo", "show", "terminal", "top"},
    "starlette": {"api"},
    "stop_words": {"search"},
    "tiktoken": {"tokens"},
    "typer": {"cli"},
    "tokenizers": {"search"},  # the extra [semantic]
    "uvicorn": {"demo", "serve", "server"},  # the demo serves itself
    "xxhash": {"conversation", "storage"},  # quick hashes, checksums
    "yarl": {"upstream"},  # aiohttp's URLs
    "zstandard": {"api", "conversation", "search", "storage", "transfer"},  # bodies; what is stored; exports
    "yaml": {"config_text", "serve"},  # printing and reading the settings
}
# Of the standard library, the database.
STDLIB_IMPORTERS: dict[str, set[str]] = {"sqlite3": {"search", "storage"}}

PURE = {"conversation", "keys", "media", "memory", "sse"}
PURE_STDLIB = {
    "__future__", "abc", "array", "ast", "base64", "binascii", "bisect", "collections", "contextlib",
    "copy", "dataclasses", "datetime", "decimal", "difflib", "enum", "fnmatch", "fractions",
    "functools", "hashlib", "heapq", "hmac", "html", "inspect", "itertools", "json", "math",
    "numbers", "operator", "re", "statistics", "string", "struct", "textwrap",
    "threading",  # locks: turns run in several threads, and share nodes and caches
    "types", "typing", "unicodedata", "urllib.parse", "zlib",
}  # fmt: skip
PURE_STDLIB_MORE = {"media": {"io", "wave", "warnings"}}  # buffers over bytes that it was given
PURE_THIRD_PARTY = {
    "media": {"PIL", "av", "pypdf"},  # codecs: bytes in, bytes out
    "keys": set(),
    "sse": set(),
    "memory": {"cachetools", "msgspec", "pydantic"},
    "conversation": {"cachetools", "msgspec", "xxhash", "zstandard"},
}
# What reaches the world, the clock or chance without an import, or out of an allowed module.
IMPURE_NAMES = {"open", "input", "print", "exec", "eval", "__import__", "breakpoint"}
IMPURE_ATTRIBUTES = {"now", "utcnow", "today"}  # of datetime and date


class Import(NamedTuple):
    line: int
    name: str  # absolute and dotted, as far as it is certain to be a module or a name in one


def imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[Import]:
    """Every import of `module`: also in functions, under TYPE_CHECKING, and by import_module()."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                above = ".".join(parts[: len(parts) - node.level + 1])
                base = f"{above}.{base}" if base else above
            yield from (Import(node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            named = node.args[0] if node.args else None
            known = isinstance(named, ast.Constant) and isinstance(named.value, str)
            yield Import(node.lineno, named.value if known else "<an unknown module>")


def violations(source: str, path: str) -> list[str]:
    """The broken rules of the module at `path` ("proxy/memory/ids.py")."""
    parts = path.removesuffix(".py").split("/")
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    unit = parts[1]
    if unit not in MAY_IMPORT:
        return [f"{path}: proxy.{unit} is new; give it a row in MAY_IMPORT (tests/test_layers.py)"]
    tree = ast.parse(source, path)
    found: dict[str, None] = {}
    for line, name in imports(tree, module, is_package):
        broken = _broken(unit, name)
        door = any(f"{name}.".startswith(f"proxy.{ok}.") for ok in DOORS.get(path, ()))
        if broken is not None and not door:
            found[f"{path}:{line}: {broken}"] = None
    if unit in PURE:
        for line, what in _impure(tree):
            found[f"{path}:{line}: proxy.{unit} is pure, but {what}; let the shell hand it in"] = None
    return list(found)


def _broken(unit: str, name: str) -> str | None:
    top, _, rest = name.partition(".")
    if top == "proxy":
        target = rest.partition(".")[0]
        if target not in MAY_IMPORT:  # `from proxy import __version__`
            return None if unit not in PURE else f"proxy.{unit} imports {name}"
        if target == unit or target in MAY_IMPORT[unit]:
            return None
        allowed = ", ".join(sorted(MAY_IMPORT[unit])) or "nothing of ours outside itself"
        return f"proxy.{unit} imports proxy.{target}; it may import {allowed}"
    if top in sys.stdlib_module_names:
        allowed_here = PURE_STDLIB | PURE_STDLIB_MORE.get(unit, set())
        if unit in PURE and not any(f"{name}.".startswith(f"{ok}.") for ok in allowed_here):
            return f"proxy.{unit} is pure and imports {name}, which is not in PURE_STDLIB"
        importers = STDLIB_IMPORTERS.get(top)
    else:
        if unit in PURE and top not in PURE_THIRD_PARTY[unit]:
            allowed = ", ".join(sorted(PURE_THIRD_PARTY[unit]))
            return f"proxy.{unit} is pure and imports {top}; of libraries it may import {allowed}"
        importers = IMPORTERS.get(top, set())
    if importers is None or unit in importers:
        return None
    owners = " and ".join(f"proxy.{owner}" for owner in sorted(importers)) or "nobody"
    return f"proxy.{unit} imports {top}, which is imported by {owners} only"


def _impure(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in IMPURE_NAMES:
            yield node.lineno, f"calls {node.func.id}()"
        elif isinstance(node.func, ast.Attribute) and node.func.attr in IMPURE_ATTRIBUTES:
            yield node.lineno, f"reads the clock with .{node.func.attr}()"


MODULES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "proxy").rglob("*.py"))


def test_imports_point_down() -> None:
    broken = [told for path in MODULES for told in violations((ROOT / path).read_text("utf-8"), path)]
    assert not broken, "\n" + "\n".join(broken)


def test_dependencies_are_what_is_imported() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: lines for name, lines in project["optional-dependencies"].items() if name not in ("dev", "clients", "bench", "docs")}
    optional = {line.partition(">=")[0] for lines in extras.values() for line in lines}
    declared = {line.partition(">=")[0].lower() for line in project["dependencies"]} | optional
    names = {"pyyaml": "yaml", "pillow": "PIL", "prometheus-client": "prometheus_client",
             "opentelemetry-sdk": "opentelemetry", "opentelemetry-exporter-otlp-proto-http": "opentelemetry",
             "pydantic-settings": "pydantic_settings", "stop-words": "stop_words"}  # fmt: skip
    declared = {names.get(name, name) for name in declared}
    imported = set()
    for path in MODULES:
        parts = path.removesuffix(".py").split("/")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"), path)
        found = imports(tree, ".".join(parts), is_package=path.endswith("__init__.py"))
        imported |= {name.partition(".")[0] for _, name in found}
    third_party = imported - sys.stdlib_module_names - {"proxy"}
    by_name = {"uvloop", "httptools", "wordllama"}  # uvicorn imports them for us; its data is read
    brought = {"httpx", "starlette", "yarl"}  # by litellm, fastapi and aiohttp: their own types
    assert third_party - brought <= declared, "imported, but no dependency in pyproject.toml"
    assert declared <= third_party | by_name, "a dependency in pyproject.toml that nothing imports"


# ---------------------------------------------------------------- the checker itself


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("proxy/memory/a.py", "from proxy.storage import l2", "imports proxy.storage; it may"),
        ("proxy/memory/a.py", "from ..conversation import tree", "imports proxy.conversation"),
        ("proxy/memory/a.py", "from .. import errors", "imports proxy.errors"),
        ("proxy/memory/__init__.py", "from ..api import chat", "imports proxy.api"),
        ("proxy/memory/a.py", "import proxy", "imports proxy"),
        ("proxy/memory/a.py", "import time", "time, which is not in PURE_STDLIB"),
        ("proxy/memory/a.py", "def f():\n    import os.path", "a.py:2: proxy.memory is pure"),
        ("proxy/memory/a.py", "from random import choice", "random.choice, which is not"),
        ("proxy/memory/a.py", "import urllib.request", "urllib.request, which is not"),
        ("proxy/memory/a.py", "import asyncio", "asyncio, which is not"),
        ("proxy/memory/a.py", "import sqlite3", "sqlite3, which is not"),
        ("proxy/memory/a.py", "import httpx", "imports httpx; of libraries it may import cachetools"),
        ("proxy/memory/a.py", "import xxhash", "imports xxhash; of libraries"),
        ("proxy/memory/a.py", "open('x')", "is pure, but calls open()"),
        ("proxy/memory/a.py", "d = datetime.now()", "reads the clock with .now()"),
        ("proxy/conversation/a.py", "from proxy.upstream import x", "imports proxy.upstream"),
        ("proxy/conversation/a.py", "from proxy.config import x", "imports proxy.config"),
        ("proxy/conversation/a.py", "import pydantic", "imports pydantic; of libraries"),
        ("proxy/storage/a.py", "from proxy.conversation import tree", "imports proxy.conversation"),
        ("proxy/search/a.py", "import proxy.storage.l2", "imports proxy.storage"),
        ("proxy/upstream/a.py", "from proxy.api.chat import x", "imports proxy.api"),
        ("proxy/api/a.py", "from proxy.app import x", "imports proxy.app"),
        ("proxy/api/a.py", "import aiohttp", "imported by proxy.upstream only"),
        ("proxy/storage/a.py", "import requests", "imports requests, which is imported by nobody"),
        ("proxy/upstream/a.py", "import sqlite3", "imported by proxy.search and proxy.storage"),
        ("proxy/api/a.py", "importlib.import_module('litellm')", "imported by proxy.upstream only"),
        ("proxy/api/a.py", "import_module(name)", "imports <an unknown module>, which is imported"),
        ("proxy/app.py", "import litellm.utils", "imported by proxy.upstream only"),
        ("proxy/errors.py", "from proxy.config import x", "imports proxy.config"),
        ("proxy/new.py", "", "give it a row in MAY_IMPORT"),
    ],
)
def test_a_bad_module_is_told(path: str, source: str, expected: str) -> None:
    (told,) = violations(source, path)
    assert told.startswith(path) and expected in told


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("proxy/memory/a.py", "from .models import X\nfrom proxy.memory.models import Y"),
        ("proxy/memory/a.py", "import json, hashlib\nfrom collections.abc import Iterator"),
        ("proxy/memory/__init__.py", "from . import models\nfrom pydantic import BaseModel"),
        ("proxy/conversation/a.py", "from proxy.memory import x\nfrom ..tokens import TokenCounter"),
        ("proxy/upstream/a.py", "import aiohttp, asyncio, time\nfrom proxy.errors import ApiError"),
        ("proxy/api/sub/a.py", "from ...storage.l2 import DiskStore"),
        ("proxy/serve.py", "from proxy import __version__\nimport uvicorn"),
    ],
)
def test_a_good_module_is_left_alone(path: str, source: str) -> None:
    assert violations(source, path) == []
