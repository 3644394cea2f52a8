"""The cache of histories: exact, inside its scope, bounded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.history import HistoryCache, Known
from tests.examples import examples

many = examples(100)


def known(messages: list[bytes]) -> Known:
    history, ends = b"", []
    for raw in messages:
        history += (b"," if history else b"") + raw
        ends.append(len(history))
    return Known(history, ends, list(range(1, len(ends) + 1)), [], [], b"t")


raws = st.lists(st.sampled_from([b"{a}", b"{" + b"b" * 70 + b"}", b"{" + b"c" * 300 + b"}"]), min_size=1, max_size=6)


@many
@given(st.lists(raws, min_size=1, max_size=6), raws, st.integers(0, 3))
def test_what_is_found_is_really_shared_and_at_most_what_is_shared(
    kept: list[list[bytes]], wanted: list[bytes], start: int
) -> None:
    cache = HistoryCache(1 << 20)
    for messages in kept:
        cache.add(b"s", known(messages), None)
    body = b"x" * start + known(wanted).history
    found = cache.find(b"s", body, start)
    assert cache.find(b"other", body, start) is None
    if found is None:
        return
    history, shared = found
    end = history.ends[shared - 1]
    assert shared > 0 and body[start : start + end] == history.history[:end]
    assert shared == len(history.ends) or body[start:][: history.ends[shared]] != history.history[: history.ends[shared]]


def test_longest_of_several_continuations_is_found() -> None:
    cache = HistoryCache(1 << 20)
    first = [b"{" + b"a" * 100 + b"}"]
    longer = [*first, b"{b}", b"{c}"]
    cache.add(b"s", known(first), None)
    cache.add(b"s", known(longer), None)
    found = cache.find(b"s", known([*longer, b"{d}"]).history, 0)
    assert found is not None and found[1] == 3


@many
@given(st.lists(st.tuples(raws, st.booleans()), max_size=20), st.integers(100, 2000))
def test_invariant_10_bytes_kept_are_bounded(steps: list[tuple[list[bytes], bool]], limit: int) -> None:
    cache = HistoryCache(limit)
    last: Known | None = None
    for messages, forget in steps:
        new = known(messages)
        cache.add(b"s", new, last)
        if forget:
            cache.forget(new)
        last = new
        kept = {id(k): len(k.history) for bucket in cache._buckets.values() for k in bucket}
        assert sum(kept.values()) <= cache._bytes <= limit
    cache.clear()
    assert cache._bytes == 0 and cache.find(b"s", b"{" + b"a" * 100 + b"}", 0) is None


def test_continuation_takes_the_place_of_what_it_continues() -> None:
    cache = HistoryCache(1 << 20)
    first = known([b"{" + b"a" * 100 + b"}"])
    second = known([b"{" + b"a" * 100 + b"}", b"{b}"])
    cache.add(b"s", first, None)
    cache.add(b"s", second, first)
    assert len(cache._keys) == 1
