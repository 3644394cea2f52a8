"""A server that speaks OpenAI's Responses API, and refuses function tools on Chat Completions.

Promises: every request is checked against the types of the official `openai` package, unknown fields
refused, and against the rules that are not in its types (results directly of known calls, reasoning
never without its follower, nothing looked up that was not stored); reasoning comes back exactly as
it was given; every answer and event is built through the package's own models.
"""

from __future__ import annotations

import hashlib
import json
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import pydantic
from openai.types.responses import (
    EasyInputMessageParam,
    ResponseFunctionToolCallParam,
    ResponseReasoningItemParam,
    ResponseStreamEvent,
)
from openai.types.responses import (
    Response as OpenAIResponse,
)
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from openai.types.responses.response_input_param import FunctionCallOutput

from tests.e2e.answers import Answer, Response, answer, call, error, message_of
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

REFUSAL = (
    "Function tools with reasoning_effort are not supported for {model} in /v1/chat/completions."
    " To use function tools, use /v1/responses or set reasoning_effort to 'none'."
)
_ITEMS: dict[str, Any] = {
    "message": EasyInputMessageParam,
    "function_call": ResponseFunctionToolCallParam,
    "function_call_output": FunctionCallOutput,
    "reasoning": ResponseReasoningItemParam,
}
_TOOL = ("type", "name", "description", "parameters", "strict")
_event_type = pydantic.TypeAdapter(ResponseStreamEvent)


class ResponsesServer(ProviderServer):
    """`calls` are the requests of both APIs in order; `reasoned` the items that it gave out.

    `plain_models` do not reason and refuse to be asked for encrypted reasoning.
    """

    plain_models: frozenset[str] = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.reasoned: dict[str, Json] = {}

    def is_chat(self, path: str) -> bool:
        return path in ("/v1/responses", "/v1/chat/completions")

    def refuse(self, status: int, message: str, kind: str | None = None) -> Response:
        return error(status, message, type=kind or "invalid_request_error")

    # -- the rules

    def broken_rules(self, request: Recorded) -> list[str]:
        body = request.json
        if request.target.endswith("/chat/completions"):
            return [REFUSAL.format(model=body["model"])] if body.get("tools") else []
        known = ResponseCreateParamsBase.__annotations__
        broken = unknown_keys("body", body, [*known, "stream"])
        for name, value in body.items():
            if name in known and name not in ("input", "tools"):
                broken += _check(name, _hint(name), value)
        for i, tool in enumerate(body.get("tools") or ()):
            broken += unknown_keys(f"tools[{i}]", tool, _TOOL)
            broken += [f"tools[{i}].{key} is required" for key in _TOOL[1:] if key not in tool]
        if (body.get("max_output_tokens") or 16) < 16:
            broken.append("max_output_tokens: Expected a value >= 16")
        if body.get("include") and body["model"] in self.plain_models:
            broken.append("Encrypted content is not supported with this model.")
        return broken + list(self._input_rules(body["input"]))

    def _input_rules(self, items: Sequence[Json]) -> Iterator[str]:
        called: set[str] = set()
        answered: set[str] = set()
        for i, item in enumerate(items):
            where, kind = f"input[{i}]", item.get("type", "message")
            if kind not in _ITEMS:
                yield f"{where}: {kind}"
                continue
            yield from unknown_keys(where, item, list(_ITEMS[kind].__annotations__))
            yield from _check(where, _ITEMS[kind], item)
            if kind == "reasoning":
                yield from self._reasoning_rules(where, item, items[i + 1 :])
            elif item.get("id"):
                yield f"Item with id '{item['id']}' not found. Items are not persisted."
            if kind == "function_call":
                called.add(item["call_id"])
            elif kind == "function_call_output":
                answered.add(item["call_id"])
                if item["call_id"] not in called:
                    yield f"No tool call found for function call output with call_id {item['call_id']}."
        if called - answered:
            yield f"No tool output found for function call {sorted(called - answered)}."

    def _reasoning_rules(self, where: str, item: Json, after: Sequence[Json]) -> Iterator[str]:
        given = self.reasoned.get(item["id"])
        if given is None or not item.get("encrypted_content"):
            yield f"Item with id '{item['id']}' not found."
        elif {k: v for k, v in given.items() if k != "status"} != item:
            yield f"{where}: the encrypted content could not be verified"
        following = next((x for x in after if x.get("type") != "reasoning"), {})
        if following.get("type") != "function_call" and following.get("role") != "assistant":
            yield f"Item '{item['id']}' of type 'reasoning' was provided without its required following item."

    # -- the answer

    def put(self, request: Recorded, said: Said) -> Answer:
        body = request.json
        if request.target.endswith("/chat/completions"):
            calls = [call(c.id, c.name, c.input) for c in said.calls]
            return answer(body, message_of(said.text or None, calls))
        output = list(self.output(request, said))
        response = response_of(request, output, said.stop)
        if body.get("stream"):
            events = list(response_events(response, output))
            for event in events:
                _event_type.validate_python(event)
            return events_stream(events, named=True)
        OpenAIResponse.model_validate(response)
        return json_response(response)

    def output(self, request: Recorded, said: Said) -> Iterator[Json]:
        """The output items of what the model says."""
        if said.thinking is not None:
            hidden = hashlib.sha256(f"{request.index}{said.thinking}".encode()).hexdigest()
            item: Json = {"type": "reasoning", "id": f"rs_{hidden[:20]}", "summary": []}
            if request.json.get("include"):
                item["encrypted_content"] = f"gAAAA{hidden}"
                self.reasoned[item["id"]] = item
            yield item
        if said.text:
            text = {"type": "output_text", "text": said.text, "annotations": [], "logprobs": []}
            head = {"type": "message", "id": f"msg_{request.index}", "role": "assistant"}
            yield {**head, "status": "completed", "content": [text]}
        for c in said.calls:
            head = {"type": "function_call", "id": f"fc_{c.id}", "call_id": c.id, "name": c.name}
            yield {**head, "arguments": json.dumps(c.input), "status": "completed"}


def _hint(name: str) -> Any:
    return typing.get_type_hints(ResponseCreateParamsBase)[name]


def _check(where: str, kind: Any, value: Any) -> list[str]:
    try:
        pydantic.TypeAdapter(kind).validate_python(value)
    except pydantic.ValidationError as e:
        return [f"{where}: {e.errors()[0]['msg']} at {e.errors()[0]['loc']}"]
    return []


def response_of(request: Recorded, output: Sequence[Json], stop: str | None) -> Json:
    """The whole response object."""
    body = request.json
    cached = 64 if request.index else 0
    used = {
        "input_tokens": tokens_of(body["input"]) + tokens_of(body.get("tools") or []),
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": tokens_of(list(output)),
        "output_tokens_details": {"reasoning_tokens": 7},
    }
    used["total_tokens"] = used["input_tokens"] + used["output_tokens"]  # type: ignore[operator]
    return {
        "id": f"resp_{request.index}",
        "object": "response",
        "created_at": 1_700_000_000,
        "status": "incomplete" if stop else "completed",
        "error": None,
        "incomplete_details": {"reason": stop} if stop else None,
        "instructions": None,
        "metadata": {},
        "model": body["model"],
        "output": list(output),
        "parallel_tool_calls": body.get("parallel_tool_calls", True),
        "temperature": 1.0,
        "tool_choice": body.get("tool_choice", "auto"),
        "tools": body.get("tools", []),
        "top_p": 1.0,
        "usage": used,
    }


def response_events(response: Json, output: Sequence[Json]) -> Iterator[Json]:
    """The same response as a stream's events."""
    made = 0

    def event(kind: str, **fields: Any) -> Json:
        nonlocal made
        made += 1
        return {"type": f"response.{kind}", **fields, "sequence_number": made - 1}

    begun = {**response, "status": "in_progress", "output": [], "usage": None}
    yield event("created", response=begun)
    yield event("in_progress", response=begun)
    for index, item in enumerate(output):
        at = {"item_id": item["id"], "output_index": index}
        empty = {"message": {"content": []}, "function_call": {"arguments": ""}}.get(item["type"], {})
        opened = {**item, **empty}
        if item["type"] != "reasoning":
            opened["status"] = "in_progress"
        yield event("output_item.added", output_index=index, item=opened)
        for piece in pieces(item.get("arguments", "")):
            yield event("function_call_arguments.delta", **at, delta=piece)
        if item["type"] == "message":
            text, at = item["content"][0], {**at, "content_index": 0}
            yield event("content_part.added", **at, part={**text, "text": ""})
            for piece in pieces(text["text"]):
                yield event("output_text.delta", **at, delta=piece, logprobs=[])
            yield event("output_text.done", **at, text=text["text"], logprobs=[])
            yield event("content_part.done", **at, part=text)
        yield event("output_item.done", output_index=index, item=item)
    yield event(response["status"], response=response)
