"""What of a user's message is asked: the searches that it is worth, without what is only pasted or polite. Pure.

Promises: no text raises; nothing is lost but what is surely not asked (the words of a message without prose are its
query); linear in the text, of which a bounded part is read; the same arguments give the same queries.

The rules need no list of wordings. Fenced and indented blocks, quotes and lines that are no sentences are pasted. Of a
long message, its ends are the user's own. A question mark says what is asked; the other sentences of the user's own (a
greeting, the case, how to answer) are its context, which counts for less. A question that says little itself, or little beside a
pronoun, has the last turns as context as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from proxy.memory.words import SENTENCE_END, STOP_WORDS

_READ_CHARS = 20_000  # of a message, at each of its ends
_OWN_CHARS = 1_200  # a longer message's own words are at its ends
_END_CHARS = 600  # of each end
_QUERIES = 4
_QUERY_CHARS = 600
_CONTEXT_CHARS = 600
_EARLIER_CHARS = 300  # of each earlier message
EARLIER_MESSAGES = 2  # that are read
_ALONE_WORDS = 2  # of content, that a question has to have to stand alone ...
_ALONE_WITH_PRONOUN = 5  # ... and one with a word that stands for others
# A closed class. By length alone (fewer than five words) as many follow-ups are understood, and a question that has
# nothing to do with the last turns loses three times as much by them.
_PRONOUNS = frozenset("it that this these those they them there he she him her then".split())
_PROSE = 0.75  # of a line's characters are letters and spaces, where it is written and not printed

_FENCE = re.compile(r"^[ \t]*(```|~~~).*?(?:^[ \t]*\1[^\n]*$|\Z)", re.MULTILINE | re.DOTALL)
_PASTED = re.compile(r"^(?: {4}|\t|\s*[>|<{}#])")
_PRINTED = re.compile(r"[^\x80-\U0010ffffA-Za-z ]+")  # neither a letter nor a space, in ASCII
_SENTENCE_END = re.compile(SENTENCE_END + r"|(?<=[?？؟])\s*")
_ASKS = re.compile(r"[?？؟][\"')\]”’*_\s]*$")
_WORD = re.compile(r"[^\W_]+")


class Query(NamedTuple):
    """One search: `text` is what is asked; `context` are words that may tell what it is about."""

    text: str
    context: str = ""


def search_queries(newest: str, earlier: Sequence[str] = ()) -> tuple[Query, ...]:
    """The searches for a user's message, at most a few; none for one without a word. `earlier`: the texts of the
    messages before it, the newest last."""
    own = list(_own_sentences(newest))
    asked = [sentence for sentence in own if _ASKS.search(sentence)][:_QUERIES]
    if not asked:
        text = " ".join(own)[: 2 * _QUERY_CHARS]
        if not text:
            text = newest[-_QUERY_CHARS:].strip()
        return (Query(text, _before(text, earlier)),) if _WORD.search(text) else ()
    queries = []
    for question in asked:
        around = " ".join(sentence for sentence in own if sentence is not question)[:_CONTEXT_CHARS]
        queries.append(Query(question[-_QUERY_CHARS:], f"{_before(question, earlier)} {around}".strip()))
    return tuple(queries)


def _own_sentences(text: str) -> Iterator[str]:
    """The sentences that the user wrote, as far as can be told."""
    if len(text) > 2 * _READ_CHARS:
        text = f"{text[:_READ_CHARS]}\n{text[-_READ_CHARS:]}"
    lines = [line.strip() for line in _FENCE.sub("\n", text).split("\n") if _is_prose(line)]
    written = "\n".join(lines)
    if len(written) > _OWN_CHARS:
        written = f"{_whole(written[:_END_CHARS], -1)}\n{_whole(written[-_END_CHARS:], 0)}"
    for line in written.split("\n"):
        start = 0
        for match in _SENTENCE_END.finditer(line):
            yield line[start : match.end()].strip()
            start = match.end()
        if line[start:].strip():
            yield line[start:].strip()


def _is_prose(line: str) -> bool:
    if not line.strip() or _PASTED.match(line):
        return False
    return len(_PRINTED.sub("", line)) >= _PROSE * len(line)


def _whole(text: str, end: int) -> str:
    """Without the sentence that was cut at that end."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    if not ends:
        return text
    return text[: ends[-1]] if end else text[ends[0] :]


def _before(question: str, earlier: Sequence[str]) -> str:
    """What was spoken of before a question that says little itself."""
    words = set(_WORD.findall(question.lower()))
    least = _ALONE_WORDS if words.isdisjoint(_PRONOUNS) else _ALONE_WITH_PRONOUN
    if len(words - STOP_WORDS) >= least:
        return ""
    found = []
    for text in earlier[-EARLIER_MESSAGES:]:
        own = list(_own_sentences(text))
        found.append(" ".join([s for s in own if _ASKS.search(s)] or own)[:_EARLIER_CHARS])
    return " ".join(found)
