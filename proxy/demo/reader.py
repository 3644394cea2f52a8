"""A deterministic reader without a model: what `provider: demo` answers with.

Promises: `read(request)` is a pure function of an OpenAI chat request and returns the assistant
message a careful model would write: it answers from what is in its window when one passage plainly
covers the question; else it searches and faults pages in through the VM tools, when these are
offered; else it answers with the best it has, or says that it does not know. It never calls the
same thing twice in one turn. `seen_text(request)` is every page that stands in full in the window.

By hand, because no library reads a window without a model.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Final, NamedTuple

from proxy.memory.words import STOP_WORDS

CONFIDENT_COVERAGE: Final = 0.7  # below this the reader searches: a false "I see it" costs more than a search
ANSWER_COVERAGE: Final = 0.3  # below this the best passage is no answer
NEIGHBOUR_WEIGHT: Final = 0.5  # a question word found only in the message before or after counts half
MAX_FAULTS_PER_TURN: Final = 3
MAX_CALLS_PER_ROUND: Final = 2
MAX_SEARCHES_PER_TURN: Final = 2
SEARCH_LIMIT: Final = 20
UNKNOWN: Final = "I do not know: nothing that I can see tells me."
_ANSWER_PREFIX: Final = "You told me: "
_NOTED_PREFIX: Final = "Noted: "
_AROUND: Final = 2  # sentences on each side of the best one that count as the same passage

Json = dict[str, Any]

# ---------------------------------------------------------------- words

_WORD: Final = re.compile(r"\d+(?:[.,:/-]\d+)*|[^\W\d_]+(?:['’][^\W\d_]+)?\d*")
_SENTENCE_END: Final = re.compile(r"(?<=[.!?…])[\"'”’)]*\s+(?=[\"'“‘(]*[A-Z0-9À-Þ])|\n+")
_ABBREVIATION: Final = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|Nr|No|ca|approx|vs|e\.g|i\.e|etc)\.$", re.IGNORECASE)
_ASKING: Final = re.compile(
    r"^(?:(?:and|so|ok|okay|well|now|also|please|hey|but)[\s,]+)*"
    r"(?:what|when|where|which|who|whose|whom|why|how|can|could|would|will|do|does|did|is|are|was|were"
    r"|has|have|had|should|remind|tell|list|name|summari[sz]e|describe|explain|show|recall|find"
    r"|compare|give|based|according|considering)\b",
    re.IGNORECASE,
)
_STOP_WORDS: Final = STOP_WORDS | frozenset(  # beside them what questions and chats are full of
    """
    according actually again ago anything based before both didn doesn done down each earlier
    ever exactly few first get give go got hasn haven having hers isn kind know let list made
    make many mention mentioned might mine most much must name never nor off once one onto ours
    own really recall remember remind said same say shall something still tell theirs thing
    things think told under us use used wasn way went where whom whose why without yet yours
    """.split()
)
_IRREGULAR: Final = {
    "paid": "pay", "bought": "buy", "sold": "sell", "chose": "choose", "chosen": "choose",
    "came": "come", "took": "take", "taken": "take", "found": "find", "gave": "give", "given": "give",
    "kept": "keep", "left": "leave", "lent": "lend", "built": "build", "broke": "break",
    "broken": "break", "wrote": "write", "written": "write", "spent": "spend", "cost": "cost",
    "met": "meet", "saw": "see", "seen": "see", "began": "begin", "begun": "begin", "drew": "draw",
    "grew": "grow", "won": "win", "lost": "lose", "held": "hold", "taught": "teach", "ran": "run",
    "sent": "send", "brought": "bring", "caught": "catch", "fell": "fall", "drove": "drive",
    "ate": "eat", "weighs": "weigh", "weight": "weigh", "children": "child", "women": "woman",
    "men": "man", "feet": "foot", "hung": "hang", "stood": "stand", "swam": "swim", "slept": "sleep",
}  # fmt: skip
_ENDINGS: Final = (
    ("ies", "y", 5), ("sses", "ss", 5), ("ing", "", 6), ("edly", "", 7), ("ed", "", 5), ("ly", "", 6),
    ("es", "", 5), ("s", "", 4),
)  # fmt: skip


class Term(NamedTuple):
    word: str  # as written, lower case
    stem: str
    key: bool  # a name or a number: an answer's passage must have it


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """A light stem of one word: case, possessive, plural, -ed, -ing, -ly, a final e."""
    w = word.lower().replace("’", "'").split("'")[0]
    if w[:1].isdigit():
        return w.replace(",", "")
    if w in _IRREGULAR:
        return _IRREGULAR[w].rstrip("e")
    for end, put, least in _ENDINGS:
        if w.endswith(end) and len(w) >= least and not w.endswith(("ss", "us", "is")):
            w = w[: -len(end)] + put
            break
    return w[:-1] if w.endswith("e") and len(w) > 3 else w


@lru_cache(maxsize=8192)
def stems(text: str) -> frozenset[str]:
    """The stems of all words of a text."""
    return frozenset(stem(w) for w in _WORD.findall(text))


def sentences(text: str) -> list[str]:
    """A text in sentences; abbreviations do not end one."""
    out: list[str] = []
    for piece in filter(None, map(str.strip, _SENTENCE_END.split(text))):
        if out and _ABBREVIATION.search(out[-1]):
            out[-1] = f"{out[-1]} {piece}"
        else:
            out.append(piece)
    return out


def _asks(sentence: str) -> bool:
    return sentence.rstrip("\"'”’) ").endswith("?")


def is_question(text: str) -> bool:
    """Whether the text asks: a sentence that ends in a question mark, or a request to tell."""
    said = sentences(text)
    if any(map(_asks, said)):
        return True
    return len(said) == 1 and len(text) < 400 and _ASKING.match(text.strip()) is not None


def content_terms(text: str) -> list[Term]:
    """The content words of a text, one for each stem."""
    found: dict[str, Term] = {}
    for s in sentences(text):
        for i, w in enumerate(_WORD.findall(s)):
            lower = w.lower().replace("’", "'")
            bare = lower.split("'")[0]
            if lower in _STOP_WORDS or bare in _STOP_WORDS or (len(lower) < 2 and not lower.isdigit()):
                continue
            key = w[0].isdigit() or (w[0].isupper() and i > 0)
            found.setdefault(stem(w), Term(bare, stem(w), key))
    return list(found.values())


# ---------------------------------------------------------------- the window

_BLOCK: Final = re.compile(r"<VM:(?P<tag>[A-Z_]+)>(?P<body>.*?)</VM:(?P=tag)>", re.DOTALL)
_LINE: Final = re.compile(r'^\s*(?P<kind>\w+)\s*\((?P<label>[^)]*)\)\s*:\s*(?P<text>".*")\s*$')
_REDUCED: Final = re.compile(r"(?:\blevel|\blvl|\bl)\W*[1-9]|reduced|abstract|reference", re.IGNORECASE)
_FURTHER: Final = re.compile(r"(?P<who>[A-Z]) \((?P<page>[^),]*)[^)]*\): (?P<text>.*)", re.DOTALL)  # of a search
_MEMORY: Final = re.compile(r"^\s*T \(memory\):\s*(?P<json>\{.*\})\s*$")
_PART: Final = re.compile(r"^(?P<message>msg_\d+)\.(?P<part>\d+)$")


class Passage(NamedTuple):
    """One page as it stands in the window; `full` is False for a lead (a summary, a cut hint)."""

    page_id: str | None
    text: str
    role: str
    full: bool


def _text_of(content: object) -> str:
    """The text of a message's content: a string, or the text parts joined by a newline."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(p["text"] for p in parts if isinstance(p, dict) and isinstance(p.get("text"), str))


def _own_text(message: Json) -> str:
    """Without what the proxy put in front of it."""
    return _BLOCK.sub("", _text_of(message.get("content"))).strip()


def question_of(request: Json) -> str:
    """The newest user message's own text."""
    newest = _newest_user(request["messages"])
    return "" if newest is None else _own_text(request["messages"][newest])


def _newest_user(messages: list[Json]) -> int | None:
    asked = [i for i, m in enumerate(messages) if m.get("role") == "user"]
    own = [i for i in asked if _own_text(messages[i])]
    return own[-1] if own else asked[-1] if asked else None


def _calls(messages: list[Json]) -> Iterator[tuple[str, str, str]]:
    """id, name and arguments of every call."""
    for message in messages:
        for call in message.get("tool_calls") or []:
            function = call.get("function") or {}
            yield str(call.get("id")), str(function.get("name", "")), str(function.get("arguments"))


def _vm_kind(name: str) -> str | None:
    return next((k for k in ("page_fault", "search_pages") if name.endswith(k)), None)


def _json_object(text: str) -> Json:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _context_passages(text: str) -> Iterator[Passage]:
    for block in _BLOCK.finditer(text):
        for line in block["body"].splitlines() if block["tag"] == "CONTEXT" else ():
            if memory := _MEMORY.match(line):  # an earlier VM exchange, rendered without tools
                yield from _result_passages(_json_object(memory["json"]))
            found = _LINE.match(line)
            if found is None:
                continue
            try:
                quoted = json.loads(found["text"])
            except ValueError:
                continue  # a line that was cut in the middle is not a page
            page_id, _, rest = found["label"].partition(" ")
            role = "user" if found["kind"].upper().startswith("U") else "assistant"
            yield Passage(page_id.rstrip(",;"), quoted, role, not _REDUCED.search(rest))


def _result_passages(result: Json) -> Iterator[Passage]:
    page = result.get("page")
    if isinstance(page, dict):
        content = page.get("content")
        text = content.get("text") if isinstance(content, dict) else content
        yield Passage(str(page.get("page_id")), str(text or ""), "user", not page.get("level"))
    for hit in result.get("results") or []:
        text, full = str(hit.get("hint") or ""), hit.get("complete") is True
        yield Passage(str(hit.get("page_id")), text, "user", full)
    for line in result.get("also") or []:
        if found := _FURTHER.match(str(line)):
            yield Passage(found["page"], found["text"], "user" if found["who"] == "U" else "assistant", True)


def passages(request: Json) -> list[Passage]:
    """Everything in the window but the newest user message's own text, oldest first."""
    messages = request["messages"]
    vm = {call_id for call_id, name, _ in _calls(messages) if _vm_kind(name)}
    newest = _newest_user(messages)
    paged: dict[str | None, Passage] = {}  # each page once, as fully as it is shown
    native: list[Passage] = []
    for i, message in enumerate(messages):
        text = _text_of(message.get("content"))
        if message["role"] == "tool" and str(message.get("tool_call_id")) in vm:
            found = _result_passages(_json_object(text))
        else:
            found = _context_passages(text)
            own = _own_text(message)
            if own and i != newest:
                native.append(Passage(None, own, message["role"], True))
        for p in found:
            if p.page_id not in paged or (p.full and not paged[p.page_id].full):
                paged[p.page_id] = p
    return [*paged.values(), *native]


def seen_text(request: Json) -> list[str]:
    """All page texts that are in full in the request's window, decoded; parts also joined."""
    full = [p for p in passages(request) if p.full]
    called = [f"{name} {arguments}" for _, name, arguments in _calls(request["messages"]) if not _vm_kind(name)]
    parts: dict[str, dict[int, str]] = {}
    for p in full:
        match = _PART.match(p.page_id or "")
        if match:
            parts.setdefault(match["message"], {})[int(match["part"])] = p.text
    joined = ["".join(text for _, text in sorted(of.items())) for of in parts.values()]
    return [*(p.text for p in full), *called, *joined, *filter(None, [question_of(request)])]


# ---------------------------------------------------------------- the best sentence

_KINDS_OF_ANSWER: Final = (  # what a question asks for, and how an answer to it looks
    (re.compile(r"\bhow (?:much|many|long|old|deep|wide|tall|far|heavy|thick|big|often)\b", re.IGNORECASE),
     re.compile(r"\d|\b(?:two|three|four|five|six|seven|eight|nine|ten|dozen|half|once|twice)\b", re.IGNORECASE)),
    (re.compile(r"\b(?:what|which) year\b", re.IGNORECASE), re.compile(r"\b(?:1[5-9]|20)\d\d\b")),
    (re.compile(r"\b(?:when|(?:what|which) (?:date|day|time|month))\b", re.IGNORECASE),
     re.compile(r"\d|\b(?:mon|tues|wednes|thurs|fri|satur|sun)day\b|yesterday|tomorrow|last|next|noon", re.IGNORECASE)),
    (re.compile(r"\b(?:who|whose|whom|(?:sur)?names?|call(?:ed)?)\b", re.IGNORECASE),
     re.compile(r"(?<=[a-z,;:] )[\"“]?[A-Z][a-z]+")),
)  # fmt: skip


class Best(NamedTuple):
    sentence: str
    coverage: float  # 0..1, by weight of the question's content words
    plain: bool  # covers the question well and has its rarest words and an answer of its kind


class _Question:
    """One question to what is seen."""

    def __init__(self, text: str, seen: list[Passage]) -> None:
        self.terms = content_terms(text)
        self.seen = seen
        self._stems = stems(text)
        self._shape = next((shape for asks, shape in _KINDS_OF_ANSWER if asks.search(text)), None)
        keys = {t.stem for t in self.terms if t.key}
        frequency = Counter(w for p in seen for w in stems(p.text))
        self.weights = {
            w: math.log(1 + (len(seen) + 1) / (frequency[w] + 0.5)) * (1.25 if w in keys else 1.0)
            for w in sorted(t.stem for t in self.terms)
        }
        rarest = sorted(self.weights, key=lambda w: (self.weights[w], w))[-1:]
        self._rarest = keys or set(rarest)

    def coverage(self, own: frozenset[str], near: frozenset[str] = frozenset()) -> float:
        total = sum(self.weights.values())
        shares = ((v, 1 if w in own else NEIGHBOUR_WEIGHT if w in near else 0) for w, v in self.weights.items())
        return sum(v * share for v, share in shares) / total if total else 0.0

    def _fits(self, text: str) -> bool:
        """Whether the text has something of the asked kind that the question does not already say."""
        if self._shape is None:
            return True
        return any(not stems(found.group()) <= self._stems for found in self._shape.finditer(text))

    def best(self) -> Best | None:
        """The sentence that covers the question best; the later one wins a tie."""
        best: tuple[float, Best] | None = None
        for p in self.seen:
            telling = _telling(p.text)
            if not stems(" ".join(telling)) & self.weights.keys():
                continue
            sentence, sentence_score, at = self._pick(telling)
            # A long reply has every word somewhere: what counts is what stands around the sentence.
            own = stems(" ".join(telling[max(0, at - _AROUND) : at + _AROUND + 1]))
            coverage, fits = self.coverage(own), self._fits(sentence)
            digest = p.text.startswith(_NOTED_PREFIX)  # the reader's own words: the source says more
            plain = p.full and fits and not digest and coverage >= CONFIDENT_COVERAGE and self._rarest <= own
            score = coverage + 0.7 * sentence_score + (0.1 if p.role == "user" else 0) + (0.15 if fits else 0)
            score += (0.25 if p.full else 0.0) - (0.3 if digest else 0.0)
            if best is None or score >= best[0]:
                best = (score, Best(sentence, coverage, plain))
        return best[1] if best else None

    def _pick(self, telling: list[str]) -> tuple[str, float, int]:
        """The best sentence, with the one beside it when only that has something of the asked kind."""
        scored = []
        for i, s in enumerate(telling):
            near = stems(telling[i - 1]) if i else frozenset()
            kind = 0.2 if self._shape is not None and self._fits(s) else 0.0
            scored.append((self.coverage(stems(s), near) + kind, -i))
        score, i = max(scored)
        i = -i
        choices = (telling[i : i + 1], telling[i : i + 2], telling[max(0, i - 1) : i + 1])
        texts = [" ".join(choice) for choice in choices]
        return next((text for text in texts if self._fits(text)), texts[1]), score, i


def _telling(text: str) -> list[str]:
    """The sentences that state something: neither questions nor the reader's own apologies."""
    bare = text.removeprefix(_ANSWER_PREFIX).removeprefix(_NOTED_PREFIX)
    return [s for s in sentences(bare) if not s.rstrip('"”’)').endswith("?") and s not in UNKNOWN]


# ---------------------------------------------------------------- the turn


def read(request: Json) -> Json:
    """The assistant message for an OpenAI chat request: content, or tool_calls; never both."""
    text = question_of(request)
    forced = _forced_tool(request)
    if forced and not _vm_kind(forced):
        return _call_message(request, [(forced, {})])
    if not is_question(text):
        return _say(request, f"{_NOTED_PREFIX}{_key_fact(text)}" if text else "Noted.")
    question = _Question(text, passages(request))
    best = question.best()
    if best is None or not best.plain:
        calls = _next_calls(request, question, best)
        if calls:
            return _call_message(request, calls)
    if best is None or best.coverage < ANSWER_COVERAGE:
        return _say(request, UNKNOWN)
    return _say(request, f"{_ANSWER_PREFIX}{best.sentence}")


def request_hash(request: Json) -> str:
    canonical = json.dumps(request, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


def _offered(request: Json) -> list[str]:
    tools = [tool for tool in request.get("tools") or [] if isinstance(tool, dict)]
    return [str((tool.get("function") or {}).get("name", "")) for tool in tools]


def _vm_tools(request: Json) -> dict[str, str]:
    """page_fault / search_pages -> the (perhaps prefixed) name under which it is offered."""
    names = () if request.get("tool_choice") == "none" else _offered(request)
    return {kind: name for name in names if (kind := _vm_kind(name))}


def _forced_tool(request: Json) -> str | None:
    choice = request.get("tool_choice")
    if isinstance(choice, dict):
        return str((choice.get("function") or {}).get("name", "")) or None
    if choice == "required" and not _vm_tools(request):
        return next(filter(None, _offered(request)), None)
    return None


def _next_calls(request: Json, question: _Question, best: Best | None) -> list[tuple[str, Json]]:
    """The VM calls of this round, [] when there is nothing useful left to ask."""
    messages, tools = request["messages"], _vm_tools(request)
    since = messages[(_newest_user(messages) or 0) + 1 :]
    done = [(_vm_kind(name), _json_object(arguments)) for _, name, arguments in _calls(since)]
    searched = [str(a.get("query")) for kind, a in done if kind == "search_pages"]
    faulted = {str(a.get("page_id")) for kind, a in done if kind == "page_fault"}
    calls: list[tuple[str, Json]] = []
    if "page_fault" in tools and (searched or "search_pages" not in tools):
        leads = [p for p in question.seen if not p.full and p.page_id and p.page_id not in faulted]
        leads.sort(key=lambda p: -question.coverage(stems(p.text)))
        room = min(MAX_FAULTS_PER_TURN - len(faulted), MAX_CALLS_PER_ROUND)
        calls += [(tools["page_fault"], {"page_id": p.page_id}) for p in leads[: max(0, room)]]
    if "search_pages" in tools and not calls and len(searched) < MAX_SEARCHES_PER_TURN:
        fresh = [q for q in _queries(question, best) if q and q not in searched]
        calls += [(tools["search_pages"], {"query": q, "limit": SEARCH_LIMIT}) for q in fresh[:1]]
    return calls[:1] if request.get("parallel_tool_calls") is False else calls


def _queries(question: _Question, best: Best | None) -> Iterator[str]:
    """The question's content words; then names, numbers and words near the best."""
    terms = question.terms
    yield " ".join(dict.fromkeys(t.word for t in terms))
    rare = sorted((t for t in terms if not t.key), key=lambda t: (-question.weights[t.stem], t.word))
    lead = [t for t in content_terms(best.sentence) if t.key] if best else []
    second = [*(t for t in terms if t.key), *rare[:3], *lead[:3]]
    yield " ".join(dict.fromkeys(t.word for t in second))


def _key_fact(text: str) -> str:
    """The sentence of a statement with the most names and numbers for its length."""
    candidates = [s for s in sentences(text) if not s.endswith("?")] or [text]

    def density(s: str) -> float:
        words = s.split()
        facts = sum(any(c.isdigit() for c in w) * 2 + w[:1].isupper() for w in words[1:])
        return facts / math.sqrt(len(words)) - max(0, len(words) - 28)

    words = (fact := max(candidates, key=density)).split()
    return fact if len(words) <= 40 else " ".join(words[:40]) + " …"


def _call_message(request: Json, calls: list[tuple[str, Json]]) -> Json:
    digest = request_hash(request)[:20]
    made = [
        {
            "id": f"call_{digest}{i}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
        }
        for i, (name, arguments) in enumerate(calls)
    ]
    return {"role": "assistant", "content": None, "tool_calls": made}


def _say(request: Json, text: str) -> Json:
    wanted = request.get("response_format")
    if isinstance(wanted, dict) and wanted.get("type") in ("json_object", "json_schema"):
        text = json.dumps({"answer": text}, ensure_ascii=False)
    return {"role": "assistant", "content": text}
