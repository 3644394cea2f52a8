"""The gateways that the overhead bench compares: how each is started, and what it has used.

Promises: CPU time is the kernel's account of the gateway's own process and everything that it
started (all threads, workers, children that ended), in nanoseconds; nothing of the client or of the
upstream is in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from tests.bench.load import API_KEY
from tests.e2e.processes import ServerProcess, free_port, wait_for_health

REPO = Path(__file__).resolve().parents[2]
LITELLM = Path(os.environ.get("LITELLM_BENCH", "/root/bench-venv/bin/litellm"))
HEADROOM = Path(os.environ.get("HEADROOM_BENCH", "/root/bench-venv/bin/headroom"))
WINDOW_TOKENS = 32_000


def _tree(pid: int) -> list[int]:
    """The process and its living descendants."""
    out = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            for child in (task / "children").read_text().split():
                out += _tree(int(child))
    return out


def cpu_seconds(pid: int) -> float:
    """User and system time of a process tree so far.

    The living ones by their CPU clock (nanoseconds, all threads); children that have ended by the
    cutime and cstime of /proc/<pid>/stat (clock ticks).
    """
    total = 0.0
    tick = os.sysconf("SC_CLK_TCK")
    for p in _tree(pid):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, OSError):
            total += time.clock_gettime((~p << 3) | 2)  # CPUCLOCK_SCHED of another process
            fields = Path(f"/proc/{p}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[13]) + int(fields[14])) / tick
    return total


def rss_mb(pid: int) -> float:
    """Resident memory of a process tree."""
    pages = 0
    for p in _tree(pid):
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{p}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Process:
    """A subprocess in its own group, with its output in a file that is shown when it fails."""

    def __init__(self, name: str, port: int, command: list[str], env: dict[str, str]) -> None:
        self.name, self.port = name, port
        self._log = tempfile.NamedTemporaryFile(prefix=f"bench-{name}-", suffix=".log")  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            command,
            cwd=REPO,
            env={**os.environ, "PYTHONPATH": str(REPO), **env},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self, path: str, timeout_s: float) -> Self:
        try:
            wait_for_health(self.port, timeout_s, lambda: self._process.poll() is None, path)
        except Exception as e:
            log = Path(self._log.name).read_text(errors="replace")[-4000:]
            self.stop()
            raise RuntimeError(f"{self.name} did not start: {e}\n{log}") from e
        return self

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGTERM)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()


class Gateway:
    """A running gateway: `port`, `pid`, the model name to ask for, and `stop()`."""

    def __init__(self, name: str, process: Process | ServerProcess, model: str = "gpt-4o") -> None:
        self.name, self.process, self.model = name, process, model

    @property
    def port(self) -> int:
        return int(self.process.port)

    @property
    def pid(self) -> int:
        return self.process.pid

    def stop(self) -> None:
        self.process.stop()


def start_upstream() -> Process:
    port = free_port()
    command = [sys.executable, "-m", "tests.bench.upstream", str(port)]
    return Process("upstream", port, command, {}).wait("/", 30)


def start_ours(upstream_port: int, name: str = "ours", l2: Any = None, storage: Any = None) -> Gateway:
    """`llm-pager serve` with paging over a 32,000-token window and durable commits."""
    config = {
        "upstream": {"provider": "openai", "base_url": f"http://127.0.0.1:{upstream_port}/v1"},
        "tiers": {"l0": {"tokens": WINDOW_TOKENS}, "l2": l2 or {}},
        "storage": storage or {},
    }
    return Gateway(name, ServerProcess(config, env={"PYTHONHASHSEED": "0"}, forked=False).start())


def start_passthrough(upstream_port: int) -> Gateway:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "tests.bench.passthrough_app:app"]
    command += ["--port", str(port), "--loop", "uvloop", "--http", "httptools"]
    command += ["--no-access-log", "--log-level", "warning"]
    env = {"UPSTREAM_URL": f"http://127.0.0.1:{upstream_port}/v1"}
    return Gateway("passthrough", Process("passthrough", port, command, env).wait("/health", 30))


def start_litellm(upstream_port: int) -> list[Gateway]:
    """LiteLLM's proxy: one process, two models: its fastest provider and its default one.

    Raises FileNotFoundError when it is not installed.
    """
    if not LITELLM.exists():
        raise FileNotFoundError(
            f"LiteLLM's proxy is not in {LITELLM}: make a venv of its own for it, for example"
            " python3 -m venv /root/bench-venv && /root/bench-venv/bin/pip install"
            " 'litellm[proxy]', or set LITELLM_BENCH to its `litellm` command"
        )
    port, base = free_port(), f"http://127.0.0.1:{upstream_port}/v1"
    models = [
        {"model_name": name, "litellm_params": {"model": model, "api_base": base, "api_key": "k"}}
        for name, model in (("gpt-4o", "hosted_vllm/gpt-4o"), ("gpt-4o-default", "openai/gpt-4o"))
    ]
    config = {
        "model_list": models,
        "litellm_settings": {"telemetry": False, "num_retries": 0, "cache": False},
        "general_settings": {"disable_spend_logs": True, "disable_error_logs": True},
        "router_settings": {"num_retries": 0},
    }
    folder = Path(tempfile.mkdtemp(prefix="bench-litellm-"))
    (folder / "config.yaml").write_text(json.dumps(config))
    command = [str(LITELLM), "--config", str(folder / "config.yaml"), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--num_workers", "1", "--telemetry", "False"]
    env = {
        "LITELLM_MASTER_KEY": API_KEY,
        "LITELLM_LOG": "ERROR",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "NO_DOCS": "True",
        "PYTHONPATH": "",
    }
    process = Process("litellm", port, command, env).wait("/health/liveliness", 180)
    fastest = Gateway("litellm", process)
    return [fastest, Gateway("litellm openai/", process, "gpt-4o-default")]


def start_headroom(upstream_port: int) -> list[Gateway]:
    """headroom's proxy, its optimisations on, its cache, rate limit and retries off.

    Raises FileNotFoundError when it is not installed.
    """
    if not HEADROOM.exists():
        raise FileNotFoundError(
            f"headroom is not in {HEADROOM}: pip install 'headroom-ai[proxy]' in a venv of its own, and set"
            " HEADROOM_BENCH to its `headroom` command"
        )
    port = free_port()
    command = [str(HEADROOM), "proxy", "--port", str(port), "--no-cache", "--no-rate-limit"]
    command += ["--retry-max-attempts", "1", "--openai-api-url", f"http://127.0.0.1:{upstream_port}/v1"]
    env = {"HEADROOM_TELEMETRY": "off", "HEADROOM_NO_SUBSCRIPTION_TRACKING": "1", "HF_HUB_OFFLINE": "1",
           "DO_NOT_TRACK": "1", "PYTHONPATH": ""}  # fmt: skip
    return [Gateway("headroom", Process("headroom", port, command, env).wait("/livez", 120))]
