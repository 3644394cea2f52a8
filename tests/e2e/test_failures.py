"""Figure 7, the failures: what the upstream, the client and the disk can do to a request in flight.

Promises: each failure is a real one on a real socket against `llm-pager serve`; the client gets the
right status, headers and body; the upstream call of a client that left is cancelled within a
second; the request after a broken one goes upstream with the bytes it would have had without it.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import shutil
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.harness import (
    Break,
    Drop,
    Hang,
    Recorded,
    RecordingUpstream,
    Response,
    ServerProcess,
    Stream,
    answer,
    completion,
    count_request_tokens,
    error,
    free_port,
    message_of,
    sse_chunks,
)
from tests.e2e.talk import (
    CHAT,
    MODEL,
    Step,
    ask,
    assert_error,
    assert_no_vm,
    assert_paged,
    body,
    config,
    fault,
    names_of,
    new_key,
    raw,
    read_stream,
    scripted,
    search,
    talker,
    texts_of,
)
from tests.waiting import happens

PORT = free_port()  # each test starts its own upstream on it
TIMEOUT_S = 0.4
SHORT: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
LONG = ask()
HEADERS = (
    (b"retry-after", b"7"),
    (b"x-request-id", b"req_42"),
    (b"openai-organization", b"org-a"),
    (b"openai-processing-ms", b"12"),
    (b"x-ratelimit-remaining-tokens", b"0"),
)
BOTH = pytest.mark.parametrize("messages", [SHORT, LONG], ids=["bypass", "paged"])
STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    upstream = {"base_url": f"http://127.0.0.1:{PORT}/v1", "timeout_s": 30, "retries": 0}
    with ServerProcess(config(PORT, upstream=upstream)) as process:
        yield process


@pytest.fixture(scope="module")
def hasty() -> Iterator[ServerProcess]:
    """A server that waits only a moment for its upstream."""
    upstream = {
        "base_url": f"http://127.0.0.1:{PORT}/v1",
        "timeout_s": TIMEOUT_S,
        "connect_timeout_s": TIMEOUT_S,
    }
    with ServerProcess(config(PORT, upstream=upstream)) as process:
        yield process


def pieces(request: dict[str, Any], text: str, upto: int, *end: Any) -> Stream:
    """The first `upto` events of a streamed answer, then `end`."""
    return Stream([*sse_chunks(request, message_of(text))[:upto], *end])


# ---------------------------------------------------------------- no answer at all


@STREAMED
@BOTH
async def test_connection_refused(
    server: ServerProcess, messages: list[dict[str, Any]], stream: bool
) -> None:
    async with raw(server.base_url) as client:
        response = await client.post(CHAT, json=body(messages, stream=stream))
    found = assert_error(response, 502, "upstream_unreachable")
    assert found["type"] == "api_error"


async def test_the_sdk_raises_when_the_upstream_is_down(server: ServerProcess) -> None:
    async with talker(server.base_url) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(model=MODEL, messages=SHORT)
    assert caught.value.status_code == 502
    assert caught.value.code == "upstream_unreachable"


async def test_other_paths_say_that_the_upstream_is_down(server: ServerProcess) -> None:
    async with raw(server.base_url) as client:
        assert_error(await client.get("/v1/models"), 502, "upstream_unreachable")
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ready")).status_code == 200


@BOTH
async def test_an_upstream_that_never_answers(
    hasty: ServerProcess, messages: list[dict[str, Any]]
) -> None:
    async with scripted(Hang(), port=PORT) as upstream, raw(hasty.base_url) as client:
        response = await client.post(CHAT, json=body(messages))
        assert_error(response, 504, "upstream_timeout")
        await asyncio.wait_for(upstream.calls[0].disconnected.wait(), 1)


async def test_an_upstream_that_does_not_take_the_connection() -> None:
    """A backlog that is full: the kernel does not answer the SYN, so connecting takes for ever."""

    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        waiting = []
        for _ in range(4):
            s = socket.socket()
            s.setblocking(False)
            s.connect_ex(("127.0.0.1", port))
            waiting.append(s)
        slow = {
            "base_url": f"http://127.0.0.1:{port}/v1", "timeout_s": 30, "connect_timeout_s": TIMEOUT_S,
        }
        try:
            with ServerProcess(config(port, upstream=slow)) as server:
                async with raw(server.base_url) as client:
                    response = await client.post(CHAT, json=body(SHORT))
                    assert_error(response, 504, "upstream_timeout")
                    assert response.elapsed.total_seconds() < 5
        finally:
            for s in waiting:
                s.close()


async def test_silence_in_the_middle_of_an_answer(hasty: ServerProcess) -> None:
    """A whole answer becomes 502, a stream breaks; neither ends as if it were complete."""
    half = Stream([b'{"id": "x", "choi', Hang()], headers=((b"content-type", b"application/json"),))
    async with scripted(half, port=PORT), raw(hasty.base_url) as client:
        assert_error(await client.post(CHAT, json=body(SHORT)), 502, "upstream_broken")

    def silent(request: dict[str, Any]) -> Stream:
        return pieces(request, "one two three", 2, Hang())

    async with scripted(silent, port=PORT), raw(hasty.base_url) as client:
        text, ended = await read_stream(client, body(SHORT, stream=True))
    assert not ended
    assert "[DONE]" not in text


async def test_an_upstream_that_hangs_up_without_a_status(server: ServerProcess) -> None:
    async with scripted(Drop(), port=PORT), raw(server.base_url) as client:
        assert_error(await client.post(CHAT, json=body(SHORT)), 502, "upstream_unreachable")


# ---------------------------------------------------------------- answers with an error status


@pytest.mark.parametrize(
    ("status", "messages", "stream"),
    [(401, SHORT, True), (429, LONG, False), (500, LONG, True), (503, SHORT, False)],
    ids=["401", "429 paged", "500 paged stream", "503"],
)
async def test_an_error_answer_comes_through(
    server: ServerProcess, status: int, messages: list[dict[str, Any]], stream: bool
) -> None:
    reply = error(status, "no, for a reason", code="some_code", headers=HEADERS)
    async with scripted(reply, port=PORT), raw(server.base_url) as client:
        response = await client.post(CHAT, json=body(messages, stream=stream))
    assert response.status_code == status
    assert response.content == reply.body
    for name, value in HEADERS:
        assert response.headers[name.decode()] == value.decode()


@STREAMED
async def test_the_sdk_raises_rate_limits_with_their_headers(
    server: ServerProcess, stream: bool
) -> None:
    async with scripted(error(429, "slow down", code="rate", headers=HEADERS), port=PORT):
        async with talker(server.base_url) as client:
            with pytest.raises(openai.RateLimitError) as caught:
                await client.chat.completions.create(
                    model=MODEL, messages=LONG, stream=stream
                )
    assert caught.value.response.headers["retry-after"] == "7"
    assert caught.value.request_id == "req_42"
    assert caught.value.code == "rate"


async def test_a_clients_own_retry_succeeds_and_is_the_same_request(server: ServerProcess) -> None:
    slow = error(429, "slow down", headers=((b"retry-after-ms", b"10"),))
    async with scripted(slow, message_of("fine"), port=PORT) as upstream:
        async with openai.AsyncOpenAI(
            base_url=server.base_url, api_key=new_key(), max_retries=1
        ) as sdk:
            client: Any = sdk
            done = await client.chat.completions.create(model=MODEL, messages=LONG)
    assert done.choices[0].message.content == "fine"
    assert upstream.calls[0].body == upstream.calls[1].body


@BOTH
@pytest.mark.parametrize("status", [502, 200])
async def test_a_page_that_is_no_chat_answer_comes_through(
    server: ServerProcess, messages: list[dict[str, Any]], status: int
) -> None:
    html = b"<html>\n<h1>Bad gateway</h1>\n</html>" if status == 502 else b"<html>log in first</html>"
    page = Response(html, status, ((b"content-type", b"text/html"),))
    async with scripted(page, port=PORT), raw(server.base_url) as client:
        response = await client.post(CHAT, json=body(messages))
    assert (response.status_code, response.content) == (status, html)
    assert response.headers["content-type"] == "text/html"


@pytest.mark.parametrize("status", [429, 500])
async def test_an_error_in_a_later_round_keeps_its_status(
    server: ServerProcess, status: int
) -> None:
    reply = error(status, "enough", code="enough", headers=HEADERS)
    async with scripted(search("depot 0"), reply, port=PORT), raw(server.base_url) as client:
        response = await client.post(CHAT, json=body(LONG))
    assert response.status_code == status
    assert response.content == reply.body
    assert response.headers["retry-after"] == "7"
    assert response.headers["x-request-id"] == "req_42"


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (error(429, "slow down", code="rate"), "slow down"),
        (Response(b'{\r\n "error": {\r\n "message": "folded"}}\r\n', 500), "folded"),
        (Response(b"<html>\r\n\r\nbad gateway</html>", 502), "502"),
        (Response(b'["odd"]', 500), "500"),
        (Response(b"", 503), "503"),
    ],
    ids=["429", "folded", "html", "array", "empty"],
)
async def test_an_error_in_a_later_round_of_a_stream_is_raised_by_the_sdk(
    server: ServerProcess, reply: Response, says: str
) -> None:
    async with scripted(search("depot 0"), reply, port=PORT):
        async with talker(server.base_url) as client:
            stream = await client.chat.completions.create(
                model=MODEL, messages=LONG, stream=True
            )
            with pytest.raises(openai.APIError) as caught:
                async for chunk in stream:
                    assert not chunk.choices[0].finish_reason
    assert says in str(caught.value)


async def test_an_error_event_in_mid_stream_is_raised_by_the_sdk(server: ServerProcess) -> None:
    event = b'data: {"error": {"message": "overloaded", "code": "busy"}}\n\n'

    def late(request: dict[str, Any]) -> Stream:
        return pieces(request, "one two three four", 3, event)

    for messages in (SHORT, LONG):
        async with scripted(late, port=PORT), talker(server.base_url) as client:
            stream = await client.chat.completions.create(
                model=MODEL, messages=messages, stream=True
            )
            with pytest.raises(openai.APIError, match="overloaded"):
                async for _ in stream:
                    pass


# ---------------------------------------------------------------- breaking in the middle


def broken_stream(request: dict[str, Any]) -> Stream:
    return pieces(request, "one two three four five six seven eight nine ten", 4, Break())


def broken_json(request: dict[str, Any]) -> Stream:
    whole = completion(request, message_of("a secret half")).body
    return Stream([whole[: len(whole) // 2], Break()], headers=((b"content-type", b"application/json"),))


def cut_stream(request: dict[str, Any]) -> Stream:
    """It ends well as HTTP, but without a finish reason and without [DONE]."""
    return pieces(request, "one two three four five six seven eight nine ten", 4)


FIRST = [search("depot 0")]
CASES: list[tuple[list[dict[str, Any]], list[Any], bool]] = [
    (SHORT, [broken_stream], True),
    (LONG, [broken_stream], True),
    (LONG, [*FIRST, broken_stream], True),
    (LONG, [cut_stream], True),
    (SHORT, [broken_json], False),
    (LONG, [broken_json], False),
    (LONG, [*FIRST, broken_json], False),
]
IDS = ["bypass", "paged", "later-round", "paged-cut", "json-bypass", "json-paged", "json-later"]


@pytest.mark.parametrize(("messages", "steps", "stream"), CASES, ids=IDS)
async def test_a_broken_answer_breaks_and_is_not_remembered(
    server: ServerProcess, messages: list[dict[str, Any]], steps: list[Step], stream: bool
) -> None:
    """Three turns; in one of two conversations the second is broken first and asked once more."""
    second = [*messages, message_of("first"), {"role": "user", "content": "and depot 3?"}]
    third = [*second, message_of("second"), {"role": "user", "content": "and depot 5?"}]
    answers = [message_of("second"), message_of("third")]

    async def play(client: httpx.AsyncClient) -> None:
        for history in (second, third):
            response = await client.post(CHAT, json=body(history))
            assert response.status_code == 200

    async with scripted(message_of("first"), *steps, *answers, port=PORT) as broken:
        async with raw(server.base_url) as client:
            assert (await client.post(CHAT, json=body(messages))).status_code == 200
            if stream:
                text, ended = await read_stream(client, body(second, stream=True))
                assert not ended
                assert "[DONE]" not in text and '"finish_reason":"' not in text
                assert_no_vm(text)
            else:
                response = await client.post(CHAT, json=body(second))
                assert_error(response, 502, "upstream_broken")
                assert "secret" not in response.text
            await play(client)
    async with scripted(message_of("first"), *answers, port=PORT) as clean:
        async with raw(server.base_url) as client:
            assert (await client.post(CHAT, json=body(messages))).status_code == 200
            await play(client)
    assert [c.body for c in broken.calls[-2:]] == [c.body for c in clean.calls[-2:]]
    if messages is LONG:
        assert_paged(broken.calls[-1])


async def test_the_sdk_sees_a_stream_that_breaks(server: ServerProcess) -> None:
    for messages in (SHORT, LONG):
        async with scripted(broken_stream, port=PORT), talker(server.base_url) as client:
            stream = await client.chat.completions.create(
                model=MODEL, messages=messages, stream=True
            )
            with pytest.raises((openai.APIError, httpx.RemoteProtocolError, httpx.ReadError)):
                async for _ in stream:
                    pass


# ---------------------------------------------------------------- the client leaves


async def left(call: Recorded) -> bool:
    """Whether the upstream call was cancelled, within a second, and before its answer's end."""
    return await happens(call.disconnected, 1) and not call.finished.is_set()


@STREAMED
@BOTH
async def test_a_client_that_leaves_before_the_answer_cancels_the_call(
    server: ServerProcess, messages: list[dict[str, Any]], stream: bool
) -> None:
    key = new_key()
    async with scripted(Hang(), message_of("now"), message_of("now"), port=PORT) as upstream:
        async with raw(server.base_url, key) as client:
            task = asyncio.create_task(client.post(CHAT, json=body(messages, stream=stream)))
            await upstream.wait_for_calls(1)
            task.cancel()
            await asyncio.wait((task,))
        assert await left(upstream.calls[0])
        for who in (key, new_key()):  # the one that left, and one that never did
            async with raw(server.base_url, who) as client:
                response = await client.post(CHAT, json=body(messages, stream=stream))
                assert response.status_code == 200
    assert upstream.calls[0].body == upstream.calls[1].body == upstream.calls[2].body


@pytest.mark.parametrize(
    ("messages", "before"), [(SHORT, []), (LONG, []), (LONG, FIRST)], ids=["bypass", "paged", "later"]
)
async def test_a_client_that_leaves_in_mid_stream_cancels_the_call(
    server: ServerProcess, messages: list[dict[str, Any]], before: list[Step]
) -> None:
    """And what it had read of the answer is not remembered: asked again, it goes as it went."""
    key, reached = new_key(), asyncio.Event()
    text = "word " * 60  # above stream.hold_tokens, so that it flows

    def stays(request: dict[str, Any]) -> Stream:
        return pieces(request, text, 20, reached.set, Hang())

    last = len(before)
    async with scripted(*before, stays, message_of("now"), message_of("now"), port=PORT) as upstream:
        async with raw(server.base_url, key) as client:
            async with client.stream("POST", CHAT, json=body(messages, stream=True)) as response:
                lines = response.aiter_lines()  # kept: a dropped iterator closes the connection
                async for line in lines:
                    if "word" in line:
                        break
                assert await happens(reached, 5)
        assert await left(upstream.calls[last])
        for who in (key, new_key()):
            async with raw(server.base_url, who) as client:
                again = await client.post(CHAT, json=body(messages, stream=True))
                assert again.status_code == 200
    assert upstream.calls[0].body == upstream.calls[last + 1].body == upstream.calls[last + 2].body


async def test_a_client_that_leaves_while_a_later_round_waits_cancels_it(
    server: ServerProcess,
) -> None:
    async with scripted(search("depot 0"), Hang(), port=PORT) as upstream:
        async with raw(server.base_url) as client:
            task = asyncio.create_task(client.post(CHAT, json=body(LONG)))
            await upstream.wait_for_calls(2)
            task.cancel()
            await asyncio.wait((task,))
        assert await left(upstream.calls[1])


# ---------------------------------------------------------------- the disk


ON_DISK = {"l2": {"url": None}}  # whatever the other tests store in


def limit_file_size(server: ServerProcess) -> tuple[int, int]:
    """From now on the server cannot make its files longer, root or not: the disk is full for it."""
    sizes = [f.stat().st_size for f in (server.dir / "data").iterdir() if f.is_file()]
    hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)[1]
    return resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (max(sizes), hard))


@pytest.mark.parametrize("messages", [SHORT, LONG], ids=["bypass", "paged"])
async def test_a_full_disk_loses_memory_and_no_answer(messages: list[dict[str, Any]]) -> None:
    steps = [message_of("kept"), message_of("given"), message_of("given"), message_of("back")]
    following = [*messages, message_of("kept"), {"role": "user", "content": "go on"}]
    with ServerProcess(config(PORT, tiers=ON_DISK)) as server:
        async with scripted(*steps, port=PORT) as upstream, raw(server.base_url) as client:
            assert (await client.post(CHAT, json=body(messages))).status_code == 200
            before = limit_file_size(server)

            ready = await client.get("/ready")
            assert ready.status_code == 503
            assert str(server.dir / "data") in ready.json()["reason"]
            assert (await client.get("/health")).status_code == 200

            response = await client.post(CHAT, json=body(following))
            assert (response.status_code, response.headers["x-llm-pager-memory"]) == (200, "lost")
            assert "given" in response.text

            text, ended = await read_stream(client, body(following, stream=True))
            assert ended and "given" in text and text.endswith("data: [DONE]\n\n")
            assert "\n: x-llm-pager-memory: lost\n" in text

            new = {"x-llm-pager-session": "s"}
            response = await client.post(CHAT, json=body(SHORT), headers=new)
            assert_error(response, 503, "storage_unavailable")
            assert response.headers["retry-after"] == "1"

            resource.prlimit(server.pid, resource.RLIMIT_FSIZE, before)
            assert (await client.get("/ready")).status_code == 200
            response = await client.post(CHAT, json=body(following))
            assert response.status_code == 200 and "x-llm-pager-memory" not in response.headers
            assert "llm_pager_memory_lost_total 2.0" in (await client.get("/metrics")).text
        assert upstream.calls[1].body == upstream.calls[3].body


async def test_ready_says_why_when_the_state_directory_is_gone() -> None:
    with ServerProcess(config(PORT, tiers=ON_DISK)) as server:
        async with raw(server.base_url) as client:
            assert (await client.get("/ready")).json() == {"status": "ready"}
            data = server.dir / "data"
            shutil.move(data, server.dir / "moved")
            data.write_text("a file stands where the directory was")
            response = await client.get("/ready")
    assert response.status_code == 503
    assert response.json()["status"] == "unavailable"
    assert str(data) in response.json()["reason"]


def test_a_state_directory_that_cannot_be_used_is_said_at_start() -> None:
    server = ServerProcess(config(PORT, tiers=ON_DISK))
    (server.dir / "data").write_text("not a directory")
    with pytest.raises(RuntimeError, match="data is not a directory"):
        server.start()


# ---------------------------------------------------------------- invariant 1


def without(*words: str, says: str) -> Any:
    """An upstream that refuses requests in which a word stands."""

    def step(request: dict[str, Any]) -> Any:
        if any(word in json.dumps(request) for word in words):
            return error(400, says)
        return answer(request, message_of("understood"))

    return step


@STREAMED
async def test_invariant_1_a_model_that_refuses_tools(server: ServerProcess, stream: bool) -> None:
    model = f"local-plain-{stream}"
    picky = without('"tools"', says="tools is not supported with this model")
    async with scripted(picky, picky, picky, port=PORT) as upstream, raw(server.base_url) as client:
        sent = body(LONG, model=model, stream=stream)
        response = await client.post(CHAT, json=sent)
        assert response.status_code == 200
        assert_no_vm(response.text)
        assert_paged(upstream.calls[0])
        assert upstream.calls[1].body == response.request.content  # unchanged, to the byte
        more = [*LONG, message_of("understood"), {"role": "user", "content": "and depot 3?"}]
        assert (await client.post(CHAT, json=body(more, model=model))).status_code == 200
    assert_paged(upstream.calls[2], tools=False)
    assert "tools" not in upstream.calls[2].json


async def test_invariant_1_a_model_that_refuses_the_developer_role(server: ServerProcess) -> None:
    model = "gpt-4o-2024-08-06"  # its card knows the role
    picky = without('"developer"', says="Invalid value: 'developer'. Supported values are: ...")
    async with scripted(picky, picky, picky, port=PORT) as upstream, raw(server.base_url) as client:
        response = await client.post(CHAT, json=body(LONG, model=model))
        assert response.status_code == 200
        assert upstream.calls[1].body == response.request.content
        more = [*LONG, message_of("understood"), {"role": "user", "content": "and depot 3?"}]
        assert (await client.post(CHAT, json=body(more, model=model))).status_code == 200
    assert upstream.calls[0].json["messages"][0]["role"] == "developer"
    assert_paged(upstream.calls[2])
    assert upstream.calls[2].json["messages"][0]["role"] == "system"


async def test_invariant_1_what_was_learned_survives_a_restart() -> None:
    model, picky = "local-old", without('"tools"', says="this model does not support function calls")
    with ServerProcess(config(PORT)) as server:
        async with scripted(picky, picky, picky, port=PORT) as upstream:
            async with raw(server.base_url, "sk-the-same") as client:
                assert (await client.post(CHAT, json=body(LONG, model=model))).status_code == 200
            server.kill()
            server.restart()
            async with raw(server.base_url, "sk-the-same") as client:
                assert (await client.post(CHAT, json=body(LONG, model=model))).status_code == 200
        assert_paged(upstream.calls[2], tools=False)


async def test_what_one_key_was_refused_binds_no_other(server: ServerProcess) -> None:
    model, picky = "local-older", without('"tools"', says="this model does not support function calls")
    steps: list[Step] = [picky, picky, message_of("fine")]
    async with scripted(*steps, port=PORT) as upstream:
        for key in ("sk-one", "sk-two"):
            async with raw(server.base_url, key) as client:
                assert (await client.post(CHAT, json=body(LONG, model=model))).status_code == 200
    assert "tools" in upstream.calls[2].json


async def test_invariant_1_when_the_unchanged_request_fails_too_its_refusal_counts(
    server: ServerProcess,
) -> None:
    """Nothing is learned from it: the next request has its tools."""
    no = error(400, "tools are wrong", code="first")
    steps: list[Step] = [no, error(400, "you are wrong", code="second"), message_of("fine")]
    async with scripted(*steps, port=PORT) as upstream, raw(server.base_url) as client:
        response = await client.post(CHAT, json=body(LONG))
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "second"
        assert (await client.post(CHAT, json=body(LONG))).status_code == 200
    assert_paged(upstream.calls[2])


async def test_a_request_that_was_not_changed_is_not_sent_twice(server: ServerProcess) -> None:
    async with scripted(error(400, "tools are wrong"), port=PORT) as upstream:
        async with raw(server.base_url) as client:
            assert (await client.post(CHAT, json=body(SHORT))).status_code == 400
    assert names_of(upstream.calls[0]) == []


async def test_a_fault_after_a_failure_still_finds_its_page(server: ServerProcess) -> None:
    """A turn that failed after a page was loaded does not leave the page marked as loaded."""
    steps: list[Step] = [
        fault("msg_0001"), error(500, "down"), fault("msg_0001"), message_of("it is there"),
    ]
    async with scripted(*steps, port=PORT) as upstream, raw(server.base_url) as client:
        assert (await client.post(CHAT, json=body(LONG))).status_code == 500
        assert (await client.post(CHAT, json=body(LONG))).status_code == 200
    assert upstream.calls[1].body == upstream.calls[3].body
    assert "promoted_to_working_set" in texts_of(upstream.calls[3])


# ---------------------------------------------------------------- too long, and nobody says so

LONGER = ask(pairs=80)


@pytest.fixture(scope="module")
def roomy() -> Iterator[ServerProcess]:
    """A server whose window is large enough for a request to be large."""
    with ServerProcess(config(PORT, tiers={"l0": {"tokens": 12_000, "reserve_tokens": 500}})) as process:
        yield process


@pytest.mark.parametrize("seed", range(4))
@STREAMED
async def test_a_prompt_too_long_for_an_unknown_model_is_answered_or_upstream_is_quoted(
    roomy: ServerProcess, stream: bool, seed: int
) -> None:
    """Whatever it says, within two further calls; and the same request is answered the third time."""
    rng = random.Random(seed)
    status = rng.choice((400, 413, 422, 500, 502, 529))
    text = rng.choice((b"", rng.randbytes(40), "请求过长".encode(), b'{"error": {"message": "E%d"}}' % seed))

    def respond(request: dict[str, Any], _: int) -> Any:
        if count_request_tokens(request) > 4000:
            return Response(text, status)
        return answer(request, message_of("it fits"))

    upstream = RecordingUpstream(respond)
    upstream.port = PORT
    async with upstream, raw(roomy.base_url) as client:
        for calls in (range(2, 4), range(1, 4), range(1, 2)):
            before = len(upstream.calls)
            response = await client.post(CHAT, json=body(LONGER, model=f"house-{stream}-{seed}", stream=stream))
            assert response.status_code == 200 and "fits" in response.text
            assert_no_vm(response.text)
            assert len(upstream.calls) - before in calls


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unknown_models_first_words_reach_the_client_when_nothing_helps(
    roomy: ServerProcess, stream: bool
) -> None:
    left = iter(range(100))

    def respond(_: dict[str, Any], __: int) -> Any:
        return Response(b"no", 418, ((b"x-nth", b"%d" % next(left)),))

    upstream = RecordingUpstream(respond)
    upstream.port = PORT
    async with upstream, raw(roomy.base_url) as client:
        response = await client.post(CHAT, json=body(LONGER, model=f"teapot-{stream}", stream=stream))
    assert (response.status_code, response.text, response.headers["x-nth"]) == (418, "no", "0")
    assert len(upstream.calls) <= 3
