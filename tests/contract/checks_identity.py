"""Who is asking: whatever tells two callers apart keeps them apart, what changes with each request does not.

The harder of the two histories that callers may share: the end of a conversation, moving on turn by
turn as a client's own window does, which the caller who began it would be remembered by.
"""

from __future__ import annotations

import hashlib
from typing import Any

from tests.contract.checks_isolation import remembered
from tests.contract.model import LONG, SHORT, Check, Scenario, add, check
from tests.contract.play import CHAT, Play
from tests.contract.talks import KEPT, Talk, answers, chatter, noted, own_words, told, unseen, user
from tests.contract.wire import Headers, Json

ANYBODY = ("Authorization", "Bearer sk-shared-by-all")
DELTA = "x-llm-pager-session"  # a client says with it that it sends new messages only
HEADERS: dict[str, str] = {
    "authorization": "Bearer sk-{who}",
    "api-key": "{who}",
    "x-api-key": "sk-ant-{who}",
    "x-goog-api-key": "AIza{who}",
    "ocp-apim-subscription-key": "{who}",
    "x-litellm-key": "Bearer sk-{who}",
    "x-portkey-virtual-key": "vk-{who}",
    "cf-aig-authorization": "Bearer {who}",
    "cf-access-jwt-assertion-token": "ey.{who}",
    "helicone-auth": "Bearer pk-{who}",
    "helicone-user-id": "{who}",
    "openai-organization": "org-{who}",
    "openai-project": "proj_{who}",
    "x-goog-user-project": "{who}",
    "x-openwebui-user-id": "{who}",
    "x-openwebui-user-email": "{who}@example.org",
    "x-forwarded-user": "{who}",
    "x-auth-request-user": "{who}",
    "x-consumer-username": "{who}",
    "x-amz-security-token": "Fwo{who}",
    "x-tenant-id": "{who}",
    "x-account": "{who}",
    "cookie": "session={who}",
}
QUERIES = ("key", "api_key", "access_token", "subscription-key", "tenantId")
BODY = ("user", "safety_identifier")


async def _strangers(play: Play, one: Json, two: Json) -> None:
    """Two callers: one begins, the other sends the end of the same history, and names its session."""
    play.says(answers(play), inner=0)
    named: Headers = [(DELTA, f"chat-{play.tag}")]
    for who, say_it in ((one, told(play)[0]["content"]), (two, "Which code word did I tell you?")):
        play.script.calls.clear()
        talk = Talk(play, **who)
        talk.headers = [*talk.headers, *named]
        sent = await talk.say(say_it)
    own_words(play, sent)
    first = Talk(play, told(play), **one)
    await chatter(first, 6)
    await chatter(Talk(play, list(first.messages), keep=7, **two), 4, unseen)


def _caller(headers: Headers = (), query: str = "", **fields: Any) -> Json:
    names = {name.lower() for name, _ in headers}
    shared = [] if "authorization" in names else [ANYBODY]
    return {"headers": [*shared, *headers], "path": CHAT + query, "fields": fields}


def _header(name: str, value: str) -> Scenario:
    async def scenario(play: Play) -> None:
        callers = [_caller([(name, value.format(who=play.tag + who))]) for who in ("one", "two")]
        await _strangers(play, *callers)

    return scenario


def _query(name: str) -> Scenario:
    async def scenario(play: Play) -> None:
        await _strangers(play, *[_caller(query=f"?{name}={play.tag}{who}") for who in ("one", "two")])

    return scenario


def _field(name: str) -> Scenario:
    async def scenario(play: Play) -> None:
        await _strangers(play, *[_caller(**{name: f"{play.tag}{who}"}) for who in ("one", "two")])

    return scenario


for _name, _value in HEADERS.items():
    add(Check(f"identity.header_{_name}", f"callers who differ in {_name} alone share no memory",
              _header(_name, _value), (SHORT,)))
for _name in QUERIES:
    add(Check(f"identity.query_{_name}", f"callers who differ in ?{_name}= alone share no memory", _query(_name),
              (SHORT,)))
for _name in BODY:
    add(Check(f"identity.body_{_name}", f"callers who differ in the body's {_name} alone share no memory",
              _field(_name), (SHORT,)))


@check("identity.no_key_and_a_key", "a caller without a key shares no memory with one who has a key", (SHORT,))
async def no_key(play: Play) -> None:
    await _strangers(play, _caller(), _caller([("x-api-key", play.tag)]))


# ---------------------------------------------------------------- what changes with each request


def _digits(play: Play, number: int, count: int) -> str:
    return hashlib.sha256(f"{play.tag} {number}".encode()).hexdigest()[:count]


CHANGING: dict[str, tuple[str, dict[str, str]]] = {
    "traces": ("trace ids (W3C, B3, Datadog, Sentry, AWS, Google)", {
        "traceparent": "00-{32}-{16}-01", "tracestate": "vendor={16}", "x-b3-traceid": "{16}",
        "x-datadog-trace-id": "{16}", "sentry-trace": "{32}-{16}-1", "baggage": "sentry-trace_id={32}",
        "x-amzn-trace-id": "Root=1-{8}-{16}", "x-cloud-trace-context": "{32}/1;o=1",
    }),
    "requests": ("request ids of proxies and clients", {
        "x-request-id": "{32}", "x-correlation-id": "{32}", "x-ms-client-request-id": "{32}", "cf-ray": "{16}-AMS",
        "x-amz-cf-id": "{32}", "helicone-request-id": "{32}", "x-openwebui-message-id": "{32}",
    }),
    "retries": ("idempotency keys and counts of retries", {
        "idempotency-key": "stainless-node-retry-{32}", "x-idempotency-key": "{32}",
        "x-stainless-retry-count": "{number}", "x-stainless-read-timeout": "6{number}",
    }),
    "dates": ("dates and times", {
        "date": "Fri, 27 Nov 2026 18:51:{number} GMT", "x-amz-date": "20261127T1851{number}Z",
        "x-request-start": "t=17000000{number}", "x-timestamp": "17000000{number}",
    }),
    "addresses": ("addresses of a client on the move", {
        "x-forwarded-for": "10.0.0.{number}", "x-real-ip": "10.0.0.{number}", "cf-connecting-ip": "10.0.0.{number}",
        "x-envoy-external-address": "10.0.0.{number}",
    }),
}


def _changing(headers: dict[str, str]) -> Scenario:
    async def scenario(play: Play) -> None:
        def of(turn: int) -> Headers:
            ids = {f"{{{n}}}": _digits(play, turn, n) for n in (8, 16, 32)}
            out = []
            for name, value in headers.items():
                for mark, digits in ids.items():
                    value = value.replace(mark, digits)
                out.append((name, value.replace("{number}", f"{turn + 10}")))
            return out

        play.says(answers(play), inner=0)
        talk = Talk(play, headers_of=of)
        for turn in range(16):
            talk.keep = KEPT if turn > KEPT // 2 else None
            await noted(talk, 1)
        await remembered(talk)

    return scenario


for _name, (_what, _headers) in CHANGING.items():
    add(Check(f"identity.changing_{_name}", f"{_what} that change with every request do not split a conversation",
              _changing(_headers), (LONG,), "window"))


@check("identity.same_words", "two callers whose whole histories are the same: what one goes on to say, the other "
       "never sees", (LONG,))
async def same_words(play: Play) -> None:
    play.says(answers(play), inner=0)
    callers = [_caller([("x-api-key", play.tag + who)]) for who in ("one", "two")]
    first = Talk(play, [user("Good morning."), *told(play)[1:]], **callers[0])
    await chatter(first, 2)
    shared = list(first.messages)
    await first.say(told(play)[0]["content"])
    await chatter(Talk(play, shared, **callers[1]), 2, own_words)
