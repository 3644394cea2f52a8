"""The page index alone, without a window: how much of a question's evidence it finds, and what a search costs.

  LLM_PAGER_DATA=../shared/data python -m tests.bench.recall_memory      # all four sets, a minute
  python ../shared/bench/recall.py --data locomo --memory tests.bench.recall_memory:Paged   # beside the baselines

One row for LoCoMo, BEAM 100K, 500K and 1M each (`bench/recall.py` of the shared folder says what R@k, tokR@T and all@T
are); then the same with noise around the question (an instruction, a greeting, pasted code, a log, an article) and with
two questions in one, as `search_queries` reads them and as they stand; follow-ups, whose words that the question before
has as well are "that"; CPU per message and per search.

`search` is PageIndex.search, pages of one message counting once. `window` is the last few messages,
then results by score per token (`density` softens the division), skipping what does not fit.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from proxy.memory.questions import Query, search_queries
from proxy.memory.words import STOP_WORDS
from proxy.search.fts import Doc, PageIndex

DATA = Path(os.environ.get("LLM_PAGER_DATA", "../shared/data"))

TAIL_MESSAGES = 4
PAGE_CHARS = 4096  # about 1,024 tokens, as pages.max_tokens
WINDOW_RESULTS = 200


class Message(Protocol):
    id: int
    role: str
    content: str
    name: str
    tokens: int
    time: datetime | None  # when the proxy saw it


class Paged:
    """One conversation, indexed page by page as its messages arrive."""

    def __init__(self, density: float = 0.4) -> None:
        self._density = density
        self._index = PageIndex()
        self._messages: list[Message] = []

    def add(self, msg: Message) -> None:
        self._messages.append(msg)
        texts = _split(msg.content)
        first = 1 if len(texts) > 1 else 0
        self._index.extend(
            Doc(msg.id, part, msg.role, msg.name, text) for part, text in enumerate(texts, first)
        )

    def _seen_s(self, position: int) -> int:
        time = self._messages[position].time
        return int(time.replace(tzinfo=UTC).timestamp()) if time else 0

    def search(self, query: str | Sequence[str | Query], limit: int) -> list[int]:
        hits = self._index.search(query, 3 * limit, None, self._seen_s)
        return list(dict.fromkeys(hit.position for hit in hits))[:limit]

    def window(self, question: str, budget: int) -> list[int]:
        messages = self._messages
        chosen: list[int] = []
        used = 0
        value: dict[int, float] = {}
        for hit in self._index.search(question, WINDOW_RESULTS, None, self._seen_s):
            tokens = messages[hit.position].tokens
            value.setdefault(hit.position, hit.score / tokens**self._density)
        ranked = sorted(value, key=lambda position: (-value[position], -position))
        newest = range(len(messages) - 1, -1, -1)
        for position in dict.fromkeys([*newest[:TAIL_MESSAGES], *ranked, *newest]):
            if used + messages[position].tokens <= budget:
                chosen.append(position)
                used += messages[position].tokens
        return chosen


def _split(text: str) -> list[str]:
    """Parts of at most PAGE_CHARS, cut at a line's end or a space where there is one."""
    parts = []
    while len(text) > PAGE_CHARS:
        cut = max(text.rfind("\n", PAGE_CHARS // 2, PAGE_CHARS), 0)
        cut = cut or max(text.rfind(" ", PAGE_CHARS // 2, PAGE_CHARS), 0) or PAGE_CHARS
        parts.append(text[:cut])
        text = text[cut:]
    return [*parts, text]


# -- all of it in one command

Found = list[tuple[float, float]]
Asking = Callable[[str], Sequence[str | Query]]
CODE = "```python\n" + "\n".join(
    f"def handler_{i}(request, family, game):\n    movie = load_{i}(request.user.id)\n    return render(movie, 'page_{i}.html')"
    for i in range(40)
) + "\n```"
LOG = "\n".join(
    f"2024-05-{1 + i % 28:02d} 12:{i:02d}:07,{i * 37 % 1000:03d} INFO worker[{i}] job={i * 7919 % 100003} took {i * 13} ms"
    for i in range(55)
)
ARTICLE = " ".join(
    f"Report {i}: the family went to the game in the city and the team of the school was very happy with movie {i}."
    for i in range(80)
)
NOISE: dict[str, Callable[[str], str]] = {
    "as it stands": lambda q: q,
    "an instruction behind it": lambda q: f"{q} Answer in a few words.",
    "a longer one": lambda q: f"{q} Please answer as briefly as possible, with the words of our conversation.",
    "an instruction before it": lambda q: f"Write a short answer to the following question from our conversation. {q}",
    "a greeting": lambda q: f"Hi there! Hope you had a great weekend. {q} Thanks!",
    "small talk with marks": lambda q: f"How are you doing today? {q} What do you think?",
    "code behind it": lambda q: f"{q}\n\n{CODE}",
    "code before it": lambda q: f"{CODE}\n\n{q}",
    "a log before it": lambda q: f"{LOG}\n{q}",
    "an article before it": lambda q: f"{ARTICLE}\n\n{q}",
    "an article behind it": lambda q: f"{q}\n\n{ARTICLE}",
}


def main() -> None:
    recall = _measure()
    sets = {
        "LoCoMo": recall.load_locomo(), "BEAM 100K": recall.load_beam(),
        "BEAM 500K": _load_long(recall, "500K"), "BEAM 1M": _load_long(recall, "1M"),
    }  # fmt: skip
    columns = ("R@5", "R@10", "tokR@1000", "all@4000", "all@8000")
    print(f"{'':26}", *(f"{column:>9}" for column in columns), "  ms/message  ms/search (CPU)")
    recall.time.perf_counter = time.process_time
    for name, chats in sets.items():
        result = recall.run(Paged, chats)
        rows = [row for row in result["rows"] if row["category"] != "adversarial"]
        cost = result["cost"]
        print(
            f"{name:26}", *(f"{recall.mean(rows, column):9.1f}" for column in columns),
            f"{cost['build_ms_per_msg']:12.3f}{cost['search_ms']:11.3f}", flush=True,
        )  # fmt: skip
    asked = {name: _built(sets[name]) for name in ("LoCoMo", "BEAM 100K")}
    print(f"\n{'R@5 / R@10':26}", *(f"{name:>32}" for name in asked))
    print(f"{'':26}", *(f"{'as queries':>18}{'as text':>14}" for _ in asked))
    for label, noise in NOISE.items():
        _print(label, [_noisy(built, noise, how) for built in asked.values() for how in (search_queries, _as_text)])
    _print("two in one", [_double(built, how) for built in asked.values() for how in (search_queries, _as_text)])
    _print("follow-ups", [_following(asked["LoCoMo"], search_queries), _following(asked["LoCoMo"], _as_text)])


def _measure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recall", DATA.parent / "bench" / "recall.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["recall"] = module  # its data classes look it up
    spec.loader.exec_module(module)
    return module


def _load_long(recall: ModuleType, size: str) -> list[Any]:
    chats = []
    for path in sorted((DATA / "beam-long").glob(f"{size}_*.json")):
        told, when, chat = json.loads(path.read_text()), None, recall.Conversation(path.stem)
        for i, m in enumerate(told["messages"]):
            if m.get("time"):
                when = datetime.strptime(m["time"], "%B-%d-%Y")
            chat.messages.append(
                recall.Message(i, m["role"], m["content"], "", when, 0, recall.count_tokens(m["content"]))
            )
        chat.questions = [
            recall.Question(q["question"], q["category"], q["evidence"]) for q in told["questions"] if q["evidence"]
        ]
        chats.append(chat)
    return chats


def _built(chats: Sequence[Any]) -> list[tuple[Paged, list[Any]]]:
    found = []
    for chat in chats:
        memory = Paged()
        for message in chat.messages:
            memory.add(message)
        found.append((memory, [q for q in chat.questions if q.category != "adversarial"]))
    return found


def _as_text(text: str, earlier: Sequence[str] = ()) -> Sequence[str]:
    return [text]


def _recalled(memory: Paged, queries: Sequence[str | Query], evidence: set[int]) -> tuple[float, float]:
    found = memory.search(queries, 10)
    return len(evidence & set(found[:5])) / len(evidence), len(evidence & set(found)) / len(evidence)


def _noisy(built: Sequence[tuple[Paged, list[Any]]], noise: Callable[[str], str], how: Asking) -> Found:
    return [_recalled(memory, how(noise(q.text)), set(q.evidence)) for memory, asked in built for q in asked]


def _double(built: Sequence[tuple[Paged, list[Any]]], how: Asking) -> Found:
    found = []
    for memory, asked in built:
        short = [q for q in asked if len(q.evidence) <= 3]
        random.Random(1).shuffle(short)
        for a, b in zip(short[::2], short[1::2], strict=False):
            found.append(_recalled(memory, how(f"{a.text} {b.text}"), {*a.evidence, *b.evidence}))
    return found


def _following(built: Sequence[tuple[Paged, list[Any]]], how: Callable[..., Sequence[str | Query]]) -> Found:
    """Pairs of questions with a message of evidence in common."""
    found = []
    for memory, asked in built:
        about: dict[int, list[Any]] = {}
        for q in asked:
            for position in q.evidence:
                about.setdefault(position, []).append(q)
        for questions in about.values():
            for a, b in itertools.pairwise(questions):
                said = set(re.findall(r"\w+", a.text.lower())) - STOP_WORDS
                text = re.sub(r"\w+", lambda m, said=said: "that" if m.group().lower() in said else m.group(), b.text)
                found.append(_recalled(memory, how(text, [a.text]), set(b.evidence)))
    return found


def _print(label: str, columns: Sequence[Found]) -> None:
    means = (tuple(100 * statistics.mean(row[k] for row in rows) for k in (0, 1)) for rows in columns)
    print(f"{label:26}", *(f"{a:9.1f} /{b:5.1f}" for a, b in means), flush=True)


if __name__ == "__main__":
    main()
