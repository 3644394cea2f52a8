"""What we send upstream and what we answer, judged by OpenAI's own published schema.

Each kind of turn once: bypassed, paged, with faults, a mixed call, a preamble, JSON, two choices,
legacy functions; whole and streaming, with and without usage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.e2e.harness import ServerProcess, call, free_port, message_of
from tests.e2e.schema import CHUNK, REQUEST, RESPONSE, needs_schema, problems, stream_problems
from tests.e2e.talk import CHAT, Step, ask, body, config, fault, raw, scripted, search, tool

PORT = free_port()
READ = tool("read_file", path={"type": "string"})
DONE = message_of("All right.")
MIXED = message_of(
    "I look.", [call("c1", "read_file", {"path": "a"}), call("c2", "page_fault", {"page_id": "msg_0001"})]
)
SCHEMA_FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "a", "schema": {"type": "object", "properties": {}}},
}
TURNS: list[tuple[str, Sequence[Step], dict[str, Any]]] = [
    ("paged", [DONE], {}),
    ("faults", [search("depot 5"), fault("msg_0001"), DONE], {}),
    ("faults and tools", [fault("msg_0001"), DONE], {"tools": [READ], "parallel_tool_calls": True}),
    ("mixed", [MIXED], {"tools": [READ]}),
    ("a client's call", [message_of(None, [call("c1", "read_file", {"path": "a"})])], {"tools": [READ]}),
    ("limits", [fault("msg_0001"), DONE], {"max_completion_tokens": 300, "stop": ["END"], "seed": 7}),
    ("json", [fault("msg_0001"), message_of('{"a": 1}')], {"response_format": {"type": "json_object"}}),
    ("json schema", [fault("msg_0001"), message_of('{"a": 1}')], {"response_format": SCHEMA_FORMAT}),
    ("required", [message_of(None, [call("c1", "read_file", {})])],
     {"tools": [READ], "tool_choice": "required"}),
    ("reasoning", [{**fault("msg_0001"), "reasoning_content": "hm"}, DONE], {"reasoning_effort": "low"}),
]  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    needs_schema()
    with ServerProcess(config(PORT, prefetch={"max_pages": 2})) as process:
        yield process


@pytest.mark.parametrize("stream", [None, False, True], ids=["whole", "stream", "stream with usage"])
@pytest.mark.parametrize(("steps", "fields"), [t[1:] for t in TURNS], ids=[t[0] for t in TURNS])
async def test_every_request_and_answer_fits_the_published_schema(
    server: ServerProcess, steps: Sequence[Step], fields: dict[str, Any], stream: bool | None
) -> None:
    more: dict[str, Any] = {} if stream is None else {"stream": True}
    if stream:
        more["stream_options"] = {"include_usage": True}
    async with scripted(*steps, port=PORT) as upstream, raw(server.base_url) as client:
        response = await client.post(CHAT, json=body(ask(), **fields, **more))
        assert response.status_code == 200, response.text
        for recorded in upstream.calls:
            assert problems(REQUEST, recorded.json) == []
            assert (recorded.json.get("stream_options") or {}).get("include_usage", False) is bool(more)
        if more:
            assert stream_problems(response.text) == []
            assert ('"usage"' in response.text) is bool(stream)
        else:
            assert problems(RESPONSE, response.json()) == []


def test_the_judge_finds_what_is_wrong() -> None:
    needs_schema()
    assert problems(REQUEST, {"model": "m"})
    assert problems(RESPONSE, {"id": "x", "choices": []})
    assert problems(CHUNK, {"id": "c", "created": 1, "model": "m", "object": "chunk", "choices": []})
