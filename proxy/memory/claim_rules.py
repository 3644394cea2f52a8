"""The rules by which a sentence states a decision, a fact or a preference.

Promises: deterministic, English, no model; precision before recall: questions, hypotheses, hedges, reported
speech and what cannot be understood alone are no claims. `statements` gives at most one finding per clause,
with the subject that it is about, so that a later statement about the same subject can be recognised.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from proxy.memory.claim_readers import (
    ATTRIBUTE,
    FAMILY,
    SINGLE,
    Finding,
    Reader,
    read_agreed,
    read_attribute,
    read_chosen,
    read_decision,
    read_doing,
    read_done_for_user,
    read_event,
    read_favourite,
    read_has_date,
    read_likes,
    read_name,
    read_person,
    read_prefers,
    read_relation,
    read_standing,
    read_using,
)
from proxy.memory.importance import PREFERENCE_VERB, STANDING_OPENING
from proxy.memory.sentences import Spoken, clauses

MAX_CLAIM_CHARS = 150
MAX_CLAIM_WORDS = 26  # about 32 tokens with the speaker
MIN_CLAIM_WORDS = 2


_NO_WORDS = r"(?!(?:it|that|this|these|those|them|him|her|so|sure|one|ones|there|you|your|more|something|anything|what|how)\b)"
_WHO = (
    r"(?P<who>i|we)(?:'ve|'d|'m|'re|'ll| have| had| am| are| was| were| will)?"
    r"(?: (?:just|finally|recently|already|also|both|all|now|currently|always|really|actually|still"
    r"|even|eventually|officially|mostly|mainly|only|definitely|absolutely|totally|truly|generally"
    r"|usually|typically|personally|strongly|initially|been))*"
)
_LEAD = re.compile(
    r"(?:(?:and|but|so|also|well|oh|yeah|yes|yep|ok|okay|sure|then|plus|since|because|while|as|now"
    r"|hey|hi|hello|thanks|thank you|great|right|anyway|actually|by the way|btw|oh wow|wow)\b"
    r"(?: [A-Z][a-z]+)?[,!.:]?\s+)+",
    re.IGNORECASE,
)
_TIME_LEAD = re.compile(
    r"(?:after|before|in|on|at|last|this|during|for|over|earlier|yesterday|today|recently|finally|since|as of"
    r"|with|given)\b[^,]{0,50}, "
    r"|(?:yesterday|today|(?:last|this|next) (?:week|weekend|month|year|night|summer|winter|spring|fall|morning|\w+day)) (?=(?:i|we)\b)",
    re.IGNORECASE,
)
_HYPOTHESIS = re.compile(
    r"\b(?:if(?! possible)|whether|suppose|supposing|imagine|hypothetically|assuming|unless|pretend"
    r"|for example|for instance|e\.g|let's say|said|says|told|asked|thinks?|thought|wish)\b",
    re.IGNORECASE,
)
_HEDGE = re.compile(
    r"\b(?:maybe|might|perhaps|possibly|probably|not sure|unsure|guess|could|should|would(?! "
    r"(?:prefer|rather))|wonder(?:ing)?|considering|thinking (?:of|about)|hope|hopefully|almost|nearly"
    r"|supposed|seems?|trying|confused|concerned|worried|not yet|not really|unless|or something)\b",
    re.IGNORECASE,
)
_MODAL_MAY = re.compile(r"\bmay\b")  # not the month
_ASKS = re.compile(
    r"(?:can|could|would|will|should|shall|do|does|did|is|are|was|were|have|has|any|what|whats|how"
    r"|why|when|where|who|which|am|isn't|aren't|don't|doesn't|didn't|wouldn't|may)\b",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"\w+")
_DANGLING = re.compile(
    r"\b(?:it|that|this|them|those|these|there|so|to|and|or|of|the|a|with|for|too|you|as|by|in|on)$"
)


def statements(sentence: str, speaker: Spoken) -> Iterator[Finding]:
    """What the sentence states, in its order."""
    words = sentence.lower().replace(",", "").rstrip(".!? ").split()
    if _SUBJECTS.isdisjoint(words) or _PREDICATES.isdisjoint(words):
        return  # most sentences end here
    pieces = clauses(sentence)
    if sentence.endswith("?"):
        # "I'm using Flask, can you help?" states before it asks; a bare question states nothing.
        while pieces and not _ASKS.match(pieces[-1]):
            pieces.pop()
        pieces = pieces[:-1]
    before = 0  # pieces already known to be no hypothesis
    for index, piece in enumerate(pieces):
        lead = _LEAD.match(piece)
        clause = piece[lead.end() :] if lead else piece
        clause = clause.strip().rstrip(".!;:,…* ")
        if clause.count(" ") < MIN_CLAIM_WORDS - 1:
            continue
        if _ASKS.match(clause):
            return  # what follows in the sentence hangs on it
        found = _first_rule(clause, speaker)
        if found is None:
            continue
        if any(_HYPOTHESIS.search(earlier) for earlier in pieces[before : index + 1]):
            return
        before = index + 1
        if clause[0] in "\"'“(" or clause.count('"') % 2:
            continue
        if not _HEDGE.search(clause) and not _MODAL_MAY.search(clause):
            yield found


def _first_rule(clause: str, speaker: Spoken) -> Finding | None:
    lead = _TIME_LEAD.match(clause)
    said = clause[lead.end() :] if lead else clause
    opener = _TOKEN.match(said)
    if opener is None:
        return None
    table = _PERSON_TABLE if speaker.person else _ASSISTANT_TABLE
    for pattern, read in table.get(opener.group().lower(), ()):
        match = pattern.match(said)
        if match is None or (
            read is read_standing and speaker.named and "please" not in said.lower()
        ):
            continue  # friends say "Always here for you!"
        shown = _fitting(clause)
        if not shown or _DANGLING.search(shown.lower()):
            return None
        found = read(match, shown)
        if found is not None:
            return found
    return None


def _fitting(clause: str) -> str:
    """The clause, ended at a natural place when it is too long; "" when there is none."""
    if len(clause) <= MAX_CLAIM_CHARS and clause.count(" ") < MAX_CLAIM_WORDS:
        return clause
    words = clause[: MAX_CLAIM_CHARS + 1].split(" ")[: MAX_CLAIM_WORDS + 1]
    start = " ".join(words[:-1])
    best = max(
        start.rfind(mark, 24) for mark in (", ", " because ", " which ", " so that ", " and ")
    )
    if best < 0:
        best = max(start.rfind(mark, 40) for mark in (" with ", " to ", " for ", " in ", " where "))
    return start[:best].rstrip(" ,") if best > 0 else ""


# ---------------------------------------------------------------- the table


Rule = tuple[str, re.Pattern[str], Reader]


def _rule(opens: str, pattern: str, read: Reader) -> Rule:
    """A clause whose first word is one of `opens` and that begins like `pattern` is read by
    `read`."""
    return opens, re.compile(pattern, re.IGNORECASE), read


_SAYS = _NO_WORDS + r"(?P<value>.+)"
_HEALTH = (
    r"diabetes|asthma|adhd|anxiety|arthritis|degree|master's|phd|background|certification|license"
)
_HAPPENED = (
    r"adopted|bought|moved|started|joined|signed up|graduated|got married|got engaged|got divorced|won"
    r"|finished|completed|published|launched|visited|hired|lost|quit|enrolled|booked|received|opened|sold"
    r"|released|deployed|signed|met|passed|attended|went to|took part in|participated in|volunteered"
    r"|ran|painted|wrote|built|made|planted|applied|registered|organized|hosted|broke|injured|retired"
    r"|got promoted|got accepted|got hired|got a job|got a new|upgraded|migrated|installed|implemented|created"
    r"|set up|read|watched|learned|began|planned|spent|saved|paid|donated|founded|invested|scored|had|took|did|saw|tried|got|found|gave|spoke|performed|went|hiked"
    r"|came|called|drove|flew|stayed|celebrated|discovered|raised|lived"
)
_CHOSE = _rule(
    "i we",
    rf"{_WHO} (?P<verb>decided|agreed|chosen|chose|picked|selected|settled|opted|resolved)"
    rf"(?: together)?(?: with (?-i:[A-Z])[\w'-]+(?: and (?-i:[A-Z])[\w'-]+)?)?(?P<no> against| not)? ?(?P<to>to|on|that|for|upon)?(?P<not> not to| not)? {_NO_WORDS}(?P<rest>.+)",
    read_decision,
)
_ADOPTED = _rule(
    "i we let",
    rf"(?:{_WHO} (?:go(?:ing)? with|went with|stick(?:ing)? with|switch(?:ed|ing)? (?:from .+? )?to"
    r"|migrat(?:ed|ing) (?:from .+? )?to|standardi[sz]ed on|committed to)"
    r"|(?:i|we)(?:'ll| will) use"
    r"|let's (?:go with|use|stick with|stick to|switch to|settle on)) "
    rf"{_NO_WORDS}(?P<rest>.+)",
    read_chosen,
)
_STATED = _rule(
    "agreed decision decided final conclusion",
    rf"(?:agreed|decision|decided|final decision|conclusion)(?: made)?\s*[:–-]\s*{_NO_WORDS}(?P<rest>\S+ .+)",
    read_agreed,
)
_ATTRIBUTES: list[Rule] = [
    ("the our my your i we", ATTRIBUTE, read_attribute),
    _rule(
        "i we",
        rf"{_WHO} (?:have |has |got |working with |set |given )?(?:a|an|the|our|my) (?:\w+ )?(?P<what>(?:\w+ )?(?:{SINGLE})) (?P<link>of|on|for|at|is) (?P<value>.+)",
        read_has_date,
    ),
]
_STANDING_OPENERS = (
    "please always never from going in whenever every each remember keep do don make"
)
_DOING = (
    r"working on|building|developing|writing|designing|studying|learning|training for|preparing for|saving for"
    r"|reading|organizing|planning|taking|teaching|running|managing|leading|going to|researching"
)
_PERSON_RULES: list[Rule] = [
    _CHOSE,
    _ADOPTED,
    _STATED,
    _rule(
        "my call",
        r"(?:my (?:full |first )?name is|my name's|call me) (?P<value>[\w'\-]+)",
        read_name,
    ),
    _rule("i", r"i(?:'m| am) (?P<value>[^\W\d_][\w'\-]+)(?:, (?:an?|the|from)\b.*)", read_name),
    _rule(
        "i we",
        rf"{_WHO} ?(?:(?P<no>no longer|don't|not) )?(?:live|living|reside|based) (?:in|at|near) (?P<value>[A-Z].+)",
        read_person("home", 0.85),
    ),
    _rule(
        "i we",
        rf"{_WHO} (?:moved|relocated)(?: back)?(?: here)? (?P<no>(?!))?to (?P<value>(?-i:[A-Z]).+)",
        read_person("home", 0.85),
    ),
    _rule("i we", rf"{_WHO} (?:from|born in) (?P<value>(?-i:[A-Z]).+)", read_person("origin", 0.8)),
    _rule("i we", rf"{_WHO} work(?:ing)? (?:as|at) {_SAYS}", read_person("job", 0.8)),
    _rule(
        "i we",
        rf"{_WHO} (?:turned )?(?P<value>\d{{1,2}}(?: years old| (?:this|last) year))$",
        read_person("age", 0.8),
    ),
    _rule(
        "i we",
        rf"{_WHO} (?P<no>not )?allergic to {_SAYS}",
        read_person("allergic", 0.9, listed=True),
    ),
    _rule(
        "i",
        r"i(?:'m| am) (?P<no>not )?(?:a |an )?(?P<value>vegetarian|vegan|pescatarian|lactose intolerant|gluten[- ]free"
        r"|celiac|diabetic|pregnant|colou?r[- ]blind|retired|divorced|engaged|married|single)\b",
        read_person("is", 0.85, listed=True),
    ),
    _rule(
        "i",
        rf"i(?:'ve| have)(?: got| had)? (?P<value>(?:an? |two |three |four |five |\d+ )(?:\w+ )?(?:{FAMILY}|{_HEALTH})\b.*"
        r"|\d+\+? years .+)",
        read_person("have", 0.7, listed=True),
    ),
    *_ATTRIBUTES,
    _rule(
        "my",
        rf"my (?:(?:older|younger|little|big|best|oldest|youngest) )?(?P<what>{FAMILY})(?:'s name)?,? (?P<verb>is|was|works|lives|"
        r"got|moved|has|loves|started|wants|recommended|passed away) (?P<value>.+)",
        read_relation,
    ),
    _rule(
        "i we",
        rf"{_WHO} ?(?:(?P<no>no longer|not) )?(?:using|use|running) {_SAYS}",
        read_using,
    ),
    _rule(
        "i",
        rf"i(?:'d| would|'ve)?(?: \w+ly| much| always)? {PREFERENCE_VERB} {_SAYS}",
        read_prefers,
    ),
    _rule(
        "my",
        r"my (?:(?:all-time|absolute) )?favou?rite (?P<what>[\w \-]{2,30}?) (?:is|are|has to be|has always been) "
        rf"(?:definitely |probably |still )?{_SAYS}",
        read_favourite,
    ),
    _rule(
        "i",
        r"i(?: (?:really|absolutely|also|still|just|totally|do|always))* (?P<no>don't |do not |never )?(?:(?:really|even) )?"
        rf"(?P<verb>love|like|enjoy|hate|dislike|can't stand|loathe) {_SAYS}",
        read_likes,
    ),
    _rule(_STANDING_OPENERS, rf"{STANDING_OPENING},? (?P<value>.+)", read_standing),
    _rule("i we", rf"{_WHO} (?P<verb>{_DOING}) (?P<value>{_NO_WORDS}.+)", read_doing),
    _rule(
        "i",
        r"i(?:'m| am)(?: (?:really|also|super|so|very|quite))* (?P<no>not )?(?P<verb>into|keen on|passionate about"
        rf"|obsessed with|interested in|a (?:big|huge) fan of) {_SAYS}",
        read_likes,
    ),
    _rule("i we", rf"{_WHO} (?P<verb>{_HAPPENED})\b (?P<value>{_NO_WORDS}.+)", read_event),
]
_ASSISTANT_RULES: list[Rule] = [
    _rule(
        "you",
        rf"(?P<who>you)(?:'ve| have)? (?P<verb>decided|chosen|chose|agreed|picked)(?P<no> not)? (?P<to>to|on|that)?(?P<not>(?!))? ?{_NO_WORDS}(?P<rest>.+)",
        read_decision,
    ),
    _rule("your", rf"(?=your ){ATTRIBUTE.pattern}", read_attribute),
    _rule(
        "your",
        r"your (?P<what>[\w \-#]{3,60}?) (?:has been|have been|was|were|is|are)(?: now)?(?: successfully)?"
        r" (?P<status>cancell?ed|booked|confirmed|updated|refunded|shipped|delivered|approved|rejected|created"
        r"|changed|upgraded|scheduled|submitted|processed)\b.*",
        read_done_for_user,
    ),
]


def _by_opener(rules: list[Rule]) -> dict[str, list[tuple[re.Pattern[str], Reader]]]:
    table: dict[str, list[tuple[re.Pattern[str], Reader]]] = {}
    for opens, pattern, read in rules:
        for word in opens.split():
            table.setdefault(word, []).append((pattern, read))
    return table


_PERSON_TABLE, _ASSISTANT_TABLE = _by_opener(_PERSON_RULES), _by_opener(_ASSISTANT_RULES)

# A sentence without a word of each set matches no rule; looking that up costs a tenth of trying.
_SUBJECTS = frozenset(
    {*_PERSON_TABLE, *_ASSISTANT_TABLE, "let's", "agreed:", "decision:", "decided:", "conclusion:"}
) | {f"{who}{tail}" for who in ("i", "we", "you") for tail in ("'m", "'ve", "'d", "'ll", "'re")}
_OTHER_VERBS = """
    agreed: decision: decided: conclusion: decided agreed chosen chose picked selected settled opted resolved go going went stick sticking use using
    switch switching switched migrate migrating migrated standardized standardised committed decision
    conclusion name name's call live living reside based relocated from born work working turned allergic
    vegetarian vegan pescatarian lactose gluten celiac diabetic pregnant color colour retired divorced engaged
    married single years old running prefer rather favor favour favorite favourite love like enjoy hate
    dislike can't loathe always never going whenever every each future remember keep ever make cancelled
    into keen passionate obsessed interested fan canceled confirmed updated refunded shipped delivered approved rejected changed scheduled submitted processed
"""
_PREDICATES = frozenset(_TOKEN.findall(f"{_HAPPENED} {_DOING} {FAMILY} {SINGLE} {_HEALTH} {_OTHER_VERBS}")) - {
    "a", "to", "on", "for", "up", "in", "part", "new", "time", "of", "be", "is",
}  # fmt: skip
