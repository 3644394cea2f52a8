"""From a text to the terms that FTS5 would index for it.

Promises: exactly the index's own tokenizer (porter over unicode61); plain ASCII, the common case,
costs a dictionary look-up per word instead of a statement per text.
"""

from __future__ import annotations

import functools
import re
import sqlite3
import threading
from collections.abc import Iterable, Sequence

from proxy.memory.words import STOP_WORDS

TOKENIZER = "porter unicode61"
_KEPT_WORDS = 65_536  # stems remembered per process

# unicode61 makes one token of a run of these scripts, which have no spaces: index each by itself.
_UNSPACED = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af])")
_WORD = re.compile(r"[a-z0-9]+")
_STOP_WORDS = STOP_WORDS | frozenset(
    "after again before down during each few further having hello hers hey hi itself might most "
    "must nor off ok okay once only own same shall thank thanks theirs through under until where "
    "whether while whom whose why yeah yes yours".split()
)

# Words that rank pages but are no reason to bring one in: they do not count as evidence.
_SMALL_TALK = (
    "ahead amazing awesome bye congrats continue cool exciting fun glad good great haha happy hear "
    "interesting know later like lol love lovely morning nice night oh really right see soon sorry "
    "sound sounds sure talk think today tomorrow tonight well wonderful wow"
)


def connect() -> sqlite3.Connection:
    """A private database in memory, without a journal."""
    db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    for pragma in ("journal_mode = OFF", "synchronous = OFF", "temp_store = MEMORY"):
        db.execute(f"PRAGMA {pragma}")
    return db


def clean(text: str) -> str:
    """Text that SQLite takes (JSON may carry lone surrogates), unspaced scripts spaced."""
    if text.isascii():
        return text
    return _UNSPACED.sub(r" \1 ", text.encode("utf-8", "replace").decode())


class Tokenizer:
    """The index's own tokenizer, applied to a text: a contentless table read back and emptied."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stems: dict[str, str] = {}
        self._db = connect()
        self._db.execute(
            f"CREATE VIRTUAL TABLE line USING fts5(text, content='', tokenize='{TOKENIZER}')"
        )
        self._db.execute("CREATE VIRTUAL TABLE token USING fts5vocab('line', 'instance')")

    def terms(self, text: str) -> list[str]:
        """The distinct terms of a cleaned text, in the order of their first occurrence."""
        if not text.isascii():
            return list(dict.fromkeys(self._ask(text)))
        words = list(dict.fromkeys(_WORD.findall(text.lower())))
        stems = self._stems
        found = [stems.get(word) for word in words]
        if None in found:
            found = self._learn(words)
        return list(dict.fromkeys(term for term in found if term is not None))

    def prepare(self, texts: Iterable[str]) -> None:
        """Learn the words of many texts at once: far cheaper than one text after the other."""
        words: set[str] = set()
        for text in texts:
            if text.isascii():
                words.update(_WORD.findall(text.lower()))
        self._learn(sorted(words))

    def _learn(self, words: Sequence[str]) -> list[str | None]:
        """The stems of plain words, each of which FTS5 takes for exactly one token."""
        if len(self._stems) > _KEPT_WORDS:
            self._stems = {}
        stems = self._stems
        unknown = [word for word in words if word not in stems]
        if unknown:
            stems.update(zip(unknown, self._ask(" ".join(unknown)), strict=True))
        return [stems.get(word) for word in words]

    def _ask(self, text: str) -> list[str]:
        """Every token of a text, in order."""
        with self._lock:
            self._db.execute("INSERT INTO line(rowid, text) VALUES (1, ?)", (text,))
            try:
                found = self._db.execute("SELECT offset, CAST(term AS BLOB) FROM token").fetchall()
            finally:  # whatever it was, it is none of the next text's
                self._db.execute("INSERT INTO line(line) VALUES ('delete-all')")
        # The stemmer works on bytes: what it leaves of a word may end within a character.
        return [term.decode("utf-8", "replace") for _, term in sorted(found)]


@functools.cache
def tokenizer() -> Tokenizer:
    """One per process."""
    return Tokenizer()


@functools.cache
def stop_terms() -> frozenset[str]:
    return frozenset(tokenizer().terms(" ".join(sorted(_STOP_WORDS))))


@functools.cache
def idle_terms() -> frozenset[str]:
    """Terms that are no reason to bring a page in: stop words and small talk."""
    return stop_terms() | frozenset(tokenizer().terms(_SMALL_TALK))
