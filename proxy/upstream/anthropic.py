"""Requests that Anthropic is certain to refuse, or of which litellm would lose something, put right. Pure.

Promises: what OpenAI's API takes and Anthropic's has no word for is said in other words (a refusal, a
call id used twice, a request of system messages alone), left out where it says nothing (an empty answer, a field at its default), or
refused with a sentence (audio, custom tools); nothing is dropped in silence. The same messages give
the same words in every request, so the provider's cache keeps its prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from proxy.upstream.idle import has_custom_tools, refused, without_idle

Json = dict[str, Any]

_HOSTS: Final = ("anthropic", "azure_ai", "bedrock", "bedrock_converse", "openrouter", "vertex_ai")
# OpenAI's own defaults: to send them is to say nothing, and litellm refuses the fields.
_DEFAULTS: Final[Mapping[str, tuple[Any, ...]]] = {
    "n": (1,),
    "logprobs": (False,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "verbosity": ("medium",),
}


_SYSTEM: Final = ("system", "developer")
_BEGIN: Final[Json] = {"role": "user", "content": "(begin)"}


def is_claude(provider: str, model: str) -> bool:
    """True for Anthropic's models, at whoever hosts them by Anthropic's rules."""
    return provider in _HOSTS and (provider == "anthropic" or "claude" in model.lower())


def for_claude(fields: Json) -> Json:
    """The request, or a changed copy. Raises ApiError 400 for what cannot be said to Anthropic."""
    fields = without_idle(fields, _DEFAULTS)
    if has_custom_tools(fields):
        raise refused("Anthropic", "custom tools", "tools")
    messages = fields["messages"]
    right = list(_with_own_ids(list(_messages(messages))))
    if all(message.get("role") in _SYSTEM for message in right):
        right.append(_BEGIN)
    same = len(right) == len(messages) and all(a is b for a, b in zip(right, messages, strict=True))
    return fields if same else {**fields, "messages": right}


def _messages(messages: Sequence[Json]) -> Iterator[Json]:
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            message = _with_parts(message, content)
        if message.get("role") != "assistant":
            yield message
            continue
        calls = message.get("tool_calls") or ()
        if any("custom" in call for call in calls if isinstance(call, dict)):
            raise refused("Anthropic", "calls of custom tools", "messages")
        if message.get("content") or calls or message.get("function_call"):
            yield message
        elif message.get("refusal"):
            yield {**message, "content": message["refusal"]}
        # Nothing is said, and Anthropic takes no empty text: litellm would put its own words there.


def _with_parts(message: Json, parts: Sequence[Any]) -> Json:
    kinds = {part.get("type") for part in parts if isinstance(part, dict)}
    if "input_audio" in kinds:
        raise refused("Anthropic", "audio", "messages")
    worded = [_worded(part) for part in parts if not _is_empty(part)]
    if len(worded) == len(parts) and "refusal" not in kinds:
        return message
    return {**message, "content": worded or ""}


def _is_empty(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and not part.get("text")


def _worded(part: Any) -> Any:
    if isinstance(part, dict) and part.get("type") == "refusal":
        return {"type": "text", "text": part.get("refusal") or "(refused)"}
    return part


def _with_own_ids(messages: Sequence[Json]) -> Iterator[Json]:
    """Every call has an id of its own: the second `call_0` becomes `call_0_2`, and so do its result."""
    seen: set[str] = set()
    renamed: dict[str, list[str]] = {}  # id as sent -> what the open calls of that id are called
    for message in messages:
        calls = message.get("tool_calls")
        if message.get("role") == "assistant" and isinstance(calls, list) and calls:
            renamed = {}
            ids = [_own_id(str(call.get("id")), seen, renamed) for call in calls]
            if any(id != call.get("id") for id, call in zip(ids, calls, strict=True)):
                named = [{**call, "id": id} for id, call in zip(ids, calls, strict=True)]
                message = {**message, "tool_calls": named}
        elif message.get("role") == "tool":
            waiting = renamed.get(str(message.get("tool_call_id")))
            if waiting:
                id = waiting.pop(0) if len(waiting) > 1 else waiting[0]
                if id != message.get("tool_call_id"):
                    message = {**message, "tool_call_id": id}
        yield message


def _own_id(id: str, seen: set[str], renamed: dict[str, list[str]]) -> str:
    own, count = id, 2
    while own in seen:
        own, count = f"{id}_{count}", count + 1
    seen.add(own)
    renamed.setdefault(id, []).append(own)
    return own
