"""A Chat Completions request as a Responses request. Pure.

Promises: the same conversation, tools and limits in the other API's words; what that API cannot
express is not dropped: `to_responses` says None and the request stays with Chat Completions. Left
out are only `seed` (which promises nothing), names on messages and keys of theirs that are not of the
API's (it refuses unknown ones), empty texts of the assistant's, and settings at their defaults.
Reasoning items come back in front of the very item that they preceded (`reasoning_items`), or not
at all: the API refuses one without its follower, and one that it would have to look up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

Json = dict[str, Any]

REASONING: Final = "reasoning_items"  # our key on an assistant message: [{before, item}]
TEXT: Final = "message"  # `before` of an item that preceded the message's text
_LEAST_OUTPUT_TOKENS: Final = 16  # the API's own minimum
_NO_PARAMETERS: Final[Json] = {"type": "object", "properties": {}}
# Said in other words below, or only about the form of the answer.
_TRANSLATED: Final = frozenset(
    (
        "messages",
        "tools",
        "tool_choice",
        "max_tokens",
        "max_completion_tokens",
        "reasoning_effort",
        "response_format",
        "verbosity",
        "stream_options",
        "store",
        "seed",
    )
)
# Settings that Responses does not have, with the values that mean nothing.
_WITHOUT: Final[Mapping[str, tuple[Any, ...]]] = {
    "n": (1,),
    "stop": ([],),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "prediction": (),
    "functions": ([],),
    "function_call": (),
    "web_search_options": (),
    "audio": (),
    "modalities": (["text"],),
}


class _Untranslatable(Exception):
    """Responses has no word for it."""


def to_responses(fields: Json) -> Json | None:
    """The body for /v1/responses; None when it cannot say what the request says."""
    try:
        return _request(fields)
    except (_Untranslatable, KeyError, TypeError, AttributeError):
        return None  # also a malformed request: upstream shall say so itself


def _request(fields: Json) -> Json:
    body: Json = {}
    for name, value in fields.items():
        if name in _WITHOUT:
            if value is not None and value not in _WITHOUT[name]:
                raise _Untranslatable(name)
        elif name not in _TRANSLATED and value is not None:
            body[name] = value
    body["input"] = list(_items(fields["messages"]))
    body["store"] = bool(fields.get("store"))
    body["include"] = ["reasoning.encrypted_content"]
    tokens = fields.get("max_completion_tokens") or fields.get("max_tokens")
    if tokens is not None:
        body["max_output_tokens"] = max(tokens, _LEAST_OUTPUT_TOKENS)
    if fields.get("reasoning_effort") is not None:
        body["reasoning"] = {**(body.get("reasoning") or {}), "effort": fields["reasoning_effort"]}
    if text := _text_settings(fields):
        body["text"] = text
    if fields.get("tools"):
        body["tools"] = [_tool(tool) for tool in fields["tools"]]
    if fields.get("tool_choice") is not None:
        body["tool_choice"] = _tool_choice(fields["tool_choice"])
    options = fields.get("stream_options") or {}
    if options.get("include_obfuscation") is not None:
        body["stream_options"] = {"include_obfuscation": options["include_obfuscation"]}
    return body


def _text_settings(fields: Json) -> Json:
    text: Json = {}
    wanted = fields.get("response_format")
    if wanted is not None:
        schema = wanted.get("json_schema") or {}
        text["format"] = {"type": wanted["type"], **schema}
    if fields.get("verbosity") is not None:
        text["verbosity"] = fields["verbosity"]
    return text


def _tool(tool: Json) -> Json:
    if tool["type"] == "function":
        said = tool["function"]
        # Chat Completions means "not strict" where Responses means "strict".
        return {
            "type": "function",
            **said,
            "parameters": said.get("parameters") or _NO_PARAMETERS,
            "strict": bool(said.get("strict")),
        }
    if tool["type"] == "custom":
        said = tool["custom"]
        form = said.get("format")
        if form is not None and form["type"] == "grammar":
            form = {"type": "grammar", **form["grammar"]}
        return {"type": "custom", **said, **({} if form is None else {"format": form})}
    raise _Untranslatable(tool["type"])


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, str):
        return choice
    if choice["type"] == "allowed_tools":
        allowed = choice["allowed_tools"]
        tools = [_tool_choice(tool) for tool in allowed["tools"]]
        return {"type": "allowed_tools", "mode": allowed["mode"], "tools": tools}
    return {"type": choice["type"], "name": choice[choice["type"]]["name"]}


# ---------------------------------------------------------------- messages


def _items(messages: Sequence[Json]) -> Iterator[Json]:
    custom: set[str] = set()  # ids of calls of custom tools: their results have their own type
    for message in messages:
        role = message["role"]
        if role == "assistant":
            for item in _assistant_items(message):
                if item["type"] == "custom_tool_call":
                    custom.add(item["call_id"])
                yield item
        elif role == "tool":
            kind = "custom_tool_call" if message["tool_call_id"] in custom else "function_call"
            output = _content(message.get("content"), "")
            call_id = message["tool_call_id"]
            yield {"type": f"{kind}_output", "call_id": call_id, "output": output}
        elif role in ("user", "system", "developer"):
            content = _content(message.get("content"), "")
            yield {"type": "message", "role": role, "content": content}
        else:
            raise _Untranslatable(role)


def _content(content: Any, empty: str) -> Any:
    """Input content: a text, or parts."""
    if content is None or isinstance(content, str):
        return content or empty
    return [_part(part) for part in content]


def _part(part: Json) -> Json:
    kind = part["type"]
    kept = {k: part[k] for k in ("prompt_cache_breakpoint",) if k in part}
    if kind == "text":
        return {"type": "input_text", "text": part["text"], **kept}
    if kind == "image_url":
        image = part["image_url"]
        image = {"url": image} if isinstance(image, str) else image
        detail = image.get("detail") or "auto"
        return {"type": "input_image", "image_url": image["url"], "detail": detail, **kept}
    if kind == "file":
        known = ("file_id", "file_data", "filename")
        return {"type": "input_file", **{k: v for k, v in part["file"].items() if k in known}, **kept}
    raise _Untranslatable(kind)


def _assistant_items(message: Json) -> Iterator[Json]:
    """The message's text and calls, each behind the reasoning that led to it."""
    if message.get("audio") or message.get("function_call"):
        raise _Untranslatable("audio or function_call")
    before: dict[str, list[Json]] = {}
    for entry in message.get(REASONING) or ():
        before.setdefault(entry["before"], []).append(entry)
    parts = list(_output_parts(message))
    if parts:
        yield from (entry["item"] for entry in before.get(TEXT, ()))
        plain = len(parts) == 1 and parts[0]["type"] == "output_text"
        content = parts[0]["text"] if plain else parts
        phase = {"phase": message["phase"]} if message.get("phase") else {}
        yield {"type": "message", "role": "assistant", "content": content, **phase}
    for call in message.get("tool_calls") or ():
        yield from (entry["item"] for entry in before.get(call["id"], ()))
        yield _call_item(call)


def _output_parts(message: Json) -> Iterator[Json]:
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    for part in content or ():
        if part["type"] == "text" and part["text"]:
            yield {"type": "output_text", "text": part["text"]}
        elif part["type"] == "refusal":
            yield {"type": "refusal", "refusal": part["refusal"]}
    if message.get("refusal"):
        yield {"type": "refusal", "refusal": message["refusal"]}


def _call_item(call: Json) -> Json:
    if call.get("type") == "custom":
        said = call["custom"]
        return {
            "type": "custom_tool_call",
            "call_id": call["id"],
            "name": said["name"],
            "input": said["input"],
        }
    said = call["function"]
    return {
        "type": "function_call",
        "call_id": call["id"],
        "name": said["name"],
        "arguments": said["arguments"],
    }
