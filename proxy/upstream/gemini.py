"""What Gemini's API needs beside litellm's translation. Pure.

Promises: what OpenAI's API takes and Gemini's refuses is said in other words (an empty text, a
conversation that begins with the assistant, arguments that are no object). What Gemini takes and
litellm has no words for is said in Gemini's (allowed tools, top logprobs). Thought signatures
come and go where Google's own OpenAI-compatible endpoint has them: in `extra_content`. The same
messages give the same words in every request, so the provider's cache keeps its prefix.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from proxy.memory.models import SYSTEM_ROLES

Json = dict[str, Any]

HOSTS: Final = ("gemini", "vertex_ai", "vertex_ai_beta")
# OpenAI's defaults of what Gemini does not have: to send them is to say nothing.
DEFAULTS: Final[Mapping[str, tuple[Any, ...]]] = {
    "logit_bias": ({}, None),
    "store": (False, None),
    "verbosity": ("medium", None),
}
_MODES: Final = {"auto": "VALIDATED", "required": "ANY"}
_SAYING: Final = (
    "content", "tool_calls", "function_call", "reasoning_content", "provider_specific_fields"
)  # fmt: skip
_BLANK: Final = " "  # a turn that says nothing: Gemini takes no empty text


def for_gemini(fields: Json) -> Json:
    """The request as litellm has to be given it."""
    out = {**fields, "messages": list(_messages(fields["messages"]))}
    extra: Json = {}  # what litellm merges into Gemini's own request
    if out.get("top_logprobs") is not None:
        extra["generationConfig"] = {"logprobs": out.pop("top_logprobs")}
    legacy = out.pop("function_call", None)
    if legacy is not None:
        named = {"type": "function", "function": legacy}
        out.setdefault("tool_choice", named if isinstance(legacy, dict) else legacy)
    allowed = _dict(_dict(out.get("tool_choice")).get("allowed_tools"))
    if mode := _MODES.get(str(allowed.get("mode"))):
        names = [_dict(_dict(tool).get("function")).get("name") for tool in allowed.get("tools") or ()]
        config = {"mode": mode, "allowedFunctionNames": names}
        extra["toolConfig"] = {"functionCallingConfig": config}
        del out["tool_choice"]
    return {**out, "extra_body": extra} if extra else out


def _messages(messages: Sequence[Json]) -> Iterator[Json]:
    for message in messages:
        role = message.get("role")
        if role == "assistant":
            said = _signed(_called(message))
            if any(said.get(key) for key in _SAYING):
                yield said
        elif message.get("content") or role not in ("user", *SYSTEM_ROLES):
            yield message
        elif role == "user":
            yield {**message, "content": _BLANK}


def _called(message: Json) -> Json:
    """Calls with arguments that are objects, and with their signatures where litellm reads them."""
    calls, legacy = message.get("tool_calls"), message.get("function_call")
    if isinstance(legacy, dict):
        return {**message, "function_call": _with_object(legacy)}
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        return message
    made = [{**call, "function": _with_object(_dict(call.get("function")))} for call in calls]
    for call in made:
        if signature := _signature_of(call):
            call["provider_specific_fields"] = {"thought_signature": signature}
    return {**message, "tool_calls": made}


def _with_object(function: Json) -> Json:
    """Gemini's arguments are an object; what is none, as the model wrote it, stands within one."""
    written = function.get("arguments")
    if not isinstance(written, str):
        return function
    try:
        if isinstance(json.loads(written), dict):
            return function
    except ValueError:
        pass
    value = {"arguments": written} if written.strip() else {}
    return {**function, "arguments": json.dumps(value)}


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
    signatures = own_field(message, "thought_signatures") or []
    blocks = message.get("thinking_blocks") or ()
    told = {block.get("signature") for block in blocks}
    for call in message.get("tool_calls") or ():
        if signature := own_field(call, "thought_signature"):
            told.add(signature)
            call["extra_content"] = {"google": {"thought_signature": signature}}
    rest = [signature for signature in signatures if signature not in told]
    thought = message.get("reasoning_content")
    if streamed and thought and not blocks and not message.get("content"):
        block = {"type": "thinking", "thinking": thought}
        message["thinking_blocks"] = [{**block, "signature": rest[0]} if rest else block]
    elif rest:
        message["extra_content"] = {"google": {"thought_signature": rest[0]}}


def own_field(said: Json, name: str) -> Any:
    """One of litellm's own fields of a message, a delta or a call, which is removed."""
    fields = said.get("provider_specific_fields")
    if not isinstance(fields, dict):
        return None
    value = fields.pop(name, None)
    if all(left is None for left in fields.values()):
        del said["provider_specific_fields"]
    return value
