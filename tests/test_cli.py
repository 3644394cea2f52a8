"""The command line, as real processes: what it prints, its exit status, how it starts and stops."""

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy import __version__
from proxy.api_key import key_hash
from proxy.cli import main
from proxy.storage.l2 import DiskStore
from tests.reference import command_names

ROOT = Path(__file__).resolve().parent.parent

# A stand-in for proxy.app, so that these tests see the command line and nothing else.
APP = """
import json, os
from proxy.config import effective_config

def factory():
    config = effective_config(os.environ)
    if config.server.host == "localhost":
        from proxy.errors import ConfigError
        raise ConfigError("The app refuses this.")

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            while True:
                event = (await receive())["type"]
                await send({"type": event + ".complete"})
                if event == "lifespan.shutdown":
                    return
        body = json.dumps({"pid": os.getpid(), "key": config.upstream.api_key}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    return app
"""
BANNER_LINES = 8
WITH_STAND_IN = "import sys, proxy.cli as c, proxy.serve as s; s.APP_FACTORY = 'stand_in:factory'; sys.exit(c.main())"


def environ(directory: Path, **extra: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LLM_PAGER_")}
    return {**clean, "PYTHONPATH": f"{ROOT}{os.pathsep}{directory}", **extra}


def run(
    directory: Path, *args: str, code: str | None = None, **extra: str
) -> subprocess.CompletedProcess[str]:
    program = ["-c", code] if code else ["-m", "proxy"]
    return subprocess.run(
        [sys.executable, *program, *args],
        cwd=directory,
        env=environ(directory, **extra),
        capture_output=True,
        text=True,
        timeout=60,
    )


# ---------------------------------------------------------------- check and arguments


def test_vectors_without_their_extra_are_a_sentence(tmp_path: Path) -> None:
    lacking = (
        "import sys, proxy.cli as c, proxy.serve as s; s.find_spec = lambda name: None if name == 'numpy' else c;"
        "sys.exit(c.main())"
    )
    for command in ("check", "serve"):
        done = run(tmp_path, command, code=lacking, LLM_PAGER_SEARCH__EMBEDDINGS="static")
        assert done.returncode == 1 and "pip install 'llm-pager[semantic]'" in done.stderr
        assert len(done.stderr.splitlines()) == 1



def test_version() -> None:
    done = run(ROOT, "--version")
    assert (done.returncode, done.stdout) == (0, f"llm-pager {__version__}\n")


@pytest.mark.parametrize("args", [[], ["nonsense"], ["serve", "--workers", "0"], ["check", "x"]])
def test_wrong_arguments_are_status_2(args: list[str]) -> None:
    assert main(args) == 2


def test_the_command_line_starts_without_anything_heavy() -> None:
    heavy = "print(sorted(set(sys.modules) & {'asyncio', 'pydantic', 'rich', 'uvicorn', 'yaml'}))"
    code = f"import sys, proxy.cli; proxy.cli.main(['--version']); proxy.cli.main(['show', '--help']); {heavy}"
    assert run(ROOT, code=code).stdout.endswith("exit.\n[]\n")


@pytest.mark.parametrize("words", command_names(), ids="-".join)
def test_help_is_plain_and_fits_a_screen(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"Usage: {' '.join(['llm-pager', *words])} ") and err == ""
    assert len(out.splitlines()) <= 32 and max(map(len, out.splitlines())) <= 80 and "\x1b" not in out
    assert "--json" in out or "Commands:" in out


def test_command_that_is_not_given_is_asked_for_with_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2 and "Commands:" in capsys.readouterr().err


def test_shells_complete_commands_and_options(tmp_path: Path) -> None:
    for line, expected in (("llm-pager se", {"serve", "sessions", "search"}), ("llm-pager show --d", {"--diff"})):
        asked = {"_LLM_PAGER_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        assert set(run(tmp_path, **asked).stdout.split()) == expected


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where there is no storage yet."""
    for name in [name for name in os.environ if name.startswith("LLM_PAGER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_json_is_all_of_the_output(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "config.yaml").write_text("tiers: {l0: {tokens: 4000, reserve_tokens: 4096}}\n")

    def told(*words: str) -> dict[str, Any]:
        assert main([*words, "--json"]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        answer: dict[str, Any] = json.loads(out)
        return answer

    checked, storage, key = told("check"), told("check", "--storage"), told("api-key")
    assert checked["config"]["tiers"]["l0"]["tokens"] == 4000 and len(checked["notes"]) == 1
    assert storage["result"] == "there is none yet" and storage["lines"][0] == {"what": "storage", "told": str(here / "data")}
    assert key_hash(key["key"]) == key["hash"]


@pytest.mark.parametrize("words", [("sessions",), ("show", "0" * 12), ("search", "0" * 12, "word"), ("export", "--out", "-")])
def test_storage_that_is_not_there_is_a_sentence(words: Sequence[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("llm-pager: There is no storage in data") and err.count("\n") == 1
    assert not (here / "data").exists()


def test_bench_tells_what_the_memory_adds(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Slow: a server starts."""
    assert main(["bench", "--requests", "5", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["requests"]
    assert [(row["what"], row["requests"]) for row in rows] == [("new chat", 25), ("1,000 messages", 5)]
    for row in rows:
        assert 0 < row["direct"]["ms"] < min(row["forwarded"]["ms"], row["llm_pager"]["ms"])
    assert 600 < rows[0]["bytes"] < 1400 and 300_000 < rows[1]["bytes"] < 600_000
    assert [*here.iterdir()] == []


def test_reader_of_the_output_may_have_gone(tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run([sys.executable, "-m", "proxy", "api-key"], cwd=ROOT, stdout=theirs, stderr=subprocess.PIPE, timeout=60)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (1, b"")


def test_check_prints_the_effective_configuration_masked(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("tiers: {l0: {tokens: 4000, reserve_tokens: 4096}}\n")
    extra = {"LLM_PAGER_UPSTREAM__API_KEY": "sk-SECRET", "LLM_PAGER_SERVER__PORT": "9000"}
    done = run(tmp_path, "check", **extra)
    assert (done.returncode, done.stderr) == (0, "")
    assert "SECRET" not in done.stdout
    assert "# note: tiers.l0.reserve_tokens: 4096 is more than a quarter" in done.stdout
    shown = yaml.safe_load(done.stdout)
    assert shown["server"]["port"] == 9000
    assert shown["upstream"]["api_key"] == "***"
    assert list(shown)[:4] == ["server", "upstream", "memory", "tiers"]


def test_what_check_prints_can_be_used_as_a_file(tmp_path: Path) -> None:
    printed = run(tmp_path, "check").stdout
    (tmp_path / "other.yaml").write_text(printed)
    assert run(tmp_path, "check", "--config", "other.yaml").stdout == printed


def test_masked_secret_is_not_taken_for_one(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LLM_PAGER_UPSTREAM__API_KEY", "sk-x")
    monkeypatch.setenv("LLM_PAGER_UPSTREAM__BASE_URL", "http://u:pw@up/v1")
    assert main(["check"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# note: *** stands for a secret")
    (here / "config.yaml").write_text(printed)
    assert main(["check"]) == 2
    for key, line in zip(("base_url", "api_key"), capsys.readouterr().err.splitlines(), strict=True):
        assert line.startswith(f"llm-pager: upstream.{key}: *** stands where `llm-pager check` showed no secret; write what stood there")


def test_check_tells_every_problem_on_stderr(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("server: {prot: 1}\nmemory: {mode: lax}\n")
    done = run(tmp_path, "check", "--config", "bad.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and all(line.startswith("llm-pager: ") for line in lines)
    assert "did you mean port?" in done.stderr and "strict, relaxed, passive" in done.stderr


def test_check_and_serve_refuse_a_store_of_another_version(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "data", 10)
    asyncio.run(store.commit([(b"n1", b"a record")]))
    asyncio.run(store.close())
    with closing(sqlite3.connect(tmp_path / "data" / "cache.db")) as database:
        database.execute("PRAGMA user_version = 0")  # as it was before there was one
    for command in (["check"], ["serve", "--port", "0"]):
        done = run(tmp_path, *command, LLM_PAGER_TIERS__L2__PATH="data")
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
        assert "data was written by an older version of llm-pager" in done.stderr
        assert "set tiers.l2.path to another directory, or delete this one" in done.stderr


# ---------------------------------------------------------------- serve


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(directory: Path, *args: str, lines: int = BANNER_LINES, **extra: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    (directory / "stand_in.py").write_text(APP)
    process = subprocess.Popen(
        [sys.executable, "-c", WITH_STAND_IN, "serve", *args],
        cwd=directory,
        env=environ(directory, **extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, "".join(process.stdout.readline() for _ in range(lines))
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def ask(port: int) -> tuple[dict[str, object], list[str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/")
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return answer, [name.lower() for name, _ in response.getheaders()]


def test_serve_refuses_a_bad_configuration(tmp_path: Path) -> None:
    done = run(tmp_path, "serve", "--port", "70000", "--upstream", "nonsense")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 2
    assert "server.port: 70000 is not allowed" in done.stderr
    assert "upstream.base_url: 'nonsense' is not allowed" in done.stderr
    assert "(set by the command line)" in done.stderr


def test_serve_refuses_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run(tmp_path, "serve", "--port", str(port))
    assert (done.returncode, done.stdout) == (1, "")
    expected = f"Port {port} on 127.0.0.1 is already in use; choose another with --port."
    assert done.stderr == f"llm-pager: {expected}\n"


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_serve_refuses_a_host_that_is_not_here(tmp_path: Path, host: str) -> None:
    done = run(tmp_path, "serve", "--port", "0", "--host", host)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and host in done.stderr


def test_serve_refuses_a_state_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    done = run(tmp_path, "serve", "--port", "0", LLM_PAGER_TIERS__L2__PATH="file/data")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "set tiers.l2.path to one that can" in done.stderr


def test_serve_refuses_a_state_directory_that_is_a_file(tmp_path: Path) -> None:
    done = run(tmp_path, "serve", "--port", "0", LLM_PAGER_TIERS__L2__PATH="/etc/hostname")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "llm-pager: /etc/hostname is not a directory; set tiers.l2.path to one that can be written.\n"
    )


@pytest.mark.parametrize("workers", ["1", "2"])
def test_serve_refuses_a_store_that_it_may_not_open(tmp_path: Path, workers: str) -> None:
    (tmp_path / "data" / "cache.db").mkdir(parents=True)
    done = run(tmp_path, "serve", "--port", "0", "--workers", workers)  # ends: no crash loop
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1 and "unable to open database file" in done.stderr
    assert done.stderr.startswith("llm-pager: Cannot use data as the storage directory")


def test_serve_tells_what_the_app_refuses(tmp_path: Path) -> None:
    (tmp_path / "stand_in.py").write_text(APP)
    done = run(tmp_path, "serve", "--port", "0", "--host", "localhost", code=WITH_STAND_IN)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, "llm-pager: The app refuses this.")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [1, 2])
def test_serve_announces_answers_and_stops(
    tmp_path: Path, workers: int, stop: signal.Signals
) -> None:
    port = free_port()
    args = ["--port", str(port), "--workers", str(workers), "--upstream", "http://u:pw@up/v1"]
    with serving(tmp_path, *args, LLM_PAGER_UPSTREAM__API_KEY="sk-SECRET") as (process, banner):
        assert banner == (
            f"llm-pager {__version__}\n"
            f"  use it     export OPENAI_BASE_URL=http://127.0.0.1:{port}/v1\n"
            f"  look in    http://127.0.0.1:{port}/vm/ui\n"
            f"  listening  127.0.0.1:{port}, {workers} worker{'s' if workers > 1 else ''}\n"
            "  upstream   http://***@up/v1, with its own key\n"
            "  window     each model's own (tiers.l0.tokens), mode relaxed\n"
            f"  data       {tmp_path / 'data'}\n"
            f"  counters   http://127.0.0.1:{port}/metrics, http://127.0.0.1:{port}/vm/stats\n"
        )
        answer, headers = ask(port)  # at once: the port listens before the line is printed
        assert answer["key"] == "sk-SECRET"
        assert "server" not in headers and "date" not in headers
        assert (answer["pid"] == process.pid) == (workers == 1)
        process.send_signal(stop)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors and "SECRET" not in errors
        with pytest.raises(ConnectionRefusedError):
            ask(port)
        assert not alive(int(str(answer["pid"])))


@pytest.mark.parametrize("as_json", [False, True])
def test_port_0_listens_where_it_says(tmp_path: Path, as_json: bool) -> None:
    with serving(tmp_path, "--port", "0", *["--json"] * as_json, lines=1 if as_json else BANNER_LINES) as (_, banner):
        url = json.loads(banner)["base_url"] if as_json else banner
        port = re.search(r"http://127\.0\.0\.1:(\d+)/v1", url)
        assert port is not None and ask(int(port[1]))[0]["key"] is None


def alive(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.05)
    return True
