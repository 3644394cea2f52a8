"""OpenAI's published schema of chat completions, as a judge of what we send and answer.

Promises: the schema is read from the shared data, not vendored; `needs_schema()` skips with the reason
where it is absent. OpenAPI's `nullable` is understood. What the schema does not know (fields of
other providers) it does not forbid.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import pytest

from tests.e2e.rules import SCHEMA

REQUEST = "CreateChatCompletionRequest"
RESPONSE = "CreateChatCompletionResponse"
CHUNK = "CreateChatCompletionStreamResponse"
_SHOWN = 5  # problems of one value
# Required by the schema's text, but not sent by the API itself in these places: choices of a
# response without logprobs, and a message without a refusal.
_NOT_ALWAYS_SENT = {"logprobs", "refusal"}


def needs_schema() -> None:
    """Skip the test that calls it where there is no schema, or nothing to read it with."""
    pytest.importorskip("jsonschema")
    if not SCHEMA.exists():
        pytest.skip(f"no schema of the API at {SCHEMA}")


def problems(name: str, value: Any) -> list[str]:
    """What the schema `name` says against a value, a few sentences; empty: it is valid."""
    found = sorted(_validator(name).iter_errors(value), key=lambda e: str(e.json_path))
    return [f"{error.json_path}: {error.message[:200]}" for error in found[:_SHOWN]]


def stream_problems(text: str) -> list[str]:
    """What is wrong with the chunks of a stream, beside the events that carry none."""
    out: list[str] = []
    for line in text.splitlines():
        if line.startswith("data: ") and line != "data: [DONE]":
            out += problems(CHUNK, json.loads(line[6:]))
    return out[:_SHOWN]


@lru_cache(maxsize=8)
def _validator(name: str) -> Any:
    from jsonschema import Draft202012Validator  # late: only tests that use it need it

    whole = _with_null(json.loads(SCHEMA.read_text()))
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", **whole})


def _with_null(schema: Any) -> Any:
    """The schema with `nullable` in the words of JSON Schema."""
    if isinstance(schema, list):
        return [_with_null(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: _with_null(value) for key, value in schema.items() if key != "nullable"}
    if isinstance(out.get("required"), list):
        out["required"] = [name for name in out["required"] if name not in _NOT_ALWAYS_SENT]
    return {"anyOf": [out, {"type": "null"}]} if schema.get("nullable") is True else out
