"""Words as the search index matches them: case and accents folded, English endings taken off. Pure.

Promises: `stem` gives what SQLite's `porter unicode61` gives (tests/memory/test_stems.py compares the two), so that
what a search found is found again in the page; `folded` keeps every character's place; a run of a script without
spaces is the pieces that a word of it could be.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af"  # a character is a syllable or a word
_CLUSTERED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer: letters, and no spaces
# Marks stand within a word: Python's \w leaves them out.
_MARKS = "\u0300-\u036f\u0483-\u0489\u0591-\u05bd\u05bf-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed\u0900-\u0963\u0966-\u0dff"
WORD = re.compile(f"(?:[^\\W_]|[{_MARKS}{_CLUSTERED}])+")
RUN = re.compile(f"([{_UNSPACED}]+)|([{_CLUSTERED}]+)")
_LONGEST = 64  # bytes of a word that the index takes endings off

_STEP_2 = {
    "ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize", "logi": "log", "bli": "ble",
    "alli": "al", "entli": "ent", "eli": "e", "ousli": "ous", "ization": "ize", "ation": "ate", "ator": "ate",
    "alism": "al", "iveness": "ive", "fulness": "ful", "ousness": "ous", "aliti": "al", "iviti": "ive", "biliti": "ble",
}  # fmt: skip
_STEP_3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "", "ness": ""}
_STEP_4 = dict.fromkeys(
    "al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize".split(), ""
)


class _Folds(dict[int, int]):
    """A character -> its lower case without accents, where that is one character."""

    def __missing__(self, code: int) -> int:
        plain = [c for c in unicodedata.normalize("NFKD", chr(code)) if not unicodedata.combining(c)]
        base = plain[0].lower() if len(plain) == 1 else chr(code).lower()
        # Voiced kana are letters of their own, whatever they are made of.
        keep = len(base) != 1 or 0x3000 <= code < 0xFF00
        self[code] = code if keep else ord(base)
        return self[code]


_folds = _Folds()


def folded(text: str) -> str:
    """The text without case and accents, character by character: what stands at n stands there afterwards."""
    return text.lower() if text.isascii() else text.translate(_folds)


@lru_cache(maxsize=65_536)
def stem(word: str) -> str:
    """A folded word without its English ending (Porter 1980)."""
    word = word if word.isascii() else "".join(c for c in word if not unicodedata.combining(c))
    if len(word) < 3 or len(word.encode("utf-8", "replace")) > _LONGEST:
        return word
    if word[-1] == "s":
        if word[-2] == "e":
            two = len(word) > 4 if word[-4:] == "sses" else len(word) > 3 and word[-3] == "i"
            word = word[: -1 - two]
        elif word[-2] != "s":
            word = word[:-1]
    word = _without_ed(word)
    if word[-1] == "y" and "v" in _shape(word[:-1]):
        word = word[:-1] + "i"
    word = _replaced(_replaced(_replaced(word, _STEP_2, 0), _STEP_3, 0), _STEP_4, 1)
    if word[-1] == "e":
        shape = _shape(word[:-1])
        if shape.count("vc") > 1 or (shape.count("vc") == 1 and not _ends_short(word[:-1], shape)):
            word = word[:-1]
    return word[:-1] if word[-2:] == "ll" and _shape(word[:-1]).count("vc") > 1 else word


def _shape(word: str) -> str:
    """c or v for each letter: a y after a consonant is a vowel."""
    shape = ""
    for letter in word:
        vowel = letter in "aeiou" or (letter == "y" and shape[-1:] == "c")
        shape += "v" if vowel else "c"
    return shape


def _ends_short(word: str, shape: str) -> bool:
    return shape.endswith("cvc") and word[-1] not in "wxy"


def _without_ed(word: str) -> str:
    if word.endswith("eed") and len(word) > 3:
        return word[:-1] if "vc" in _shape(word[:-3]) else word
    for ending in ("ed", "ing"):
        if word.endswith(ending) and "v" in _shape(word[: -len(ending)]):
            word = word[: -len(ending)]
            break
    else:
        return word
    if word.endswith(("at", "bl", "iz")):
        return word + "e"
    if word[-1] not in "aeioulsz" and word[-2:-1] == word[-1]:
        return word[:-1]
    shape = _shape(word)
    return word + "e" if shape.count("vc") == 1 and _ends_short(word, shape) else word


def _replaced(word: str, endings: dict[str, str], least: int) -> str:
    """The longest of these endings replaced, where more than `least` syllables stand before it."""
    for length in range(min(7, len(word) - 1), 1, -1):
        new = endings.get(word[-length:])
        if new is not None:
            rest = word[:-length]
            enough = _shape(rest).count("vc") > least and (word[-length:] != "ion" or rest[-1] in "st")
            return rest + new if enough else word
    return word
