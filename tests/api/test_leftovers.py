"""What a request held is free when it ends: nothing waits for the garbage collector, which is rare here."""

from __future__ import annotations

import gc
import json
import random
from pathlib import Path

import pytest

from proxy.conversation.pages import PathPages
from proxy.conversation.turn import Turn
from proxy.upstream import BytesReply
from tests.api.test_chat import answered, body, client
from tests.conversation.scenario import text_of

EVENTS = [(b"content-type", b"text/event-stream")]
STREAM = (
    b'data: {"id":"c","choices":[{"index":0,"delta":{"role":"assistant","content":"ok"},'
    b'"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
)


@pytest.mark.parametrize("stream", [False, True])
async def test_no_turn_outlives_its_request(tmp_path: Path, stream: bool) -> None:
    async with client(tmp_path, tiers={"l0.tokens": 2000}) as one:
        messages = []
        gc.collect()
        gc.disable()
        try:
            for turn in range(12):
                text = text_of(random.Random(turn), 150, f"q{turn}x")
                messages.append({"role": "user", "content": f"{text}, do you remember?"})
                one.upstream.replies.append(BytesReply(200, EVENTS, STREAM) if stream else answered("ok"))
                await one.send([one_body(messages, stream)], [(b"authorization", b"Bearer k")])
                messages.append({"role": "assistant", "content": "ok"})
            assert one.reports[-1].channel == "tools"
            left = [o for o in gc.get_objects() if isinstance(o, (Turn, PathPages))]
            assert left == []
        finally:
            gc.enable()


def one_body(messages: list[dict[str, str]], stream: bool) -> bytes:
    return json.dumps(body(messages, stream=stream)).encode()
