"""Never stuck: whatever a server says instead of "too long", the client gets an answer, or where nothing
can be made smaller the server's own words; and what is known of models is known under all their names.

The model is one that nobody knows and the history is larger than it takes. A gateway that keeps no
window relays what was said.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence

from tests.contract import say
from tests.contract.checks_sizes import UNKNOWN_MODEL
from tests.contract.model import (
    LONG,
    PAGED,
    SHORT,
    SHORT_STREAM,
    Check,
    Failed,
    Scenario,
    add,
    check,
    equal,
    expect,
    quote,
)
from tests.contract.play import Play, history
from tests.contract.scripted import tag_text
from tests.contract.talks import user
from tests.contract.wire import Json, Reply
from tests.e2e.answers import JSON_HEADERS, Answer, Response

PAIRS = 140  # about 21,000 tokens
TAKEN = 0.55  # of them, by the server
MOST_CALLS = 3  # for an answer: as it was, smaller, and one for what else may be tried
Judge = Callable[[Json, int, int], Answer]


def _asked(play: Play, pairs: int = PAIRS) -> list[Json]:
    return [*play.ask()[:1], *history(play.tag, pairs), user("Which code has depot 3?")]


def _overflowing(refuse: Judge, words: str) -> Scenario:
    """`refuse(request, sent, taken)`: what the server says to a request that is too large."""

    async def scenario(play: Play) -> None:
        messages = _asked(play)
        taken = int(TAKEN * play.wire.tokens({"model": UNKNOWN_MODEL, "messages": messages}))

        def judge(request: Json) -> Answer:
            sent = play.wire.tokens(request)
            if sent > taken:
                return refuse(request, sent, taken)
            return say.answer(request, say.text("Yes."))

        play.says(judge)
        reply = await play.send(play.body(messages, model=UNKNOWN_MODEL))
        if not play.target.window_tokens:
            _relayed(reply, words)
            return
        equal(reply.ok().content(), "Yes.", "the answer")
        expect(len(play.calls) <= MOST_CALLS, f"{len(play.calls)} upstream calls")
        play.script.calls.clear()
        more = [*messages, say.text("Yes."), user("And depot 4?")]
        equal((await play.chat(more, model=UNKNOWN_MODEL)).content(), "Yes.", "the next turn's answer")
        equal(len(play.calls), 1, "upstream calls of the next turn (it has to have learned)")

    return scenario


def _relayed(reply: Reply, words: str) -> None:
    expect(reply.status != 200 or '"error"' in reply.text or words in reply.text,
           f"a refusal became an answer: {quote(reply.text)}")
    expect(words in reply.text, f"upstream's words did not come back: {reply.status} {quote(reply.text)}")


def _plain(status: int, body: Json | str) -> tuple[Judge, str]:
    """A refusal with a body of any form; `{sent}` and `{taken}` are filled in."""
    written = body if isinstance(body, str) else json.dumps(body)
    kind = JSON_HEADERS if written[:1] == "{" else ((b"content-type", b"text/plain"),)

    def refuse(request: Json, sent: int, taken: int) -> Answer:
        filled = written.replace("{sent}", str(sent)).replace("{taken}", str(taken))
        return Response(filled.encode(), status, kind)

    return refuse, _words_of(body)


def _words_of(body: Json | str) -> str:
    """The longest run of plain words in a refusal."""
    text = body if isinstance(body, str) else json.dumps(body)
    runs = text.replace("{sent}", '"').replace("{taken}", '"').split('"')
    return max(runs, key=len, default="")


UNKNOWN: dict[str, tuple[str, int, Json | str]] = {
    "slots": ("of cache slots", 400, {"error": {"message": "Job needs {sent} cells, the cache has {taken}"}}),
    "detail": ("under `detail`", 422, {"detail": "sequence does not fit the engine ({sent} vs {taken})"}),
    "positions": ("of positions", 400, {"message": "positions beyond {taken} are not rotary-scaled", "code": 20044}),
    "server_error": ("as a 500", 500, {"error": {"message": "inference failed in graph_compute", "code": 500}}),
    "plain_text": ("as plain text", 400, "input rejected by the scheduler\n"),
    "list": ("in a list of errors", 400, {"errors": [{"message": "estimated load {sent} exceeds plan {taken}"}]}),
    "error_text": ("as a bare text under `error`", 400, {"error": "backend answered 400 without saying why"}),
    "own_status": ("as a 413 without a reason", 413, {"error": {"message": "Payload refused."}}),
    "foreign": ("in another language", 400, {"error": {"message": "Die Eingabe ist zu umfangreich ({sent})."}}),
}
for _id, (_what, _status, _body) in UNKNOWN.items():
    add(Check(f"overflow.{_id}", f"a refusal {_what}, in words that nobody knows: answered with less, and learned; or "
              "relayed", _overflowing(*_plain(_status, _body)), (SHORT_STREAM if len(_id) % 2 else SHORT,)))

add(Check("overflow.empty", "a 400 without any body for a large request: answered with less, and learned; or relayed",
          _overflowing(lambda request, sent, taken: Response(b"", 400, ()), ""), (SHORT, SHORT_STREAM)))
add(Check("overflow.rate_too_large", "a limit per minute that the request alone exceeds: answered with less; or "
          "relayed", _overflowing(*_plain(429, {"error": {
              "message": "Request too large for this model in your tier: limit {taken} tokens per minute, asked "
              "{sent}. The input must be smaller.", "type": "tokens", "code": "rate_limit_exceeded"}})),
          (SHORT, SHORT_STREAM)))

# ---------------------------------------------------------------- errors inside a 200

_TROUBLE = "the worker gave up on these tokens"
_ERROR = {"message": _TROUBLE, "type": "server_error", "code": 400}


def _stream(*events: str) -> Judge:
    def refuse(request: Json, sent: int, taken: int) -> Answer:
        return say.streamed([event.encode() + b"\n\n" for event in events])

    return refuse


def _data(payload: Json) -> str:
    return f"data: {json.dumps(payload)}"


def _chunk(delta: Json, finish: str | None = None, **more: object) -> str:
    head = {"id": "c1", "object": "chat.completion.chunk", "created": say.CREATED, "model": UNKNOWN_MODEL}
    return _data({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more})


def _in_200(body: Json) -> Judge:
    return lambda request, sent, taken: Response(json.dumps(body).encode(), 200, JSON_HEADERS)


IN_STREAM: dict[str, tuple[str, Judge]] = {
    "chunk": ("an error chunk without choices", _stream(_data({"error": _ERROR}))),
    "chunk_choices": ("an error chunk with choices", _stream(_chunk({}, "error", error=_ERROR), "data: [DONE]")),
    "after_role": ("an error after the role", _stream(_chunk({"role": "assistant", "content": ""}),
                                                      _data({"error": _ERROR}))),
    "line": ("an `error:` line", _stream(f"error: {json.dumps(_ERROR)}")),
    "event": ("an error event", _stream(f"event: error\n{_data(_ERROR)}")),
    "json": ("JSON instead of a stream", _in_200({"error": _ERROR})),
}
for _id, (_what, _refuse) in IN_STREAM.items():
    add(Check(f"overflow.in_stream_{_id}", f"{_what} in a 200 before the first token is a refusal like another",
              _overflowing(_refuse, _TROUBLE), (SHORT_STREAM,)))
IN_WHOLE: dict[str, tuple[str, Json]] = {
    "error": ("an error object", {"error": _ERROR}),
    "object": ("an object of the kind `error`", {"object": "error", "message": _TROUBLE, "code": 400}),
    "no_choices": ("an error beside an empty list of choices", {"choices": [], "error": _ERROR}),
}
for _id, (_what, _body) in IN_WHOLE.items():
    add(Check(f"overflow.in_200_{_id}", f"{_what} in a 200 is a refusal like another",
              _overflowing(_in_200(_body), _TROUBLE), (SHORT,)))

# ---------------------------------------------------------------- refusals that are surely something else

OTHERWISE: dict[str, tuple[str, Response]] = {
    "rate": ("a limit per minute that passes", say.error(
        429, "Rate limit reached for requests. Please try again in 2s.", code="rate_limit_exceeded", kind="requests")),
    "key": ("a wrong key", say.error(401, "Incorrect API key provided: sk-contr*.", code="invalid_api_key")),
    "quota": ("an empty purse", say.error(
        429, "You exceeded your current quota, please check your plan and billing details.",
        code="insufficient_quota", kind="insufficient_quota")),
}


def _relays(refusal: Response) -> Scenario:
    async def scenario(play: Play) -> None:
        play.says(refusal)
        reply = await play.send(play.body(_asked(play, 40), model=UNKNOWN_MODEL))
        equal(reply.status, refusal.status, "status")
        words = json.loads(refusal.body)["error"]["message"]
        expect(words in reply.text, f"upstream's words did not come back: {quote(reply.text)}")
        equal(len(play.calls), 1, "upstream calls")

    return scenario


for _id, (_what, _refusal) in OTHERWISE.items():
    add(Check(f"overflow.otherwise_{_id}", f"{_what} is no overflow: one call, and upstream's words come back",
              _relays(_refusal), (SHORT, SHORT_STREAM)))


@check("overflow.slow_cut", "a server that cuts silently while a conversation grows slowly past its window is found "
       "out within three turns", (SHORT,), needs="window")
async def slow_cut(play: Play) -> None:
    messages = _asked(play, 44)  # about 8,000 tokens
    read = int(1.02 * play.wire.tokens({"model": UNKNOWN_MODEL, "messages": messages}))

    def cut(request: Json) -> Answer:
        prompt = min(play.wire.tokens(request), read)
        usage = {"prompt_tokens": prompt, "completion_tokens": 7, "total_tokens": prompt + 7}
        return say.answer(request, say.text("Yes."), usage=usage)

    play.says(cut)
    sent: list[int] = []
    for number in range(12):
        await play.chat(messages, model=UNKNOWN_MODEL)
        sent.append(play.wire.tokens(play.last.json))
        words = " ".join(f"gull{number}x{i}" for i in range(80))
        messages = [*messages, say.text("Yes."), user(f"And what of these: {words}?")]
    beyond = next((i for i, tokens in enumerate(sent) if tokens > read), len(sent))
    late = sent[beyond + 3 :]
    expect(all(tokens <= read for tokens in late), f"tokens sent: {sent}, of which upstream reads {read}")


# ---------------------------------------------------------------- names of models

KNOWN: dict[str, str] = {
    "suffix": "openai/gpt-4o-mini:nitro",
    "fine_tune": "ft:gpt-4o-2024-08-06:acme:helper:Ab12Cd",
    "upper_case": "GPT-4O-Mini",
    "dots": "anthropic/claude-opus-4.1",
    "free": "google/gemini-2.5-flash-lite:free",
    "prefixes": "openrouter/openai/gpt-4.1-mini",
}


def _roomy(model: str) -> Scenario:
    async def scenario(play: Play) -> None:
        usage = {"prompt_tokens": 0, "completion_tokens": 1, "total_tokens": 0}

        def step(request: Json) -> Answer:
            usage["prompt_tokens"] = play.wire.tokens(request)
            return say.answer(request, say.text("Yes."), usage={**usage})

        play.says(step)
        messages = _asked(play, 220)  # about 39,000 tokens
        await play.chat(messages, model=model)
        got = [m for m in play.last.json["messages"] if m["role"] not in ("system", "developer")]
        whole = play.same_messages({"messages": got}, messages[1:])
        expect(whole, f"upstream got {len(got)} of {len(messages) - 1} messages, which this model reads, or other ones")

    return scenario


for _id, _model in KNOWN.items():
    add(Check(f"overflow.name_{_id}", f"{_model} is the model that it is: what fits its window goes up untouched",
              _roomy(_model), (SHORT,)))


@check("overflow.name_small", "openai/gpt-4:floor has the window of gpt-4: requests stay below 8,192 tokens", (SHORT,),
       needs="window")
async def name_small(play: Play) -> None:
    play.says(say.text("Yes."))
    await play.chat(_asked(play), model="openai/gpt-4:floor")
    tokens = play.wire.tokens(play.last.json)
    expect(tokens <= 8192, f"the request has {tokens} tokens")


# ---------------------------------------------------------------- chat templates


def _roles(request: Json) -> list[str]:
    return ["system" if m["role"] == "developer" else m["role"] for m in request["messages"]]


def _alternate(request: Json) -> bool:
    turns = [role for role in _roles(request) if role not in ("system", "tool")]
    return turns[:1] == ["user"] and all(a != b for a, b in itertools.pairwise(turns))


def _template(takes: Callable[[Json], bool], refusals: Sequence[tuple[int, str]]) -> Scenario:
    """A server whose template takes only some orders of roles, and says so as it pleases."""

    async def scenario(play: Play) -> None:
        for number, (status, body) in enumerate(refusals):
            def judge(request: Json, status: int = status, body: str = body) -> Answer:
                if takes(request):
                    return say.answer(request, say.text("Yes."))
                return Response(body.encode(), status, JSON_HEADERS)

            play.says(judge, inner=0)
            messages = play.ask(f"Which code has depot {number}?")
            model = f"{UNKNOWN_MODEL}-{number}"
            for turn in range(2):
                play.script.calls.clear()
                equal((await play.chat(messages, model=model)).content(), "Yes.", f"the answer to turn {turn}")
                messages = [*messages, say.text("Yes."), user("And why?")]
            equal(len(play.calls), 1, "upstream calls of the second turn")

    return scenario


_SAID = [(500, '{"error":{"code":500,"message":"Failed to parse the template: raise at line 3"}}'), (400, ""),
         (400, '{"object":"error","message":"conversation roles are not as this model was taught"}')]
add(Check("overflow.template_one_system", "a template that takes one system message, in front, and says so in any "
          "words: answered", _template(lambda r: "system" not in _roles(r)[1:], _SAID), (LONG,)))
add(Check("overflow.template_alternates", "a template in which user and assistant have to alternate: answered",
          _template(_alternate, _SAID), (LONG,)))


@check("overflow.template_drops", "a template that drops every system message but the first: what the gateway says "
       "is not in another", PAGED, needs="window")
async def template_drops(play: Play) -> None:
    play.says(say.text("Yes."), inner=0)
    messages = [{"role": "system", "content": f"Be brief. {tag_text(play.tag)}"}, *play.ask()[1:]]
    await play.chat(messages, model=UNKNOWN_MODEL)
    for recorded in play.calls:
        roles = _roles(recorded.json)
        if roles.count("system") > 1 or roles[0] != "system":
            raise Failed(f"roles upstream: {quote(roles)}")
