"""What the upstream of the tests knows itself: the API's rules and the published token counts.

Promises: nothing here imports `proxy`, so a mistake in the server cannot hide in its own measure.
`check_openai_rules` returns every violation found, as sentences; an empty list means that the
request is one that OpenAI's chat completions endpoint would take. `count_request_tokens` counts by
the rules of OpenAI's cookbook with o200k_base; where those rules are silent (tool calls in
messages, nested schemas) it counts every string that the request carries, so it errs upwards.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

_litellm = importlib.util.find_spec("litellm")  # found, not imported: importing it takes seconds
if _litellm is not None and _litellm.origin is not None:
    os.environ.setdefault(
        "TIKTOKEN_CACHE_DIR",
        str(Path(_litellm.origin).parent / "litellm_core_utils" / "tokenizers"),
    )
import tiktoken  # noqa: E402  (needs the cache folder set before its first encoding)

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
PART_TYPES = {
    "system": {"text"},
    "developer": {"text"},
    "tool": {"text"},
    "assistant": {"text", "refusal"},
    "user": {"text", "image_url", "input_audio", "file"},
}
TOOL_NAME = re.compile(r"^[a-zA-Z0-9_-]{1,64}$")
MAX_TOOLS = 128

# ---------------------------------------------------------------- the rules of the API


def check_openai_rules(request: Any) -> list[str]:
    """Violations of the chat completions rules, in the order of the request; empty when none."""
    if not isinstance(request, dict):
        return ["the body is not a JSON object"]
    out: list[str] = []
    model = request.get("model")
    if not isinstance(model, str) or not model:
        out.append("model is missing or not a string")
    out += _check_messages(request.get("messages"))
    out += _check_tools(request)
    return out


def _check_messages(messages: Any) -> list[str]:
    if not isinstance(messages, list):
        return ["messages is missing or not an array"]
    if not messages:
        return ["messages is empty"]
    out: list[str] = []
    open_ids: dict[str, int] = {}  # tool call ids that wait for their result -> message index
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            out.append(f"messages[{i}] is not an object")
            continue
        role = message.get("role")
        if role not in ROLES:
            out.append(f"messages[{i}].role {role!r} is unknown")
            continue
        if role == "tool":
            out += _answer(i, message, open_ids)
        elif open_ids:
            waiting = ", ".join(open_ids)
            out.append(f"messages[{i}] ({role}) comes before the results of tool calls {waiting}")
            open_ids.clear()
        out += _check_content(i, role, message)
        if role == "assistant":
            out += _open_calls(i, message, open_ids)
        elif "tool_calls" in message:
            out.append(f"messages[{i}] ({role}) has tool_calls")
        name = message.get("name")
        if name is not None and (not isinstance(name, str) or not name):
            out.append(f"messages[{i}].name is not a non-empty string")
    if open_ids:
        out.append(f"tool calls without a result at the end: {', '.join(open_ids)}")
    return out


def _answer(i: int, message: dict[str, Any], open_ids: dict[str, int]) -> list[str]:
    call_id = message.get("tool_call_id")
    if not isinstance(call_id, str) or not call_id:
        return [f"messages[{i}] (tool) has no tool_call_id"]
    if open_ids.pop(call_id, None) is None:
        return [f"messages[{i}] (tool) answers {call_id!r}, which no preceding assistant call has"]
    return []


def _open_calls(i: int, message: dict[str, Any], open_ids: dict[str, int]) -> list[str]:
    out: list[str] = []
    calls = message.get("tool_calls")
    if calls is None:
        return out
    if not isinstance(calls, list) or not calls:
        return [f"messages[{i}].tool_calls is empty or not an array"]
    for j, call in enumerate(calls):
        where = f"messages[{i}].tool_calls[{j}]"
        if not isinstance(call, dict):
            out.append(f"{where} is not an object")
            continue
        call_id = call.get("id")
        if not isinstance(call_id, str) or not call_id:
            out.append(f"{where}.id is missing")
        elif call_id in open_ids:
            out.append(f"{where}.id {call_id!r} occurs twice in one message")
        else:
            open_ids[call_id] = i
        kind = call.get("type")
        if kind not in ("function", "custom"):
            out.append(f"{where}.type {kind!r} is unknown")
        body = call.get(kind) if kind in ("function", "custom") else call.get("function")
        if not isinstance(body, dict):
            out.append(f"{where}.{kind} is missing")
            continue
        if not isinstance(body.get("name"), str) or not TOOL_NAME.match(body["name"]):
            out.append(f"{where}: tool name {body.get('name')!r} is not allowed")
        field = "input" if kind == "custom" else "arguments"
        if not isinstance(body.get(field), str):
            out.append(f"{where}.{kind}.{field} is not a string")
        if "index" in call:
            out.append(f"{where} carries a stream delta's index")
    return out


def _check_content(i: int, role: str, message: dict[str, Any]) -> list[str]:
    content = message.get("content")
    where = f"messages[{i}].content"
    if content is None:
        excused = role == "assistant" and any(
            message.get(k) for k in ("tool_calls", "function_call", "refusal", "audio")
        )
        return [] if excused or role == "function" else [f"{where} of a {role} message is null"]
    if isinstance(content, str):
        return []
    if not isinstance(content, list) or role == "function":
        return [f"{where} is neither a string nor an array of parts"]
    if not content:
        return [f"{where} is an empty array"]
    out = []
    for j, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in PART_TYPES[role]:
            out.append(f"{where}[{j}].type {kind!r} is not allowed for {role}")
        elif kind in ("text", "refusal") and not isinstance(part.get(kind), str):
            out.append(f"{where}[{j}].{kind} is not a string")
        elif kind == "image_url" and not isinstance(part.get("image_url", {}).get("url"), str):
            out.append(f"{where}[{j}].image_url.url is not a string")
    return out


def _check_tools(request: dict[str, Any]) -> list[str]:
    tools = request.get("tools")
    out: list[str] = []
    names: set[str] = set()
    if tools is not None:
        if not isinstance(tools, list) or not tools:
            out.append("tools is empty or not an array")
            tools = []
        if len(tools) > MAX_TOOLS:
            out.append(f"tools has {len(tools)} entries, more than {MAX_TOOLS}")
        for i, tool in enumerate(tools):
            kind = tool.get("type") if isinstance(tool, dict) else None
            body = tool.get(kind) if isinstance(kind, str) else None
            if kind not in ("function", "custom") or not isinstance(body, dict):
                out.append(f"tools[{i}] is not a function or custom tool")
                continue
            name = body.get("name")
            if not isinstance(name, str) or not TOOL_NAME.match(name):
                out.append(f"tools[{i}]: name {name!r} is not allowed")
            elif name in names:
                out.append(f"tools[{i}]: name {name!r} occurs twice")
            else:
                names.add(name)
            parameters = body.get("parameters", {})
            if kind == "function" and (
                not isinstance(parameters, dict)
                or (parameters and parameters.get("type") != "object")
            ):
                out.append(f"tools[{i}]: parameters is not a schema of type object")
    choice = request.get("tool_choice")
    if choice is not None:
        out += _check_choice(choice, bool(tools), names)
    if "parallel_tool_calls" in request and not tools:
        out.append("parallel_tool_calls is only allowed when tools are given")
    return out


def _check_choice(choice: Any, has_tools: bool, names: set[str]) -> list[str]:
    out: list[str] = []
    if not has_tools:
        out.append("tool_choice is only allowed when tools are given")
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            out.append(f"tool_choice {choice!r} is unknown")
    elif isinstance(choice, dict) and choice.get("type") in ("function", "custom"):
        name = (choice.get(choice["type"]) or {}).get("name")
        if name not in names:
            out.append(f"tool_choice names {name!r}, which is not in tools")
    elif not (isinstance(choice, dict) and choice.get("type") == "allowed_tools"):
        out.append("tool_choice is neither a known word nor a tool")
    return out


# ---------------------------------------------------------------- counting

TOKENS_PER_MESSAGE = 3
TOKENS_PER_NAME = 1
TOKENS_OF_REPLY = 3
TOKENS_PER_CALL = 3  # the published rules do not name tool calls: one message's overhead each
IMAGE_TOKENS = {"low": 85, "auto": 765, "high": 765}  # 1024 x 1024; the tests' images are smaller
FUNC_INIT, FUNC_END = 7, 12
PROP_INIT, PROP_KEY = 3, 3
ENUM_INIT, ENUM_ITEM = -3, 3


@lru_cache(maxsize=1)
def _encoding() -> tiktoken.Encoding:
    return tiktoken.get_encoding("o200k_base")


@lru_cache(maxsize=65536)
def count_text(text: str) -> int:
    """Tokens of a string in o200k_base, special tokens read as plain text."""
    return len(_encoding().encode_ordinary(text))


def count_request_tokens(request: dict[str, Any]) -> int:
    """Prompt tokens of a chat request: messages, tools and the three of the reply."""
    total = sum(_message(m) for m in request["messages"]) + TOKENS_OF_REPLY
    tools = request.get("tools")
    if tools:
        total += sum(_tool(json.dumps(t, ensure_ascii=False)) for t in tools) + FUNC_END
    return total


def _message(message: dict[str, Any]) -> int:
    total = TOKENS_PER_MESSAGE
    for key, value in message.items():
        if isinstance(value, str):
            total += count_text(value) + (TOKENS_PER_NAME if key == "name" else 0)
        elif key == "content" and isinstance(value, list):
            total += sum(_part(p) for p in value)
        elif key == "tool_calls" and value:
            for call in value:
                body = call.get("function") or call.get("custom") or {}
                total += TOKENS_PER_CALL + count_text(call.get("id", ""))
                total += count_text(body.get("name", ""))
                total += count_text(body.get("arguments", body.get("input", "")))
    return total


def _part(part: dict[str, Any]) -> int:
    if part.get("type") == "image_url":
        return IMAGE_TOKENS.get(part["image_url"].get("detail", "auto"), 765)
    return sum(count_text(v) for k, v in part.items() if k != "type" and isinstance(v, str))


@lru_cache(maxsize=1024)
def _tool(serialised: str) -> int:
    tool = json.loads(serialised)
    function = tool.get("function") or tool.get("custom") or {}
    total = FUNC_INIT
    total += count_text(function["name"] + ":" + function.get("description", "").removesuffix("."))
    return total + _properties(function.get("parameters") or {})


def _properties(schema: dict[str, Any]) -> int:
    properties = schema.get("properties") or {}
    if not properties:
        return 0
    total = PROP_INIT
    for key, prop in properties.items():
        total += PROP_KEY
        if "enum" in prop:
            total += ENUM_INIT
            total += sum(ENUM_ITEM + count_text(str(item)) for item in prop["enum"])
        kind = prop.get("type", "")
        kind = kind if isinstance(kind, str) else "|".join(map(str, kind))
        total += count_text(f"{key}:{kind}:{str(prop.get('description', '')).removesuffix('.')}")
        total += _properties(prop)
        if isinstance(prop.get("items"), dict):
            total += _properties(prop["items"])
    return total
