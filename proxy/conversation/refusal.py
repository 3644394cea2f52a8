"""What a refusal allows and teaches: in every provider's words. Pure.

Promises: only a refusal that our changes may have caused is tried again without them, and only when
the unchanged request would fit the model (invariant 1); a refusal teaches by its own sentence only;
a rate limit is never taken for a window.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from proxy.conversation.effects import Refused
from proxy.conversation.limits import Limits

_READ_CHARS = 4000
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
_NO_AUDIO = re.compile(r"\baudio\b[^.]{0,120}(?:expired|not found|no longer|does not exist|invalid)")
_REPAIRABLE = (400, 404, 413, 415, 422)  # refusals that our own changes may have caused
_OVERFLOWING = (*_REPAIRABLE, 500)  # some local servers say it with 500

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
_ANOTHER_LIMIT = re.compile(
    r"per[ -](?:minute|day|hour|second)|\btp[md]\b|rate.?limit|quota|billing|at most \d+ completion"
)
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


def overflow(refused: Refused) -> Overflow | None:
    """What a refusal says of the model's window, or None when it is about something else."""
    if refused.status not in _OVERFLOWING:
        return None
    text = refused.body.decode("utf-8", "replace").lower()[:_READ_CHARS]
    if not _OVERFLOW.search(text) or _ANOTHER_LIMIT.search(text):
        return None
    window, sent = _first(_WINDOW, text), _first(_SENT, text)
    if window is not None and sent is not None and sent <= window // 2:
        sent = None  # another number
    return Overflow(window, sent, _first((_EXCESS,), text))


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
    if _NO_STREAM_OPTIONS.search(text):
        return {"stream_usage": False}
    if _NO_CACHE_KEY.search(text):
        return {"prompt_cache_key": False}
    if limits.developer_role == "developer" and _NO_DEVELOPER.search(text):
        return {"developer_role": "system"}
    if _ALTERNATE.search(text):
        return {"alternate": True}
    if _NO_MID_SYSTEM.search(text):
        return {"mid_system": False}
    if _NO_SYSTEM.search(text):
        return {"system_role": False}
    if _NO_TOOLS_WITH_JSON.search(text):
        return {"tools_with_json": False}
    return {"tools": False} if _NO_TOOLS.search(text) and not _NO_TOOLS_BESIDE.search(text) else {}


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
