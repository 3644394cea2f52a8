"""What the tests of failures, limits and channels share: a small window, long histories, a script.

Promises: every conversation has an API key of its own, so tests on one server do not meet; a
scripted upstream answers the i-th call with the i-th step and fails the test at its end when a
request broke the API's rules, when a step was left over or when one too many was asked for.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import httpx
from openai import AsyncOpenAI

from tests.e2e.harness import (
    Answer,
    Recorded,
    RecordingUpstream,
    answer,
    call,
    count_request_tokens,
    message_of,
)
from tests.e2e.schema import check_requests

L0_TOKENS = 2000
BUDGET_TOKENS = 1500  # less the reserve: a quarter of so small a window
VM_NAMES = ("page_fault", "search_pages")
MODEL = "gpt-4o"

Step = dict[str, Any] | Answer | Callable[[dict[str, Any]], "Answer"]

_keys = itertools.count(1)
_RELEVANT = "amber birch cedar delta ember fjord grove heath inlet jetty knoll ledge".split()


def config(upstream: RecordingUpstream | int, /, **sections: Any) -> dict[str, Any]:
    """A server with a small window in front of `upstream` (or of a port); `sections` are merged in."""
    port = upstream if isinstance(upstream, int) else upstream.port
    whole: dict[str, Any] = {
        "upstream": {"base_url": f"http://127.0.0.1:{port}/v1"},
        "tiers": {"l0": {"tokens": L0_TOKENS, "reserve_tokens": 500}},
        "pages": {"max_tokens": 256},
        "manifest": {"max_tokens": 200},
        "prefetch": {"max_pages": 0},
    }
    for name, section in sections.items():
        whole[name] = {**whole.get(name, {}), **section}
    return whole


def fact(number: int) -> str:
    """What only message pair `number` says."""
    return f"{_RELEVANT[number % 12]}{number * 7919 % 100_000:05d}"


def history(pairs: int = 20) -> list[dict[str, Any]]:
    """`pairs` exchanges of about 90 tokens each; 20 are well above the window. Ends with an answer."""
    out: list[dict[str, Any]] = []
    for i in range(pairs):
        filler = " ".join(f"{_RELEVANT[(i + j) % 12]}s{j}" for j in range(12))
        out.append({"role": "user", "content": f"Note {i}: the code of depot {i} is {fact(i)}. {filler}"})
        out.append({"role": "assistant", "content": f"Noted for depot {i}. {filler}"})
    return out


def ask(text: str = "Which code has depot 0?", pairs: int = 20) -> list[dict[str, Any]]:
    """A history beyond the window and a new question."""
    return [*history(pairs), {"role": "user", "content": text}]


def fault(page: str, call_id: str = "call_f", **arguments: Any) -> dict[str, Any]:
    """An assistant message that faults one page in."""
    return message_of(None, [call(call_id, "page_fault", {"page_id": page, **arguments})])


def search(query: str, call_id: str = "call_s") -> dict[str, Any]:
    """An assistant message that searches."""
    return message_of(None, [call(call_id, "search_pages", {"query": query})])


def tool(name: str, **properties: Any) -> dict[str, Any]:
    """A client's function tool."""
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@contextlib.asynccontextmanager
async def scripted(*steps: Step, port: int = 0) -> AsyncIterator[RecordingUpstream]:
    """An upstream that plays `steps`. A step is a message, an answer, or a function of the request."""

    def respond(request: dict[str, Any], index: int) -> Answer:
        if index >= len(steps):
            raise AssertionError(f"call {index} was not in the script of {len(steps)} steps")
        step = steps[index]
        if isinstance(step, dict):
            return answer(request, step)
        return step(request) if callable(step) else step

    upstream = RecordingUpstream(respond)
    upstream.port = port
    async with upstream:
        yield upstream
    assert not upstream.failures, upstream.failures
    assert not upstream.violations, upstream.violations
    check_requests(upstream.calls)
    assert len(upstream.calls) == len(steps), f"{len(upstream.calls)} of {len(steps)} steps"


def new_key() -> str:
    """An API key that no other conversation has."""
    return f"sk-test-{next(_keys)}"


@contextlib.asynccontextmanager
async def talker(base_url: str, key: str | None = None) -> AsyncIterator[Any]:
    """The official client, without retries of its own. Any: tests hand it plain dictionaries."""
    async with AsyncOpenAI(
        base_url=base_url, api_key=key or new_key(), max_retries=0, timeout=20
    ) as client:
        yield client


@contextlib.asynccontextmanager
async def raw(base_url: str, key: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """Plain HTTP to the server's root."""
    headers = {"authorization": f"Bearer {key or new_key()}"}
    root = base_url.removesuffix("/v1")
    async with httpx.AsyncClient(base_url=root, headers=headers, timeout=20) as client:
        yield client


CHAT = "/v1/chat/completions"


def body(messages: Sequence[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """A chat request."""
    return {"model": MODEL, "messages": list(messages), **fields}


def names_of(request: Recorded) -> list[str]:
    """The names in the request's tools array."""
    return [(t.get("function") or t["custom"])["name"] for t in request.json.get("tools") or ()]


def texts_of(request: Recorded) -> str:
    """All of the request's messages, as JSON."""
    return json.dumps(request.json["messages"], ensure_ascii=False)


def results_of(request: Recorded, count: int = 1) -> list[dict[str, Any]]:
    """The last `count` tool messages' contents: what the VM answered."""
    found = [m for m in request.json["messages"] if m["role"] == "tool"][-count:]
    return [json.loads(m["content"]) for m in found]


def assert_paged(request: Recorded, tools: bool = True) -> None:
    """The request went through the window: within budget, rules present, VM tools or not."""
    assert count_request_tokens(request.json) <= BUDGET_TOKENS
    assert "<VM:RULES>" in texts_of(request)
    assert all((name in names_of(request)) == tools for name in VM_NAMES), names_of(request)


def assert_no_vm(text: str) -> None:
    """Nothing of the machinery is in what the client got."""
    for word in (*VM_NAMES, "<VM:", "total_available", "promoted_to_working_set"):
        assert word not in text, f"{word} reached the client"


def assert_error(response: httpx.Response, status: int, code: str | None) -> dict[str, Any]:
    """OpenAI's error shape with this status and code."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/json")
    whole = response.json()
    assert set(whole) == {"error"}
    assert set(whole["error"]) == {"message", "type", "param", "code"}
    assert whole["error"]["message"]
    assert whole["error"]["code"] == code
    found: dict[str, Any] = whole["error"]
    return found


async def read_stream(client: httpx.AsyncClient, request: dict[str, Any]) -> tuple[str, bool]:
    """What came of a streamed answer, and whether it ended as HTTP wants it to."""
    got = b""
    try:
        async with client.stream("POST", CHAT, json=request) as response:
            assert response.status_code == 200
            async for data in response.aiter_raw():
                got += data
    except (httpx.RemoteProtocolError, httpx.ReadError):
        return got.decode(), False
    return got.decode(), True
