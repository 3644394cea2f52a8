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


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class ServerProcess:
    """`llm-pager serve` as a subprocess with its own configuration file.

    `config` has the sections of config.yaml; host and port are filled in. Use as a context manager.
    `kill()` is SIGKILL to the server and its workers, `restart()` starts it again on the same port
    and directories.
    """

    def __init__(
        self,
        config: dict[str, Any],
        *,
        workers: int = 1,
        env: dict[str, str] | None = None,
        python: str = sys.executable,
    ) -> None:
        self._dir = tempfile.TemporaryDirectory(prefix="llm-pager-e2e-")
        self.dir = Path(self._dir.name)
        self.port = config.get("server", {}).get("port") or free_port()
        server = {"host": "127.0.0.1", **config.get("server", {}), "port": self.port}
        l2 = {"path": str(self.dir / "data"), **config.get("tiers", {}).get("l2", {})}
        tiers = {**config.get("tiers", {}), "l2": l2}
        self.config = {**config, "server": server, "tiers": tiers}
        self._config_file = self.dir / "config.yaml"
        self._config_file.write_text(json.dumps(self.config))  # JSON is YAML
        self._log = self.dir / "server.log"
        self._command = [python, "-m", "proxy.cli", "serve", "--config", str(self._config_file)]
        if workers != 1:
            self._command += ["--workers", str(workers)]
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("LLM_PAGER_")}
        self._env = {**inherited, "PYTHONPATH": str(REPO), **(env or {})}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """Everything that the server wrote so far, over restarts."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def start(self, timeout_s: float = 60.0) -> ServerProcess:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self.dir,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            wait_for_health(self.port, timeout_s, lambda: self._process.poll() is None)  # type: ignore[union-attr]
        except Exception as e:
            self.kill()
            raise RuntimeError(f"llm-pager serve did not start: {e}\n{self.log[-6000:]}") from e
        return self

    restart = start

    def kill(self) -> None:
        """SIGKILL to the whole group: nothing gets a chance to finish."""
        self._signal(signal.SIGKILL)

    def stop(self, timeout_s: float = 20.0) -> None:
        """SIGTERM and wait; SIGKILL when it does not end in time."""
        self._signal(signal.SIGTERM, timeout_s)

    def _signal(self, number: int, timeout_s: float = 20.0) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def __enter__(self) -> ServerProcess:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self.stop()
        if kind is not None:
            print(f"--- log of llm-pager serve ---\n{self.log[-6000:]}", file=sys.stderr)
        self._dir.cleanup()


_FORKING = """
import os, signal, sys
import proxy.app, proxy.cli, uvicorn
from proxy.tokens import get_counter
get_counter("house-model").text("loaded")
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children that were killed leave no zombies
for line in sys.stdin:
    if (pid := os.fork()) == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(2, 1)
        os._exit(proxy.cli.main(["serve", "--config", sys.argv[1]]))
    print(pid, flush=True)
"""


class ForkedServer(ServerProcess):
    """A server that starts again in a moment: each start is a fork of a process that has imported
    everything. For tests that kill it often."""

    _parent: subprocess.Popen[str] | None = None
    _child = 0

    @property
    def pid(self) -> int:
        return self._child

    def start(self, timeout_s: float = 60.0) -> ForkedServer:
        if self._parent is None:
            command = [self._command[0], "-c", _FORKING, str(self._config_file)]
            with self._log.open("ab") as log:
                self._parent = subprocess.Popen(
                    command, cwd=self.dir, env=self._env, stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE, stderr=log, start_new_session=True, text=True,
                )  # fmt: skip
        assert self._parent.stdin and self._parent.stdout
        self._parent.stdin.write("start\n")
        self._parent.stdin.flush()
        self._child = int(self._parent.stdout.readline())
        wait_for_health(self.port, timeout_s, lambda: Path(f"/proc/{self._child}").exists())
        return self

    restart = start

    def _signal(self, number: int, timeout_s: float = 20.0) -> None:
        child, self._child = self._child, 0
        if child:
            os.kill(child, number)
            deadline = time.monotonic() + timeout_s
            while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
                time.sleep(0.005)  # another process's child: nothing to wait on

    def stop(self, timeout_s: float = 20.0) -> None:
        super().stop(timeout_s)
        if self._parent is not None:
            self._parent.communicate(timeout=timeout_s)  # no more to start: it ends
            self._parent = None


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
        time.sleep(0.05)  # another process: there is no event to wait for
    raise TimeoutError(f"no answer from {path} within {timeout_s:.0f} s")


@contextlib.contextmanager
def in_process_server(config: dict[str, Any], observer: Any = None) -> Iterator[str]:
    """The app under uvicorn in a thread of this process; yields its base URL (ending in /v1)."""
    import uvicorn

    from proxy.app import create_app
    from proxy.config import load_config

    with tempfile.TemporaryDirectory(prefix="llm-pager-e2e-") as folder:
        l2 = {"path": str(Path(folder) / "data"), **config.get("tiers", {}).get("l2", {})}
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
