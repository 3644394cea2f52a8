"""What the scripted upstream can say: messages as whole answers and as streams of chunks.

Promises: each round has an identity of its own (id, created), so that a client can see whether a
proxy shows it more than one; usage counts the request that came; any key of a message has its delta.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tests.contract.model import quote
from tests.e2e.answers import JSON_HEADERS, SSE_HEADERS, Headers, Response, Stream
from tests.e2e.rules import count_request_tokens

Json = dict[str, Any]
CREATED = 1_700_000_000
DONE = b"data: [DONE]\n\n"
COMPLETION_TOKENS = 7  # of every round, unless a script says otherwise


def text(content: str | None, **more: Any) -> Json:
    """An assistant message."""
    return {"role": "assistant", "content": content, **more}


def call(id: str, name: str, arguments: str | Mapping[str, Any] = "{}", **more: Any) -> Json:
    """One entry of tool_calls."""
    written = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": id, "type": "function", "function": {"name": name, "arguments": written}, **more}


def calling(*calls: Json, content: str | None = None, **more: Any) -> Json:
    """An assistant message that calls tools."""
    return {"role": "assistant", "content": content, "tool_calls": list(calls), **more}


def tool(name: str, **more: Any) -> Json:
    """A client's function tool."""
    parameters = {"type": "object", "properties": {"word": {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def prompt_tokens(request: Json) -> int:
    """What upstream charges for a request: OpenAI's published rules, or a rough count."""
    try:
        return count_request_tokens(request)
    except Exception:  # noqa: BLE001 (odd parts: what they cost does not matter here)
        return len(json.dumps(request)) // 4


def usage_of(request: Json, completion_tokens: int = COMPLETION_TOKENS) -> Json:
    """A usage object with details."""
    prompt = prompt_tokens(request)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 3, "audio_tokens": 0},
    }


def head(request: Json, number: int, kind: str, **more: Any) -> Json:
    """The fields around the choices. `number`: which upstream call it is."""
    return {
        "id": f"chatcmpl-contract-{number}",
        "object": kind,
        "created": CREATED + number,
        "model": f"{request.get('model')}-2024",
        "system_fingerprint": "fp_contract",
        **more,
    }


def finish_of(message: Json) -> str:
    if message.get("tool_calls"):
        return "tool_calls"
    return "function_call" if message.get("function_call") else "stop"


def whole(
    request: Json,
    message: Json,
    number: int = 0,
    *,
    finish: str | None = None,
    usage: Json | None = None,
    choice: Json | None = None,
    more: Json | None = None,
    headers: Headers = (),
) -> Response:
    """A chat.completion. `choice`, `more`: further fields of the choice and of the whole."""
    payload = {
        **head(request, number, "chat.completion"),
        "choices": [
            {
                "index": 0,
                "message": {"refusal": None, **message},
                "logprobs": None,
                "finish_reason": finish or finish_of(message),
                **(choice or {}),
            }
        ],
        "usage": usage or usage_of(request),
        **(more or {}),
    }
    return Response(json.dumps(payload, ensure_ascii=False).encode(), 200, (*JSON_HEADERS, *headers))


def event(payload: Any) -> bytes:
    """One event."""
    written = json.dumps(payload, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + written.encode() + b"\n\n"


def deltas_of(message: Json, piece: int = 12) -> list[Json]:
    """The deltas that a message is streamed in: role, other keys, text, calls."""
    out: list[Json] = [{"role": "assistant", "content": ""}]
    for key, value in message.items():
        if key in ("role", "tool_calls") or value is None:
            continue
        if isinstance(value, str):
            out += [{key: value[i : i + piece]} for i in range(0, len(value), piece)]
        elif key == "function_call":
            out.append({key: {"name": value["name"], "arguments": ""}})
            out += [{key: {"arguments": p}} for p in pieces(value["arguments"], piece)]
        else:
            out.append({key: value})
    for index, one in enumerate(message.get("tool_calls") or ()):
        kind, field = ("custom", "input") if "custom" in one else ("function", "arguments")
        opening = {**one, "index": index, kind: {**one[kind], field: ""}}
        out.append({"tool_calls": [opening]})
        for part in pieces(one[kind][field], piece):
            out.append({"tool_calls": [{"index": index, kind: {field: part}}]})
    return out


def pieces(value: str, size: int) -> list[str]:
    return [value[i : i + size] for i in range(0, len(value), size)]


def asked_for_usage(request: Json) -> bool:
    return bool((request.get("stream_options") or {}).get("include_usage"))


def chunks(
    request: Json,
    message: Json,
    number: int = 0,
    *,
    finish: str | None = None,
    usage: Json | None = None,
    choice: Json | None = None,
    more: Json | None = None,
    piece: int = 12,
) -> list[bytes]:
    """A stream's events, each with its blank line, with usage when the request asked for it."""
    about = head(request, number, "chat.completion.chunk", **(more or {}))
    asked = asked_for_usage(request)
    null = {"usage": None} if asked else {}

    def one(delta: Json, reason: str | None = None) -> bytes:
        made = {"index": 0, "delta": delta, "logprobs": None, **(choice or {})}
        return event({**about, "choices": [{**made, "finish_reason": reason}], **null})

    out = [one(delta) for delta in deltas_of(message, piece)]
    out.append(one({}, finish or finish_of(message)))
    if asked:
        out.append(event({**about, "choices": [], "usage": usage or usage_of(request)}))
    return [*out, DONE]


def streamed(steps: Sequence[Any], headers: Headers = ()) -> Stream:
    """A stream of exactly these steps."""
    return Stream(steps, 200, (*SSE_HEADERS, *headers))


def answer(
    request: Json, message: Json, number: int = 0, headers: Headers = (), **more: Any
) -> Response | Stream:
    """A message as the request asks for it."""
    if request.get("stream"):
        return streamed(chunks(request, message, number, **more), headers)
    more.pop("piece", None)
    return whole(request, message, number, headers=headers, **more)


def error(
    status: int, message: str, *, code: str | None = None, param: str | None = None,
    kind: str = "invalid_request_error", headers: Headers = (),
) -> Response:
    """An error in OpenAI's shape, written in a way that a re-encoder would not keep."""
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    written = json.dumps(body, indent=2).encode() + b"\n"
    return Response(written, status, (*JSON_HEADERS, *headers))


def brief(request: Json) -> str:
    """A request in one line, for failures."""
    return quote(json.dumps(request, ensure_ascii=False), 400)
