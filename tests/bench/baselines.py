"""What a memory has to beat: windows and rankings of whole messages, without a model's call.

Promises: each is one conversation's, gets every message first and then questions; a window's messages are
within its budget by `Message.tokens`; the same input gives the same output. They are as good as they can be made
in a few lines: a budget is used to the end, and none pays for rules, tools, quoting or the answer's reserve.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import NamedTuple

from proxy.memory.words import STOP_WORDS
from proxy.search.terms import TOKENIZER, clean, tokenizer
from tests.bench.encoders import Encode
from tests.e2e.data import Conversation
from tests.e2e.rules import count_text

TAIL_MESSAGES = 4  # the newest stand in every window
MESSAGE_TOKENS = 4  # around a message's text
_POOLED = 3  # neighbours on each side whose vectors are averaged in
_POOLED_SHARE = 0.5  # of all of them together


class Message(NamedTuple):
    """`time` and `session` are None and 0 where the data has none; `tokens` of o200k."""

    id: int
    role: str
    content: str
    name: str
    time: datetime | None
    session: int
    tokens: int


def messages_of(conversation: Conversation) -> list[Message]:
    out = []
    for i, message in enumerate(conversation.messages):
        text = message["content"]
        out.append(Message(
            i, message["role"], text, message.get("name", ""), conversation.times[i], conversation.sessions[i],
            count_text(text) + MESSAGE_TOKENS,
        ))  # fmt: skip
    return out


def fill(order: Iterable[int], messages: Sequence[Message], budget: int, tail: int = TAIL_MESSAGES) -> list[int]:
    """The newest `tail` messages, then those of `order` that still fit; ids."""
    newest = range(len(messages) - 1, max(-1, len(messages) - 1 - tail), -1)
    chosen: list[int] = []
    used = 0
    for i in dict.fromkeys([*newest, *order]):
        if used + messages[i].tokens <= budget:
            chosen.append(i)
            used += messages[i].tokens
    return chosen


def newest(messages: Sequence[Message], budget: int) -> list[int]:
    """A sliding window: the ids of the newest messages without a gap, newest first."""
    chosen: list[int] = []
    for message in reversed(messages):
        budget -= message.tokens
        if budget < 0:
            break
        chosen.append(message.id)
    return chosen


class SlidingWindow:
    name = "sliding window"

    def __init__(self, messages: Sequence[Message]) -> None:
        self.messages = messages

    def window(self, question: str, evidence: Sequence[int], budget: int) -> list[int]:
        return newest(self.messages, budget)


class Oracle(SlidingWindow):
    """Knows the evidence: the most that a window of whole messages can hold."""

    name = "oracle"

    def window(self, question: str, evidence: Sequence[int], budget: int) -> list[int]:
        by_size = sorted(evidence, key=lambda i: self.messages[i].tokens)
        return fill([*by_size, *reversed(range(len(self.messages)))], self.messages, budget, tail=0)


class StemmedBM25(SlidingWindow):
    """SQLite's bm25() over porter's stems, without stop words: the strongest plain baseline."""

    name = "stemmed BM25"

    def __init__(self, messages: Sequence[Message]) -> None:
        super().__init__(messages)
        self._db = sqlite3.connect(":memory:")
        self._db.execute(f"CREATE VIRTUAL TABLE m USING fts5(t, tokenize='{TOKENIZER}')")
        self._db.executemany("INSERT INTO m(rowid, t) VALUES (?, ?)", ((m.id, clean(m.content)) for m in messages))

    def search(self, query: str, limit: int) -> list[int]:
        """The ids of the best messages, best first."""
        stops = set(tokenizer().terms(" ".join(sorted(STOP_WORDS))))
        terms = tokenizer().terms(clean(query))
        asked = [t for t in terms if t not in stops] or terms
        if not asked:
            return []
        match = " OR ".join(f'"{term}"' for term in asked)
        found = self._db.execute("SELECT rowid FROM m WHERE m MATCH ? ORDER BY bm25(m), rowid DESC LIMIT ?", (match, limit))
        return [row for (row,) in found]

    def window(self, question: str, evidence: Sequence[int], budget: int) -> list[int]:
        ranked = self.search(question, len(self.messages))
        return fill([*ranked, *reversed(range(len(self.messages)))], self.messages, budget)


class Embedded(SlidingWindow):
    """Cosine of sentence vectors, averaged over neighbours."""

    def __init__(self, messages: Sequence[Message], name: str, encode: Encode) -> None:
        super().__init__(messages)
        self.name, self._encode = name, encode
        import numpy

        own = encode([m.content for m in messages])
        around = numpy.zeros_like(own)
        for step in range(1, _POOLED + 1):
            around[step:] += own[:-step]
            around[:-step] += own[step:]
        self._vectors = own + around * (_POOLED_SHARE / (2 * _POOLED))

    def search(self, query: str, limit: int) -> list[int]:
        scores = self._vectors @ self._encode([query])[0]
        return sorted(range(len(scores)), key=lambda i: (-float(scores[i]), -i))[:limit]

    def window(self, question: str, evidence: Sequence[int], budget: int) -> list[int]:
        return fill(self.search(question, len(self.messages)), self.messages, budget)
