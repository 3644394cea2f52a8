"""A server that speaks OpenAI's Responses API, and refuses function tools on Chat Completions.

Promises: every request is checked against the types of the official `openai` package, unknown fields
refused, and against the rules that are not in its types (results directly of known calls, reasoning
never without its follower, nothing looked up that was not stored); reasoning comes back exactly as
it was given; every answer and event fits the package's own models.
"""

from __future__ import annotations

import hashlib
import json
import typing
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import pydantic
from openai.types.responses import (
    CustomToolParam,
    EasyInputMessageParam,
    FunctionToolParam,
    ResponseCustomToolCallOutputParam,
    ResponseCustomToolCallParam,
    ResponseFunctionToolCallParam,
    ResponseReasoningItemParam,
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
from tests.e2e.providers.responses_events import (
    ResponseEvents,
    empty_of,
    fits_event,
    fits_response,
    text_of,
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
    "custom_tool_call": ResponseCustomToolCallParam,
    "custom_tool_call_output": ResponseCustomToolCallOutputParam,
    "reasoning": ResponseReasoningItemParam,
}
_CALLS = ("function_call", "custom_tool_call")
_TOOLS: dict[str, Any] = {"function": FunctionToolParam, "custom": CustomToolParam}
_OUTPUT_PARTS = {"output_text": "text", "refusal": "refusal"}  # what may come back, with its text's key
_LEAST_OUTPUT_TOKENS = 16


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
        if not isinstance(body, dict):
            return ["We could not parse the JSON body of your request."]
        if request.target.endswith("/chat/completions"):
            return [REFUSAL.format(model=body["model"])] if body.get("tools") else []
        known = ResponseCreateParamsBase.__annotations__
        broken = unknown_keys("body", body, [*known, "stream"])
        for name, value in body.items():
            if name in known and name not in ("input", "tools"):
                broken += _check(name, _hint(name), value)
        for i, tool in enumerate(body.get("tools") or ()):
            kind = _TOOLS.get(tool["type"])
            if kind is None:
                broken.append(f"tools[{i}]: {tool['type']} is not played here")
                continue
            broken += unknown_keys(f"tools[{i}]", tool, list(kind.__annotations__))
            broken += _check(f"tools[{i}]", kind, tool)
        if (body.get("max_output_tokens") or _LEAST_OUTPUT_TOKENS) < _LEAST_OUTPUT_TOKENS:
            broken.append(f"max_output_tokens: Expected a value >= {_LEAST_OUTPUT_TOKENS}")
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
            if item.get("role") == "assistant" and not isinstance(item["content"], str):
                yield from _output_rules(where, item["content"])
            else:
                yield from _check(where, _ITEMS[kind], item)
            if kind == "reasoning":
                yield from self._reasoning_rules(where, item, items[i + 1 :])
            elif item.get("id"):
                yield f"Item with id '{item['id']}' not found. Items are not persisted."
            if kind in _CALLS:
                called.add(item["call_id"])
            elif kind.endswith("_output"):
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
        if following.get("type") not in _CALLS and following.get("role") != "assistant":
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
                fits_event(event)
            return events_stream(events, named=True)
        fits_response(response)
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


def _output_rules(where: str, parts: Sequence[Json]) -> Iterator[str]:
    """An earlier answer's parts. The package's type for them wants ids and annotations; the API takes
    them without, as its own command line client sends them."""
    for i, part in enumerate(parts):
        key = _OUTPUT_PARTS.get(part["type"])
        if key is None or not isinstance(part.get(key), str):
            yield f"{where}.content[{i}]: Invalid value: {part['type']!r}"
        else:
            yield from unknown_keys(f"{where}.content[{i}]", part, ("type", key, "annotations"))


@cache
def _hint(name: str) -> Any:
    return typing.get_type_hints(ResponseCreateParamsBase)[name]


@cache
def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(kind)


def _check(where: str, kind: Any, value: Any) -> list[str]:
    try:
        _adapter(kind).validate_python(value)
    except pydantic.ValidationError as e:
        return [f"{where}: {e.errors()[0]['msg']} at {e.errors()[0]['loc']}"]
    return []


def response_of(
    request: Recorded, output: Sequence[Json], stop: str | None, used: Json | None = None
) -> Json:
    """The whole response object. `used`: its usage, if it is not to be counted here."""
    body = request.json
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
        "usage": used or _usage(request, output),
    }


def _usage(request: Recorded, output: Sequence[Json]) -> Json:
    body = request.json
    sent = tokens_of(body["input"]) + tokens_of(body.get("tools") or [])
    said = tokens_of(list(output))
    cached = 64 if request.index else 0
    return {
        "input_tokens": sent,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": said,
        "output_tokens_details": {"reasoning_tokens": 7},
        "total_tokens": sent + said,
    }


def response_events(response: Json, output: Sequence[Json]) -> Iterator[Json]:
    """The same response as a stream's events."""
    events = ResponseEvents()
    yield from events.begin(response)
    for item in output:
        yield from events.open(empty_of(item))
        for piece in pieces(text_of(item)):
            yield events.more(piece)
        yield from events.close()
    yield events.end(response)
