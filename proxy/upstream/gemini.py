"""What Gemini's API needs beside litellm's translation. Pure.

Promises: what OpenAI's API takes and Gemini's refuses is said in other words (an empty text, a
refusal, a conversation that begins with the assistant, arguments that are no object), left out where
it says nothing (a field at its default), or refused with a sentence (custom tools). What Gemini takes
and litellm has no words for is said in Gemini's (allowed tools, top logprobs). Thought signatures
come and go where Google's own OpenAI-compatible endpoint has them: in `extra_content`. The same
messages give the same words in every request, so the provider's cache keeps its prefix.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from proxy.upstream.idle import has_custom_tools, refused, without_idle

Json = dict[str, Any]

_HOSTS: Final = ("gemini", "vertex_ai", "vertex_ai_beta")
# OpenAI's defaults of what Gemini does not have: to send them is to say nothing.
_DEFAULTS: Final[Mapping[str, tuple[Any, ...]]] = {
    "logit_bias": ({}, None),
    "store": (False, None),
    "verbosity": ("medium", None),
}
_SYSTEM: Final = ("system", "developer")
_OPENING: Final[Json] = {"role": "user", "content": "(The conversation begins with your message.)"}
_MODES: Final = {"auto": "VALIDATED", "required": "ANY"}
_SAYING: Final = (
    "content", "tool_calls", "function_call", "reasoning_content", "provider_specific_fields"
)  # fmt: skip
_BLANK: Final = " "  # a turn that says nothing: Gemini takes no empty text


def is_gemini(provider: str, model: str) -> bool:
    """True for models that are called by Gemini's rules."""
    return provider in _HOSTS and (provider == "gemini" or "gemini" in model.lower())


def for_gemini(fields: Json) -> Json:
    """The request as litellm has to be given it: itself, or a changed copy. Raises ApiError 400 for
    what cannot be said to Gemini."""
    if has_custom_tools(fields):
        raise refused("Gemini", "custom tools", "tools")
    out = dict(without_idle(fields, _DEFAULTS))
    _say_choice(out)
    if out.get("top_logprobs") is not None:
        _extra(out)["generationConfig"] = {"logprobs": out.pop("top_logprobs")}
    out["messages"] = list(_messages(fields["messages"]))
    return fields if out == fields else out


def opened(fields: Json) -> Json:
    """With a user's message first, where the client's conversation begins with an answer."""
    messages = fields["messages"]
    first = next((i for i, m in enumerate(messages) if m.get("role") not in _SYSTEM), len(messages))
    if first == len(messages) or messages[first].get("role") != "assistant":
        return fields
    return {**fields, "messages": [*messages[:first], _OPENING, *messages[first:]]}


def _say_choice(out: Json) -> None:
    """A legacy choice becomes today's; allowed tools are said to Gemini itself."""
    legacy = out.pop("function_call", None)
    if legacy is not None:
        named = {"type": "function", "function": legacy}
        out.setdefault("tool_choice", named if isinstance(legacy, dict) else legacy)
    choice = out.get("tool_choice")
    allowed = choice.get("allowed_tools") if isinstance(choice, dict) else None
    mode = _MODES.get(str(allowed.get("mode"))) if isinstance(allowed, dict) else None
    if mode is None or not isinstance(allowed, dict):
        return
    tools = [tool for tool in allowed.get("tools") or () if isinstance(tool, dict)]
    names = [_dict(tool.get("function")).get("name") for tool in tools]
    config = {"mode": mode, "allowedFunctionNames": names}
    del out["tool_choice"]
    _extra(out)["toolConfig"] = {"functionCallingConfig": config}


def _extra(out: Json) -> Json:
    """What litellm merges into Gemini's own request."""
    extra: Json = out.setdefault("extra_body", {})
    return extra


# ---------------------------------------------------------------- messages


def _messages(messages: Sequence[Json]) -> Iterator[Json]:
    for message in messages:
        role, said = message.get("role"), _worded(message)
        if role == "assistant":
            said = _signed(_called(said))
            if any(said.get(key) for key in _SAYING):
                yield said
        elif said.get("content") or role not in ("user", *_SYSTEM):
            yield said
        elif role == "user":
            yield {**said, "content": _BLANK}


def _worded(message: Json) -> Json:
    """Without empty texts; a refusal is a text."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [part for part in map(_part, content) if part is not None]
        return message if parts == content else {**message, "content": parts}
    if message.get("role") == "assistant" and not content:
        text = message.get("refusal") or None
        return message if content == text else {**message, "content": text}
    return message


def _part(part: Any) -> Any:
    """None for one that says nothing."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "refusal":
        part = {"type": "text", "text": part.get("refusal")}
    return None if kind in ("text", "refusal") and not part.get("text") else part


def _called(message: Json) -> Json:
    """Calls with arguments that are objects, and with their signatures where litellm reads them."""
    calls, legacy = message.get("tool_calls"), message.get("function_call")
    if isinstance(legacy, dict):
        return {**message, "function_call": _with_object(legacy)}
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        return message
    made = []
    for call in calls:
        if "custom" in call:
            raise refused("Gemini", "calls of custom tools", "messages")
        made.append({**call, "function": _with_object(_dict(call.get("function")))})
        signature = _signature_of(call)
        if signature:
            made[-1]["provider_specific_fields"] = {"thought_signature": signature}
    return message if made == calls else {**message, "tool_calls": made}


def _with_object(function: Json) -> Json:
    """Gemini's arguments are an object; what is none, as the model wrote it, stands within one."""
    written = function.get("arguments")
    if not isinstance(written, str):
        return function
    try:
        value = json.loads(written) if written.strip() else {}
    except ValueError:
        value = None
    if isinstance(value, dict) and written.strip():
        return function
    return {**function, "arguments": json.dumps(value if value == {} else {"arguments": written})}


def _signed(message: Json) -> Json:
    signature = _signature_of(message)
    if not signature:
        return message
    fields = {"thought_signatures": [signature]}  # litellm puts it on the message's text
    return {**message, "content": message.get("content") or "", "provider_specific_fields": fields}


def _signature_of(said: Json) -> str | None:
    """What Google has signed, as a client sends it back on a message or on a call."""
    signature = _dict(_dict(said.get("extra_content")).get("google")).get("thought_signature")
    return signature if isinstance(signature, str) else None


def _dict(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


# ---------------------------------------------------------------- answers


def as_google_says(message: Json, streamed: bool = False) -> None:
    """Changes a message, or a delta: litellm's copies of signatures become Google's own place for
    them, and lists with nothing in them go. A streamed thought is a piece of a thinking block."""
    for key in ("images", "thinking_blocks"):
        if message.get(key) == []:
            del message[key]
    signatures = _taken(message, "thought_signatures") or []
    blocks = message.get("thinking_blocks") or ()
    told = {block.get("signature") for block in blocks if isinstance(block, dict)}
    for call in message.get("tool_calls") or ():
        signature = _taken(call, "thought_signature")
        if signature:
            told.add(signature)
            call["extra_content"] = {"google": {"thought_signature": signature}}
    rest = [signature for signature in signatures if signature not in told]
    thought = message.get("reasoning_content")
    if streamed and thought and not blocks and not message.get("content"):
        block = {"type": "thinking", "thinking": thought}
        message["thinking_blocks"] = [{**block, "signature": rest[0]} if rest else block]
    elif rest:
        message["extra_content"] = {"google": {"thought_signature": rest[0]}}


def _taken(said: Json, name: str) -> Any:
    """One of litellm's own fields, removed."""
    fields = said.get("provider_specific_fields")
    if not isinstance(fields, dict):
        return None
    value = fields.pop(name, None)
    if not any(left is not None for left in fields.values()):
        del said["provider_specific_fields"]
    return value


def without_empty_metadata(payload: Json) -> None:
    """Changes a whole answer or a chunk: what Gemini did not say about it goes."""
    for key in [k for k, v in payload.items() if k.startswith("vertex_ai_") and not v]:
        del payload[key]
