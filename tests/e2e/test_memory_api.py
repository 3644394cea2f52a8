"""Looking into the memory over HTTP: what `/vm/context` says is what upstream was sent, at any turn and
after a SIGKILL; nobody sees another's session (invariants 5, 6 and 7).
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.e2e.harness import Recorded, ServerProcess, call, message_of
from tests.e2e.schema import check_requests, judged
from tests.e2e.script import LOOKUP, SYSTEM, Chat, Script, Stand, fault, search, talk

pytestmark = pytest.mark.asyncio(loop_scope="module")

SESSION = "notes-1"
_LINE = re.compile(r"^[UATSIDVJ] \(([a-z_0-9.]+)(?:, level (\d))?\): ", re.M)
_BLOCK = re.compile(r"<VM:CONTEXT>\n.*?\n</VM:CONTEXT>\n*", re.S)


def window_of(recorded: Recorded, told: list[dict[str, Any]]) -> dict[str, int]:
    """Page id -> level of all that a request shows of the conversation `told` (without its system
    message), read from the bytes that upstream got."""
    ids = {message["content"]: f"msg_{n:04d}" for n, message in enumerate(told, 1) if message["content"]}
    shown: dict[str, int] = {}
    for message in recorded.json["messages"]:
        text = message.get("content") or ""
        if message["role"] == "tool" and text.startswith('{"page"'):
            page = json.loads(text)["page"]
            shown[page["page_id"]] = int(page["level"])
        elif message["role"] in ("developer", "user"):
            for page_id, level in _LINE.findall("".join(_BLOCK.findall(text))):
                shown[page_id] = int(level or 0)
        own = _BLOCK.sub("", text) if message["role"] == "user" else text
        if own in ids:
            shown[ids[own]] = 0
    return shown


@dataclass
class Story:
    """A session with faults, a search and several epochs; `windows[n]` is what upstream got in turn n."""

    stand: Stand
    chat: Chat
    windows: dict[int, dict[str, int]] = field(default_factory=dict)

    def note(self, tag: str) -> None:
        told = [m for m in self.chat.messages[:-1] if m["role"] != "system"]
        made = self.stand.script.calls[tag][-1]
        self.windows[len(self.windows) + 1] = window_of(made, told)

    async def talk(self, name: str, turns: int) -> None:
        for turn in range(turns):
            await talk(self.chat, self.stand.script, f"{name}{turn}", 1, [])
            self.note(f"{name}{turn}/0")

    async def say(self, text: str, tag: str, *rounds: Any) -> None:
        self.stand.script.plan(tag, *rounds)
        await self.chat.say(text, tag)
        self.note(tag)

    async def tell(self) -> None:
        await self.talk("a", 10)
        await self.say("Our deadline is March 3.", "deadline", message_of("Noted that."))
        await self.say("What was a1u0q?", "faults", fault("msg_0002", "msg_0004"), message_of("It was a1u0q."))
        points = message_of(None, [call("call_points", "page_fault", {"page_id": "msg_0006", "target_level": 2})])
        await self.say("What was it about?", "points", points, message_of("It was about that."))
        await self.talk("b", 8)
        await self.say("Remind me, what did I note with a2u0q?", "search", search("a2u0q"), message_of("You noted a2u0q."))
        await self.say("Our deadline is April 9.", "moved", message_of("Noted again."))
        await self.talk("c", 8)


async def told(stand: Stand) -> Story:
    """The story; whatever was sent and answered in it fits the API's schema."""
    async with judged() as http:
        client = stand.client().with_options(http_client=http)
        chat = Chat(client, [SYSTEM], headers={"x-session-id": SESSION}, tools=[LOOKUP])
        story = Story(stand, chat)
        await story.tell()
    check_requests(stand.script.upstream.calls)
    return story


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def story(scripted_server: tuple[Script, ServerProcess]) -> AsyncIterator[Story]:
    """Told once."""
    story = await told(Stand(*scripted_server))
    yield story
    await story.stand.close()


def http_of(stand: Stand, key: str = "k") -> httpx.AsyncClient:
    credentials = {"authorization": f"Bearer {stand.client(key).api_key}"}
    root = stand.server.base_url.removesuffix("/v1")
    return httpx.AsyncClient(base_url=root, headers=credentials, timeout=20)


async def ask(http: httpx.AsyncClient, path: str, **params: Any) -> dict[str, Any]:
    reply = await http.get(f"/vm/{path}", params={"session": SESSION, **params})
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


async def contexts(http: httpx.AsyncClient, turns: int) -> list[dict[str, Any]]:
    return [await ask(http, "context", turn=turn) for turn in range(1, turns + 1)]


async def kill(server: ServerProcess) -> None:
    server.kill()
    await asyncio.to_thread(server.restart)


async def test_invariants_5_and_7_the_context_at_any_turn_is_what_upstream_was_sent(story: Story) -> None:
    last = len(story.windows)
    async with http_of(story.stand) as http:
        before = await contexts(http, last)
        await kill(story.stand.server)
        after = await contexts(http, last)
        newest = await ask(http, "context")
    assert before == after and newest == after[-1]
    for turn, answer in enumerate(after, 1):
        shown = {page["page_id"]: page["level"] for page in answer["pages"]}
        assert shown == story.windows[turn], f"turn {turn}"
        assert (answer["turn"], answer["last_turn"]) == (turn, last)
    paged = [answer["paged"] for answer in after]
    assert not paged[0] and paged[-1] and paged == sorted(paged)  # it began to page, and went on
    assert any(level for answer in after for level in (p["level"] for p in answer["pages"]))
    assert any(page["page_id"] == "index_seg_01" for page in newest["derived"])


async def test_provenance_is_walked_both_ways(story: Story) -> None:
    async with http_of(story.stand) as http:
        context = await ask(http, "context")
        made = context["derived"][0]
        line = await ask(http, "provenance", page=made["page_id"])
        said_in = line["derives_from"][0]
        assert line["justified_by"] == line["derives_from"] == made["provenance"]
        message = await ask(http, "provenance", page=said_in)
        assert made["page_id"] in message["derived"] and message["derives_from"] == []
        short = await ask(http, "provenance", page=f"msg_{int(said_in[4:])}")
        assert short == message  # leading zeros are optional
        beyond = f"msg_{2 * context['last_turn'] + 5:04d}"
        for page in ("claim_9999", beyond, "../../etc/passwd", "img_0001_1", "msg_0000", "\r\nx: y"):
            reply = await http.get("/vm/provenance", params={"session": SESSION, "page": page})
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "page_not_found"), page
        for page in ("", "p" * 65):
            reply = await http.get("/vm/provenance", params={"session": SESSION, "page": page})
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "page")


async def test_invariant_6_another_key_or_user_finds_no_session(stand: Stand) -> None:
    story = Story(stand, Chat(stand.client("own"), [SYSTEM], headers={"x-session-id": SESSION}, user="ada"))
    await story.talk("short", 2)
    missing = {"error": {"message": "There is no such session for these credentials.", "type":
                         "invalid_request_error", "param": "session", "code": "session_not_found"}}  # fmt: skip
    async with http_of(stand, "own") as own, http_of(stand, "other") as other:
        assert (await ask(own, "context", user="ada"))["last_turn"] == 2
        strangers: list[tuple[httpx.AsyncClient, dict[str, str], dict[str, str]]] = [
            (own, {}, {}), (own, {"user": "bob"}, {}), (own, {"user": "ada\x00"}, {}),
            (other, {"user": "ada"}, {}), (other, {}, {"x-session-id": SESSION}),
            (own, {"user": "ada"}, {"x-api-key": "more"}),  # upstream may check another one than before
            (own, {"user": "ada"}, {"x-session-id": "notes-2"}),  # a header counts before the query
            (own, {"user": "ada"}, {"x-openwebui-user-id": "eve"}), (own, {"user": "ada", "api_key": "k"}, {}),
            (own, {"safety_identifier": "ada"}, {}), (own, {"user": "ada", "metadata.user_id": "1"}, {}),
        ]  # fmt: skip
        for path in ("context", "provenance"):
            for http, params, headers in strangers:
                asked = {"session": SESSION, "page": "msg_0001", **params}
                reply = await http.get(f"/vm/{path}", params=asked, headers=headers)
                assert (reply.status_code, reply.json()) == (404, missing), (params, headers)
        del own.headers["authorization"]
        reply = await own.get("/vm/context", params={"session": SESSION, "user": "ada"})
        assert reply.status_code == 404


BAD_TURNS = ["0", "-1", "1.0", "1e1", " 1", "one", "", "٣", "²", "3", "9" * 9, "9" * 10, "9" * 4000, "1\r\nx: y"]


async def test_what_is_asked_wrongly_is_refused_in_openais_shape(stand: Stand) -> None:
    story = Story(stand, Chat(stand.client("bad"), [SYSTEM], headers={"x-session-id": SESSION}))
    await story.talk("short", 2)
    async with http_of(stand, "bad") as http:
        for turn in BAD_TURNS:
            reply = await http.get("/vm/context", params={"session": SESSION, "turn": turn})
            error = reply.json()["error"]
            assert (reply.status_code, error["param"], error["code"]) == (400, "turn", "invalid_turn"), turn
            assert error["message"] == "turn must be a whole number from 1 to 2." and "x" not in reply.headers
        for session in ("a b", "..\\data", "s" * 129, "a\r\nset-cookie: a=b", "a\x00", "é"):
            reply = await http.get("/vm/context", params={"session": session})
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "session_not_found"), session
            assert "set-cookie" not in reply.headers
        reply = await http.get("/vm/context")
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "session")
        for method, path, status in (
            ("GET", "/vm/", 404), ("GET", "/vm/context/..%2f..%2fdata", 404), ("GET", "/vm/stats/x", 404),
            ("POST", "/vm/context", 405), ("DELETE", "/vm/stats", 405),
        ):  # fmt: skip
            reply = await http.request(method, path)
            assert (reply.status_code, set(reply.json()["error"])) == (status, {"message", "type", "param", "code"})


async def test_stats_are_numbers_and_grow(stand: Stand) -> None:
    await kill(stand.server)  # they are this process's own
    async with httpx.AsyncClient(base_url=stand.server.base_url.removesuffix("/v1")) as http:
        before = (await http.get("/vm/stats")).json()
        assert [v for _, v in numbers(before) if v] == []
        await told(stand)
        after = (await http.get("/vm/stats")).json()
    grown = dict(numbers(after))
    for name in (
        "turns", "paged_turns", "epochs", "pack_cache.misses", "l1.values",
        "user_experience.recalls", "user_experience.recall_success_rate", "user_experience.faults",
        "user_experience.refaults", "user_experience.thrash_index", "user_experience.evictions",
        "user_experience.prefetched",
    ):  # fmt: skip
        assert grown[name] > 0, (name, after)
    rates = [v for name, v in grown.items() if "rate" in name or name.endswith("thrash_index")]
    assert rates and all(0 <= rate <= 1 for rate in rates)


async def test_the_effective_context_is_of_every_server(stand: Stand) -> None:
    async with http_of(stand) as http:
        stats = (await http.get("/vm/stats")).json()
        if not stats["paged_turns"]:  # no other test has talked to this process
            await told(stand)
            stats = (await http.get("/vm/stats")).json()
    assert stats["user_experience"]["effective_context"] > 1


def numbers(value: Any, name: str = "") -> list[tuple[str, float]]:
    """Every leaf with its dotted name; each has to be a number."""
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in numbers(v, f"{name}.{k}".lstrip("."))]
    assert isinstance(value, (int, float)) and not isinstance(value, bool), name
    return [(name, value)]
