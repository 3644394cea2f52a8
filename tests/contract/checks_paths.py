"""Paths that are not ours to understand: they go to upstream and come back as they are."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.contract import say
from tests.contract.model import SHORT, check, equal, expect, quote
from tests.contract.play import Play, encode
from tests.contract.scripted import tag_text
from tests.e2e.answers import Response


@check("paths.models", "GET /models comes back verbatim", (SHORT,))
async def models(play: Play) -> None:
    made = Response(b'{ "object":"list","data":[{"id":"m","x":1e0}]}\n')
    play.says(made)
    reply = (await play.send(None, path=f"/models?{_tagged(play)}", method="GET")).ok()
    equal(reply.body, made.body, "the body")


def _tagged(play: Play) -> str:
    return f"tag={tag_text(play.tag)}".replace(" ", "%20").replace("[", "%5B").replace("]", "%5D")


@check("paths.embeddings", "POST /embeddings goes and comes back verbatim", (SHORT,))
async def embeddings(play: Play) -> None:
    made = Response(b'{"object":"list", "data":[],"x":1e0}', 200)
    play.says(made)
    sent = encode({"input": f"hi {tag_text(play.tag)}", "model": "text-embedding-3-small"})
    reply = (await play.send(sent, path="/embeddings")).ok()
    equal(reply.body, made.body, "the answer's body")
    expect(play.script.others, "nothing reached upstream")
    equal(play.script.others[0].body, sent, "the request's body")


@check("paths.unknown", "an unknown path under /v1 goes to upstream, whatever the method", (SHORT,))
async def unknown(play: Play) -> None:
    play.says(say.error(404, "No such thing.", code="unknown_url"))
    reply = await play.send(None, path=f"/batches/b_1?{_tagged(play)}", method="DELETE")
    equal(reply.status, 404, "status")
    expect(play.script.others, f"nothing reached upstream; the client got {quote(reply.text)}")
    equal(play.script.others[0].method, "DELETE", "method upstream")


@check("paths.stored", "GET /chat/completions (stored ones) goes to upstream", (SHORT,))
async def stored(play: Play) -> None:
    made = Response(b'{"object":"list","data":[],"has_more":false}')
    play.says(made)
    reply = (await play.send(None, path=f"/chat/completions?{_tagged(play)}", method="GET")).ok()
    equal(reply.body, made.body, "the body")


@check("paths.binary", "a binary body goes both ways as it is", (SHORT,))
async def binary(play: Play) -> None:
    body = bytes(range(256)) * 40
    play.says(Response(body, 200, ((b"content-type", b"audio/mpeg"),)))
    sent = tag_text(play.tag).encode() + body
    kind = [("Content-Type", "application/octet-stream")]
    reply = (await play.send(sent, kind, path="/audio/speech")).ok()
    equal(reply.body, body, "the answer's body")
    equal(reply.header("content-type"), "audio/mpeg", "content-type")
    equal(play.script.others[0].body, sent, "the request's body")


@check("paths.encoded", "a percent-encoded path stays as it is", (SHORT,))
async def encoded(play: Play) -> None:
    play.says(Response(b'{"id":"a/b c"}'))
    (await play.send(None, path=f"/models/a%2Fb%20c?{_tagged(play)}", method="GET")).ok()
    expect(play.script.others, "nothing reached upstream")
    path = play.script.others[0].target.partition("?")[0]
    expect(path.endswith("/models/a%2Fb%20c"), f"the path upstream is {path}")


@check("paths.responses_stream", "a stream of /responses flows piece by piece", (SHORT,))
async def responses_stream(play: Play) -> None:
    gates = [asyncio.Event() for _ in range(5)]
    steps: list[Any] = []
    for number, gate in enumerate(gates):
        steps += [b"event: response.output_text.delta\ndata: {\"n\":%d}\n\n" % number, gate]
    play.says(say.streamed(steps))
    sent = encode({"input": f"hi {tag_text(play.tag)}", "model": "gpt-4o", "stream": True})
    live = await play.open(sent, path="/responses")
    for number, gate in enumerate(gates):
        await live.until(f'{{"n":{number}}}', 4.0)
        gate.set()
    (await live.rest()).ok()
