"""From a text to the terms that the index knows it by.

Promises: words as SQLite's `porter unicode61` takes them (case and accents folded, English endings off); a script
without spaces (Chinese, Japanese, Korean, Thai, Lao, Burmese, Khmer) is cut without a dictionary, so that any word of it
is found wherever it stands. Plain ASCII, the common case, costs a dictionary look-up per word instead of a statement per
text.
"""

from __future__ import annotations

import functools
import itertools
import re
import sqlite3
import sys
import threading
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

from stop_words import get_stop_words  # type: ignore[import-untyped]

from proxy.memory.words import STOP_WORDS

TOKENIZER = "porter unicode61"
_KEPT_WORDS = 65_536  # stems remembered per process
_ASKED_AT_ONCE = 1024  # words: what takes a few milliseconds, whoever else wants the interpreter

# Scripts that are written without spaces, or whose words are compounds of syllables (Hangul).
_UNSPACED_BLOCKS = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3005, 0x3007), (0x3040, 0x30FF), (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF), (0xAC00, 0xD7AF), (0xF900, 0xFAFF),
)  # fmt: skip


def _ranges(categories: str) -> str:
    """The characters of those blocks whose category begins with one of `categories`, for a character class."""
    codes = [c for low, high in _UNSPACED_BLOCKS for c in range(low, high + 1) if unicodedata.category(chr(c))[0] in categories]
    runs: list[list[int]] = []
    for code in codes:
        if runs and runs[-1][1] == code - 1:
            runs[-1][1] = code
        else:
            runs.append([code, code])
    return "".join(f"{chr(low)}-{chr(high)}" for low, high in runs)


_LETTER, _MARK = _ranges("LN"), _ranges("M")
_UNSPACED = re.compile(f"([{_LETTER}][{_LETTER}{_MARK}]*)")
_SYLLABLE = re.compile(f"[{_LETTER}][{_MARK}]*")  # a letter and the vowels and tones that are written on it
_FOLDED = {code: chr(code).lower() if chr(code).isalnum() else " " for code in range(128)}  # of plain ASCII
_CHUNK = re.compile(r"[a-z0-9\x80-\U0010ffff]+")  # any other character ends a word
_STOP_WORDS = STOP_WORDS | frozenset(
    "after again before down during each few further having hello hers hey hi itself might most "
    "must nor off ok okay once only own same shall thank thanks theirs through under until where "
    "whether while whom whose why yeah yes yours".split()
)
# Languages whose stop words are told from the others by what a conversation is full of.
_LANGUAGES = "en ar de es fr hi id it nl pl pt ru sv tr uk".split()

# Words that rank pages but are no reason to bring one in: they do not count as evidence.
_SMALL_TALK = (
    "ahead amazing awesome bye congrats continue cool exciting fun glad good great haha happy hear "
    "interesting know later like lol love lovely morning nice night oh really right see soon sorry "
    "sound sounds sure talk tell think today tomorrow tonight well wonderful wow"
)


def clean(text: str) -> str:
    """Text that can be encoded: JSON may carry lone surrogates."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


class _Stems(dict[str, str]):
    """Word -> its stem. A number is its own, and not kept: there is always another."""

    def __missing__(self, word: str) -> str:
        if word.isdigit():
            return word
        raise KeyError(word)


class Tokenizer:
    """SQLite's own tokenizer, applied to a text: a contentless table read back and emptied."""

    def __init__(self) -> None:
        self._stems = _Stems()  # of plain words, each of which is one term
        self._chunks: dict[str, tuple[str, ...]] = {}  # of what is not plain
        self._local = threading.local()  # a table each: no thread waits for another's megabytes

    @property
    def _db(self) -> sqlite3.Connection:
        db: sqlite3.Connection | None = getattr(self._local, "db", None)
        if db is None:
            db = self._local.db = sqlite3.connect(":memory:", isolation_level=None)
            for pragma in ("journal_mode = OFF", "synchronous = OFF", "temp_store = MEMORY"):
                db.execute(f"PRAGMA {pragma}")
            db.execute(f"CREATE VIRTUAL TABLE line USING fts5(text, content='', tokenize='{TOKENIZER}')")
            db.execute("CREATE VIRTUAL TABLE token USING fts5vocab('line', 'instance')")
        return db

    def terms(self, text: str) -> list[str]:
        """The distinct terms of a question, in the order of their first occurrence."""
        return list(dict.fromkeys(self.sequence(text)))

    def sequence(self, text: str) -> list[str]:
        """Every term of a text, in order. A run without spaces is its pairs of syllables, one alone itself."""
        if text.isascii():
            return self._plain(text.translate(_FOLDED).split())
        found: list[str] = []
        for number, piece in enumerate(_UNSPACED.split(clean(text))):
            if number % 2:  # such a run
                syllables = _SYLLABLE.findall(piece)
                found += map("".join, itertools.pairwise(syllables)) if len(syllables) > 1 else syllables
            elif piece:
                found += self._spaced(_CHUNK.findall(piece.lower()))
        return found

    def syllables(self, text: str) -> Iterator[str]:
        """Those that `sequence` has only in pairs: a question may be one of them."""
        if not text.isascii():
            for run in _UNSPACED.findall(clean(text)):
                found = _SYLLABLE.findall(run)
                if len(found) > 1:
                    yield from found

    def sequences(self, texts: Sequence[str]) -> list[list[str]]:
        """`sequence` of each. What is new in many texts is learned at once: far cheaper than one after the other."""
        split = [text.translate(_FOLDED).split() if text.isascii() else None for text in texts]
        with suppress(KeyError, TypeError):  # all is known, and plain
            return [list(map(self._stems.__getitem__, words)) for words in split]  # type: ignore[arg-type]
        self._plain(list(set[str]().union(*filter(None, split))))
        pieces = [_UNSPACED.split(clean(text))[::2] for text in texts if not text.isascii()]
        self._spaced(list({word for spaced in pieces for piece in spaced for word in _CHUNK.findall(piece.lower())}))
        pairs = zip(split, texts, strict=True)
        return [self.sequence(text) if words is None else self._plain(words) for words, text in pairs]

    def _plain(self, words: Sequence[str]) -> list[str]:
        stems = self._stems
        try:
            return list(map(stems.__getitem__, words))
        except KeyError:
            pass
        if len(stems) > _KEPT_WORDS:
            self._stems = stems = _Stems()
        unknown = list(dict.fromkeys(word for word in words if word not in stems and not word.isdigit()))
        for at in range(0, len(unknown), _ASKED_AT_ONCE):
            some = unknown[at : at + _ASKED_AT_ONCE]
            found = self._ask([(0, " ".join(some))])
            stems.update((sys.intern(word), sys.intern(stem)) for word, (_, stem) in zip(some, found, strict=True))
        return [stems[word] for word in words]

    def _spaced(self, words: Sequence[str]) -> list[str]:
        chunks = self._chunks
        unknown = list(dict.fromkeys(word for word in words if word not in chunks))
        learned: dict[str, list[str]] = {word: [] for word in unknown}
        for at in range(0, len(unknown), _ASKED_AT_ONCE):
            some = unknown[at : at + _ASKED_AT_ONCE]
            for row, term in self._ask(list(enumerate(some))):
                learned[some[row]].append(term)
        if len(chunks) > _KEPT_WORDS:
            self._chunks = chunks = {}
        chunks.update((word, tuple(terms)) for word, terms in learned.items())
        return [term for word in words for term in chunks.get(word) or learned.get(word) or ()]

    def _ask(self, texts: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
        """(row, token) of each of these rows, in order."""
        db = self._db
        db.execute("BEGIN")
        try:
            db.executemany("INSERT INTO line(rowid, text) VALUES (?, ?)", texts)
            found = db.execute("SELECT doc, offset, CAST(term AS BLOB) FROM token").fetchall()
        finally:  # whatever it was, it is none of the next text's
            db.execute("INSERT INTO line(line) VALUES ('delete-all')")
            db.execute("COMMIT")
        # The stemmer works on bytes: it may end within a character.
        return [(row, term.decode("utf-8", "replace")) for row, _, term in sorted(found)]


@functools.cache
def tokenizer() -> Tokenizer:
    """One per process."""
    return Tokenizer()


@functools.cache
def stop_terms() -> frozenset[str]:
    """What says nothing in any English text."""
    return frozenset(tokenizer().terms(" ".join(sorted(_STOP_WORDS))))


@functools.cache
def idle_terms() -> frozenset[str]:
    """Terms that are no reason to bring a page in: stop words and small talk."""
    return stop_terms() | frozenset(tokenizer().terms(_SMALL_TALK))


@functools.cache
def languages_of() -> dict[str, tuple[str, ...]]:
    """Stop term -> the languages that it is one of."""
    found: dict[str, list[str]] = {}
    for language in _LANGUAGES:
        for term in tokenizer().terms(" ".join(get_stop_words(language))):
            found.setdefault(term, []).append(language)
    return {term: tuple(named) for term, named in found.items()}


@functools.cache
def stops_of(languages: tuple[str, ...]) -> tuple[frozenset[str], frozenset[str]]:
    """The stop terms of English and these languages; and with them what is idle."""
    spoken = {term for term, named in languages_of().items() if not set(languages).isdisjoint(named)}
    return stop_terms() | spoken, idle_terms() | spoken


# A conversation's own languages: those whose stop words its pages have at least so often, beside the commonest.
_SPOKEN_SHARE = 0.5


def spoken(pages_with: Mapping[str, int]) -> tuple[str, ...]:
    """The languages, other than English, of pages that have each language's stop words so often."""
    most = max(pages_with.values(), default=0)
    return tuple(sorted(name for name, n in pages_with.items() if n > _SPOKEN_SHARE * most and name != "en"))
