"""Which files of a directory have a text, also in what is compressed in them.

Promises: it is looked for by another process: who closes a database's file ends its own process's locks on it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import zstandard

_ZSTD = re.compile(re.escape(b"\x28\xb5\x2f\xfd"))


def files_with(path: Path, text: bytes) -> list[str]:
    command = [sys.executable, __file__, str(path), text.decode()]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def whole(data: bytes) -> list[bytes]:
    """The data, and what is compressed in it."""
    found = [data]
    for frame in _ZSTD.finditer(data):
        with suppress(zstandard.ZstdError):
            found.append(zstandard.ZstdDecompressor().decompressobj().decompress(data[frame.start() :]))
    return found


if __name__ == "__main__":
    for file in (file for file in Path(sys.argv[1]).rglob("*") if file.is_file()):
        if any(sys.argv[2].encode() in part for part in whole(file.read_bytes())):
            print(file.name)
