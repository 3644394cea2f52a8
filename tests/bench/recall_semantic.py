"""The recall measure with `search.embeddings: static`, beside the index of words alone; and what it costs.

Run from the repository's root, with the extra [semantic]:

  for data in locomo beam; do
    python ../shared/bench/recall.py --data $data --by headline \\
      --memory tests.bench.recall_memory:Paged --memory tests.bench.recall_semantic:Fused
  done
  python -m tests.bench.recall_semantic  # CPU of a thousand messages and of a search; what holds the event loop
"""

from __future__ import annotations

from collections.abc import Iterator

from proxy.memory.ids import Doc, Hit
from proxy.search.paths import PathIndexes
from proxy.search.static import static_encoder
from tests.bench.recall_memory import Message, Paged, _split


class Fused(Paged):
    """As `Paged`, through the indexes of a path as the proxy has them."""

    def __init__(self, density: float = 0.4) -> None:
        super().__init__(density)
        self._index = _Path(self._messages)  # type: ignore[assignment]


class _Path:
    def __init__(self, messages: list[Message]) -> None:
        self._messages = messages
        self._indexes = PathIndexes(10**9, static_encoder())

    def extend(self, docs: object) -> None:
        """The messages are read when they are searched."""

    def search(self, query: str, limit: int) -> list[Hit]:
        ids = [b"%d" % message.id for message in self._messages]
        return self._indexes.search(ids, self._docs, query, limit, lambda position, part: False)

    def _docs(self, first: int, last: int) -> Iterator[Doc]:
        for message in self._messages[first:last]:
            texts = _split(message.content)
            for part, text in enumerate(texts, 1 if len(texts) > 1 else 0):
                yield Doc(message.id, part, message.role, message.name, text)
