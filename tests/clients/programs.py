"""Whole applications, played twice: on a bare scripted upstream, and on llm-pager in front of it.

Promises: an application runs as its users run it, in its own process, environment and home folder,
without a network; `check_program` fails unless what it left behind (its output, its files, its exit
code) is the same both times, every request was one that OpenAI's API takes, the conversation was
larger than the window, and the window was used. What the model says depends on the conversation
alone: a step that needs something said before reads it from the request, and where the request does
not have it, looks for it with the memory's tools, as a model would.

The applications want other releases of each other's libraries. Each has an environment of its own in
the folder CLIENTS_APPS_DIR, named as its group in pyproject.toml: see `.ci/run`.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.clients.stage import upstream_in_a_thread
from tests.e2e.harness import (
    Answer,
    Recorded,
    Response,
    answer,
    count_request_tokens,
    in_process_server,
)
from tests.e2e.talk import VM_NAMES, assert_no_vm, fault, names_of, search, texts_of

Message = dict[str, Any]
Reply = Message | Callable[..., Message]

MODEL = "gpt-4o"
APPS = Path(os.environ.get("CLIENTS_APPS_DIR") or "~/.cache/llm-pager-apps").expanduser()
NODE = Path(os.environ.get("CLIENTS_NODE_DIR") or "~/.cache/llm-pager-clients").expanduser()
DRIVERS = Path(__file__).with_name("apps")
TIMEOUT_S = 300
FULL = os.environ.get("LLM_PAGER_E2E_FULL") == "1"
PAGES_READ = 2  # by the model, in one answer
UNREACHABLE = "http://127.0.0.1:9"  # nobody listens there: no application gets out of the machine
LATER = {  # by group: what is imported with the first call of a model
    "app-aider": ("litellm",),
    "app-gptme": ("openai.resources.chat", "anthropic.resources"),
    "app-libraries": ("openai.resources.chat",),
}
TELEMETRY = {
    "ANONYMIZED_TELEMETRY": "False",
    "CREWAI_DISABLE_TELEMETRY": "true",
    "CREWAI_TRACING_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "OTEL_SDK_DISABLED": "true",
}


# ---------------------------------------------------------------- where the applications are


def every(ways: list[Any], some: list[Any]) -> list[Any]:
    """The ways in which an application is run: once a night all of them (LLM_PAGER_E2E_FULL=1)."""
    return ways if FULL else some


def how(stream: bool) -> str:
    return "stream" if stream else "whole"


def needs_python(group: str) -> pytest.MarkDecorator:
    """Skips where the environment of this group is not installed."""
    return pytest.mark.skipif(
        not python_of(group).exists(),
        reason=f"the group {group} is not installed in {APPS}: see .ci/run, CLIENTS_APPS_DIR",
    )


def needs_node(package: str) -> pytest.MarkDecorator:
    """Skips where node or the package is not installed."""
    return pytest.mark.skipif(
        shutil.which("node") is None or not (NODE / "node_modules" / package).is_dir(),
        reason=f"{package} is not in {NODE}/node_modules: see .ci/run, CLIENTS_NODE_DIR",
    )


def python_of(group: str) -> Path:
    """The interpreter of a group's environment; its programs lie beside it."""
    return APPS / group / "bin" / "python"


class Nursery:
    """A Python program that has been imported once: each of its runs is a fork (apps/nursery.py). Once a night
    (LLM_PAGER_E2E_FULL=1) every run is a start. `modules`: what it imports later."""

    def __init__(self, python: Path, program: Path, modules: Sequence[str]) -> None:
        self._command = [str(python), str(DRIVERS / "nursery.py"), str(program), *modules]
        self._process: subprocess.Popen[str] | None = None

    def run(self, home: Path, arguments: Sequence[str], stdin: str, env: dict[str, str]) -> tuple[int, str, str]:
        """Exit code, standard output and errors."""
        with tempfile.TemporaryDirectory() as folder:
            files = {name: f"{folder}/{name}" for name in ("in", "out", "err")}
            Path(files["in"]).write_text(stdin)
            if self._process is None:
                self._process = subprocess.Popen(
                    self._command, cwd="/", env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip
            process = self._process
            assert process.stdin and process.stdout
            process.stdin.write(json.dumps({"dir": str(home), "env": env, "arguments": list(arguments), **files}) + "\n")
            process.stdin.flush()
            late = threading.Timer(TIMEOUT_S, os.killpg, (process.pid, signal.SIGKILL))
            late.start()
            code = process.stdout.readline()
            late.cancel()
            assert code, f"{self._command[-1]} did not end in {TIMEOUT_S} s, or could not be imported"
            return int(code), Path(files["out"]).read_text(), Path(files["err"]).read_text()


@cache
def nursery(python: Path, program: Path, modules: Sequence[str]) -> Nursery:
    """It ends with this process: its standard input does."""
    return Nursery(python, program, modules)


@dataclass(frozen=True)
class Where:
    """One run's surroundings: the API's address, and a home folder that is new each time."""

    url: str
    home: Path
    key: str = "sk-application"

    def run(self, *command: str | Path, stdin: str = "", **more: str) -> tuple[int, str]:
        """Exit code and standard output. `more`: further variables of its environment."""
        done = subprocess.run(
            [str(part) for part in command],
            cwd=self.home,
            env={**self.environment(), **more},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        if done.returncode:  # what pytest shows when the comparison fails
            print(f"--- {command[0]}: exit code {done.returncode}\n{done.stderr[-4000:]}")
        return done.returncode, done.stdout

    def drive(self, group: str, driver: str, given: Any = None) -> Any:
        """The JSON that a driver of tests/clients/apps prints as its last line."""
        code, out = self.run_python(group, DRIVERS / driver, stdin=json.dumps(given))
        assert code == 0, out
        return json.loads(out.splitlines()[-1])

    def run_python(self, group: str, program: Path, *arguments: str, stdin: str = "", **more: str) -> tuple[int, str]:
        """As `run`, of a Python program in a group's environment."""
        if FULL:
            return self.run(python_of(group), program, *arguments, stdin=stdin, **more)
        made = nursery(python_of(group), program, LATER.get(group, ()))
        code, out, said = made.run(self.home, arguments, stdin, {**self.environment(), **more})
        if code:  # what pytest shows when the comparison fails
            print(f"--- {program}: exit code {code}\n{said[-4000:]}")
        return code, out

    def environment(self) -> dict[str, str]:
        """Nothing of the machine's own but what a process needs to start."""
        kept = ("PATH", "LANG", "SSL_CERT_FILE", "TIKTOKEN_CACHE_DIR")
        return {
            **{name: os.environ[name] for name in kept if name in os.environ},
            **TELEMETRY,
            "HOME": str(self.home),
            "TERM": "dumb",
            "NO_COLOR": "1",
            "OPENAI_API_KEY": self.key,
            "OPENAI_BASE_URL": self.url,
            "OPENAI_API_BASE": self.url,
            "HTTP_PROXY": UNREACHABLE,
            "HTTPS_PROXY": UNREACHABLE,
            "NO_PROXY": "127.0.0.1,localhost",
        }


# ---------------------------------------------------------------- the model


@dataclass(frozen=True)
class Step:
    """The model's next message.

    `needs`: a regular expression; what it finds in the request is handed to `reply`. Where nothing
    is found, the model searches for `query` and reads what was found, if it is offered the tools.
    Without a `query` it says what it has to say with None.
    """

    reply: Reply
    needs: str = ""
    query: str = ""


@dataclass
class Model:
    """A scripted model in one run of an application.

    `asides`: answers to requests that are no part of the conversation (titles, tags), by a text
    that they have.
    """

    steps: Sequence[Step]
    asides: dict[str, Message] = field(default_factory=dict)
    at: int = 0
    looks: int = 0  # memory rounds in this step
    pages: list[str] = field(default_factory=list)  # found, and not read yet
    memory_calls: int = 0  # in the whole run
    calls: list[Recorded] = field(default_factory=list)

    def respond(self, recorded: Recorded) -> Answer:
        self.calls.append(recorded)
        return answer(recorded.json, self.message(recorded))

    def message(self, recorded: Recorded) -> Message:
        text = plain_text(recorded.json["messages"])
        for mark, said in self.asides.items():
            if mark in text:
                return said
        assert self.at < len(self.steps), (
            f"request {len(self.calls)} is not in the script: {text[-2000:]}"
        )
        step = self.steps[self.at]
        found = re.search(step.needs, text) if step.needs else None
        if step.needs and not found and step.query and self.looks <= PAGES_READ:
            asked = self.look(step, recorded)
            if asked is not None:
                self.looks += 1
                self.memory_calls += 1
                return asked
        self.at, self.looks = self.at + 1, 0
        if not callable(step.reply):
            return step.reply
        if not step.needs:
            return step.reply()
        return step.reply(found)

    def look(self, step: Step, recorded: Recorded) -> Message | None:
        """A search, and then a page that it found; None where the tools are not on offer."""
        if recorded.json.get("tool_choice") == "none" or VM_NAMES[1] not in names_of(recorded):
            return None
        if not self.looks:
            return search(step.query, f"call_look_{self.at}")
        messages = recorded.json["messages"]
        if self.looks == 1:
            results = json.loads(messages[-1]["content"]).get("results") or ()
            self.pages = [r["page_id"] for r in results]
        return fault(self.pages.pop(0), f"call_read_{self.at}_{self.looks}") if self.pages else None


def plain_text(messages: Sequence[Message]) -> str:
    """All words of a request as the model reads them: quoted lines without their quotes."""
    parts = []
    for message in messages:
        content = message.get("content")
        for text in (
            [content] if isinstance(content, str) else [p.get("text") for p in content or ()]
        ):
            parts.append(text or "")
        parts += [
            c["function"]["arguments"] for c in message.get("tool_calls") or () if "function" in c
        ]
    return "\n".join(parts).replace('\\"', '"').replace("\\n", "\n")


# ---------------------------------------------------------------- both runs


@dataclass(frozen=True)
class Played:
    """What the application left behind, and what the model was asked."""

    seen: Any
    model: Model


def play_twice(
    folder: Path,
    run: Callable[[Where], Any],
    model: Callable[[], Model],
    *,
    l0_tokens: int,
    reserve_tokens: int,
    sections: dict[str, Any] | None = None,
) -> tuple[Played, Played]:
    """Runs the application on the bare upstream and on llm-pager, in the same (new) home folder.

    `sections`: more of the server's configuration.
    """
    home, played = folder / "home", []
    for paged in (False, True):
        acting = model()
        with upstream_in_a_thread(acting.respond, models_body) as upstream:
            config = {
                "upstream": {"base_url": upstream.base_url},
                "tiers": {"l0": {"tokens": l0_tokens, "reserve_tokens": reserve_tokens}},
                **(sections or {}),
            }
            home.mkdir()
            with in_process_server(config) if paged else nullcontext(upstream.base_url) as url:
                seen = run(Where(url, home))
            shutil.rmtree(home)
        assert not upstream.failures, upstream.failures
        violations = [v for c in acting.calls for v in c.violations]
        assert not violations, violations
        assert acting.at == len(acting.steps), f"{acting.at} of {len(acting.steps)} steps"
        played.append(Played(seen, acting))
    bare, through = played
    assert_no_vm(json.dumps([through.seen, *(texts_of(c) for c in bare.model.calls)], default=repr))
    sizes = [count_request_tokens(c.json) for c in bare.model.calls]
    windows = [c for c in through.model.calls if "<VM:RULES>" in texts_of(c)]
    assert windows, f"nothing was paged; the application sent {sizes} tokens"
    for recorded in windows:
        assert count_request_tokens(recorded.json) <= l0_tokens - reserve_tokens
    return bare, through


def check_program(
    folder: Path,
    run: Callable[[Where], Any],
    model: Callable[[], Model],
    *,
    l0_tokens: int,
    reserve_tokens: int,
    sections: dict[str, Any] | None = None,
) -> Played:
    """Plays the application twice, with more than the budget holds; how it went on llm-pager, which
    is how it went on the bare upstream."""
    bare, paged = play_twice(
        folder, run, model,
        l0_tokens=l0_tokens, reserve_tokens=reserve_tokens, sections=sections,
    )  # fmt: skip
    sizes = [count_request_tokens(c.json) for c in bare.model.calls]
    assert max(sizes) > l0_tokens - reserve_tokens, f"{sizes} tokens: nothing had to be paged"
    assert paged.seen == bare.seen, difference(bare.seen, paged.seen)
    return paged


def difference(bare: Any, paged: Any) -> str:
    """The lines that are not the same."""
    texts = [
        json.dumps(x, indent=1, default=repr).replace("\\n", "\n").splitlines()
        for x in (bare, paged)
    ]
    return "\n".join(difflib.unified_diff(*texts, "bare", "paged", n=1, lineterm=""))[:6000]


def models_body(recorded: Recorded) -> Response:
    """What the upstream answers elsewhere: the list of models, as Open WebUI asks for it."""
    one = {"id": MODEL, "object": "model", "created": 1, "owned_by": "system"}
    return Response(json.dumps({"object": "list", "data": [one]}).encode())


def files_of(home: Path, *patterns: str) -> dict[str, str]:
    """The files that match, by their path within the home folder."""
    found = sorted({f for p in patterns for f in home.glob(p) if f.is_file()})
    return {str(f.relative_to(home)): f.read_text() for f in found}
