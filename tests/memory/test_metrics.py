import json

from proxy.memory import PageTable, StorageTier
from proxy.memory.metrics import MAX_SOURCES, OTHER_SOURCE, UserExperienceMetrics
from tests.memory.doors import evict, fault_in, register_id


def test_without_events_every_rate_is_zero() -> None:
    metrics = UserExperienceMetrics()
    assert f"{metrics.recall_success_rate():.2%} {metrics.thrash_index():.2f}" == "0.00% 0.00"
    assert (metrics.effective_context(), metrics.prefetch_hit_rates()) == (0.0, {})


def recorded() -> UserExperienceMetrics:
    metrics = UserExperienceMetrics()
    for success in (True, True, True, False):
        metrics.record_recall(success)
    metrics.record_fault("msg_0001", 3)
    metrics.record_fault("msg_0001", 3, refault=True)
    metrics.record_eviction()
    metrics.record_eviction(4)
    metrics.record_turn(100, 300)
    metrics.record_turn(100, 700)
    metrics.record_prefetch("claims", pages=3, used=1)
    metrics.record_prefetch("claims", pages=1)
    metrics.record_prefetch("claims", pages=0, used=1)
    metrics.record_prefetch("search")
    return metrics


def test_rates_are_of_what_was_recorded() -> None:
    metrics = recorded()
    assert (metrics.recall_success_rate(), metrics.thrash_index()) == (0.75, 0.5)
    assert metrics.effective_context() == 5.0
    assert metrics.prefetch_hit_rates() == {"claims": 0.5, "search": 0.0}
    shown = json.loads(json.dumps(metrics.snapshot()))
    assert (shown["evictions"], shown["turns"], shown["thrash_index"]) == (5, 2, 0.5)
    assert shown["prefetch_hit_rates"]["claims"] == 0.5


def test_a_refault_is_read_from_the_entry_before_the_fault() -> None:
    metrics, table = UserExperienceMetrics(), PageTable()
    entry = register_id(table, "msg_0001", 10, turn=1, tier=StorageTier.L0)
    for left, back in ((2, 3), (4, 30)):
        evict(table, "msg_0001", left)
        metrics.record_fault(entry, back)
        fault_in(table, "msg_0001", back)
    assert (metrics.faults, metrics.refaults, entry.refault_count) == (2, 1, 1)


def test_merging_adds() -> None:
    both = recorded().merge(recorded())
    assert both.recalls == 8 and both.prefetch["claims"].used == 4
    assert both.prefetch_hit_rates() == recorded().prefetch_hit_rates()
    assert UserExperienceMetrics().merge(recorded()) == recorded()


def test_invariant_10_sources_are_bounded() -> None:
    metrics = UserExperienceMetrics()
    for number in range(100):
        metrics.record_prefetch(f"s{number:03d}")
    assert len(metrics.prefetch) == MAX_SOURCES + 1
    assert metrics.prefetch[OTHER_SOURCE].prefetched == 100 - MAX_SOURCES
