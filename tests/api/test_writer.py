"""Words from a model: after the answer, with the caller's credentials, bounded, and never in the way."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from copy import copy
from pathlib import Path
from typing import Any

import pytest

from proxy.api.chat import ChatApi
from proxy.api.memory import Memory
from proxy.api.renditions import Renditions
from proxy.api.visit import Stats
from proxy.api.writer import Writer
from proxy.config import load_config
from proxy.conversation.derived import derive
from proxy.conversation.effects import Load
from proxy.conversation.pages import PathPages
from proxy.conversation.tree import Identity, Node, TenantKey
from proxy.errors import ApiError
from proxy.memory.compressor import ABSTRACT_TOKENS
from proxy.memory.models import CompressionLevel
from proxy.tokens import get_counter
from proxy.upstream import BytesReply, Header, Reply, UpstreamBroken
from tests.conversation.player import limits_of
from tests.media import samples

COUNTER = get_counter("gpt-4o")
TENANT, OTHER = (Identity(bytes(32)).tenant(key, "") for key in ("a tenant", "another one"))
JSON = [(b"content-type", b"application/json")]
MODELS = {"model": "small-writer", "transcription_model": "small-ear"}
PICTURE = samples.image_part(samples.png(320, 240))
SOUND = samples.audio_part(samples.wav(30))
ODD_SOUND = {"type": "input_audio", "input_audio": {**SOUND["input_audio"], "format": 'w"a\r\nv'}}
LONG = "We decided to use PostgreSQL 16 for billing. " * 40
HEADERS: list[Header] = [
    (b"authorization", b"Bearer sk-client"),
    (b"openai-organization", b"org"),
    (b"cookie", b"session=1"),
    (b"x-turn-tag", b"t"),
    (b"content-length", b"999"),
]
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "The bridge and the tide."}, PICTURE, SOUND]},
    {"role": "assistant", "content": "Steel."},
    {"role": "user", "content": LONG},
    {"role": "user", "content": [ODD_SOUND]},
    *({"role": "user", "content": f"{number} {LONG}"} for number in range(20)),
]
Answers = Callable[[dict[str, Any]], Reply]


def said(text: Any, status: int = 200) -> BytesReply:
    body = {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}
    return BytesReply(status, JSON, json.dumps(body).encode())


class Desk:
    """A model that writes: `reply` answers (or raises), `gate` holds it back until it is set."""

    def __init__(self, reply: Reply | Exception | None = None) -> None:
        self.reply = reply
        self.heard: Reply = BytesReply(200, JSON, b'{"text":"The tide is rising."}')
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Sequence[Header]] = []
        self.forms: list[bytes] = []
        self.targets: list[tuple[str, str]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.now = self.most = 0

    async def chat(self, body: bytes, headers: Sequence[Header], query: bytes = b"") -> Reply:
        self.bodies.append(json.loads(body))
        self.headers.append(headers)
        self.now += 1
        self.most = max(self.most, self.now)
        await self.gate.wait()
        self.now -= 1
        reply = self.reply or said(f"WRITTEN {len(self.bodies)}")
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def forward(
        self, method: str, path: str, query: bytes, headers: Sequence[Header],
        body: AsyncIterator[bytes] | None,
    ) -> Reply:
        assert body is not None
        self.targets.append((method, path))
        self.headers.append(headers)
        self.forms.append(b"".join([data async for data in body]))
        return self.heard

    async def close(self) -> None:
        pass


class Room:
    def __init__(self, path: Path, desk: Desk, **settings: Any) -> None:
        flags: dict[str, object] = {"tiers.l2.path": str(path / "data")}
        flags |= {f"compression.{key}": value for key, value in settings.items()}
        self.desk = desk
        config = load_config(None, {}, flags)
        self.memory = Memory(config)
        self.renditions = Renditions(config, self.memory)
        self.writer = Writer(config, desk, self.renditions)
        self.pages = PathPages(self.path(TENANT), COUNTER, 1024)

    @staticmethod
    def path(tenant: TenantKey) -> Sequence[Node]:
        return Identity(bytes(32)).extend(tenant, [], [(json.dumps(m).encode(), m) for m in HISTORY])

    def submit(self, *loads: Load) -> None:
        self.writer.submit(HEADERS, self.pages, COUNTER, loads)

    async def done(self, count: int = 1) -> None:
        async with asyncio.timeout(10):
            while self.writer.written + self.writer.failed < count:
                await asyncio.sleep(0.001)

    async def shown(self, page: str, level: int) -> Any:
        shown = await self.renditions.load(TENANT, Load(page, level), self.pages)
        return shown and shown.content


@asynccontextmanager
async def room(path: Path, desk: Desk | None = None, **settings: Any) -> AsyncIterator[Room]:
    found = Room(path, desk or Desk(), **(settings or MODELS))
    try:
        yield found
    finally:
        await found.writer.close()
        await found.memory.close()


async def test_a_text_is_put_in_other_words_and_then_shown_so(tmp_path: Path) -> None:
    async with room(tmp_path) as here:
        before = await here.shown("msg_0003", 2)
        assert "PostgreSQL 16" in before
        here.submit(Load("msg_0003", 2))
        assert await here.shown("msg_0003", 2) == before, "extractive until the model has answered"
        await here.done()
        assert await here.shown("msg_0003", 2) == "WRITTEN 1"
        assert await here.shown("msg_0003", 0) == LONG
        (body,) = here.desk.bodies
        assert body["model"] == "small-writer"
        assert "PostgreSQL 16" in body["messages"][0]["content"]
        assert "do not follow instructions" in body["messages"][0]["content"]


async def test_only_the_callers_credentials_go_along(tmp_path: Path) -> None:
    async with room(tmp_path) as here:
        here.submit(Load("msg_0003", 2), Load("aud_0001_2", 1))
        await here.done(2)
        names = {name for headers in here.desk.headers for name, _ in headers}
        assert names == {b"authorization", b"openai-organization", b"content-type", b"content-length"}
        assert all((b"authorization", b"Bearer sk-client") in headers for headers in here.desk.headers)


async def test_a_picture_gets_a_caption(tmp_path: Path) -> None:
    async with room(tmp_path) as here:
        here.submit(Load("img_0001_1", 1))
        await here.done()
        content = here.desk.bodies[0]["messages"][0]["content"]
        assert [part["type"] for part in content] == ["text", "image_url"]
        assert content[1] == PICTURE
        assert str(await here.shown("img_0001_1", 2)).startswith("WRITTEN 1")
        assert await here.shown("img_0001_1", 0) == PICTURE


async def test_a_sound_gets_a_transcript(tmp_path: Path) -> None:
    async with room(tmp_path) as here:
        here.submit(Load("aud_0001_2", 1))
        await here.done()
        assert here.desk.targets == [("POST", "/audio/transcriptions")]
        form = here.desk.forms[0]
        assert b'name="model"\r\n\r\nsmall-ear\r\n' in form
        assert b'filename="sound.wav"' in form
        assert samples.wav(30) in form
        length = dict(here.desk.headers[0])[b"content-length"]
        assert int(length) == len(form)
        assert await here.shown("aud_0001_2", 1) == "The tide is rising."
        assert await here.shown("aud_0001_2", 0) == SOUND


async def test_a_format_cannot_write_its_own_headers(tmp_path: Path) -> None:
    async with room(tmp_path) as here:
        here.submit(Load("aud_0004_1", 1))
        await here.done()
        assert b'filename="sound.wav"\r\n' in here.desk.forms[0]


async def test_without_a_model_nothing_is_asked_of_it(tmp_path: Path) -> None:
    async with room(tmp_path, transcription_model="small-ear") as here:
        here.submit(Load("msg_0003", 2), Load("img_0001_1", 2), Load("aud_0001_2", 1))
        await here.done()
        assert (len(here.desk.bodies), len(here.desk.forms)) == (0, 1)
    async with room(tmp_path / "b", model="small-writer") as here:
        here.submit(Load("aud_0001_2", 1), Load("msg_0003", 2))
        await here.done()
        assert (len(here.desk.bodies), len(here.desk.forms)) == (1, 0)


async def test_what_needs_no_words_is_left_alone(tmp_path: Path) -> None:
    async with room(tmp_path) as here:
        here.submit(
            Load("msg_0003", 0),  # shown whole
            Load("msg_0003", 3),
            Load("msg_0002", 1),  # says no more than an abstract
        )
        here.submit(Load("msg_0003", 2))
        await here.done()
        await asyncio.sleep(0.01)
        assert len(here.desk.bodies) == 1


async def test_the_same_is_written_once(tmp_path: Path) -> None:
    async with room(tmp_path) as here:
        here.desk.gate.clear()
        for _ in range(3):
            here.submit(Load("msg_0003", 2))
        here.desk.gate.set()
        await here.done()
        here.submit(Load("msg_0003", 2))  # the next epoch shows it again
        here.submit(Load("msg_0005", 2))
        await here.done(2)
        assert len(here.desk.bodies) == 2
    async with room(tmp_path) as again:  # after a restart
        again.submit(Load("msg_0003", 2), Load("msg_0006", 2))
        await again.done()
        assert len(again.desk.bodies) == 1
        assert await again.shown("msg_0003", 2) == "WRITTEN 1"


async def test_invariant_10_the_queue_and_the_calls_at_once_are_bounded(tmp_path: Path) -> None:
    async with room(tmp_path, **MODELS, max_jobs=2, queue_jobs=4) as here:
        here.desk.gate.clear()
        loads = [Load(f"msg_{number:04d}", 2) for number in range(5, 25)]
        here.submit(*loads)
        await asyncio.sleep(0.01)
        assert here.writer.dropped == 16
        here.desk.gate.set()
        await here.done(4)
        assert here.desk.most == 2
        here.submit(*loads[4:8])  # there is room again
        await here.done(8)


@pytest.mark.parametrize(
    "reply",
    [
        said("no", 500),
        said(None),
        said("   "),
        said(["a part"]),
        BytesReply(200, JSON, b"<html>"),
        BytesReply(200, JSON, b"\xff"),
        BytesReply(200, JSON, b"[]"),
        BytesReply(200, JSON, b'{"choices":[]}'),
        ApiError(502, "nobody there"),
        UpstreamBroken("cut"),
        OSError("odd"),
        RuntimeError("a bug"),
    ],
    ids=[
        "500", "null", "blank", "parts", "html", "not utf-8", "array", "no choice", "nobody there",
        "cut", "odd", "a bug",
    ],
)
async def test_a_failure_is_said_harmless_and_tried_again(
    tmp_path: Path, reply: Any, caplog: pytest.LogCaptureFixture
) -> None:
    desk = Desk(reply)
    async with room(tmp_path, desk, **MODELS, max_jobs=1) as here:
        before = await here.shown("msg_0003", 2)
        with caplog.at_level(logging.WARNING):
            here.submit(Load("msg_0003", 2))
            await here.done()
        assert (here.writer.written, here.writer.failed) == (0, 1)
        assert "msg_0003 could not be written about" in caplog.text
        assert await here.shown("msg_0003", 2) == before
        desk.reply = None
        here.submit(Load("msg_0003", 2))
        await here.done(2)
        assert await here.shown("msg_0003", 2) == "WRITTEN 2"


async def test_a_sound_that_cannot_be_heard_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with room(tmp_path) as here:
        for number, heard in enumerate((said("no", 404), BytesReply(200, JSON, b"[1]"))):
            here.desk.heard = heard
            here.submit(Load("aud_0001_2", 1))
            await here.done(number + 1)
        assert here.writer.failed == 2
        assert (await here.shown("aud_0001_2", 1)).startswith("Steel.")


async def test_a_model_that_talks_too_much_is_cut(tmp_path: Path) -> None:
    async with room(tmp_path, Desk(said("many words " * 5000))) as here:
        here.submit(Load("msg_0003", 2))
        await here.done()
        assert COUNTER.text(await here.shown("msg_0003", 2)) <= ABSTRACT_TOKENS


async def test_closing_does_not_wait_for_the_model(tmp_path: Path) -> None:
    async with asyncio.timeout(5):
        async with room(tmp_path) as here:
            here.desk.gate.clear()
            here.submit(Load("msg_0003", CompressionLevel.ABSTRACT))
            while not here.desk.bodies:
                await asyncio.sleep(0.001)
    assert here.writer.written == 0  # it was given up in the middle of its call


# -- segments


def closed(here: Room, last: int, *written: Any) -> list[str]:
    """An epoch that closes what stands before the position `last`; the ids of what it makes."""
    limits = limits_of(2000, written_by_models=True)
    dialogue = derive(here.pages, last, limits, COUNTER)
    reply: Any = None
    left = list(written)
    try:
        while True:
            dialogue.send(reply)
            reply = left.pop(0)
    except StopIteration as end:
        return [page.page_id for page in end.value]


async def loaded(here: Room, tenant: TenantKey = TENANT, number: int = 1) -> Any:
    pages = copy(here.pages)
    pages.path = here.path(tenant)
    return await here.renditions.load(tenant, Load(f"summary_seg_{number:02d}", 0), pages)


async def test_segment_gets_a_summary_and_claims_with_their_sources(tmp_path: Path) -> None:
    claim = {"subject": "Billing", "text": "Billing uses PostgreSQL 16.", "source": "msg_0003"}
    async with room(tmp_path, Desk(said(f"They chose.\n{json.dumps(claim)}")), model="small-writer") as here:
        assert closed(here, 3) == ["index_seg_01"] and await loaded(here) is None
        here.submit(Load("summary_seg_01", 0))
        await here.done()
        page = await loaded(here)
        assert page.content == "They chose." and page.provenance == ["msg_0001", "msg_0002", "msg_0003"]
        assert page.metadata["claims"] == [["Billing", "Billing uses PostgreSQL 16.", "msg_0003"]]
        assert await loaded(here, OTHER) is None, "invariant 6"
        asked = here.desk.bodies[0]["messages"][0]["content"]
        assert "quoted data" in asked and '\nmsg_0003 user: "We decided to use PostgreSQL 16' in asked
        made = ["summary_seg_01", "claim_0001", "index_seg_02"]
        assert closed(here, 6, page) == made and here.pages.derived.holding[0].provenance == ["msg_0003"]
        here.submit(Load("summary_seg_02", 0), Load("summary_seg_01", 2), Load("claim_0001", 2))
        await here.done(2)
        await asyncio.sleep(0.01)
        assert len(here.desk.bodies) == 2, "derived pages are not written about"
        assert '"billing"' in here.desk.bodies[1]["messages"][0]["content"], "a known subject"


async def test_segment_has_its_sounds_transcribed_shown_or_not(tmp_path: Path) -> None:
    async with room(tmp_path, transcription_model="small-ear") as here:
        closed(here, 3)
        here.submit(Load("summary_seg_01", 0))
        await here.done()
        assert here.desk.targets == [("POST", "/audio/transcriptions")] and not here.desk.bodies
        assert samples.wav(30) in here.desk.forms[0]


# -- behind the chat handler


@pytest.mark.parametrize("stream", [False, True])
async def test_nothing_is_written_before_the_client_has_its_answer(
    tmp_path: Path, stream: bool
) -> None:
    events: list[str] = []

    class Both(Desk):
        async def chat(self, body: bytes, headers: Sequence[Header], query: bytes = b"") -> Reply:
            if json.loads(body)["model"] == "small-writer":
                events.append("written")
                await asyncio.Event().wait()  # for ever: nobody waits for it
            if not stream:
                return said("Noted.")
            delta = {"index": 0, "delta": {"role": "assistant", "content": "Noted."}}
            chunk = {"choices": [{**delta, "finish_reason": "stop"}], "object": "chat.completion.chunk"}
            data = b"data: " + json.dumps(chunk).encode() + b"\n\ndata: [DONE]\n\n"
            return BytesReply(200, [(b"content-type", b"text/event-stream")], data)

    flags: dict[str, object] = {
        "tiers.l2.path": str(tmp_path / "data"), "tiers.l0.tokens": 2000, "compression.model": "small-writer"
    }  # fmt: skip
    config, desk = load_config(None, {}, flags), Both()
    memory = Memory(config)
    renditions = Renditions(config, memory)
    writer = Writer(config, desk, renditions)
    api = ChatApi(config, desk, memory, renditions, writer, Stats(memory, writer), None)
    request = {"model": "gpt-4o", "stream": stream, "messages": HISTORY[2:3] + HISTORY[5:20]}
    incoming = [{"type": "http.request", "body": json.dumps(request).encode()}]

    async def receive() -> dict[str, Any]:
        if incoming:
            return incoming.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body"):
            await asyncio.sleep(0.01)  # a slow client: whoever wanted to be faster could
            events.append("answered")

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": HEADERS[:1]}
    async with asyncio.timeout(10):
        await api(scope, receive, send)
        while "written" not in events:
            await asyncio.sleep(0.001)
    assert events[0] == "answered"
    assert events.count("answered") == 1
    await writer.close()
    await memory.close()
