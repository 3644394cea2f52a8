"""What other providers need beside litellm's translation of an OpenAI-shaped request and answer. Pure.

Promises: a request that the memory did not change stays as the client sent it, but for what Anthropic
or Gemini is certain to refuse (`anthropic.py`, `gemini.py`, `_THINKING`). In one that the memory
changed, the first message after the system messages is a user's, and Anthropic's models get cache
markers at the end of the stable prefix and of the last two turns (a client's own markers win). An answer's thinking blocks are
whole, so that they go back verbatim; its usage and tool calls look like OpenAI's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from proxy.upstream.anthropic import for_claude
from proxy.upstream.gemini import as_google_says, for_gemini, opened, without_empty_metadata

Json = dict[str, Any]

_RULES: Final = "<VM:RULES>"  # in the memory's own system message: the request is a paged one
_SYSTEM: Final = ("system", "developer")
_ASKING: Final = ("user", "tool", "function")
# Anthropic's and Gemini's conversations begin with the user; a window may begin with an answer.
_OPENING: Final[Json] = {"role": "user", "content": "(earlier messages: see the system message)"}
_MARKER: Final[Json] = {"type": "ephemeral"}
# Anthropic refuses to think on in a tool round whose thinking is gone; without, it goes on.
_THINKING: Final = ("thinking", "reasoning_effort")
_MARKABLE: Final = ("text", "image_url", "file", "document")  # parts that litellm keeps a marker of


def prepare(fields: Json, claude: bool, gemini: bool = False) -> Json:
    """The request's fields for litellm, of which nothing is lost. `claude`, `gemini`: by
    whose rules the model is called (`anthropic.is_claude`, `gemini.is_gemini`)."""
    messages = fields.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return fields
    if claude:
        fields = for_claude(fields)
        messages = fields["messages"]
        if _thinking_is_lost(messages):
            fields = {k: v for k, v in fields.items() if k not in _THINKING}
    if gemini:
        fields = for_gemini(fields)
        messages = fields["messages"]
    leading = next((i for i, m in enumerate(messages) if m.get("role") not in _SYSTEM), len(messages))
    if not any(_has_rules(message) for message in messages[:leading]):
        return opened(fields) if gemini else fields
    if leading < len(messages) and messages[leading].get("role") != "user":
        messages = [*messages[:leading], _OPENING, *messages[leading:]]
    if claude and not _marked(messages) and not _marked(fields.get("tools")):
        messages = _with_markers(messages, leading)
    return {**fields, "messages": messages}


def _thinking_is_lost(messages: Sequence[Json]) -> bool:
    """The client has not kept the thinking of the tool round that this request goes on with."""
    if not messages or messages[-1].get("role") not in ("tool", "function"):
        return False
    called = next((m for m in reversed(messages) if m.get("role") == "assistant"), {})
    return bool(called.get("tool_calls")) and not called.get("thinking_blocks")


def _has_rules(message: Json) -> bool:
    content = message.get("content")
    return isinstance(content, str) and _RULES in content


def _marked(value: Any) -> bool:
    """Somebody put a marker on a message, a part or a tool of the list."""
    for item in value if isinstance(value, list) else ():
        if isinstance(item, dict) and (
            "cache_control" in item
            or _marked(item.get("content"))
            or "cache_control" in (item.get("function") or ())
        ):
            return True
    return False


def _with_markers(messages: Sequence[Json], leading: int) -> list[Json]:
    """At most three markers. The one before the last answer stood at the end of the request before,
    so that its prefix is found however many blocks this turn has added."""
    last = _last_asking(messages, len(messages))
    answer = next((i for i in range(last, -1, -1) if messages[i].get("role") == "assistant"), 0)
    places = {leading - 1, last, _last_asking(messages, answer)}
    return [_with_marker(m) if i in places else m for i, m in enumerate(messages)]


def _last_asking(messages: Sequence[Json], end: int) -> int:
    return next((i for i in range(end - 1, -1, -1) if messages[i].get("role") in _ASKING), -1)


def _with_marker(message: Json) -> Json:
    content = message.get("content")
    if isinstance(content, str) and content:
        return {**message, "cache_control": _MARKER}
    if not isinstance(content, list) or not content or not isinstance(content[-1], dict):
        return message
    if message.get("role") == "tool":  # one block, whatever is in it
        return {**message, "cache_control": _MARKER}
    if content[-1].get("type") not in _MARKABLE:
        return message
    return {**message, "content": [*content[:-1], {**content[-1], "cache_control": _MARKER}]}


# ---------------------------------------------------------------- answers


def whole_answer(answer: Json) -> Json:
    """A whole answer as OpenAI writes it; changes and returns it."""
    without_empty_metadata(answer)
    for choice in answer.get("choices") or ():
        choice.setdefault("logprobs", None)
        message = choice.get("message")
        if message is None:
            continue
        if not choice.get("finish_reason"):  # the schema of a whole answer has no null here
            choice["finish_reason"] = "tool_calls" if message.get("tool_calls") else "stop"
        message.setdefault("refusal", None)
        said_otherwise = any(message.get(key) for key in ("tool_calls", "function_call", "audio"))
        message.setdefault("content", None if said_otherwise else "")
        for call in message.get("tool_calls") or ():
            call.pop("index", None)
        _without_copies(message)
        as_google_says(message)
    return answer


def asked_for_usage(fields: Json) -> bool:
    """The client wants usage at a stream's end."""
    options = fields.get("stream_options")
    return isinstance(options, dict) and bool(options.get("include_usage"))


class Chunks:
    """The chunks of one stream as OpenAI writes them. `with_usage`: the client asked for usage, so
    that every chunk has the key."""

    def __init__(self, with_usage: bool = False) -> None:
        self._with_usage = with_usage
        self._opened: set[int] = set()  # choices whose role is said
        self._thinking: dict[int, Json] = {}  # by choice: the block that is not signed yet

    def chunk(self, chunk: Json) -> Json:
        """The chunk to send; changes and returns it."""
        without_empty_metadata(chunk)
        choices = chunk.get("choices") or []
        if chunk.get("usage") and not any(c.get("delta") or c.get("finish_reason") for c in choices):
            chunk["choices"] = choices = []
        elif self._with_usage:
            chunk.setdefault("usage", None)
        for choice in choices:
            choice.setdefault("finish_reason", None)
            delta = choice.get("delta")
            if delta is None:
                continue
            _without_copies(delta)
            as_google_says(delta, streamed=True)
            if (index := choice.get("index") or 0) not in self._opened:
                self._opened.add(index)
                delta.setdefault("role", "assistant")
            if delta.get("content") == "":  # beside thinking and calls: it would be echoed as text,
                del delta["content"]  # which Anthropic refuses and litellm then fills with its own
            pieces = delta.pop("thinking_blocks", None)
            if pieces:
                whole = self._signed(choice.get("index") or 0, pieces)
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


def _without_copies(message: Json) -> None:
    """litellm says thinking blocks twice."""
    fields = message.get("provider_specific_fields")
    if isinstance(fields, dict):
        fields.pop("thinking_blocks", None)
        if not any(value is not None for value in fields.values()):
            del message["provider_specific_fields"]
