"""The chat handler, as the ASGI server calls it: bodies, callers, sessions, limits, a client that left.

Promises: the upstream is a scripted object, the store is a real one in a temporary directory; no
socket is opened here (tests/e2e does that).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from proxy.api.caller import caller
from proxy.api.chat import ChatApi
from proxy.api.memory import Memory
from proxy.api.renditions import Renditions
from proxy.api.visit import Stats
from proxy.api.writer import Writer
from proxy.config import Config, load_config
from proxy.conversation.report import TurnReport
from proxy.errors import ApiError
from proxy.storage.l2 import StorageError
from proxy.upstream import BytesReply, Header, Reply

HELLO = [{"role": "user", "content": "hello"}]
JSON = [(b"content-type", b"application/json")]


def answered(text: str = "hi") -> BytesReply:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    body = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return BytesReply(200, JSON, json.dumps(body).encode())


class Scripted:
    """An upstream: keeps what it was sent, gives the next of `replies` (or raises it)."""

    def __init__(self, *replies: Reply | Exception) -> None:
        self.replies = list(replies)
        self.bodies: list[bytes] = []
        self.headers: list[Sequence[Header]] = []
        self.cancelled = asyncio.Event()
        self.arrived = asyncio.Event()

    async def chat(self, body: bytes, headers: Sequence[Header], query: bytes = b"") -> Reply:
        self.bodies.append(body)
        self.headers.append(headers)
        self.arrived.set()
        if not self.replies:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def forward(self, *_: Any) -> Reply:
        raise AssertionError("chat only")

    async def close(self) -> None:
        pass


class Client:
    """One handler and the ways to call it."""

    def __init__(self, config: Config, upstream: Scripted) -> None:
        self.memory = Memory(config)
        self.reports: list[TurnReport] = []
        self.upstream = upstream
        renditions = Renditions(config, self.memory)
        self.writer = Writer(config, upstream, renditions)
        stats = Stats(self.memory, self.writer)
        self.api = ChatApi(
            config, upstream, self.memory, renditions, self.writer, stats, self.reports.append
        )

    async def send(
        self, pieces: Sequence[bytes], headers: Sequence[Header] = (), method: str = "POST",
        leave: asyncio.Event | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body); status 0: nothing was sent. `leave` set: the client is gone."""
        incoming = [
            {"type": "http.request", "body": p, "more_body": i < len(pieces) - 1}
            for i, p in enumerate(pieces)
        ]
        status, got, out = 0, dict[str, str](), b""

        async def receive() -> dict[str, Any]:
            if incoming:
                return incoming.pop(0)
            await (leave or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            nonlocal status, out
            if message["type"] == "http.response.start":
                status = message["status"]
                got.update({k.decode(): v.decode() for k, v in message["headers"]})
            else:
                out += message.get("body", b"")

        scope = {"type": "http", "method": method, "path": "/v1/chat/completions", "headers": headers}
        await self.api(scope, receive, send)
        return status, got, out

    async def ask(self, request: Any, *headers: Header, **more: Any) -> tuple[int, dict[str, Any]]:
        content = request if isinstance(request, bytes) else json.dumps(request).encode()
        status, _, out = await self.send([content], headers, **more)
        return status, json.loads(out)


@asynccontextmanager
async def client(path: Path, *replies: Reply | Exception, **sections: Any) -> AsyncIterator[Client]:
    flags: dict[str, object] = {"tiers.l2.path": str(path / "data")}
    for section, values in sections.items():
        flags.update({f"{section}.{name}": value for name, value in values.items()})
    found = Client(load_config(None, {}, flags), Scripted(*replies))
    try:
        yield found
    finally:
        await found.memory.close()


def body(messages: Sequence[Any] = HELLO, **fields: Any) -> dict[str, Any]:
    return {"model": "gpt-4o", "messages": list(messages), **fields}


async def test_a_short_request_and_its_answer_are_untouched(tmp_path: Path) -> None:
    reply = answered()
    async with client(tmp_path, reply) as one:
        sent = b'{ "model":"gpt-4o",\n "messages" : [{"content":"h\\u00e9","role":"user"}], "x-new": 1.0 }'
        status, headers, out = await one.send([sent], [(b"authorization", b"Bearer k"), (b"x-a", b"b")])
        assert one.upstream.bodies == [sent]
        assert (b"x-a", b"b") in one.upstream.headers[0]
        assert status == 200
        assert out == await answered().read(1000)
        assert headers["content-length"] == str(len(out))
        assert [report.channel for report in one.reports] == ["bypass"]


async def test_a_body_in_pieces_is_one_body(tmp_path: Path) -> None:
    whole = json.dumps(body()).encode()
    async with client(tmp_path, answered()) as one:
        status, _, _ = await one.send([whole[:7], b"", whole[7:]])
        assert status == 200
        assert one.upstream.bodies == [whole]


async def test_the_body_limit_counts_bytes_with_and_without_a_length(tmp_path: Path) -> None:
    async with client(tmp_path, answered(), server={"body_limit_bytes": 2000}) as one:
        for pieces, headers in (
            ([b"{}"], [(b"content-length", b"2001")]),
            ([b"x" * 1500, b"x" * 501], []),
        ):
            status, _, out = await one.send(pieces, headers)
            assert status == 413
            assert json.loads(out)["error"]["code"] == "request_too_large"
        assert one.upstream.bodies == []
        whole = json.dumps(body()).encode()
        exact = whole[:-1] + b" " * (2000 - len(whole)) + b"}"
        assert (await one.send([exact[:1500], exact[1500:]]))[0] == 200


async def test_a_client_that_leaves_while_it_sends_costs_nothing(tmp_path: Path) -> None:
    leave = asyncio.Event()
    leave.set()
    async with client(tmp_path) as one:
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
        messages = [
            {"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"},
        ]

        async def receive() -> Any:
            return messages.pop(0)

        async def send(message: Any) -> None:
            pass  # uvicorn drops what is sent to nobody

        await one.api(scope, receive, send)
        assert one.upstream.bodies == []


async def test_a_client_that_leaves_cancels_the_upstream_call(tmp_path: Path) -> None:
    leave = asyncio.Event()
    async with client(tmp_path) as one:
        task = asyncio.create_task(one.send([json.dumps(body()).encode()], leave=leave))
        await asyncio.wait_for(one.upstream.arrived.wait(), 5)
        leave.set()
        status, _, out = await asyncio.wait_for(task, 5)
        assert one.upstream.cancelled.is_set()
        assert (status, out) == (0, b"")
        assert one.reports == []


async def test_a_server_that_stops_cancels_the_upstream_call(tmp_path: Path) -> None:
    async with client(tmp_path) as one:
        task = asyncio.create_task(one.send([json.dumps(body()).encode()]))
        await asyncio.wait_for(one.upstream.arrived.wait(), 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert one.upstream.cancelled.is_set()


async def test_an_upstream_failure_before_a_status_is_its_error(tmp_path: Path) -> None:
    failure = ApiError(502, "no route", "api_error", "upstream_unreachable", headers={"Retry-After": "3"})
    async with client(tmp_path, failure) as one:
        status, headers, out = await one.send([json.dumps(body()).encode()])
        assert status == 502
        assert headers["retry-after"] == "3"
        assert json.loads(out)["error"]["code"] == "upstream_unreachable"


async def test_a_failing_commit_loses_memory_and_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*_: Any) -> None:
        raise StorageError("The disk is full.")

    async with client(tmp_path, answered("given")) as one:
        monkeypatch.setattr(one.memory.store, "commit", fails)
        status, found = await one.ask(body())
        assert status == 200
        assert found["choices"][0]["message"]["content"] == "given"
        assert len(one.reports) == 1


# ---------------------------------------------------------------- who is asking


async def answered_in_session(
    path: Path, first: Sequence[Header], second: Sequence[Header], *fields: dict[str, Any]
) -> bool:
    """A turn, then only a new message: did the second request carry the first?"""
    one_fields, two_fields = fields or ({}, {})
    async with client(path, answered(), answered()) as one:
        assert (await one.ask(body(**one_fields), *first))[0] == 200
        assert (await one.ask(body([{"role": "user", "content": "more"}], **two_fields), *second))[0] == 200
        sent = json.loads(one.upstream.bodies[1])["messages"]
        return [m["content"] for m in sent] == ["hello", "hi", "more"]


KEY, OTHER = (b"authorization", b"Bearer a"), (b"authorization", b"Bearer b")
SESSION = (b"x-llm-pager-session", b"chat {1}: a@b|c")
LABEL = (b"x-session-id", SESSION[1])


async def test_a_session_continues_with_new_messages_only(tmp_path: Path) -> None:
    assert await answered_in_session(tmp_path, [KEY, SESSION], [KEY, SESSION])


async def test_invariant_2_a_sessions_name_alone_brings_nothing_back(tmp_path: Path) -> None:
    """A title, a new chat and a summary come under the same name as the conversation."""
    named = {"metadata": {"session_id": SESSION[1].decode()}}
    for first in ([KEY, SESSION], [KEY, LABEL]):
        assert not await answered_in_session(tmp_path, first, [KEY, LABEL])
        assert not await answered_in_session(tmp_path, first, [KEY], {}, named)
        assert not await answered_in_session(tmp_path, first, [KEY], named, named)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([KEY, SESSION], [KEY]),
        ([KEY, SESSION], [KEY, (SESSION[0], b"s2")]),
        ([KEY, SESSION], [OTHER, SESSION]),
        ([KEY, SESSION], [SESSION]),
        ([(b"api-key", b"a"), SESSION], [(b"api-key", b"b"), SESSION]),
        ([(b"x-api-key", b"a"), SESSION], [(b"x-api-key", b"b"), SESSION]),
        # upstream checks Authorization: an unchecked header beside it must not open another's door
        ([(b"x-api-key", b"a"), SESSION], [(b"x-api-key", b"a"), OTHER, SESSION]),
    ],
)
async def test_invariant_6_another_session_or_key_sees_nothing(
    tmp_path: Path, first: list[Header], second: list[Header]
) -> None:
    assert not await answered_in_session(tmp_path, first, second)


@pytest.mark.parametrize("name", ["user", "safety_identifier"])
async def test_invariant_6_another_user_of_the_same_key_sees_nothing(tmp_path: Path, name: str) -> None:
    both = [KEY, SESSION]
    assert not await answered_in_session(tmp_path, both, both, {name: "ann"}, {name: "bob"})


@pytest.mark.parametrize("name", ["user", "safety_identifier"])
async def test_the_same_user_goes_on(tmp_path: Path, name: str) -> None:
    both = [KEY, SESSION]
    assert await answered_in_session(tmp_path, both, both, {name: "ann"}, {name: "ann"})


async def test_the_key_is_nowhere_in_the_state_directory(tmp_path: Path) -> None:
    secret = b"sk-very-secret-0123456789"
    async with client(tmp_path, answered()) as one:
        assert (await one.ask(body(), (b"authorization", b"Bearer " + secret)))[0] == 200
    files = [f for f in (tmp_path / "data").rglob("*") if f.is_file()]
    assert files
    assert all(secret not in f.read_bytes() for f in files)


async def test_only_system_messages_are_a_conversation_too(tmp_path: Path) -> None:
    system = [{"role": "system", "content": "Write a poem."}]
    async with client(tmp_path, answered(), answered()) as one:
        for _ in range(2):
            assert (await one.ask(body(system)))[0] == 200
        assert one.upstream.bodies == [json.dumps(body(system)).encode()] * 2


# ---------------------------------------------------------------- model and limits


async def test_a_known_model_has_its_own_window(tmp_path: Path) -> None:
    async with client(tmp_path, answered(), answered()) as one:
        await one.ask(body())
        await one.ask(body(model="local-unknown"))
        known, unknown = (report.budget_tokens for report in one.reports)
        assert known > 100_000
        assert unknown == 32_000 - 4096


@pytest.mark.parametrize(
    ("model", "budgets"),
    [("local-unknown", [20_000 - 4096, 14_000, 13_000, 10_000]), ("gpt-4o", [20_000, 20_000, 20_000, 10_000])],
)  # gpt-4o has 108,000 tokens more for the answer
async def test_max_tokens_raises_the_reserve_up_to_half(tmp_path: Path, model: str, budgets: list[int]) -> None:
    async with client(tmp_path, *(answered() for _ in range(4)), tiers={"l0.tokens": 20_000}) as one:
        for name, value in (("n", 1), ("max_tokens", 6000), ("max_completion_tokens", 7000), ("max_tokens", 10**9)):
            await one.ask({**body(model=model), name: value})
        assert [r.budget_tokens for r in one.reports] == budgets


@pytest.mark.parametrize("name", ["", " ", "a b", "{1}", "x" * 2000, "naïve", "<script>", "日本", "\x00"])
async def test_any_text_names_a_session(tmp_path: Path, name: str) -> None:
    named = body(metadata={"session_id": name})
    async with client(tmp_path, *(answered() for _ in range(4))) as one:
        assert (await one.ask(named))[0] == (await one.ask(body(metadata={"session_id": {"a": 1}})))[0] == 200
        for header in (b"x-session-id", b"x-llm-pager-session"):
            assert (await one.ask(body(), (header, name.encode())))[0] == 200
        assert one.upstream.bodies[0] == json.dumps(named).encode()


async def test_text_that_is_not_utf8_is_upstreams_to_judge_at_every_turn(tmp_path: Path) -> None:
    """Also where the head of the body is known already and only its tail is parsed."""
    good = body([*HELLO, {"role": "assistant", "content": "hi"}])
    async with client(tmp_path, answered(), answered(), answered()) as one:
        assert (await one.ask(body()))[0] == 200
        bad = json.dumps(good).encode()[:-2] + b', {"role": "user", "content": "\xff"}]}'
        assert (await one.ask(bad))[0] == 200
        assert one.upstream.bodies[-1] == bad
        assert (await one.ask(body()))[0] == 200


# ---------------------------------------------------------------- what upstream is told and judges


def paged_messages(pairs: int = 12) -> list[dict[str, Any]]:
    filler = " ".join(f"word{i}" for i in range(60))
    said = [{"role": ("user", "assistant")[i % 2], "content": f"{i} {filler}"} for i in range(2 * pairs)]
    return [*said, {"role": "user", "content": "and now?"}]


SMALL = {"tiers.l0": {"tokens": 2000, "reserve_tokens": 500}}


def cache_keys(one: Client) -> list[Any]:
    return [json.loads(sent).get("prompt_cache_key") for sent in one.upstream.bodies]


async def test_a_conversation_has_one_cache_key_where_the_provider_knows_it(tmp_path: Path) -> None:
    key = (b"authorization", b"Bearer a")
    other = (b"authorization", b"Bearer b")
    longer = [*paged_messages(), {"role": "assistant", "content": "hi"}, *HELLO]
    async with client(tmp_path, *(answered() for _ in range(5)), **SMALL) as one:  # api.openai.com
        await one.ask(body(paged_messages()), key)
        await one.ask(body(longer), key)
        await one.ask(body(paged_messages()), other)
        await one.ask(body(paged_messages(), prompt_cache_key="mine"), key)
        await one.ask(body(), key)
        first, second, third, fourth, fifth = cache_keys(one)
    assert first == second and isinstance(first, str) and 0 < len(first) <= 64
    assert third not in (None, first), "another caller's conversation"
    assert fourth == "mine"
    assert fifth is None, "an untouched request has nothing of ours"


async def test_another_provider_gets_no_cache_key_unless_it_is_configured(tmp_path: Path) -> None:
    away = {"upstream": {"base_url": "http://127.0.0.1:9/v1"}, **SMALL}
    async with client(tmp_path / "a", answered(), **away) as one:
        await one.ask(body(paged_messages()))
        assert cache_keys(one) == [None]
    (tmp_path / "b").mkdir()
    file = tmp_path / "b" / "config.yaml"
    models = {"gpt*": {"prompt_cache_key": True}}
    tiers = {"l0": SMALL["tiers.l0"], "l2": {"path": str(tmp_path / "b" / "data")}}
    file.write_text(json.dumps({"upstream": away["upstream"], "tiers": tiers, "models": models}))
    one = Client(load_config(file, {}, {}), Scripted(answered()))
    try:
        await one.ask(body(paged_messages()))
        assert cache_keys(one) != [None]
    finally:
        await one.memory.close()


async def test_what_cannot_be_paged_goes_up_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant 1, also for our own mistakes: the client does not pay for them."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError("a mistake of ours")

    async with client(tmp_path, answered(), answered(), **SMALL) as one:
        sent = json.dumps(body(paged_messages())).encode()
        monkeypatch.setattr("proxy.conversation.turn_window.TurnWindow.open", broken)
        assert (await one.ask(sent))[0] == 200
        monkeypatch.setattr("proxy.api.admission.place", broken)
        assert (await one.ask(sent))[0] == 200
        assert one.upstream.bodies == [sent, sent]


async def test_what_a_refusal_taught_is_kept_for_the_key_and_shown_to_it(tmp_path: Path) -> None:
    refused = BytesReply(400, JSON, b'{"error":{"message":"This model does not support tools"}}')
    async with client(tmp_path, refused, answered(), answered(), **SMALL) as one:
        key = (b"authorization", b"Bearer a")
        assert (await one.ask(body(paged_messages()), key))[0] == 200
        assert (await one.ask(body(paged_messages()), key))[0] == 200
        assert len(one.upstream.bodies) == 3 and b'"tools"' not in one.upstream.bodies[2]
        scope = one.memory.identity.tenant(caller([key]).credentials, "")
        (row,) = one.api.model_facts.table(scope)
        assert row["model"] == "gpt-4o"
        assert row["tools"] == {"value": False, "from": "learned"}
        assert row["stream_usage"] == {"value": True, "from": "assumed"}
        assert one.api.model_facts.table(one.memory.identity.tenant(caller([OTHER]).credentials, "")) == []


async def test_an_upstream_that_cuts_prompts_silently_is_noticed(tmp_path: Path) -> None:
    def cut() -> BytesReply:
        whole = json.loads(answered()._body)
        whole["usage"] = {"prompt_tokens": 1200, "completion_tokens": 1, "total_tokens": 1201}
        return BytesReply(200, JSON, json.dumps(whole).encode())

    async with client(tmp_path, *(cut() for _ in range(4))) as one:
        messages = paged_messages(4)
        for _ in range(4):
            assert (await one.ask(body(messages)))[0] == 200
            messages = [*messages, {"role": "assistant", "content": "hi"}, messages[0]]
        assert len(one.upstream.bodies[1]) > len(one.upstream.bodies[0])
        scope = one.memory.identity.tenant("", "")
        assert one.memory.learned(scope, "gpt-4o").get("window_tokens") == 1200
        assert b"<VM:RULES>" in one.upstream.bodies[-1], "later requests fit what it reads"


@pytest.mark.parametrize("name", ["importance", "lru", "modality"])
async def test_the_configured_policy_decides_who_leaves(tmp_path: Path, name: str) -> None:
    async with client(tmp_path, answered(), memory={"eviction": name}) as one:
        given = await one.api._admission.admit([], b"", json.dumps(body()).encode())
        kinds = {"importance": "ImportanceWeightedLRU", "lru": "LRU", "modality": "ModalityAwareLRU"}
        assert type(given.policy).__name__ == kinds[name]


async def test_a_name_that_no_model_has_is_upstreams_to_judge_and_nothing_is_kept_by_it(tmp_path: Path) -> None:
    async with client(tmp_path, answered(), **SMALL) as one:
        sent = json.dumps({**body(paged_messages()), "model": "m" * 100_000}).encode()
        assert (await one.ask(sent))[0] == 200
        assert one.upstream.bodies == [sent]
        assert one.api._admission._counters.cache_info().currsize == 0
