"""Never silent, on any network: chat requests on any path and in any encoding, what passes by unchanged and
says so, old clients, browsers, and paths that try to leave.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import posixpath
import zlib
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

import brotli
import zstandard

from tests.contract import say
from tests.contract.model import (
    ALL,
    BOTH,
    LONG,
    PAGED,
    SHORT,
    SHORT_STREAM,
    Check,
    NotApplicable,
    Scenario,
    add,
    check,
    equal,
    expect,
    quote,
)
from tests.contract.play import Play, encode
from tests.contract.scripted import TAG_HEADER, tag_text
from tests.contract.talks import user
from tests.contract.wire import Headers, Reply
from tests.e2e.answers import Response

MADE = b'{ "object":"x", "data":[1e0] }\n'  # written as no re-encoder would


def _fits(play: Play) -> None:
    """Beyond a window that the gateway keeps, the request was made smaller."""
    if play.target.window_tokens and play.long:
        tokens, most = play.wire.tokens(play.last.json), play.target.window_tokens
        expect(tokens <= most, f"it went up unpaged: {tokens} tokens, more than {most}")


# ---------------------------------------------------------------- paths of chat requests

CHATS: dict[str, str] = {
    "slashes": "/v1/chat/completions//",
    "doubled": "/v1///chat//completions",
    "azure": "/openai/deployments/my-gpt-4o/chat/completions?api-version=2025-01-01-preview",
    "gemini": "/v1beta/openai/chat/completions",
    "prefix": "/inference/v1/chat/completions",
    "twice": "/v1/v1/chat/completions/",
    "plain": "/chat/completions",
    "team": "/proxy/team-a/v1/chat/completions",
}


def _chat_at(path: str) -> Scenario:
    async def scenario(play: Play) -> None:
        play.says(say.text("Yes."), inner=0)
        reply = (await play.send(play.body(), path=path, root=True)).ok()
        equal(reply.content(), "Yes.", "the answer")
        _fits(play)

    return scenario


for _id, _path in CHATS.items():
    add(Check(f"paths.chat_{_id}", f"POST {_path} is a chat request like another", _chat_at(_path), (LONG,)))

# ---------------------------------------------------------------- paths that are upstream's

OTHERS: dict[str, tuple[str, str]] = {
    "props": ("GET", "/props"),
    "slots": ("GET", "/slots"),
    "tokenize": ("POST", "/tokenize"),
    "ollama": ("GET", "/api/tags"),
    "models": ("GET", "/models"),
    "lora": ("POST", "/lora-adapters"),
    "rerank": ("POST", "/v1/rerank"),
    "head": ("HEAD", "/"),
}


def _passes(method: str, path: str) -> Scenario:
    async def scenario(play: Play) -> None:
        play.says(Response(b"" if method == "HEAD" else MADE, 200, ((b"x-origin", b"harbour"),)))
        body = encode({"content": f"hi {tag_text(play.tag)}"}) if method == "POST" else None
        mark = tag_text(play.tag).replace(" ", "%20").replace("[", "%5B").replace("]", "%5D")
        reply = await play.send(body, path=f"{path}?tag={mark}", method=method, root=True)
        equal(reply.status, 200, "status")
        expect(play.script.others, f"nothing reached upstream; the client got {quote(reply.text)}")
        got = play.script.others[0]
        equal((got.method, got.body), (method, body or b""), "method and body upstream")
        expect(got.target.partition("?")[0].endswith(path), f"the path upstream is {got.target}")
        equal(reply.header("x-origin"), "harbour", "a header of upstream's")
        if method != "HEAD":
            equal(reply.body, MADE, "the body")

    return scenario


for _id, (_method, _path) in OTHERS.items():
    add(Check(f"paths.outside_{_id}", f"{_method} {_path} goes to upstream", _passes(_method, _path), (SHORT,)))


RESPONSE = {"id": "resp_1", "object": "response", "created_at": say.CREATED, "status": "completed",
            "model": "gpt-4o", "output": [{"type": "message", "id": "msg_1", "status": "completed",
            "role": "assistant", "content": [{"type": "output_text", "text": "Yes.", "annotations": []}]}],
            "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
            "usage": {"input_tokens": 9, "output_tokens": 2, "total_tokens": 11}}
MESSAGE = {"id": "msg_1", "type": "message", "role": "assistant", "model": "gpt-4o", "stop_reason": "end_turn",
           "content": [{"type": "text", "text": "Yes."}], "stop_sequence": None,
           "usage": {"input_tokens": 9, "output_tokens": 2}}


def _events(payload: dict[str, Any], kind: str, key: str) -> list[bytes]:
    """The first and the last event of an answer's stream."""
    opened, closed = {"type": f"{key}.created"}, {"type": f"{key}.completed", key: payload}
    if kind == "message":
        opened, closed = {"type": "message_start", key: payload}, {"type": "message_stop"}
    return [f"event: {one['type']}\ndata: {json.dumps(one)}\n\n".encode() for one in (opened, closed)]


def _unpaged(path: str, headers: Headers, key: str, answer: dict[str, Any]) -> Scenario:
    async def scenario(play: Play) -> None:
        words = f"{tag_text(play.tag)} " + " ".join(f"plank{i}" for i in range(9000))
        said = [user(words)]
        sent = encode({"model": "gpt-4o", key: said, "max_tokens": 64, **({"stream": True} if play.stream else {})})
        kind = answer.get("type") or answer["object"]
        whole, events = json.dumps(answer, indent=1).encode(), _events(answer, kind, kind)
        play.says(say.streamed(events) if play.stream else Response(whole))
        reply = (await play.send(sent, headers, path)).ok()
        expect(play.script.others, "nothing reached upstream")
        expect(play.script.others[0].body == sent, f"the request's body was changed: "
               f"{len(play.script.others[0].body)} bytes of {len(sent)}")
        equal(reply.body, b"".join(events) if play.stream else whole, "the answer's body")

    return scenario


add(Check("paths.responses", "/v1/responses with a long input goes and comes back verbatim, whole and streamed",
          _unpaged("/responses", (), "input", RESPONSE), PAGED))
add(Check("paths.messages", "/v1/messages (Anthropic's) with a long history goes and comes back verbatim, whole and "
          "streamed", _unpaged("/messages", [("anthropic-version", "2023-06-01")], "messages",
                                          MESSAGE), PAGED))

# ---------------------------------------------------------------- encodings of the body

ENCODINGS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "deflate": ("deflate", zlib.compress),
    "br": ("br", brotli.compress),
    "zstd": ("zstd", zstandard.compress),
    "upper": ("GZIP", gzip.compress),
    "identity": ("identity", bytes),
}


def _encoded(name: str, compress: Callable[[bytes], bytes]) -> Scenario:
    async def scenario(play: Play) -> None:
        play.says(say.text("Yes."), inner=0)
        body = compress(encode(play.body()))
        reply = (await play.send(body, [("Content-Encoding", name)])).ok()
        equal(reply.content(), "Yes.", "the answer")
        play.newest(play.ask(), 1)
        _fits(play)

    return scenario


for _id, (_name, _compress) in ENCODINGS.items():
    add(Check(f"encodings.{_id}", f"a chat request in {_name} is read, paged like another, and answered",
              _encoded(_name, _compress), BOTH))


@check("encodings.stream", "a streamed answer to a compressed request", (SHORT_STREAM, PAGED[1]))
async def encoded_stream(play: Play) -> None:
    await _encoded("gzip", gzip.compress)(play)


@check("encodings.broken", "a body that is no gzip is refused with a sentence, and nothing hangs", (SHORT,),
       needs="proxy")
async def broken(play: Play) -> None:
    play.valid = False
    play.says(say.text("Yes."))
    reply = await play.send(b"\x1f\x8b" + encode(play.body()), [("Content-Encoding", "gzip")])
    expect(400 <= reply.status < 500 or play.calls, f"status {reply.status}: {quote(reply.text)}")


# ---------------------------------------------------------------- what a response says


def _channel(play: Play, reply: Reply) -> str:
    name = play.target.channel_header
    if not name:
        raise NotApplicable("it has no header that says what it did")
    value = reply.header(name)
    expect(value, f"{name} is missing from a {reply.status}")
    return value or ""


@check("headers.channel", "every answer says whether the request was paged", ALL, needs="window")
async def channel(play: Play) -> None:
    play.says(say.text("Yes."), inner=0)
    said = _channel(play, await play.chat())
    equal(said, "tools" if play.long else "bypass", play.target.channel_header)


@check("headers.channel_passive", "a paged request that may use no tools says so", PAGED, needs="window")
async def channel_passive(play: Play) -> None:
    play.says(say.text("Yes."), inner=0)
    said = _channel(play, await play.chat(tools=[say.tool("look")], tool_choice="none"))
    expect(said not in ("bypass", "tools"), f"{play.target.channel_header} is {said}")


@check("headers.channel_refused", "so does an upstream's refusal", ALL, needs="window")
async def channel_refused(play: Play) -> None:
    play.says(say.error(401, "Incorrect API key provided.", code="invalid_api_key"), inner=0)
    _channel(play, await play.send(play.body()))


@check("headers.channel_elsewhere", "so does every answer that is no chat's: responses, messages, embeddings, models",
       (SHORT, SHORT_STREAM), needs="window")
async def channel_elsewhere(play: Play) -> None:
    for path in ("/responses", "/messages", "/embeddings", "/models"):
        play.says(say.streamed([b"data: {}\n\n"]) if play.stream else Response(MADE))
        sent = None if path == "/models" else encode({"model": "m", "input": tag_text(play.tag)})
        reply = await play.send(sent, path=path, method="GET" if sent is None else "POST")
        said = _channel(play, reply)
        expect(said not in ("tools", "passive"), f"{play.target.channel_header} of {path} is {said}")


# ---------------------------------------------------------------- old clients, browsers, dots


async def _raw(play: Play, head: str, body: bytes = b"") -> tuple[str, bytes]:
    """A request as bytes on a connection of its own: the response's head and what follows it."""
    host, _, port = play.base_url.split("/")[2].partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
    async with asyncio.timeout(10):
        data = await reader.read()
    writer.close()
    got, _, rest = data.partition(b"\r\n\r\n")
    return got.decode("latin-1"), rest


@check("network.http_1_0", "a client of HTTP/1.0 gets the answer, and no chunk sizes in it", ALL, needs="proxy")
async def http_1_0(play: Play) -> None:
    play.says(say.text("Yes."), inner=0)
    play.script.begin()
    body = encode(play.body())
    head = (f"POST /v1/chat/completions HTTP/1.0\nHost: x\nAuthorization: Bearer {play.key}\n{TAG_HEADER}: {play.tag}\n"
            f"Content-Type: application/json\nContent-Length: {len(body)}")
    got, rest = await _raw(play, head, body)
    expect(" 200" in got.splitlines()[0], f"the head: {quote(got)}")
    expect("transfer-encoding: chunked" not in got.lower(), "a chunked body, which HTTP/1.0 does not know")
    if play.stream:
        first = rest.lstrip().partition(b"\n")[0]
        expect(first.startswith((b"data:", b":", b"event:")), f"the stream begins with {quote(first.decode())}")
    else:
        equal(json.loads(rest)["choices"][0]["message"]["content"], "Yes.", "the answer")


DOTS = ("/v1/../../admin/keys", "/v1/%2e%2e/%2E%2E/admin/keys", "/v1/..%2f..%2fadmin/keys", "/v1/.%2e/../admin/keys",
        "/v1/%252e%252e/%252e%252e/admin/keys", "/v1/..%5c..%5cadmin/keys", "/v1/models/..;/../../admin/keys")


@check("network.dots", "dot segments in any spelling do not leave the upstream's base path", (SHORT,), needs="proxy")
async def dots(play: Play) -> None:
    play.says(Response(MADE))
    for path in DOTS:
        head = (f"GET {path} HTTP/1.1\nHost: {play.base_url.split('/')[2]}\nAuthorization: Bearer {play.key}\n"
                f"{TAG_HEADER}: {play.tag}\nConnection: close")
        play.script.others.clear()
        await _raw(play, head)
        for recorded in play.script.others:
            target = recorded.target.partition("?")[0]
            for _ in range(3):
                target = unquote(target)
            resolved = posixpath.normpath(target.replace("\\", "/").replace("..;", ".."))
            expect(resolved.startswith("/v1"), f"{path} reached upstream as {recorded.target}")


@check("network.preflight", "a browser's preflight gets upstream's answer, or the gateway's own", (SHORT,))
async def preflight(play: Play) -> None:
    allowed = [(b"access-control-allow-origin", b"*"), (b"access-control-allow-headers", b"*"),
               (b"access-control-allow-methods", b"POST")]
    play.says(Response(b"", 204, allowed))
    asked = [("Origin", "http://localhost:5173"), ("Access-Control-Request-Method", "POST"),
             ("Access-Control-Request-Headers", "authorization,content-type")]
    reply = await play.send(None, asked, method="OPTIONS")
    expect(200 <= reply.status < 300, f"status {reply.status}")
    expect(reply.header("access-control-allow-origin") in ("*", "http://localhost:5173"),
           f"access-control-allow-origin is {reply.header('access-control-allow-origin')}")


@check("network.cors_headers", "upstream's access-control headers come back with an answer and with a refusal", ALL)
async def cors_headers(play: Play) -> None:
    allowed = [(b"access-control-allow-origin", b"http://localhost:5173"), (b"vary", b"Origin")]
    refusal = say.error(429, "Slow down.", headers=allowed)
    for answer in (lambda request: say.answer(request, say.text("Yes."), headers=allowed), refusal):
        play.says(answer, inner=0)
        reply = await play.send(play.body(), [("Origin", "http://localhost:5173")])
        got = reply.header("access-control-allow-origin")
        expect(got in ("*", "http://localhost:5173"), f"access-control-allow-origin of a {reply.status} is {got}")
