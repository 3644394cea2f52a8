"""How many files and functions of proxy/ one request crosses.

  python -m tests.bench.calls [--list continuing]

The demo's conversation is sent through the app in this process, over its ASGI door, to an upstream that
is no part of the count; `sys.setprofile` notes every function of proxy/ that a request calls. Printed
are the medians over the turns of each kind: `bypass` (untouched), `continuing` (the window grew at its
end), `search` (the model asked the memory), `epoch` (the window was rebuilt). `--list KIND` shows the
functions that at least half of that kind's turns cross, by file.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import statistics
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from proxy.app import create_app
from proxy.config import Config
from tests.bench.oracle import Message, Scenario, Step, Upstream, chat, story

ROOT = str(Path(__file__).resolve().parents[2] / "proxy") + "/"
OTHERS = ("demo/", "upstream/demo")  # the demo's own model
_FRONT = re.compile(r"<VM:RULES>.*?</VM:RULES>(?:.*?</VM:(?:CONTEXT|MANIFEST_JSON)>)*")
KINDS = ("bypass", "continuing", "search", "epoch")


@dataclass
class Crossed:
    """One request: how often each function (file, qualified name) was called, and how often the file changed."""

    kind: str
    calls: Counter[tuple[str, str]]
    switches: int

    @property
    def files(self) -> int:
        return len({file for file, _ in self.calls})


class Profile:
    """Counts while it is on; in this thread and in those that it starts."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        self.switches = 0
        self._last = ""

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        name = code.co_filename
        if not name.startswith(ROOT):
            return
        file = name[len(ROOT) :]
        if file.startswith(OTHERS) or code.co_name in ("<genexpr>", "<listcomp>", "<dictcomp>", "<setcomp>"):
            return
        self.calls[file, code.co_qualname] += 1
        if file != self._last:
            self.switches += 1
            self._last = file

    def take(self, kind: str) -> Crossed:
        found = Crossed(kind, self.calls, self.switches)
        self.calls, self.switches, self._last = Counter(), 0, ""
        return found


async def ask(app: Callable[..., Any], body: dict[str, Any], tag: str) -> None:
    """One POST to the app's ASGI door."""
    data = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data)),
               (b"authorization", b"Bearer sk-calls"), (b"x-oracle-tag", tag.encode())]  # fmt: skip
    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions", "query_string": b"", "root_path": "", "scheme": "http",
        "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
        "asgi": {"version": "3.0"},
    }  # fmt: skip
    given = [{"type": "http.request", "body": data, "more_body": False}]
    status = 0

    async def receive() -> Message:
        return given.pop() if given else await asyncio.Event().wait()  # type: ignore[func-returns-value]

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)

    await app(scope, receive, send)
    if status != 200:
        raise SystemExit(f"{tag}: {status}")


@contextlib.asynccontextmanager
async def running(app: Callable[..., Any]) -> AsyncIterator[None]:
    """The app between its start and its end, as a server tells it of them."""
    told: asyncio.Queue[Message] = asyncio.Queue()
    said: asyncio.Queue[Message] = asyncio.Queue()
    task = asyncio.ensure_future(app({"type": "lifespan"}, told.get, said.put))
    told.put_nowait({"type": "lifespan.startup"})
    await said.get()
    yield
    told.put_nowait({"type": "lifespan.shutdown"})
    await task


def kind_of(requests: list[bytes], before: str) -> tuple[str, str]:
    """What the turn was by what went upstream, and the window's front after it."""
    front = next((m.group() for m in [_FRONT.search(requests[-1].decode())] if m), "")
    if len(requests) > 1:
        return "search", front
    return ("bypass" if not front else "continuing" if front == before else "epoch"), front


async def measured(messages: list[Message], window_tokens: int) -> list[Crossed]:
    upstream, crossed, front = Upstream(), list[Crossed](), ""
    runner = await upstream.start()
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "upstream": {"base_url": upstream.base_url},
            "tiers": {"l0": {"tokens": window_tokens}, "l2": {"path": folder}},
        }
        app = create_app(Config.model_validate_json(json.dumps(settings)))
        profile = Profile()
        async with running(app):
            for turn, at in enumerate(range(1, len(messages), 2)):
                tag = f"calls/{turn}"
                step = Step(chat(messages[:at], stream=turn % 2 == 1), messages[at])
                upstream.plans[tag] = Scenario("calls", [], {}), step, turn % 5 == 4
                threading.setprofile(profile)
                sys.setprofile(profile)
                try:
                    await ask(app, step.body, tag)
                finally:
                    sys.setprofile(None)
                    threading.setprofile(None)  # type: ignore[arg-type]
                await asyncio.sleep(0)
                kind, front = kind_of(upstream.seen[tag], front)
                crossed.append(profile.take(kind))
    await runner.cleanup()
    return crossed


def table(crossed: list[Crossed]) -> str:
    lines = [f"{'':12}{'turns':>7}{'files':>7}{'functions':>11}{'calls':>8}{'switches of file':>18}"]
    for kind in KINDS:
        mine = [c for c in crossed if c.kind == kind]
        if mine:
            median = [
                statistics.median(f(c) for c in mine)
                for f in (lambda c: c.files, lambda c: len(c.calls), lambda c: c.calls.total(), lambda c: c.switches)
            ]
            lines.append(f"{kind:12}{len(mine):>7}{median[0]:>7.0f}{median[1]:>11.0f}{median[2]:>8.0f}{median[3]:>18.0f}")
    return "\n".join(lines)


def listing(crossed: list[Crossed], kind: str) -> str:
    mine = [c for c in crossed if c.kind == kind]
    often = Counter(key for c in mine for key in c.calls)
    usual: dict[str, list[str]] = {}
    for (file, name), times in sorted(often.items()):
        if 2 * times >= len(mine):
            usual.setdefault(file, []).append(f"{name}*{statistics.median(c.calls[file, name] for c in mine):.0f}")
    return "\n".join(f"{file} ({len(names)}): {', '.join(names)}" for file, names in usual.items())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", choices=KINDS, help="the functions that such a turn crosses")
    parser.add_argument("--window", type=int, default=4000)
    arguments = parser.parse_args()
    result = asyncio.run(measured(story(), arguments.window))
    print(table(result))
    if arguments.list:
        print(listing(result, arguments.list))
