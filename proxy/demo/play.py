"""`llm-pager demo`: a long conversation through the real server, with nothing but this machine.

Promises: the proxy is the one that `serve` starts, on a free port of 127.0.0.1, with its state in
a temporary directory; every turn is a real HTTP request with the whole history, streamed. Exit
status 0 when at least 80% of the recall questions were answered, 1 otherwise (also when nobody reads
its output any more), 130 after Ctrl-C, 143 after SIGTERM; the temporary directory is gone by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import webbrowser
from collections.abc import AsyncIterator, Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import uvicorn
from rich.console import Console
from rich.live import Live

from proxy.config import Config, effective_reserve
from proxy.conversation.report import TurnReport
from proxy.demo.bill import Ledger
from proxy.demo.screen import View, layout, print_summary, result
from proxy.demo.upstream import MODEL, DemoUpstream
from proxy.errors import ConfigError
from proxy.sse import EventParser
from proxy.terminal import tell_json
from proxy.tokens import get_counter
from proxy.upstream import RootPath, Upstream
from proxy.upstream.openai import OpenAIUpstream

DEFAULT_WINDOW_TOKENS = 4000
MIN_WINDOW_TOKENS = 2000
REQUIRED_RECALL = 0.8
TURN_PAUSE_S = 0.12  # on a terminal: the whole show takes about 75 s
EPOCH_PAUSE_S = 0.5
RECALL_PAUSE_S = 1.1
_START_S = 20.0
_REPORT_WAIT_S = 0.2
_RESPONSE_LIMIT_BYTES = 1_000_000
_SYSTEM = "You are a friend who listens well. Answer from what you have been told, briefly."


class DemoFailed(Exception):
    """The demo cannot go on; the message is one sentence."""


def conversation() -> list[dict[str, str]]:
    """The turns: `user`, and on a recall question `expect`, a part of the right answer."""
    text = resources.files("proxy.demo").joinpath("conversation.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def demo_config(window_tokens: int, state: Path) -> Config:
    """The server's settings: defaults, but for a window that is small enough to watch."""
    if window_tokens < MIN_WINDOW_TOKENS:
        raise ConfigError(f"--window {window_tokens} is too small to show anything; give at least {MIN_WINDOW_TOKENS}.")
    return Config.model_validate({
        "upstream": {"provider": "demo"},
        "tiers": {"l0": {"tokens": window_tokens, "reserve_tokens": window_tokens // 10}, "l2": {"path": state}},
        "manifest": {"max_tokens": window_tokens // 8},
        "models": {MODEL: {"window_tokens": window_tokens, "tools": True}},
    })  # fmt: skip


class _Server(uvicorn.Server):
    """A server inside our event loop: Ctrl-C is for the demo, which stops it in order."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def _serving(app: Any) -> AsyncIterator[str]:
    """The base URL of the app, served over HTTP until the block ends."""
    # asyncio sets TCP_NODELAY only where the protocol is named; without it every streamed turn waits
    # for a delayed ACK.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        settings = uvicorn.Config(
            app, http="httptools", ws="none", lifespan="on", log_level="warning", access_log=False,
            timeout_graceful_shutdown=3,
        )  # fmt: skip
        server = _Server(settings)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            async with asyncio.timeout(_START_S):
                while not server.started:
                    if task.done():
                        raise DemoFailed("the server did not start; its reason is above")
                    await asyncio.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            await task


async def _stats(client: Upstream) -> dict[str, Any]:
    """What the server says of its memory, as an operator asks for it."""
    reply = await client.forward("GET", RootPath("/vm/stats"), b"", [], None)
    found: dict[str, Any] = json.loads(await reply.read(_RESPONSE_LIMIT_BYTES))
    return found


async def _ask(client: Upstream, messages: list[dict[str, Any]]) -> str:
    """The assistant's text for a history, read from a stream as an application reads it."""
    body = json.dumps({"model": MODEL, "messages": messages, "stream": True}).encode()
    headers = [(b"content-type", b"application/json"), (b"authorization", b"Bearer demo")]
    reply = await client.chat(body, headers)
    data = await reply.read(_RESPONSE_LIMIT_BYTES)
    if reply.status != 200:
        raise DemoFailed(f"the server answered {reply.status}: {data.decode(errors='replace')[:300]}")
    *events, end = [event.data for event in EventParser().feed(data) if event.data] or [b""]
    if end != b"[DONE]":
        raise DemoFailed("a stream ended without [DONE]")
    chunks = [json.loads(event) for event in events]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


class Show:
    """Plays the conversation and keeps the view up to date."""

    def __init__(self, turns: list[dict[str, str]], view: View, pace: bool) -> None:
        self.turns, self.view, self.pace = turns, view, pace
        self._reported = asyncio.Event()

    def observe(self, report: TurnReport) -> None:
        self.view.observe(report)
        self._reported.set()

    async def play(self, client: Upstream) -> None:
        messages: list[dict[str, Any]] = [{"role": "system", "content": _SYSTEM}]
        for number, turn in enumerate(self.turns, 1):
            if self.view.unread:
                return
            self.view.turn, self.view.said = number, turn["user"]
            messages.append({"role": "user", "content": turn["user"]})
            self._reported.clear()
            answer = await _ask(client, messages)
            with contextlib.suppress(TimeoutError):  # the report may come just after the answer
                await asyncio.wait_for(self._reported.wait(), _REPORT_WAIT_S)
            self.view.ledger.turn(messages, turn.get("expect"))
            messages.append({"role": "assistant", "content": answer})
            report = self.view.report
            pause_s = EPOCH_PAUSE_S if report and report.new_epoch else TURN_PAUSE_S
            if "expect" in turn:
                self.view.recalled(turn["user"], answer, turn["expect"])
                pause_s = RECALL_PAUSE_S
            if self.pace:
                await asyncio.sleep(pause_s)


def _end_on_sigterm() -> None:
    """SIGTERM cancels the current task, as Ctrl-C does: the blocks that it is in clean up."""
    task = asyncio.current_task()
    if task is None or sys.platform == "win32":
        return

    def end() -> None:
        if not task.cancelling():  # a second one must not interrupt the cleaning up
            task.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end)


def _open(url: str) -> None:
    """In a browser, where there is one with a window of its own: one in this terminal would take it."""
    has_windows = sys.platform in ("darwin", "win32") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")))
    if has_windows:
        webbrowser.open(url)


async def _run(window_tokens: int, pace: bool, ui: bool, console: Console, tell: Callable[[View], None]) -> View:
    """`tell` is given the view at the end; with `ui` the server goes on then until it is stopped."""
    _end_on_sigterm()
    from proxy.app import create_app

    turns = conversation()
    with tempfile.TemporaryDirectory(prefix="llm-pager-demo-") as state:
        config = demo_config(window_tokens, Path(state))
        l0 = config.tiers.l0
        budget_tokens = window_tokens - effective_reserve(window_tokens, l0.reserve_tokens)
        ledger = Ledger(get_counter(MODEL), budget_tokens)
        view = View(
            len(turns), window_tokens, l0.eviction_threshold, ledger, plain=not (console.is_terminal or console.quiet)
        )
        show = Show(turns, view, pace)
        app = create_app(config, show.observe, DemoUpstream(ledger.ours.book))
        async with _serving(app) as base_url:
            async with contextlib.AsyncExitStack() as closing:
                client = OpenAIUpstream(Config.model_validate({"upstream": {"base_url": base_url}}))
                closing.push_async_callback(client.close)
                if ui:
                    view.dashboard = base_url.removesuffix("/v1") + "/vm/ui"
                    await asyncio.to_thread(_open, view.dashboard)
                view.begin()
                screen = Live(get_renderable=lambda: layout(view, console.size.height), console=console, screen=True, refresh_per_second=12)
                with screen if console.is_terminal and not console.quiet else contextlib.nullcontext():
                    await show.play(client)
                view.stats = await _stats(client)
                if not view.unread:
                    tell(view)
                if ui:
                    console.print(f"\nThe dashboard is at {view.dashboard} until Ctrl-C.", highlight=False)
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.Event().wait()
    return view


def main(fast: bool, window: int | None, ui: bool, as_json: bool) -> int:
    """Runs the demo. `fast`: no pauses; `window`: tokens, None for 4,000; `ui`: with the dashboard, until Ctrl-C."""
    console = Console(quiet=as_json) if sys.stdout.isatty() else Console(color_system=None, width=120, quiet=as_json)
    window_tokens = window or DEFAULT_WINDOW_TOKENS

    def tell(view: View) -> None:
        if as_json:
            tell_json(result(view))
        else:
            print_summary(view, console)

    logging.getLogger("proxy.tokens").setLevel(logging.ERROR)  # no table has the demo's model
    try:
        pace = console.is_terminal and not (fast or as_json)
        view = asyncio.run(_run(window_tokens, pace, ui, console, tell))
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    except asyncio.CancelledError:
        console.print("stopped")
        return 128 + signal.SIGTERM
    except DemoFailed as error:
        print(f"llm-pager: {error}", file=sys.stderr)
        return 1
    if view.unread:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))  # the command line knows how to leave quietly
    return 0 if view.found >= REQUIRED_RECALL * len(view.recalls) else 1
