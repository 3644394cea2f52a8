"""What something costs, whatever else the machine and this process are doing."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager

_MILLION_S = 0.06  # where the limits were measured


@contextmanager
def cpu_within(seconds: float, what: str = "") -> Iterator[None]:
    """What is done inside takes less CPU of this thread than that, on a machine that counts to a million in
    `_MILLION_S`: a slower one, or one that others use, has more time. The garbage collector waits: it would look at
    all that the tests before have left, for half a second."""
    collects = gc.isenabled()
    gc.disable()
    try:
        before_s = time.thread_time()
        yield
        spent_s = time.thread_time() - before_s
    finally:
        if collects:
            gc.enable()
    if spent_s >= seconds:
        slower = max(1.0, _million_s() / _MILLION_S)
        assert spent_s < seconds * slower, f"{what or 'it'} took {spent_s:.2f} s of CPU of a machine {slower:.1f} times slower"


def _million_s() -> float:
    before_s, count = time.thread_time(), 0
    for n in range(1_000_000):
        count += n
    return time.thread_time() - before_s
