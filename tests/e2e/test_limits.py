"""Figure 7, the limits: messages larger than the window, requests that are wrong, models that loop.

Promises: what is too large is paged in parts, and what cannot be paged is upstream's to judge; what is
wrong gets OpenAI's error shape; a model that never stops calling VM tools is stopped, and every call of it
gets a result that it can act on.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.e2e.harness import (
    RecordingUpstream,
    ServerProcess,
    answer,
    call,
    check_openai_rules,
    count_request_tokens,
    count_text,
    error,
    free_port,
    in_process_server,
    message_of,
)
from tests.e2e.talk import (
    BUDGET_TOKENS,
    CHAT,
    L0_TOKENS,
    MODEL,
    Step,
    ask,
    assert_error,
    assert_no_vm,
    assert_paged,
    body,
    config,
    fact,
    fault,
    history,
    names_of,
    new_key,
    raw,
    read_stream,
    results_of,
    scripted,
    search,
    talker,
    texts_of,
    tool,
)

PORT = free_port()
BODY_LIMIT_BYTES = 300_000


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    limit = {"body_limit_bytes": BODY_LIMIT_BYTES}
    with ServerProcess(config(PORT, server=limit)) as process:
        yield process


# ---------------------------------------------------------------- larger than the window

SENTENCES = [f"Depot {i} keeps {i * 31 % 97} crates of {fact(i)} behind door {i}." for i in range(400)]
HUGE = " ".join(SENTENCES)  # about 8,000 tokens: four windows
PNG = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "low"}}
READ = tool("read_file", path={"type": "string"})
USE = message_of(None, [call("call_r", "read_file", {"path": "/log"})])

LARGE: dict[str, list[dict[str, Any]]] = {
    "string": [{"role": "user", "content": HUGE}],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "See:"}, {"type": "text", "text": HUGE}]}
    ],
    "parts-with-image": [{"role": "user", "content": [{"type": "text", "text": HUGE}, PNG]}],
    "tool-result": [
        {"role": "user", "content": "Read the log."},
        USE,
        {"role": "tool", "tool_call_id": "call_r", "content": HUGE},
    ],
    "one-word": [{"role": "user", "content": "x" + "yz" * 20_000}],
    "after-history": [*history(4), {"role": "user", "content": HUGE}],
}


@pytest.mark.parametrize("kind", LARGE)
async def test_a_message_larger_than_the_window_is_paged_in_parts(
    server: ServerProcess, kind: str
) -> None:
    messages = LARGE[kind]
    tools = {"tools": [READ]} if kind == "tool-result" else {}
    position = len(messages)
    page = f"msg_{position:04d}.4"
    async with scripted(fault(page), message_of("Found it."), port=PORT) as upstream:
        async with talker(server.base_url) as client:
            done = await client.chat.completions.create(
                model=MODEL, messages=messages, **tools
            )
    assert done.choices[0].message.content == "Found it."
    for request in upstream.calls:
        assert_paged(request)
        assert f"msg_{position:04d}.1" in texts_of(request)  # the model is told what to ask for
    loaded = results_of(upstream.calls[1])[0]["page"]
    assert loaded["page_id"] == page
    assert len(loaded["content"]["text"]) > 100
    assert loaded["content"]["text"][:60] in (HUGE if kind != "one-word" else "yz" * 20_000)


async def test_every_part_of_a_large_message_can_be_loaded(server: ServerProcess) -> None:
    """Turn by turn, all parts: together they are the message, whole and in order."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": HUGE}]
    collected: list[str] = []
    async with talker(server.base_url) as client:
        for part in range(1, 200):
            steps = [fault(f"msg_0001.{part}"), message_of(f"part {part}")]
            async with scripted(*steps, port=PORT) as upstream:
                await client.chat.completions.create(model=MODEL, messages=messages)
            result = results_of(upstream.calls[1])[0]
            if "page" not in result:
                assert "no page" in result["error"]
                break
            assert result["page"]["level"] == 0
            collected.append(result["page"]["content"]["text"])
            messages += [message_of(f"part {part}"), {"role": "user", "content": f"next {part}"}]
    assert len(collected) > L0_TOKENS // 256
    assert "".join(collected) == HUGE


async def test_a_search_finds_what_is_cut_from_the_newest_message(server: ServerProcess) -> None:
    """The middle of the message is in no window; its parts are found by what they say."""
    steps = [search(f"crates of {fact(200)}"), message_of("There.")]
    async with scripted(*steps, port=PORT) as upstream, raw(server.base_url) as client:
        messages = [{"role": "user", "content": HUGE}]
        assert (await client.post(CHAT, json=body(messages))).status_code == 200
    assert fact(200) not in texts_of(upstream.calls[0])
    found = [entry["page_id"] for entry in results_of(upstream.calls[1])[0]["results"]]
    assert found
    assert all(page.startswith("msg_0001.") for page in found)


async def test_system_messages_that_exceed_the_window_leave_room_for_a_conversation(
    server: ServerProcess,
) -> None:
    """They go up as they are; what can be paged is paged beside them."""
    system = {"role": "system", "content": HUGE}
    async with scripted(message_of("fine"), message_of("fine"), port=PORT) as upstream:
        async with raw(server.base_url) as client:
            long = await client.post(CHAT, json=body([system, *ask()]))
            short = await client.post(CHAT, json=body(ask()))
    assert (long.status_code, short.status_code) == (200, 200)
    assert "tiers.l0.tokens" in long.headers["x-llm-pager-warning"]
    assert "x-llm-pager-warning" not in short.headers
    assert upstream.calls[0].json["messages"][0] == system
    for recorded in upstream.calls:
        assert b"<VM:RULES>" in recorded.body


async def test_the_clients_max_tokens_raises_the_reserve(server: ServerProcess) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        async with scripted(message_of("fine"), port=PORT) as upstream:
            async with raw(server.base_url) as client:
                sent = body(ask(), **{name: 900})
                assert (await client.post(CHAT, json=sent)).status_code == 200
        assert count_request_tokens(upstream.calls[0].json) <= L0_TOKENS - 900
        assert upstream.calls[0].json[name] == 900


# ---------------------------------------------------------------- requests that are wrong

HELLO = {"role": "user", "content": "hello"}
WRONG: list[tuple[str, Any]] = [
    ("not json", b"{"),
    ("empty body", b""),
    ("bytes after the end", b'{"model":"m","messages":[]} x'),
    ("not utf-8", b'{"model":"m","messages":[{"role":"user","content":"\xff"}]}'),
    ("bad utf-8 in model", b'{"model":"\xff","messages":[{"role":"user","content":"x"}]}'),
    ("an array", b"[]"),
    ("null", b"null"),
    ("no messages", {"model": "m"}),
    ("messages null", {"model": "m", "messages": None}),
    ("messages a string", {"model": "m", "messages": "hi"}),
    ("messages an object", {"model": "m", "messages": HELLO}),
    ("messages of strings", {"model": "m", "messages": ["hi"]}),
    ("messages empty", {"model": "m", "messages": []}),
    ("no model", {"messages": [HELLO]}),
    ("model null", {"model": None, "messages": [HELLO]}),
    ("model empty", {"model": "", "messages": [HELLO]}),
    ("model a number", {"model": 4, "messages": [HELLO]}),
    ("stream a string", {"model": "m", "messages": [HELLO], "stream": "yes"}),
    ("n a string", {"model": "m", "messages": [HELLO], "n": "2"}),
    ("tools an object", {"model": "m", "messages": [HELLO], "tools": {}}),
    ("metadata a list", {"model": "m", "messages": [HELLO], "metadata": []}),
    ("stream_options a list", {"model": "m", "messages": [HELLO], "stream_options": []}),
    ("response_format a string", {"model": "m", "messages": [HELLO], "response_format": "json"}),
]


@pytest.mark.parametrize("sent", [w[1] for w in WRONG], ids=[w[0] for w in WRONG])
async def test_a_wrong_request_is_upstreams_to_judge(server: ServerProcess, sent: Any) -> None:
    """Its bytes go up unchanged; upstream's status, headers and body come back unchanged."""
    content = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
    said = error(422, "not like this", code="upstream_said", headers=[(b"x-request-id", b"r7")])
    upstream = RecordingUpstream(lambda *_: said, enforce_rules=False)
    upstream.port = PORT
    async with upstream, raw(server.base_url) as client:
        for path in (CHAT, "/chat/completions"):
            response = await client.post(
                path, content=content, headers={"content-type": "application/json"}
            )
            assert response.status_code == 422
            assert response.content == said.body
            assert response.headers["x-request-id"] == "r7"
            assert upstream.calls[-1].body == content
            assert upstream.calls[-1].header("content-type") == "application/json"
    assert len(upstream.calls) == 2


ODD: dict[str, list[Any]] = {
    "content a number": [{"role": "user", "content": 7}],
    "content an object": [{"role": "user", "content": {"a": 1}}],
    "parts of strings": [{"role": "user", "content": ["a", 1, None]}],
    "part without text": [{"role": "user", "content": [{"type": "text"}]}],
    "image without url": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 3, "detail": "low"}}]}],
    "role a number": [{"role": 3, "content": "x"}],
    "no role": [{"content": "x"}],
    "no content": [{"role": "user"}],
    "calls a number": [{"role": "assistant", "tool_calls": 5}, HELLO],
    "calls of numbers": [{"role": "assistant", "tool_calls": [5, None]}, HELLO],
    "call without function": [{"role": "assistant", "tool_calls": [{"id": "a"}]}, HELLO],
    "function a string": [{"role": "assistant", "tool_calls": [{"id": "a", "function": "f"}]}, HELLO],
    "arguments an object": [
        {"role": "assistant", "tool_calls": [{"id": 1, "function": {"name": 2, "arguments": {}}}]},
        HELLO,
    ],
    "function_call a list": [{"role": "assistant", "function_call": [1]}, HELLO],
    "tool alone": [{"role": "tool", "tool_call_id": 4, "content": "x"}],
    "name an object": [{"role": "user", "name": {}, "content": "x"}],
}
ODD_FIELDS: list[dict[str, Any]] = [
    {"tool_choice": 5}, {"tool_choice": ["auto"]}, {"tools": [5, None, {}]}, {"tools": [{"function": 3}]},
    {"max_tokens": "many"}, {"max_tokens": -5}, {"user": 5}, {"n": -1},
    {"tools": [{"type": "function", "function": {"name": 5, "parameters": 7}}]},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": [1]}}}]},
    {"stream_options": None, "metadata": None, "response_format": None, "tools": None, "n": None},
]


@pytest.mark.parametrize("pairs", [0, 20], ids=["bypass", "paged"])
async def test_what_is_upstreams_to_judge_reaches_upstream(server: ServerProcess, pairs: int) -> None:
    """Whatever stands in a message or a field, it is answered by upstream and not by a failure of ours."""

    def judge(request: dict[str, Any]) -> Any:
        return error(400, "; ".join(check_openai_rules(request)) or "odd", code="upstream_said")

    async with raw(server.base_url) as client:
        requests = [body([*history(pairs), *odd]) for odd in ODD.values()]
        requests += [body([*history(pairs), HELLO], **fields) for fields in ODD_FIELDS]
        for sent in requests:
            upstream = RecordingUpstream(lambda request, _: judge(request), enforce_rules=False)
            upstream.port = PORT
            async with upstream:
                response = await client.post(CHAT, json=sent)
            odd_part = json.dumps(sent)[-150:]
            assert response.status_code == 400, (odd_part, response.text)
            assert response.json()["error"]["code"] == "upstream_said", (odd_part, response.text)
            assert not upstream.failures


async def test_a_body_over_the_limit(server: ServerProcess) -> None:
    content = json.dumps(body([{"role": "user", "content": "a" * BODY_LIMIT_BYTES}])).encode()

    async def chunked() -> AsyncIterator[bytes]:
        for at in range(0, len(content), 60_000):
            yield content[at : at + 60_000]

    async with scripted(port=PORT), raw(server.base_url) as client:
        for sent in (content, chunked()):
            response = await client.post(CHAT, content=sent)
            found = assert_error(response, 413, "request_too_large")
            assert found["type"] == "invalid_request_error"
            assert str(BODY_LIMIT_BYTES) in found["message"]
        assert (await client.get("/health")).status_code == 200


async def test_a_body_just_within_the_limit_is_served(server: ServerProcess) -> None:
    empty = len(json.dumps(body([{"role": "user", "content": ""}])))
    text = "word " * ((BODY_LIMIT_BYTES - empty) // 5)
    content = json.dumps(body([{"role": "user", "content": text}])).encode()
    assert BODY_LIMIT_BYTES - 5 <= len(content) <= BODY_LIMIT_BYTES

    async def chunked() -> AsyncIterator[bytes]:
        for at in range(0, len(content), 60_000):
            yield content[at : at + 60_000]

    for sent in (content, chunked()):
        async with scripted(message_of("read"), port=PORT) as upstream, raw(server.base_url) as client:
            assert (await client.post(CHAT, content=sent)).status_code == 200
        assert_paged(upstream.calls[0])


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
async def test_another_method_is_upstreams_to_answer(server: ServerProcess, method: str) -> None:
    async with scripted(port=PORT) as upstream, raw(server.base_url) as client:
        response = await client.request(method, f"{CHAT}?limit=2")
        assert response.status_code == 200
    assert [(o.method, o.target) for o in upstream.others] == [(method, f"{CHAT}?limit=2")]


async def test_a_browsers_preflight_is_upstreams_to_answer(server: ServerProcess) -> None:
    async with scripted(port=PORT) as upstream, raw(server.base_url) as client:
        assert (await client.options(CHAT, headers={"origin": "http://a"})).status_code == 200
    assert [(o.method, o.target, o.header("origin")) for o in upstream.others] == [
        ("OPTIONS", CHAT, "http://a")
    ]


async def test_a_wrong_method_on_health(server: ServerProcess) -> None:
    async with raw(server.base_url) as client:
        response = await client.post("/health")
    assert_error(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "GET"


async def test_a_body_in_an_unknown_encoding_goes_up_as_it_is(server: ServerProcess) -> None:
    content = b"\xff\x06\x00\x00sNaPpY"
    upstream = RecordingUpstream(lambda *_: error(415, "no snappy here"), enforce_rules=False)
    upstream.port = PORT
    async with upstream, raw(server.base_url) as client:
        response = await client.post(CHAT, content=content, headers={"content-encoding": "snappy"})
    assert response.status_code == 415
    assert response.json()["error"]["message"] == "no snappy here"
    assert upstream.calls[0].body == content
    assert upstream.calls[0].header("content-encoding") == "snappy"


# ---------------------------------------------------------------- models that loop


class Loop:
    """A model that goes on calling; `message(i)` is what it says in round i, `stops`: unless it may not."""

    def __init__(self, message: Any, stops: bool = False) -> None:
        self.message = message
        self.stops = stops

    async def run(self, limits: dict[str, Any], stream: bool, **fields: Any) -> tuple[Any, str]:
        """(the upstream's calls, the client's text)."""
        def reply(request: dict[str, Any], i: int) -> Any:
            stopped = self.stops and request.get("tool_choice") == "none"
            return answer(request, message_of("enough") if stopped else self.message(i))

        upstream = RecordingUpstream(reply)
        async with upstream:
            with in_process_server(config(upstream, faults=limits)) as base_url:
                async with raw(base_url) as client:
                    sent = body(ask(), stream=stream, **fields)
                    if stream:
                        text, ended = await read_stream(client, sent)
                        assert ended
                    else:
                        response = await client.post(CHAT, json=sent)
                        assert response.status_code == 200
                        text = response.text
        assert not upstream.failures
        assert upstream.violations == []
        for request in upstream.calls:
            assert_paged(request, tools="search_pages" in names_of(request))
        return upstream.calls, text


def words_of(text: str) -> str:
    """The text in a streamed answer."""
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    return "".join(c["delta"].get("content") or "" for one in chunks for c in one["choices"])


def finish_of(text: str) -> list[str]:
    """The finish reasons in a whole or streamed answer."""
    if text.startswith("data:"):
        datas = [line[6:] for line in text.splitlines() if line.startswith("data: {")]
        choices = [c for d in datas for c in json.loads(d)["choices"]]
    else:
        choices = json.loads(text)["choices"]
    return [c["finish_reason"] for c in choices if c["finish_reason"]]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("tools", [{}, {"tools": [READ]}], ids=["alone", "with-tools"])
async def test_a_model_that_never_stops_searching(stream: bool, tools: dict[str, Any]) -> None:
    def message(i: int) -> dict[str, Any]:
        return search(f"nothing{i}", f"call_{i}") if i < 6 else message_of("nothing found")

    limits = {"max_rounds": 5, "max_per_turn": 100}
    (*listed, told, first, second), text = await Loop(message).run(limits, stream, **tools)
    assert len(listed) == 4 and told.json["tool_choice"] == "none"
    assert all("tool_choice" not in c.json for c in (*listed, first, second))
    assert len({json.dumps(c.json["tools"]) for c in (*listed, told)}) == 1
    assert "search_pages" not in names_of(first) + names_of(second)  # it was told, and called again
    assert "nothing found" in (text if not stream else words_of(text))
    assert_no_vm(text)
    assert finish_of(text) == ["stop"]
    assert text.count("[DONE]") == (1 if stream else 0)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_faults_max_per_turn(stream: bool) -> None:
    def message(i: int) -> dict[str, Any]:
        return fault(f"msg_{2 * i + 1:04d}", f"call_{i}") if i < 3 else message_of("enough")

    calls, text = await Loop(message).run({"max_per_turn": 2}, stream)
    assert [c.json.get("tool_choice") for c in calls] == [None, None, "none", None]
    assert not names_of(calls[-1])  # the third was told to answer and did not: it is asked once more
    assert [r["page"]["page_id"] for r in results_of(calls[-2], 2)] == ["msg_0001", "msg_0003"]
    assert_no_vm(text)
    assert finish_of(text) == ["stop"]


async def test_faults_max_per_turn_beside_the_clients_tools() -> None:
    """There the model may still call the client's tools, so VM calls get an error it can read."""

    def message(i: int) -> dict[str, Any]:
        return fault(f"msg_{2 * i + 1:04d}", f"call_{i}") if i < 4 else message_of("enough")

    calls, text = await Loop(message).run({"max_per_turn": 2, "max_rounds": 6}, False, tools=[READ])
    assert len(calls) == 5
    assert all("tool_choice" not in c.json for c in calls)
    for refused in results_of(calls[-1], 2):
        assert "limit of 2 page faults" in refused["error"]
        assert "answer with what is loaded" in refused["error"]
    assert json.loads(text)["choices"][0]["message"]["content"] == "enough"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_model_whose_results_fill_the_window_is_stopped_before(stream: bool) -> None:
    """Each result takes room; when none is left the model has to answer, rounds left or not."""

    def message(i: int) -> dict[str, Any]:
        return search(f"depot {i}", f"call_{i}")

    loop = Loop(message, stops=True)
    calls, text = await loop.run({"max_rounds": 50, "max_per_turn": 100}, stream)
    assert 2 < len(calls) < 50
    assert calls[-1].json["tool_choice"] == "none"
    assert_no_vm(text)


async def test_parallel_faults_count_one_by_one() -> None:
    pages = [call(f"c{i}", "page_fault", {"page_id": f"msg_{2 * i + 1:04d}"}) for i in range(3)]

    def message(i: int) -> dict[str, Any]:
        return message_of(None, pages) if i == 0 else message_of("enough")

    calls, _ = await Loop(message).run({"max_per_turn": 2}, False)
    assert len(calls) == 2
    one, two, three = results_of(calls[1], 3)
    assert [one["page"]["page_id"], two["page"]["page_id"]] == ["msg_0001", "msg_0003"]
    assert "limit of 2 page faults" in three["error"]


async def test_a_burst_of_calls_is_answered_in_part() -> None:
    """More calls than one round serves are left out of the log, calls and results alike."""
    pages = [call(f"c{i}", "page_fault", {"page_id": f"msg_{i + 1:04d}"}) for i in range(40)]

    def message(i: int) -> dict[str, Any]:
        return message_of(None, pages) if i == 0 else message_of("enough")

    calls, text = await Loop(message).run({"max_per_turn": 2}, False)
    results = [m for m in calls[1].json["messages"] if m["role"] == "tool"]
    assert 2 < len(results) < 40
    assert json.loads(text)["choices"][0]["message"]["content"] == "enough"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    "much",
    [
        message_of(HUGE, [call("call_t", "page_fault", {"page_id": "msg_0001"})]),
        message_of(None, [call("call_t", "page_fault", "[" * 9000)]),
        message_of(None, [call("call_t", "search_pages", {"query": HUGE})]),
    ],
    ids=["words", "brackets", "query"],
)
async def test_a_call_larger_than_the_window_does_not_burst_it(
    much: dict[str, Any], stream: bool
) -> None:
    """What the model says is inside the window from then on; the turn ends well all the same."""

    def message(i: int) -> dict[str, Any]:
        return much if i == 0 else message_of("enough")

    calls, text = await Loop(message).run({}, stream)
    assert len(calls) == 2
    assert "enough" in text


async def test_a_large_call_beside_a_clients_own_does_not_burst_the_next_turn(
    server: ServerProcess,
) -> None:
    """The raw message is kept under the client's call id, and must fit when it comes back."""
    read = call("call_c", "read_file", {"path": "/a"})
    mixed = message_of(None, [call("call_t", "search_pages", {"query": HUGE}), read])
    result = {"role": "tool", "tool_call_id": "call_c", "content": "the file"}
    async with scripted(mixed, message_of("fine"), port=PORT) as upstream:
        async with raw(server.base_url) as client:
            response = await client.post(CHAT, json=body(ask(), tools=[READ]))
            assert response.json()["choices"][0]["message"]["tool_calls"] == [read]
            following = body([*ask(), message_of(None, [read]), result], tools=[READ])
            assert (await client.post(CHAT, json=following)).status_code == 200
    assert_paged(upstream.calls[1])


async def test_max_tokens_per_turn() -> None:
    def message(i: int) -> dict[str, Any]:
        return fault(f"msg_{2 * i + 1:04d}", f"call_{i}") if i < 6 else message_of("enough")

    calls, _ = await Loop(message).run({"max_tokens_per_turn": 250, "max_per_turn": 50}, False)
    results = [json.loads(m["content"]) for m in calls[-1].json["messages"] if m["role"] == "tool"]
    served = [r["page"]["content"]["text"] for r in results if "page" in r]
    assert served
    assert sum(count_text(text) for text in served) <= 250
    assert len(calls) < 8


async def test_max_rounds_one_is_one_call() -> None:
    calls, text = await Loop(lambda i: message_of("at once")).run({"max_rounds": 1}, False)
    assert len(calls) == 1
    assert json.loads(text)["choices"][0]["message"]["content"] == "at once"


WILD: list[tuple[str, str, str]] = [
    ("page_fault", '{"page_id": "msg_9999"}', "pages are msg_0001 to msg_0041"),
    ("page_fault", '{"page_id": "msg_0000"}', "There is no page"),
    ("page_fault", '{"page_id": "../../etc/passwd"}', "There is no page"),
    ("page_fault", '{"page_id": "msg_0001.7"}', "There is no page"),
    ("page_fault", '{"page_id": null}', "needs a page_id"),
    ("page_fault", '{"page_id": ["msg_0001"]}', "needs a page_id"),
    ("page_fault", "{}", "needs a page_id"),
    ("page_fault", "", "not a JSON object"),
    ("page_fault", '{"page_id": "msg_00', "not a JSON object"),
    ("page_fault", "[" * 300, "not a JSON object"),
    ("page_fault", '"msg_0001"', "not a JSON object"),
    ("page_fault", '{"page_id": "msg_0001", "target_level": 9}', "target_level must be"),
    ("page_fault", '{"page_id": "msg_0001", "target_level": "NaN"}', "target_level must be"),
    ("page_fault", '{"page_id": "msg_0001", "target_level": 1e999}', "target_level must be"),
    ("search_pages", '{"query": ""}', "needs a query"),
    ("search_pages", '{"query": {"a": 1}}', "needs a query"),
    ("search_pages", "null", "not a JSON object"),
    ("search_pages", '{"query": "depot", "limit": "many"}', "limit must be"),
    ("search_pages", '{"query": "depot", "modality": "smell"}', "modality must be"),
]
MILD: list[tuple[str, str]] = [
    ("page_fault", '{"page_id": " MSG_0001 "}'),
    ("page_fault", '{"page_id": "[msg_0001]"}'),
    ("page_fault", '{"page_id": 1}'),
    ("page_fault", '"{\\"page_id\\": \\"msg_0001\\"}"'),
    ("page_fault", '{"page_id": "msg_0001", "target_level": "FULL", "why": "because"}'),
    ("search_pages", '{"query": "depot\\" OR * NEAR(", "limit": 9999}'),
    ("search_pages", '{"query": "\\u0000\\ud800 depot", "limit": -3}'),
    ("search_pages", json.dumps({"query": "depot " * 60})),
]


async def test_wild_arguments_get_results_that_the_model_can_use(server: ServerProcess) -> None:
    async with talker(server.base_url) as client:
        for name, arguments, says in WILD:
            wild = message_of(None, [call("call_w", name, arguments)])
            async with scripted(wild, message_of("I see."), port=PORT) as upstream:
                done = await client.chat.completions.create(model=MODEL, messages=ask())
            assert done.choices[0].message.content == "I see."
            assert says in results_of(upstream.calls[1])[0]["error"], (name, arguments)
            assert_paged(upstream.calls[1])
        for name, arguments in MILD:
            mild = message_of(None, [call("call_w", name, arguments)])
            async with scripted(mild, message_of("I see."), port=PORT) as upstream:
                async with talker(server.base_url) as other:
                    await other.chat.completions.create(model=MODEL, messages=ask())
            result = results_of(upstream.calls[1])[0]
            assert "page" in result or result["results"], (name, arguments, result)
            assert count_request_tokens(upstream.calls[1].json) <= BUDGET_TOKENS


async def test_a_page_asked_for_twice_is_given_once(server: ServerProcess) -> None:
    steps: list[Step] = [fault("msg_0001", "a"), fault("msg_0001", "b"), message_of("Yes.")]
    async with scripted(*steps, port=PORT) as upstream, raw(server.base_url, new_key()) as client:
        assert (await client.post(CHAT, json=body(ask()))).status_code == 200
    first, again = results_of(upstream.calls[2], 2)
    assert fact(0) in first["page"]["content"]["text"]
    assert "already" in again["error"]


def test_the_texts_are_as_large_as_these_tests_need() -> None:
    assert count_text(HUGE) > 3 * L0_TOKENS
    assert len(json.dumps(body([{"role": "user", "content": HUGE}]))) < BODY_LIMIT_BYTES
