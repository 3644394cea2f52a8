"""Beside the turns: checkpoints of closed segments, and what is asked of the writer."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from proxy.api.archive import Archive
from proxy.api.chat import ChatApi
from proxy.api.memory import Memory
from proxy.api.stats import Stats
from proxy.config import load_config
from proxy.conversation.report import TurnReport
from tests.api.test_writer import Desk, said
from tests.media import samples

SOUND = samples.audio_part(samples.wav(5))


def history(turns: int) -> list[dict[str, Any]]:
    """Turns of about 130 tokens; the first has a sound."""
    messages: list[dict[str, Any]] = []
    for number in range(turns):
        text = f"We decided to use lock K{number * 77} for depot {number}. " + "and so on " * 30
        content = [{"type": "text", "text": text}, *([SOUND] if number == 0 else [])]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": f"Noted {number}."})
    return messages


class Room:
    def __init__(self, path: Path, **settings: object) -> None:
        flags = {"tiers.l2.path": str(path / "data"), "tiers.l0.tokens": 2000, **settings}
        config = load_config(None, {}, flags)
        self.desk = Desk(said("Noted."))
        self.memory = Memory(config)
        self.archive = Archive(config, self.memory, self.desk)
        self.reports: list[TurnReport] = []
        self.api = ChatApi(
            config, self.desk, self.memory, self.archive, Stats(self.memory, self.archive.writer),
            self.reports.append,
        )  # fmt: skip

    async def ask(self, turns: int) -> dict[str, Any]:
        messages = [*history(turns), {"role": "user", "content": f"Question {turns}?"}]
        body = json.dumps({"model": "gpt-4o", "messages": messages}).encode()
        incoming, out = [{"type": "http.request", "body": body}], b""

        async def receive() -> dict[str, Any]:
            if incoming:
                return incoming.pop()
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Any) -> None:
            nonlocal out
            out += message.get("body", b"")

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
        await self.api(scope, receive, send)
        answer: dict[str, Any] = json.loads(out)
        return answer


@asynccontextmanager
async def room(path: Path, **settings: object) -> AsyncIterator[Room]:
    found = Room(path, **settings)
    try:
        yield found
    finally:
        await found.archive.close()
        await found.memory.close()


async def test_a_closed_segment_has_a_checkpoint_with_its_pages(tmp_path: Path) -> None:
    async with room(tmp_path) as here:
        assert (await here.ask(20))["choices"][0]["message"]["content"] == "Noted."
        assert here.reports[-1].new_epoch
        await here.archive.close()  # waits for what is being saved
        (checkpoint,) = await here.archive.bridge.backend.keys("checkpoint_")
        pages = await here.archive.bridge.load_checkpoint(checkpoint)
        ids = [page.page_id for page in pages]
        assert ids[0] == "summary_seg_01"
        assert pages[0].provenance[0] == "msg_0001"
        assert any(i.startswith("claim_") for i in ids)
    async with room(tmp_path) as again:
        (found,) = await again.archive.bridge.backend.keys("checkpoint_")
        assert found == checkpoint


async def test_a_short_conversation_leaves_nothing_behind(tmp_path: Path) -> None:
    async with room(tmp_path) as here:
        await here.ask(2)
        await here.archive.close()
        assert await here.archive.bridge.backend.keys("checkpoint_") == []
        assert await here.archive.checkpoint_of(b"unknown") is None


async def test_a_checkpoint_that_cannot_be_saved_fails_no_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "l3").write_bytes(b"a file where a directory should be")
    async with room(tmp_path, **{"tiers.l3.url": str(tmp_path / "l3")}) as here:
        with caplog.at_level(logging.WARNING):
            assert "choices" in await here.ask(20)
            await here.archive.close()
    assert "a checkpoint could not be saved" in caplog.text


async def test_sounds_of_a_closed_segment_are_transcribed_shown_or_not(tmp_path: Path) -> None:
    settings = {"compression.transcription_model": "small-ear"}
    async with room(tmp_path, **settings) as here, asyncio.timeout(10):
        await here.ask(20)
        while not here.archive.writer.written:
            await asyncio.sleep(0.001)
        assert here.desk.targets == [("POST", "/audio/transcriptions")]
        assert samples.wav(5) in here.desk.forms[0]


async def test_without_models_nobody_is_asked(tmp_path: Path) -> None:
    async with room(tmp_path) as here:
        await here.ask(20)
        await asyncio.sleep(0.01)
        assert len(here.desk.bodies) == 1
        assert not here.desk.forms
        assert not here.archive.writer.active
