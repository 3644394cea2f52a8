"""From a matched clause to a finding: what the statement is about, and what it says of it.

Promises: pure; the subject is normalised, so that two statements about one thing have the same one; each
reader gives None where the match turns out to say nothing that could be understood later.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from proxy.memory.claim_words import (
    MAX_SUBJECT_WORDS,
    choice,
    content_words,
    cut,
    value_of,
    versioned,
)


class Finding(NamedTuple):
    """What one clause states. `subject` is normalised; `value` is "" where only the polarity
    matters; `text` is verbatim, without the speaker; `mine`: it is about the speaker."""

    text: str
    kind: str
    subject: tuple[str, ...]
    value: str
    polarity: bool
    mine: bool
    importance: float


# ---------------------------------------------------------------- words of subjects and values

# ---------------------------------------------------------------- readers: a match -> a finding

Reader = Callable[[re.Match[str], str], "Finding | None"]

_MOVE = re.compile(
    r"(?:move|push|postpone|reschedule|change|set|extend|shift|raise|lower|increase|reduce|cut|bump"
    r"|moved|pushed|postponed|rescheduled|changed|extended|shifted|raised|lowered|increased|reduced)"
    r"(?: back| up| out)? (?:the|our|my) (?P<what>[\w' \-]{2,40}?) (?:from .{1,30} )?(?:to|for|until|by|at)"
    r" (?P<value>.+)",
    re.I,
)
_USE = re.compile(
    r"(?:use|adopt|go with|choose|pick|stick with|stick to|switch to|move to|migrate to)\b"
    r"(?: using)? (?P<rest>.+)",
    re.I,
)


_ON_A_DAY = re.compile(r"[A-Z][a-z]+ \d{1,2}(?:, \d{4})?,? to ")


def read_decision(match: re.Match[str], shown: str) -> Finding | None:
    """ "I've decided (not) to ...": moving a date, choosing a thing, or doing something."""
    rest = _ON_A_DAY.sub("", match["rest"].strip())
    negative = bool(match["no"] or match["not"])
    moved = _MOVE.match(rest)
    used = _USE.match(rest)
    if moved:
        subject, value = tuple(sorted(content_words(moved["what"], 3))), value_of(moved["value"])
    elif used:
        subject, value = choice(used["rest"])
    elif match["verb"].lower() in _CHOOSING and match["to"] not in ("to", "that"):
        subject, value = choice(rest)
    else:
        subject, value = tuple(content_words(cut(rest), MAX_SUBJECT_WORDS)), ""
        if len(subject) < 2 or _POINTS_BACK.match(rest):
            return None
    if not any(subject):
        return None
    return Finding(shown, "decision", subject, value, not negative, _is_i(match), 0.85)


_CHOOSING = frozenset(
    """
    chose chosen picked settled opted went going go decided agreed selected switched migrated moving
    switching migrating stick standardised standardized use
    """.split()
)


def _is_i(match: re.Match[str]) -> bool:
    return match["who"].lower() == "i"


def read_chosen(match: re.Match[str], shown: str) -> Finding | None:
    """ "Let's go with X", "we'll use X", "we switched (from Y) to X": the thing that is used."""
    subject, value = choice(match["rest"])
    if not any(subject[1:]) and not value:
        return None
    return Finding(shown, "decision", subject, value, True, False, 0.85)


def read_agreed(match: re.Match[str], shown: str) -> Finding | None:
    rest = match["rest"]
    used = _USE.match(rest)
    moved = _MOVE.match(rest)
    attribute = ATTRIBUTE.match(rest)
    if used:
        subject, value = choice(used["rest"])
    elif moved:
        subject, value = tuple(sorted(content_words(moved["what"], 3))), value_of(moved["value"])
    elif attribute:
        subject, value = (
            tuple(sorted(content_words(attribute["what"], 3))),
            value_of(attribute["value"]),
        )
    else:
        subject, value = tuple(content_words(cut(rest), MAX_SUBJECT_WORDS)), ""
    if not subject:
        return None
    return Finding(shown, "decision", subject, value, True, False, 0.85)


def read_person(
    subject: str, importance: float, kind: str = "fact", listed: bool = False
) -> Reader:
    """A fact about the speaker. `listed`: there can be many (allergies), so the value is part of
    the subject; else a new one takes the place of the old (a home)."""

    def read(match: re.Match[str], shown: str) -> Finding | None:
        groups = match.groupdict()
        value = value_of(groups["value"])
        if not value:
            return None
        positive = not groups.get("no")
        if listed:
            key = (subject, *value.split()[:MAX_SUBJECT_WORDS])
            return Finding(shown, kind, key, "", positive, True, importance)
        return Finding(shown, kind, (subject,), value, positive, True, importance)

    return read


def read_name(match: re.Match[str], shown: str) -> Finding | None:
    value = match["value"]
    if not value[0].isupper() or value.lower() in _NOT_A_NAME:
        return None
    return Finding(shown, "fact", ("name",), value.lower(), True, True, 0.9)


_NOT_A_NAME = frozenset(
    """
    german french english spanish italian american british indian chinese japanese canadian australian
    irish scottish mexican ok okay sorry good fine here sure
    """.split()
)

# What a project or a person has one of; the head of "the ... is ...".
SINGLE = (
    "deadline|due date|budget|port|goal|target|limit|price|cost|rate|salary|rent|address|email|e-mail"
    "|email address|phone|phone number|number|id|user id|username|birthday|anniversary|age|height|weight"
    "|version|database|language|framework|stack|tech stack|schema|host|hostname|url|endpoint|branch"
    "|repo|repository|license|plan|start date|end date|launch|launch date|release|release date|meeting"
    "|interview|appointment|exam|flight|trip|wedding|surgery|timeline|schedule|time zone|timezone|size"
    "|capacity|threshold|timeout|coverage|accuracy|latency|response time|score|password|token limit"
    "|title|company|team|team size|manager|boss|client|customer|job|occupation|major|hometown|nickname|theme"
    "|destination|location|venue|date|time|word count|page count|milestone|review|code|model|zip code"
    "|zip|account|account number|order|order number|reservation|reservation number|booking|membership"
    "|confirmation|confirmation number|diet|blood type|dosage|favorite color"
)
FAMILY = (
    "wife|husband|partner|girlfriend|boyfriend|fiance|fiancee|son|daughter|kids|children|sister|brother"
    "|mother|mom|mum|father|dad|parents|grandma|grandmother|grandpa|grandfather|aunt|uncle|cousin|niece"
    "|nephew|friend|roommate|dog|cat|puppy|kitten|pet|mentor|colleague|coworker|co-founder|cofounder"
    "|neighbor|neighbour|therapist|doctor|dog's|cat's|manager|boss"
)
_BECOMES = (
    r"(?:(?:has been|have been|was|were|got|is|is being) (?:now )?(?:moved|pushed|changed|rescheduled|extended"
    r"|postponed|shifted|raised|lowered|increased|reduced|set|updated|scheduled|planned)(?: back| up| out)?"
    r" (?:from .{1,30} )?(?:to|until|for|on|at)"
    r"|(?:moved|changed|went up|went down|increased|dropped) (?:from .{1,30} )?to"
    r"|(?:is|are|was|will be|remains|equals)(?: (?:now|currently|still|due|officially|exactly|around|about"
    r"|approximately))*(?: (?:on|at|by))?)"
)
ATTRIBUTE = re.compile(
    r"(?P<own>the|our|my|your|we have a|we have an|i have a|i have an)"
    rf" (?P<what>(?:[\w.\-']+ ){{0,3}}?(?:{SINGLE})(?: (?:for|of) (?:(?:the|our|my|this|a) )?[\w\- ]{{2,30}}?)?)"
    rf" {_BECOMES} (?P<value>.+)",
    re.I,
)
_INFORMATIVE = re.compile(r"\d|(?<=\s)[A-Z]|^[A-Z]|\S@\S|_")
_TRANSIENT = re.compile(
    r"(?:not|to|being|getting|going|making|working|failing|causing|very|really|so|too|quite|pretty|due to"
    r"|a bit|that|what|how|why|where|because|like|in|just|when|about to)\b",
    re.I,
)


# There can be several at once: another value contradicts nothing.
_MANY = frozenset(
    "reservation order booking confirmation trip flight meeting client customer code".split()
)


def read_attribute(match: re.Match[str], shown: str) -> Finding | None:
    """ "Our deadline is March 3": only values that say something, and only what there is one of."""
    rest = match["value"]
    if _TRANSIENT.match(rest) and not re.match(r"in [A-Z\d]", rest):
        return None
    value, words = value_of(rest), cut(rest)
    if not value or not _INFORMATIVE.search(words):
        return None
    subject = tuple(sorted(content_words(match["what"], MAX_SUBJECT_WORDS)))
    personal = match["own"].lower() in ("my", "your")
    if not subject:
        return None
    if not _MANY.isdisjoint(subject):
        return Finding(shown, "fact", (*subject, *value.split()), "", True, personal, 0.8)
    return Finding(shown, "fact", subject, value, True, personal, 0.8)


_WHAT_FOR = re.compile(r" (?:to|for) (?P<what>.+)")


def read_has_date(match: re.Match[str], shown: str) -> Finding | None:
    """ "We have a deadline of March 3", "a budget of $500"."""
    value = value_of(match["value"])
    subject = tuple(sorted(content_words(match["what"], MAX_SUBJECT_WORDS)))
    if not value or not subject or not _INFORMATIVE.search(match["value"]):
        return None
    if match["link"] == "for" and not re.match(r"\W?\d|[A-Z]", match["value"]):
        return None  # what it is for, not what it is
    purpose = _WHAT_FOR.search(match["value"])
    if purpose:
        subject = (*subject, *content_words(cut(purpose["what"]), 3))
    return Finding(shown, "fact", subject, value, True, False, 0.8)


def read_relation(match: re.Match[str], shown: str) -> Finding | None:
    """ "My sister works at the zoo": of a person or an animal that belongs to the speaker."""
    rest = match["value"]
    if _TRANSIENT.match(rest) or not _INFORMATIVE.search(rest):
        return None
    words = content_words(cut(rest), 3)
    if not words:
        return None
    key = (match["what"].lower(), match["verb"].lower().split()[0], *words)
    return Finding(shown, "fact", key, "", True, True, 0.7)


def read_using(match: re.Match[str], shown: str) -> Finding | None:
    """ "I'm using Flask 2.3.1": the version is the value."""
    rest = match["value"]
    head = " ".join(rest.split(" ")[:4])
    if not re.search(r"\d|\b[A-Z]", head):
        return None
    words = content_words(cut(rest), 2)
    if not words or (words[0][0].isdigit()):
        return None
    subject, version = versioned(words)
    return Finding(shown, "fact", subject, version, not match["no"], False, 0.65)


_TELLING = frozenset(
    """
    adopted bought moved joined graduated won hired quit enrolled sold married engaged divorced signed
    published launched released deployed retired founded booked visited injured volunteered donated
    """.split()
)
_WHEN = re.compile(
    r"\b(?:yesterday|today|tonight|weekend|(?:last|this|next) (?:week|month|year|night|summer|winter|spring|fall)"
    r"|(?:days?|weeks?|months?|years?) ago)\b",
    re.I,
)
_NO_OBJECT = re.compile(
    r"(?:yesterday|today|recently|again|last|just|(?:an?|\w+|a few|some|about \w+) (?:days?|weeks?|months?|years?) ago)\b",
    re.I,
)
_POINTS_BACK = re.compile(
    r"(?:\S+ ){0,3}?(?:it|its|her|him|his|them|they|their|he|she|this|that|these|those|your|you|yours|here|there"
    r"|another|each other|the same|both)\b",
    re.I,
)


def read_event(match: re.Match[str], shown: str) -> Finding | None:
    """ "I adopted a puppy": happened once, contradicts nothing. Of what happens every day only what
    names a time, a number or a name."""
    rest, verb = match["value"], match["verb"].lower()
    if (
        _NO_OBJECT.match(rest)
        or _POINTS_BACK.match(rest)
        or "'ll " in match.group()[:9]
        or " will " in match.group()[:9]
    ):
        return None
    words = content_words(cut(rest), 3)
    exact = bool(_INFORMATIVE.search(rest) or _WHEN.search(rest))
    if not exact and _TELLING.isdisjoint(verb.split()):
        return None
    if not words:
        return None
    return Finding(shown, "fact", ("event", verb, *words), "", True, _is_i(match), 0.6)


_VAGUE_DOING = frozenset("going to|planning|taking|running|reading|learning|writing".split("|"))


def read_doing(match: re.Match[str], shown: str) -> Finding | None:
    """ "I'm building a budget tracker": what the speaker is at, when it has a name of its own."""
    rest, verb = match["value"], match["verb"].lower()
    words = content_words(cut(rest), 3)
    exact = bool(_INFORMATIVE.search(rest) or _WHEN.search(rest))
    if len(words) < 2 or _POINTS_BACK.match(rest) or (verb in _VAGUE_DOING and not exact):
        return None
    return Finding(shown, "fact", ("doing", verb, *words), "", True, _is_i(match), 0.6)


_AGAINST = re.compile(
    r" (?:(?:over|rather than|instead of) |to (?=\S+(?: \S+)?$))(?P<other>.+)", re.I
)


def read_prefers(match: re.Match[str], shown: str) -> Finding | None:
    """ "I prefer tea to coffee": the subject is the pair, whichever is named first."""
    rest = match["value"]
    against = _AGAINST.search(rest)
    value = value_of(rest[: against.start()] if against else rest)
    if not value or _POINTS_BACK.match(rest):
        return None
    if against:
        pair = sorted({*value.split()[:2], *content_words(cut(against["other"]), 2)})
        return Finding(shown, "preference", ("prefer", *pair), value, True, True, 0.8)
    words = content_words(cut(rest), MAX_SUBJECT_WORDS)
    if len(words) == len(cut(rest).split()) == 2:  # "aisle seats": later "window seats"
        return Finding(shown, "preference", ("prefer", words[1]), words[0], True, True, 0.8)
    return Finding(shown, "preference", ("prefer", *words), "", True, True, 0.8)


def read_favourite(match: re.Match[str], shown: str) -> Finding | None:
    what, value = content_words(match["what"], 3), value_of(match["value"])
    if not what or not value or _TRANSIENT.match(match["value"]):
        return None
    return Finding(shown, "preference", ("favorite", *sorted(what)), value, True, True, 0.75)


def read_likes(match: re.Match[str], shown: str) -> Finding | None:
    if _POINTS_BACK.match(match["value"]):
        return None
    if match["value"].startswith("the ") and not _INFORMATIVE.search(match["value"]):
        return None  # of what is being looked at
    words = content_words(cut(match["value"]), 3)
    if not words or words[0] in ("idea", "way", "how", "when", "sound", "hear", "see", "know"):
        return None
    positive = match["verb"].lower() not in ("hate", "dislike", "can't stand", "loathe")
    positive = positive and not match["no"]
    return Finding(shown, "preference", ("like", *words), "", positive, True, 0.55)


_EXCLAIMS = re.compile(
    r"(?:\w+ing|here|there|up|on|great|good|nice|happy|ready|a|an|the|mind|say|give|been|had|have|i|we|you|my|knew|so)\b",
    re.I,
)


def read_standing(match: re.Match[str], shown: str) -> Finding | None:
    words = content_words(cut(match["value"]), MAX_SUBJECT_WORDS)
    if len(words) < 2 or _EXCLAIMS.match(match["value"]):
        return None
    negative = match.group().lower().find("never") >= 0 or "not " in match.group().lower()
    return Finding(shown, "preference", ("rule", *words), "", not negative, False, 0.9)


def read_done_for_user(match: re.Match[str], shown: str) -> Finding | None:
    """An assistant's "your reservation AB12 has been cancelled"."""
    words = content_words(match["what"], 3)
    if not words:
        return None
    status = match["status"].lower()
    if any(c.isdigit() for word in words for c in word):  # named by its number: what held is over
        return Finding(shown, "fact", ("status", *words), status, True, False, 0.7)
    return Finding(shown, "fact", ("status", status, *words), "", True, False, 0.7)
