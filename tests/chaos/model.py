"""The upstream of the chaos scripts: what it says depends on who asks and on the step, and on nothing else.

Promises: two servers that are told the same steps get the same answers and the same bills, so that their
upstream requests can be compared byte for byte; a bill is `factor` times a count that is not ours; a
request is remembered only by the conversation that made it.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.e2e.answers import CREATED, SSE_HEADERS, Answer, Response, Stream, call, message_of
from tests.e2e.recording import Recorded, RecordingUpstream, _Connection
from tests.e2e.script import filler

TAG = "x-turn-tag"
SMALL, WIDE = "house-model", "wide-model"
TOKEN_BYTES = 4.4  # of a request's bytes, by which this upstream bills
PIECE_CHARS = 40
AT_ONCE = 8  # page faults of one message, as many as are answered
NO_PAGE = "There is no page"
Message = dict[str, Any]


@dataclass
class Attempt:
    """One sending of a step: the upstream requests that it made, and whether the last was answered whole."""

    bodies: list[bytes] = field(default_factory=list)
    answered: bool = False


def said(name: str, step: int) -> str:
    """What the model says to the user in this step of this conversation."""
    mark = f"{name}a{step}q"
    words = random.Random(f"{mark}/words").randint(15, 60)
    return f"Noted {mark}. {filler(mark, words)}"


def reply(name: str, step: int, rounds: int, request: Message) -> Message:
    """The model's message after `rounds` rounds of this turn: it pages now and then, it calls the client's
    tool now and then, sometimes both at once; else it answers. The model with the wide window reads all pages."""
    moods = random.Random(f"{name}/{step}/moods")
    pages, looks_up, page = moods.random() < 0.25, moods.random() < 0.2, moods.randint(1, 2 * step + 1)
    offered = {t["function"]["name"] for t in request.get("tools") or ()}
    reads_all = request.get("model") == WIDE
    free = not reads_all and request.get("tool_choice") != "none" and request["messages"][-1]["role"] == "user"
    calls = []
    last = str(request["messages"][-1]["content"])
    if reads_all and "page_fault" in offered and NO_PAGE not in last:  # everything, at the end
        ids = [f"msg_{n:04d}" for n in range(AT_ONCE * rounds + 1, AT_ONCE * (rounds + 1) + 1)]
        calls = [call(f"call_{i}", "page_fault", {"page_id": i}) for i in ids]
    if pages and free and rounds == 0 and "page_fault" in offered:
        calls.append(call(f"call_{name}_{step}_f", "page_fault", {"page_id": f"msg_{page:04d}"}))
    if looks_up and free and "lookup" in offered:
        calls.append(call(f"call_{name}_{step}_l", "lookup", {"word": f"{name}w{step}"}))
    return message_of(None, calls) if calls else message_of(said(name, step))


def answer(request: Message, message: Message, prompt_tokens: int, seen: Callable[[int, int], None]) -> Answer:
    """The message as the request asked for it; `seen(n, of)` is told of each part of a stream that went out."""
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 50, "total_tokens": prompt_tokens + 50}
    finish = "tool_calls" if message.get("tool_calls") else "stop"
    head = {"id": "chatcmpl-chaos", "created": CREATED, "model": request.get("model")}
    if not request.get("stream"):
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        body = {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
        return Response(json.dumps(body).encode())
    text = message.get("content") or ""
    pieces = [text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS)]
    deltas: list[Message] = [{"role": "assistant", "content": ""}, *({"content": p} for p in pieces)]
    deltas += [{"tool_calls": [{"index": i, **c}]} for i, c in enumerate(message.get("tool_calls") or ())]
    choices = [[{"index": 0, "delta": d, "finish_reason": None}] for d in deltas]
    choices.append([{"index": 0, "delta": {}, "finish_reason": finish}])
    events = [{**head, "object": "chat.completion.chunk", "choices": c} for c in choices]
    if (request.get("stream_options") or {}).get("include_usage"):
        events.append({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
    steps: list[Any] = []
    for i, event in enumerate(events):
        steps += [b"data: " + json.dumps(event).encode() + b"\n\n", lambda i=i: seen(i, len(events))]
    return Stream([*steps, b"data: [DONE]\n\n"], 200, SSE_HEADERS)


class Model(RecordingUpstream):
    """`attempts[tag]` is where a request with that tag is written down; the tag is `name/step/attempt`.

    `factors[name]` is what the conversation is billed by; `on(moment)` is told of "asked", "answering" (a
    stream is half out) and "answered" (all of it is out).
    """

    def __init__(self, on: Callable[[str, str], None] = lambda moment, name: None) -> None:
        super().__init__(bursts=True)
        self.attempts: dict[str, Attempt] = {}
        self.factors: dict[str, float] = {}
        self.on = on

    @contextlib.contextmanager
    def listening(self, tag: str) -> Iterator[Attempt]:
        self.attempts[tag] = attempt = Attempt()
        try:
            yield attempt
        finally:
            del self.attempts[tag]

    async def handle(self, connection: _Connection, request: Recorded) -> None:
        tag = request.header(TAG)
        attempt = self.attempts.get(tag or "")
        if tag is None or not request.target.endswith("/chat/completions"):
            await connection.send(request, self.other(request))
            return
        if attempt is None:
            attempt = Attempt()  # of a client that has left
        body = json.loads(request.body)
        name, step, _ = tag.split("/")
        attempt.bodies.append(request.body)
        attempt.answered = False
        self.on("asked", name)

        def seen(part: int, of: int) -> None:
            if part == of // 2:
                self.on("answering", name)

        tokens = round(len(request.body) / TOKEN_BYTES * self.factors.get(name, 1.0))
        message = reply(name, int(step), len(attempt.bodies) - 1, body)
        await connection.send(request, answer(body, message, tokens, seen))
        attempt.answered = request.finished.is_set()
        self.on("answered", name)
