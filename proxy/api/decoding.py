"""Media decoded in processes of their own, which can be killed: a few, started when a medium has to be decoded.

Promises: the server loads no codec; a job has the bytes, pixels, memory, CPU and seconds that `decoders` in the
configuration names, and is killed where it takes more; a request waits `wait_s` for all its media (`Patience`); a
job that nobody waits for any more ends; tenants take turns. What was not decoded because of
what it is (broken, hostile, too large) is a result ({}), which the caller keeps.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import struct
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from contextlib import suppress
from typing import Any

from proxy.api.pool import Turns
from proxy.config import Config
from proxy.conversation.tree import TenantKey
from proxy.media.decoders import Codec

log = logging.getLogger(__name__)

_LEAST_WAIT_S = 0.01  # with less, nothing comes of it
_LARGEST_RESULT_BYTES = 16 << 20  # more is none of ours


class Killed(Exception):
    """A process had no answer after `timeout_s`: because of the medium, or because the machine is busy."""


class Patience:
    """How long a request still waits for its media. As a context: one wait, TimeoutError at its end."""

    def __init__(self, wait_s: float) -> None:
        self.left_s = wait_s
        self._until: asyncio.Timeout | None = None

    async def __aenter__(self) -> None:
        if self.left_s < _LEAST_WAIT_S:
            raise TimeoutError
        self._until = asyncio.timeout(self.left_s)
        await self._until.__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        assert self._until is not None
        ends_s = self._until.when() or 0.0
        self.left_s = ends_s - asyncio.get_running_loop().time()
        await self._until.__aexit__(*error)


class Decoders:
    """One per server process."""

    def __init__(self, config: Config) -> None:
        self._config = config.decoders
        self._turns = Turns(self._config.processes, self._config.queue_jobs)
        self._idle: list[Process] = []
        self._retiring: asyncio.TimerHandle | None = None

    async def decode(self, tenant: TenantKey, codec: Codec, data: bytes) -> dict[str, Any] | None:
        """See `proxy.media.decoders.decode`; None: not now, because too many wait, or no process starts.
        Raises Killed."""
        if len(data) > self._config.input_bytes:
            return {}
        if not await self._turns.take(tenant):
            return None
        try:
            return await self._run(codec, data)
        finally:
            self._turns.give(tenant)

    @property
    def waiting(self) -> int:
        return self._turns.waiting

    async def close(self) -> None:
        """End the processes that wait for a job; those with one end with it."""
        if self._retiring is not None:
            self._retiring.cancel()
        idle = [*self._idle]
        self._retire()
        for process in idle:
            await process.wait()

    async def _run(self, codec: Codec, data: bytes) -> dict[str, Any] | None:
        process = await self._process()
        if process is None:
            return None
        answered = False
        try:
            async with asyncio.timeout(self._config.timeout_s):
                result = await _answer(process, codec, data)
            answered = True
        except TimeoutError:
            raise Killed(f"a medium ({codec}, {len(data)} bytes) took more than {self._config.timeout_s:g} seconds") from None
        except (OSError, EOFError, ValueError, struct.error):
            if await process.wait() > 0:  # no signal ended it: it did, by itself
                log.error("a process that decodes media fails: %s -m proxy.decoder", sys.executable)
                return None
            log.warning("a medium (%s, %d bytes) cannot be decoded within its limits", codec, len(data))
            result = {}
        finally:
            if answered:
                self._idle.append(process)
                self._retire_later()
            else:  # it hangs, or nobody waits for it
                _end(process)
        return result

    async def _process(self) -> Process | None:
        """One that waits for a job; None when none can be started."""
        while self._idle:
            process = self._idle.pop()
            if process.returncode is None:
                return process
        limits = {
            "pixels": self._config.pixels, "memory_bytes": self._config.memory_bytes, "cpu_s": self._config.cpu_s,
        }  # fmt: skip
        try:
            return await asyncio.create_subprocess_exec(
                sys.executable, "-m", "proxy.decoder", json.dumps(limits), stdin=PIPE, stdout=PIPE, stderr=DEVNULL,
                env=_environment(), limit=_LARGEST_RESULT_BYTES,
            )
        except OSError as error:
            log.warning("no process to decode a medium in can be started: %s", error)
            return None

    def _retire_later(self) -> None:
        if self._retiring is not None:
            self._retiring.cancel()
        self._retiring = asyncio.get_running_loop().call_later(self._config.idle_s, self._retire)

    def _retire(self) -> None:
        while self._idle:
            _end(self._idle.pop())


def _end(process: Process) -> None:
    with suppress(ProcessLookupError):  # it has ended
        process.kill()


def _environment() -> dict[str, str]:
    """Of a process that hostile bytes may take over: where its modules are, and no secret."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


async def _answer(process: Process, codec: Codec, data: bytes) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps({"codec": codec, "size": len(data)}).encode() + b"\n")
    process.stdin.write(data)
    await process.stdin.drain()
    size = struct.unpack(">I", await process.stdout.readexactly(4))[0]
    if size > _LARGEST_RESULT_BYTES:
        raise ValueError("no result of ours")
    result: dict[str, Any] = json.loads(await process.stdout.readexactly(size))
    return result
