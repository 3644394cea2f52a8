"""Both ways through what pages were made from."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.memory.models import MemoryPage
from proxy.memory.provenance import MAX_DEPTH, ProvenanceGraph


def _graph() -> ProvenanceGraph:
    graph = ProvenanceGraph()
    graph.add("summary_seg_01", ["msg_0001", "msg_0002"])
    graph.add("claim_0001", ["msg_0002"])
    graph.add_page(MemoryPage(page_id="summary_seg_02", provenance=["summary_seg_01", "claim_0001"]))
    return graph


def test_both_ways() -> None:
    graph = _graph()
    assert graph.derived("msg_0002") == ["summary_seg_01", "claim_0001"]
    assert graph.derived("msg_0002", depth=2) == ["summary_seg_01", "claim_0001", "summary_seg_02"]
    assert graph.derives_from("summary_seg_02") == ["summary_seg_01", "claim_0001"]
    assert graph.justifies("summary_seg_02") == ["msg_0001", "msg_0002"]
    assert graph.justifies("claim_0001") == ["msg_0002"]
    assert graph.derived("nothing") == graph.derives_from("msg_0001") == graph.justifies("msg_0001") == []


def test_adding_again_adds_nothing_and_a_page_never_derives_from_itself() -> None:
    graph = _graph()
    before = len(graph)
    assert graph.add("claim_0001", ["msg_0002", "claim_0001"]) == 0 and len(graph) == before
    assert graph.add("claim_0001", ["msg_0009"]) == 1
    assert graph.justifies("claim_0001") == ["msg_0002", "msg_0009"]


def test_a_cycle_is_walked_once() -> None:
    graph = ProvenanceGraph()
    graph.add("a", ["b"])
    graph.add("b", ["c", "a"])
    graph.add("c", ["a", "root"])
    assert graph.derives_from("a", MAX_DEPTH) == ["b", "c", "root"]
    assert graph.justifies("a") == ["root"]


def test_invariant_10_the_graph_is_bounded() -> None:
    graph = ProvenanceGraph(max_edges=3)
    assert graph.add("a", [f"s{i}" for i in range(9)]) == 3 and graph.full
    assert graph.add("b", ["s1"]) == 0 and graph.derives_from("a") == ["s0", "s1", "s2"]


_IDS = st.sampled_from("abcdefgh")


@given(st.lists(st.tuples(_IDS, st.lists(_IDS, max_size=4)), max_size=20))
def test_the_two_ways_agree(added: list[tuple[str, list[str]]]) -> None:
    graph, again = ProvenanceGraph(), ProvenanceGraph()
    for page, sources in added:
        graph.add(page, sources)
        for source in sources:
            again.add(page, [source])
    for a in "abcdefgh":
        assert graph.derives_from(a, MAX_DEPTH) == again.derives_from(a, MAX_DEPTH)
        for b in "abcdefgh":
            for depth in (1, 3):
                assert (b in graph.derives_from(a, depth)) == (a in graph.derived(b, depth))
        assert set(graph.justifies(a)) <= set(graph.derives_from(a, MAX_DEPTH))
