"""Headers both ways, and the paths that are not chat completions."""

from __future__ import annotations

from tests.contract import say
from tests.contract.model import (
    ALL,
    BOTH,
    LONG,
    PAGED,
    SHORT,
    Check,
    Scenario,
    add,
    check,
    equal,
    expect,
)
from tests.contract.play import Play

REQUEST = {
    "openai_organization": ("OpenAI-Organization", "org-123"),
    "openai_project": ("OpenAI-Project", "proj_123"),
    "idempotency_key": ("Idempotency-Key", "stainless-python-retry-1234"),
    "traceparent": ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
    "user_agent": ("User-Agent", "OpenAI/Python 2.20.0"),
    "stainless": ("X-Stainless-Lang", "python"),
    "custom": ("X-My-Own", "a value, with; marks"),
    "beta": ("OpenAI-Beta", "assistants=v2"),
}
RESPONSE = {
    "x_request_id": (("x-request-id", "req_4711"),),
    "openai": (
        ("openai-organization", "acme"),
        ("openai-processing-ms", "412"),
        ("openai-version", "2020-10-01"),
        ("openai-model", "gpt-4o-2024"),
    ),
    "ratelimit": (
        ("x-ratelimit-limit-requests", "60"),
        ("x-ratelimit-limit-tokens", "150000"),
        ("x-ratelimit-remaining-requests", "59"),
        ("x-ratelimit-remaining-tokens", "149984"),
        ("x-ratelimit-reset-requests", "1s"),
        ("x-ratelimit-reset-tokens", "6m0s"),
    ),
    "custom": (("x-provider", "north-7"), ("cf-ray", "8a1-AMS")),
}


def _sent(name: str, value: str) -> Scenario:
    async def scenario(play: Play) -> None:
        play.says(say.text("Yes."))
        (await play.send(play.body(), [(name, value)])).ok()
        equal(play.calls[0].header(name), value, f"{name} upstream")

    return scenario


for _id, (_header, _value) in REQUEST.items():
    add(Check(f"headers.{_id}", f"{_header} reaches upstream", _sent(_header, _value), BOTH))


@check("headers.authorization", "the client's Authorization reaches upstream in every round")
async def authorization(play: Play) -> None:
    play.says(say.text("Yes."))
    await play.chat()
    for recorded in play.calls:
        equal(play.wire.key(recorded), play.key, "the credential upstream")


@check("headers.idempotency_once", "Idempotency-Key goes with the first round only", PAGED, needs="loop")
async def idempotency_once(play: Play) -> None:
    play.says(say.text("Yes."))
    (await play.send(play.body(), [("Idempotency-Key", "key-1")])).ok()
    play.looped()
    got = [recorded.header("idempotency-key") for recorded in play.calls]
    equal(got, ["key-1"] + [None] * (len(got) - 1), "Idempotency-Key of the rounds")


def _comes_back(headers: tuple[tuple[str, str], ...]) -> Scenario:
    async def scenario(play: Play) -> None:
        raw = [(k.encode(), v.encode()) for k, v in headers]
        play.says(lambda request: say.answer(request, say.text("Yes."), headers=raw), inner=0)
        reply = await play.chat()
        for name, value in headers:
            equal(reply.header(name), value, name)

    return scenario


for _id, _headers in RESPONSE.items():
    _names = ", ".join(name for name, _ in _headers)
    add(Check(f"headers.back_{_id}", f"{_names} come back", _comes_back(_headers), ALL))


@check("headers.back_on_error", "x-request-id and x-ratelimit-* come back with an error", ALL)
async def back_on_error(play: Play) -> None:
    headers = [*RESPONSE["x_request_id"], *RESPONSE["ratelimit"]]
    raw = [(k.encode(), v.encode()) for k, v in headers]
    play.says(say.error(429, "Slow down.", headers=raw), inner=0)
    reply = await play.send(play.body())
    for name, value in headers:
        equal(reply.header(name), value, name)


@check("headers.hop_by_hop_up", "hop-by-hop headers of the client stop at the proxy", BOTH, needs="proxy")
async def hop_by_hop_up(play: Play) -> None:
    hops = [("Keep-Alive", "timeout=5"), ("TE", "trailers"), ("Proxy-Authorization", "Basic eDp5"),
            ("Connection", "x-per-hop"), ("X-Per-Hop", "1")]
    play.says(say.text("Yes."))
    (await play.send(play.body(), hops)).ok()
    for recorded in play.calls:
        for name, _ in hops[:3]:
            equal(recorded.header(name), None, f"{name} upstream")
        equal(recorded.header("x-per-hop"), None, "a header named in Connection, upstream")


@check("headers.hop_by_hop_down", "hop-by-hop headers of upstream stop at the proxy", ALL, needs="proxy")
async def hop_by_hop_down(play: Play) -> None:
    hops = [(b"keep-alive", b"timeout=123"), (b"proxy-authenticate", b"Basic"),
            (b"connection", b"x-per-hop"), (b"x-per-hop", b"1")]
    play.says(lambda request: say.answer(request, say.text("Yes."), headers=hops))
    reply = await play.chat()
    expect(reply.header("keep-alive") != "timeout=123", "Keep-Alive of upstream's connection came back")
    equal(reply.header("proxy-authenticate"), None, "Proxy-Authenticate")
    equal(reply.header("x-per-hop"), None, "a header named in Connection")


@check("headers.host", "upstream is called by its own host name", BOTH, needs="proxy")
async def host(play: Play) -> None:
    play.says(say.text("Yes."))
    await play.chat()
    port = play.target.base_url.rpartition(":")[2].partition("/")[0]
    for recorded in play.calls:
        expect(port not in (recorded.header("host") or ""), f"Host is {recorded.header('host')}")


@check("headers.query", "the query string reaches upstream (Azure's api-version)", BOTH)
async def query(play: Play) -> None:
    play.says(say.text("Yes."))
    path = "/chat/completions?api-version=2024-06-01&x=a%20b"
    (await play.send(play.body(), path=path)).ok()
    for recorded in play.calls:
        equal(recorded.target.partition("?")[2], "api-version=2024-06-01&x=a%20b", "query upstream")


@check("headers.answer_length", "a whole answer ends where its length says, uncompressed", (SHORT, LONG))
async def answer_length(play: Play) -> None:
    play.says(say.text("Yes. " * 500))
    reply = (await play.send(play.body(), [("Accept-Encoding", "identity")])).ok()
    equal(reply.header("content-encoding"), None, "content-encoding")
    if reply.header("content-length"):
        equal(reply.header("content-length"), str(len(reply.body)), "content-length")
