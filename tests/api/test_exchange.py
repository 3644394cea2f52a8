"""One request on the wire: what of upstream's answer reaches the client, piece by piece.

Promises: the upstream's reply is under the test's control and every message to the client is looked
at; the only clock is `hold_ms`, and what waits for it would wait for ever without it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest

from proxy import upstream
from proxy.api.exchange import Exchange, Patience, error_event
from proxy.config import Config
from proxy.conversation.channel import TOOLS, Channel, vm_names
from proxy.conversation.effects import Complete, Refused, Said
from proxy.conversation.report import TurnReport
from proxy.conversation.sieve import Sieve
from proxy.conversation.turn import Answer
from proxy.errors import ApiError
from proxy.upstream import Header, UpstreamBroken
from tests.conversation.test_chunks import ERRORS

SSE = [(b"content-type", b"text/event-stream"), (b"x-request-id", b"r1")]
JSON = [(b"content-type", b"application/json"), (b"content-length", b"999"), (b"x-request-id", b"r1")]
DONE = b"data: [DONE]\n\n"
WAIT_S = 5


class Reply(upstream.Reply):
    """Chunks; an Event among them is waited for, an exception is raised."""

    def __init__(
        self, *steps: bytes | asyncio.Event | Exception, status: int = 200, headers: Any = SSE
    ) -> None:
        self.status = status
        self.headers: list[Header] = list(headers)
        self.steps = steps
        self.closed = False

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        for step in self.steps:
            if isinstance(step, bytes):
                yield step
            elif isinstance(step, Exception):
                raise step
            else:
                await step.wait()

    async def close(self) -> None:
        self.closed = True


class Setup:
    """An exchange over scripted replies, and all that the client was sent."""

    def __init__(
        self, *replies: Any, stream: bool = True, hold_ms: float = 60_000, retries: int = 0,
        retry_wait_s: float = 10.0, every_s: float = 0.0,
    ) -> None:
        self.replies = list(replies)
        self.bodies: list[bytes] = []
        self.sent: list[dict[str, Any]] = []
        self.grew = asyncio.Condition()

        def sieve() -> Sieve:
            ours = Channel(TOOLS, True, vm_names(), frozenset({"read", "write"}), True)
            return Sieve(ours, 24, hold_ms, False, False, lambda text: len(text.split()), event_limit_bytes=9_000)

        config = Config.model_validate({
            "server": {"body_limit_bytes": 10_000}, "upstream": {"retries": retries, "retry_wait_s": retry_wait_s},
            "stream": {"keepalive_s": every_s, "event_limit_bytes": 9_000},
        })
        self.exchange = Exchange(self._send, self, [], b"", stream, sieve, config)  # type: ignore[arg-type]

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
        async with self.grew:
            self.grew.notify_all()

    async def chat(self, body: bytes, headers: Sequence[Header], query: bytes = b"") -> Any:
        self.bodies.append(body)
        return self.replies[len(self.bodies) - 1]

    async def seen(self, text: bytes) -> None:
        """Wait until the client has been sent `text`."""
        async with self.grew:
            await asyncio.wait_for(self.grew.wait_for(lambda: text in self.body), WAIT_S)

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.sent)

    @property
    def start(self) -> dict[str, Any]:
        starts = [m for m in self.sent if m["type"] == "http.response.start"]
        assert len(starts) == 1
        return starts[0]

    @property
    def ended(self) -> bool:
        bodies = [m for m in self.sent if m["type"] == "http.response.body"]
        return bool(bodies) and not bodies[-1].get("more_body", False)


def event(content: str | None = None, finish: str | None = None, **delta: Any) -> bytes:
    if content is not None:
        delta["content"] = content
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def vm_call() -> bytes:
    function = {"name": "page_fault", "arguments": '{"page_id": "msg_0001"}'}
    return event(tool_calls=[{"index": 0, "id": "v", "type": "function", "function": function}])


def answer(**fields: Any) -> Answer:
    return Answer(TurnReport("m", "tools", 1), **fields)


async def test_stream_without_paging_is_the_upstreams_bytes() -> None:
    odd = b": ping\n\ndata: {\"choices\": []}\r\n\r\nda"
    setup = Setup(Reply(event("a"), odd, b"ta: [DO", b"NE]\n\n"))
    said = await setup.exchange.complete(Complete(b"{}", through=True))
    assert isinstance(said, Said)
    assert not setup.ended
    assert b"[DONE]" not in setup.body  # the end waits until the turn is stored
    await setup.exchange.finish(answer(), [])
    assert setup.body == event("a") + odd + b"ta: [DONE]\n\n"
    assert setup.ended


async def test_each_piece_leaves_before_the_next_one_comes() -> None:
    go_on = asyncio.Event()
    setup = Setup(Reply(event("one"), go_on, event("two", "stop"), DONE))
    task = asyncio.ensure_future(setup.exchange.complete(Complete(b"{}", through=True)))
    await setup.seen(b"one")
    go_on.set()
    said = await asyncio.wait_for(task, WAIT_S)
    assert isinstance(said, Said)
    assert said.messages == [{"role": "assistant", "content": "onetwo"}]


@pytest.mark.parametrize("through", [True, False])
async def test_opening_delta_leaves_before_the_first_words_come(through: bool) -> None:
    go_on, opening = asyncio.Event(), event("", role="assistant")
    setup = Setup(Reply(opening, go_on, event("word", "stop"), DONE))
    work = asyncio.ensure_future(setup.exchange.complete(Complete(LARGE, offer=not through, through=through)))
    await setup.seen(opening)
    assert b"word" not in setup.body and not work.done()
    go_on.set()
    assert isinstance(await work, Said)
    await setup.exchange.finish(answer(finish_reason="stop"), [])
    said = [chunk["choices"][0]["delta"] for chunk in chunks_in(setup.body)]
    assert [delta.get("content") for delta in said if delta.get("content")] == ["word"]
    assert ["role" in delta for delta in said] == [True] + [False] * (len(said) - 1)


async def test_held_preamble_leaves_when_its_time_is_over() -> None:
    go_on = asyncio.Event()
    reply = Reply(event("wait", role="assistant"), go_on, event(None, "stop"), DONE)
    setup = Setup(reply, hold_ms=30)
    task = asyncio.ensure_future(setup.exchange.complete(Complete(b"{}", offer=True)))
    await setup.seen(b"wait")
    go_on.set()
    assert isinstance(await asyncio.wait_for(task, WAIT_S), Said)


async def test_two_rounds_look_like_one_answer() -> None:
    first = Reply(event("let me look", role="assistant"), vm_call(), event(None, "tool_calls"), DONE)
    second = Reply(event("here", role="assistant"), event(None, "stop"), DONE, headers=[])
    setup = Setup(first, second)
    await setup.exchange.complete(Complete(b"1", offer=True))
    said = await setup.exchange.complete(Complete(b"2", offer=True))
    assert isinstance(said, Said)
    assert first.closed and second.closed
    assert said.shown == {"role": "assistant", "content": "here"}
    await setup.exchange.finish(answer(finish_reason="stop"), [])
    assert dict(setup.start["headers"]) == dict(SSE)
    assert b"look" not in setup.body and b"page_fault" not in setup.body
    assert setup.body.count(b"[DONE]") == setup.body.count(b'"stop"') == setup.body.count(b'"role"') == 1


def whole(finish: str | None = "stop", **message: Any) -> Reply:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    response = {"id": "other", "object": "chat.completion", "created": 2, "model": "m"}
    body = json.dumps({**response, "choices": [choice], "usage": usage}).encode()
    return Reply(body, headers=JSON)


def chunks_in(body: bytes) -> list[dict[str, Any]]:
    return [json.loads(e[6:]) for e in body.split(b"\n\n") if e.startswith(b"data: {")]


async def streamed_then(last: Reply) -> tuple[Setup, Said]:
    """A streamed round with a VM call, then `last`, to the end of the response."""
    first = Reply(event("", role="assistant"), vm_call(), event(None, "tool_calls"), DONE)
    setup = Setup(first, last)
    await setup.exchange.complete(Complete(b"1", offer=True))
    said = await setup.exchange.complete(Complete(b"2", offer=True))
    assert isinstance(said, Said)
    await setup.exchange.finish(answer(finish_reason=said.finish_reason, usage=said.usage), [])
    return setup, said


@pytest.mark.parametrize("finish", ["stop", None])
async def test_whole_answer_after_a_streamed_round_goes_on_as_its_stream(finish: str | None) -> None:
    setup, said = await streamed_then(whole(finish, content="here", refusal=None))
    assert said.response is None
    assert said.messages == [{"role": "assistant", "content": "here"}] == [said.shown]
    assert said.usage == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    chunks = chunks_in(setup.body)
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert "".join(d.get("content") or "" for d in deltas) == "here"
    assert [d["role"] for d in deltas if "role" in d] == ["assistant"]
    assert chunks[-1]["choices"][0]["finish_reason"] == finish
    assert {(c["id"], c["created"], c["object"]) for c in chunks} == {("c", 1, "chat.completion.chunk")}
    assert b"usage" not in setup.body  # the client did not ask for it
    assert setup.body.endswith(DONE) and setup.ended


async def test_whole_answers_calls_after_a_streamed_round_are_numbered() -> None:
    body = {"arguments": "{}"}
    names = ("read", "page_fault", "write")
    made = [{"id": n, "type": "function", "function": {"name": n, **body}} for n in names]
    setup, said = await streamed_then(whole("tool_calls", content=None, tool_calls=made))
    assert said.messages[0]["tool_calls"] == made
    deltas = [c["choices"][0]["delta"] for c in chunks_in(setup.body)]
    calls = [call for d in deltas for call in d.get("tool_calls") or ()]
    assert [(c["index"], c["id"]) for c in calls] == [(0, "read"), (1, "write")]
    assert b"page_fault" not in setup.body


async def test_later_round_that_is_no_chat_answer_is_an_event_and_a_break() -> None:
    with pytest.raises(UpstreamBroken, match="no chat answer"):
        await streamed_then(Reply(b'{"id": "job_1"}', headers=JSON))


@pytest.mark.parametrize("through", [True, False])
async def test_broken_stream_is_raised_and_closed(through: bool) -> None:
    reply = Reply(event("half"), UpstreamBroken("cut"))
    setup = Setup(reply)
    with pytest.raises(UpstreamBroken):
        await setup.exchange.complete(Complete(b"{}", through=through))
    assert reply.closed
    assert not setup.ended


async def test_sifted_stream_without_an_end_is_broken() -> None:
    setup = Setup(Reply(event("half")))
    with pytest.raises(UpstreamBroken, match="ended before its answer did"):
        await setup.exchange.complete(Complete(b"{}"))
    assert not setup.ended


async def test_cancelled_stream_closes_its_reply() -> None:
    reply = Reply(event("one"), asyncio.Event())
    setup = Setup(reply)
    task = asyncio.ensure_future(setup.exchange.complete(Complete(b"{}")))
    await setup.seen(b"one")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert reply.closed


async def test_whole_answer_has_upstreams_headers_and_our_length() -> None:
    body = b'{"choices": [{"message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}]}'
    setup = Setup(Reply(body[:9], body[9:], headers=JSON), stream=False)
    said = await setup.exchange.complete(Complete(b"{}"))
    assert isinstance(said, Said)
    assert said.messages == [{"role": "assistant", "content": "x"}]
    assert setup.sent == []  # nothing before the turn is stored
    await setup.exchange.finish(answer(), [(b"x-own", b"1")])
    headers = dict(setup.start["headers"])
    assert headers[b"content-length"] == str(len(body)).encode()
    assert headers[b"x-request-id"] == b"r1"
    assert headers[b"x-own"] == b"1"
    assert setup.body == body


@pytest.mark.parametrize(
    "body", [b"<html>", b"[]", b"{}", b'{"choices": 5}', b'{"choices": [{}]}', b"\xff", b"null", b'{"choices": [5]}',
             b'{"choices": %b}' % (b"[" * 4_000 + b"]" * 4_000),
             b'{"choices": [{"message": "text"}]}', b'{"choices": [{"message": null}]}',
             b'{"choices": [{"message": {"content": "\xff"}}]}']
)
async def test_success_that_is_no_chat_answer_is_kept_as_it_is(body: bytes) -> None:
    setup = Setup(Reply(body, headers=JSON), stream=False)
    assert await setup.exchange.complete(Complete(b"{}")) == Said([], None, None)
    await setup.exchange.finish(answer(), [])
    assert setup.body == body


async def test_answer_over_the_limit_is_broken() -> None:
    setup = Setup(Reply(b"x" * 6000, b"x" * 6000, headers=JSON), stream=False)
    with pytest.raises(UpstreamBroken, match="longer than 10000 bytes"):
        await setup.exchange.complete(Complete(b"{}"))


async def test_refusal_keeps_status_headers_and_body() -> None:
    setup = Setup(Reply(b"no", status=429, headers=[*JSON, (b"retry-after", b"7")]))
    refused = await setup.exchange.complete(Complete(b"{}"))
    assert refused == Refused(429, b"no")
    assert isinstance(refused, Refused)
    await setup.exchange.finish(answer(refused=refused), [])
    assert setup.start["status"] == 429
    headers = dict(setup.start["headers"])
    assert (headers[b"retry-after"], headers[b"content-length"]) == (b"7", b"2")
    assert setup.body == b"no"


async def test_refusal_after_the_start_is_an_event_and_a_break() -> None:
    setup = Setup(
        Reply(event("", role="assistant"), vm_call(), event(None, "tool_calls"), DONE),
        Reply(b'{"error":\r\n{"message": "slow"}}', status=429, headers=JSON),
    )
    await setup.exchange.complete(Complete(b"{}", offer=True))
    refused = await setup.exchange.complete(Complete(b"{}", offer=True))
    assert isinstance(refused, Refused)
    with pytest.raises(UpstreamBroken, match="429"):
        await setup.exchange.finish(answer(refused=refused), [])
    assert setup.body.endswith(b'data: {"error":{"message":"slow"}}\n\n')
    assert not setup.ended


def inner() -> Reply:
    return Reply(event("", role="assistant"), vm_call(), event(None, "tool_calls"), DONE)


def busy(status: int = 429, wait_ms: int = 0) -> Reply:
    wait = (b"retry-after-ms", b"%d" % wait_ms)
    return Reply(b'{"error": {"message": "slow"}}', status=status, headers=[*JSON, wait])


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
async def test_later_round_refused_for_the_moment_is_sent_again(status: int) -> None:
    refusals = [busy(status), busy(status)]
    setup = Setup(inner(), *refusals, Reply(event("here", "stop"), DONE), retries=2)
    await setup.exchange.complete(Complete(b"1", offer=True))
    said = await setup.exchange.complete(Complete(b"2", offer=True))
    assert isinstance(said, Said) and said.messages[0]["content"] == "here"
    assert setup.bodies == [b"1", b"2", b"2", b"2"] and all(reply.closed for reply in refusals)
    await setup.exchange.finish(answer(finish_reason="stop"), [])
    assert setup.start["status"] == 200 and b"slow" not in setup.body and setup.ended


async def test_whole_later_round_is_sent_again_and_what_stays_keeps_its_status() -> None:
    setup = Setup(whole(content="a"), busy(), whole(content="b"), busy(503), stream=False, retries=2)
    for _ in range(2):
        assert isinstance(await setup.exchange.complete(Complete(b"{}")), Said)
    setup.replies.append(busy(503))
    refused = await setup.exchange.complete(Complete(b"{}"))
    assert isinstance(refused, Refused) and len(setup.bodies) == 5  # both tries are spent in the turn
    await setup.exchange.finish(answer(refused=refused), [])
    assert setup.start["status"] == 503 and b"slow" in setup.body
    assert dict(setup.start["headers"])[b"retry-after-ms"] == b"0"


@pytest.mark.parametrize("reply", [busy(400), busy(401), busy(429, wait_ms=60)])
async def test_what_no_wait_helps_is_not_sent_again(reply: Reply) -> None:
    setup = Setup(inner(), reply, retries=2, retry_wait_s=0.05)
    await setup.exchange.complete(Complete(b"1", offer=True))
    refused = await setup.exchange.complete(Complete(b"2", offer=True))
    assert isinstance(refused, Refused) and refused.status == reply.status and len(setup.bodies) == 2


async def test_first_round_is_the_clients_to_send_again() -> None:
    setup = Setup(busy(), busy(503), retries=2)
    assert isinstance(await setup.exchange.complete(Complete(b"{}", offer=True)), Refused)
    assert isinstance(await setup.exchange.complete(Complete(b"{}", through=True)), Refused)
    assert len(setup.bodies) == 2


async def test_error_event_in_place_of_a_later_answer_is_sent_again_too() -> None:
    late = Reply(failed(message="Overloaded.", code=503), DONE)
    setup = Setup(inner(), late, busy(400), retries=1, retry_wait_s=1)
    await setup.exchange.complete(Complete(b"1", offer=True))
    refused = await setup.exchange.complete(Complete(b"2", offer=True))
    assert isinstance(refused, Refused) and refused.status == 400
    with pytest.raises(UpstreamBroken):
        await setup.exchange.finish(answer(refused=refused), [])
    assert b"slow" in setup.body and b"Overloaded" not in setup.body  # the error that stayed


async def test_client_sees_life_while_a_later_round_waits() -> None:
    setup = Setup(inner(), busy(429, wait_ms=150), Reply(event("here", "stop"), DONE), retries=1, every_s=0.02)
    await setup.exchange.complete(Complete(b"1", offer=True))
    waiting = asyncio.ensure_future(setup.exchange.complete(Complete(b"2", offer=True)))
    await setup.seen(b": keep-alive\n\n: keep-alive\n\n")
    assert len(setup.bodies) == 2 and not waiting.done()
    assert isinstance(await waiting, Said)
    await setup.exchange.finish(answer(finish_reason="stop"), [])


async def test_client_that_leaves_ends_the_wait() -> None:
    setup = Setup(inner(), busy(429, wait_ms=9_000), retries=1)
    await setup.exchange.complete(Complete(b"1", offer=True))
    waiting = asyncio.ensure_future(setup.exchange.complete(Complete(b"2", offer=True)))
    await asyncio.sleep(0.02)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert len(setup.bodies) == 2


async def test_our_own_error_before_and_after_the_start() -> None:
    error = ApiError(503, "full", "api_error", "storage_unavailable", headers={"Retry-After": "1"})
    before = Setup()
    await before.exchange.fail(error)
    assert before.start["status"] == 503
    assert dict(before.start["headers"])[b"retry-after"] == b"1"
    assert before.body == error.body()
    after = Setup(Reply(event("a"), DONE))
    await after.exchange.complete(Complete(b"{}", through=True))
    with pytest.raises(UpstreamBroken):
        await after.exchange.fail(error)
    assert after.body == event("a") + b"data: " + error.body() + b"\n\n"
    assert not after.ended


@pytest.mark.parametrize("body", [b"", b"<html>\r\n\r\n</html>", b"[1]", b'{"error": null}', b"\xff\n\nx"])
def test_error_event_is_one_line_with_an_error(body: bytes) -> None:
    raw = error_event(Refused(502, body))
    assert raw.startswith(b"data: ") and raw.endswith(b"\n\n")
    assert raw.count(b"\n") == 2 and b"\r" not in raw
    assert "502" in json.loads(raw[6:])["error"]["message"]


def test_error_event_of_a_long_page_is_bounded() -> None:
    assert len(error_event(Refused(500, b"x" * 1_000_000))) < 5_000


def failed(**error: Any) -> bytes:
    return b"data: " + json.dumps({"error": error}).encode() + b"\n\n"


async def test_client_that_waits_for_inner_rounds_gets_comments_and_none_at_the_end() -> None:
    go_on = asyncio.Event()
    inner = Reply(event(role="assistant"), vm_call(), event(None, "tool_calls"), go_on, DONE)
    setup = Setup(inner, Reply(event("done", "stop"), DONE), every_s=0.02)
    task = asyncio.ensure_future(setup.exchange.complete(Complete(b"{}", offer=True)))
    await setup.seen(b": keep-alive\n\n: keep-alive\n\n")
    go_on.set()
    await task
    await setup.exchange.complete(Complete(b"{}"))
    await setup.exchange.finish(answer(finish_reason="stop"), [])
    said = setup.body
    await asyncio.sleep(0.06)
    assert setup.body == said and setup.ended
    assert said.endswith(DONE)
    texts = [json.loads(line[6:]) for line in said.decode().split("\n\n") if line.startswith("data: {")]
    assert "".join(t["choices"][0]["delta"].get("content") or "" for t in texts) == "done"


async def test_no_comment_falls_into_a_stream_that_passes_through() -> None:
    go_on = asyncio.Event()
    whole, half = event("zero"), event("one")
    setup = Setup(Reply(whole, half[:20], go_on, half[20:], DONE), every_s=0.01)
    task = asyncio.ensure_future(setup.exchange.complete(Complete(b"{}", through=True)))
    await setup.seen(whole + half[:20])
    await asyncio.sleep(0.05)
    go_on.set()
    await task
    await setup.exchange.finish(answer(), [])
    assert setup.body == whole + half + DONE


async def test_idempotency_key_is_the_first_rounds_only() -> None:
    seen: list[Any] = []
    setup = Setup(Reply(b"{}", headers=JSON), Reply(b"{}", headers=JSON), stream=False)
    call = setup.chat

    async def noting(body: bytes, headers: Sequence[Header], query: bytes = b"") -> Any:
        seen.append(list(headers))
        return await call(body, headers, query)

    setup.chat = noting  # type: ignore[method-assign]
    setup.exchange.headers = [(b"idempotency-key", b"i1"), (b"traceparent", b"t1")]
    for _ in range(2):
        await setup.exchange.complete(Complete(b"{}"))
    assert seen == [[(b"idempotency-key", b"i1"), (b"traceparent", b"t1")], [(b"traceparent", b"t1")]]


@pytest.mark.parametrize("through", [True, False])
async def test_error_in_place_of_an_answer_is_as_good_as_a_status(through: bool) -> None:
    """The turn may try again: nothing but the headers has reached the client."""
    too_long = failed(message="prompt is too long: 9 tokens > 8 maximum", code=413)
    setup = Setup(Reply(too_long, DONE), Reply(event("ok", "stop"), DONE))
    said = await setup.exchange.complete(Complete(b"{}", offer=not through, through=through))
    assert isinstance(said, Refused) and said.status == 413
    assert b"too long" in said.body and setup.body == b""
    again = await setup.exchange.complete(Complete(b"{}"))
    assert isinstance(again, Said) and again.messages[0]["content"] == "ok"
    await setup.exchange.finish(answer(finish_reason="stop"), [])
    assert b"too long" not in setup.body and setup.body.endswith(DONE)


async def test_error_that_stays_reaches_the_client_as_it_came() -> None:
    odd = failed(message="no", type="server_error")
    setup = Setup(Reply(odd, b": bye\n\n"))
    said = await setup.exchange.complete(Complete(b"{}", through=True))
    assert said == Refused(500, odd[6:-2])
    await setup.exchange.finish(answer(refused=said), [])
    assert setup.body == odd + b": bye\n\n" and setup.ended


@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize("stays_open", [True, False])
async def test_answer_ends_with_done_whatever_its_connection_does(
    through: bool, stays_open: bool
) -> None:
    end = asyncio.Event() if stays_open else UpstreamBroken("late")
    setup = Setup(Reply(event("ok", "stop"), DONE[:-2], DONE[-2:], end))
    work = setup.exchange.complete(Complete(b"{}", offer=not through, through=through))
    said = await asyncio.wait_for(work, WAIT_S)
    assert isinstance(said, Said) and said.messages[0]["content"] == "ok"
    await setup.exchange.finish(answer(finish_reason="stop"), [])
    assert setup.ended and setup.body.endswith(DONE)


LARGE = b"{%s}" % (b" " * 8000)  # a request that may have been too long


@pytest.mark.parametrize("raw", ERRORS.values(), ids=ERRORS.keys())
@pytest.mark.parametrize("through", [True, False])
async def test_error_in_any_form_before_the_first_word_can_be_made_good(through: bool, raw: bytes) -> None:
    """Also behind the answer's role; the client sees one answer, with one role."""
    setup = Setup(Reply(event("", role="assistant"), raw), Reply(event("", role="assistant"), event("ok", "stop"), DONE))
    said = await setup.exchange.complete(Complete(LARGE, through=through))
    assert isinstance(said, Refused) and 400 <= said.status <= 599
    again = await setup.exchange.complete(Complete(LARGE))
    assert isinstance(again, Said) and again.messages[0]["content"] == "ok"
    await setup.exchange.finish(answer(finish_reason="stop"), [])
    assert setup.body.count(b'"role"') == 1 and setup.body.endswith(DONE) and raw.strip() not in setup.body


@pytest.mark.parametrize("raw", ERRORS.values(), ids=ERRORS.keys())
async def test_error_in_any_form_that_stays_is_what_the_client_reads(raw: bytes) -> None:
    setup = Setup(Reply(event("", role="assistant"), raw), Reply(b"no", status=400, headers=JSON))
    first = await setup.exchange.complete(Complete(LARGE, through=True))
    second = await setup.exchange.complete(Complete(LARGE))
    assert isinstance(first, Refused) and isinstance(second, Refused)
    await setup.exchange.finish(answer(refused=first), [])
    assert setup.body == event("", role="assistant") + raw and setup.ended
    assert setup.start["status"] == 200


async def test_status_that_stays_is_not_spoiled_by_a_later_try() -> None:
    """The second one begins a stream, and fails in it: the client has seen nothing of that."""
    first = Reply(b"zu lang", status=413, headers=[*JSON, (b"x-first", b"1")])
    setup = Setup(first, Reply(event("", role="assistant"), failed(message="no")))
    refused = await setup.exchange.complete(Complete(LARGE, through=True))
    assert isinstance(refused, Refused)
    again = await setup.exchange.complete(Complete(LARGE, through=True))
    assert isinstance(again, Refused) and setup.sent == []
    await setup.exchange.finish(answer(refused=refused), [])
    assert setup.start["status"] == 413 and setup.body == b"zu lang"
    assert (b"x-first", b"1") in setup.start["headers"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"error": {"message": "no", "code": 413}}', 413),
        (b'{"error": {"message": "no", "code": "429"}}', 429),
        (b'{"error": {"message": "no", "type": "invalid_request_error"}}', 400),
        (b'{"error": "no", "choices": []}', 500),
        (b'{"object": "error", "message": "no", "code": 400}', 400),
        (b'{"choices": [{"message": {"content": ""}, "finish_reason": "error"}]}', 500),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_error_object_in_place_of_an_answer_is_a_refusal_and_goes_on_as_it_came(
    stream: bool, body: bytes, status: int
) -> None:
    setup = Setup(Reply(body, headers=JSON), stream=stream)
    refused = await setup.exchange.complete(Complete(LARGE, through=stream))
    assert refused == Refused(status, body) and isinstance(refused, Refused)
    await setup.exchange.finish(answer(refused=refused), [])
    assert setup.start["status"] == 200 and setup.body == body
    assert dict(setup.start["headers"])[b"content-length"] == b"%d" % len(body)


async def test_answer_that_speaks_of_errors_is_an_answer() -> None:
    body = json.dumps({
        "choices": [{"message": {"content": "an error"}, "finish_reason": "stop"}], "error": None, "message": "ok",
    }).encode()
    setup = Setup(Reply(body, headers=JSON), stream=False)
    assert isinstance(await setup.exchange.complete(Complete(b"{}")), Said)


async def test_error_behind_the_first_word_breaks_the_stream() -> None:
    for raw in (ERRORS["a line"], ERRORS["data beside an empty delta"], ERRORS["a named event"]):
        setup = Setup(Reply(event("half"), raw, DONE))
        with pytest.raises(UpstreamBroken):
            await setup.exchange.complete(Complete(LARGE))
        assert setup.body == event("half") + raw


@pytest.mark.parametrize("size", [1000, 20_000])
async def test_event_beyond_the_limit_passes_or_is_one_clear_error(size: int) -> None:
    reply = [event("a"), *[b"data: " + b"x" * 8_000, b"x" * size], b"\n\n", event(None, "stop"), DONE]
    passing = Setup(Reply(*reply))
    said = await passing.exchange.complete(Complete(b"{}", through=True))
    assert isinstance(said, Said) and said.messages == []
    await passing.exchange.finish(answer(), [])
    assert passing.body == b"".join(reply)
    if size > 9_000:
        sieved = Setup(Reply(*reply))
        with pytest.raises(ApiError, match="longer than 9000 bytes"):
            await sieved.exchange.complete(Complete(b"{}"))


# -- patience


NOW_S = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


@pytest.mark.parametrize(
    "headers, wait_s",
    [
        ([(b"retry-after-ms", b"250"), (b"retry-after", b"3")], 0.25),
        ([(b"retry-after", b"3")], 3.0),
        ([(b"retry-after-ms", b"soon"), (b"retry-after", b"3")], 3.0),
        ([(b"retry-after", b"Tue, 14 Nov 2023 22:13:24 GMT")], 4.0),
        ([(b"retry-after", b"Tue, 14 Nov 2023 22:13:00 GMT")], 0.0),
        ([(b"retry-after", b"-5")], 0.0),
        ([(b"retry-after", b"later")], 0.5),
        ([], 0.5),
        ([(b"retry-after", b"11")], None),
        ([(b"retry-after", b"nan")], 0.5),
        ([(b"x-should-retry", b"false")], None),
    ],
)
def test_patience_keeps_upstreams_word(headers: list[Header], wait_s: float | None) -> None:
    assert Patience(2, 10).wait_s(429, headers, NOW_S) == wait_s


def test_patience_is_bounded_in_tries_and_seconds_and_a_wait_doubles_by_itself() -> None:
    patience = Patience(3, 100)
    assert [patience.wait_s(503, [], NOW_S) for _ in range(4)] == [0.5, 1.0, 2.0, None]
    patience = Patience(9, 5)
    after = [(b"retry-after", b"2")]
    assert [patience.wait_s(503, after, NOW_S) for _ in range(3)] == [2.0, 2.0, None]
    assert patience.wait_s(503, [(b"retry-after", b"1")], NOW_S) == 1.0


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422, 501])
def test_patience_has_none_with_what_would_be_refused_again(status: int) -> None:
    assert Patience(2, 10).wait_s(status, [], NOW_S) is None
