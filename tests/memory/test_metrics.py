import json

from proxy.memory.metrics import SourceMetrics, UserExperienceMetrics


def test_metrics_are_zero_before_the_first_event() -> None:
    metrics = UserExperienceMetrics()
    assert f"{metrics.recall_success_rate():.2%} {metrics.thrash_index():.2f}" == "0.00% 0.00"
    assert (metrics.effective_context(), metrics.prefetch_hit_rates()) == (0.0, {})


def test_metrics_are_rates_of_what_was_counted() -> None:
    metrics = UserExperienceMetrics(
        recalls=4, recalls_succeeded=3, faults=2, refaults=1, evictions=5, turns=2,
        l0_tokens=200, reachable_tokens=1_000,
        prefetch={"search": SourceMetrics(prefetched=1), "recall": SourceMetrics(prefetched=2, used=1)},
    )  # fmt: skip
    assert (metrics.recall_success_rate(), metrics.thrash_index()) == (0.75, 0.5)
    assert metrics.effective_context() == 5.0
    assert list(metrics.prefetch_hit_rates().items()) == [("recall", 0.5), ("search", 0.0)]
    shown = json.loads(json.dumps(metrics.snapshot()))
    assert (shown["evictions"], shown["turns"], shown["thrash_index"]) == (5, 2, 0.5)
    assert shown["prefetch_hit_rates"]["recall"] == 0.5
