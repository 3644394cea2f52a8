"""The real server, as a process that can be killed and as a thread that starts quickly.

Promises: `ServerProcess` runs `llm-pager serve` as its users do, in its own process group, and can
be killed with SIGKILL and started again on the same directory and port; `in_process_server` runs
the same app under uvicorn in a thread of the test.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.e2e.data import REPO
from tests.services import store_url


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago, and is none that the kernel gives to outgoing connections."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


_FORKING = """
import contextlib, faulthandler, gc, importlib, json, multiprocessing, os, signal, sys, tempfile
import encodings.idna, pydantic.v1  # FastAPI's, with its first route
import asyncpg, cryptography.hazmat.primitives.ciphers.aead, obstore, proxy.storage.postgres  # of some servers
import proxy.app, proxy.cli, proxy.serve, proxy.upstream.openai, uvicorn._subprocess, uvicorn.lifespan.on, uvicorn.loops.uvloop
from proxy.search.terms import languages_of
from proxy.tokens import load
load()
languages_of()
proxy.cli._command()
for name in sys.argv[1:]:
    importlib.import_module(name)
gc.collect()
gc.freeze()  # nothing of this is looked at again, or copied
uvicorn._subprocess.spawn = multiprocessing.get_context("fork")  # workers, too, have everything
logs = {}

def ended(*_):
    # Children leave no zombies, but a line in the log of one that nobody killed.
    with contextlib.suppress(ChildProcessError):
        while (child := os.waitpid(-1, os.WNOHANG))[0]:
            path = logs.pop(child[0], None)
            if path and child[1] != signal.SIGKILL:
                how = os.waitstatus_to_exitcode(child[1])
                log = os.open(path, os.O_WRONLY | os.O_APPEND)
                os.write(log, f"[ended with status {how}]\\n".encode())
                os.close(log)

signal.signal(signal.SIGCHLD, ended)
for line in sys.stdin:
    if (pid := os.fork()) == 0:
        asked = json.loads(line)
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(asked["env"])
        tempfile.tempdir = None
        os.chdir(asked["dir"])
        log = os.open(asked["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for fd, at in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(fd, at)
        faulthandler.enable()
        os._exit(proxy.cli.main(asked["arguments"]))
    logs[pid] = json.loads(line)["log"]
    print(pid, flush=True)
"""


class _Nursery:
    """Starts servers in a moment: each is a fork of one process that has imported everything, and these `modules`. `env`:
    what an import asks for."""

    def __init__(self, env: dict[str, str], *modules: str) -> None:
        self._env, self._modules = env, modules
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def start(self, arguments: list[str], directory: Path, log: Path, env: dict[str, str]) -> int:
        """The process id of `llm-pager` with these arguments, in a session of its own."""
        with self._lock:
            if self._process is None:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _FORKING, *self._modules], env={**_environment(), **self._env}, text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                )  # fmt: skip
            assert self._process.stdin and self._process.stdout
            asked = {"arguments": arguments, "dir": str(directory), "log": str(log), "env": env}
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            return int(self._process.stdout.readline())


# They end with this process: their standard input does. prometheus-client counts in files if it is imported with a folder.
_single = _Nursery({})
_several = _Nursery({"PROMETHEUS_MULTIPROC_DIR": os.devnull})
_with_litellm = _Nursery({"LITELLM_LOCAL_MODEL_COST_MAP": "True"}, "litellm", "litellm.llms.custom_httpx.http_handler")


def _environment() -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("LLM_PAGER_")}
    return {**inherited, "PYTHONPATH": str(REPO)}


def _stored(l2: dict[str, Any]) -> dict[str, Any]:
    """The settings of L2, on the store that this test has (tests/services.py)."""
    if "url" not in l2 and (url := store_url(l2["path"])) is not None:
        return {**l2, "url": url}
    return l2


class ServerProcess:
    """`llm-pager serve` as a process of its own with its own configuration file.

    `config` has the sections of config.yaml; host and port are filled in. Use as a context manager.
    `kill()` is SIGKILL to the server and its workers, `restart()` starts it again on the same port
    and directories. It and its workers are forked from a process that has imported everything already; with `forked`
    False, or another `python`, it is started as its users do.
    """

    def __init__(
        self,
        config: dict[str, Any],
        *,
        workers: int = 1,
        env: dict[str, str] | None = None,
        python: str = sys.executable,
        forked: bool = True,
    ) -> None:
        self._dir = tempfile.TemporaryDirectory(prefix="llm-pager-e2e-")
        self.dir = Path(self._dir.name)
        self.port = config.get("server", {}).get("port") or free_port()
        server = {"host": "127.0.0.1", "drain_s": 0, "drain_answers_s": 3, **config.get("server", {}), "port": self.port}
        l2 = _stored({"path": str(self.dir / "data"), **config.get("tiers", {}).get("l2", {})})
        tiers = {**config.get("tiers", {}), "l2": l2}
        self.config = {**config, "server": server, "tiers": tiers}
        self._config_file = self.dir / "config.yaml"
        self._config_file.write_text(json.dumps(self.config))  # JSON is YAML
        self._log = self.dir / "server.log"
        self._arguments = ["serve", "--config", str(self._config_file)]
        if workers != 1:
            self._arguments += ["--workers", str(workers)]
        self._env = {**_environment(), **(env or {})}
        self._python = python
        single = _with_litellm if config.get("upstream", {}).get("provider") == "litellm" else _single
        self._nursery = (single if workers == 1 else _several) if forked and python == sys.executable else None
        self._process: subprocess.Popen[bytes] | None = None
        self._pid = 0

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def pid(self) -> int:
        assert self._pid
        return self._pid

    @property
    def worker_pids(self) -> list[int]:
        """Of the workers that live, in the order of their start, without multiprocessing's own helper."""
        with contextlib.suppress(OSError):
            children = map(int, Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split())
            lines = {child: _command_line(child) for child in children}
            return [child for child, line in lines.items() if line and b"resource_tracker" not in line]
        return []

    @property
    def log(self) -> str:
        """Everything that the server wrote so far, over restarts."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def start(self, timeout_s: float = 60.0) -> ServerProcess:
        if self._nursery is not None:
            self._pid = self._nursery.start(self._arguments, self.dir, self._log, self._env)
        else:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    [self._python, "-m", "proxy.cli", *self._arguments],
                    cwd=self.dir,
                    env=self._env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self._pid = self._process.pid
        try:
            wait_for_health(self.port, timeout_s, self._alive)
        except Exception as e:
            self.kill()
            raise RuntimeError(f"llm-pager serve did not start: {e}\n{self.log[-6000:]}") from e
        return self

    restart = start

    def _alive(self) -> bool:
        if self._process is not None:
            return self._process.poll() is None
        return Path(f"/proc/{self._pid}").exists()

    def kill(self) -> None:
        """SIGKILL to the whole group: nothing gets a chance to finish."""
        self._signal(signal.SIGKILL)

    def stop(self, timeout_s: float = 20.0) -> None:
        """SIGTERM and wait; SIGKILL when it does not end in time."""
        self._signal(signal.SIGTERM, timeout_s)

    def _signal(self, number: int, timeout_s: float = 20.0) -> None:
        if not self._pid:
            return
        for signum in (number, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, signum)
            deadline = time.monotonic() + timeout_s
            while self._alive() and time.monotonic() < deadline:
                time.sleep(0.005)  # perhaps another process's child: nothing to wait on
            if not self._alive():
                break
        self._pid, self._process = 0, None

    def __enter__(self) -> ServerProcess:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self.stop()
        if kind is not None:
            print(f"--- log of llm-pager serve ---\n{self.log[-6000:]}", file=sys.stderr)
        self._dir.cleanup()


def _command_line(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@contextlib.contextmanager
def together(*servers: ServerProcess) -> Iterator[tuple[ServerProcess, ...]]:
    """Several servers, which start at the same time: most of a start is Python's imports."""
    with contextlib.ExitStack() as running, ThreadPoolExecutor(len(servers)) as pool:
        for entered in [pool.submit(running.enter_context, server) for server in servers]:
            entered.result()
        yield servers


def wait_for_health(
    port: int, timeout_s: float, alive: Callable[[], bool], path: str = "/health"
) -> None:
    """Polls until the path answers 200; raises TimeoutError, or RuntimeError when not `alive`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if not alive():
            raise RuntimeError("the process ended")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", path)
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass  # not listening yet
        finally:
            connection.close()
        time.sleep(0.01)  # another process: there is no event to wait for
    raise TimeoutError(f"no answer from {path} within {timeout_s:.0f} s")


@contextlib.contextmanager
def in_process_server(config: dict[str, Any], observer: Any = None) -> Iterator[str]:
    """The app under uvicorn in a thread of this process; yields its base URL (ending in /v1)."""
    import uvicorn

    from proxy.app import create_app
    from proxy.config import load_config

    with tempfile.TemporaryDirectory(prefix="llm-pager-e2e-") as folder:
        l2 = _stored({"path": str(Path(folder) / "data"), **config.get("tiers", {}).get("l2", {})})
        effective = {**config, "tiers": {**config.get("tiers", {}), "l2": l2}}
        file = Path(folder) / "config.yaml"
        file.write_text(json.dumps(effective))
        app = create_app(load_config(file, {}, {}), observer=observer)
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        server = uvicorn.Server(
            uvicorn.Config(app, loop="uvloop", http="httptools", log_level="warning")
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            wait_for_health(port, 60, thread.is_alive)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.should_exit = True
            thread.join(20)
            listener.close()
