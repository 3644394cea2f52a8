"""What a refusal allows and teaches: in every provider's words, and without any. Pure.

Promises: only a refusal that our changes may have caused is tried again without them, and only when
the unchanged request would fit the model (invariant 1); a refusal teaches by its own sentence only.
A prompt may be too long whatever upstream says: `is_something_else` names the refusals that surely
are about another matter, by their structure first. Words and numbers that we understand give the
window exactly; a rate limit is one only where the request is larger than all that it ever allows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from proxy.conversation.calibration import LEAST_WINDOW_TOKENS
from proxy.conversation.effects import Refused
from proxy.conversation.limits import Limits

_READ_CHARS = 4000
_READ_STRINGS = 32
_NO_SENTENCES = ("code", "type", "param", "id", "request_id", "object", "status")
_REFUSES = r"(?:not (?:support|allow|accept|permit|implement|available|enabled)|n't (?:support|allow|accept)" \
    r"|requires --|unsupported|unknown|unrecogni[sz]ed|invalid|unexpected|no support|extra inputs|extra_forbidden|no endpoints found)"


def _refused(what: str) -> re.Pattern[str]:
    """A sentence that refuses `what`; dots inside names do not end it."""
    return re.compile(rf"{_REFUSES}(?:[^.]|\.\w){{0,60}}{what}|{what}(?:[^.]|\.\w){{0,60}}{_REFUSES}")


_NO_TOOLS = _refused(r"\b(?:tools?|tool use|functions?|function[ _]calling|tool[ _]choice)\b(?!\[)")
# It takes tools, but not in this company: Gemini before 3 beside JSON, and beside its own tools.
_NO_TOOLS_WITH_JSON = re.compile(
    rf"(?:tools?|functions?|function[ _]calling)[^.]{{0,40}}response[ _](?:mime|format)[^.]{{0,60}}{_REFUSES}"
    rf"|(?:json mode|response[ _](?:mime|format))[^.]{{0,60}}{_REFUSES}[^.]{{0,60}}(?:tools?\b|function)"
)
# Any other field beside tools.
_BESIDE = r"\b(?:with|together|along|alongside|both|and|combin\w*|simultaneous\w*|same time|when|while|if)\b"
_TOOLS = r"\b(?:tools?|functions?|function[ _]calling|tool[ _](?:choice|calls?|use))\b"
_ALWAYS = ("messages", "model", "user")  # every request has them, or they are words of another meaning
_LEAST_NAME = 4  # characters
_NO_TOOLS_BESIDE = re.compile(r"tool use with function calling")
_NO_DEVELOPER = re.compile(rf"developer[^.]{{0,80}}{_REFUSES}|{_REFUSES}[^.]{{0,80}}developer")
_NO_STREAM_OPTIONS = _refused(r"\b(?:stream_options|include_usage)\b")
_NO_CACHE_KEY = _refused(r"\bprompt_cache_key\b")
_NO_MID_SYSTEM = re.compile(
    r"system (?:message|role|prompt)s?[^.]{0,40}(?:must|should|can|may|has to|is)[^.]{0,30}"
    r"(?:first|beginning|start|once|only one|one system)"
    r"|(?:only one|multiple|more than one|a single|non-consecutive|consecutive) system (?:message|prompt)"
    r"|(?:unexpected|invalid) role '?\"?(?:system|developer)'?\"? after"
    r"|system message[^.]{0,40}not[^.]{0,20}(?:middle|after)"
)
_ALTERNATE = re.compile(
    r"\broles?\b[^.]{0,40}\balternat|\balternat[^.]{0,40}\b(?:roles?|user|assistant|model)\b"
    r"|\bconsecutive (?:user|assistant|messages)|\bsame role\b[^.]{0,40}\brow\b"
)
_NO_SYSTEM = _refused(r"\bsystem[ _](?:role|message|prompt|instruction)s?\b")
_TEACHES: tuple[tuple[re.Pattern[str], str, Any], ...] = (  # the first that is said counts
    (_NO_STREAM_OPTIONS, "stream_usage", False),
    (_NO_CACHE_KEY, "prompt_cache_key", False),
    (_NO_DEVELOPER, "developer_role", "system"),
    (_ALTERNATE, "alternate", True),
    (_NO_MID_SYSTEM, "mid_system", False),
    (_NO_SYSTEM, "system_role", False),
    (_NO_TOOLS_WITH_JSON, "tools_with_json", False),
    (_NO_TOOLS, "tools", False),
)
_NO_AUDIO = re.compile(r"\baudio\b[^.]{0,120}(?:expired|not found|no longer|does not exist|invalid)")
_REPAIRABLE = (400, 404, 413, 415, 422)  # refusals that our own changes may have caused
_UNPAID = 402  # whatever it says, it is about money
# Not about size unless they say so: no key, no right, no such path, method or model, an unreadable
# type or version, too many requests, the law.
_ELSEWHERE = frozenset({401, 403, 404, 405, 406, 407, 410, 415, 426, 428, 429, 451})
# Gateways and servers say these of themselves, too: such a refusal has to come twice to teach anything.
_FOR_THE_MOMENT = frozenset({408, 429, 502, 503, 504, 529})
_OF_THE_PROMPT = ("messages", "input", "inputs", "prompt", "body", "contents")  # parameters that are all of it
_ELSE_CODE = re.compile(
    r"auth|api_?key|permission|forbidden|denied|quota|billing|payment|credit|insufficient_balance|rate_?limit"
    r"|content_?(?:filter|policy)|moderation|safety|not_?found|unsupported|unknown_(?:parameter|field|argument|model|url)|invalid_(?:value|type|json|image)"
)
_SPEAKS_OF_SIZE = re.compile(
    r"context|\btokens\b|\blength\b|too (?:long|large|big|many)|longer|larger|\bsize\b|exceed|max_|maximum"
)

# -- a prompt too long, as OpenAI, Azure, OpenRouter, vLLM, SGLang, TGI, llama.cpp, Ollama, LM Studio,
#    Mistral, Groq, Cerebras, xAI, Fireworks, Anthropic, Gemini, Bedrock, Cohere and others say it

_OVERFLOW = re.compile(
    r"context[ _-]?(?:length|window|size|limit)|exceed_context|maximum prompt length"
    r"|(?:prompt|input|request|conversation)[^.]{0,40}\btoo (?:long|large)\b"
    r"|too (?:long|large) for [^.]{0,60}(?:context|model)|too many (?:input )?tokens"
    r"|tokens?[^.]{0,60}(?:exceed|longer than|too large|cannot exceed)|exceed[^.]{0,60}\btokens?\b"
    r"|longer than the (?:maximum )?model|length of the messages|input length should be"
    r"|exceeds max length|tokens_limit_reached|max_new_tokens"
)
_PER_TIME = re.compile(r"per[ -](?:minute|min|day|hour|second)\b|\btp[md]\b|rate.?limit|quota")
_ANOTHER_LIMIT = re.compile(r"billing|at most \d+ completion")
_TOKENS = re.compile(r"\btokens?\b|\btp[md]\b|token_")
_LIMIT = re.compile(r"limit(?: of|:| is)?\s{0,2}(\d(?:[,_]?\d){2,9}+)")
_REQUESTED = re.compile(r"requested:?\s{0,2}(\d(?:[,_]?\d){0,9}+)")
_NUMBER = re.compile(r"(?<![\w.-])(\d{1,3}(?:[,_]\d{3})++|\d{3,9}+)(?:\.0+)?(?![\w.]?\w)")
_ALIKE = 1.6  # upstream's count of a request and ours differ by no more
_N = r"`?(\d(?:[,_]?\d){2,9}+)`?"
_WINDOW = tuple(
    re.compile(pattern.replace("#", _N))
    for pattern in (
        r"n_ctx\W{1,4}#",
        r"maximum (?:context|prompt|model|sequence|input)[ _]?(?:context |input )?(?:length|window|size)?"
        r"(?: is| of|:)? ?(?:only )?#",
        r"(?:context|model)(?:'s)? (?:context )?(?:length|size|window|limit)(?: is| of)?(?: only)?:? ?\(?#(?! \+)",
        r"maximum (?:number of |allowed )?(?:input |number of )?tokens(?: allowed)?(?: is| of|:)? ?\(?#",
        r"(?:token )?limit (?:is|of|:) ?#(?! \+)",
        r"token limit:? #",
        r"max(?:imum)? size: #",
        r"(?:cannot exceed|must be <=) #",
        r"exceeds the (?:limit|maximum) (?:of )?#",
        r"too large for model with #",
        r"should be \[\d+, ?#\]",
        r"> ?# ?(?:maximum|tokens|,|$)",
        r"context window exceeds limit \(?#",
    )
)
_SENT = tuple(
    re.compile(pattern.replace("#", _N))
    for pattern in (
        r"n_prompt_tokens\W{1,4}#",
        r"\(#(?: tokens)? (?:in|of|from) (?:the )?(?:messages|text|input)",
        r"# tokens from the input",
        r"(?:resulted in|has|contains|received|current length is|prompt contains) #",
        r"(?:input token count|prompt \(length|(?:input|request|prompt) \() ?\(?#",
        r"too long: ?#",
        r"token count of #",
        r"given: #",
        r"requested (?:about )?#",
        r"# \+ \d[\d,]* >",
        r"# (?:tokens )?> \d",
    )
)
_EXCESS = re.compile(rf"exceeded max context length by {_N}")


class Overflow(NamedTuple):
    """A prompt was too long for the model. Upstream's own tokens; None: it did not say."""

    window_tokens: int | None
    sent_tokens: int | None
    excess_tokens: int | None = None


def overflow(refused: Refused, sent_tokens: int = 0) -> Overflow | None:
    """What a refusal says of the model's window, or None when it says nothing that we understand.

    `sent_tokens`: of the refused request; above a limit per minute it can never pass, so that one is
    a window as well.
    """
    text = refused.body.decode("utf-8", "replace").lower()[:_READ_CHARS]
    if refused.status == _UNPAID or _ANOTHER_LIMIT.search(text):
        return None
    if _PER_TIME.search(text):
        limit, requested = _first((_LIMIT,), text), _first((_REQUESTED,), text)
        if limit is None or not _TOKENS.search(text) or (requested or sent_tokens) <= limit:
            return None
        return Overflow(limit, None)
    if not _OVERFLOW.search(text):
        return None
    window, sent = _first(_WINDOW, text), _first(_SENT, text)
    if window is not None and sent is not None and sent <= window // 2:
        sent = None  # another number
    return Overflow(window, sent, _first((_EXCESS,), text))


def by_numbers(refused: Refused, sent_tokens: int) -> Overflow:
    """An overflow in words that nobody knows: one number is about as large as the request, and the
    largest below it is the window. Empty where no numbers are like that."""
    said = [int(re.sub("[,_]", "", n)) for n in _NUMBER.findall(" ".join(_strings(refused.body)))]
    alike = [n for n in said if sent_tokens / _ALIKE <= n <= sent_tokens * _ALIKE]
    sent = min(alike, key=lambda n: abs(n - sent_tokens), default=0)
    window = max((n for n in said if LEAST_WINDOW_TOKENS <= n < sent), default=None)
    return Overflow(window, sent if window else None)


def is_something_else(refused: Refused) -> bool:
    """Whether it is surely not about the request's size: money, rights, a rate, a model that is not
    there, or one parameter beside the messages. By status and structure; words only to the contrary."""
    if refused.status == _UNPAID:
        return True
    error = _error(refused.body)
    named = _parameter(error)
    if named and named.lower() not in _OF_THE_PROMPT:
        return True
    text = _sentence(refused.body).lower()[:_READ_CHARS]
    if refused.status == 429 or _PER_TIME.search(text):  # one that is too large was understood above
        return "too large" not in text and "too long" not in text
    if _SPEAKS_OF_SIZE.search(text):
        return False
    code = f"{error.get('code') or ''} {error.get('type') or ''}".lower()
    return refused.status in _ELSEWHERE or bool(_ELSE_CODE.search(code))


def is_for_the_moment(refused: Refused) -> bool:
    """It may be the server's trouble, and gone with the next request."""
    return refused.status in _FOR_THE_MOMENT


def _error(refusal: bytes) -> Mapping[str, Any]:
    """The error object of a refusal, wherever it stands; empty when there is none."""
    try:
        body = msgspec.json.decode(refusal)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(body, dict):
        return {}
    error = body.get("error")
    return error if isinstance(error, dict) else body


def _parameter(error: Mapping[str, Any]) -> str:
    """The parameter that a refusal blames: OpenAI's `param`, or the place in a validator's list."""
    param = error.get("param")
    if isinstance(param, str):
        return param
    details = error.get("detail")
    first = details[0] if isinstance(details, list) and details else None
    place = first.get("loc") if isinstance(first, dict) else None
    return ".".join(map(str, place[1:])) if isinstance(place, list) else ""


def _strings(refusal: bytes) -> list[str]:
    """What a refusal says in sentences, without codes and ids."""
    try:
        found: list[str] = []
        left: list[Any] = [msgspec.json.decode(refusal)]
    except (ValueError, RecursionError):
        return [refusal.decode("utf-8", "replace")[:_READ_CHARS]]
    while left and len(found) < _READ_STRINGS:
        value = left.pop()
        if isinstance(value, str):
            found.append(value[:_READ_CHARS])
        elif isinstance(value, dict):
            left.extend(v for k, v in value.items() if k not in _NO_SENTENCES)
        elif isinstance(value, list):
            left.extend(value)
    return found


def _first(patterns: Sequence[re.Pattern[str]], text: str) -> int | None:
    for pattern in patterns:
        if (match := pattern.search(text)) is not None:
            return int(match.group(1).replace(",", "").replace("_", ""))
    return None


def repairable(refused: Refused) -> bool:
    """The unchanged request may do better."""
    return refused.status in _REPAIRABLE


def unchanged_fits(tokens: int, limits: Limits) -> bool:
    """A request of so many tokens fits the model, as far as its window is known."""
    return not limits.window_known or tokens < limits.window_tokens


def learn(refusal: bytes, limits: Limits) -> dict[str, Any]:
    """What a refusal of our request says about the model (only true if another one then passes).

    Only a sentence that says what the model does not take counts, not any that names a tool. Facts:
    `stream_usage`, `prompt_cache_key`, `mid_system`, `system_role`, `tools_with_json`, `tools` (all
    False), `alternate` (True) and `developer_role`.
    """
    text = _sentence(refusal).lower()[:_READ_CHARS]
    for pattern, fact, value in _TEACHES:
        if pattern.search(text) and not (fact == "developer_role" and limits.developer_role != "developer"):
            return {} if fact == "tools" and _NO_TOOLS_BESIDE.search(text) else {fact: value}
    return {}


def excluded_by(refusal: bytes, fields: Iterable[str]) -> list[str]:
    """The fields of a request that tools cannot go with, as the refusal says it ("cannot use a grammar
    together with tools"); sorted."""
    text = _sentence(refusal).lower()[:_READ_CHARS]
    found = []
    for name in fields:
        if name in _ALWAYS or len(name) < _LEAST_NAME or "tool" in name or "function" in name:
            continue
        word = rf"\b{re.escape(name.lower()).replace('_', '[ _]')}\b"
        if re.search(rf"{word}[^.]{{0,60}}{_BESIDE}[^.]{{0,60}}{_TOOLS}|{_TOOLS}[^.]{{0,60}}{_BESIDE}[^.]{{0,60}}{word}", text):
            found.append(name)
    return sorted(found)


def names_audio(refused: Refused) -> bool:
    """It says that an earlier answer's audio is gone."""
    return repairable(refused) and bool(_NO_AUDIO.search(_sentence(refused.body).lower()))


def _sentence(refusal: bytes) -> str:
    """The error's own words: its type ("invalid_request_error") says nothing."""
    try:
        error = msgspec.json.decode(refusal)["error"]
        return f"{error['message']} {error.get('param') or ''}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return refusal.decode("utf-8", "replace")
