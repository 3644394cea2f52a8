import json

from proxy.memory.metrics import UserExperienceMetrics


def test_metrics_are_zero_before_the_first_event() -> None:
    metrics = UserExperienceMetrics()
    assert f"{metrics.recall_success_rate():.2%} {metrics.thrash_index():.2f}" == "0.00% 0.00"
    assert (metrics.effective_context(), metrics.prefetch_hit_rates()) == (0.0, {})


def test_metrics_are_rates_of_what_was_recorded() -> None:
    metrics = UserExperienceMetrics()
    for success in (True, True, True, False):
        metrics.record_recall(success)
    metrics.record_fault()
    metrics.record_fault(refault=True)
    metrics.record_eviction()
    metrics.record_eviction(4)
    metrics.record_turn(100, 300)
    metrics.record_turn(100, 700)
    for used in (True, False):
        metrics.record_prefetch("claims", used)
    metrics.record_prefetch("search")
    assert (metrics.recall_success_rate(), metrics.thrash_index()) == (0.75, 0.5)
    assert metrics.effective_context() == 5.0
    assert metrics.prefetch_hit_rates() == {"claims": 0.5, "search": 0.0}
    shown = json.loads(json.dumps(metrics.snapshot()))
    assert (shown["evictions"], shown["turns"], shown["thrash_index"]) == (5, 2, 0.5)
    assert shown["prefetch_hit_rates"]["claims"] == 0.5
