"""Every byte that goes upstream, saved at one commit and compared at another.

  python -m tests.bench.oracle save DIR             the truth of this checkout
  python -m tests.bench.oracle compare DIR          this checkout against it; exit 1 when a byte differs
  ... --quick                                       the first of each kind only (about half a minute)
  ... --only locomo,forks                           scenarios whose name begins so

Real conversations (LoCoMo, BEAM, agents' transcripts, the demo's) and made ones (forks, edits, changing
system messages, trimmed and delta histories, media, channels, refusals, mixed calls) are sent over
sockets to servers as their users start them, some of which are killed on the way. The upstream is no
model: what it says and which pages it asks for follow from the request's bytes, so the same program
sends the same bytes. It uses nothing of proxy/, whose walls may be moved under it. Secrets of an
installation (`prompt_cache_key`) are left out of the comparison.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import re
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import zstandard
from aiohttp import web

from tests.e2e.data import (
    REPO,
    Conversation,
    data_dir,
    load_beam,
    load_locomo,
    load_trajectories,
    tools_of,
)
from tests.e2e.processes import ServerProcess
from tests.media import samples

TAG = "x-oracle-tag"
MODEL = "gpt-4o"
AT_ONCE = 2
KILL_EVERY = 60  # turns
SHOWN = 160  # characters around a difference
CREATED = 1_700_000_000

_SECRET = re.compile(rb'"prompt_cache_key":"[^"]*"')
_PAGE = re.compile(rb"\b(?:msg|img|aud|vid|file)_\d{4}(?:[._]\d+)?")
_WORD = re.compile(r"[A-Za-z]{4,}")

Message = dict[str, Any]


@dataclass
class Step:
    """One client request; `answer` is what the upstream says at last."""

    body: dict[str, Any]
    answer: Message
    headers: dict[str, str] = field(default_factory=dict)
    kill: bool = False  # the server, before it is sent


@dataclass
class Scenario:
    name: str
    steps: list[Step]
    config: dict[str, Any]
    asks: int = 0  # of so many turns one asks the memory first; 0: never
    bytes_per_token: float = 4.0  # what the upstream bills
    refuses: str = ""  # what it cannot take: see `Upstream.refusal`


# ---------------------------------------------------------------- what is said


def said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def chat(messages: list[Message], **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": messages, **fields}


def grown(c: Conversation, window: int, turns: int, **more: Any) -> Scenario:
    """A conversation turn by turn, killed now and then, then asked about in forks."""
    fields = more.pop("fields", {})
    every = more.pop("every", 8)
    steps = []
    for turn, at in enumerate(c.turns()[:turns]):
        body = chat(c.messages[:at], stream=turn % 2 == 1, **fields)
        steps.append(Step(body, c.messages[at], kill=turn % KILL_EVERY == KILL_EVERY - 1))
    told = c.messages[: c.turns()[:turns][-1] + 1]
    for n, question in enumerate(c.questions[:: every]):
        body = chat([*told, {"role": "user", "content": question.text}], stream=n % 2 == 0, **fields)
        steps.append(Step(body, said(f"Answer {n}.")))
    return Scenario(more.pop("name", c.id), steps, window_of(window), **more)


def window_of(tokens: int, **sections: Any) -> dict[str, Any]:
    return {"tiers": {"l0": {"tokens": tokens}}, **sections}


def agent(c: Conversation, window: int) -> Scenario:
    """A transcript with tool calls, as its client sends it: a request for each assistant message."""
    tools = tools_of(c)
    steps = [
        Step(chat(c.messages[:at], tools=tools, stream=at % 2 == 1) if tools else chat(c.messages[:at]), m)
        for at, m in enumerate(c.messages)
        if at and m["role"] == "assistant"
    ]
    return Scenario(f"agent-{c.id.replace('/', '-')}", steps, window_of(window), asks=3)


def sights(c: Conversation, window: int, count: int) -> Scenario:
    """A long history seen for the first time, and again further on."""
    ends = c.turns()
    steps = [Step(chat(c.messages[:at]), c.messages[at]) for at in ends[len(ends) // count - 1 :: len(ends) // count]]
    return Scenario(f"sights-{c.id}", steps, window_of(window), asks=2)


def story() -> list[Message]:
    """A demo conversation's turns, with answers that are made up of its words."""
    file = next((REPO / "proxy").rglob("conversation.jsonl"))
    out: list[Message] = []
    for line in file.read_text().splitlines():
        turn = json.loads(line)
        text = turn["user"]
        out += [{"role": "user", "content": text}, said(turn.get("expect") or f"I see: {text[:60]}")]
    return out


def turns_of(messages: list[Message], config: dict[str, Any], name: str, **more: Any) -> Scenario:
    fields, front = more.pop("fields", {}), more.pop("front", [])
    steps = [
        Step(chat([*front, *messages[:at]], stream=at % 4 == 1, **fields), messages[at])
        for at in range(1, len(messages), 2)
    ]
    return Scenario(name, steps, config, **more)


def forks(messages: list[Message]) -> Scenario:
    """Regenerated, edited, shortened, with dated and inserted system messages."""
    steps = []
    for turn, at in enumerate(range(1, min(len(messages), 300), 2)):
        system = {"role": "system", "content": f"You are helpful. Day {turn // 25}."}
        history = [system, *messages[:at]]
        steps.append(Step(chat(history), messages[at], kill=turn % 40 == 39))
        if turn % 9 == 8:  # said again, another answer
            steps.append(Step(chat(history, stream=True), said(f"Another answer in turn {turn}.")))
        if turn % 13 == 12:  # an old message is edited
            edited = [dict(m) for m in history]
            edited[at // 2 | 1]["content"] += " (edited)"
            steps.append(Step(chat(edited), said(f"To the edited one, {turn}.")))
        if turn % 17 == 16:  # two messages deleted, a system message in the middle
            cut = [*history[: at // 2], *history[at // 2 + 2 :]]
            cut.insert(len(cut) - 1, {"role": "system", "content": f"Note {turn}: be brief."})
            steps.append(Step(chat(cut), said(f"After the deletion, {turn}.")))
    return Scenario("forks", steps, window_of(4000), asks=4)


def noted(messages: list[Message]) -> Scenario:
    """System messages stay in the middle of a growing history."""
    steps, history = [], list[Message]()
    for turn, at in enumerate(range(0, min(len(messages), 240) - 1, 2)):
        if turn % 6 == 3:
            history.append({"role": "system", "content": f"Reminder {turn}: the user prefers tea number {turn}."})
        history.append(messages[at])
        steps.append(Step(chat(list(history)), messages[at + 1]))
        history.append(messages[at + 1])
    return Scenario("notes", steps, window_of(4000), asks=5)


def trimmed(messages: list[Message]) -> Scenario:
    steps = []
    for at in range(1, min(len(messages), 260), 2):
        first = max(0, at - 41) // 2 * 2
        steps.append(Step(chat([{"role": "system", "content": "Be kind."}, *messages[first:at]]), messages[at]))
    return Scenario("trimmed", steps, window_of(4000), asks=4)


def delta(messages: list[Message]) -> Scenario:
    headers = {"x-llm-pager-session": "a session"}
    steps = [
        Step(chat([messages[at - 1]], stream=at % 4 == 1), messages[at], headers, kill=at % 101 == 100)
        for at in range(1, min(len(messages), 300), 2)
    ]
    return Scenario("delta", steps, window_of(4000), asks=4)


def media(messages: list[Message]) -> Scenario:
    """Pictures, sounds, files and a film between ordinary turns; answers with tools; long texts."""
    shown = [
        samples.image_part(samples.png(1024, 768)),
        samples.image_part(samples.jpeg(800, 600), "image/jpeg", "high"),
        {"type": "image_url", "image_url": {"url": "https://example.com/tower.png?token=s3cret"}},
        samples.audio_part(samples.wav(30)),
        samples.file_part(samples.pdf(["The pier contract\nis signed by Maria Keller."]), "application/pdf", "c.pdf"),
        samples.file_part(json.dumps([{"id": i, "total": i * 7} for i in range(80)]).encode(), "application/json", "l.json"),
        samples.video_part(samples.mp4(3, 2.0)),
    ]
    history: list[Message] = []
    steps = []
    for turn in range(90):
        user: Message = {"role": "user", "content": messages[2 * turn]["content"]}
        if turn % 5 == 0:
            part = shown[turn // 5 % len(shown)]
            user["content"] = [{"type": "text", "text": user["content"]}, part]
        if turn % 11 == 7:
            user["content"] = "\n\n".join(str(m["content"]) for m in messages[turn : turn + 60])
        history.append(user)
        steps.append(Step(chat(list(history), stream=turn % 2 == 0), messages[2 * turn + 1], kill=turn % 30 == 29))
        history.append(messages[2 * turn + 1])
    return Scenario("media", steps, window_of(4000), asks=3)


def channels(messages: list[Message]) -> Iterator[Scenario]:
    weather = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    clash = {"type": "function", "function": {"name": "page_fault", "parameters": {"type": "object", "properties": {}}}}
    some = messages[:160]
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    for name, fields, asks in (
        ("json", {"response_format": {"type": "json_object"}}, 3),
        ("schema", {"response_format": schema}, 3),
        ("choices", {"n": 2}, 0),
        ("forced", {"tools": [weather], "tool_choice": "required"}, 0),
        ("tools", {"tools": [weather], "max_tokens": 300, "metadata": {"a": "b"}}, 3),
        ("clash", {"tools": [clash]}, 3),
        ("key", {"prompt_cache_key": "mine", "user": "u1", "stream_options": {"include_usage": True}}, 3),
    ):
        yield turns_of(some, window_of(3000), f"channel-{name}", fields=fields, asks=asks)
    yield turns_of(some, window_of(3000, memory={"mode": "passive"}), "channel-passive")
    yield turns_of(some, window_of(3000, memory={"mode": "strict"}), "channel-strict", asks=3)
    for refuses in ("tools", "long", "unknown", "system"):
        yield turns_of(some, window_of(3000), f"refuses-{refuses}", asks=3, refuses=refuses)
    yield turns_of(some, window_of(3000), "billed-more", asks=3, bytes_per_token=2.6)
    front = [{"role": "developer", "content": "Answer in verse. " * 150}]
    yield turns_of(some, window_of(3000), "long-front", front=front, asks=4)
    other = turns_of(some, window_of(3000), "models", asks=4)
    for n, step in enumerate(other.steps):
        step.body["model"] = ("gpt-4o", "gpt-4", "house-model")[n // 9 % 3]
    yield other


def mixed(messages: list[Message]) -> Scenario:
    """The model calls a tool of the client's and one of ours at once; the client answers its own."""
    weather = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    history: list[Message] = []
    steps = []
    for turn in range(80):
        history.append(messages[2 * turn])
        if turn % 3 == 2:
            function = {"name": "weather", "arguments": "{}"}
            asked = {"id": f"call_w{turn}", "type": "function", "function": function}
            wants = {"role": "assistant", "content": None, "tool_calls": [asked]}
            steps.append(Step(chat(list(history), tools=[weather], stream=turn % 2 == 0), wants))
            history += [wants, {"role": "tool", "tool_call_id": f"call_w{turn}", "content": f"{turn} degrees"}]
        steps.append(Step(chat(list(history), tools=[weather], stream=turn % 2 == 1), messages[2 * turn + 1]))
        history.append(messages[2 * turn + 1])
    return Scenario("mixed", steps, window_of(4000), asks=1)


def scenarios(quick: bool) -> Iterator[Scenario]:
    locomo, beam, agents = load_locomo(), load_beam(), load_trajectories()
    for c in locomo[:1] if quick else locomo:
        yield grown(c, 4000, 160 if quick else 10**6, every=20 if quick else 6, name=f"locomo-{c.id}", asks=7)
    for c in beam[:1] if quick else beam:
        yield grown(c, 16_000, 40 if quick else 10**6, every=9 if quick else 4, name=f"beam-{c.id}", asks=6)
    picked = sorted(agents, key=lambda c: hashlib.sha256(c.id.encode()).digest())
    for c in picked[:6] if quick else picked:
        yield agent(c, 4500)
    for file in sorted((data_dir() / "beam-long").glob("*.json"))[-1 if quick else 0 :]:
        d = json.loads(file.read_text())
        plain = [{"role": m["role"], "content": m["content"]} for m in d["messages"]]
        yield sights(Conversation(d["id"], plain), 32_000, 3 if quick else 8)
    told = story()
    yield turns_of(told, window_of(4000), "demo", asks=2)
    yield forks(told)
    yield noted(told)
    yield trimmed(told)
    yield delta(told)
    yield media(told)
    yield mixed(told)
    yield from channels(told)


# ---------------------------------------------------------------- the upstream


class Upstream:
    """Answers every scenario; `seen` has what came, by tag."""

    def __init__(self) -> None:
        self.seen: dict[str, list[bytes]] = {}
        self.plans: dict[str, tuple[Scenario, Step, bool]] = {}  # tag -> (its scenario, its step, asks the memory)
        self.base_url = ""

    async def start(self) -> web.AppRunner:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self.handle)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.base_url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        return runner

    async def handle(self, request: web.Request) -> web.StreamResponse:
        tag = request.headers.get(TAG)
        if request.method != "POST" or tag is None:
            return web.json_response({"error": {"message": "not found"}}, status=404)
        raw = await request.read()
        rounds = self.seen.setdefault(tag, [])
        rounds.append(request.path_qs.encode() + b"\n" + _SECRET.sub(b'"prompt_cache_key":"-"', raw))
        scenario, step, asks = self.plans[tag]
        body = json.loads(raw)
        if (refused := self.refusal(scenario, body)) is not None:
            error = {"message": refused, "type": "invalid_request_error", "param": None, "code": None}
            return web.json_response({"error": error}, status=400)
        message, reason = step.answer, "tool_calls" if step.answer.get("tool_calls") else "stop"
        call = self.call(raw, body, len(rounds)) if asks else None
        if call is not None:
            with_client = message.get("tool_calls") or [] if len(rounds) == 2 else []
            message = {"role": "assistant", "content": None, "tool_calls": [*with_client, call]}
            reason = "tool_calls"
        prompt = int(len(raw) / scenario.bytes_per_token)
        completion = len(json.dumps(message)) // 4
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        frame = {"id": f"chatcmpl-{len(rounds)}", "created": CREATED, "model": body["model"]}
        if not body.get("stream"):
            choices = [
                {"index": i, "message": message, "finish_reason": reason} for i in range(body.get("n") or 1)
            ]
            return web.json_response({**frame, "object": "chat.completion", "choices": choices, "usage": usage})
        return await self.stream(request, body, {**frame, "object": "chat.completion.chunk"}, message, reason, usage)

    @staticmethod
    async def stream(
        request: web.Request, body: dict[str, Any], frame: dict[str, Any], message: Message, reason: str, usage: Any
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        deltas: list[Message] = [{"role": "assistant", "content": "" if message.get("content") else None}]
        text = message.get("content") or ""
        deltas += [{"content": text[i : i + 48]} for i in range(0, len(text), 48)]
        deltas += [{"tool_calls": [{"index": i, **c}]} for i, c in enumerate(message.get("tool_calls") or ())]
        choices = [[{"index": i, "delta": d, "finish_reason": None}] for i in range(body.get("n") or 1) for d in deltas]
        choices += [[{"index": i, "delta": {}, "finish_reason": reason}] for i in range(body.get("n") or 1)]
        events = [{**frame, "choices": c} for c in choices]
        if (body.get("stream_options") or {}).get("include_usage"):
            events.append({**frame, "choices": [], "usage": usage})
        await response.write(b"".join(b"data: %b\n\n" % json.dumps(e).encode() for e in events) + b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    @staticmethod
    def refusal(scenario: Scenario, body: dict[str, Any]) -> str | None:
        """The reason for a 400, if the scenario's upstream cannot take the request."""
        size = len(json.dumps(body["messages"])) / 4
        ours = any(t.get("function", {}).get("name") == "page_fault" for t in body.get("tools") or ())
        roles = [m["role"] for m in body["messages"]]
        match scenario.refuses:
            case "tools" if ours:
                return "This model does not support tools."
            case "long" if size > 1900:
                return f"This model's maximum context length is 1900 tokens. However, you sent {int(size)} tokens."
            case "unknown" if size > 2200:
                return "The request was rejected."
            case "system" if "system" in roles[1:] or "developer" in roles[1:]:
                return "Only one system message is allowed, and it must come first."
        return None

    @staticmethod
    def call(raw: bytes, body: dict[str, Any], number: int) -> Message | None:
        """A VM call in the first two rounds, where one is offered; which one follows from the bytes."""
        names = [t.get("function", {}).get("name") or "" for t in body.get("tools") or ()]
        faults = [n for n in names if n.endswith("page_fault")]
        searches = [n for n in names if n.endswith("search_pages")]
        if number > 2 or not faults or not searches or body.get("tool_choice") == "none":
            return None
        digest = hashlib.sha256(_SECRET.sub(b"", raw)).digest()
        ids = sorted(set(_PAGE.findall(raw)))
        if digest[0] % 2 and ids:
            name = faults[-1]
            page_id = ids[digest[1] * 256 + digest[2] - (digest[1] * 256 + digest[2]) // len(ids) * len(ids)].decode()
            arguments: Message = {"page_id": page_id, "target_level": digest[3] % 4}
        else:
            texts = [m["content"] for m in body["messages"] if m["role"] == "user" and isinstance(m["content"], str)]
            words = _WORD.findall(texts[-1] if texts else "nothing said")
            name, arguments = searches[-1], {"query": " ".join(words[-6:]) or "anything", "limit": 3 + digest[1] % 4}
        function = {"name": name, "arguments": json.dumps(arguments)}
        return {"id": f"call_{digest[:6].hex()}", "type": "function", "function": function}


# ---------------------------------------------------------------- playing


async def play(scenario: Scenario, upstream: Upstream, client: aiohttp.ClientSession) -> list[tuple[str, bytes]]:
    """What went upstream, in order: (tag, path and body)."""
    config = {"upstream": {"provider": "openai", "base_url": upstream.base_url}, **scenario.config}
    server = ServerProcess(config)
    tags = [f"{scenario.name}/{n}" for n in range(len(scenario.steps))]
    await asyncio.to_thread(server.start)
    try:
        for n, (tag, step) in enumerate(zip(tags, scenario.steps, strict=True)):
            if step.kill:
                await asyncio.to_thread(server.kill)
                await asyncio.to_thread(server.start)
            upstream.plans[tag] = scenario, step, bool(scenario.asks and n % scenario.asks == scenario.asks - 1)
            headers = {TAG: tag, "authorization": "Bearer sk-oracle", **step.headers}
            async with client.post(f"{server.base_url}/chat/completions", json=step.body, headers=headers) as reply:
                answer = await reply.read()
                if reply.status != 200 and not scenario.refuses:
                    raise SystemExit(f"{tag}: {reply.status} {answer[:500]!r}\n{server.log[-3000:]}")
    finally:
        await asyncio.to_thread(server.stop)
    return [(tag, body) for tag in tags for body in upstream.seen.pop(tag, ())]


async def played(wanted: list[Scenario]) -> AsyncIterator[tuple[Scenario, list[tuple[str, bytes]]]]:
    upstream = Upstream()
    runner = await upstream.start()
    slots = asyncio.Semaphore(AT_ONCE)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(600)) as client:

        async def one(scenario: Scenario) -> tuple[Scenario, list[tuple[str, bytes]]]:
            async with slots:
                return scenario, await play(scenario, upstream, client)

        for result in asyncio.as_completed([one(s) for s in wanted]):
            yield await result
    await runner.cleanup()


def file_of(folder: Path, scenario: Scenario) -> Path:
    return folder / f"{scenario.name}.zst"


def save(folder: Path, scenario: Scenario, requests: list[tuple[str, bytes]]) -> str:
    data = b"".join(b"%s %d\n%s" % (tag.encode(), len(body), body) for tag, body in requests)
    packed = zstandard.ZstdCompressor(level=3, write_checksum=True).compress(data)
    file_of(folder, scenario).write_bytes(packed)
    return f"{len(requests)} requests, {len(data):,} bytes"


def saved(folder: Path, scenario: Scenario) -> list[tuple[str, bytes]]:
    data = zstandard.ZstdDecompressor().decompress(file_of(folder, scenario).read_bytes(), 1 << 32)
    requests, at = [], 0
    while at < len(data):
        end = data.index(b"\n", at)
        tag, _, size = data[at:end].decode().rpartition(" ")
        requests.append((tag, data[end + 1 : end + 1 + int(size)]))
        at = end + 1 + int(size)
    return requests


def difference(before: list[tuple[str, bytes]], after: list[tuple[str, bytes]]) -> str | None:
    """None when all is the same; else how much is not, and the first place where."""
    differing = sum(a != b for a, b in zip(before, after, strict=False)) + abs(len(before) - len(after))
    if not differing:
        return None
    pairs = zip(before, after, strict=False)
    first = next(((a, b) for a, b in pairs if a != b), None)
    if first is None:
        return f"{len(before)} requests became {len(after)}"
    (tag, old), (other, new) = first
    if tag != other:
        return f"{differing} of {len(before)} differ; the first: {tag} is missing, {other} came instead"
    at = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    shown = "\n".join(f"      {t[max(0, at - SHOWN) : at + SHOWN].decode(errors='replace')!r}" for t in (old, new))
    return f"{differing} of {len(before)} differ; the first at byte {at} of {tag}:\n{shown}"


async def main(arguments: argparse.Namespace) -> int:
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    only = tuple(arguments.only.split(","))
    wanted = [s for s in scenarios(arguments.quick) if s.name.startswith(only)]
    if arguments.quick:
        folder = folder / "quick"
        folder.mkdir(exist_ok=True)
    started, bad = time.monotonic(), 0
    async for scenario, requests in played(wanted):
        if arguments.action == "save":
            told = save(folder, scenario, requests)
        elif not file_of(folder, scenario).exists():
            told, bad = "was not saved", bad + 1
        else:
            found = difference(saved(folder, scenario), requests)
            told, bad = (f"{len(requests)} identical", bad) if found is None else (found, bad + 1)
        print(f"{scenario.name:44} {told}", flush=True)
    print(f"{len(wanted)} scenarios in {time.monotonic() - started:.0f} s; {bad} differ")
    return 1 if bad else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("save", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", help="beginnings of scenarios' names, with commas")
    sys.exit(asyncio.run(main(parser.parse_args())))
