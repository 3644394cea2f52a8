"""L1: least recently used first, never more than its tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.storage.l1 import BYTES_PER_TOKEN, Cache
from tests.examples import examples


@examples(30)
@given(
    st.lists(st.tuples(st.sampled_from(["put", "get", "take", "clear"]), st.integers(0, 5), st.integers(0, 400)),
             max_size=40),
    st.integers(1, 200),
)
def test_invariant_10_its_tokens_are_bounded_and_its_values_are_what_was_put(
    steps: list[tuple[str, int, int]], limit: int
) -> None:
    cache = Cache(limit)
    model: dict[bytes, tuple[int, int]] = {}  # in order of use
    for op, n, size in steps:
        key = bytes([n])
        if op == "clear":
            cache.clear()
            model.clear()
        elif op == "put":
            model.pop(key, None)
            cache.put("k", key, (n, size), size)
            model[key] = (n, size)
            while charged(model, limit) > limit:
                del model[next(iter(model))]
        else:
            assert (cache.get if op == "get" else cache.take)("k", key) == model.get(key)
            if (found := model.pop(key, None)) is not None and op == "get":
                model[key] = found
        assert cache.get("another kind", key) is None
        assert len(cache) == len(model)
        assert cache.tokens == charged(model, limit) <= limit


def charged(model: dict[bytes, tuple[int, int]], limit: int) -> int:
    """What alone is larger than the limit counts as the limit: it is kept, and nothing beside it."""
    return sum(min(size // BYTES_PER_TOKEN + 1, limit) for _, size in model.values())


def test_hits_and_misses_are_counted() -> None:
    cache = Cache(10)
    cache.put("k", b"a", 1, 4)
    assert cache.get("k", b"a") == 1 and cache.take("k", b"a") == 1 and cache.take("k", b"a") is None
    assert (cache.hits, cache.misses) == (2, 1)
