"""Words and sentences, as every room that reads text takes them: pure data.

Each user adds the words that are common in what it reads: what a search looks for, what a page is about.
The demo's reader has words of its own, because it stands in for a model that knows nothing of ours.
"""

from __future__ import annotations

# What says nothing in any English text, in lower case, as `\w+` finds it.
STOP_WORDS = frozenset(
    """
    a about all also am an and any are as at be been being but by can could d did do does doing don
    for from had has have he her here him his how i if in into is it its just ll m may me more my no
    not now of on or other our out over please re s she should so some such t than that the their
    them then there these they this those to too up ve very was we were what when which who will
    with would you your
    """.split()
)
# A sentence's end with its closing marks and the space behind it, for a regular expression. (What begins with one class
# of characters is looked for several times faster than what begins with one of two.)
SENTENCE_END = r"[.!?…。！？](?:(?<=[.!?…])[\"')\]”’*]*\s+|(?<=[。！？])\s*)"
