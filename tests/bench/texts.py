"""Text for the overhead bench: different in every message, with the make-up of plain English.

Promises: the same seed gives the same texts; word lengths and token counts are like real chat
(about 4.3 characters a token), and no two messages are alike, so that no cache is flattered by
repetition.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

CONVERSATION = Path(__file__).parents[2] / "proxy" / "demo" / "conversation.jsonl"
# Every word of a real conversation as often as it stands there: common words are common and most
# words are rare, as in any text; a short word list would make every word common.
WORDS = re.findall(r"[a-z]{2,}", CONVERSATION.read_text(encoding="utf-8").lower())
NAMES = "Ada Bruno Chiara Dmitri Elena Farid Greta Hugo Ines Jonas Keiko Lars Mira Nadia".split()


class Texts:
    """A source of sentences; `seed` names the series.

    One sentence in ten is a question, so that 4 of 10 messages of 400 characters ask something: 27 %
    do in LoCoMo, 60 % in BEAM.
    """

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def text(self, length_chars: int) -> str:
        """Sentences of about that many characters (never fewer)."""
        r, out, size = self._random, [], 0
        while size < length_chars:
            words = r.choices(WORDS, k=r.randint(6, 16))
            if r.random() < 0.3:
                words.insert(r.randrange(len(words)), r.choice(NAMES))
            if r.random() < 0.3:
                words.append(str(r.randint(2, 9999)))
            sentence = " ".join(words).capitalize() + r.choices(".!?", (17, 1, 2))[0]
            out.append(sentence)
            size += len(sentence) + 1
        return " ".join(out)
