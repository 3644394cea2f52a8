"""The table: checks by gateway, totals, and the reason of every failure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.contract.model import Case, Outcome

Results = Mapping[str, Mapping[str, Outcome] | str]  # by gateway; a str: why it did not start
_MARKS = {"passed": "ok", "failed": "FAILED", "n/a": "-"}


def table(chosen: Sequence[Case], results: Results) -> str:
    """One line per check; its cell says how many of its variants passed."""
    names = list(results)
    lines = ["| check | promise | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    checks = {case.check.id: case.check for case in chosen}
    for id, one in checks.items():
        cells = [_cell([c for c in chosen if c.check.id == id], results[n]) for n in names]
        lines.append(f"| {id} | {one.promise} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(same: Sequence[Case], outcomes: Mapping[str, Outcome] | str) -> str:
    if isinstance(outcomes, str):
        return "?"
    states = [outcomes[case.id].status for case in same]
    applicable = [s for s in states if s != "n/a"]
    if not applicable:
        return "-"
    passed = applicable.count("passed")
    return "ok" if passed == len(applicable) else f"**{passed}/{len(applicable)}**"


def totals(chosen: Sequence[Case], results: Results) -> str:
    """By category and gateway: checks passed (all their variants) of those that apply."""
    names = list(results)
    categories = list(dict.fromkeys(case.check.category for case in chosen))
    lines = ["| category | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for category in [*categories, "all"]:
        cells = []
        for name in names:
            same = [c for c in chosen if category in (c.check.category, "all")]
            cells.append(_count(same, results[name]))
        label = f"**{category}**" if category == "all" else category
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _count(same: Sequence[Case], outcomes: Mapping[str, Outcome] | str) -> str:
    if isinstance(outcomes, str):
        return "?"
    cells = [
        _cell([c for c in same if c.check.id == id], outcomes)
        for id in dict.fromkeys(c.check.id for c in same)
    ]
    applicable = [cell for cell in cells if cell != "-"]
    return f"{applicable.count('ok')}/{len(applicable)}"


def reasons(results: Results, promises: Mapping[str, str]) -> str:
    """Every failure with what was seen; what did not start, with why."""
    lines: list[str] = []
    for name, outcomes in results.items():
        if isinstance(outcomes, str):
            lines += [f"\n{name} did not start: {outcomes}"]
            continue
        failed = {id: o for id, o in outcomes.items() if o.status == "failed"}
        if failed:
            lines.append(f"\n{name}: {len(failed)} cases failed")
        for id, outcome in failed.items():
            lines.append(f"- {id}: {promises[id]}\n    {outcome.note}")
    return "\n".join(lines)


def notes(results: Results) -> str:
    """What the measuring checks measured."""
    lines = []
    for name, outcomes in results.items():
        if not isinstance(outcomes, str):
            lines += [
                f"- {name} {id}: {o.note}"
                for id, o in outcomes.items()
                if o.status == "passed" and o.note
            ]
    return "\n".join(["Measured:", *lines]) if lines else ""
