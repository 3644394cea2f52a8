"""Is what was said in the window when it is asked for? Through the program, and beside it its index and the baselines.

    python -m tests.bench.recall [--quick] [--data locomo,beam] [--windows 4000,16000] [--only grown,index]
                                 [--json FILE] [--against FILE] [--set prefetch.max_pages=20]

No model and no judge: LoCoMo and BEAM say which messages answer a question, and a message counts as shown where
its whole text stands in the request (`coverage.py`). A real `llm-pager serve` stands between a client and an
upstream of ours, over HTTP; each question is the next user message, as a branch of its own.

- `first sight`: the history is new to the program: each question comes from another tenant.
- `grown`: the conversation was played turn by turn, upstream answering as recorded; then each question forks it.
- `at once`: all the evidence of a question is in the first upstream request. `faults`: it is there after a reader
  who searches once with the question and then faults the three best pages that it was not shown whole. `lost`: not
  even then. `one`, `more`: `at once` of the questions with one and with several messages of evidence.
- `tokens`: prompt tokens of the first request.
- Baselines are windows of whole messages that may use the window to its last token: they pay for no rules,
  tools, quoting and reserve for the answer. `oracle` knows the evidence.
- The index alone: `R@k` is the mean share of a question's evidence in the first k results; `all@T` the share of
  questions with all of it in T tokens of results (what does not fit is skipped); `window` the same for a window of
  4,000 tokens made of the newest 4 messages and the best results by value for their tokens; `1.5k+1k` for the
  newest 1,500 tokens and 1,000 of results; `session` R@10 with sessions ranked by their best message (BEAM has at most ten days).

Percent of questions; LoCoMo's adversarial ones, which have no answer, are not asked. With `--against`, the
difference to an earlier run's file with its standard error, question by question.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from tests.bench.baselines import (
    Embedded,
    Message,
    Oracle,
    SlidingWindow,
    StemmedBM25,
    fill,
    messages_of,
    newest,
)
from tests.bench.coverage import folded, share_shown, window_text
from tests.bench.encoders import encoders
from tests.bench.recall_memory import Paged
from tests.e2e.answers import call, completion, message_of
from tests.e2e.data import (
    Conversation,
    Question,
    load_beam,
    load_beam_long,
    load_locomo,
)
from tests.e2e.processes import ServerProcess
from tests.e2e.recording import RecordingUpstream
from tests.e2e.rules import count_request_tokens

DATA: dict[str, Callable[[], Sequence[Conversation]]] = {
    "locomo": load_locomo,
    "beam": load_beam,
    "500K": partial(load_beam_long, "500K"),
    "1M": partial(load_beam_long, "1M"),
}
WINDOWS = (4000, 16000, 32000)
PARTS = ("first", "grown", "baselines", "index")
MODEL = "gpt-4o"
TAG = "x-bench-tag"  # names the request for the upstream
AT_ONCE = 2  # conversations in flight
FAULTS = 3
SEARCH_LIMIT = 20
KS = (1, 5, 10)
RESULT_TOKENS = (600, 1000, 2000, 4000)
WINDOW_TOKENS = 4000
SPLITS = {"1.5k+1k": (1500, 1000), "9k+2k": (9000, 2000), "18k+4k": (18000, 4000)}  # newest, results
SESSIONS = 10
RANKED = 200  # results that are looked at
MINILM_DATA = ("locomo",)  # it takes 50 ms a message, the first time

# row ("locomo 4,000 grown") -> column ("at once") -> question ("conv-26/17") -> value
Figures = dict[str, dict[str, dict[str, float]]]


class Chosen:
    """The conversations and questions of a run."""

    def __init__(self, data: str, every_question: int, every_conversation: int) -> None:
        self.data = data
        self.conversations = list(DATA[data]())[::every_conversation]
        self._every = every_question

    def questions(self, conversation: Conversation) -> Iterator[tuple[str, Question]]:
        asked = [q for q in conversation.questions if q.category != "adversarial"]
        for number in range(0, len(asked), self._every):
            yield f"{conversation.id}/{number}", asked[number]


# ---------------------------------------------------------------- through the program


class Reader:
    """Answers one question's requests: it stops when it has all the evidence, and notes what it saw when."""

    def __init__(self, question: str, evidence: Sequence[str]) -> None:
        self._question, self._evidence = question, [folded(text) for text in evidence]
        self.shares: list[float] = []  # of the evidence, request by request
        self.tokens = 0

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        self.shares.append(share_shown(window_text(request), self._evidence))
        self.tokens = self.tokens or count_request_tokens(request)
        calls = [] if self.shares[-1] == 1 else self._calls(request)
        return message_of(None, calls) if calls else message_of("I see.")

    def _calls(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        tools = {} if request.get("tool_choice") == "none" else _vm_tools(request)
        if len(self.shares) == 1 and "search_pages" in tools:
            asked = {"query": self._question, "limit": SEARCH_LIMIT}
            return [call("call_search", tools["search_pages"], asked)]
        if len(self.shares) == 2 and "page_fault" in tools:
            results = json.loads(request["messages"][-1]["content"]).get("results") or []
            leads = [result["page_id"] for result in results if result.get("complete") is not True]
            name = tools["page_fault"]
            return [call(f"call_{i}", name, {"page_id": lead}) for i, lead in enumerate(leads[:FAULTS])]
        return []


def _vm_tools(request: dict[str, Any]) -> dict[str, str]:
    """page_fault and search_pages -> the names under which they are offered."""
    names = [tool["function"]["name"] for tool in request.get("tools") or []]
    return {kind: name for kind in ("page_fault", "search_pages") for name in names if name.endswith(kind)}


class Program:
    """Our server before an upstream that answers as recorded, or reads."""

    def __init__(self, window_tokens: int, settings: dict[str, Any]) -> None:
        self._answers: dict[str, str] = {}
        self._readers: dict[str, Reader] = {}
        self.upstream = RecordingUpstream(self._respond)
        self._config = merged({"tiers": {"l0": {"tokens": window_tokens}}}, settings)

    def _respond(self, request: dict[str, Any], index: int) -> Any:
        recorded = self.upstream.calls[index]
        tag = recorded.header(TAG) or ""
        recorded.json, recorded.head, recorded.body, recorded.raw = None, b"", b"", b""  # thousands of windows
        reader = self._readers.get(tag)
        return completion(request, reader.reply(request) if reader else message_of(self._answers[tag]))

    async def run(self, chosen: Chosen, parts: Sequence[str]) -> dict[str, list[tuple[str, Question, Reader]]]:
        """What the readers saw, by part."""
        found: dict[str, list[tuple[str, Question, Reader]]] = {part: [] for part in parts}
        slots = asyncio.Semaphore(AT_ONCE)
        async with self.upstream:
            upstream = {"upstream": {"base_url": self.upstream.base_url}}
            with ServerProcess(merged(self._config, upstream)) as server:
                self._url = f"{server.base_url}/chat/completions"
                async with aiohttp.ClientSession() as self._client:

                    async def one(conversation: Conversation) -> None:
                        async with slots:
                            for part in parts:
                                found[part] += await self._conversation(chosen, conversation, part)

                    await asyncio.gather(*map(one, chosen.conversations))
        if self.upstream.failures:
            raise self.upstream.failures[0]
        return found

    async def _conversation(
        self, chosen: Chosen, conversation: Conversation, part: str
    ) -> list[tuple[str, Question, Reader]]:
        raws = [json.dumps(message, ensure_ascii=False).encode() for message in conversation.messages]
        if part == "grown":
            for at in conversation.turns():
                tag = f"{conversation.id}/turn {at}"
                self._answers[tag] = conversation.messages[at]["content"]
                await self._send(tag, raws[:at], conversation.id)
        out = []
        for key, question in chosen.questions(conversation):
            evidence = [conversation.messages[i]["content"] for i in question.evidence]
            reader = self._readers[f"{part} {key}"] = Reader(question.text, evidence)
            asked = json.dumps({"role": "user", "content": question.text}, ensure_ascii=False).encode()
            # Another tenant knows nothing, so that no question meets what the one before has left.
            await self._send(f"{part} {key}", [*raws, asked], conversation.id if part == "grown" else key)
            out.append((key, question, reader))
        return out

    async def _send(self, tag: str, raws: Sequence[bytes], tenant: str) -> None:
        body = b'{"model":"%s","messages":[%s]}' % (MODEL.encode(), b",".join(raws))
        headers = {"content-type": "application/json", "authorization": f"Bearer {tenant}", TAG: tag}
        async with self._client.post(self._url, data=body, headers=headers) as reply:
            text = await reply.text()
            if reply.status != 200:
                raise SystemExit(f"{tag}: status {reply.status}: {text[:500]}")


def through_program(chosen: Chosen, window_tokens: int, parts: Sequence[str], settings: dict[str, Any]) -> Figures:
    out: Figures = {}
    found = asyncio.run(Program(window_tokens, settings).run(chosen, parts))
    for part, asked in found.items():
        way = "first sight" if part == "first" else part
        columns = out[f"{chosen.data} {window_tokens:,} {way}"] = defaultdict(dict)
        for key, question, reader in asked:
            first, last = reader.shares[0] == 1, reader.shares[-1] == 1
            values = {"at once": first, "faults": last and not first, "lost": not last, "share": reader.shares[0]}
            _note(columns, key, question, {**values, "tokens": reader.tokens})
    return out


def _note(columns: dict[str, dict[str, float]], key: str, question: Question, values: dict[str, float]) -> None:
    """A question's values, and `at once` and `lost` once more for its kind."""
    kinds = ["one" if len(question.evidence) == 1 else "more", question.category]
    for kind in kinds:
        values = {**values, kind: values["at once"]}
        if "lost" in values:
            values[f"{kind} lost"] = values["lost"]
    for column, value in values.items():
        columns[column][key] = float(value)


# ---------------------------------------------------------------- without it


class PagedIndex(SlidingWindow):
    """The program's index."""

    name = "our index"

    def __init__(self, messages: Sequence[Message]) -> None:
        super().__init__(messages)
        self._paged = Paged()
        for message in messages:
            self._paged.add(message)

    def search(self, query: str, limit: int) -> list[int]:
        return self._paged.search(query, limit)

    def window(self, question: str, evidence: Sequence[int], budget: int) -> list[int]:
        return self._paged.window(question, budget)


def memories(messages: Sequence[Message], data: str, encode: dict[str, Any]) -> Iterator[Any]:
    """Everything that makes a window or a ranking, for one conversation."""
    yield SlidingWindow(messages)
    yield StemmedBM25(messages)
    for name, encoder in encode.items():
        if name != "MiniLM" or data in MINILM_DATA:
            yield Embedded(messages, name, encoder)
    yield PagedIndex(messages)
    yield Oracle(messages)


def without_program(chosen: Chosen, windows: Sequence[int], parts: Sequence[str], encode: dict[str, Any]) -> Figures:
    out: Figures = defaultdict(lambda: defaultdict(dict))
    for conversation in chosen.conversations:
        messages = messages_of(conversation)
        for memory in memories(messages, chosen.data, encode):
            for key, question in chosen.questions(conversation):
                if "baselines" in parts and not isinstance(memory, PagedIndex):
                    for budget in windows:
                        window = memory.window(question.text, question.evidence, budget)
                        values = {
                            "at once": set(question.evidence) <= set(window),
                            "tokens": sum(messages[i].tokens for i in window),
                        }
                        _note(out[f"{chosen.data} {budget:,} {memory.name}"], key, question, values)
                if "index" in parts and hasattr(memory, "search"):
                    ranked = memory.search(question.text, RANKED)
                    values = ranking(ranked, question.evidence, messages)
                    window = memory.window(question.text, (), WINDOW_TOKENS)
                    values["window"] = set(question.evidence) <= set(window)
                    for column, value in values.items():
                        out[f"{chosen.data} {memory.name}"][column][key] = float(value)
    return out


def ranking(ranked: Sequence[int], evidence: Sequence[int], messages: Sequence[Message]) -> dict[str, float]:
    """What the results of one search hold of a question's evidence."""
    wanted = set(evidence)
    values: dict[str, float] = {f"R@{k}": len(wanted & set(ranked[:k])) / len(wanted) for k in KS}
    for tokens in RESULT_TOKENS:
        values[f"all@{tokens}"] = wanted <= set(fill(ranked, messages, tokens, tail=0))
    if len({message.session for message in messages}) > SESSIONS:
        sessions = list(dict.fromkeys(messages[i].session for i in ranked))[:SESSIONS]
        asked = {messages[i].session for i in evidence}
        values["session"] = len(asked & set(sessions)) / len(asked)
    for column, (recent, results) in SPLITS.items():
        kept = newest(messages, recent)
        rest = [i for i in ranked if i not in set(kept)]
        values[column] = wanted <= {*kept, *fill(rest, messages, results, tail=0)}
    return values


# ---------------------------------------------------------------- the tables

MAIN = ("at once", "faults", "lost", "tokens", "one", "more")
INDEX = (*(f"R@{k}" for k in KS), *(f"all@{t}" for t in RESULT_TOKENS), "window", *SPLITS, "session")


def cell(values: dict[str, float], before: dict[str, float] | None, column: str) -> str:
    """The mean in percent, or in tokens; behind it the difference to `before` on the same questions."""
    if not values:
        return ""
    scale, form = (1, ",.0f") if column == "tokens" else (100, ".1f")
    text = f"{scale * statistics.fmean(values.values()):{form}}"
    each = [value - before[key] for key, value in values.items() if key in before] if before else []
    if len(each) > 1:
        error = statistics.stdev(each) / math.sqrt(len(each))
        text += f" {scale * statistics.fmean(each):+{form}}±{scale * error:{form}}"
    return text


def table(figures: Figures, before: Figures, columns: Sequence[str], title: str) -> str:
    """The rows that have the first of the columns."""
    lines = [[title, "asked", *columns]]
    for row, found in figures.items():
        if columns[0] in found:
            old = before.get(row, {})
            cells = [cell(found.get(c, {}), old.get(c), c) for c in columns]
            lines.append([row, str(len(found[columns[0]])), *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in lines]  # fmt: skip
    return "\n".join(text) if len(lines) > 1 else ""


def by_category(figures: Figures) -> str:
    """`at once` of each kind of question, and what is lost of it."""
    out = []
    for data in DATA:
        rows = {row: c for row, c in figures.items() if row.startswith(f"{data} ") and "at once" in c}
        plain = {*MAIN, "share"}
        kinds = dict.fromkeys(k for c in rows.values() for k in c if k not in plain and not k.endswith(" lost"))
        lines = [[f"{data}: at once / lost", *kinds]]
        for row, columns in rows.items():
            cells = []
            for kind in kinds:
                lost = cell(columns.get(f"{kind} lost", {}), None, kind)
                cells.append(cell(columns.get(kind, {}), None, kind) + (f" / {lost}" if lost else ""))
            lines.append([row, *cells])
        if rows:
            widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
            text = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
            out.append("\n".join(text))
    return "\n\n".join(out)


def report(figures: Figures, before: Figures, notes: Sequence[str]) -> str:
    parts = (
        table(figures, before, MAIN, "percent of questions"),
        table(figures, before, INDEX, "the index alone"),
        by_category(figures),
        "\n".join(notes),
    )
    return "\n\n".join(part for part in parts if part)


# ---------------------------------------------------------------- the command


def merged(config: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    out = dict(config)
    for key, value in more.items():
        out[key] = merged(out.get(key, {}), value) if isinstance(value, dict) else value
    return out


def setting(text: str) -> dict[str, Any]:
    """prefetch.max_pages=20 -> {"prefetch": {"max_pages": 20}}."""
    path, _, raw = text.partition("=")
    try:
        value = json.loads(raw)
    except ValueError:
        value = raw
    for key in reversed(path.split(".")):
        value = {key: value}
    return dict(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=",".join(DATA), help=f"of {', '.join(DATA)}")
    parser.add_argument("--windows", default=",".join(map(str, WINDOWS)), help="tokens, comma between them")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--sample", type=int, default=1, help="every N-th question")
    parser.add_argument("--conversations", type=int, default=1, help="every N-th conversation")
    parser.add_argument("--quick", action="store_true", help="LoCoMo at 4,000 and BEAM 100K at 16,000, a part of each, without MiniLM")
    parser.add_argument("--set", action="append", default=[], help="a setting of the program: prefetch.max_pages=20")
    parser.add_argument("--json", type=Path, help="a file for the figures, question by question")
    parser.add_argument("--against", type=Path, help="such a file of an earlier run")
    given = parser.parse_args()
    parts, settings = given.only.split(","), {}
    for text in given.set:
        settings = merged(settings, setting(text))
    plans = [(data, [int(w) for w in given.windows.split(",")]) for data in given.data.split(",")]
    if given.quick:
        plans = [("locomo", [4000]), ("beam", [16000])]
    encode, notes = encoders() if {"baselines", "index"} & set(parts) else ({}, [])
    if given.quick:
        encode.pop("MiniLM", None)
    figures: Figures = {}
    for data, windows in plans:
        began_s = time.monotonic()
        quick = {"locomo": (4, 1), "beam": (1, 3)}.get(data, (1, 1)) if given.quick else (1, 1)
        chosen = Chosen(data, given.sample * quick[0], given.conversations * quick[1])
        through = [part for part in ("first", "grown") if part in parts]
        sizes = [sum(m.tokens for m in messages_of(conversation)) for conversation in chosen.conversations]
        notes += [f"{data} fits into {w:,}: nothing is paged" for w in windows if w > max(sizes)]
        windows = [w for w in windows if w <= max(sizes)]
        for window_tokens in windows if through else []:
            figures |= through_program(chosen, window_tokens, through, settings)
            print(f"{data} {window_tokens:,}: {time.monotonic() - began_s:.0f} s", file=sys.stderr, flush=True)
        alone = without_program(chosen, windows, parts, encode)
        figures |= dict(sorted(alone.items(), key=lambda row: _order(row[0], windows)))
        print(f"{data}: {time.monotonic() - began_s:.0f} s", file=sys.stderr, flush=True)
        if given.json:
            given.json.write_text(json.dumps(figures))
    before = json.loads(given.against.read_text()) if given.against else {}
    print(report(figures, before, notes))


def _order(row: str, windows: Sequence[int]) -> int:
    """By window, else as they came."""
    return next((i for i, w in enumerate(windows) if f" {w:,} " in row), len(windows))


if __name__ == "__main__":
    main()
