"""Between OpenAI's shapes and what litellm takes and says: requests, answers, errors, headers. Pure.

Promises, of requests: one that the memory did not change stays as the client sent it, but for what
Anthropic or Gemini is certain to refuse. That is said in other words (a refusal is a text), left out
where it says nothing (an empty text, a field at OpenAI's default, a hint for OpenAI's own house), or
refused with a sentence (custom tools, audio); nothing that would change the answer is left out.
What only one of them needs is in `anthropic.py` and `gemini.py`. In a request that the memory
changed, the first message after the system messages is a user's.

Of answers: thinking blocks are whole, so that they go back verbatim; usage and tool calls look like
OpenAI's. Of errors: the provider's own status (litellm makes 500 of Anthropic's 529), its own sentence
without litellm's frame, and its hints when to try again; a window that is too small has OpenAI's code
`context_length_exceeded`, whatever the provider calls it.

Of headers: the provider gets those about tracing, repetition and its own betas, and custom ones
(`x-*`), never a credential of anybody's; the client gets the provider's, with request id and rate
limits also under the names that OpenAI's clients read.

By hand, because litellm's translation stops at what its own users send: each part here was found by
the contract suite at a provider's wire (tests/contract).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from proxy.errors import ApiError
from proxy.memory.models import SYSTEM_ROLES
from proxy.upstream import Header, anthropic, gemini
from proxy.upstream.routing import end_to_end

Json = dict[str, Any]

# ---------------------------------------------------------------- requests


class Wire(NamedTuple):
    """An API that is known to refuse what OpenAI's takes."""

    who: str
    word: str  # in the names of its models, at whoever hosts them
    hosts: Sequence[str]
    defaults: Mapping[str, tuple[Any, ...]]  # of fields that it does not have
    put: Callable[[Json], Json]


ANTHROPIC: Final = Wire("Anthropic", "claude", anthropic.HOSTS, anthropic.DEFAULTS, anthropic.for_anthropic)
GEMINI: Final = Wire("Gemini", "gemini", gemini.HOSTS, gemini.DEFAULTS, gemini.for_gemini)

_HINTS: Final = frozenset(
    """
    prediction prompt_cache_key prompt_cache_options prompt_cache_retention safety_identifier
    """.split()
)
_RULES: Final = "<VM:RULES>"  # in the memory's own system message: the request is a paged one
# Anthropic's and Gemini's conversations begin with the user; a window may begin with an answer.
_OPENING: Final[Json] = {"role": "user", "content": "(earlier messages: see the system message)"}
_BEGINNING: Final[Json] = {"role": "user", "content": "(The conversation begins with your message.)"}


def wire_of(provider: str, model: str) -> Wire | None:
    """By whose rules a model is called."""
    for wire in (ANTHROPIC, GEMINI):
        if provider in wire.hosts and (provider == wire.hosts[0] or wire.word in model.lower()):
            return wire
    return None


def prepare(fields: Json, wire: Wire | None) -> Json:
    """The request's fields for litellm: `fields`, or a changed copy. Raises ApiError 400 for what
    cannot be said on the wire."""
    if wire is not None:
        _refuse(fields, wire)
        idle = {name for name, value in fields.items() if _says_nothing(name, value, wire)}
        fields = {name: value for name, value in fields.items() if name not in idle}
        fields = wire.put({**fields, "messages": [_worded(m) for m in fields["messages"]]})
    messages = fields["messages"]
    leading = next((i for i, m in enumerate(messages) if m.get("role") not in SYSTEM_ROLES), len(messages))
    paged = any(_RULES in m["content"] for m in messages[:leading] if isinstance(m.get("content"), str))
    first = messages[leading].get("role") if leading < len(messages) else "user"
    if first != "user" and (paged or (wire is GEMINI and first == "assistant")):
        opening = _OPENING if paged else _BEGINNING
        fields = {**fields, "messages": [*messages[:leading], opening, *messages[leading:]]}
    return anthropic.with_markers(fields, leading) if paged and wire is ANTHROPIC else fields


def _says_nothing(name: str, value: Any, wire: Wire) -> bool:
    return name in _HINTS or any(value == idle for idle in wire.defaults.get(name, ()))


def _refuse(fields: Json, wire: Wire) -> None:
    refused = None
    if any("custom" in tool for tool in _dicts(fields.get("tools"))):
        refused = "custom tools", "tools"
    for message in fields["messages"]:
        if any("custom" in call for call in _dicts(message.get("tool_calls"))):
            refused = "calls of custom tools", "messages"
        if wire is ANTHROPIC and any(p.get("type") == "input_audio" for p in _dicts(message.get("content"))):
            refused = "audio", "messages"
    if refused is not None:
        what, param = refused
        sentence = f"{wire.who}'s models do not take {what}. Remove them, or choose another model."
        raise ApiError(400, sentence, code="unsupported_value", param=param)


def _dicts(value: Any) -> list[Json]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _worded(message: Json) -> Json:
    """Without empty texts; a refusal is a text."""
    content = message.get("content")
    if isinstance(content, list):
        content = [part for part in map(_part, content) if part is not None] or ""
    if message.get("role") == "assistant" and not content:
        content = message.get("refusal") or None
    return message if content == message.get("content") else {**message, "content": content}


def _part(part: Any) -> Any:
    """None for one that says nothing."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "refusal":
        part = {"type": "text", "text": part.get("refusal")}
    return None if kind in ("text", "refusal") and not part.get("text") else part


# ---------------------------------------------------------------- answers


def whole_answer(answer: Json) -> Json:
    """A whole answer as OpenAI writes it; changes and returns it."""
    _without_empty_metadata(answer)
    for choice in answer.get("choices") or ():
        choice.setdefault("logprobs", None)
        message = choice["message"]
        if not choice.get("finish_reason"):  # the schema of a whole answer has no null here
            choice["finish_reason"] = "tool_calls" if message.get("tool_calls") else "stop"
        message.setdefault("refusal", None)
        said_otherwise = any(message.get(key) for key in ("tool_calls", "function_call", "audio"))
        message.setdefault("content", None if said_otherwise else "")
        for call in message.get("tool_calls") or ():
            call.pop("index", None)
        gemini.own_field(message, "thinking_blocks")  # litellm says them twice
        gemini.as_google_says(message)
    return answer


class Chunks:
    """The chunks of one stream as OpenAI writes them. `with_usage`: the client asked for usage, so
    that every chunk has the key."""

    def __init__(self, with_usage: bool = False) -> None:
        self._with_usage = with_usage
        self._opened: set[int] = set()  # choices whose role is said
        self._thinking: dict[int, Json] = {}  # by choice: the block that is not signed yet

    def chunk(self, chunk: Json) -> Json:
        """The chunk to send; changes and returns it."""
        _without_empty_metadata(chunk)
        choices = chunk.get("choices") or []
        if chunk.get("usage") and not any(c.get("delta") or c.get("finish_reason") for c in choices):
            chunk["choices"] = choices = []
        elif self._with_usage:
            chunk.setdefault("usage", None)
        for choice in choices:
            choice.setdefault("finish_reason", None)
            delta, index = choice.get("delta"), choice.get("index") or 0
            if delta is None:
                continue
            gemini.own_field(delta, "thinking_blocks")
            gemini.as_google_says(delta, streamed=True)
            if index not in self._opened:
                self._opened.add(index)
                delta.setdefault("role", "assistant")
            if delta.get("content") == "":  # beside thinking and calls: it would be echoed as text,
                del delta["content"]  # which Anthropic refuses and litellm then fills with its own
            whole = self._signed(index, delta.pop("thinking_blocks", None) or ())
            if whole:
                delta["thinking_blocks"] = whole
        return chunk

    def _signed(self, choice: int, pieces: Sequence[Json]) -> list[Json]:
        """Pieces in, whole blocks out: a client that joins lists would keep every piece as a block,
        and no piece is what the provider has signed."""
        whole: list[Json] = []
        for piece in pieces:
            if piece.get("type") != "thinking":  # redacted: whole already
                whole.append(piece)
                continue
            block = self._thinking.setdefault(choice, {"type": "thinking", "thinking": ""})
            block["thinking"] += piece.get("thinking") or ""
            if piece.get("signature"):
                whole.append({**block, "signature": piece["signature"]})
                del self._thinking[choice]
        return whole


def _without_empty_metadata(payload: Json) -> None:
    """What Gemini did not say about an answer goes."""
    for key in [k for k, v in payload.items() if k.startswith("vertex_ai_") and not v]:
        del payload[key]


# ---------------------------------------------------------------- errors

_CHAIN_LIMIT: Final = 16  # exceptions looked at behind one error
_BYTES: Final = re.compile(r"b'(?:[^'\\]|\\.)*'|b\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_OVERFLOW: Final = "ContextWindowExceededError"
# litellm's words around a provider's.
_FRAME: Final = re.compile(r"^(?:litellm\.\w+: )+(?:\w+: )?(?:\w+Exception(?: \w+)? - )?")
_ADVICE: Final = re.compile(r"\.? Handle with `litellm\.\w+`\.$")
_UNSUPPORTED: Final = re.compile(r"(\w+) does not support parameters: (\['(\w+)'[^\]]*\])")
# An error within a stream of Gemini's, as litellm tells it.
_WITHIN: Final = re.compile(r"([A-Z]+(?:_[A-Z]+)*) - (.+)", re.DOTALL)
_TRACEBACK: Final = "\nTraceback (most recent call last)"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what is behind it, nearest first."""
    at: BaseException | None = error
    for _ in range(_CHAIN_LIMIT):
        if at is None:
            return
        yield at
        inner = getattr(at, "original_exception", None)
        at = inner if isinstance(inner, BaseException) else at.__cause__ or at.__context__


def caused_by(error: Exception, kind: type[BaseException]) -> bool:
    return any(isinstance(cause, kind) for cause in _chain(error))


def provider_status(error: Exception) -> int | None:
    """The provider's HTTP status, else the one that litellm gave; None: there was no answer."""
    found: int | None = None
    for cause in _chain(error):  # the farthest is the provider's own
        response = getattr(cause, "response", None)
        for status in (getattr(cause, "status_code", None), getattr(response, "status_code", None)):
            if isinstance(status, int) and 400 <= status <= 599:
                found = status
    return found


def error_object(error: Exception) -> Json:
    """What stands under `error` in OpenAI's shape."""
    unknown = _UNSUPPORTED.search(_message(error))
    if unknown is not None:
        return {
            "message": f"{unknown[1]} does not support {unknown[2]}. Remove them from the request, or set"
            " upstream.drop_params: true, so that what a provider does not have is left out.",
            "type": "invalid_request_error",
            "param": unknown[3],
            "code": "unsupported_parameter",
        }
    status = provider_status(error)
    said = _said(error)
    code = said.get("code") or getattr(error, "code", None)
    code = None if code is None or str(code).isdigit() else str(code)
    kind = said.get("type") or said.get("status")  # Anthropic's word, Gemini's word
    if any(type(cause).__name__ == _OVERFLOW for cause in _chain(error)):
        code = "context_length_exceeded"
    elif code is None and status == 429:
        code = "rate_limit_exceeded"
    elif code is None and isinstance(kind, str) and kind != "invalid_request_error":
        code = kind.lower()
    if status == 429:
        ours = "rate_limit_error"
    else:
        ours = "invalid_request_error" if status is not None and status < 500 else "api_error"
    message = str(said.get("message") or _words(error))
    return {"message": message, "type": ours, "param": getattr(error, "param", None), "code": code}


def _message(error: BaseException) -> str:
    return str(getattr(error, "message", None) or error)


def _words(error: Exception) -> str:
    """What the provider wrote, where that is no error object; else what litellm says, without the
    place in its own code."""
    text = _message(error).partition(_TRACEBACK)[0]
    return _unquoted(_ADVICE.sub("", _FRAME.sub("", text))).strip() or "(no words)"


def _said(error: Exception) -> Json:
    """The error object in the provider's body, which litellm quotes in its message."""
    for cause in _chain(error):
        text = _unquoted(_message(cause))
        if within := _WITHIN.fullmatch(text):
            return {"status": within[1], "message": within[2]}
        try:
            body, _ = json.JSONDecoder().raw_decode(text, max(0, text.find("{")))
        except ValueError:
            continue
        found = body.get("error") if isinstance(body, dict) else None
        if isinstance(found, dict) and found.get("message"):
            return found
    return {}


def _unquoted(text: str) -> str:
    """The body in a message such as `AnthropicException - b'{...}'`; else the message."""
    quoted = _BYTES.search(text)
    if quoted is None:
        return text
    try:
        return bytes(ast.literal_eval(quoted.group())).decode("utf-8", "replace")
    except (ValueError, SyntaxError):
        return text


# ---------------------------------------------------------------- headers

_PASSED: Final = frozenset((b"traceparent", b"tracestate", b"idempotency-key", b"anthropic-beta"))
_KEPT_BACK: Final = tuple(  # beginnings: credentials, and what hops say of each other
    b"x-api-key x-goog- x-amz- x-ms- x-forwarded- x-real-ip x-llm-pager".split()
)
_NOT_RELAYED: Final = frozenset(
    # Of the body that litellm read, and of its connection; and no credential ever comes back, for an
    # exception of litellm's may hold the request's headers.
    b"""
    content-encoding content-length content-type date server set-cookie
    authorization api-key cookie host user-agent x-amz-security-token x-api-key x-goog-api-key
    """.split()
)
_PREFIX: Final = "llm_provider-"  # litellm's, before the provider's own names
_LIMITS: Final = re.compile(rb"anthropic-ratelimit-(requests|tokens)-(limit|remaining|reset)")


def request_headers(headers: Sequence[Header]) -> dict[str, str]:
    """What goes to the provider beside litellm's own headers. `headers`: names in lower case."""
    return {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in end_to_end(headers)
        if name in _PASSED or (name.startswith(b"x-") and not name.startswith(_KEPT_BACK))
    }


def reply_headers(result: Any, told: Mapping[str, str]) -> list[Header]:
    """What the provider's answer said, from litellm's answer or stream. `told`: the headers as they
    came, where litellm keeps none."""
    hidden: Any = getattr(result, "_hidden_params", None)
    kept = hidden.get("additional_headers") if hasattr(hidden, "get") else None
    return relayed((told or kept or {}).items())


def error_headers(error: Exception) -> list[Header]:
    """The provider's headers of a refusal; litellm puts them in several places."""
    found: list[tuple[str, Any]] = []
    for cause in _chain(error):
        for headers in (
            getattr(cause, "litellm_response_headers", None),
            getattr(getattr(cause, "response", None), "headers", None),
            getattr(cause, "headers", None),
        ):
            if isinstance(headers, Mapping):
                found += headers.items()
    return relayed(found)


def relayed(headers: Iterable[tuple[str, Any]]) -> list[Header]:
    """A provider's headers as the client gets them; the first of each name."""
    raw = [
        (name.lower().removeprefix(_PREFIX).encode("latin-1", "replace"), f"{value}".encode("latin-1", "replace"))
        for name, value in headers
        if value is not None
    ]
    out: dict[bytes, bytes] = {}
    for name, value in end_to_end(raw):
        if name in _NOT_RELAYED or name.startswith(b"x-litellm-"):
            continue
        out.setdefault(name, value)
        if limit := _LIMITS.fullmatch(name):
            out.setdefault(b"x-ratelimit-%b-%b" % (limit[2], limit[1]), value)
        elif name == b"request-id":
            out.setdefault(b"x-request-id", value)
    return [*out.items()]
