"""How the tests use OpenAI's Python client: sync and async with the same words.

Importing it skips the test module when the client is not installed.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from tests.clients.scenes import MODEL, Message
from tests.clients.stage import items, usage_fields, value

openai = pytest.importorskip("openai", reason="openai is not installed: pip install '.[clients]'")
from pydantic import BaseModel  # noqa: E402

BOTH = [
    pytest.mark.parametrize("client_class", ["OpenAI", "AsyncOpenAI"]),
    pytest.mark.asyncio(loop_scope="module"),  # the clients close their connections late
]
STREAMS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


class Report(BaseModel):
    depot: int
    code: str
    notes: list[str]


def client(name: str, url: str, key: str, max_retries: int = 0) -> Any:
    made = getattr(openai, name)
    return made(base_url=url, api_key=key, max_retries=max_retries, timeout=20)


def shape(chunk: Any) -> list[Any]:
    """A chunk without its id and its text: what a strict reader of streams depends on."""
    head = [chunk.object, chunk.created, chunk.model, chunk.system_fingerprint]
    for choice in chunk.choices:
        delta = choice.delta.model_dump(exclude_unset=True)
        calls = delta.pop("tool_calls", None) or []
        kinds = [[c["index"], sorted(c), sorted(c["function"])] for c in calls]
        head.append([choice.index, delta.get("role"), sorted(delta), kinds, choice.finish_reason])
    extra = usage_fields(chunk.usage) if chunk.usage else None
    return [
        *head,
        sorted(chunk.model_fields_set - {"usage"}),
        extra,
        "usage" in chunk.model_fields_set,
    ]


def collapsed(shapes: list[Any]) -> list[Any]:
    """Equal neighbours once: where a text is cut is nobody's business."""
    return [s for i, s in enumerate(shapes) if i == 0 or shapes[i - 1] != s]


async def ask(
    made: Any, messages: list[Message], stream: bool, **fields: Any
) -> tuple[Message, Any]:
    """One request: the message to echo, and what else was seen."""
    if not stream:
        reply = await value(made.chat.completions.create(model=MODEL, messages=messages, **fields))
        choice = reply.choices[0]
        message = choice.message.model_dump(exclude_none=True)
        whole = reply.model_dump(exclude_unset=True, exclude={"id", "usage"})
        return message, [whole, usage_fields(reply.usage)]
    seen = await value(
        made.chat.completions.create(model=MODEL, messages=messages, stream=True, **fields)
    )
    message = {"role": "assistant", "content": None}
    calls: dict[int, Message] = {}
    shapes, names = [], set()
    async for chunk in items(seen):
        shapes.append(shape(chunk))
        names.add(chunk.id)
        for choice in chunk.choices:
            if choice.delta.content:
                message["content"] = (message["content"] or "") + choice.delta.content
            for part in choice.delta.tool_calls or ():
                entry = calls.setdefault(part.index, part.model_dump(exclude_none=True))
                if entry["id"] != part.id and part.id is None:
                    entry["function"]["arguments"] += part.function.arguments
    if calls:
        message["tool_calls"] = [
            {k: v for k, v in calls[i].items() if k != "index"} for i in sorted(calls)
        ]
    assert len(names) == 1, "one stream, one id"
    return message, [message, collapsed(shapes)]


def echo(message: Any) -> Message:
    """A parsed message as the API takes it: the helpers leave deltas' fields in it."""
    made = {"role": "assistant", "content": message.content}
    for c in message.tool_calls or ():
        function = {"name": c.function.name, "arguments": c.function.arguments}
        calls = made.setdefault("tool_calls", [])
        calls.append({"id": c.id, "type": "function", "function": function})
    return made


async def parsed(completions: Any, asked: dict[str, Any]) -> tuple[Any, list[str]]:
    return await value(completions.parse(**asked)), []


async def streamed(completions: Any, asked: dict[str, Any]) -> tuple[Any, list[str]]:
    """The stream helper: its completion, and the kinds of its events."""
    events = []
    async with contextlib.AsyncExitStack() as stack:
        manager = completions.stream(**asked)
        if hasattr(manager, "__aenter__"):
            entered = await stack.enter_async_context(manager)
        else:
            entered = stack.enter_context(manager)
        async for event in items(entered):
            if event.type != "content.delta" or event.delta:  # an empty one says nothing
                events.append(event.type)
        return await value(entered.get_final_completion()), collapsed(events)


def told(e: Any) -> list[Any]:
    """All that a program can read from an exception of the client."""
    out = [type(e).__name__, str(e), getattr(e, "code", None), getattr(e, "param", None)]
    if isinstance(e, openai.APIStatusError):
        out += [e.status_code, e.body, e.request_id, e.response.headers.get("retry-after-ms")]
    return out
