"""What something costs, whatever else the machine and this process are doing."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def cpu_within(seconds: float, what: str = "") -> Iterator[None]:
    """What is done inside takes less CPU of this thread than that. The garbage collector waits: it would look at all
    that the tests before have left, for half a second."""
    collects = gc.isenabled()
    gc.disable()
    try:
        before_s = time.thread_time()
        yield
        spent_s = time.thread_time() - before_s
    finally:
        if collects:
            gc.enable()
    assert spent_s < seconds, f"{what or 'it'} took {spent_s:.2f} s of CPU"
