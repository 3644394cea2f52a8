"""A Responses request in Chat Completions' words, and what its items keep of chat messages.

Promises: pure; nothing of a request's items, settings, tools and choices is left out, but that nothing
is stored and that reasoning is asked for (both are the bridge's own).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.contract.wires import Json

_OTHERWISE = ("input", "tools", "tool_choice", "max_output_tokens", "store", "include", "reasoning",
              "text", "stream_options")
_CALLS = {"function_call": ("function", "arguments"), "custom_tool_call": ("custom", "input")}
_NO_PARAMETERS: Json = {"type": "object", "properties": {}}


def in_chats_words(body: Json) -> Json:
    """A request; one that asks for a stream is always told its usage."""
    out = {name: value for name, value in body.items() if name not in _OTHERWISE}
    out["messages"] = list(_messages(body["input"]))
    if "tools" in body:
        out["tools"] = [_tool(tool) for tool in body["tools"]]
    if "tool_choice" in body:
        out["tool_choice"] = _choice(body["tool_choice"])
    if "max_output_tokens" in body:
        out["max_completion_tokens"] = body["max_output_tokens"]
    if body.get("store"):
        out["store"] = True
    reasoning = body.get("reasoning") or {}
    if set(reasoning) == {"effort"}:
        out["reasoning_effort"] = reasoning["effort"]
    elif reasoning:
        out["reasoning"] = reasoning
    text = body.get("text") or {}
    if "format" in text:
        out["response_format"] = _format(text["format"])
    if "verbosity" in text:
        out["verbosity"] = text["verbosity"]
    if out.get("stream"):
        out["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
    return out


def _without(value: Json, *keys: str) -> Json:
    return {key: inner for key, inner in value.items() if key not in keys}


def _format(wanted: Json) -> Json:
    inside = _without(wanted, "type")
    return {"type": wanted["type"], **({"json_schema": inside} if inside else {})}


def _tool(tool: Json) -> Json:
    kind = tool["type"]
    said = _without(tool, "type")
    form = said.get("format") or {}
    if form.get("type") == "grammar":
        said["format"] = {"type": "grammar", "grammar": _without(form, "type")}
    return {"type": kind, kind: said}


def _choice(choice: Any) -> Any:
    if isinstance(choice, str):
        return choice
    kind = choice["type"]
    if kind == "allowed_tools":
        inside = {"mode": choice["mode"], "tools": [_choice(tool) for tool in choice["tools"]]}
        return {"type": kind, kind: inside}
    return {"type": kind, kind: {"name": choice["name"]}}


def _messages(items: Sequence[Json]) -> Iterator[Json]:
    """A message, with the calls that follow a text of the assistant's and the reasoning before them."""
    said: Json = {}  # the assistant's message that is still being put together
    for item in items:
        kind = item.get("type", "message")
        mine = kind == "reasoning" or kind in _CALLS or item.get("role") == "assistant"
        if said and (not mine or (kind == "message" and set(said) & {"text", "tool_calls"})):
            yield _assistant(said)
            said = {}
        if kind == "reasoning":
            said.setdefault("summaries", []).extend(part["text"] for part in item["summary"])
        elif kind in _CALLS:
            said.setdefault("tool_calls", []).append(_call(item))
        elif mine:
            said["text"] = item
        elif kind.endswith("_output"):
            yield {"role": "tool", "tool_call_id": item["call_id"], "content": _content(item["output"])}
        else:
            yield {**_without(item, "type"), "content": _content(item["content"])}
    if said:
        yield _assistant(said)


def _assistant(said: Json) -> Json:
    out: Json = {"role": "assistant", "content": None}
    if "text" in said:
        out = {**_without(said["text"], "type"), "content": _content(said["text"]["content"])}
    if "summaries" in said:
        out["reasoning_content"] = "\n\n".join(said["summaries"])
    if "tool_calls" in said:
        out["tool_calls"] = said["tool_calls"]
    return out


def _call(item: Json) -> Json:
    kind, key = _CALLS[item["type"]]
    return {"id": item["call_id"], "type": kind, kind: {"name": item["name"], key: item[key]}}


def _content(content: Any) -> Any:
    return content if isinstance(content, str) else [_part(part) for part in content]


def _part(part: Json) -> Json:
    kind = part["type"]
    if kind in ("input_text", "output_text"):
        return {**part, "type": "text"}
    if kind == "input_image":
        detail = {"detail": part["detail"]} if part.get("detail", "auto") != "auto" else {}
        kept = _without(part, "type", "image_url", "detail")
        return {"type": "image_url", "image_url": {"url": part["image_url"], **detail}, **kept}
    if kind == "input_file":
        return {"type": "file", "file": _without(part, "type")}
    return part


# ---------------------------------------------------------------- as the protocol keeps them


def tool_of(tool: Json) -> Json:
    """A tool of either side: parameters and strictness are always said."""
    if tool["type"] != "function":
        return tool
    said = {"parameters": _NO_PARAMETERS, "strict": False, **tool["function"]}
    return {**tool, "function": said}


def flat(messages: Sequence[Mapping[str, Any]]) -> Iterator[Json]:
    """The assistant's thoughts, texts (a refusal is a part) and calls one by one; empty texts of his
    are not kept. Everything else as it is."""
    for message in messages:
        if message["role"] != "assistant":
            yield dict(message)
            continue
        content = message.get("content") or []
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        if message.get("refusal"):
            parts.append({"type": "refusal", "refusal": message["refusal"]})
        other = {k: v for k, v in message.items() if k not in ("content", "refusal", "tool_calls")}
        if parts:
            yield {**other, "content": parts}
        elif set(other) != {"role"}:
            yield other
        for call in message.get("tool_calls") or ():
            yield {"role": "assistant", "call": call}
