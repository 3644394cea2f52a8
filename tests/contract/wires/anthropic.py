"""Anthropic's Messages API as the script's wire.

Promises: requests are judged by the rules of `tests.e2e.providers.anthropic`; system blocks, texts,
calls, results, thinking and sampling fields are told in OpenAI's words; answers, streams and errors
come back in Anthropic's, streams as live as the script's.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.contract.wires import ABSENT, Json, Pieces, ProviderWire, parsed, sse
from tests.contract.wires.absences import ANTHROPIC
from tests.e2e.providers import tokens_of
from tests.e2e.providers.anthropic import (
    LOOKBACK_BLOCKS,
    AnthropicServer,
    marker_positions,
    prefix_hashes,
    prompt_blocks,
)
from tests.e2e.recording import Recorded

_STOPS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use",
          "content_filter": "refusal"}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
TOOLS_PROMPT_TOKENS = 346  # Anthropic's "Tool use" guide, tool_choice auto
_EFFORTS = {"low": 1024, "medium": 2048, "high": 4096}  # litellm's budgets
_SAME = ("model", "stream", "temperature", "top_p", "top_k", "max_tokens", "service_tier", "thinking")


class AnthropicWire(ProviderWire):
    """A model behind `anthropic/`, as litellm asks for it."""

    name = "anthropic"
    absent = ANTHROPIC

    def __init__(self) -> None:
        self._judge = AnthropicServer()  # never started: its rules and its signed thinking

    def is_chat(self, recorded: Recorded) -> bool:
        return self._judge.is_chat(recorded.target.partition("?")[0])

    def broken_rules(self, recorded: Recorded) -> list[str]:
        return self._judge.broken_rules(recorded)

    # -- heard

    def heard(self, recorded: Recorded) -> Any:
        body = recorded.json
        if not isinstance(body, dict):
            return body
        out = {name: body[name] for name in _SAME if name in body}
        out["messages"] = [*_system(body.get("system")), *_messages(body["messages"])]
        if "stop_sequences" in body:
            out["stop"] = body["stop_sequences"]
        if "metadata" in body:
            out["user"] = body["metadata"].get("user_id")
        if "tools" in body:
            out["tools"] = [_tool(tool) for tool in body["tools"]]
        choice = body.get("tool_choice")
        if choice is not None:
            named = {"type": "function", "function": {"name": choice.get("name")}}
            out["tool_choice"] = named if choice["type"] == "tool" else _CHOICES[choice["type"]]
            if "disable_parallel_tool_use" in choice:
                out["parallel_tool_calls"] = not choice["disable_parallel_tool_use"]
        if "output_format" in body:
            out["response_format"] = body["output_format"]
        if out.get("stream"):  # usage is always said
            out["stream_options"] = {"include_usage": True}
        return out

    def field(self, name: str, value: Any) -> tuple[str, Any]:
        """In the words of `heard`, where Anthropic has others than OpenAI."""
        if name == "stop" and isinstance(value, str):
            return name, [value]
        if name == "max_completion_tokens":
            return "max_tokens", value
        if name == "reasoning_effort":
            return "thinking", {"type": "enabled", "budget_tokens": _EFFORTS[value]}
        if name == "response_format" and value is not None:
            schema = (value.get("json_schema") or {}).get("schema")
            return name, {"type": "json_schema", "schema": schema} if schema else ABSENT
        return super().field(name, None if (name, value) == ("stream", False) else value)

    def key(self, recorded: Recorded) -> str | None:
        return recorded.header("x-api-key")

    def tokens(self, request: Json) -> int:
        """With the system prompt that Anthropic puts before tools."""
        return super().tokens(request) + (TOOLS_PROMPT_TOKENS if request.get("tools") else 0)

    def cached_share(self, before: Recorded, after: Recorded) -> float:
        """Only what ends at a marker of the earlier request, looked up from one of the later."""
        first, second = json.loads(before.body), json.loads(after.body)
        blocks = prompt_blocks(first)
        asked = max(i for i, block in enumerate(blocks) if (block["at"], block["type"]) == ("user", "text"))
        while (blocks[asked - 1]["at"], blocks[asked - 1]["type"]) == ("user", "text"):
            asked -= 1
        sizes = [tokens_of(block) for block in blocks]
        known = {hash for end in marker_positions(first) for hash in prefix_hashes(first)[end - 1 : end]}
        hashes = prefix_hashes(second)
        found = 0
        for end in marker_positions(second):
            looked = range(end, max(end - LOOKBACK_BLOCKS, 0), -1)
            found = max([found, *(at for at in looked if hashes[at - 1] in known)])
        return min(1.0, sum(sizes[:found]) / sum(sizes[:asked]))

    def calls(self, calls: Sequence[Json] | None) -> list[Json] | None:
        """Arguments are objects here: their spelling is the provider's."""
        if calls is None:
            return None
        return [
            {**c, "function": {**c["function"], "arguments": parsed(c["function"]["arguments"])}}
            for c in calls
        ]

    def messages(self, messages: Sequence[Json]) -> list[Json]:
        return list(flat(messages))

    # -- said

    def whole(self, recorded: Recorded, body: Json) -> Json:
        choice, usage = body["choices"][0], body.get("usage") or {}
        return {
            "id": f"msg_{recorded.index}",
            "type": "message",
            "role": "assistant",
            "model": body.get("model"),
            "content": list(self._blocks(self.thought(recorded, choice["message"]))),
            "stop_reason": _STOPS.get(choice["finish_reason"], choice["finish_reason"]),
            "stop_sequence": None,
            "usage": _usage(usage),
        }

    def _blocks(self, message: Json) -> Iterator[Json]:
        yield from self.thinking(message)
        if message.get("content"):
            yield {"type": "text", "text": message["content"]}
        for call in message.get("tool_calls") or ():
            made = call["function"]
            yield {"type": "tool_use", "id": call["id"], "name": made["name"],
                   "input": parsed(made["arguments"])}

    def thought(self, recorded: Recorded, message: Json) -> Json:
        """What calls a tool was thought about first, where the request asks for thinking."""
        calls = message.get("tool_calls") and not message.get("thinking_blocks")
        return {"reasoning_content": "Hm.", **message} if calls and recorded.json.get("thinking") else message

    def thinking(self, message: Json) -> Iterator[Json]:
        """The thinking blocks of a message or a delta; what was signed may come back."""
        blocks = list(message.get("thinking_blocks") or ())
        if message.get("reasoning_content"):
            text = message["reasoning_content"]
            signature = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            blocks.append({"type": "thinking", "thinking": text, "signature": signature})
        for block in blocks:
            if block["type"] == "thinking":
                self._judge.signed[block["signature"]] = block["thinking"]
            yield block

    def refusal(self, status: int, error: Json) -> Json:
        made: Json = json.loads(self._judge.refuse(status, error["message"]).body)
        return made

    def pieces(self, recorded: Recorded) -> Pieces:
        return _Pieces(self, recorded)


class _Pieces(Pieces):
    """Opens and closes content blocks as the chunks' deltas need it."""

    def __init__(self, wire: AnthropicWire, recorded: Recorded) -> None:
        self._wire, self._recorded = wire, recorded
        self._begun = False
        self._block = -1  # the open one's index
        self._kind: object = None  # "text", "thinking", or the call's index
        self._stop: str | None = None
        self._usage: Json = {}

    def event(self, data: str) -> bytes:
        if data == "[DONE]":
            return b"".join(self._end()) + _named({"type": "message_stop"})
        chunk = json.loads(data)
        if chunk.get("error"):
            detail = {"type": "api_error", "message": chunk["error"]["message"]}
            return _named({"type": "error", "error": detail})
        out = [] if self._begun else [self._start(chunk)]
        for choice in (chunk.get("choices") or ())[:1]:
            out += self._delta(choice.get("delta") or {})
            if choice.get("finish_reason"):
                out += self._close()
                self._stop = _STOPS.get(choice["finish_reason"], choice["finish_reason"])
        self._usage = chunk.get("usage") or self._usage
        return b"".join(out)

    def _start(self, chunk: Json) -> bytes:
        self._begun = True
        usage = {"input_tokens": 0, "output_tokens": 1}
        message = {"id": f"msg_{self._recorded.index}", "type": "message", "role": "assistant", "content": [],
                   "model": chunk.get("model"), "stop_reason": None, "stop_sequence": None}
        return _named({"type": "message_start", "message": {**message, "usage": usage}})

    def _delta(self, delta: Json) -> Iterator[bytes]:
        if self._block < 0:
            delta = self._wire.thought(self._recorded, delta)
        for block in self._wire.thinking(delta):
            if block["type"] != "thinking":
                yield from self._open(block["data"], block)
                continue
            yield from self._open("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            yield self._more({"type": "thinking_delta", "thinking": block["thinking"]})
            yield self._more({"type": "signature_delta", "signature": block["signature"]})
        if delta.get("content"):
            yield from self._open("text", {"type": "text", "text": ""})
            yield self._more({"type": "text_delta", "text": delta["content"]})
        for call in delta.get("tool_calls") or ():
            made = call["function"]
            use = {"type": "tool_use", "id": call.get("id"), "name": made.get("name"), "input": {}}
            yield from self._open(call["index"], use)
            yield self._more({"type": "input_json_delta", "partial_json": made.get("arguments", "")})

    def _open(self, kind: object, block: Json) -> Iterator[bytes]:
        if self._kind == kind:
            return
        yield from self._close()
        self._block, self._kind = self._block + 1, kind
        yield _named({"type": "content_block_start", "index": self._block, "content_block": block})

    def _close(self) -> Iterator[bytes]:
        if self._kind is not None:
            self._kind = None
            yield _named({"type": "content_block_stop", "index": self._block})

    def _more(self, delta: Json) -> bytes:
        return _named({"type": "content_block_delta", "index": self._block, "delta": delta})

    def _end(self) -> Iterator[bytes]:
        """Why it stopped, with the bill."""
        if self._stop is not None:
            end = {"stop_reason": self._stop, "stop_sequence": None}
            yield _named({"type": "message_delta", "delta": end, "usage": _usage(self._usage)})


def _named(event: Json) -> bytes:
    return sse(event, event["type"])


def _usage(usage: Json) -> Json:
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return {
        "input_tokens": usage.get("prompt_tokens", 0) - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.get("completion_tokens", 1),
    }


# ---------------------------------------------------------------- a request in OpenAI's words


def _system(system: Any) -> Iterator[Json]:
    for block in [{"text": system}] if isinstance(system, str) else system or ():
        yield {"role": "system", "content": block["text"]}


def _messages(messages: Sequence[Json]) -> Iterator[Json]:
    for message in messages:
        content = message["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        yield from _assistant(blocks) if message["role"] == "assistant" else _user(blocks)


def _user(blocks: Sequence[Json]) -> Iterator[Json]:
    """Results first, each a message; then each text, with the media that stand beside it."""
    rest: list[Json] = []
    for block in blocks:
        if block["type"] == "tool_result":
            content = block.get("content") or ""
            if isinstance(content, list) and all(b["type"] == "text" for b in content):
                content = "".join(b["text"] for b in content)
            yield {"role": "tool", "tool_call_id": block["tool_use_id"], "content": content}
        else:
            rest.append(block)
    if all(block["type"] == "text" for block in rest):
        yield from ({"role": "user", "content": block["text"]} for block in rest)
    else:
        yield {"role": "user", "content": [_part(block) for block in rest]}


def _part(block: Json) -> Json:
    if block["type"] == "text":
        return {"type": "text", "text": block["text"]}
    source = block.get("source") or block
    if "file_id" in source:
        return {"type": "file", "file": {"file_id": source["file_id"]}}
    url = source.get("url") or f"data:{source['media_type']};base64,{source['data']}"
    return {"type": "image_url", "image_url": {"url": url}}


def _assistant(blocks: Sequence[Json]) -> Iterator[Json]:
    texts = [block["text"] for block in blocks if block["type"] == "text"]
    uses = [block for block in blocks if block["type"] == "tool_use"]
    thoughts = [block for block in blocks if block["type"].endswith("thinking")]
    for text in texts[:-1]:
        yield {"role": "assistant", "content": text}
    last: Json = {"role": "assistant", "content": texts[-1] if texts else None}
    if thoughts:
        last["thinking_blocks"] = thoughts
        last["reasoning_content"] = "".join(block.get("thinking", "") for block in thoughts)
    if uses:
        last["tool_calls"] = [
            {"id": u["id"], "type": "function",
             "function": {"name": u["name"], "arguments": json.dumps(u["input"])}}
            for u in uses
        ]
    yield last


def _tool(tool: Json) -> Json:
    if "input_schema" not in tool:  # one of Anthropic's own, such as its web search
        return tool
    made = {"name": tool["name"], "parameters": tool["input_schema"]}
    made |= {key: tool[key] for key in ("description", "strict") if key in tool}
    return {"type": "function", "function": made}


# ---------------------------------------------------------------- messages as the protocol keeps them


def flat(messages: Sequence[Mapping[str, Any]]) -> Iterator[Json]:
    """One item per text, medium, call and result, whoever's message it stood in; a result with what
    it is of, since ids may be changed to be unique. Empty texts, names, unknown keys are not kept."""
    called: dict[str, Json] = {}
    for message in messages:
        role, content = message["role"].replace("developer", "system"), message.get("content")
        if role == "tool":
            text = content if isinstance(content, str) else "".join(p["text"] for p in content)
            yield {"role": role, "of": called.get(message["tool_call_id"]), "text": text}
            continue
        said = content or message.get("refusal")
        for part in [{"type": "text", "text": said}] if isinstance(said, str) else said or ():
            text = part.get("text", part.get("refusal"))
            if text is None:
                yield {"role": role, "part": part["type"]}
            elif text.strip():
                yield {"role": role, "text": text}
        for call in message.get("tool_calls") or ():
            made = call["function"]
            use = {"role": role, "name": made["name"], "input": parsed(made["arguments"])}
            called[call["id"]] = use
            yield use
