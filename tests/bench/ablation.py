"""What each part of the memory is worth: real conversations, with one part switched off at a time.

    python -m tests.bench.ablation [--rows manifest,TLB] [--data beam] [--full] [--markdown]

A row is the proxy without one part. Conversations are replayed turn by turn through the application in
this process, upstream answering with the recorded turn; their questions are asked in the last turns, each as
a fork of the history, and the demo reader answers, with the VM tools.

- `locomo`, `beam`: questions all of whose evidence stands in full in the request that was answered, of those
  asked, and (in parentheses) those that had it before any call of a VM tool. `agents` have no questions:
  there it is the steps whose names and numbers of older messages stand in the window. `demo`: the expected
  words are in the answer. Then the difference to the default, in points with its standard error.
- `instr`, `pref`: the same in the first request for BEAM's standing instructions and preferences, whose
  evidence no search finds.
- `bill`: input tokens, a cached prefix at a tenth, of the conversations; `questions'`: of their questions, which
  are many for so short a chat. `CPU` is the proxy's own (no upstream, reader, client). `disk`: the state directory.
- `gain`: where the part is worth more than twice the standard error (a bill also 0.5 %), then what it costs
  by the same rule. `at once`: without a call, which real models make far less often than the reader.

Figures are relative to the default of the same run, one for each data set in its order. A row whose place in
the code is gone ends the run; one that no request came by says so.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import importlib
import json
import math
import multiprocessing
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

import proxy.app
from proxy.config import Config
from proxy.conversation.evidence import asks
from proxy.conversation.report import TurnReport
from proxy.demo.bill import Account, PromptCache
from proxy.demo.play import conversation as demo_turns
from proxy.demo.play import demo_config
from proxy.demo.reader import read, seen_text
from proxy.demo.upstream import DemoUpstream
from proxy.memory.models import CompressionLevel
from proxy.tokens import get_counter
from proxy.upstream import BytesReply, Header
from tests.bench.calls import running
from tests.e2e.data import Conversation, load_beam, load_locomo, load_trajectories, tools_of

DEFAULT = "default"
ASKED_TURNS = 32  # the last ones: at one turn all questions would find the window at the same height
STANDING = ("instruction_following", "preference_following")
HEADERS = {"content-type": "application/json", "authorization": "Bearer bench"}
Message = dict[str, Any]
Change = Callable[[Any], Any]  # makes the new value of the old one


# ---------------------------------------------------------------- the parts


def returns(value: Any) -> Change:
    """Of a function: one that does nothing and returns this."""
    return lambda old: lambda *args, **more: value


def becomes(value: Any) -> Change:
    return lambda old: value


@dataclass(frozen=True)
class Row:
    """The default, with settings of its own and with changes of the code, by "module:name"."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Change] = field(default_factory=dict)


_COOLING = ("table:is_cooling", "eviction:is_cooling", "planner:is_protected", "eviction:is_protected")
ROWS = (
    Row(DEFAULT),
    Row("nothing (the default again)"),
    Row("manifest", {"manifest": {"max_tokens": 1}}),
    Row("segments' index lines", {}, {"proxy.conversation.derived:index_page":
        lambda old: lambda number, ids, texts, *more: old(number, ids, [""], *more)}),
    Row("pinned instructions and preferences", {}, {"proxy.conversation.pages:standing_in": returns([])}),
    Row("pinned preferences", {}, {"proxy.conversation.pages:standing_in":
        lambda old: lambda *args: [said for said in old(*args) if said.instruction]}),
    Row("standing: sentences alone (their messages whole)", {},
        {"proxy.conversation.epoch:_HARDLY_LONGER": becomes(1 << 30)}),
    Row("standing: a later one takes the place of an earlier", {},
        {"proxy.conversation.epoch:holding": lambda old: lambda said: [list(each) for each in said]}),
    Row("ImportanceWeightedLRU (LRU)", {"memory": {"eviction": "lru"}}),
    Row("ImportanceWeightedLRU (ModalityAwareLRU)", {"memory": {"eviction": "modality"}}),
    Row("any policy (all pages alike)", {}, {"proxy.memory.eviction:ImportanceWeightedLRU.worth": returns(1.0)}),
    Row("anti-thrash", {}, {f"proxy.memory.{name}": returns(False) for name in _COOLING}),
    Row("levels 1 and 2 of context lines", {}, {"proxy.memory.planner:_LEVELS": becomes((CompressionLevel.FULL,))}),
    Row("evidence", {"prefetch": {"tokens": 0}}),
    Row("evidence where the user only tells", {}, {"proxy.conversation.evidence:limit":
        lambda old: lambda turn: old(turn) if asks(turn.query) else 0}),
    Row("evidence's fall (no cut by score)", {},
        {f"proxy.memory.prefetcher:{name}": becomes(0.0) for name in ("_ASKED_FALL", "_RESIDENT_FALL", "_TOLD_FALL")}),
    Row("evidence's fall below what the window has", {}, {"proxy.memory.prefetcher:_RESIDENT_FALL": becomes(0.0)}),
    Row("passages of evidence (whole pages or none)", {}, {"proxy.conversation.evidence:find_passages": returns("")}),
    Row("taking evidence out (it stays in the log)", {}, {"proxy.conversation.turn_window:stays": returns(True)}),
    Row("carrying evidence on (it never stays)", {}, {"proxy.conversation.turn_window:stays": returns(False)}),
    Row("evidence for who asks with common words", {}, {"proxy.memory.prefetcher:ASKED_EVIDENCE": becomes(0.8)}),
    Row("short pages beside a search's results", {}, {"proxy.conversation.faults:_LINE_TOKENS": becomes(1 << 30)}),
    Row("the search's second look", {}, {"proxy.search.fts:PageIndex._look_again": returns(None)}),
    Row("related words of a search", {}, {"proxy.search.fts:PageIndex._with_related": lambda old: lambda self, own, *more: own}),
    Row("rule that unpinned texts are no context lines", {}, {"proxy.memory.planner:_Row.is_line":
        becomes(property(lambda row: True))}),
    Row("deeper rebuilds", {}, {"proxy.conversation.epoch:rebuild_target": lambda old: lambda low, *more: low}),
    Row("context lines", {}, {"proxy.conversation.epoch:_CONTEXT_SHARE": becomes(0.0)}),
    Row("faults and searches (passive)", {"memory": {"mode": "passive"}}),
    Row("calibration", {}, {"proxy.conversation.calibration:Calibration.learn":
        lambda old: lambda self, *args, **more: self}),
)  # fmt: skip


def switch_off(row: Row) -> Callable[[], bool]:
    """Make the row's changes, for good; the function says whether a request came by one. SystemExit where
    the place of a change is gone."""
    reached: set[bool] = set()
    for target, change in row.changes.items():
        module, _, names = target.partition(":")
        *path, name = names.split(".")
        try:
            owner = functools.reduce(getattr, path, importlib.import_module(module))
            new = change(vars(owner)[name])
        except (ImportError, AttributeError, KeyError):
            raise SystemExit(f"row {row.name}: {module}.{names} is gone") from None

        def noted(*args: Any, new: Any = new, reached: set[bool] = reached, **more: Any) -> Any:
            reached.add(True)
            return new(*args, **more)

        setattr(owner, name, noted if callable(new) else new)
        reached |= set() if callable(new) else {True}
    return lambda: not row.changes or bool(reached)


# ---------------------------------------------------------------- the data


def _agents(full: bool) -> list[Conversation]:
    """Those that outgrow the window by half, the longest first."""
    size = {c.id: len(json.dumps(c.messages)) for c in load_trajectories()}
    long = [c for c in load_trajectories() if size[c.id] > 6 * DATA["agents"].window_tokens]
    long.sort(key=lambda c: -size[c.id])
    return long if full else long[:24]


@dataclass(frozen=True)
class Data:
    """`every`: one question in so many is asked, but for the standing ones."""

    window_tokens: int
    conversations: Callable[[bool], Sequence[Conversation]]
    every: int = 1


DATA = {
    "locomo": Data(4000, lambda full: load_locomo()[:: 1 if full else 2], 3),
    "beam": Data(16000, lambda full: load_beam()[:: 1 if full else 2]),
    "agents": Data(4000, _agents),
    "demo": Data(4000, lambda full: [Conversation("demo", [{"role": "system", "content": "Answer briefly."}])]),
}


# ---------------------------------------------------------------- one row on one data set


@dataclass
class Result:
    asked: dict[str, tuple[str, bool, bool]] = field(default_factory=dict)  # kind, at once, answered
    bills: Counter[str] = field(default_factory=Counter)  # by conversation, of its turns
    asked_bills: Counter[str] = field(default_factory=Counter)  # of its questions
    cpu_s: float = 0.0
    disk_mb: float = 0.0
    epochs: int = 0
    calls: int = 0  # of VM tools
    refaults: int = 0
    reached: bool = True

    def observe(self, report: TurnReport) -> None:
        self.epochs += report.new_epoch
        self.calls += len(report.faults) + len(report.searches)
        self.refaults += sum(fault.refault for fault in report.faults)


class Upstream(DemoUpstream):
    """Answers with `recorded`, else as the demo reader does. `requests`: this turn's."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: Message | None = None
        self.requests: list[dict[str, Any]] = []
        self.said: Message = {}
        self.outside_s = 0.0  # seconds of CPU that are not the proxy's
        self.begin()

    @contextmanager
    def outside(self) -> Iterator[None]:
        """What upstream, reader and client do."""
        began_s = time.process_time()
        yield
        self.outside_s += time.process_time() - began_s

    def begin(self) -> None:
        """Another conversation: nothing of it is in the provider's cache."""
        self.account = Account("llm-pager", PromptCache(get_counter("gpt-4o")))

    @property
    def billed(self) -> float:
        """Input tokens since then, a cached one a tenth."""
        return self.account.billed_tokens

    async def chat(self, body: bytes, headers: Sequence[Header], query: bytes = b"", path: str = "") -> BytesReply:
        with self.outside():
            request = json.loads(body)
            request.pop("prompt_cache_key", None)  # of a random secret: the reader's ids come from the request
            self.requests.append(request)
            before = self.account.prompt_tokens
            self.account.book(request)
            self.said = self.recorded or read(request)
            reason = "tool_calls" if self.said.get("tool_calls") else "stop"
            answer = {
                "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": request["model"],
                "choices": [{"index": 0, "message": self.said, "finish_reason": reason}],
                "usage": {"prompt_tokens": self.account.prompt_tokens - before, "completion_tokens": 1},
            }  # fmt: skip
            return BytesReply(200, [(b"content-type", b"application/json")], json.dumps(answer).encode())


class Run:
    """The application without a part, and what is said to it."""

    def __init__(self, data: str, full: bool) -> None:
        self._name, self._data, self._full = data, DATA[data], full
        self.result, self._upstream = Result(), Upstream()

    async def play(self, config: dict[str, Any], folder: str) -> None:
        """Every conversation, and its questions."""
        setattr(proxy.app, "make_upstream", lambda config: self._upstream)  # noqa: B010
        base: dict[str, Any] = {"tiers": {"l0": {"tokens": self._data.window_tokens}, "l2": {"path": folder}}}
        if self._name == "demo":
            base = json.loads(demo_config(self._data.window_tokens, Path(folder)).model_dump_json())
            base["upstream"] = {}
        for section, keys in config.items():
            base[section] = {**base.get(section, {}), **keys}
        app = proxy.app.create_app(Config.model_validate_json(json.dumps(base)), self.result.observe)
        conversations, began_s = self._data.conversations(self._full), time.process_time()
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://bench")
        async with running(app), self._client:
            for conversation in conversations:
                self._upstream.begin()
                if self._name == "demo":
                    await self._demo(conversation.messages)
                else:
                    await self._replay(conversation)
        self.result.cpu_s = time.process_time() - began_s - self._upstream.outside_s

    async def _demo(self, messages: list[Message]) -> None:
        for number, turn in enumerate(demo_turns()):
            before, part = self._upstream.billed, f"demo {number // 40}"  # parts: to know the noise
            messages.append({"role": "user", "content": turn["user"]})
            await self._ask([json.dumps(message).encode() for message in messages], model="demo")
            messages.append(self._upstream.said)
            if "expect" in turn:
                found = turn["expect"] in self._upstream.said["content"]
                at_once = found and len(self._upstream.requests) == 1
                self.result.asked[str(number)] = "demo", at_once, found
            self.result.bills[part] += self._upstream.billed - before

    async def _replay(self, conversation: Conversation) -> None:
        name, messages, upstream = conversation.id, conversation.messages, self._upstream
        tools = tools_of(conversation) if self._name == "agents" else []
        raws = [json.dumps(message).encode() for message in messages]
        places = conversation.turns()[-ASKED_TURNS:] if conversation.questions else []
        for at, message in enumerate(messages):
            if at and message["role"] == "assistant" and messages[at - 1]["role"] != "assistant":
                before, upstream.recorded = upstream.billed, message
                await self._ask(raws[:at], tools)
                self.result.bills[name] += upstream.billed - before
                if tools:
                    with upstream.outside():
                        self._judge_step(f"{name}/{at}", messages, at)
            if at in places:
                before, upstream.recorded = upstream.billed, None
                for number in range(places.index(at), len(conversation.questions), len(places)):
                    await self._question(conversation, raws[: at + 1], number)
                self.result.asked_bills[name] += upstream.billed - before

    async def _question(self, conversation: Conversation, raws: Sequence[bytes], number: int) -> None:
        question, upstream = conversation.questions[number], self._upstream
        left_out = number % self._data.every and question.category not in STANDING and not self._full
        if left_out or max(question.evidence) >= len(raws):  # what is asked for is still to come
            return
        await self._ask([*raws, json.dumps({"role": "user", "content": question.text}).encode()])
        with upstream.outside():
            evidence = [conversation.messages[i]["content"] for i in question.evidence]
            at_once, answered = (shows(r, evidence) for r in (upstream.requests[0], upstream.requests[-1]))
            self.result.asked[f"{conversation.id}/{number}"] = question.category, at_once, answered

    def _judge_step(self, key: str, messages: Sequence[Message], at: int) -> None:
        """Whether an agent's window has what its answer takes from before the last four messages."""
        recent = max(0, at - 4)
        far = terms(messages[at]) & terms(messages[1:recent]) - terms(messages[recent:at])
        if far:
            shown = far <= terms(self._upstream.requests[0]["messages"])
            self.result.asked[key] = "agents", shown, shown

    async def _ask(self, raws: Sequence[bytes], tools: Sequence[Message] = (), model: str = "gpt-4o") -> None:
        """One request, answered."""
        self._upstream.requests.clear()
        with self._upstream.outside():
            head = json.dumps({"model": model, **({"tools": tools} if tools else {})}).encode()
            body = head[:-1] + b',"messages":[' + b",".join(raws) + b"]}"
        reply = await self._client.post("/v1/chat/completions", content=body, headers=HEADERS)
        if reply.status_code != 200:
            raise SystemExit(f"status {reply.status_code}: {reply.text[:300]}")


_TERM = re.compile(r"\w*\d\w*(?:[./:@#-]\w+)*|\w+(?:[_./@#-]\w+)+")


def terms(messages: Any) -> set[str]:
    """What looks like a number, a code or an identifier."""
    return {term for term in _TERM.findall(json.dumps(messages)) if len(term) > 3}


def shows(request: dict[str, Any], evidence: Sequence[str]) -> bool:
    """Whether all of it stands in full in the window, but for white space: where a long message was cut into
    pages, the seam does not matter."""
    seen = ["".join(text.split()) for text in seen_text(request)]
    return all(any("".join(text.split()) in page for page in seen) for text in evidence)


def measure(name: str, data: str, full: bool) -> Result:
    """One row on one data set, in a process of its own."""
    row = next(row for row in ROWS if row.name == name)
    reached, run = switch_off(row), Run(data, full)
    with tempfile.TemporaryDirectory(prefix="ablation-") as folder:
        asyncio.run(run.play(row.config, folder))
        files = (path for path in Path(folder).rglob("*") if path.is_file())
        run.result.disk_mb = sum(path.stat().st_size for path in files) / 1e6
    run.result.reached = reached()
    return run.result


# ---------------------------------------------------------------- the table

Results = dict[str, Result]  # of one row, by data set


def lost(row: Result, default: Result, at_once: bool = False) -> tuple[float, float]:
    """(points of recall lost without the part, their standard error), question by question."""
    which = 1 if at_once else 2
    each = [default.asked[key][which] - row.asked[key][which] for key in default.asked]
    return 100 * statistics.fmean(each), 100 * statistics.stdev(each) / math.sqrt(len(each))


def billed(row: dict[str, float], default: dict[str, float]) -> tuple[float, float]:
    """(percent billed more without the part, how much of it may be noise)."""
    if not default:
        return 0.0, 0.0
    ratios = [100 * (row[key] / default[key] - 1) for key in default]
    noise = 2 * statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else 100.0
    return 100 * (sum(row.values()) / sum(default.values()) - 1), max(0.5, noise)


def gain(row: Results, default: Results) -> str:
    """In words: what the part is good for, and what it costs."""
    good, bad = [], []
    for data, result in row.items():
        points, error = lost(result, default[data])
        early, spread = lost(result, default[data], at_once=True)
        bill = billed(result.bills, default[data].bills)
        asked = billed(result.asked_bills, default[data].asked_bills)
        recalls = [("recall", points, 2 * error), ("at once", early, 2 * spread)][: 1 if data == "agents" else 2]
        for what, value, noise in (*recalls, ("bill", *bill), ("questions' bill", *asked)):
            if abs(value) > max(noise, 1e-6):
                (good if value > 0 else bad).append(f"{what} {data} {abs(value):.1f}")
    costs = f"; costs: {', '.join(bad)}" if bad else ""
    return (", ".join(good) or "nothing outside its noise") + costs


def recall(result: Result, default: Result) -> str:
    """One cell."""
    total, found = len(result.asked), sum(asked[2] for asked in result.asked.values())
    text = f"{found}/{total} ({sum(asked[1] for asked in result.asked.values())})"
    if result is default:
        return f"{text} ±{100 * math.sqrt(found * (total - found) / total**3):.1f}"
    points, error = lost(result, default)
    return f"{text} {0.0 - points:+.1f}±{error:.1f}"


def cells(name: str, results: Results, default: Results) -> dict[str, str]:
    """One line of the table, by column."""
    first, pairs = results is default, [(results[data], default[data]) for data in results]
    line = {"without": name, **{data: recall(results[data], default[data]) for data in results}}
    for column, category in zip(("instr", "pref"), STANDING, strict=True):
        standing = [a[1] for r in results.values() for a in r.asked.values() if a[0] == category]
        line[column] = f"{sum(standing)}/{len(standing)}"
    for column, of in (("bill %", "bills"), ("questions' %", "asked_bills")):
        both = [(getattr(r, of), getattr(d, of)) for r, d in pairs if getattr(d, of)]
        figures = (f"{sum(r.values()) / 1e6:.2f}M" if first else f"{billed(r, d)[0]:+.1f}" for r, d in both)
        line[column] = " ".join(figures)
    for column, of, unit in (("CPU %", "cpu_s", "s"), ("disk %", "disk_mb", "MB")):
        now, was = (sum(getattr(r, of) for r in rs) for rs in zip(*pairs, strict=True))
        line[column] = f"{now:.1f} {unit}" if first else f"{100 * (now / was - 1):+.1f}"
    for column in ("epochs", "calls", "refaults"):
        line[column] = " ".join(str(getattr(r, column)) for r, _ in pairs)
    used = any(result.reached for result in results.values())
    return {**line, "gain": "" if first else gain(results, default) if used else "no request comes by it"}


def show(lines: Sequence[dict[str, str]], markdown: bool) -> str:
    """The table, as text or for the README."""
    names = list(lines[0])
    rows = [names, *([line[name] for name in names] for line in lines)]
    if markdown:
        rows.insert(1, ["---"] * len(names))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="parts of rows' names, comma between them; the default is always run")
    parser.add_argument("--data", default=",".join(DATA), help="of " + ", ".join(DATA))
    parser.add_argument("--full", action="store_true", help="every conversation and question, not the fixed sample")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", type=Path, help="a file for the figures, written as they come")
    given = parser.parse_args()
    wanted, datas = given.rows.lower().split(","), given.data.split(",")
    rows = [r.name for r in ROWS if r.name == DEFAULT or any(w.strip() in r.name.lower() for w in wanted)]
    results: dict[str, Results] = {name: {} for name in rows}
    for row in ROWS:
        switch_off(row)  # in this process, which serves nothing: what is gone is said at once
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        jobs = [(r, d, pool.submit(measure, r, d, given.full)) for r in rows for d in datas]
        for name, data, job in jobs:
            results[name][data] = job.result()
            print(f"{name}: {data}", file=sys.stderr, flush=True)
            if given.json:
                plain = {n: {d: vars(r) for d, r in found.items()} for n, found in results.items()}
                given.json.write_text(json.dumps(plain))
    default = results[DEFAULT]
    print(show([cells(name, found, default) for name, found in results.items()], given.markdown))


if __name__ == "__main__":
    main()
