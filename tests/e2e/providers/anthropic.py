"""A server that speaks Anthropic's Messages API: its rules, its events, its prompt cache.

Promises: strict where the real one is (first message of the user, roles in turn, results directly
after their calls and first in their message, no empty text, no unknown field, at most four cache
markers, thinking blocks back unchanged in a tool round); usage tells what the markers of this and
earlier requests would have saved.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tests.e2e.answers import Answer, Response
from tests.e2e.providers import (
    Json,
    ProviderServer,
    Said,
    events_stream,
    json_response,
    pieces,
    tokens_of,
    unknown_keys,
)
from tests.e2e.recording import Recorded

MAX_MARKERS = 4
LOOKBACK_BLOCKS = 20
_FIELDS = (
    "model messages max_tokens metadata stop_sequences stream system temperature thinking tool_choice"
    " tools top_k top_p service_tier container output_config context_management mcp_servers"
).split()
_BLOCKS = {
    "text": ("type", "text", "cache_control", "citations"),
    "image": ("type", "source", "cache_control"),
    "document": ("type", "source", "cache_control", "title", "context", "citations"),
    "container_upload": ("type", "file_id", "cache_control"),
    "tool_use": ("type", "id", "name", "input", "cache_control"),
    "tool_result": ("type", "tool_use_id", "content", "is_error", "cache_control"),
    "thinking": ("type", "thinking", "signature"),
    "redacted_thinking": ("type", "data"),
}
_IN_USER = {"text", "image", "document", "container_upload", "tool_result"}
_ID = re.compile(r"[a-zA-Z0-9_-]+")
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")
_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    529: "overloaded_error",
}


class AnthropicServer(ProviderServer):
    """`signed` are the thinking blocks that it gave out; only these may come back."""

    def __init__(self) -> None:
        super().__init__()
        self.signed: dict[str, str] = {}  # signature -> the thinking that it signs
        self._written: set[str] = set()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"  # /v1/messages is what its clients add

    def is_chat(self, path: str) -> bool:
        return path == "/v1/messages"

    def refuse(self, status: int, message: str, kind: str | None = None) -> Response:
        detail = {"type": kind or _KINDS.get(status, "api_error"), "message": message}
        return json_response({"type": "error", "error": detail, "request_id": "req_1"}, status)

    # -- the rules

    def broken_rules(self, request: Recorded) -> list[str]:
        broken = [
            f"header {name} is required"
            for name in ("x-api-key", "anthropic-version")
            if not request.header(name)
        ]
        body = request.json
        if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
            return [*broken, "messages: Field required"]
        beta = request.header("anthropic-beta") or ""
        formats = ["output_format"] if "structured-outputs" in beta else []
        broken += unknown_keys("body", body, [*_FIELDS, *formats])
        if not isinstance(body.get("max_tokens"), int) or body["max_tokens"] < 1:
            broken.append("max_tokens: Field required")
        broken += _system_rules(body.get("system"))
        broken += _tools_rules(body)
        broken += _messages_rules(body)
        broken += self._thinking_rules(body)
        marked = [block["cache_control"] for block in _all_blocks(body) if "cache_control" in block]
        if len(marked) > MAX_MARKERS:
            broken.append(f"A maximum of 4 blocks with cache_control may be provided: {len(marked)}")
        for mark in marked:
            if mark.get("type") != "ephemeral" or set(mark) - {"type", "ttl"}:
                broken.append(f"cache_control: {mark}")
        return broken

    def _thinking_rules(self, body: Json) -> Iterator[str]:
        thinking = (body.get("thinking") or {}).get("type") in ("enabled", "adaptive")
        if thinking and body.get("temperature", 1) != 1:
            yield "`temperature` may only be set to 1 when thinking is enabled"
        if thinking and (body["thinking"].get("budget_tokens") or 0) >= body.get("max_tokens", 0):
            yield "`max_tokens` must be greater than `thinking.budget_tokens`"
        if thinking and (body.get("tool_choice") or {}).get("type") in ("any", "tool"):
            yield "Thinking may not be enabled when tool_choice forces tool use."
        for message in body["messages"]:
            for block in _blocks(message):
                if block["type"] == "thinking" and (
                    self.signed.get(block.get("signature", "")) != block["thinking"]
                ):
                    yield "`thinking` blocks cannot be modified: Invalid `signature`"
        in_loop = [m for m in body["messages"] if m["role"] == "assistant"][-1:]
        last = _blocks(body["messages"][-1]) if body["messages"] else []
        if thinking and in_loop and last and last[0]["type"] == "tool_result":
            first = _blocks(in_loop[0])[0]["type"]
            if first not in ("thinking", "redacted_thinking"):
                yield f"Expected `thinking` or `redacted_thinking`, but found `{first}`."

    # -- the cache

    def _bill(self, body: Json) -> Json:
        """Usage: the longest marked prefix that an earlier request wrote, found as far back from a
        marker as the real one looks."""
        hashes, markers = prefix_hashes(body), marker_positions(body)
        sizes = [tokens_of(block) for block in prompt_blocks(body)]
        found = 0
        for end in markers:
            for at in range(end, max(end - LOOKBACK_BLOCKS, 0), -1):
                if hashes[at - 1] in self._written:
                    found = max(found, at)
                    break
        self._written.update(hashes[end - 1] for end in markers)
        written = max(markers, default=0)
        return {
            "input_tokens": sum(sizes[max(found, written) :]),
            "cache_read_input_tokens": sum(sizes[:found]),
            "cache_creation_input_tokens": sum(sizes[found:written]),
            "output_tokens": 1,
        }

    # -- the answer

    def put(self, request: Recorded, said: Said) -> Answer:
        body, content = request.json, []
        if said.thinking is not None:
            signature = "sig" + hashlib.sha256(said.thinking.encode()).hexdigest()[:40]
            self.signed[signature] = said.thinking
            content.append({"type": "thinking", "thinking": said.thinking, "signature": signature})
        if said.text:
            content.append({"type": "text", "text": said.text})
        for call in said.calls:
            use = {"type": "tool_use", "id": call.id, "name": call.name, "input": call.input}
            content.append(use)
        stop = said.stop or ("tool_use" if said.calls else "end_turn")
        head = {"id": f"msg_{request.index}", "type": "message", "role": "assistant"}
        usage = {**self._bill(body), "output_tokens": tokens_of(content)}
        message = {**head, "model": body["model"], "stop_sequence": None, "usage": usage}
        if body.get("stream"):
            return events_stream(list(_events(message, content, stop)), named=True)
        return json_response({**message, "content": content, "stop_reason": stop})


def _events(message: Json, content: Sequence[Json], stop: str) -> Iterator[Json]:
    usage = {**message["usage"], "output_tokens": 1}
    opened = {**message, "content": [], "stop_reason": None, "usage": usage}
    yield {"type": "message_start", "message": opened}
    yield {"type": "ping"}
    for index, block in enumerate(content):
        empty = {"text": {"text": ""}, "thinking": {"thinking": "", "signature": ""}}
        start = {**block, **empty.get(block["type"], {"input": {}})}
        yield {"type": "content_block_start", "index": index, "content_block": start}
        for delta in _deltas(block):
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    end = {"stop_reason": stop, "stop_sequence": None}
    total = {"output_tokens": message["usage"]["output_tokens"]}
    yield {"type": "message_delta", "delta": end, "usage": total}
    yield {"type": "message_stop"}


def _deltas(block: Json) -> Iterator[Json]:
    if block["type"] == "text":
        yield from ({"type": "text_delta", "text": piece} for piece in pieces(block["text"]))
    elif block["type"] == "thinking":
        for piece in pieces(block["thinking"]):
            yield {"type": "thinking_delta", "thinking": piece}
        yield {"type": "signature_delta", "signature": block["signature"]}
    else:
        yield {"type": "input_json_delta", "partial_json": ""}
        for piece in pieces(json.dumps(block["input"])):
            yield {"type": "input_json_delta", "partial_json": piece}


# ---------------------------------------------------------------- the prompt as the cache sees it


def _blocks(message: Json) -> list[Json]:
    content = message.get("content")
    return [{"type": "text", "text": content}] if isinstance(content, str) else content or []


def _all_blocks(body: Json) -> Iterator[Json]:
    system = body.get("system")
    yield from body.get("tools") or ()
    yield from system if isinstance(system, list) else ()
    for message in body["messages"]:
        for block in _blocks(message):
            yield block
            if isinstance(block.get("content"), list):
                yield from block["content"]


def prompt_blocks(body: Json) -> list[Json]:
    """Everything in the order of the cache, each without its marker: tools, system, messages."""
    system = body.get("system") or []
    parts: list[tuple[str, Json]] = [("tools", tool) for tool in body.get("tools") or ()]
    parts += [("system", b) for b in _blocks({"content": system})]
    for message in body["messages"]:
        parts += [(message["role"], block) for block in _blocks(message)]
    kept = [{k: v for k, v in block.items() if k != "cache_control"} for _, block in parts]
    return [{"at": at, **block} for (at, _), block in zip(parts, kept, strict=True)]


def marker_positions(body: Json) -> list[int]:
    """After how many blocks of the prompt the markers stand."""
    system = body.get("system") or []
    blocks = [*(body.get("tools") or ()), *_blocks({"content": system})]
    for message in body["messages"]:
        blocks += _blocks(message)
    return [i + 1 for i, block in enumerate(blocks) if "cache_control" in block]


def prefix_hashes(body: Json) -> list[str]:
    running = hashlib.sha256()
    out = []
    for block in prompt_blocks(body):
        running.update(json.dumps(block).encode())
        out.append(running.copy().hexdigest())
    return out


# ---------------------------------------------------------------- the rules, in the API's words


def _system_rules(system: Any) -> Iterator[str]:
    for i, block in enumerate(system if isinstance(system, list) else ()):
        if block.get("type") != "text" or not block.get("text"):
            yield f"system.{i}: text content blocks must be non-empty"
        yield from unknown_keys(f"system.{i}", block, ("type", "text", "cache_control", "citations"))


def _tools_rules(body: Json) -> Iterator[str]:
    tools = body.get("tools") or []
    names = [tool.get("name") for tool in tools]
    if len(names) != len(set(names)):
        yield "tools: Tool names must be unique."
    for i, tool in enumerate(tools):
        keys = ("name", "description", "input_schema", "cache_control", "type", "strict")
        yield from unknown_keys(f"tools.{i}", tool, keys)
        if not _NAME.fullmatch(str(tool.get("name"))):
            yield f"tools.{i}.name: String should match pattern"
        own = tool.get("type", "custom") != "custom"  # Anthropic's: its search, its code execution
        if not own and (tool.get("input_schema") or {}).get("type") != "object":
            yield f"tools.{i}.input_schema.type: Input should be 'object'"
    choice = body.get("tool_choice")
    if choice is not None and choice.get("type") not in ("auto", "any", "tool", "none"):
        yield f"tool_choice: {choice}"
    if choice is not None and not tools:
        yield "tool_choice may only be specified while providing tools."
    used = any(b["type"] == "tool_use" for m in body["messages"] for b in _blocks(m))
    if used and not tools:
        yield "Requests which have `tool_use` blocks in their messages must define tools."


def _messages_rules(body: Json) -> Iterator[str]:
    messages = body["messages"]
    if not messages or messages[0].get("role") != "user":
        yield 'messages: first message must use the "user" role'
    ids: list[str] = []
    open_calls: list[str] = []
    for i, message in enumerate(messages):
        where = f"messages.{i}"
        yield from unknown_keys(where, message, ("role", "content"))
        if message.get("role") not in ("user", "assistant"):
            yield f"{where}.role: Input should be 'user' or 'assistant'"
        if i and message.get("role") == messages[i - 1].get("role"):
            yield f"{where}: roles must alternate between user and assistant"
        blocks = _blocks(message)
        if not blocks:
            yield f"{where}: all messages must have non-empty content"
        for j, block in enumerate(blocks):
            yield from _block_rules(f"{where}.content.{j}", message["role"], block)
        yield from _result_rules(where, blocks, open_calls)
        open_calls = [block["id"] for block in blocks if block["type"] == "tool_use"]
        ids += open_calls
    if open_calls:
        yield "tool_use ids were found without tool_result blocks immediately after"
    if len(ids) != len(set(ids)):
        yield "tool_use ids must be unique"
    last = _blocks(messages[-1])[-1] if messages else {}
    if messages and messages[-1]["role"] == "assistant" and last.get("text", "").endswith(" "):
        yield "final assistant content cannot end with trailing whitespace"


def _result_rules(where: str, blocks: Sequence[Json], asked: Sequence[str]) -> Iterator[str]:
    results = [block["tool_use_id"] for block in blocks if block["type"] == "tool_result"]
    if missing := set(asked) - set(results):
        yield f"{where}: `tool_use` ids without `tool_result` blocks immediately after: {missing}"
    if strange := set(results) - set(asked):
        yield f"{where}: unexpected `tool_use_id` in `tool_result` blocks: {strange}"
    kinds = [block["type"] == "tool_result" for block in blocks]
    if kinds != sorted(kinds, reverse=True):
        yield f"{where}: tool_result blocks must come first"


def _block_rules(where: str, role: str, block: Json) -> Iterator[str]:
    kind = block.get("type")
    if kind not in _BLOCKS:
        yield f"{where}.type: Input tag {kind!r} does not match any of the expected tags"
        return
    yield from unknown_keys(where, block, _BLOCKS[kind])
    if (kind in _IN_USER) is not (role == "user") and kind != "text":
        yield f"{where}: {kind} blocks are not for the {role}"
    if kind == "text" and not block.get("text", "").strip():
        yield f"{where}: text content blocks must be non-empty"
    if kind == "tool_use" and not isinstance(block.get("input"), dict):
        yield f"{where}.input: Input should be a valid dictionary"
    if kind == "tool_use" and not _ID.fullmatch(str(block.get("id"))):
        yield f"{where}.id: String should match pattern '^[a-zA-Z0-9_-]+$'"
    source = block.get("source") or {}
    if kind == "image" and set(source) not in ({"type", "media_type", "data"}, {"type", "url"}):
        yield f"{where}.source: {sorted(source)}"
