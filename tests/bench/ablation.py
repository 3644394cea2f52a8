"""What each part of the memory is worth: real conversations with one part switched off at a time.

Run from the repository's root: `python -m tests.bench.ablation [--rows claims,TLB] [--data beam] [--full]
[--markdown]`. Every row of the table is the proxy without one part. Conversations are replayed turn by turn
through the whole application in this process, with an upstream that answers with the recorded turn; then
their questions are asked, each as a fork of the full history, and the demo reader answers with the VM tools.

- `answered`: questions all of whose evidence stands in full in the last round's request; `window`: in the
  first round's already. Beside it the difference to the default in points, with its standard error over the
  same questions. An agent has no questions: there it is the calls whose names and numbers of older messages
  stand in the request. The demo's are answered when the expected words are in the answer.
- `instr`, `pref`: BEAM's questions about standing instructions and preferences, whose evidence no search
  finds: so many have it in the first round's window.
- `bill`: input tokens of the conversations' requests, a cached prefix at a tenth; `questions'`: of the
  questions', which are many for so short a chat. One figure for each data set, in its order. `CPU` is the proxy's own, without upstream,
  client and reader. `disk`: the state directory at the end. Each relative to the default of the same run.
- `gain`: on what the part gains more than twice the standard error (a bill: at least 0.5 %, and 2 % where
  there is one conversation), and what is better without it.

A row whose place in the code is gone ends the run: it would measure nothing. A row whose code no request
came by says so.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import proxy.app
from proxy.config import Config
from proxy.conversation.report import TurnReport
from proxy.demo.play import conversation as demo_turns
from proxy.demo.play import demo_config
from proxy.memory.models import CompressionLevel
from proxy.tokens import get_counter
from proxy.upstream import BytesReply, Header
from proxy.upstream.demo_cache import PromptCache
from proxy.upstream.demo_reader import read, seen_text
from tests.e2e.data import Conversation, load_beam, load_locomo, load_trajectories, tools_of

DEFAULT = "default"
AGAIN = "nothing (default again)"
STANDING = ("instruction_following", "preference_following")
Patch = tuple[str, Callable[[Any], Any]]  # "module:name", and what makes the new of the old value


@dataclass(frozen=True)
class Row:
    """The default, and what is switched off."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    patches: tuple[Patch, ...] = ()


def _always(value: Any) -> Callable[[Any], Any]:
    """A function's place taken by one that returns a constant."""
    return lambda old: lambda *args, **more: value


def _constant(value: Any) -> Callable[[Any], Any]:
    return lambda old: value


def _first_rows(old: Any) -> Any:
    return lambda rows, budget: old([row for row in rows if row.first], budget)


def _tools_only(old: Any) -> Any:
    return lambda self, hits, source: old(self, hits, source) if source.value == "tool" else ()


_FULL = (CompressionLevel.FULL,)
_NO_DERIVED: dict[str, Any] = {"segments": {"summary_tokens": 0, "max_claims": 0}}
_NO_STANDING: tuple[Patch, ...] = (
    ("proxy.conversation.newpages:is_standing", _always(False)),
    ("proxy.conversation.room:is_standing", _always(False)),
)
_NO_THRASH: tuple[Patch, ...] = (
    ("proxy.memory.page_table:is_cooling", _always(False)),
    ("proxy.memory.planner:is_protected", _always(False)),
    ("proxy.memory.eviction_policy:is_protected", _always(False)),
    ("proxy.memory.anti_thrash:AntiThrashPolicy.cooling", _always(False)),
)
_NO_TLB: tuple[Patch, ...] = (
    ("proxy.memory.tlb:TLBWithPageTable.lookup", lambda old: lambda self, i: self.page_table.lookup(i)),
    ("proxy.memory.tlb:TLBWithPageTable.apply", lambda old: lambda self, m: self.page_table.apply(m)),
    ("proxy.memory.tlb:TLBWithPageTable.shed", lambda old: lambda self, n=0: self.page_table.shed(n, ())),
)  # fmt: skip

ROWS = (
    Row(DEFAULT),
    Row(AGAIN),
    Row("manifest", {"manifest": {"max_tokens": 1}}),
    Row("segments (index lines)", patches=(("proxy.memory.segments:_index_line", _always("")),)),
    Row("claims", {"segments": {"max_claims": 0}}),
    Row("summaries", {"segments": {"summary_tokens": 0}}),
    Row("procedures", patches=(("proxy.memory.segments:procedure_pages", _always([])),)),
    Row("claims, summaries, procedures, index", _NO_DERIVED),
    Row("pinned instructions", patches=_NO_STANDING),
    Row("weight of preferences", patches=(("proxy.conversation.newpages:importance_of", _always(0.5)),)),
    Row("ImportanceWeightedLRU (LRU)", {"memory": {"eviction": "lru"}}),
    Row("ImportanceWeightedLRU (ModalityAwareLRU)", {"memory": {"eviction": "modality"}}),
    Row("any policy (all pages alike)", patches=(("proxy.memory.eviction_policy:_value", _always(1.0)),)),
    Row("anti-thrash", patches=_NO_THRASH),
    Row("TLB", patches=_NO_TLB),
    Row("levels 1 and 2 of context lines", patches=(("proxy.memory.planner:_LEVELS", _constant(_FULL)),)),
    Row("level 1 of prefetched pages", patches=(("proxy.conversation.prefetch:_LEVELS", lambda old: old[:1]),)),
    Row("context lines but of pinned pages", patches=(("proxy.memory.planner:_context", _first_rows),)),
    Row("context lines", patches=(("proxy.conversation.epoch:_CONTEXT_SHARE", _constant(0.0)),)),
    Row("prefetch", {"prefetch": {"max_pages": 0, "max_tokens": 0}}),
    Row("prefetch by words", patches=(("proxy.conversation.prefetch:Prefetch._candidates", _tools_only),)),
    Row("prefetch of claims and summaries", patches=(("proxy.conversation.prefetch:Prefetch._derived", _always(())),)),
    Row("prefetch by tools", patches=(("proxy.conversation.prefetch:Prefetch._likely_tools", _always([])),)),
    Row("faults and searches (passive)", {"memory": {"mode": "passive"}}),
    Row("calibration", patches=(("proxy.conversation.calibration:Calibration.learn", lambda old: lambda self, *a, **k: self),)),
    Row("checkpoints", patches=(("proxy.api.archive:Archive._save", _always(None)),)),
    Row("provenance", patches=(("proxy.conversation.derived:Derived.provenance", _constant(None)),
                               ("proxy.memory.provenance:ProvenanceGraph.add_page", _always(0)))),
)  # fmt: skip


@contextmanager
def switched_off(row: Row) -> Iterator[Callable[[], bool]]:
    """The row's patches in place; yields whether any request came by one. SystemExit for one whose
    place is gone."""
    reached: list[bool] = []
    undo: list[tuple[Any, str, Any]] = []
    for target, make in row.patches:
        module, _, names = target.partition(":")
        *path, name = names.split(".")
        try:
            owner = functools.reduce(getattr, path, importlib.import_module(module))
            old = vars(owner)[name]
        except (ImportError, AttributeError, KeyError):
            raise SystemExit(f"row {row.name}: {module}.{names} is gone") from None
        new = make(old)
        if callable(new):
            new = _counted(new, reached)
        else:
            reached.append(new is not None)
        undo.append((owner, name, old))
        setattr(owner, name, new)
    try:
        yield lambda: not row.patches or any(reached)
    finally:
        for owner, name, old in undo:
            setattr(owner, name, old)


def _counted(function: Callable[..., Any], reached: list[bool]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **more: Any) -> Any:
        if not reached:
            reached.append(True)
        return function(*args, **more)

    return call


# ------------------------------------------------------------------ the data
def _agents(full: bool) -> list[Conversation]:
    """Those that outgrow the window by half, the longest first."""
    long = [c for c in load_trajectories() if _chars(c) > 6 * DATA["agents"].window_tokens]
    long.sort(key=_chars, reverse=True)
    return long if full else long[:24]


def _chars(conversation: Conversation) -> int:
    return sum(len(json.dumps(message)) for message in conversation.messages)


def _demo(full: bool) -> list[Conversation]:
    system = {"role": "system", "content": "You are a friend who listens well. Answer briefly."}
    return [Conversation("demo", [system])]


@dataclass(frozen=True)
class Data:
    name: str
    window_tokens: int
    conversations: Callable[[bool], Sequence[Conversation]]
    every: int = 1  # one question in so many is asked, but for the standing ones

    def config(self, state: Path) -> dict[str, Any]:
        """The server's settings."""
        if self.name == "demo":
            shown = json.loads(demo_config(self.window_tokens, state).model_dump_json())
            return {**shown, "upstream": {}}
        l0 = {"tokens": self.window_tokens, "reserve_tokens": 4096}
        return {"tiers": {"l0": l0, "l2": {"path": str(state)}}}


DATA = {
    data.name: data
    for data in (
        Data("locomo", 4000, lambda full: load_locomo() if full else load_locomo()[::2], 3),
        Data("beam", 16000, lambda full: load_beam() if full else load_beam()[::2]),
        Data("agents", 4000, _agents),
        Data("demo", 4000, _demo),
    )
}


# ------------------------------------------------------------------ one run
class Upstream:
    """Answers with `recorded`, or as the demo reader does; keeps the turn's requests and the bill."""

    def __init__(self, meter: Meter) -> None:
        self.recorded: dict[str, Any] | None = None
        self.requests: list[dict[str, Any]] = []
        self.billed = 0.0
        self._meter, self._counter = meter, get_counter("gpt-4o")
        self._cache = PromptCache(self._counter)

    def begin(self) -> None:
        """Another conversation: nothing of it is in the provider's cache."""
        self._cache, self.billed = PromptCache(self._counter), 0.0

    async def chat(
        self, body: bytes, headers: Sequence[Header], query: bytes = b"", path: str = ""
    ) -> BytesReply:
        """One completion, with the bill's usage."""
        with self._meter.outside():
            request = json.loads(body)
            request.pop("prompt_cache_key", None)  # of a random secret: the reader's ids come from the request
            self.requests.append(request)
            bill = self._cache.bill(request)
            self.billed += bill.billed_tokens
            message = self.recorded or read(request)
            reason = "tool_calls" if message.get("tool_calls") else "stop"
            usage = {"prompt_tokens": bill.prompt_tokens, "completion_tokens": 1}
            answer = {
                "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": request["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": reason}],
                "usage": {**usage, "total_tokens": bill.prompt_tokens + 1},
            }  # fmt: skip
            data = json.dumps(answer).encode()
        return BytesReply(200, [(b"content-type", b"application/json")], data)

    async def forward(self, *call: Any) -> BytesReply:
        """There is nothing else here."""
        return BytesReply(404, [], b"{}")

    async def start(self) -> None:
        """Nothing takes long."""

    async def close(self) -> None:
        """Nothing is open."""


class Meter:
    """Seconds of CPU of this process, less what was spent `outside` the proxy."""

    def __init__(self) -> None:
        self._began, self._outside = time.process_time(), 0.0

    @contextmanager
    def outside(self) -> Iterator[None]:
        """What the bench itself does."""
        began = time.process_time()
        try:
            yield
        finally:
            self._outside += time.process_time() - began

    def seconds(self) -> float:
        return time.process_time() - self._began - self._outside


@dataclass
class Result:
    """What one row showed on one data set."""

    asked: dict[str, tuple[str, bool, bool]] = field(default_factory=dict)  # category, window, answered
    bills: dict[str, float] = field(default_factory=dict)  # by conversation, of its turns
    asked_bills: dict[str, float] = field(default_factory=dict)  # of its questions
    cpu_s: float = 0.0
    disk_bytes: int = 0
    epochs: int = 0
    faults: int = 0
    searches: int = 0
    refaults: int = 0
    reached: bool = True

    def observe(self, report: TurnReport) -> None:
        self.epochs += report.new_epoch
        self.faults += len(report.faults)
        self.searches += len(report.searches)
        self.refaults += sum(fault.refault for fault in report.faults)


class Bench:
    """One application and what is asked of it."""

    def __init__(self, row: Row, data: Data, full: bool) -> None:
        get_counter("gpt-4o")  # loaded: it takes a second, whatever is switched off
        self.data, self.full, self.result, self.meter = data, full, Result(), Meter()
        self._row, self.upstream = row, Upstream(self.meter)

    async def run(self) -> Result:
        """Every conversation, and its questions."""
        with tempfile.TemporaryDirectory(prefix="ablation-") as folder:
            with switched_off(self._row) as reached:
                setattr(proxy.app, "make_upstream", lambda config: self.upstream)  # noqa: B010
                config = _merged(self.data.config(Path(folder)), self._row.config)
                app = proxy.app.create_app(Config.from_json(json.dumps(config)), self.result.observe)
                with self.meter.outside():
                    conversations = self.data.conversations(self.full)
                for conversation in conversations:
                    self.upstream.begin()
                    await self._play(app, conversation)
                await _shut_down(app)
                self.result.cpu_s, self.result.reached = self.meter.seconds(), reached()
            files = (path for path in Path(folder).rglob("*") if path.is_file())
            self.result.disk_bytes = sum(path.stat().st_size for path in files)
        return self.result

    async def _play(self, app: Any, conversation: Conversation) -> None:
        name = self.data.name
        if name == "demo":
            await self._play_demo(app, conversation)
            self.result.bills[name] = self.upstream.billed
            return
        tools = tools_of(conversation) if name == "agents" else []
        messages = conversation.messages
        raws = [json.dumps(message).encode() for message in messages]
        for at, message in enumerate(messages):
            if at and message["role"] == "assistant" and messages[at - 1]["role"] != "assistant":
                self.upstream.recorded = message
                await self._ask(app, raws[:at], tools)
                if name == "agents":
                    with self.meter.outside():
                        self._judge_call(f"{conversation.id}/{at}", messages, at)
        self.result.bills[conversation.id] = replayed = self.upstream.billed
        self.upstream.recorded = None
        for number, question in enumerate(conversation.questions):
            if number % self.data.every and question.category not in STANDING and not self.full:
                continue
            asked = json.dumps({"role": "user", "content": question.text}).encode()
            await self._ask(app, [*raws, asked], tools)
            with self.meter.outside():
                evidence = [_squeezed(messages[i]["content"]) for i in question.evidence]
                ends = (self.upstream.requests[0], self.upstream.requests[-1])
                window, answered = (_shows(request, evidence) for request in ends)
                key = f"{conversation.id}/{number}"
                self.result.asked[key] = question.category, window, answered
        if conversation.questions:
            self.result.asked_bills[conversation.id] = self.upstream.billed - replayed

    async def _play_demo(self, app: Any, conversation: Conversation) -> None:
        messages = list(conversation.messages)
        for number, turn in enumerate(demo_turns()):
            messages.append({"role": "user", "content": turn["user"]})
            raws = [json.dumps(message).encode() for message in messages]
            answer = await self._ask(app, raws, [], "demo")
            messages.append({"role": "assistant", "content": answer})
            if "expect" in turn:
                found = turn["expect"] in answer
                window = found and len(self.upstream.requests) == 1
                self.result.asked[str(number)] = "demo", window, found

    def _judge_call(self, key: str, messages: Sequence[dict[str, Any]], at: int) -> None:
        """Whether the window has the names and numbers that an agent's answer takes from messages
        further back than the last four."""
        older = _terms(json.dumps(messages[1 : max(1, at - 4)]))
        far = _terms(json.dumps(messages[at])) & older - _terms(json.dumps(messages[max(0, at - 4) : at]))
        if far:
            request = self.upstream.requests[0]
            shown = far <= _terms(json.dumps(request["messages"]))
            self.result.asked[key] = "agents", shown, shown

    async def _ask(
        self, app: Any, raws: Sequence[bytes], tools: Sequence[dict[str, Any]], model: str = "gpt-4o"
    ) -> str:
        """One request through the application; the answer's text."""
        self.upstream.requests.clear()
        with self.meter.outside():
            head = {"model": model, **({"tools": tools} if tools else {})}
            body = json.dumps(head).encode()[:-1] + b',"messages":[' + b",".join(raws) + b"]}"
        sent: list[dict[str, Any]] = []
        events = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if not events:
                await asyncio.Event().wait()  # the client stays
            return events.pop()

        async def send(event: dict[str, Any]) -> None:
            sent.append(event)

        await app(dict(_SCOPE), receive, send)
        data = b"".join(event.get("body", b"") for event in sent)
        if sent[0]["status"] != 200:
            raise SystemExit(f"row {self._row.name}: status {sent[0]['status']}: {data[:300]!r}")
        return str(json.loads(data)["choices"][0]["message"].get("content") or "")


_SCOPE = {
    "type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "query_string": b"",
    "path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions",
    "headers": [(b"content-type", b"application/json"), (b"authorization", b"Bearer bench")],
    "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
}  # fmt: skip
_TERM = re.compile(r"\w*\d\w*(?:[./:@#-]\w+)*|\w+(?:[_./@#-]\w+)+")


def _terms(text: str) -> set[str]:
    """What looks like a number, a code or an identifier."""
    return {term for term in _TERM.findall(text) if len(term) > 3}


def _squeezed(text: str) -> str:
    """Without white space: where a long message was cut into pages, the seam does not matter."""
    return "".join(text.split())


def _shows(request: dict[str, Any], evidence: Sequence[str]) -> bool:
    seen = [_squeezed(text) for text in seen_text(request)]
    return all(any(text in page for page in seen) for text in evidence)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    deep = {k: _merged(base.get(k) or {}, v) if isinstance(v, dict) else v for k, v in over.items()}
    return {**base, **deep}


async def _shut_down(app: Any) -> None:
    """As a server does: what is being written is written."""
    events = [{"type": "lifespan.shutdown"}]

    async def receive() -> dict[str, Any]:
        return events.pop()

    async def send(event: dict[str, Any]) -> None:
        pass

    await app({"type": "lifespan"}, receive, send)


def measure(row: str, data: str, full: bool) -> Result:
    """One row on one data set, in a process of its own."""
    chosen = next(known for known in ROWS if known.name == row)
    return asyncio.run(Bench(chosen, DATA[data], full).run())


# ------------------------------------------------------------------ the table
Results = dict[str, Result]  # by data set


def _difference(row: Result, default: Result) -> tuple[float, float]:
    """(points of recall lost without the part, their standard error), question by question."""
    lost = [default.asked[key][2] - row.asked[key][2] for key in default.asked]
    spread = statistics.stdev(lost) if len(lost) > 1 else 0.0
    return 100 * statistics.fmean(lost), 100 * spread / math.sqrt(len(lost))


def _bill(row: dict[str, float], default: dict[str, float]) -> tuple[float, float]:
    """(percent that is billed more without the part, what of it may be noise)."""
    ratios = [100 * (row[key] / default[key] - 1) for key in default]
    if not ratios:
        return 0.0, 0.0
    more = 100 * (sum(row.values()) / sum(default.values()) - 1)
    if len(ratios) == 1:
        return more, 2.0
    return more, max(0.5, 2 * statistics.stdev(ratios) / math.sqrt(len(ratios)))


def _gain(row: Results, default: Results) -> str:
    """In words: what the part is good for, and what is better without it."""
    good, bad = [], []
    for data, result in row.items():
        recall, error = _difference(result, default[data])
        bill = _bill(result.bills, default[data].bills)
        asked = _bill(result.asked_bills, default[data].asked_bills)
        for what, value, least in (("recall", recall, 2 * error), ("bill", *bill), ("questions' bill", *asked)):
            if abs(value) > max(least, 0.001):
                (good if value > 0 else bad).append(f"{what} {data} {abs(value):.1f}")
    words = ", ".join(good) or "nothing outside its noise"
    return words + (f"; costs: {', '.join(bad)}" if bad else "")


def _standing(results: Results, category: str) -> str:
    found = [
        window for r in results.values() for kind, window, _ in r.asked.values() if kind == category
    ]
    return f"{sum(found)}/{len(found)}" if found else ""


def _recall(data: str, results: Results, default: Results) -> str:
    if data not in results:
        return ""
    asked = list(results[data].asked.values())
    window, answered = sum(a[1] for a in asked), sum(a[2] for a in asked)
    text = f"{answered}/{len(asked)}" if data == "agents" else f"{answered}/{len(asked)} ({window})"
    if results is default:
        return f"{text} ±{100 * math.sqrt(answered * (len(asked) - answered) / len(asked) ** 3):.1f}"
    lost, error = _difference(results[data], default[data])
    return f"{text} {-lost:+.1f}±{error:.1f}"


def _change(now: float, was: float) -> str:
    return f"{100 * (now / was - 1):+.1f}"


def cells(name: str, results: Results, default: Results) -> dict[str, str]:
    """One line of the table, by column."""
    line = {"without": name}
    for data in DATA:
        if data in default:
            line[data] = _recall(data, results, default)
    line["instr"], line["pref"] = (_standing(results, category) for category in STANDING)
    pairs = [(results[data], default[data]) for data in results]
    first = results is default
    for column, of in (("bill %", "bills"), ("questions' %", "asked_bills")):
        both = [(getattr(r, of), getattr(d, of)) for r, d in pairs if getattr(d, of)]
        line[column] = " ".join(
            f"{sum(now.values()) / 1e6:.2f}M" if first else f"{_bill(now, was)[0]:+.1f}" for now, was in both
        )
    cpus, disks = [[r.cpu_s, d.cpu_s] for r, d in pairs], [[r.disk_bytes, d.disk_bytes] for r, d in pairs]
    (cpu, cpu_was), (disk, disk_was) = (map(sum, zip(*all_of, strict=True)) for all_of in (cpus, disks))
    line["CPU %"] = f"{cpu:.1f} s" if first else _change(cpu, cpu_was)
    line["disk %"] = f"{disk / 1e6:.1f} MB" if first else _change(disk, disk_was)
    line["epochs"] = " ".join(str(r.epochs) for r, _ in pairs)
    reached = any(r.reached for r, _ in pairs)
    line["gain"] = "" if first else _gain(results, default) if reached else "no request comes by it"
    return line


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
    parser.add_argument("--rows", help="parts of rows' names, comma between them; the default is always run")
    parser.add_argument("--data", default=",".join(DATA), help="of " + ", ".join(DATA))
    parser.add_argument("--full", action="store_true", help="every conversation and question")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", type=Path, help="keep the figures in this file")
    asked = parser.parse_args()
    wanted = [w.strip().lower() for w in (asked.rows or "").split(",")]
    rows = [r.name for r in ROWS if r.name == DEFAULT or any(w in r.name.lower() for w in wanted)]
    datas = asked.data.split(",")
    results: dict[str, Results] = {name: {} for name in rows}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, max_tasks_per_child=1) as pool:
        jobs = [(r, d, pool.submit(measure, r, d, asked.full)) for r in rows for d in datas]
        for row, data, job in jobs:
            results[row][data] = job.result()
            print(f"{row}: {data}", file=sys.stderr, flush=True)
            if asked.json:
                _keep(asked.json, results)
    default = results[DEFAULT]
    print(show([cells(name, found, default) for name, found in results.items()], asked.markdown))


def _keep(file: Path, results: dict[str, Results]) -> None:
    plain = {n: {d: vars(r) for d, r in found.items()} for n, found in results.items()}
    file.write_text(json.dumps(plain))


if __name__ == "__main__":
    main()
