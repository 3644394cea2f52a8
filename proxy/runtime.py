"""Settings of the process itself: memory allocation and garbage collection.

Promises: only speed changes. Bodies of megabytes come and go with every request: glibc would map
and unmap each, and the kernel would zero every page of it again. Pages and nodes are long-lived and
hold no cycles, so full collections find nothing and cost more the more is cached.
"""

from __future__ import annotations

import ctypes
import gc
import logging

# mallopt's parameters, from malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_BYTES = 32 << 20  # glibc's own limit for the mmap threshold
_KEPT_FREE_BYTES = 128 << 20  # freed memory that stays with the process
_PAD_BYTES = 16 << 20

_YOUNG_OBJECTS, _MIDDLE, _OLD = 20_000, 20, 100


def tune() -> None:
    """Apply them to this process; without glibc only the collector's."""
    logging.getLogger("pypdf").setLevel(logging.ERROR)  # a broken file is the client's, not ours
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, _MIDDLE, _OLD)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_FREE_BYTES)
        mallopt(_M_TOP_PAD, _PAD_BYTES)
