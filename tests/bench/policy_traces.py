"""The shared conversations as page-access traces: which pages each answer needs.

The rule. An answer is made from the request before it, so each assistant message is one turn with
these accesses, all of earlier pages:

- `near`: the pages of the message just before it, which any answer reads.
- `far`: the pages that share a distinctive token with what the model was asked (the user's messages
  since the last answer) or with what it wrote (its text and its tool calls' arguments). A token is
  distinctive when it looks like a name, a number or an identifier and stands on at most MAX_PAGES
  pages of the conversation (of a long one: RARE_SHARE of them): a booking code that a tool call
  takes from an earlier result, a file name, a person. Tool results refer to nothing: nobody had to
  remember anything to make them.

An access names its tokens. It is a hit when the window shows the page in a form that still has all
of them, so that a compressed line counts exactly when it kept what was needed. System messages are
no pages (they never leave).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from proxy.memory.compressor import compress_text
from proxy.memory.ids import make_page_id
from proxy.memory.message_text import message_text, modality_of, split_text
from proxy.memory.models import CompressionLevel, Modality
from proxy.memory.segments import is_standing
from proxy.tokens import TokenCounter
from tests.e2e.data import Conversation

MAX_PAGES = 3  # a distinctive token stands on at most so many
RARE_SHARE = 0.01  # or on this share of a long conversation's pages
PAGE_TOKENS = 1024
_RESULT_ROLES = ("tool", "function")

_TOKEN = re.compile(r"[^\W_][\w\-./:@#]*[^\W_]|\w")
_SENTENCE_START = re.compile(r"(?:^|[.!?:;\n]\s+|[\"'(*`\-]\s*)$")
_IDENTIFIER = re.compile(r"\d|[a-z][A-Z]|[^\W_][_/@#.][^\W_]|[A-Z]{2}")
_MIN_CHARS = 3


@dataclass(frozen=True, slots=True)
class Page:
    """One page as the table knows it, and its text."""

    page_id: str
    position: int
    tokens: int
    standing: bool
    modality: Modality
    text: str


@dataclass(frozen=True, slots=True)
class Access:
    """A page that an answer needs, and what it needs of it (nothing named: all of it)."""

    page_id: str
    needs: frozenset[str]

    @property
    def far(self) -> bool:
        """Not merely the message before."""
        return bool(self.needs)


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: messages before `end` were sent; then the answer made its accesses."""

    end: int
    accesses: tuple[Access, ...]


@dataclass(slots=True)
class Trace:
    """One conversation. `roles` and `tokens` are per message, `pages` per message its pages."""

    name: str
    roles: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    pages: list[list[Page]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    _by_id: dict[str, Page] = field(default_factory=dict)
    _shown: dict[tuple[str, int], frozenset[str]] = field(default_factory=dict)

    def page(self, wanted: str) -> Page:
        """A page of this conversation."""
        return self._by_id[wanted]

    def shows(self, access: Access, level: CompressionLevel, counter: TokenCounter) -> bool:
        """Whether the page at `level` still has what the access needs."""
        if level is CompressionLevel.FULL:
            return True
        key = access.page_id, int(level)
        seen = self._shown.get(key)
        if seen is None:
            text = compress_text(self.page(access.page_id).text, level, None, counter.text)
            seen = self._shown[key] = frozenset(_words(text))
        return bool(access.needs) and access.needs <= seen

    @property
    def total_tokens(self) -> int:
        """Of all messages."""
        return sum(self.tokens)


def trace_of(conversation: Conversation, counter: TokenCounter) -> Trace:
    """The conversation's pages and turns, by the rule above."""
    trace = Trace(conversation.id)
    for message in conversation.messages:
        if message["role"] not in ("system", "developer"):
            _add_message(trace, message, counter)
    words = {page.page_id: distinctive(page.text) for pages in trace.pages for page in pages}
    df = Counter(word for own in words.values() for word in own)
    most = max(MAX_PAGES, int(len(words) * RARE_SHARE))
    rare = {i: {w for w in own if 1 < df[w] <= most} for i, own in words.items()}
    holders: dict[str, list[str]] = {}
    since = 0
    for position, role in enumerate(trace.roles):
        if role == "assistant" and position:
            trace.turns.append(_turn(trace, since, position, rare, holders))
            since = position + 1
        for page in trace.pages[position]:
            for word in rare[page.page_id]:
                holders.setdefault(word, []).append(page.page_id)
    return trace


def distinctive(text: str) -> set[str]:
    """Words of `text` that look like a name, a number or an identifier (lower case)."""
    found = set()
    for match in _TOKEN.finditer(text):
        word = match[0]
        if len(word) < _MIN_CHARS:
            continue
        name = word[0].isupper() and not _SENTENCE_START.search(
            text[max(0, match.start() - 3) : match.start()]
        )
        if name or _IDENTIFIER.search(word):
            found.add(word.lower())
    return found


def _words(text: str) -> set[str]:
    return {match[0].lower() for match in _TOKEN.finditer(text)}


def _add_message(trace: Trace, message: dict[str, Any], counter: TokenCounter) -> None:
    position, text = len(trace.roles), message_text(message)
    tokens, role = counter.message(message), str(message["role"])
    small = tokens <= PAGE_TOKENS
    texts = [text] if small else split_text(text, PAGE_TOKENS, counter.text)
    standing = is_standing(role, texts[0], tokens)
    kind = modality_of(message)
    pages = [
        Page(
            make_page_id(position, part),
            position,
            tokens // len(texts),
            standing and part < 2,
            kind,
            one,
        )
        for part, one in enumerate(texts, 0 if len(texts) == 1 else 1)
    ]
    trace.roles.append(role)
    trace.tokens.append(tokens)
    trace.pages.append(pages)
    trace._by_id.update((page.page_id, page) for page in pages)


def _turn(
    trace: Trace,
    since: int,
    position: int,
    rare: dict[str, set[str]],
    holders: dict[str, list[str]],
) -> Turn:
    """The accesses of the answer at `position`; `since`: the first message after the last one."""
    asking = [p for p in range(since, position) if trace.roles[p] not in _RESULT_ROLES]
    needs: dict[str, set[str]] = {}
    for at in (*asking, position):
        for page in trace.pages[at]:
            for word in rare[page.page_id]:
                for holder in holders.get(word, ()):
                    if trace.page(holder).position < at:
                        needs.setdefault(holder, set()).add(word)
    near = [page.page_id for page in trace.pages[position - 1]]
    accesses = [Access(i, frozenset()) for i in near]
    accesses += [Access(i, frozenset(needs[i])) for i in sorted(needs) if i not in near]
    return Turn(position, tuple(accesses))


def traces_of(conversations: Sequence[Conversation], counter: TokenCounter) -> list[Trace]:
    """All of them, in order."""
    return [trace_of(conversation, counter) for conversation in conversations]
