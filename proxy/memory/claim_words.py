"""The telling words of a statement: normalised subjects and values.

Promises: pure; the same thing said with other articles, plurals or date endings has the same words.
"""

from __future__ import annotations

import re

MAX_SUBJECT_WORDS = 4
MAX_VALUE_WORDS = 6

_FILLER = frozenset(
    """
    a an the my our your his her their its some any this that these those to of in on at for with by as is
    are was were be been am and or so very really just new now also up out from into about too then than
    got get have has had one first finally project all more much using use via
    me us i we you it over back lot lots bit
    """.split()
)
_SAME = {
    "postgre": "postgres",
    "postgresql": "postgres",
    "mongo": "mongodb",
    "js": "javascript",
    "ts": "typescript",
}
_WORD = re.compile(r"[^\W_]+(?:['.\-_/:][^\W_]+)*", re.UNICODE)
_VALUE_END = re.compile(
    r"[;!?()]|\band (?:i|am|is|are|have|work|love)\b|[,:](?= )|\.(?= |$)| [-–—]+ |\b(?:because|since|so|which|who|where|when|while|but|if|though"
    r"|instead|over|rather|due|given|after|before|until|unless)\b",
    re.IGNORECASE,
)


def _stem(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def content_words(text: str, limit: int) -> list[str]:
    """The first `limit` telling words of `text`, lower case, singular."""
    words = (_stem(w.removesuffix("'s")) for w in _WORD.findall(text.lower()[:200]))
    return [_SAME.get(w, w) for w in words if w not in _FILLER][:limit]


def value_of(rest: str) -> str:
    """The start of `rest` as a normalised value: "Friday, March 3rd because ..." -> "friday"."""
    end = _VALUE_END.search(rest)
    text = rest[: end.start()] if end else rest
    text = re.sub(r"\b(\d{1,2})(?:st|nd|rd|th)\b", r"\1", text)
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    text = re.sub(r"\bv(?=\d)", "", text)
    return " ".join(content_words(text, MAX_VALUE_WORDS))


_KINDS_OF_TOOL = {
    "database": "postgres mysql sqlite mariadb mongodb dynamodb oracle cockroachdb",
    "language": "python java javascript typescript rust go golang kotlin ruby php c# c++ swift scala",
    "web framework": "flask django fastapi rails laravel express",
    "frontend": "react vue angular svelte",
    "cloud": "aws azure gcp heroku",
    "queue": "kafka rabbitmq sqs nats",
}
_KIND_OF = {_stem(name): kind for kind, names in _KINDS_OF_TOOL.items() for name in names.split()}
_PURPOSE = re.compile(r"(?P<what>.+?) (?:for|as) (?P<purpose>(?:(?:the|our|my|a|an) )?.+)", re.I)

_NO_PURPOSE = frozenset("convenience change charge year month week day hour minute second".split())


def choice(rest: str) -> tuple[tuple[str, ...], str]:
    """(subject, value) of "use Postgres as the database", "Postgres", "React for the frontend"."""
    match = _PURPOSE.match(rest)
    if match is not None and not re.match(r"\d", match["purpose"]):
        purpose = content_words(cut(match["purpose"]), 3)
        value = value_of(match["what"])
        if purpose and value and _NO_PURPOSE.isdisjoint(purpose):
            return tuple(sorted(purpose)), value
    words = content_words(cut(rest), MAX_SUBJECT_WORDS)
    kind = _KIND_OF.get(_stem(words[0])) if words else None
    if kind is not None:
        return (kind,), words[0]
    return versioned(words)


def versioned(words: list[str]) -> tuple[tuple[str, ...], str]:
    """ "flask 2.3.1", "option 2": a number is the value; other words are all subject."""
    if len(words) > 1 and any(c.isdigit() for c in words[1]):
        return ("use", words[0]), words[1].removeprefix("v")
    return ("use", *words[:2]), ""


def cut(text: str) -> str:
    end = _VALUE_END.search(text)
    return text[: end.start()] if end else text
