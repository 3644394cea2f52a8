"""Errors: upstream's as they are, ours in OpenAI's shape, and no request sent twice."""

from __future__ import annotations

from collections.abc import AsyncIterator

from tests.contract import say
from tests.contract.model import (
    ALL,
    BOTH,
    LONG,
    LONG_STREAM,
    PAGED,
    SHORT,
    check,
    equal,
    expect,
    quote,
)
from tests.contract.play import Play, encode
from tests.contract.scripted import tag_text
from tests.contract.wire import NoAnswer, Reply
from tests.e2e.answers import JSON_HEADERS, Break, Drop, Response, Stream

RETRY = ((b"retry-after", b"7"), (b"retry-after-ms", b"6500"), (b"x-should-retry", b"false"))
HTML = b"<html><body>Bad gateway: \xe9</body></html>\n"
RETRIED = (408, 409, 429, 500, 503)  # what SDKs try again themselves
STATUSES = (400, 401, 402, 403, 404, 408, 409, 413, 415, 422, 429, 500, 502, 503, 504, 529)


async def _refused(play: Play) -> AsyncIterator[tuple[Response, Reply]]:
    """Each status in a request of its own: what upstream said and what the client got."""
    for status in STATUSES:
        refusal = say.error(status, f"No: {status} é", code=f"code_{status}", param="seed")
        play.says(refusal, inner=0)
        yield refusal, await play.send(play.body())


@check("errors.status", f"upstream's status comes back: {', '.join(map(str, STATUSES))}", ALL)
async def status(play: Play) -> None:
    async for refusal, reply in _refused(play):
        equal(reply.status, refusal.status, "status")


@check("errors.body", "the body of an upstream's error comes back verbatim", ALL)
async def body(play: Play) -> None:
    async for refusal, reply in _refused(play):
        equal(reply.body, refusal.body, f"body of a {refusal.status}")
        equal(reply.header("content-type"), "application/json", "content-type")


@check("errors.fields", "message, type, param and code of an upstream's error come back", ALL)
async def fields(play: Play) -> None:
    async for refusal, reply in _refused(play):
        play.same_error_object(reply.json().get("error") or {}, refusal)


@check("errors.html", "an error that is no JSON comes back verbatim, with its content-type", ALL)
async def html(play: Play) -> None:
    refusal = Response(HTML, 502, ((b"content-type", b"text/html"),))
    play.says(refusal, inner=0)
    reply = await play.send(play.body())
    play.same_error(reply, refusal)
    if play.wire.verbatim_errors:
        equal(reply.header("content-type"), "text/html", "content-type")


@check("errors.empty", "an error without a body comes back without one", BOTH)
async def empty(play: Play) -> None:
    refusal = Response(b"", 503, ())
    play.says(refusal, inner=0)
    play.same_error(await play.send(play.body()), refusal)


@check("errors.retry_headers", "retry-after, retry-after-ms and x-should-retry come with an error", ALL)
async def retry_headers(play: Play) -> None:
    play.says(say.error(429, "Slow down.", headers=RETRY), inner=0)
    reply = await play.send(play.body())
    equal(reply.status, 429, "status")
    for name, value in RETRY:
        equal(reply.header(name.decode()), value.decode(), name.decode())


@check("errors.once", f"no {', '.join(map(str, RETRIED))} is retried behind the client's back", BOTH)
async def once(play: Play) -> None:
    for retried in RETRIED:
        play.script.calls.clear()
        play.says(say.error(retried, "Try later.", kind="server_error"), inner=0)
        await play.send(play.body())
        equal(len(play.calls), 1, f"upstream calls, each answered with {retried}")


@check("errors.later_round", "an error of a later round: status and body, or an error event in a stream",
       PAGED, needs="loop")
async def later_round(play: Play) -> None:
    refusal = say.error(429, "Slow down in round two.", code="rate_limit", headers=RETRY)
    play.says(refusal)
    reply = await play.send(play.body())
    play.looped()
    if play.stream and reply.status == 200:
        expect("Slow down in round two." in reply.text, f"no error: {quote(reply.text)}")
        error = next(c for c in reply.chunks() if c.get("error"))["error"]
        play.same_error_object(error, refusal)
        expect("[DONE]" not in reply.events(), "a [DONE] after the error")
    else:
        play.same_error(reply, refusal)
        equal(reply.header("retry-after"), "7", "retry-after")


def _openai_shape(reply: Reply, status: int | None = None, which: str = "") -> None:
    if status is not None:
        equal(reply.status, status, f"{which}status")
    error = reply.json().get("error")
    expect(isinstance(error, dict), f"{which}no error object: {quote(reply.text)}")
    for key in ("message", "type"):
        expect(isinstance(error.get(key), str), f"{which}error.{key} is {error.get(key)!r}")
    for key in ("param", "code"):
        expect(key in error, f"{which}error.{key} is missing: {quote(reply.text)}")


NO_REQUESTS = {
    "cut off": b'{"model": "gpt-4o", "messages": [',
    "an array": b"[]",
    "empty": b"",
    "no UTF-8": b'{"model":"gpt-4o","messages":[{"role":"user","content":"\xff"}]}',
}


@check("errors.no_json", f"a body that is no JSON object ({', '.join(NO_REQUESTS)}) gets 400 in OpenAI's shape",
       (SHORT,))
async def no_json(play: Play) -> None:
    play.valid = False
    for name, body in NO_REQUESTS.items():
        _openai_shape(await play.send(body), 400, f"{name}: ")


@check("errors.odd_messages", "messages that are no array, empty or hold a number get what upstream says about "
       "them", (SHORT,))
async def odd_messages(play: Play) -> None:
    play.valid = False
    play.says(say.error(400, "messages: wrong", param="messages"))
    for odd in ("hi", [], [1]):
        body = {"model": play.target.model, "messages": odd, "user": tag_text(play.tag)}
        _openai_shape(await play.send(encode(body)), 400, f"messages {odd!r}: ")


@check("errors.drop", "an upstream that hangs up: 5xx in OpenAI's shape, or no answer at all", ALL)
async def drop(play: Play) -> None:
    play.says(Drop(), inner=0)
    try:
        reply = await play.send(play.body())
    except NoAnswer:
        return  # the connection was cut as upstream cut it
    if reply.status == 200:
        told = reply.broken or '"error"' in reply.text
        expect(told, f"it ended well: {quote(reply.text)}")
        return
    expect(reply.status >= 500, f"status {reply.status}")
    _openai_shape(reply)


@check("errors.broken_body", "a whole answer that upstream cuts off does not look whole", (SHORT, LONG))
async def broken_body(play: Play) -> None:
    play.says(Stream([b'{"id":"x","choices":[', Break()], 200, JSON_HEADERS), inner=0)
    try:
        reply = await play.send(play.body())
    except NoAnswer:
        return
    if reply.status == 200:
        expect(reply.broken, f"it ended well: {quote(reply.text)}")


@check("errors.no_chat_answer", "a 200 that is no chat answer comes back verbatim", ALL)
async def no_chat_answer(play: Play) -> None:
    body = b'{"object": "error", "message": "odd server", "code": 40}'
    play.says(Response(body), inner=0)
    reply = await play.send(play.body())
    if play.wire.verbatim_errors:
        equal((reply.status, reply.body), (200, body), "status and body")
    else:  # it has to be read to be put into OpenAI's words
        expect(reply.status >= 500, f"status {reply.status}: {quote(reply.text)}")
        _openai_shape(reply)


@check("errors.redirect", "a redirect comes back with its location and is not followed", BOTH)
async def redirect(play: Play) -> None:
    play.says(Response(b"", 307, ((b"location", b"https://elsewhere.example/v1"),)), inner=0)
    reply = await play.send(play.body())
    equal(reply.status, 307, "status")
    equal(reply.header("location"), "https://elsewhere.example/v1", "location")


# ---------------------------------------------------------------- the client tries again


@check("errors.retry_once", "a request sent again after an error: the turn is upstream once", BOTH)
async def retry_once(play: Play) -> None:
    play.says(say.error(500, "Oops."), say.text("The code is amber."), say.text("Bye."), inner=0)
    question = {"role": "user", "content": "What was the code, please?"}
    messages = play.ask(question)
    equal((await play.send(play.body(messages))).status, 500, "status of the first try")
    first = play.last.body
    await play.chat(messages)
    equal(play.last.body, first, "the second try's bytes upstream")
    await _continues(play, messages, question["content"])


@check("errors.retry_answered", "a request sent again after its answer was lost: the turn is upstream once",
       (SHORT, LONG, LONG_STREAM))
async def retry_answered(play: Play) -> None:
    play.says(say.text("The code is amber."), say.text("The code is amber."), say.text("Bye."), inner=0)
    question = {"role": "user", "content": "What was the code, please?"}
    messages = play.ask(question)
    await play.chat(messages)
    await play.chat(messages)
    await _continues(play, messages, question["content"])


async def _continues(play: Play, messages: list[dict[str, str]], question: str) -> None:
    more = [*messages, say.text("The code is amber."), {"role": "user", "content": "Good bye."}]
    await play.chat(more)
    got = play.last.json["messages"]
    texts = [m.get("content") or "" for m in got]
    equal(sum(str(t).endswith(question) for t in texts), 1, "times that the question stands upstream")
    equal(texts.count("The code is amber."), 1, "times that the answer stands upstream")
