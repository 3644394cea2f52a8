"""What Open WebUI sends, recorded from a real one (recorded/record_open_webui.py), on llm-pager.

A chat of eleven turns with its own 28 tools, streamed; between the turns come requests for a title,
tags and follow-up questions under the same chat id; and it asks for the models.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import httpx

from tests.clients.programs import Where, check_program
from tests.clients.recorded.record_open_webui import ASIDES, FILE, model
from tests.clients.tasks import CODE
from tests.e2e.talk import texts_of


def told(reply: httpx.Response) -> str:
    """The text of a whole or a streamed answer, or the models' names."""
    if not reply.headers["content-type"].startswith("text/event-stream"):
        body = reply.json()
        if "data" in body:
            return " ".join(one["id"] for one in body["data"])
        return str(body["choices"][0]["message"]["content"])
    events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    assert events.pop() == "[DONE]"
    deltas = [choice["delta"] for event in events for choice in json.loads(event)["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


def run(at: Where) -> Any:
    seen = []
    root = at.url.removesuffix("/v1")
    with httpx.Client(base_url=root, timeout=60, trust_env=False) as client:
        for one in json.loads(lzma.decompress(FILE.read_bytes())):
            headers = {**dict(one["headers"]), "accept-encoding": "identity"}
            reply = client.request(
                one["method"], one["target"], headers=headers, content=one["body"].encode()
            )
            seen.append([reply.status_code, reply.headers["content-type"], told(reply)])
    return seen


def test_open_webui(tmp_path: Path) -> None:
    played = check_program(tmp_path, run, model, l0_tokens=7000, reserve_tokens=1500)
    assert {status for status, _, _ in played.seen} == {200}
    said = [text for _, _, text in played.seen]
    assert CODE in said and all(aside["content"] in said for aside in ASIDES.values())
    asides = [c for c in played.model.calls if any(mark in texts_of(c) for mark in ASIDES)]
    assert len(asides) > 11 and not any("<VM:" in texts_of(c) for c in asides)
