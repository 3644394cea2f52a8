"""README and docs: what they point at is there, the tree is the tree, what is made from the program is what it makes now."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from proxy.config import Config, load_config
from tests import reference
from tests.bench import figures

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
TEXTS = ["README.md", "proxy/memory/README.md", "tests/bench/README.md", *DOCS]
_LINK = re.compile(r"\]\(([^)#:]+)\)")
_FILE = re.compile(r"\b[a-z_0-9]+(?:\*)?\.py\b")
_MODULE = re.compile(r"python -m (tests(?:\.\w+)+)")
_PATH = re.compile(r"(?<![\w./])(?:tests|deploy|proxy)/[\w./-]*\w")
_MADE_BY_THE_READER = ("deploy/.env",)


@pytest.mark.parametrize("file", TEXTS)
def test_links_lead_somewhere(file: str) -> None:
    path = ROOT / file
    links = _LINK.findall(path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []
    assert links or file in DOCS


@pytest.mark.parametrize("file", TEXTS)
def test_commands_and_files_that_a_text_names_are_there(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    assert [module for module in _MODULE.findall(text) if find_spec(module) is None] == []
    paths = [path for path in _PATH.findall(text) if path not in _MADE_BY_THE_READER]
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_readme_is_one_screen_and_leads_to_each_text() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    linked = {link for link in _LINK.findall(text) if link.startswith("docs/")}
    assert [file for file in DOCS if file not in linked and file != "docs/index.md"] == []


def test_every_text_is_in_the_navigation() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(re.findall(r"[a-z-]+\.md", str(nav))) == [file.removeprefix("docs/") for file in DOCS]


def test_what_is_made_from_the_program_is_what_it_makes_now() -> None:
    marks = []
    for file in DOCS:
        text = (ROOT / file).read_text(encoding="utf-8")
        marks += reference.marks(text)
        assert text == reference.made(text), f"{file} is older than the program: python -m tests.reference"
    assert sorted(marks) == sorted(reference.PARTS)


@pytest.mark.parametrize(("name", "svg"), figures.charts().items())
def test_charts_are_drawn_from_the_tables(name: str, svg: str) -> None:
    drawn = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert drawn == svg, f"docs/{name} is older than docs/measured.md: python -m tests.bench.figures"


def test_every_client_that_is_called_tested_has_its_tests_and_every_test_is_told() -> None:
    text = (ROOT / "docs/clients.md").read_text(encoding="utf-8")
    told = set(re.findall(r"tests/clients/(test_\w+)\.py", text))
    there = {path.stem for path in (ROOT / "tests/clients").glob("test_*.py")}
    assert there - told == {"test_openai_python_errors"}  # of the client above it
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(re.findall(r"llm-pager\[(\w+)\]", "".join((ROOT / file).read_text() for file in TEXTS))) <= set(extras)


_CODE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("file", TEXTS)
def test_code_that_a_text_shows_is_code(file: str, tmp_path: Path) -> None:
    for language, code in _CODE.findall((ROOT / file).read_text(encoding="utf-8")):
        if language == "yaml":
            read = yaml.safe_load(code)
            if "services" in read:
                PyCompose.from_yaml(re.sub(r"\$\{\w+:\?\}", "given", code)).validate()
            elif set(read) <= set(Config.model_fields):
                assert load_config(_written(code, tmp_path / "config.yaml"), {}, {})
        elif language == "python":
            compile(code, file, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("file", TEXTS)
def test_settings_that_a_text_names_are_settings(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    sections = "|".join(Config.model_fields)
    named = set(re.findall(rf"`((?:{sections})(?:\.[a-z0-9_]+)+)[:`]", text))
    there = set(_keys(Config().model_dump()))
    assert {key for key in named if key not in there and not key.startswith("models.")} == set()


def _keys(values: dict[str, Any], above: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield above + name
        if isinstance(value, dict):
            yield from _keys(value, f"{above}{name}.")


def test_tree_names_every_file_of_the_package_and_no_other() -> None:
    text = (ROOT / "docs/tree.md").read_text(encoding="utf-8").partition("# The tree")[2].partition("tests/  ")[0]
    named = {name for pattern in _FILE.findall(text) for name in _matching(pattern)}
    there = {p.name for p in (ROOT / "proxy").rglob("*.py") if not p.name.startswith("__")}
    rooms = {p.name for room in ("tokens", "media", "demo") for p in (ROOT / "proxy" / room).glob("*.py")}
    assert there - named - rooms == set(), "a file that docs/tree.md does not name"
    assert named - there == set(), "a file in docs/tree.md that is not there"


def _written(code: str, path: Path) -> Path:
    """The settings as a file, with something of the right shape for each variable and each key that is cut short."""
    key = "A" * 43 + "="
    for cut, whole in ((r"\$\{LLM_MASTER_KEY\}", key), (r"\$\{\w+\}", "x"), (r"sha256:[0-9a-f]+\.\.\.", "sha256:" + "0" * 64)):
        code = re.sub(cut, whole, code)
    path.write_text(code, encoding="utf-8")
    return path


def _matching(pattern: str) -> set[str]:
    found = {p.name for p in (ROOT / "proxy").rglob(pattern)}
    return found or {pattern}
