"""Text for the overhead bench: different in every message, with the make-up of plain English.

Promises: the same seed gives the same texts; word lengths and token counts are like real chat
(about 4.3 characters a token), and no two messages are alike, so that no cache is flattered by
repetition.
"""

from __future__ import annotations

import random

WORDS = """
the of and to a in that it is was for on with as his he be at by this had not are but from or have
an they which one you were her all she there would their we him been has when who will more no if
out so said what up its about into than them can only other new some could time these two may then
do first any my now such like our over man me even most made after also did many before must through
back years where much your way well down should because each just those people how too little state
good very make world still own see men work long get here between both life being under never day
same another know while last might us great old year off come since against go came right used take
three kitchen garden report invoice budget meeting project deadline travel train ticket hotel flight
weather winter summer spring doctor school teacher student lesson paper letter window door table
bridge river mountain valley forest market price order basket bread coffee dinner breakfast recipe
software server database network signal battery engine bicycle camera picture music guitar concert
museum history science question answer number street corner village island harbour captain sailor
measure balance account payment contract lawyer office manager engineer painter writer journal
chapter sentence language grammar dictionary translation memory attention morning evening holiday
birthday present neighbour family daughter brother cousin friend partner colleague customer visitor
remember forget promise decide explain describe compare prepare deliver repair replace collect count
quickly slowly carefully finally rarely often perhaps almost exactly clearly simply together outside
""".split()
NAMES = "Ada Bruno Chiara Dmitri Elena Farid Greta Hugo Ines Jonas Keiko Lars Mira Nadia".split()


class Texts:
    """A source of sentences; `seed` names the series."""

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
            sentence = " ".join(words).capitalize() + r.choice([".", ".", ".", "!", "?"])
            out.append(sentence)
            size += len(sentence) + 1
        return " ".join(out)
