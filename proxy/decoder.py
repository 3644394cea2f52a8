"""The process in which a medium is decoded: `python -m proxy.decoder LIMITS`, jobs on stdin, results on stdout.

Promises: it imports a codec when the first job needs it, and nothing of the server; one job takes at most the
memory and CPU that its limits say: out of memory is nothing decoded, out of time is what was decoded so far, and
code that cannot be interrupted is killed; it ends when its server does. LIMITS is JSON: `pixels`, `memory_bytes`
above what the process has with its codec, `cpu_s`. A job is JSON_LINE with `codec` and `size`, then `size` bytes;
a result is 4 bytes, big-endian, its length, then JSON as `proxy.media.decoders.decode` gives it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from proxy.media.decoders import Codec, OutOfTime, decode, load

_NICE = 5  # whoever waits for tokens goes first
_AGAIN_S = 0.5  # when what was interrupted goes on
_GRACE_S = 1  # until code that cannot be interrupted is killed
_ANY = resource.RLIM_INFINITY


def main(limits: dict[str, Any]) -> None:
    """Decode until stdin ends."""
    jobs, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a codec prints is no result
    os.nice(_NICE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server's to handle
    signal.signal(signal.SIGPROF, _out_of_time)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    while line := jobs.readline():
        job = json.loads(line)
        result = json.dumps(_bounded(job["codec"], jobs.read(job["size"]), limits)).encode()
        results.write(struct.pack(">I", len(result)) + result)
        results.flush()


def _bounded(codec: Codec, data: bytes, limits: dict[str, Any]) -> dict[str, Any]:
    load(codec)
    used = resource.getrusage(resource.RUSAGE_SELF)
    most_s = int(used.ru_utime + used.ru_stime + limits["cpu_s"]) + 1 + _GRACE_S
    resource.setrlimit(resource.RLIMIT_CPU, (most_s, _ANY))
    if (mapped := _mapped_bytes()) is not None:
        resource.setrlimit(resource.RLIMIT_AS, (mapped + limits["memory_bytes"], _ANY))
    try:
        signal.setitimer(signal.ITIMER_PROF, limits["cpu_s"], _AGAIN_S)
        return decode(codec, data, limits["pixels"])
    except (OutOfTime, MemoryError, RecursionError):
        return {}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (_ANY, _ANY))


def _mapped_bytes() -> int | None:
    """The process's address space; None where only Linux would say it."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return None


def _out_of_time(signal: int, frame: FrameType | None) -> None:
    raise OutOfTime


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
