"""The pictures as numbers: within their frame, each page where it was, however long the conversation."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from proxy.ui.charts import branch_bars, map_chart, timeline_chart
from tests.examples import examples


def turn(number: int, **more: Any) -> dict[str, Any]:
    return {"turn": number, "epoch_begun": None, "faults": 0, "evidence": 0, "window_tokens": 5, "history_tokens": number, **more}


@examples(12)
@given(st.integers(1, 60), st.integers(0, 400), st.integers(1, 10_000))
def test_map_cells_stand_in_their_turns_and_within_the_frame(count: int, rows: int, first: int) -> None:
    turns = [turn(first + n, epoch_begun=n % 7 == 0 and 1, faults=n % 3, evidence=n % 2) for n in range(count)]
    runs = [[first, first + count - 1, "native"]], [[first + count // 2, first + count // 2, "evidence"]]
    pages = [{"page": f"msg_{n:04d}", "role": "user", "pinned": False, "since": first, "runs": runs[n % 2]} for n in range(rows)]
    made = map_chart({"first": first, "last": first + count - 1, "turns": turns, "pages": pages, "left_out": 0})
    assert len(made["cells"]) == len(made["stored"]) == rows
    for cell in [*made["cells"], *made["stored"]]:
        assert cell["x"] >= 0 and cell["x"] + cell["w"] <= made["width"] + 1 and cell["w"] > 0
        assert made["top"] <= cell["y"] and cell["y"] + cell["h"] <= made["height"]
    assert len(made["lines"]) == len(range(0, count, 7)) and len(made["ticks"]) <= 8


@examples(12)
@given(st.lists(st.integers(1, 10**7), max_size=120))
def test_timeline_has_a_few_round_lines_and_stays_in_its_frame(history: list[int]) -> None:
    made = timeline_chart([turn(n, history_tokens=tokens, window_tokens=None) for n, tokens in enumerate(history, 1)])
    assert len(made["grid"]) <= 4 and all(0 <= line["y"] <= made["height"] for line in made["grid"])
    assert bool(made["history"]) == bool(history)


def test_branches_are_as_long_as_their_messages() -> None:
    made = branch_bars([{"messages": 10, "shared_messages": 10}, {"messages": 8, "shared_messages": 4}])
    assert [(bar["shared_w"], bar["own_w"]) for bar in made] == [(600.0, 0.0), (240.0, 240.0)]


def test_timeline_passes_over_windows_that_are_not_known() -> None:
    made = timeline_chart([turn(1, window_tokens=10, history_tokens=10), turn(2, window_tokens=None, history_tokens=20), turn(3, window_tokens=10, history_tokens=30)])
    assert made["window"].count("L") == 3 and made["history"].count("L") == 4
