"""The parts of docs/ that are made from the program: settings, commands, endpoints, metrics, errors.

    python -m tests.reference        writes them anew, between their marks; tests/test_readme.py compares

Promises: the same program gives the same text, whatever the terminal and the environment.
"""

from __future__ import annotations

import ast
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import yaml
from starlette.testclient import TestClient
from typer.main import get_command

from proxy.app import create_app
from proxy.config import Config, ModelOverride, load_config
from proxy.config_text import Place, _section_of

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
_MARKED = re.compile(r"(<!-- made by tests/reference.py: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_KEY = re.compile(r"( *)([a-z0-9_]+):(?: +(?:\[.*?\]|\{.*?\}|[^#]*?))?(?: +# (.*))?$")
_ERRORS = ("ApiError", "StartError", "StorageError", "ConfigError")
_NOT_SERVED = ("demo", "library.py")  # errors that no request to a server meets


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


# ---------------------------------------------------------------- settings


def meanings(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """What config.yaml says of each key behind it, in one line each; what it says of each model's settings."""
    said: dict[str, str] = {}
    of_models: dict[str, str] = {}
    path: list[str] = []
    above: list[str] = []
    for line in text.splitlines():
        if (found := _KEY.match(line)) and not line.startswith("#"):
            depth = len(found[1]) // 2
            path = [*path[:depth], found[2]]
            key = ".".join(path)
            said[key] = " ".join([*([] if depth else above), *([found[3]] if found[3] else [])])
            above = []
        elif line.startswith("#"):
            above.append(line.lstrip("# "))
            for name, words in re.findall(r"(\w+): ([^:]+?)(?=\s{3,}\w+:|$)", line[1:].strip()):
                if name in ModelOverride.model_fields:
                    of_models[name] = words.strip()
                    last = name
                    break
            else:
                if of_models and line.startswith("#     "):
                    of_models[last] += " " + line.lstrip("# ")
            for name, words in re.findall(r"\s{3,}(\w+): (.+)$", line[1:].strip()):
                of_models[name] = words.strip()
                last = name
        elif line.strip().startswith("#") and path:
            said[".".join(path)] += " " + line.strip().lstrip("# ")
        elif not line.strip():
            above = []
    return said, of_models


def settings() -> str:
    """A table of each section: key, default, what is allowed, meaning."""
    text = (ROOT / "config.yaml").read_text(encoding="utf-8")
    said, of_models = meanings(text)
    out: list[str] = []
    plain = Config().model_dump(mode="json")

    def table(section: type, values: dict[str, object], path: str) -> Iterator[str]:
        for name, field in section.model_fields.items():  # type: ignore[attr-defined]
            key = f"{path}.{name}"
            inner = _section_of(field.annotation)
            if inner is not None:
                if said.get(key):
                    yield f"| `{key}` | | | {_cell(said[key])} |"
                yield from table(inner, values[name], key)  # type: ignore[arg-type]
            else:
                default = yaml.safe_dump(values[name], default_flow_style=True, width=1000).replace("\n...", "").strip()
                yield f"| `{key}` | `{default}` | {_cell(Place(key, field, None).allowed())} | {_cell(said[key])} |"

    for name, field in Config.model_fields.items():
        out += [f"### {name}", ""]
        inner = _section_of(field.annotation)
        if inner is None:
            out += ["Per model name or glob (the exact name wins, then the longest glob); what is not given is learned from refusals:", ""]
            out += ['```yaml', 'models:', '  "gpt-4o*": {window_tokens: 64000, tools: true, developer_role: developer}', "```", ""]
            out += ["| key | allowed | meaning |", "|---|---|---|"]
            for key, option in ModelOverride.model_fields.items():
                out.append(f"| `{key}` | {_cell(Place(key, option, None).allowed())} | {_cell(of_models[key])} |")
        else:
            if said[name]:
                out += [said[name][0].upper() + said[name][1:].rstrip(".") + ".", ""]
            out += ["| key | default | allowed | meaning |", "|---|---|---|---|", *table(inner, plain[name], name)]
        out.append("")
    return "\n".join(out)


# ---------------------------------------------------------------- commands


def commands() -> str:
    """What `llm-pager COMMAND --help` says, of every command."""
    from proxy.cli import main

    pages: list[str] = []
    for words in command_names():
        with patch.dict(os.environ, {"COLUMNS": "80", "NO_COLOR": "1"}), redirect_stdout(io.StringIO()) as out:
            main([*words, "--help"])
        pages.append(f"### {' '.join(['llm-pager', *words])}\n\n```text\n{out.getvalue().rstrip()}\n```\n")
    return "\n".join(pages)


def command_names() -> list[Sequence[str]]:
    """The words of each command; those of the program are none."""
    from proxy.cli import app

    def under(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        yield words
        for name, inner in getattr(command, "commands", {}).items():
            yield from under(inner, (*words, name))

    return list(under(get_command(app), ()))


# ---------------------------------------------------------------- endpoints, metrics


@cache
def _asked() -> tuple[httpx.Response, httpx.Response]:
    """What the application says of itself, with a storage of its own; the upstream is never asked."""
    with tempfile.TemporaryDirectory() as data:
        config = load_config(ROOT / "config.yaml", {}, {"tiers.l2.path": data})
        with TestClient(create_app(config), base_url="http://localhost", client=("127.0.0.1", 1)) as client:
            return client.get("/metrics"), client.get("/vm/openapi.json")


def metrics() -> str:
    """Each metric of GET /metrics, by what it says of itself."""
    answer, _ = _asked()
    kinds = dict(re.findall(r"^# TYPE (llm_pager_\w+) (\w+)$", answer.text, re.MULTILINE))
    said = re.findall(r"^# HELP (llm_pager_\w+) (.+)$", answer.text, re.MULTILINE)
    return "\n".join(["| metric | type | what |", "|---|---|---|", *(f"| `{n}` | {kinds[n]} | {_cell(w)} |" for n, w in sorted(said)), ""])


def endpoints() -> str:
    """Each endpoint that /vm/openapi.json describes."""
    _, answer = _asked()
    lines = [
        f"| `{verb.upper()} {path}` | {_cell(told.get('summary', ''))} |"
        for path, verbs in sorted(answer.json()["paths"].items())
        for verb, told in verbs.items()
    ]
    return "\n".join(["| endpoint | what |", "|---|---|", *lines, ""])


# ---------------------------------------------------------------- errors


def _said(node: ast.expr) -> str | None:
    """A sentence as it stands in the program; what is filled in, in braces."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = []
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                name = ast.unparse(part.value).replace("self._", "").replace("self.", "")
                parts.append("{" + (re.findall(r"[a-z][a-z_]+", name) or ["..."])[-1] + "}")
            else:
                parts.append(_said(part) or "")
        return "".join(parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = [_said(node.left), _said(node.right)]
        return "".join(side or "..." for side in sides)
    return None


@cache
def _calls() -> list[tuple[ast.Call, ast.AST]]:
    """Each place in the program that makes an error of proxy/errors.py or of the command line, with the function around it."""
    found: list[tuple[ast.Call, ast.AST]] = []

    def look(node: ast.AST, around: ast.AST) -> None:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ERRORS:
            found.append((node, around))
        inner = node if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else around
        for child in ast.iter_child_nodes(node):
            look(child, inner)

    for path in sorted((ROOT / "proxy").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.relative_to(ROOT / "proxy").parts[0] not in _NOT_SERVED and any(f"{name}(" in text for name in _ERRORS):
            tree = ast.parse(text)
            look(tree, tree)
    return found


def _raised(*names: str) -> list[tuple[ast.Call, ast.AST]]:
    return [(call, around) for call, around in _calls() if isinstance(call.func, ast.Name) and call.func.id in names]


def _sentences(node: ast.expr, around: ast.AST) -> list[str]:
    """A message written where it is raised, or last before it under a name in the same function."""
    if isinstance(node, ast.Name):
        given = [
            n for n in ast.walk(around)
            if isinstance(n, ast.Assign) and n.lineno < node.lineno
            and any(isinstance(t, ast.Name) and t.id == node.id for t in n.targets)
        ]  # fmt: skip
        last = max(given, key=lambda n: n.lineno, default=None)
        return [] if last is None else _sentences(last.value, ast.Module([], []))
    if isinstance(node, ast.IfExp):
        return _sentences(node.body, around) + _sentences(node.orelse, around)
    said = _said(node)
    return [] if said is None else [said]


def answers() -> str:
    """Each error that a client may get from us: status, code, sentence."""
    found: dict[tuple[str, str, str], None] = {}
    for call, around in _raised("ApiError"):
        named = {k.arg: k.value for k in call.keywords}
        status = ast.unparse(call.args[0]) if call.args else "?"
        codes = _sentences(named.get("code", call.args[3] if len(call.args) > 3 else ast.Constant("")), around)
        for said in _sentences(call.args[1], around) if len(call.args) > 1 else []:
            found[status if status.isdigit() else "as upstream's", (codes or [""])[0], said.strip()] = None
    lines = [f"| {s} | {f'`{c}`' if c else ''} | {_cell(said)} |" for s, c, said in sorted(found)]
    return "\n".join(["| status | code | sentence |", "|---|---|---|", *lines, ""])


def refusals() -> str:
    """Each sentence with which a command or the server does not go on."""
    found: dict[str, None] = {}
    for call, around in _raised("StartError", "StorageError", "ConfigError"):
        for argument in call.args:
            for said in _sentences(argument, around):
                found[said.strip()] = None
    return "\n".join([f"- {_cell(said)}" for said in sorted(found) if (" " in said and not said[0].islower()) or "." in said] + [""])


PARTS: dict[str, Callable[[], str]] = {
    "settings": settings, "commands": commands, "metrics": metrics, "endpoints": endpoints, "answers": answers, "refusals": refusals,
}  # fmt: skip


def marks(text: str) -> list[str]:
    """Which made parts a file has."""
    return [name for _, name, _ in _MARKED.findall(text)]


def made(text: str) -> str:
    """A file of docs/ with its made parts as the program makes them now."""
    return _MARKED.sub(lambda found: found[1] + "\n" + PARTS[found[2]]() + "\n" + found[3], text)


def main() -> None:
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if (new := made(text)) != text:
            path.write_text(new, encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: made anew")


if __name__ == "__main__":
    main()
