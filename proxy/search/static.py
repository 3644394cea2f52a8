"""Vectors without a model call: those of a text's tokens, summed. The weights come in a wheel (`wordllama`, the
extra [semantic]); nothing of its code runs, whose loader looks for them in another folder.

Promises: exact, so the same on every machine (invariant 7): the weights are whole numbers and their
sums are, too; no network, no clock; ImportError, one sentence, where the extra is not installed.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from proxy.search.vectors import NO_VECTOR, Vector, whole

_PACKAGE = "wordllama"
_WEIGHTS = "weights/l2_supercat_256.safetensors"
_TOKENIZER = "tokenizers/l2_supercat_tokenizer_config.json"
_TENSOR = "embedding.weight"
_STEPS = 1 << 10  # of a weight: finer ones change no neighbour


class StaticEncoder:
    """Reading it takes half a second and 20 MB: see `static_encoder`."""

    version = b"static"

    def __init__(self) -> None:
        from tokenizers import Tokenizer

        found = importlib.util.find_spec(_PACKAGE)
        if found is None or found.origin is None:
            raise ImportError(f"No module named {_PACKAGE!r}")
        folder = Path(found.origin).parent
        self._weights = _read(folder / _WEIGHTS)
        self._tokenizer: Any = Tokenizer.from_file(str(folder / _TOKENIZER))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode(self, texts: Sequence[str]) -> list[Vector]:
        """A vector each; NO_VECTOR for a text without tokens."""
        plain = [text.encode("utf-8", "replace").decode() for text in texts]  # JSON may carry lone surrogates
        found = self._tokenizer.encode_batch_fast(plain, add_special_tokens=False)
        return [self._sum(encoding.ids) for encoding in found]

    def vocabulary(self) -> list[str]:
        """The pieces that have a vector, the commonest first."""
        numbers: dict[str, int] = self._tokenizer.get_vocab()
        return sorted(numbers, key=numbers.__getitem__)

    def _sum(self, ids: list[int]) -> Vector:
        return whole(self._weights[ids].sum(axis=0, dtype=np.int64)) if ids else NO_VECTOR


@functools.cache
def static_encoder() -> StaticEncoder:
    """One per process."""
    return StaticEncoder()


def _read(path: Path) -> Vector:
    """The matrix of a safetensors file: eight bytes say how long its head is, which says where what is."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensor = json.loads(data[8:start])[_TENSOR]
    first, last = tensor["data_offsets"]
    half = np.frombuffer(data[start + first : start + last], "<f2").reshape(tensor["shape"])
    return np.rint(half.astype(np.float32) * _STEPS).astype(np.int16)
