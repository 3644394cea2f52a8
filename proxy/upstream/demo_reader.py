"""A deterministic reader without a model: what `provider: demo` answers with.

Promises: `read(request)` is a pure function of an OpenAI chat request and returns the assistant
message a careful model would write: it answers from what is in its window when one passage plainly
covers the question; else it searches and faults pages in through the VM tools, when these are
offered; else it answers with the best it has, or says that it does not know. It never calls the
same thing twice in one turn. `seen_text(request)` is every page that stands in full in the window.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from proxy.upstream.demo_window import (
    Passage,
    messages_of,
    newest_user,
    passages,
    question_of,
    seen_text,
    vm_calls,
    vm_kind,
)
from proxy.upstream.demo_words import Term, content_terms, is_question, sentences, stems

__all__ = ["best_sentence", "passages", "question_of", "read", "request_hash", "seen_text"]

CONFIDENT_COVERAGE = 0.7  # below this the reader searches: a false "I see it" costs more than a search
ANSWER_COVERAGE = 0.3  # below this the best passage is no answer
NEIGHBOUR_WEIGHT = 0.5  # a question word found only in the message before or after counts half
_AROUND = 2  # sentences on each side of the best one that count as the same passage
MAX_FAULTS_PER_TURN = 3
MAX_CALLS_PER_ROUND = 2
MAX_SEARCHES_PER_TURN = 2
SEARCH_LIMIT = 20
UNKNOWN = "I do not know: nothing that I can see tells me."
_ANSWER_PREFIX = "You told me: "
_NOTED_PREFIX = "Noted: "

_KINDS_OF_ANSWER = (  # what a question asks for, and how an answer to it looks
    (re.compile(r"\bhow (?:much|many|long|old|deep|wide|tall|far|heavy|thick|big|often)\b", re.IGNORECASE),
     re.compile(r"\d|\b(?:two|three|four|five|six|seven|eight|nine|ten|dozen|half|once|twice)\b", re.IGNORECASE)),
    (re.compile(r"\b(?:what|which) year\b", re.IGNORECASE), re.compile(r"\b(?:1[5-9]|20)\d\d\b")),
    (re.compile(r"\b(?:when|(?:what|which) (?:date|day|time|month))\b", re.IGNORECASE),
     re.compile(r"\d|\b(?:mon|tues|wednes|thurs|fri|satur|sun)day\b|yesterday|tomorrow|last|next|noon", re.IGNORECASE)),
    (re.compile(r"\b(?:who|whose|whom|(?:sur)?names?|call(?:ed)?)\b", re.IGNORECASE),
     re.compile(r"(?<=[a-z,;:] )[\"“]?[A-Z][a-z]+")),
)  # fmt: skip


@dataclass(frozen=True)
class Best:
    passage: Passage
    sentence: str
    coverage: float  # 0..1, by weight of the question's content words
    plain: bool  # covers the question well and has its rarest words and an answer of its kind


# ------------------------------------------------------------------ the best sentence
def _weights(terms: list[Term], seen: list[Passage]) -> dict[str, float]:
    wanted = {t.stem for t in terms}
    frequency: Counter[str] = Counter()
    for p in seen:
        frequency.update(wanted & stems(p.text))
    total = len(seen) + 1
    keys = {t.stem for t in terms if t.key}
    return {
        w: math.log(1 + total / (frequency[w] + 0.5)) * (1.25 if w in keys else 1.0)
        for w in sorted(wanted)
    }


def _rarest(terms: list[Term], weights: dict[str, float]) -> set[str]:
    keys = {t.stem for t in terms if t.key}
    return keys or ({max(weights, key=lambda w: (weights[w], w))} if weights else set())


def _coverage(weights: dict[str, float], own: frozenset[str], near: frozenset[str]) -> float:
    total = sum(weights.values())
    if not total:
        return 0.0
    got = sum(v if w in own else NEIGHBOUR_WEIGHT * v if w in near else 0.0 for w, v in weights.items())
    return got / total


def _answer_shape(question: str) -> re.Pattern[str] | None:
    return next((shape for asks, shape in _KINDS_OF_ANSWER if asks.search(question)), None)


def _answers(shape: re.Pattern[str] | None, question: str, text: str) -> bool:
    """Whether the text has something of the asked kind that the question does not already say."""
    if shape is None:
        return True
    said = stems(question)
    return any(not stems(found.group()) <= said for found in shape.finditer(text))


def _telling(text: str) -> list[str]:
    """The sentences that state something: neither questions nor the reader's own apologies."""
    bare = text.removeprefix(_ANSWER_PREFIX).removeprefix(_NOTED_PREFIX)
    return [s for s in sentences(bare) if not s.rstrip('"”’)').endswith("?") and s not in UNKNOWN]


def best_sentence(question: str, seen: Iterable[Passage]) -> Best | None:
    """The sentence that covers the question best; the later one wins a tie."""
    everything = list(seen)
    terms = content_terms(question)
    weights = _weights(terms, everything)
    rarest, shape = _rarest(terms, weights), _answer_shape(question)
    best: tuple[float, Best] | None = None
    for p in everything:
        telling = _telling(p.text)
        own = stems(" ".join(telling))
        if not telling or not own & weights.keys():
            continue
        sentence, sentence_score, at = _pick(telling, weights, question)
        # A long reply has every word somewhere: what counts is what stands around the sentence.
        own = stems(" ".join(telling[max(0, at - _AROUND) : at + _AROUND + 1]))
        near = stems(p.before) | stems(p.after) if len(telling) <= 2 * _AROUND + 1 else frozenset()
        coverage = _coverage(weights, own, near)
        fits = _answers(shape, question, sentence)
        digest = p.text.startswith(_NOTED_PREFIX)  # the reader's own words: the source says more
        plain = p.full and fits and not digest and coverage >= CONFIDENT_COVERAGE and rarest <= own
        score = coverage + 0.7 * sentence_score + (0.1 if p.role == "user" else 0) + (0.15 if fits else 0)
        score += (0.25 if p.full else 0.0) - (0.3 if digest else 0.0)
        if best is None or score >= best[0]:
            best = (score, Best(p, sentence, coverage, plain))
    return best[1] if best else None


def _pick(telling: list[str], weights: dict[str, float], question: str) -> tuple[str, float, int]:
    """The best sentence, with the one beside it when only that has something of the asked kind."""
    shape = _answer_shape(question)
    scored = []
    for i, s in enumerate(telling):
        near = stems(telling[i - 1]) if i else frozenset()
        fits = 0.2 if shape is not None and _answers(shape, question, s) else 0.0
        scored.append((_coverage(weights, stems(s), near) + fits, i))
    score, i = max(scored, key=lambda x: (x[0], -x[1]))
    if _answers(shape, question, telling[i]):
        return telling[i], score, i
    for pair in (telling[i : i + 2], telling[max(0, i - 1) : i + 1]):
        if _answers(shape, question, " ".join(pair)):
            return " ".join(pair), score, i
    return " ".join(telling[i : i + 2]), score, i


# ------------------------------------------------------------------ the turn
def _vm_tools(request: dict[str, Any]) -> dict[str, str]:
    """page_fault / search_pages -> the (perhaps prefixed) name under which it is offered."""
    if request.get("tool_choice") == "none":
        return {}
    offered: dict[str, str] = {}
    for tool in request.get("tools") or []:
        name = str((tool.get("function") or {}).get("name", "")) if isinstance(tool, dict) else ""
        if kind := vm_kind(name):
            offered[kind] = name
    return offered


def _forced_tool(request: dict[str, Any]) -> str | None:
    choice = request.get("tool_choice")
    if isinstance(choice, dict):
        return str((choice.get("function") or {}).get("name", "")) or None
    tools = [t for t in request.get("tools") or [] if isinstance(t, dict) and t.get("function")]
    if choice == "required" and tools and not _vm_tools(request):
        return str(tools[0]["function"].get("name"))
    return None


def _queries(question: str, best: Best | None, seen: list[Passage]) -> list[str]:
    """The first query: the question's content words; the second: names, numbers and words near the best."""
    terms = content_terms(question)
    first = " ".join(dict.fromkeys(t.word for t in terms))
    names = [t.word for t in terms if t.key]
    weights = _weights(terms, seen)
    rare = sorted((t for t in terms if not t.key), key=lambda t: (-weights[t.stem], t.word))[:3]
    lead = [t.word for t in content_terms(best.sentence) if t.key][:3] if best else []
    second = " ".join(dict.fromkeys([*names, *(t.word for t in rare), *lead]))
    return [q for q in dict.fromkeys((first, second)) if q]


def _next_calls(request: dict[str, Any], question: str, best: Best | None) -> list[tuple[str, dict[str, Any]]]:
    """The VM calls of this round, [] when there is nothing useful left to ask."""
    messages, tools = messages_of(request), _vm_tools(request)
    since = messages[(newest_user(messages) or 0) + 1 :]
    done = list(vm_calls(since).values())
    searched = [str(a.get("query")) for k, a in done if k == "search_pages"]
    faulted = {str(a.get("page_id")) for k, a in done if k == "page_fault"}
    seen = passages(request)
    calls: list[tuple[str, dict[str, Any]]] = []
    if "page_fault" in tools and (searched or "search_pages" not in tools):
        terms = content_terms(question)
        weights = _weights(terms, seen)
        leads = [p for p in seen if not p.full and p.page_id and p.page_id not in faulted]
        worth = {
            p.page_id: _coverage(weights, stems(p.text), frozenset())
            + (0.0 if p.rank is None else 1 / (1 + p.rank))
            for p in leads
        }
        leads.sort(key=lambda p: -worth[p.page_id])
        room = min(MAX_FAULTS_PER_TURN - len(faulted), MAX_CALLS_PER_ROUND)
        calls += [(tools["page_fault"], {"page_id": p.page_id}) for p in leads[: max(0, room)]]
    if "search_pages" in tools and not calls and len(searched) < MAX_SEARCHES_PER_TURN:
        fresh = [q for q in _queries(question, best, seen) if q not in searched]
        calls += [(tools["search_pages"], {"query": q, "limit": SEARCH_LIMIT}) for q in fresh[:1]]
    return calls[:1] if request.get("parallel_tool_calls") is False else calls


def _key_fact(text: str) -> str:
    """The sentence of a statement with the most names and numbers for its length."""
    candidates = [s for s in sentences(text) if not s.endswith("?")] or [text.strip()]

    def density(s: str) -> float:
        words = s.split()
        facts = sum(any(c.isdigit() for c in w) * 2 + w[:1].isupper() for w in words[1:])
        return facts / math.sqrt(len(words)) - max(0, len(words) - 28)

    fact = max(candidates, key=density)
    words = fact.split()
    return fact if len(words) <= 40 else " ".join(words[:40]) + " …"


def request_hash(request: dict[str, Any]) -> str:
    canonical = json.dumps(request, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


def _call_message(request: dict[str, Any], calls: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    digest = request_hash(request)[:20]
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": f"call_{digest}{i}",
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
            }
            for i, (name, arguments) in enumerate(calls)
        ],
    }


def read(request: dict[str, Any]) -> dict[str, Any]:
    """The assistant message for an OpenAI chat request: content, or tool_calls; never both."""
    question = question_of(request)
    forced = _forced_tool(request)
    if forced and not vm_kind(forced):
        return _call_message(request, [(forced, {})])
    if not is_question(question):
        return _say(request, f"{_NOTED_PREFIX}{_key_fact(question)}" if question else "Noted.")
    best = best_sentence(question, passages(request))
    if best is None or not best.plain:
        calls = _next_calls(request, question, best)
        if calls:
            return _call_message(request, calls)
    if best is None or best.coverage < ANSWER_COVERAGE:
        return _say(request, UNKNOWN)
    return _say(request, f"{_ANSWER_PREFIX}{best.sentence}")


def _say(request: dict[str, Any], text: str) -> dict[str, Any]:
    wanted = request.get("response_format")
    if isinstance(wanted, dict) and wanted.get("type") in ("json_object", "json_schema"):
        text = json.dumps({"answer": text}, ensure_ascii=False)
    return {"role": "assistant", "content": text}
