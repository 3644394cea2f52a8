"""What the upstream of the tests knows itself: the API's rules and the published token counts.

Promises: nothing here imports `proxy`, so a mistake in the server cannot hide in its own measure.
`check_openai_rules` returns every violation found, as sentences; an empty list means that the
request is one that OpenAI's chat completions endpoint would take (and a film in a user message, as
the servers behind OpenAI-compatible gateways take it).
`count_request_tokens` counts by the rules of OpenAI's cookbook and vision guide with o200k_base;
where those rules are silent (tool calls in messages, nested schemas) it counts every string that
the request carries, so it errs upwards.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import math
import os
import re
import wave
from collections.abc import Iterator
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
    "user": {"text", "image_url", "input_audio", "file", "video_url"},
}
IMAGE_DATA = re.compile(r"data:image/(png|jpeg|webp|gif);base64,[A-Za-z0-9+/]+=*")
SOUND_FORMATS = {"wav", "mp3"}
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
        elif kind in ("text", "refusal"):
            if not isinstance(part.get(kind), str):
                out.append(f"{where}[{j}].{kind} is not a string")
        else:
            out += [f"{where}[{j}].{problem}" for problem in _check_medium(kind, part.get(kind))]
    return out


def _check_medium(kind: str, body: Any) -> Iterator[str]:
    """What is wrong with a part's medium."""
    if not isinstance(body, dict):
        yield f"{kind} is not an object"
    elif kind == "image_url":
        if not isinstance(body.get("url"), str):
            yield "image_url.url is not a string"
        elif body["url"].startswith("data:") and not IMAGE_DATA.fullmatch(body["url"]):
            yield "image_url.url is no data URL of an image"
        if body.get("detail", "auto") not in ("auto", "low", "high"):
            yield f"image_url.detail {body['detail']!r} is unknown"
    elif kind == "input_audio":
        if not isinstance(body.get("data"), str) or body.get("format") not in SOUND_FORMATS:
            yield "input_audio has no data or no known format"
    elif kind == "file":
        if not body.get("file_id") and not (body.get("file_data") and body.get("filename")):
            yield "file has neither an id nor data with a name"
    elif not isinstance(body.get("url"), str):
        yield "video_url.url is not a string"


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


# ---------------------------------------------------------------- the API's own schema

SCHEMA = Path(
    os.environ.get("LLM_PAGER_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data"
) / "openai-chat.openapi.json"  # fmt: skip


# ---------------------------------------------------------------- counting

TOKENS_PER_MESSAGE = 3
TOKENS_PER_NAME = 1
TOKENS_OF_REPLY = 3
TOKENS_PER_CALL = 3  # the published rules do not name tool calls: one message's overhead each
IMAGE_BASE, IMAGE_TILE, IMAGE_MOST = 85, 170, 85 + 8 * 170  # gpt-4o; the last for a link
SOUND_TOKENS_PER_SECOND = 10
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
        low = part["image_url"].get("detail") == "low"
        return IMAGE_BASE if low else _image(part["image_url"]["url"])
    if part.get("type") == "input_audio":
        return _sound(part["input_audio"]["data"])
    if part.get("type") == "file":
        return _file(part["file"].get("file_data") or "")
    return sum(count_text(v) for k, v in part.items() if k != "type" and isinstance(v, str))


@lru_cache(maxsize=256)
def _image(url: str) -> int:
    """The vision guide: within 2048 px, then the shorter side 768 px, in tiles of 512 px."""
    if not url.startswith("data:"):
        return IMAGE_MOST
    from PIL import Image, UnidentifiedImageError  # late, as above

    try:
        size = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size
    except UnidentifiedImageError:
        return IMAGE_MOST
    shrink = min(1.0, 2048 / max(size))
    shrink = min(shrink, 768 / min(size))
    return IMAGE_BASE + IMAGE_TILE * math.prod(math.ceil(round(s * shrink) / 512) for s in size)


@lru_cache(maxsize=256)
def _sound(data: str) -> int:
    with wave.open(io.BytesIO(base64.b64decode(data))) as sound:
        return math.ceil(sound.getnframes() / sound.getframerate() * SOUND_TOKENS_PER_SECOND)


@lru_cache(maxsize=256)
def _file(url: str) -> int:
    """A PDF's pages are read as images too; of other files the text."""
    data = base64.b64decode(url.partition(",")[2])
    if data.startswith(b"%PDF"):
        return len(re.findall(rb"/Type\s*/Page\b", data)) * (IMAGE_BASE + 6 * IMAGE_TILE)
    return count_text(data.decode("utf-8", "replace"))


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
