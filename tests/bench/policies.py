"""Eviction policies against the clairvoyant optimum, on the shared conversations.

Run from the repository's root: `python -m tests.bench.policies`. Prints, per data set, window and
policy: hit rate, far hit rate (without the message before, which every window has), thrash index
(refaults per fault), refault rate (refaults per eviction), faults per 100 turns, and the hit rate
as a share of the optimum's. Conversations that fit the window are left out: nothing is evicted from
them. `policy_traces` says what an access is, `policy_simulator` what the optimum knows. `--half`
shows one half of the conversations. The policies' numbers were searched on the even half, but the
other half was looked at while choosing among equals, and the planner's on all: no half is untouched
by the choice. Differences below 0.002 of the hit rate are a handful of accesses.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from proxy.memory.eviction import (
    LRU,
    EvictionPolicy,
    ImportanceWeightedLRU,
    ModalityAwareLRU,
)
from proxy.tokens import TokenCounter, get_counter
from tests.bench.policy_simulator import Rebuild, Score, by_policy, foresee, replay
from tests.bench.policy_traces import Trace, traces_of
from tests.e2e.data import load_beam, load_locomo, load_trajectories

DEFAULT = "ImportanceWeightedLRU *"
POLICIES: dict[str, EvictionPolicy] = {
    "LRU": LRU(),
    "ModalityAwareLRU": ModalityAwareLRU(),
    DEFAULT: ImportanceWeightedLRU(),
}
OPTIMUM = "optimum"
ROOMS = {"trajectories": (1500, 2500, 4000), "locomo": (4000, 8000), "beam": (8000, 16000, 32000)}


def measure(traces: Sequence[Trace], room_tokens: int, counter: TokenCounter) -> dict[str, Score]:
    """Each policy's and the optimum's counts over the conversations that outgrow the window."""
    scores = {name: Score() for name in (*POLICIES, OPTIMUM)}
    for trace in traces:
        if trace.total_tokens <= room_tokens:
            continue
        rebuilds: dict[str, Rebuild] = {n: by_policy(policy) for n, policy in POLICIES.items()}
        rebuilds[OPTIMUM] = foresee(trace)
        for name, rebuild in rebuilds.items():
            scores[name].add(replay(trace, room_tokens, rebuild, counter))
    return scores


def show(data: str, room_tokens: int, scores: dict[str, Score]) -> None:
    """One table."""
    best = scores[OPTIMUM]
    print(
        f"\n{data}, window of {room_tokens:,} tokens: {best.metrics.turns:,} turns,"
        f" {best.accesses:,} accesses ({best.far:,} far), {best.rebuilds:,} rebuilds (optimum)"
    )
    print(
        f"{'':24}{'hit rate':>9}{'of opt.':>9}{'far':>8}{'of opt.':>9}{'thrash':>8}"
        f"{'refault':>9}{'faults':>8}"
    )
    for name, score in scores.items():
        share = score.hit_rate / best.hit_rate if best.hit_rate else 1.0
        far = score.far_hit_rate / best.far_hit_rate if best.far_hit_rate else 1.0
        faults = 100 * score.metrics.faults / max(1, score.metrics.turns)
        print(
            f"{name:24}{score.hit_rate:9.3f}{share:9.3f}{score.far_hit_rate:8.3f}{far:9.3f}"
            f"{score.metrics.thrash_index():8.3f}{score.refault_rate:9.4f}{faults:8.1f}"
        )


def summarise(totals: dict[str, dict[str, Score]]) -> None:
    """Hit rates per data set over all its windows, and their mean."""
    print("\nhit rate (far hit rate) over all windows, share of the optimum's")
    names = [*POLICIES, OPTIMUM]
    print(f"{'':24}" + "".join(f"{data:>30}" for data in totals) + f"{'mean far':>10}")
    for name in names:
        cells = ""
        for scores in totals.values():
            score, best = scores[name], scores[OPTIMUM]
            share = score.hit_rate / best.hit_rate
            cells += f"{score.hit_rate:16.4f} ({score.far_hit_rate:.4f}){share:5.2f}"
        mean = sum(scores[name].far_hit_rate for scores in totals.values()) / len(totals)
        print(f"{name:24}{cells}{mean:10.4f}")


def main() -> None:
    """All data sets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--half", choices=("even", "odd", "all"), default="all")
    half = parser.parse_args().half
    begun, counter = time.perf_counter(), get_counter("gpt-4o")
    loaders = {"trajectories": load_trajectories, "locomo": load_locomo, "beam": load_beam}
    totals: dict[str, dict[str, Score]] = {}
    for data, load in loaders.items():
        traces = traces_of(load(), counter)
        if half != "all":
            traces = traces[half == "odd" :: 2]
        for room in ROOMS[data]:
            scores = measure(traces, room, counter)
            show(data, room, scores)
            for name, score in scores.items():
                totals.setdefault(data, {}).setdefault(name, Score()).add(score)
    summarise(totals)
    print(f"\n* the default. {time.perf_counter() - begun:.1f} s")


if __name__ == "__main__":
    main()
