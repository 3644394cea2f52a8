"""The gateways that the suite can start, each in front of one upstream port.

Promises: other people's gateways run from virtual environments of their own under CACHE, made by
`python -m tests.contract.gateways install`; what is missing is said and never fetched by a test.
Each is configured as its manual says for an OpenAI-compatible upstream, retries and caches off. There is no
`billion-context`, neither on PyPI nor on npm (November 2026).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import venv
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from tests.contract.play import WINDOW_TOKENS, Target
from tests.contract.scripted import SIDE_MODEL, ScriptedUpstream
from tests.contract.wires import Wire
from tests.contract.wires.anthropic import AnthropicWire
from tests.contract.wires.gemini import GeminiWire
from tests.contract.wires.responses import ResponsesWire
from tests.e2e.processes import ServerProcess, free_port, together, wait_for_health

CACHE = Path(os.environ.get("CONTRACT_GATEWAYS", "~/.cache/llm-pager-contract")).expanduser()
PACKAGES = {
    "litellm": "litellm[proxy]",
    "headroom": "headroom-ai[proxy]",
    "virtual-context": "virtual-context[proxy]",
    "ctxkeeper": "ctxkeeper",
}
ALIASES = {"virtual": "virtual-context", "virtual_context": "virtual-context"}
KEEPALIVE_S = 0.2
CHANNEL_HEADER = "x-llm-pager-channel"
WIRES: dict[str, Callable[[], Wire]] = {
    "openai": Wire, "responses": ResponsesWire, "anthropic": AnthropicWire, "gemini": GeminiWire,
}
MODELS = {  # at each provider that is called through litellm: a model, and where its API begins
    "anthropic": ("anthropic/claude-sonnet-4-5", "http://127.0.0.1:{port}"),
    "gemini": ("gemini/gemini-3-pro-preview", "http://127.0.0.1:{port}/v1beta"),
}
_SMALL_WINDOW: dict[str, Any] = {
    "tiers": {"l0": {"tokens": WINDOW_TOKENS, "reserve_tokens": 1000}},
    "pages": {"max_tokens": 256},
    "manifest": {"max_tokens": 300},
    "prefetch": {"max_pages": 2, "max_tokens": 300},
    "stream": {"keepalive_s": KEEPALIVE_S},
}
PAGE_ARGUMENTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("search_pages", {"query": "depot 3"}),
    ("page_fault", {"page_id": "msg_0001"}),
)


VC_WINDOW_TOKENS = 8000  # its own tools take about 1,700
_VC_ARGUMENTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("vc_find_quote", {"query": "depot 3"}),
    ("vc_expand_topic", {"tag": "depot"}),
)


CK_WINDOW_TOKENS = 5000  # of which 1,000 are its reserve for the answer
_CK_ARGUMENTS: tuple[tuple[str, dict[str, Any]], ...] = (("recall", {"pattern": "depot 3"}),)


class NotInstalled(Exception):
    """The gateway has no virtual environment here."""


class Process:
    """A subprocess in a group and a folder of its own, its output in a file."""

    def __init__(self, name: str, port: int, command: list[str], env: dict[str, str]) -> None:
        self.name, self.port, self._command, self._env = name, port, command, env
        self._dir = tempfile.TemporaryDirectory(prefix=f"contract-{name}-")
        self.dir = Path(self._dir.name)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return (self.dir / "log").read_text(errors="replace")

    def start(self, path: str, timeout_s: float) -> Self:
        """Returns when `path` answers 200. Raises RuntimeError with the log's end."""
        inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OPENAI_API_KEY")}
        with (self.dir / "log").open("ab") as log:
            process = self._process = subprocess.Popen(
                self._command, cwd=self.dir, env={**inherited, "HOME": str(self.dir), **self._env},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )
        try:
            wait_for_health(self.port, timeout_s, lambda: process.poll() is None, path)
        except Exception as e:
            text = self.log[-3000:]
            self.stop()
            raise RuntimeError(f"{self.name} did not start: {e}\n{text}") from e
        return self

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._dir.cleanup()


def command(name: str, script: str) -> str:
    """The path of a gateway's command. Raises NotInstalled."""
    path = CACHE / name / "bin" / script
    if not path.exists():
        raise NotInstalled(
            f"{name} is not in {CACHE}: python -m tests.contract.gateways install"
        )
    return str(path)


def upstream_of(name: str) -> ScriptedUpstream:
    """The upstream that stands behind a gateway, not yet started. `llm-pager/anthropic` is ours in
    front of a server that speaks Anthropic's protocol. Raises KeyError."""
    _, _, wire = name.partition("/")
    return ScriptedUpstream(wire=WIRES[wire or "openai"]())


@contextlib.asynccontextmanager
async def started(name: str, upstream_port: int) -> AsyncIterator[Target]:
    """A gateway by its name. Raises NotInstalled, RuntimeError, KeyError."""
    base = f"http://127.0.0.1:{upstream_port}/v1"
    if name == "bare":
        yield Target(name, base, base, proxy=False)
        return
    make = {"llm-pager": _llm_pager, **PROVIDERS, **_OTHERS}[ALIASES.get(name, name)]
    with contextlib.ExitStack() as running:
        yield await asyncio.to_thread(make, upstream_port, running)


def _llm_pager(upstream_port: int, running: contextlib.ExitStack) -> Target:
    """Two servers: one as it comes, one with a small window."""
    upstream = {"upstream": {"base_url": f"http://127.0.0.1:{upstream_port}/v1"}}
    servers = together(ServerProcess(upstream), ServerProcess({**upstream, **_SMALL_WINDOW}))
    plain, small = running.enter_context(servers)
    return _ours("llm-pager", plain.base_url, small.base_url)


def _ours(name: str, base_url: str, paged_url: str, model: str = "gpt-4o") -> Target:
    return Target(
        name, base_url, paged_url, model, loops=True, window_tokens=WINDOW_TOKENS,
        keepalive_s=KEEPALIVE_S, arguments=PAGE_ARGUMENTS,
        channel_header=CHANNEL_HEADER,
    )


def _llm_pager_at(wire: str, upstream_port: int, running: contextlib.ExitStack) -> Target:
    """In front of another provider, through litellm. One server, whose window is small: what fits
    goes by it unchanged, and importing litellm takes seconds."""
    model, base = MODELS[wire]
    upstream = {"provider": "litellm", "base_url": base.format(port=upstream_port)}
    roomy = {"l0": {"tokens": WINDOW_TOKENS, "reserve_tokens": 600}}  # some bill a prompt of their own
    server = ServerProcess({"upstream": upstream, **_SMALL_WINDOW, "tiers": roomy})
    url = running.enter_context(server).base_url
    return _ours(f"llm-pager/{wire}", url, url, model)


def _llm_pager_bridged(upstream_port: int, running: contextlib.ExitStack) -> Target:
    """Over the upstream's /v1/responses; one server, as above."""
    bridged = {
        "upstream": {"provider": "openai", "base_url": f"http://127.0.0.1:{upstream_port}/v1"},
        "models": {"gpt-4o": {"bridge": "responses"}},
    }
    url = running.enter_context(ServerProcess({**bridged, **_SMALL_WINDOW})).base_url
    return _ours("llm-pager/responses", url, url)


def _litellm(upstream_port: int, running: contextlib.ExitStack, wire: str = "openai") -> Target:
    model, base = MODELS.get(wire, ("openai/gpt-4o", "http://127.0.0.1:{port}/v1"))
    called, port = model.removeprefix("openai/"), free_port()
    parameters = {"model": model, "api_base": base.format(port=upstream_port), "api_key": "sk-gateway"}
    # Models that it does not know by name: upstream is asked under the same one.
    anything = {**parameters, "model": "openai/*"}
    others = [{"model_name": "*", "litellm_params": anything}] if wire == "openai" else []
    config = {
        "model_list": [{"model_name": called, "litellm_params": parameters}, *others],
        "litellm_settings": {"telemetry": False, "num_retries": 0, "cache": False},
        "general_settings": {"disable_spend_logs": True, "disable_error_logs": True,
                             "forward_client_headers_to_llm_api": True},
        "router_settings": {"num_retries": 0, "disable_cooldowns": True},
    }
    folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="contract-litellm-")))
    (folder / "config.yaml").write_text(json.dumps(config))
    line = [command("litellm", "litellm"), "--config", str(folder / "config.yaml")]
    line += ["--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    line += ["--telemetry", "False"]
    env = {"LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # every play has its own key
           "LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_DOCS": "True"}
    target = _run(Process("litellm", port, line, env), "/health/liveliness", 180, running)
    return replace(target, model=called)


def _headroom(upstream_port: int, running: contextlib.ExitStack) -> Target:
    """Its optimisations on, its semantic cache, rate limit and retries off."""
    port = free_port()
    line = [command("headroom", "headroom"), "proxy", "--port", str(port), "--no-cache"]
    line += ["--no-rate-limit", "--retry-max-attempts", "1"]
    line += ["--openai-api-url", f"http://127.0.0.1:{upstream_port}/v1"]
    line += ["--anthropic-api-url", f"http://127.0.0.1:{upstream_port}"]
    env = {"HEADROOM_TELEMETRY": "off", "HEADROOM_NO_SUBSCRIPTION_TRACKING": "1",
           "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    return _run(Process("headroom", port, line, env), "/livez", 120, running)


def _virtual_context(upstream_port: int, running: contextlib.ExitStack) -> Target:
    """Two servers, as ours: its production preset's window, and a small one."""
    plain = _virtual_context_with(200_000, upstream_port, running)
    small = _virtual_context_with(VC_WINDOW_TOKENS, upstream_port, running)
    return replace(plain, paged_url=small.base_url, loops=True, arguments=_VC_ARGUMENTS)


def _virtual_context_with(
    window_tokens: int, upstream_port: int, running: contextlib.ExitStack
) -> Target:
    port, origin = free_port(), f"http://127.0.0.1:{upstream_port}"
    tool = command("virtual-context", "virtual-context")
    folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="contract-vc-")))
    config = {
        "version": "0.2", "storage_root": str(folder), "context_window": window_tokens,
        "storage": {"backend": "sqlite", "sqlite": {"path": str(folder / "store.db")}},
        "tag_generator": {"type": "keyword"},
        "summarization": {"provider": "local", "model": SIDE_MODEL},
        "providers": {"local": {"type": "generic_openai", "base_url": f"{origin}/v1"}},
        "paging": {"enabled": True},
        "telemetry": {"enabled": False},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    line = [tool, "--config", str(folder / "config.yaml"), "proxy", "--upstream", origin]
    line += ["--port", str(port), "--host", "127.0.0.1"]
    env = {"HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "sk-gateway"}
    return _run(Process("virtual-context", port, line, env), "/health", 120, running)


def _ctxkeeper(upstream_port: int, running: contextlib.ExitStack) -> Target:
    """Two servers, as ours: the window that it has by itself, and a small one."""
    plain = _ctxkeeper_with([], upstream_port, running)
    small = ["--budget", str(CK_WINDOW_TOKENS), "--reply-reserve", "1000"]
    paged_url = _ctxkeeper_with(small, upstream_port, running).base_url
    return replace(plain, paged_url=paged_url, loops=True, arguments=_CK_ARGUMENTS)


def _ctxkeeper_with(
    options: list[str], upstream_port: int, running: contextlib.ExitStack
) -> Target:
    port, origin = free_port(), f"http://127.0.0.1:{upstream_port}"
    folder = running.enter_context(tempfile.TemporaryDirectory(prefix="contract-ctxkeeper-"))
    line = [command("ctxkeeper", "ctxkeeper"), "--upstream", origin, "--port", str(port), *options]
    line += ["--host", "127.0.0.1", "--state-dir", folder, "--upstream-retries", "0"]
    line += ["--notes-upstream", origin, "--notes-model", SIDE_MODEL]
    return _run(Process("ctxkeeper", port, line, {}), "/ctxkeeper/status", 60, running)


def _run(
    process: Process, path: str, timeout_s: float, running: contextlib.ExitStack
) -> Target:
    running.callback(process.stop)
    process.start(path, timeout_s)
    url = f"http://127.0.0.1:{process.port}/v1"
    return Target(process.name, url, url)


PROVIDERS: dict[str, Callable[[int, contextlib.ExitStack], Target]] = {
    "llm-pager/responses": _llm_pager_bridged,
    **{f"llm-pager/{wire}": partial(_llm_pager_at, wire) for wire in MODELS},
}
_OTHERS: dict[str, Callable[[int, contextlib.ExitStack], Target]] = {
    "litellm": _litellm,
    **{f"litellm/{wire}": partial(_litellm, wire=wire) for wire in MODELS},
    "headroom": _headroom,
    "virtual-context": _virtual_context,
    "ctxkeeper": _ctxkeeper,
}


def install() -> None:
    """Makes the virtual environments that are missing. Raises CalledProcessError."""
    for name, package in PACKAGES.items():
        folder = CACHE / name
        if not (folder / "bin" / "pip").exists():
            venv.create(folder, with_pip=True)
        print(f"{name}: pip install {package} into {folder}", flush=True)
        subprocess.run([folder / "bin" / "pip", "install", "--quiet", package], check=True)


if __name__ == "__main__":
    if sys.argv[1:] != ["install"]:
        raise SystemExit("usage: python -m tests.contract.gateways install")
    install()
