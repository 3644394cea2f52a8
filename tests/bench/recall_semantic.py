"""The recall measure with `search.embeddings: static`, beside the index of words alone; and what it costs.

Run from the repository's root, with the extra [semantic]:

  for data in locomo beam; do
    python ../shared/bench/recall.py --data $data --by headline \\
      --memory tests.bench.recall_memory:Paged --memory tests.bench.recall_semantic:Fused
  done
  python -m tests.bench.recall_semantic  # CPU of a thousand messages and of a search; what holds the event loop
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

from proxy.api import memory
from proxy.memory.ids import Doc, Hit
from proxy.search.paths import PathIndexes, Queries
from proxy.search.static import static_encoder
from tests.bench.recall_memory import Message, Paged, _split
from tests.bench.texts import Texts


class Fused(Paged):
    """As `Paged`, through the indexes of a path as the proxy has them."""

    def __init__(self, density: float = 0.4) -> None:
        super().__init__(density)
        self._index = _Path(self._messages)  # type: ignore[assignment]


def _nothing(position: int, part: int) -> bool:
    return False


class _Path:
    def __init__(self, messages: list[Message]) -> None:
        self._messages = messages
        self._indexes = PathIndexes(10**9, static_encoder())

    def extend(self, docs: object) -> None:
        """The messages are read when they are searched."""

    def search(
        self, queries: Queries, limit: int, skip: None, seen_s: Callable[[int], int]
    ) -> list[Hit]:
        ids = [b"%d" % message.id for message in self._messages]
        return self._indexes.search(ids, self._docs, queries, limit, _nothing, seen_s)

    def _docs(self, first: int, last: int) -> Iterator[Doc]:
        for message in self._messages[first:last]:
            texts = _split(message.content)
            for part, text in enumerate(texts, 1 if len(texts) > 1 else 0):
                yield Doc(message.id, part, message.role, message.name, text)


def main() -> None:
    """CPU milliseconds by words alone and with vectors: indexing a thousand messages, then a search; and the
    most that is done at once on the event loop: `_ENCODE_AT_ONCE` new messages behind `_RANK_AT_ONCE`."""
    texts, at_once, most = Texts("semantic"), memory._ENCODE_AT_ONCE, memory._RANK_AT_ONCE["static"]
    docs = [Doc(i, 0, "user", "", texts.text(400)) for i in range(most)]
    ids = [b"%d" % i for i in range(most)]
    static_encoder().encode(["read"])

    def measured(indexes: PathIndexes, count: int, query: str) -> float:
        start = time.process_time()
        indexes.search(ids[:count], lambda a, b: docs[a:b], query, 20, _nothing)
        return 1e3 * (time.process_time() - start)

    print(f"{'':28}{'1,000 messages':>16}{'search':>10}{'at once':>10}")
    for name, encoder in (("by words", None), ("with static vectors", static_encoder())):
        indexes = PathIndexes(10**9, encoder)
        built = measured(indexes, 1000, "first")
        queries = [texts.text(60) for _ in range(50)]
        search = statistics.median(measured(indexes, 1000, query) for query in queries)
        measured(indexes, most - at_once, "second")
        held = measured(indexes, most, queries[0])
        print(f"{name:28}{built:13.0f} ms{search:7.2f} ms{held:7.2f} ms")


if __name__ == "__main__":
    main()
