"""What Anthropic's API needs beside litellm's translation. Pure.

Promises: what OpenAI's API takes and Anthropic's has no word for is said in other words (a call id used
twice, a request of system messages alone) or left out where it says nothing (an empty answer); nothing
else is dropped in silence. A window gets cache markers at its end and where the next
requests share it. The same messages give the same words in every request, so the provider's cache keeps its prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from proxy.memory.models import SYSTEM_ROLES

Json = dict[str, Any]

HOSTS: Final = ("anthropic", "azure_ai", "bedrock", "bedrock_converse", "openrouter", "vertex_ai")
# OpenAI's own defaults: to send them is to say nothing, and litellm refuses the fields.
DEFAULTS: Final[Mapping[str, tuple[Any, ...]]] = {
    "n": (1,), "logprobs": (False,), "logit_bias": ({},), "frequency_penalty": (0,), "presence_penalty": (0,),
    "store": (False,), "service_tier": ("auto", "default"), "verbosity": ("medium",),
}  # fmt: skip
_ASKING: Final = ("user", "tool", "function")
_BEGIN: Final[Json] = {"role": "user", "content": "(begin)"}
_MARKER: Final[Json] = {"type": "ephemeral"}
_MARKABLE: Final = ("text", "image_url", "file", "document")  # parts that litellm keeps a marker of
# Anthropic refuses to think on in a tool round whose thinking is gone; without, it goes on.
_THINKING: Final = ("thinking", "reasoning_effort")


def for_anthropic(fields: Json) -> Json:
    """The request as litellm has to be given it."""
    messages = list(_with_own_ids(_saying(fields["messages"])))
    if all(message.get("role") in SYSTEM_ROLES for message in messages):
        messages.append(_BEGIN)
    if _thinking_is_lost(messages):
        fields = {k: v for k, v in fields.items() if k not in _THINKING}
    return {**fields, "messages": messages}


def _saying(messages: Sequence[Json]) -> Iterator[Json]:
    """Anthropic takes no empty text: litellm would put its own words where nothing is said."""
    for message in messages:
        says = message.get("content") or message.get("tool_calls") or message.get("function_call")
        if says or message.get("role") != "assistant":
            yield message


def _with_own_ids(messages: Iterator[Json]) -> Iterator[Json]:
    """Every call has an id of its own: the second `call_0` becomes `call_0_2`, and so do its result."""
    seen: set[str] = set()
    renamed: dict[str, list[str]] = {}  # id as sent -> what the open calls of that id are called
    for message in messages:
        calls = message.get("tool_calls")
        if message.get("role") == "assistant" and isinstance(calls, list) and calls:
            renamed = {}
            named = [{**call, "id": _own_id(str(call.get("id")), seen, renamed)} for call in calls]
            message = {**message, "tool_calls": named}
        elif message.get("role") == "tool":
            waiting = renamed.get(str(message.get("tool_call_id")))
            if waiting:
                id = waiting.pop(0) if len(waiting) > 1 else waiting[0]
                message = {**message, "tool_call_id": id}
        yield message


def _own_id(id: str, seen: set[str], renamed: dict[str, list[str]]) -> str:
    own, count = id, 2
    while own in seen:
        own, count = f"{id}_{count}", count + 1
    seen.add(own)
    renamed.setdefault(id, []).append(own)
    return own


def _thinking_is_lost(messages: Sequence[Json]) -> bool:
    """The client has not kept the thinking of the tool round that this request goes on with."""
    if messages[-1].get("role") not in ("tool", "function"):
        return False
    called = next((m for m in reversed(messages) if m.get("role") == "assistant"), {})
    return bool(called.get("tool_calls")) and not called.get("thinking_blocks")


# ---------------------------------------------------------------- the prompt cache


def with_markers(fields: Json, leading: int) -> Json:
    """A window with at most four markers, or the client's own; `leading`: its system messages.

    What is shown in front of the newest user message is gone in the next turn's request, which shares what
    stands before that message. So a marker stands there, besides the one at the end; and where the message is
    new, at the same place of the turn before, so that its prefix is found however many blocks that turn added. In
    a tool round the end of the request before is marked, too.
    """
    messages = fields["messages"]
    if _marked(messages) or _marked(fields.get("tools")):
        return fields
    last = _last_of(_ASKING, messages, len(messages))
    asked = _last_of(("user",), messages, len(messages))
    answer = _last_of(("assistant",), messages, last)
    before = _last_of(("user",), messages, answer) - 1 if asked == last else _last_of(_ASKING, messages, answer)
    places = {leading - 1, last, asked - 1, before}
    marked = [_with_marker(m) if i in places else m for i, m in enumerate(messages)]
    return {**fields, "messages": marked}


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


def _last_of(roles: Sequence[str], messages: Sequence[Json], end: int) -> int:
    """The last message of these roles before `end`; -1: there is none."""
    return next((i for i in range(end - 1, -1, -1) if messages[i].get("role") in roles), -1)


def _with_marker(message: Json) -> Json:
    content = message.get("content")
    if not isinstance(content, str | list) or not content:
        return message
    if isinstance(content, str) or message.get("role") == "tool":  # one block, whatever is in it
        return {**message, "cache_control": _MARKER}
    *before, part = content
    if not isinstance(part, dict) or part.get("type") not in _MARKABLE:
        return message
    return {**message, "content": [*before, {**part, "cache_control": _MARKER}]}
