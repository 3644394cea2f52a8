"""A message larger than the window keeps its ends and names where the rest is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.cut import cut_message, fair_shares
from proxy.tokens import get_counter
from tests.examples import examples

COUNTER = get_counter("gpt-4o")
many = examples(100)


@many
@given(st.lists(st.integers(0, 1000), max_size=8), st.integers(-10, 4000))
def test_fair_shares_fit_and_take_from_the_largest(sizes: list[int], budget: int) -> None:
    shares = fair_shares(sizes, budget)
    assert sum(shares) <= max(budget, 0) or not sizes
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    cut = [share for share, size in zip(shares, sizes, strict=True) if share < size]
    assert all(share <= min(cut) + len(sizes) for share in shares if cut and share not in cut)
    assert (sum(sizes) <= budget) == (not cut) or not sizes


@many
@given(st.text(min_size=1, max_size=60), st.integers(1, 60), st.integers(100, 600), st.booleans())
def test_a_cut_message_fits_and_keeps_its_ends(piece: str, times: int, limit: int, listed: bool) -> None:
    text = f"BEGIN {piece * times} END"
    content = [{"type": "image_url"}, {"type": "text", "text": text}] if listed else text
    message = {"role": "user", "content": content, "x": 1}
    cut = cut_message(message, ["msg_0001.1", "msg_0001.2"], limit + 1445 * listed, COUNTER)
    assert cut["x"] == 1 and cut["role"] == "user"
    if COUNTER.message(message) <= limit + 1445 * listed:
        assert cut == message
        return
    shown = cut["content"][1]["text"] if listed else cut["content"]
    assert shown.startswith("BEGIN") and "msg_0001.1 to msg_0001.2" in shown
    assert COUNTER.message(cut) <= limit + 1445 * listed + 8
    if listed:
        assert cut["content"][0] == {"type": "image_url"}


def test_what_has_no_text_stays() -> None:
    for content in (None, [], [{"type": "image_url"}]):
        message = {"role": "user", "content": content}
        assert cut_message(message, ["msg_0001"], 1, COUNTER) == message
