"""Figure 4: a conversation of pictures, sounds, files, a film and tool outputs in a small window.

One story is told to two servers, each a process with a directory, an installation secret and an
upstream of its own; one of them is killed again and again. Media degrade level by level, a fault
brings the original back, every upstream request is one that OpenAI's API takes, and both servers
send the same bytes.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import pytest_asyncio
from openai import AsyncOpenAI
from PIL import Image

from tests.bench.levels import orders
from tests.bench.token_error import Published
from tests.conversation.checks import goes_on
from tests.e2e.harness import (
    Answer,
    Recorded,
    RecordingUpstream,
    ServerProcess,
    answer,
    call,
    count_request_tokens,
    message_of,
    messages_span,
    together,
)
from tests.e2e.schema import Judge, check_requests, judged, needs_schema, request_problems
from tests.e2e.script import LOOKUP, SYSTEM, TAG, Chat, Script, developer, filler
from tests.e2e.story import assert_same
from tests.media import samples

BUDGET_TOKENS = 4000
BRIDGE = samples.image_part(samples.png(1024, 768))
PIER = samples.image_part(samples.jpeg(800, 600), "image/jpeg", "high")
TOWER = {"type": "image_url", "image_url": {"url": "https://example.com/a/tower.png?token=s3cret"}}
TIDE = samples.audio_part(samples.wav(30))
BELL = samples.audio_part(samples.wav(20))
CONTRACT_TEXT = "The pier contract\nis signed by Maria Keller\non 14 March 2026."
CONTRACT = samples.file_part(samples.pdf([CONTRACT_TEXT]), "application/pdf", "contract.pdf")
LEDGER = samples.file_part(orders(10).encode(), "application/json", "ledger.json")
FILM = samples.video_part(samples.mp4(3, 2.0))
SPOKEN = "The tide is rising at the old harbour wall, said the pilot Jonas Brandt."
VOICE = base64.b64encode(samples.wav(4)).decode()
ANSWERS: dict[str, dict[str, Any]] = {
    "bridge": message_of("A steel bridge at dawn; its plate says KX-4411."),
    "pier": message_of("A plan of the pier, 212 metres long."),
    "tower": message_of("A water tower of red brick."),
    "tide": {
        "role": "assistant",
        "content": None,
        "audio": {"id": "audio_1", "expires_at": 2_000_000_000, "data": VOICE, "transcript": SPOKEN},
    },
    "bell": message_of("A bell, struck five times."),
    "contract": message_of("Maria Keller signed it on 14 March 2026."),
    "ledger": message_of("Ten orders, one of them failed."),
    "film": message_of("A red square on three plain colours."),
}
# Each medium's page, by the turn that brought it: two messages a turn, the first is msg_0001.
PAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "bridge": ("img_0001_1", BRIDGE),
    "pier": ("img_0003_1", PIER),
    "tower": ("img_0005_1", TOWER),
    "tide": ("aud_0007_1", TIDE),
    "bell": ("aud_0009_1", BELL),
    "contract": ("file_0011_1", CONTRACT),
    "ledger": ("file_0013_1", LEDGER),
    "film": ("vid_0015_1", FILM),
}
NAMED_ONLY = 3


def config(upstream: RecordingUpstream, **sections: Any) -> dict[str, Any]:
    return {
        "upstream": {"provider": "openai", "base_url": upstream.base_url},
        "tiers": {"l0": {"tokens": BUDGET_TOKENS + 1000, "reserve_tokens": 1000}},
        "manifest": {"max_tokens": 300},
        "prefetch": {"max_pages": 2, "max_tokens": 300},
        **sections,
    }


def user(text: str, *parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": text}, *parts]}


def load(page: str, level: int, prefix: str = "f") -> dict[str, Any]:
    arguments = {"page_id": page, "target_level": level}
    return call(f"call_{prefix}_{page}_{level}", "page_fault", arguments)


@dataclass
class Teller:
    """The client and the model of one server; `disturb` is called between turns."""

    script: Script
    chat: Chat
    disturb: Callable[[], Awaitable[None]]
    judge: Judge  # of what the client reads
    turns: int = 0

    async def say(self, tag: str, message: dict[str, Any], *rounds: dict[str, Any]) -> Any:
        """One turn; every second one is streamed, but for an answer in sound."""
        self.turns += 1
        self.script.plan(tag, *rounds)
        spoken = bool(rounds) and "audio" in rounds[-1]
        return await self.chat.send(message, tag, stream=self.turns % 2 == 0 and not spoken)

    async def story(self) -> None:
        for tag, (_, part) in PAGES.items():
            await self.say(tag, user(f"Here is the {tag}.", part), ANSWERS[tag])
        wanted = call("call_orders", "lookup", {"word": "orders"})
        await self.say("orders", user("Look the orders up."), message_of(None, [wanted]))
        result = {"role": "tool", "tool_call_id": "call_orders", "content": orders(30)}
        await self.say("orders/result", result, message_of("Thirty orders, 1007 failed."))
        await self.talk("talk", 14)
        for number, name in enumerate(("bridge", "film", "contract", "bell", "pier")):
            page = PAGES[name][0]
            wanted = load(page, 0)
            said = message_of(f"Here it is again: {page}.")
            await self.say(f"fault/{name}", user(f"Show {page}."), message_of(None, [wanted]), said)
            if number == 0:
                await self.disturb()
        spoken = [load("aud_0008_1", 1), load("aud_0008_1", 0)]
        await self.say("voice", user("What did the pilot say?"), message_of(None, spoken))
        await self.talk("between", 8)
        both = [load("img_0005_1", 0, "m"), call("call_mixed", "lookup", {"word": "steel"})]
        await self.say("mixed", user("Look at the tower and look steel up."), message_of(None, both))
        await self.disturb()
        result = {"role": "tool", "tool_call_id": "call_mixed", "content": "Steel: an alloy."}
        await self.say("mixed/result", result, message_of("Both done."))
        await self.talk("end", 3)

    async def talk(self, name: str, turns: int) -> None:
        for number in range(turns):
            tag = f"{name}/{number}"
            await self.say(tag, user(f"Note {tag}. {filler(tag, 70)}"))

    def calls(self, upto: str | None = None) -> list[Recorded]:
        """The upstream requests in order, before the turn `upto`."""
        made = self.script.upstream.calls
        end = self.script.calls[upto][0].index if upto else len(made)
        return made[:end]


@dataclass
class Told:
    quiet: Teller
    killed: Teller
    kills: int
    server: ServerProcess  # the quiet one, still running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def told() -> AsyncIterator[Told]:
    """The story, told to both."""
    one, two = Script(), Script()
    async with one.upstream, two.upstream:
        servers = ServerProcess(config(one.upstream)), ServerProcess(config(two.upstream))
        with together(*servers) as (quiet, killed):
            kills = 0

            async def kill() -> None:
                nonlocal kills
                kills += 1
                killed.kill()
                await asyncio.to_thread(killed.restart)

            async def nothing() -> None:
                pass

            ears = Judge(), Judge()
            async with (
                client_of(quiet.base_url, ears[0]) as first,
                client_of(killed.base_url, ears[1]) as second,
            ):
                tellers = [
                    Teller(one, Chat(first, [SYSTEM], tools=[LOOKUP]), nothing, ears[0]),
                    Teller(two, Chat(second, [SYSTEM], tools=[LOOKUP]), kill, ears[1]),
                ]
                await asyncio.gather(*(teller.story() for teller in tellers))
                yield Told(tellers[0], tellers[1], kills, quiet)
        one.check()
        two.check()


@contextlib.asynccontextmanager
async def client_of(base_url: str, judge: Judge | None = None) -> AsyncIterator[AsyncOpenAI]:
    """What it reads is judged: by the test, with its own `judge`, or at the end."""
    async with judged(judge) as http:
        yield AsyncOpenAI(api_key="k", base_url=base_url, max_retries=0, http_client=http)


pytestmark = pytest.mark.asyncio(loop_scope="module")


# -- what a request shows


def parts_of(recorded: Recorded, role: str | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(message's index, part) of every content part, of one role's messages."""
    for index, message in enumerate(recorded.json["messages"]):
        if isinstance(message.get("content"), list) and role in (None, message["role"]):
            yield from ((index, part) for part in message["content"])


def level_of(recorded: Recorded, page: str, original: dict[str, Any]) -> int:
    """The level at which a request shows a medium: 0 is the original part in a user message."""
    if any(part == original for _, part in parts_of(recorded, "user")):
        return 0
    text = json.dumps(recorded.json["messages"])
    shown = re.search(rf"\({page}, level (\d)\)", text)
    return int(shown[1]) if shown else NAMED_ONLY


def levels_of(calls: list[Recorded], name: str) -> list[int]:
    """The levels that a medium went through, each once, from the request that brought it."""
    page, part = PAGES[name]
    seen: list[int] = []
    for recorded in calls:
        level = level_of(recorded, page, part)
        if (seen or level == 0) and seen[-1:] != [level]:
            seen.append(level)
    return seen


# -- what the story showed


async def test_every_request_is_one_that_the_api_takes(told: Told) -> None:
    for teller in (told.quiet, told.killed):
        assert teller.script.upstream.violations == []
        assert not teller.script.upstream.failures
    roles = {
        (recorded.json["messages"][index]["role"], part["type"])
        for recorded in told.quiet.calls()
        for index, part in parts_of(recorded)
        if part["type"] != "text"
    }
    media = {"image_url", "input_audio", "file", "video_url"}
    assert roles == {("user", kind) for kind in media}


async def test_every_request_fits_the_apis_own_schema(told: Told) -> None:
    needs_schema()
    for teller in (told.quiet, told.killed):
        assert teller.calls()
        found = {r.header(TAG): wrong for r in teller.calls() if (wrong := request_problems(r.json))}
        assert not found
    broken = {"model": "m", "messages": [{"role": "tool", "content": [TOWER], "tool_call_id": "c"}]}
    assert request_problems(broken), "the schema takes anything"


async def test_every_answer_and_chunk_fits_the_apis_own_schema(told: Told) -> None:
    needs_schema()
    for teller in (told.quiet, told.killed):
        assert teller.judge.answers >= teller.turns and teller.judge.chunks > teller.turns
        teller.judge.check()


async def test_invariant_03_every_request_is_within_the_budget_by_the_published_rules(
    told: Told,
) -> None:
    published = Published("gpt-4o")
    counted = [count_request_tokens(recorded.json) for recorded in told.quiet.calls()]
    assert max(counted) <= BUDGET_TOKENS
    assert max(counted) > BUDGET_TOKENS * 0.8, "the window was never full"
    for recorded in told.quiet.calls():  # and the counter of this test counts images as published
        for _, part in parts_of(recorded):
            if part["type"] == "image_url" and part["image_url"]["url"].startswith("data:"):
                message = {"role": "user", "content": [part]}
                request = {"messages": [message]}
                assert count_request_tokens(request) == published.part(part) + 3 + 3 + 1


async def test_media_degrade_level_by_level_over_the_epochs(told: Told) -> None:
    calls = told.quiet.calls("fault/bridge")
    went = {name: levels_of(calls, name) for name in PAGES}
    for name, levels in went.items():
        assert levels[0] == 0, f"{name} was not shown as it came"
        assert levels == sorted(levels), f"{name} came back unasked: {levels}"
        assert levels[-1] > 0, f"{name} never left"
    pictures = ("bridge", "pier", "tower")
    assert any(went[name][:2] == [0, 1] for name in pictures), "all left without a smaller one"
    assert {level for levels in went.values() for level in levels} == {0, 1, 2, NAMED_ONLY}
    epochs = {text for recorded in calls if (text := developer(recorded))}
    assert len(epochs) >= 3


async def test_a_smaller_picture_is_a_low_detail_part_of_a_user_message(told: Told) -> None:
    smaller: dict[str, str] = {}
    for recorded in told.quiet.calls("fault/bridge"):
        for message in recorded.json["messages"]:
            content = message["content"] if isinstance(message.get("content"), list) else []
            for before, part in pairwise(content):
                if part["type"] != "image_url" or part in (BRIDGE, PIER, TOWER):
                    continue
                assert message["role"] == "user"
                assert part["image_url"]["detail"] == "low"
                line = before["text"].splitlines()[-1]
                page = re.match(r'I \((img_\d{4}_1), level 1\): "', line)
                assert page is not None, line
                assert content[0]["text"].startswith("<VM:CONTEXT>\n")
                assert content[-1]["text"].endswith("</VM:CONTEXT>")
                url = smaller.setdefault(page[1], part["image_url"]["url"])
                assert url == part["image_url"]["url"], "the same page, another picture"
    link = smaller.pop("img_0005_1", TOWER["image_url"]["url"])
    assert link == TOWER["image_url"]["url"]  # a link is shown by its link
    assert smaller
    assert set(smaller) <= {"img_0001_1", "img_0003_1"}
    for url in smaller.values():
        picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        assert max(picture.size) <= 512


@pytest.mark.parametrize("name", ["bridge", "film", "contract", "bell", "pier"])
async def test_invariant_04_a_fault_brings_the_original_back_after_the_results(
    told: Told, name: str
) -> None:
    page, part = PAGES[name]
    asked, answered = told.quiet.script.calls[f"fault/{name}"]
    level = level_of(asked, page, part)
    assert level > 0, "it was in front of the model already"
    *_, made, result, brought = answered.json["messages"]
    assert made["tool_calls"][0]["function"]["name"] == "page_fault"
    assert result["role"] == "tool"
    assert json.loads(result["content"])["page"] | {"content": {}} == {
        "page_id": page, "level": 0, "tier": "L2" if level == NAMED_ONLY else "L0", "content": {},
        "modality": {"img": "image", "vid": "video", "aud": "audio"}.get(page[:3], "text"),
    }  # fmt: skip
    assert brought["role"] == "user"
    assert [p for p in brought["content"] if p["type"] != "text"] == [part]
    assert brought["content"][0]["text"].startswith("<VM:CONTEXT>\n")
    text = json.dumps(told.quiet.chat.messages)
    assert "page_fault" not in text, "the client saw the fault"
    assert f"Here it is again: {page}." in text


async def test_an_answers_own_sound_comes_back_as_its_transcript_and_as_sound(told: Told) -> None:
    words, sound, brought = told.quiet.script.calls["voice"][1].json["messages"][-3:]
    page = json.loads(words["content"])["page"]
    assert (page["page_id"], page["level"], page["content"]["text"]) == ("aud_0008_1", 1, SPOKEN)
    assert json.loads(sound["content"])["page"]["level"] == 0
    original = {"type": "input_audio", "input_audio": {"data": VOICE, "format": "wav"}}
    assert brought["role"] == "user"
    assert [part for part in brought["content"] if part["type"] != "text"] == [original]


async def test_faults_were_answered_in_streams_and_in_whole_bodies(told: Told) -> None:
    ways = {
        bool(calls[0].json.get("stream"))
        for tag, calls in told.quiet.script.calls.items()
        if tag.startswith("fault/")
    }
    assert ways == {True, False}


async def test_in_a_mixed_round_an_image_comes_as_words(told: Told) -> None:
    (asked,) = told.quiet.script.calls["mixed"]
    assert level_of(asked, *PAGES["tower"]) == NAMED_ONLY
    forwarded = next(m for m in told.quiet.chat.messages if "call_mixed" in str(m.get("tool_calls")))
    assert [c["id"] for c in forwarded["tool_calls"]] == ["call_mixed"]
    messages = told.quiet.script.calls["mixed/result"][0].json["messages"]
    made, loaded, steel = messages[-3:]
    assert [c["id"] for c in made["tool_calls"]] == ["call_m_img_0005_1_0", "call_mixed"]
    page = json.loads(loaded["content"])["page"]
    assert page["level"] == 2
    assert "red brick" in page["content"]["text"]
    assert steel == {"role": "tool", "tool_call_id": "call_mixed", "content": "Steel: an alloy."}


async def test_the_prefix_is_stable_within_an_epoch(told: Told) -> None:
    calls, grown = told.quiet.calls(), 0
    for before, after in pairwise(calls):
        if developer(before) == developer(after):
            assert goes_on(messages_span(before.body).encode(), messages_span(after.body).encode())
            grown += 1
    assert grown > len(calls) * 0.6


async def test_invariants_5_and_7_sigkill_changes_nothing(told: Told) -> None:
    assert told.kills == 2
    assert_same(told.killed.script, told.quiet.script)


# -- a newest message that is too large by itself


@pytest.mark.parametrize("stream", [False, True])
async def test_a_newest_message_of_many_pictures_is_degraded_and_answered(
    told: Told, stream: bool
) -> None:
    pictures = [samples.image_part(samples.png(1024 + 16 * i, 1024), detail="high") for i in range(8)]
    script, tag = told.quiet.script, f"many/{stream}"
    wanted, said = message_of(None, [load("img_0001_3", 0)]), message_of("The third shows a chart.")
    script.plan(tag, wanted, said)
    async with client_of(told.server.base_url) as client:
        chat = Chat(client.with_options(api_key=tag), [SYSTEM])
        got = await chat.send(user("Compare these.", *pictures), tag, stream=stream)
        await chat.say("And which is the largest?", f"{tag}/next", stream=stream)
    assert got.text == "The third shows a chart."
    first, second = script.calls[tag]
    for recorded in (first, second):
        assert count_request_tokens(recorded.json) <= BUDGET_TOKENS
    shown = next(m for m in first.json["messages"] if m["role"] == "user")["content"]
    assert shown[0] == {"type": "text", "text": "Compare these."}
    small = [part for part in shown if part["type"] == "image_url"]
    assert [part["image_url"]["detail"] for part in small] == ["low"] * 8
    text = json.dumps(shown)
    assert all(f"(img_0001_{number}, level 1)" in text for number in range(1, 9))
    back = [part for part in second.json["messages"][-1]["content"] if part["type"] != "text"]
    assert back == [pictures[2]]
    (later,) = script.calls[f"{tag}/next"]
    assert count_request_tokens(later.json) <= BUDGET_TOKENS
    assert later.json["messages"][-1] == {"role": "user", "content": "And which is the largest?"}
    assert messages_span(later.body).startswith(messages_span(second.body).removesuffix("]"))


async def test_a_picture_that_the_api_reads_but_we_do_not_is_not_lost(told: Told) -> None:
    odd = samples.image_part(b"no picture that we know", "image/webp", "high")
    script, chat = told.quiet.script, told.quiet.chat.fork(1)
    async with client_of(told.server.base_url) as client:
        chat.client = client.with_options(api_key="odd")
        for number in range(8):
            await chat.send(user(f"Picture {number}.", odd), f"odd/{number}", stream=number % 2 == 1)
        script.plan("odd/fault", message_of(None, [load("img_0001_1", 0)]), message_of("Seen."))
        assert (await chat.say("Show the first again.", "odd/fault")).text == "Seen."
    assert script.calls["odd/fault"][1].json["messages"][-1]["content"][1] == odd


# -- words from a model


async def test_a_models_words_are_shown_from_the_next_epoch_on() -> None:
    upstream = Words()
    models = {"MODEL": "small-writer", "TRANSCRIPTION_MODEL": "small-ear"}
    settings = {f"LLM_PAGER_COMPRESSION__{name}": model for name, model in models.items()}
    pictures = [samples.image_part(samples.png(600 + 8 * i, 600)) for i in range(12)]
    async with upstream.server, contextlib.AsyncExitStack() as stack:
        server = stack.enter_context(ServerProcess(config(upstream.server), env=settings))
        client = await stack.enter_async_context(client_of(server.base_url))
        chat = Chat(client, [SYSTEM])
        await chat.send(user("Here is the tide.", TIDE), "tide")
        for number, picture in enumerate(pictures):
            tag = f"picture/{number}"
            await chat.send(user(f"Here is {tag}.", picture), tag, stream=number % 2 == 1)
            if len(upstream.epochs) == 1:
                await upstream.settled()
        assert "WRITTEN" not in upstream.epochs[0]
        assert "WRITTEN summary" in upstream.epochs[1]
        assert '"WRITTEN claim. [msg_0001]"' in upstream.epochs[1]
        number, picture = next((n, p) for n, p in enumerate(pictures) if upstream.captioned(p))
        page = f"img_{2 * number + 3:04d}_1"
        loads = [load(page, 2), load("aud_0001_1", 1), load(page, 0)]
        upstream.rounds = [message_of(None, loads)]
        await chat.say("Show them again.", "again")
    *_, caption, transcript, original, brought = upstream.server.calls[-1].json["messages"]
    said = [json.loads(m["content"])["page"] for m in (caption, transcript, original)]
    assert [page["level"] for page in said] == [2, 1, 0]
    assert said[0]["content"]["text"].startswith("WRITTEN caption")
    assert said[1]["content"]["text"] == "WRITTEN transcript"
    assert [part for part in brought["content"] if part["type"] != "text"] == [picture]
    assert upstream.server.violations == []
    check_requests(upstream.server.calls)  # those to the models that write, too
    for recorded in upstream.written():
        assert recorded.header("authorization") == "Bearer k"
        assert recorded.header(TAG) is None
    assert base64.b64decode(TIDE["input_audio"]["data"]) in upstream.server.others[0].body
    assert len(upstream.server.others) == 1, "the same sound was transcribed twice"


class Words:
    """An upstream with a model that talks, one that writes and one that listens."""

    def __init__(self) -> None:
        self.server = RecordingUpstream(self._respond, other=self._transcribe)
        self.epochs: list[str] = []
        self.rounds: list[dict[str, Any]] = []

    def _respond(self, request: dict[str, Any], index: int) -> Answer:
        if request["model"] == "small-writer":
            asked = request["messages"][0]["content"]
            kind = "caption" if isinstance(asked, list) else asked.partition(" ")[0].lower()
            said = {"caption": "caption", "summarise": "summary"}.get(kind, "points")
            claim = json.dumps({"subject": "tide", "text": "WRITTEN claim.", "source": "msg_0001"})
            more = f"\n{claim}" if said == "summary" else ""
            return answer(request, message_of(f"WRITTEN {said}{more}"))
        text = developer(self.server.calls[index])
        if text is not None and text not in self.epochs:
            self.epochs.append(text)
        said = self.rounds.pop() if self.rounds else message_of("Noted.")
        return answer(request, said)

    def _transcribe(self, recorded: Recorded) -> Answer:
        assert recorded.target == "/v1/audio/transcriptions"
        return {"text": "WRITTEN transcript"}

    def written(self) -> list[Recorded]:
        chats = [r for r in self.server.calls if r.json["model"] == "small-writer"]
        return [*chats, *self.server.others]

    def captioned(self, picture: dict[str, Any]) -> bool:
        """The model was shown this picture for its caption."""
        asked = [r.json["messages"][0]["content"] for r in self.written() if r.json]
        return any(isinstance(content, list) and picture in content for content in asked)

    async def settled(self) -> None:
        """All calls that were made are answered, and no new one came for a while."""
        count = -1
        while count != len(self.written()):
            count = len(self.written())
            await asyncio.sleep(0.03)
