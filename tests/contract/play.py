"""One check being played: a client's conversation, the upstream's script, what both have seen.

Promises: each play has an API key and a text of its own, so plays share no memory; a `long` play's
history is well beyond the window of a gateway that pages (WINDOW_TOKENS).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from openai import AsyncOpenAI

from tests.contract.model import Failed, NotApplicable, Variant, equal, expect, quote
from tests.contract.scripted import (
    TAG_HEADER,
    Script,
    ScriptedUpstream,
    Step,
    tag_text,
    tool_names,
)
from tests.contract.wire import Client, Headers, Json, Live, Reply
from tests.contract.wires import ABSENT
from tests.e2e.answers import Response
from tests.e2e.recording import Recorded
from tests.e2e.schema import HAS_SCHEMA, request_problems

WINDOW_TOKENS = 4000  # of a gateway that pages
PAIRS = 26  # of a long history: about 4,700 tokens
CHAT = "/chat/completions"
_WORDS = "amber birch cedar delta ember fjord grove heath inlet jetty knoll ledge".split()
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Target:
    """A running gateway. `paged_url`: where its window is small; `loops`: it answers calls of its
    own tools inside; `window_tokens`: what it keeps requests below, 0 for none."""

    name: str
    base_url: str
    paged_url: str
    model: str = "gpt-4o"
    proxy: bool = True
    loops: bool = False
    window_tokens: int = 0
    keepalive_s: float = 0.0  # of its comments while it loops; 0: it sends none
    arguments: tuple[tuple[str, Json], ...] = ()  # arguments of its own tools, by the name's end
    channel_header: str = ""  # in which its answers say whether a request was paged

    def inner_call(self, own_tools: Sequence[str], id: str) -> Json | None:
        """A call of one of its own tools: the first that is on offer."""
        for end, arguments in self.arguments:
            for name in own_tools:
                if name.endswith(end):
                    body = {"name": name, "arguments": json.dumps(arguments)}
                    return {"id": id, "type": "function", "function": body}
        return None


def fact(number: int) -> str:
    """What only exchange `number` of a long history says."""
    return f"{_WORDS[number % 12]}{number * 7919 % 100_000:05d}"


def history(tag: str, pairs: int = PAIRS) -> list[Json]:
    """`pairs` exchanges of about 180 tokens."""
    out: list[Json] = []
    for i in range(pairs):
        filler = " ".join(f"{_WORDS[(i + j) % 12]}s{j % 8}" for j in range(20))
        said = f"Note {i}: the code of depot {i} is {fact(i)}. {filler}"
        if i == 0:
            said = f"{tag_text(tag)} {said}"
        out.append({"role": "user", "content": said})
        out.append({"role": "assistant", "content": f"Noted for depot {i}. {filler}"})
    return out


class Play:
    """What a scenario is given."""

    def __init__(
        self, target: Target, variant: Variant, upstream: ScriptedUpstream, client: Client
    ) -> None:
        self.target, self.variant = target, variant
        self.long, self.stream = variant.long, variant.stream
        self.tag = f"c{next(_numbers):04d}"
        self.client = client
        self.note = ""  # what was measured
        self.valid = True  # False: the scenario sends what the API's rules do not allow
        self.script = Script(self.tag, self._inner_call)
        self.script.inner = 1 if self.long and target.loops else 0
        upstream.scripts[self.tag] = self.script
        self.wire = upstream.wire
        self._upstream = upstream
        self._lives: list[Live] = []

    def end(self) -> None:
        """Fails when the play made the gateway send an invalid request."""
        for recorded in self.script.calls if self.valid else ():
            if recorded.violations:
                raise Failed(f"upstream got an invalid request: {recorded.violations[:2]}")
            if HAS_SCHEMA and self.wire.verbatim:
                # A client's own nulls: the API takes them as absent, though its schema does not say so.
                sent = {name: value for name, value in recorded.json.items() if value is not None}
                if found := request_problems(sent):
                    raise Failed(f"upstream got a request that its schema refuses: {found[:2]}")

    def close(self) -> None:
        """Forgets the play and what it left open. Raises what the script itself raised."""
        self._upstream.scripts.pop(self.tag, None)
        for live in self._lives:
            live.leave()
        if self.script.raised:
            raise self.script.raised[0]

    def _inner_call(self, request: Json, id: str) -> Json | None:
        return self.target.inner_call(self.script.own_tools(request), id)

    # -- the script

    def says(self, *final: Step, inner: int | None = None) -> None:
        """What the model says. `inner`: rounds before that call the gateway's own tools, where the
        gateway has some and the conversation is long."""
        self.script.final = list(final)
        self.script._answered = 0
        if inner is not None:
            self.script.inner = inner if self.long and self.target.loops else 0

    # -- the client

    @property
    def key(self) -> str:
        return f"sk-contract-{self.tag}"

    @property
    def base_url(self) -> str:
        return self.target.paged_url if self.long else self.target.base_url

    @property
    def origin(self) -> str:
        """The base URL without its path."""
        return "/".join(self.base_url.split("/")[:3])

    @property
    def headers(self) -> list[tuple[str, str]]:
        return [
            ("Authorization", f"Bearer {self.key}"),
            ("Content-Type", "application/json"),
            (TAG_HEADER, self.tag),
        ]

    def ask(self, *newest: Json | str) -> list[Json]:
        """Messages: a system message, the history where it is long, and the newest ones."""
        tagged = newest or ("Which code has depot 3?",)
        out: list[Json] = [{"role": "system", "content": f"Be brief. {tag_text(self.tag)}"}]
        out += history(self.tag) if self.long else []
        for message in tagged:
            made = {"role": "user", "content": message} if isinstance(message, str) else message
            out.append(made)
        return out

    def body(self, messages: Sequence[Json] | None = None, **fields: Any) -> Json:
        """A chat request in the play's variant."""
        tools = fields.get("tools") or ()
        self.script.client_tools |= tool_names(tools)
        stream = {"stream": True} if self.stream else {}
        chosen = list(messages) if messages is not None else self.ask()
        return {"model": self.target.model, "messages": chosen, **stream, **fields}

    async def open(
        self, body: Json | bytes | AsyncIterator[bytes] | None, headers: Headers = (),
        path: str = CHAT, method: str = "POST", root: bool = False,
    ) -> Live:
        """Sends a request; returns when the response's head is there. `root`: the path is the host's."""
        self.script.begin()
        sent = encode(body) if isinstance(body, dict) else body
        named = {name.lower() for name, _ in headers}
        base = [h for h in self.headers if h[0].lower() not in named]
        url = (self.origin if root else self.base_url) + path
        live = await self.client.open(url, sent, [*base, *headers], method)
        self._lives.append(live)
        return live

    async def send(
        self, body: Json | bytes | None, headers: Headers = (), path: str = CHAT,
        method: str = "POST", root: bool = False,
    ) -> Reply:
        """Sends a request and reads its response to the end."""
        return await (await self.open(body, headers, path, method, root)).rest()

    async def chat(self, messages: Sequence[Json] | None = None, **fields: Any) -> Reply:
        """A chat request that has to be answered with 200."""
        return (await self.send(self.body(messages, **fields))).ok()

    def sdk(self, **settings: Any) -> AsyncOpenAI:
        """The official client, without retries unless asked for. For one request."""
        self.script.begin()
        return AsyncOpenAI(
            **{
                "api_key": self.key,
                "base_url": self.base_url,
                "max_retries": 0,
                "timeout": 10,
                "default_headers": {TAG_HEADER: self.tag},
                "http_client": httpx.AsyncClient(verify=False),  # no TLS here: its set-up is slow
                **settings,
            }
        )

    # -- what upstream has seen

    @property
    def calls(self) -> list[Recorded]:
        return self.script.calls

    @property
    def last(self) -> Recorded:
        """The newest upstream call; fails when there was none."""
        expect(self.calls, "nothing reached upstream")
        return self.calls[-1]

    def every(self, name: str, want: Any) -> None:
        """A top-level field reached upstream in every round as the client sent it."""
        expect(self.calls, "nothing reached upstream")
        name, want = self.wire.field(name, want)
        for number, recorded in enumerate(self.calls):
            got = recorded.json.get(name, ABSENT)
            equal(got, want, f"{name} in upstream round {number}")

    def same_calls(self, got: Sequence[Json] | None, want: Sequence[Json] | None, what: str) -> None:
        """Tool calls are the same, as far as upstream's protocol keeps them."""
        equal(self.wire.calls(got), self.wire.calls(want), what)

    def same_messages(self, request: Json, messages: Sequence[Json]) -> bool:
        """Upstream got exactly these messages, as far as its protocol keeps them."""
        return self.wire.messages(request["messages"]) == self.wire.messages(messages)

    def same_error(self, reply: Reply, refusal: Response) -> None:
        """The client got an error of upstream's: verbatim where both speak OpenAI's errors, else
        its status and what its protocol says of it."""
        if self.wire.verbatim_errors:
            equal((reply.status, reply.body), (refusal.status, refusal.body), "status and body")
            return
        equal(reply.status, refusal.status, "status")
        self.same_error_object(reply.json().get("error") or {}, refusal)

    def same_error_object(self, got: Json, refusal: Response) -> None:
        """What stands under `error` is upstream's, as far as its protocol says it."""
        try:
            wanted = self.wire.error(json.loads(refusal.body)["error"])
        except (ValueError, KeyError):  # no object of the API's: its words are in the message
            words = refusal.body.decode("ascii", "ignore").strip()
            told = got.get("message", "").encode("ascii", "ignore").decode()
            expect(words in told, f"the message: {quote(got)}, wanted {quote(words)}")
            return
        for key, value in wanted.items():
            equal(got.get(key), value, f"error.{key} of a {refusal.status}")

    def looped(self, rounds: int = 2) -> None:
        """The gateway has answered calls of its own tools: so many upstream calls at least."""
        if not self.target.loops:
            raise NotApplicable("no tools of its own")
        self.offered()
        if len(self.calls) < rounds:
            own = self.script.own_tools(self.last.json)
            raise Failed(f"{len(self.calls)} upstream calls instead of {rounds}; offered: {own}")

    def offered(self) -> None:
        """The gateway has put tools of its own on offer. One that keeps a window has to, beyond it."""
        if any(self.script.own_tools(recorded.json) for recorded in self.calls):
            return
        if not self.target.window_tokens:
            raise NotApplicable("it offered no tools of its own")
        raise Failed("no tools of its own are on offer beyond the window")

    def newest(self, messages: Sequence[Json], keep: int) -> None:
        """The last `keep` messages stand in every round as they were sent (a user's text may have
        something put in front of it)."""
        sent = self.wire.messages(messages[-keep:])
        for number, recorded in enumerate(self.calls):
            got = self.wire.messages(recorded.json["messages"])
            for message in sent:
                if not any(same_message(message, one) for one in got):
                    raise Failed(f"not in upstream round {number}: {quote(message)}; {nearest(message, got)}")


def encode(body: Json) -> bytes:
    """Compact JSON as UTF-8."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def same_message(sent: Json, got: Json) -> bool:
    """Equal, but that null and absent are the same and a user's text may have been prepended to."""
    sent = {k: v for k, v in sent.items() if v is not None}
    got = {k: v for k, v in got.items() if v is not None}
    if sent == got:
        return True
    if sent.get("role") != "user" or got.get("role") != "user":
        return False
    key = "content" if "content" in sent else "text"  # one item of a protocol's
    if {k: v for k, v in sent.items() if k != key} != {k: v for k, v in got.items() if k != key}:
        return False
    mine, theirs = sent.get(key), got.get(key)
    if isinstance(mine, str) and isinstance(theirs, str):
        return theirs.endswith(mine)
    if isinstance(mine, list) and isinstance(theirs, list):
        return theirs[-len(mine) :] == mine
    return False


def nearest(message: Json, got: Sequence[Json]) -> str:
    """The message of the same role that upstream got last, for a failure's text."""
    same = [m for m in got if m.get("role") == message.get("role")]
    return f"nearest: {quote(same[-1])}" if same else "no message of that role"
