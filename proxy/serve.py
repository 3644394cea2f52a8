"""`llm-pager serve`: what has to hold before the server starts, its sockets, its workers; `llm-pager check`: the same without it.

Promises: what the configuration or the machine does not let work is said in one sentence before a port listens: a worker that
cannot start would die with a traceback and be started again.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from proxy import __version__
from proxy.config import EFFECTIVE_CONFIG_VARIABLE, Config, load_config, require_keys
from proxy.config_text import MASK
from proxy.errors import StartError, StorageError
from proxy.readable import url_of

APP_FACTORY = "proxy.app:app_from_env"
BACKLOG_CONNECTIONS = 2048
# Clients keep idle connections for 5 to 60 s; closing first would race with their next request.
KEEP_ALIVE_S = 75
# The kernel takes megabytes for a client that does not read: so much beyond what is on its way to it, and no more.
UNSENT_BYTES = 32_768
_TCP_NOTSENT_LOWAT = {"linux": 25, "darwin": 0x201}  # linux/tcp.h, netinet/tcp.h; Python has names from 3.12 on
_METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # prometheus-client's own


def check(config: Config, as_json: bool) -> int:
    """Prints the effective configuration as YAML, secrets masked, with notes as comments. Raises ConfigError and
    StartError; a storage directory that is not there yet is not made."""
    import yaml

    from proxy.storage.sqlite import DATABASE

    if as_json:
        from proxy.terminal import tell_json

        tell_json({"notes": config.notes(), "config": config.masked()})
    else:
        for note in config.notes():
            print(f"# note: {note}")
        text = yaml.safe_dump(config.masked(), sort_keys=False, allow_unicode=True)
        if MASK in text:
            print(f"# note: {MASK} stands for a secret; before this is used as a file, the secrets have to be in it again.")
        print(text, end="")
    _require_extra(config)
    require_keys(config)
    if config.tiers.l2.url is not None or (config.tiers.l2.path / DATABASE).exists():
        _require_a_sound_store(config)
    return 0


def serve(file: Path | None, flags: Mapping[str, Any], workers: int, as_json: bool) -> int:
    """Runs the server until SIGTERM or SIGINT; `flags`: settings by their keys. Raises ConfigError or StartError before that."""
    config = load_config(file, os.environ, flags)
    _require_extra(config)
    require_keys(config)
    if config.tiers.l2.url is None or config.tiers.l3.url is None:
        _require_writable(config.tiers.l2.path)
    _require_a_sound_store(config)
    listener = _listen(config.server.host, config.server.port)
    # The only ways to a spawned worker are its arguments, which everybody can list, and its
    # environment, which only its owner can read.
    os.environ[EFFECTIVE_CONFIG_VARIABLE] = config.model_dump_json()
    _announce(config, listener, workers, as_json)
    with listener, _shared_counters(workers):
        return _run(listener, workers, config.server.drain_answers_s)


@contextmanager
def _shared_counters(workers: int) -> Iterator[None]:
    """Where several workers keep their counts, so that any of them can tell all (GET /metrics)."""
    if workers == 1:
        os.environ.pop(_METRICS_VARIABLE, None)  # somebody else's
        yield
        return
    with tempfile.TemporaryDirectory(prefix="llm-pager-metrics-", ignore_cleanup_errors=True) as path:
        os.environ[_METRICS_VARIABLE] = path
        yield


def _require_extra(config: Config) -> None:
    """Looks, and imports nothing: a worker that cannot would die with a traceback and be started again."""
    asked = {
        "search.embeddings": (config.search.embeddings != "none", "semantic", ("numpy", "tokenizers", "wordllama")),
        "storage.encryption.key_store": ("://" in (config.storage.encryption.key_store or ""), "postgres", ("asyncpg", "greenlet")),
        "tiers.l2.url": (config.tiers.l2.url is not None, "postgres", ("asyncpg", "greenlet")),
        "tiers.l3.url": (config.tiers.l3.url is not None, "objects", ("obstore", "greenlet")),
        "storage.encryption.keys": (bool(config.storage.encryption.keys), "encryption", ("cryptography",)),
        "tiers.l4.url": (config.tiers.l4.url is not None, "objects", ("obstore", "greenlet")),
    }
    for key, (is_asked, extra, modules) in asked.items():
        if is_asked and not all(map(find_spec, modules)):
            raise StartError(f"{key} needs an extra that is not installed: pip install 'llm-pager[{extra}]'.")


def _require_writable(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise StartError(f"{directory.absolute()} is not a directory; set tiers.l2.path to one that can be written.")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"\0")
            probe.flush()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            return  # it is served without memory until it can be written: the log says so
        raise StartError(
            f"The state directory {directory.absolute()} cannot be written: {error.strerror}; "
            "set tiers.l2.path to one that can."
        ) from error


def _require_a_sound_store(config: Config) -> None:
    """Opens L2 once, here: a worker that cannot would die with a traceback and be started again."""
    from proxy.storage import open_store

    try:
        asyncio.run(open_store(config).close())
    except StorageError as error:
        raise StartError(str(error)) from error


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket: from here on clients wait for the workers instead of being refused."""
    where = f"{host}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartError(f"server.host {host} is no address of this machine: {error}.") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if (lowat := _TCP_NOTSENT_LOWAT.get(sys.platform)) is not None:  # connections have it from the listener
            listener.setsockopt(socket.IPPROTO_TCP, lowat, UNSENT_BYTES)
        listener.bind(address)
        listener.listen(BACKLOG_CONNECTIONS)
        listener.set_inheritable(True)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            sentence = f"Port {port} on {host} is already in use; choose another with --port."
        else:
            sentence = f"Listening on {where} is refused: {error.strerror}."
        raise StartError(sentence) from error
    return listener


def _announce(config: Config, listener: socket.socket, workers: int, as_json: bool) -> None:
    """What a person needs who has just started it, key and value a line; or a program, as one line of JSON."""
    host, port = listener.getsockname()[:2]
    url = url_of(host, port)
    shown = config.masked()["upstream"]
    upstream = shown["base_url"] if config.upstream.provider == "openai" else shown["provider"]
    listening = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if config.upstream.provider != "demo":
        upstream += ", with its own key" if config.upstream.api_key else ", with each client's key"
    tokens, data = config.tiers.l0.tokens, config.masked()["tiers"]["l2"]["url"] or str(config.tiers.l2.path.absolute())
    if as_json:
        told = {"version": __version__, "base_url": f"{url}/v1", "dashboard": f"{url}/vm/ui", "listening": listening, "workers": workers,
                "upstream": upstream, "window_tokens": tokens, "mode": config.memory.mode, "data": data}  # fmt: skip
        print(json.dumps(told), flush=True)
    else:
        window = "each model's own" if tokens == "auto" else f"{tokens} tokens"
        processes = "1 worker" if workers == 1 else f"{workers} workers"
        print(
            f"llm-pager {__version__}\n"
            f"  use it     export OPENAI_BASE_URL={url}/v1\n"
            f"  look in    {url}/vm/ui\n"
            f"  listening  {listening}, {processes}\n"
            f"  upstream   {upstream}\n"
            f"  window     {window} (tiers.l0.tokens), mode {config.memory.mode}\n"
            f"  data       {data}\n"
            f"  counters   {url}/metrics, {url}/vm/stats",
            flush=True,
        )
    for note in config.notes():
        print(f"note: {note}", file=sys.stderr, flush=True)


def _run(listener: socket.socket, workers: int, drain_answers_s: int) -> int:
    import uvicorn
    from uvicorn.supervisors import Multiprocess

    settings = uvicorn.Config(
        APP_FACTORY, factory=True, workers=workers, loop="uvloop" if sys.platform != "win32" else "asyncio",
        http="proxy.server:Protocol", ws="none", lifespan="on", log_level="warning", access_log=False,
        proxy_headers=False, server_header=False, date_header=False, backlog=BACKLOG_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=drain_answers_s,
    )  # fmt: skip
    if workers > 1:
        gc.enable()

        class Supervisor(Multiprocess):
            def terminate_all(self) -> None:
                super().terminate_all()
                listener.close()  # the last worker's end of it closes the port: nobody waits behind it for the end

        supervisor = Supervisor(settings, sockets=[listener])
        supervisor.run()
        failed = any(process.exitcode not in (0, None, -15) for process in supervisor.processes)
        return 1 if failed else 0
    # uvicorn stops gracefully, then hands the signal on: to us, and being asked to stop is success.
    for asked in (signal.SIGTERM, signal.SIGINT):
        signal.signal(asked, lambda *_: sys.exit(0))
    server = uvicorn.Server(settings)
    server.run(sockets=[listener])
    return 0 if server.started else 1
