"""SIGKILL at random moments: what a client has read to its end is there afterwards, and nothing else is.

    python -m tests.chaos.kills --rounds 2000 [--seed N] [--lanes one,two,workers,database] [--store directory|postgres]

Real servers (`llm-pager serve`) are killed and started again while conversations go on: whole histories and
sessions of new messages, streamed and not, with tool calls, page faults, both at once, answers made again
and questions edited, billed 0.8 to 2 times what we count. In between the disk is full. Lanes:

    one      a process by itself
    two      two processes over one directory, killed in turn or both; conversations hop between them
    workers  `--workers 2`: one worker is killed, or all
    database two processes over PostgreSQL, whose disk it is that is full

`--store postgres` (or TEST_STORE): all lanes store there.

What has to hold, and is counted:

    lost        an answer that a client has read to its end, and that is not there afterwards: in what a session of
                new messages sends upstream at its end (all of it, to a model with a wide window), and in the
                turns that /vm/context knows of
    half        an answer without its question, a part of one, or a turn that upstream had not answered to its end
    divergence  an upstream request that is not the one, byte for byte, that a server sends which is told the same
                and was never killed (invariant 7)
    refused     a request that was answered with an error, or not remembered, while the disk was not full
    died        a server that ended by itself

A turn whose client did not see its end may be stored or not; a session of new messages then has it once or
twice, and the quiet server is told the same. One of a full disk may be answered without being remembered, if
the answer says so (`x-llm-pager-memory: lost`). Exit status 0: all are 0.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.chaos.model import NO_PAGE, SMALL, TAG, WIDE, Attempt, Message, Model
from tests.e2e.processes import ServerProcess
from tests.e2e.script import LOOKUP, SYSTEM, filler
from tests.e2e.story import difference
from tests.services import Postgres

LANES = ("one", "two", "workers", "database")
FACTORS = (0.8, 1.0, 1.13, 1.4, 2.0)
TALKS_AT_ONCE = 4  # per lane, by default
STEPS = 24
WINDOW_TOKENS, WIDE_TOKENS = 2_000, 1_000_000
MOMENTS = ("any", "asked", "answering", "answered", "read")
FULL_SHARE = 0.08  # of the rounds, in which the disk is full before the kill
FULL_S = 0.15
PROGRESS = 8  # answers read before a kill, at most
EVENT_S = 0.3
RECOVERY_S = 2.0  # after which a store has noticed that there is room again
PATIENCE_S = 120.0
CUT = (aiohttp.ClientError, ConnectionError, asyncio.TimeoutError)


# -- one conversation


@dataclass
class Step:
    """What its client sent, with each sending's upstream requests, and what it read."""

    number: int
    body: bytes
    stream: bool
    attempts: list[Attempt] = field(default_factory=list)
    answer: Message | None = None
    conversation: str | None = None  # x-llm-pager-conversation


class Talk:
    """A client with a plan that depends on its name alone."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.plan = random.Random(name)
        self.session = self.plan.random() < 0.35
        self.tools = [LOOKUP] if self.plan.random() < 0.5 else None
        self.factor = self.plan.choice(FACTORS)
        self.history: list[Message] = [SYSTEM]
        self.steps: list[Step] = []
        self.forgotten = False  # an answer said that it is not remembered
        self.context: Message | None = None  # what /vm/context says at the end

    def headers(self, step: Step, attempt: int) -> dict[str, str]:
        headers = {"authorization": f"Bearer key-{self.name}", "content-type": "application/json"}
        headers[TAG] = f"{self.name}/{step.number}/{attempt}"
        if self.session:
            headers["x-llm-pager-session"] = self.name
        return headers

    def next(self) -> Step:
        """The next request: a tool's result where one is asked for, an answer made again, a question
        edited, or a new one."""
        number, chance = len(self.steps), self.plan.random()
        new = self.results()
        users = [i for i, m in enumerate(self.history) if m["role"] == "user"]
        if not new and len(users) > 3 and not self.session and chance < 0.12:
            at = users[-1] if chance < 0.08 else self.plan.choice(users[-3:])
            del self.history[at + (chance < 0.08) :]
        if not new and self.history[-1]["role"] != "user":
            text = f"Note {self.name}u{number}q. {filler(f'{self.name}u{number}', self.plan.randint(20, 70))}"
            new = [{"role": "user", "content": text}]
        self.history += new
        return self.add(number, SMALL, [SYSTEM, *new] if self.session else self.history)

    def results(self) -> list[Message]:
        """Of the calls that the last answer made."""
        calls = self.history[-1].get("tool_calls") or ()
        return [{"role": "tool", "tool_call_id": c["id"], "content": f"It is {filler(c['id'], 20)}"} for c in calls]

    def add(self, number: int, model: str, messages: list[Message]) -> Step:
        body: Message = {"model": model, "messages": messages, "stream": self.plan.random() < 0.4}
        if self.tools:
            body["tools"] = self.tools
        self.steps.append(Step(number, json.dumps(body).encode(), body["stream"]))
        return self.steps[-1]

    def last(self) -> Step:
        """A session of new messages, read from its beginning."""
        new = [*self.results(), {"role": "user", "content": f"Note {self.name}u{len(self.steps)}q."}]
        self.history += new
        return self.add(len(self.steps), WIDE, [SYSTEM, *new])

    def read(self, step: Step, answer: Message) -> None:
        step.answer = answer
        self.history.append(answer)

    def sendings(self, step: Step) -> list[list[Attempt]]:
        """The attempts in which upstream was asked, by what it was asked: one that was stored unseen makes the
        next another request, in a session, or by what its bill taught."""
        groups: list[list[Attempt]] = []
        for attempt in step.attempts:
            if not attempt.bodies:
                continue
            if not groups or groups[-1][0].bodies[0] != attempt.bodies[0]:
                groups.append([])
            groups[-1].append(attempt)
        return groups


@dataclass
class Read:
    """An answer to its end, or why there is none."""

    status: int
    answer: Message | None = None
    error: str = ""
    memory: str = ""
    conversation: str | None = None


async def ask(client: aiohttp.ClientSession, url: str, talk: Talk, step: Step, attempt: int) -> Read:
    """One sending. Raises what the connection raises when it is cut."""
    async with client.post(f"{url}/chat/completions", data=step.body, headers=talk.headers(step, attempt)) as r:
        raw = await r.read()
        memory = r.headers.get("x-llm-pager-memory", "")
        conversation = r.headers.get("x-llm-pager-conversation")
        if r.status != 200:
            return Read(r.status, None, raw.decode(errors="replace")[:300])
    if not step.stream:
        return Read(200, _plain(json.loads(raw)["choices"][0]["message"]), "", memory, conversation)
    if not raw.rstrip().endswith(b"data: [DONE]"):
        raise aiohttp.ClientPayloadError(f"a stream ended early: {raw[-200:]!r}")
    answer: Message = {"role": "assistant", "content": None}
    calls: list[Message] = []
    finish = None
    for line in raw.splitlines():
        if line.startswith(b": x-llm-pager-memory"):
            memory = line.partition(b"memory:")[2].strip().decode()
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            return Read(500, None, line.decode()[:300])
        for choice in event["choices"]:
            finish = choice["finish_reason"] or finish
            if text := choice["delta"].get("content"):
                answer["content"] = (answer["content"] or "") + text
            calls += choice["delta"].get("tool_calls") or ()
    if calls:
        answer["tool_calls"] = [{k: v for k, v in c.items() if k != "index"} for c in calls]
    if finish is None:
        raise aiohttp.ClientPayloadError("a stream without an end")
    return Read(200, answer, "", memory, conversation)


def _plain(message: Message) -> Message:
    answer = {"role": "assistant", "content": message.get("content")}
    return {**answer, "tool_calls": message["tool_calls"]} if message.get("tool_calls") else answer


# -- a full disk


class Disk:
    """The directory of a lane, and how it is full: a small tmpfs, or no process may write a byte."""

    def __init__(self) -> None:
        self._made = tempfile.TemporaryDirectory(prefix="llm-pager-kills-", ignore_cleanup_errors=True)
        self.path = Path(self._made.name)
        mount = ["mount", "-t", "tmpfs", "-o", "size=4g,mode=711", "tmpfs", str(self.path)]
        self.mounted = _runs(mount)

    def fill(self, pids: list[int]) -> None:
        if self.mounted:
            stat = os.statvfs(self.path)
            used = (stat.f_blocks - stat.f_bfree) * stat.f_frsize
            _runs(["mount", "-o", f"remount,size={max(used, 4096)}", str(self.path)])
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

    def free(self, pids: list[int]) -> None:
        if self.mounted:
            _runs(["mount", "-o", "remount,size=4g", str(self.path)])
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def close(self) -> None:
        if self.mounted:
            _runs(["umount", "-l", str(self.path)])
        self._made.cleanup()


def _runs(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


# -- what came of it


@dataclass
class Tally:
    """Counts, and the first words on each that must be 0."""

    counts: Counter[str] = field(default_factory=Counter)
    said: list[str] = field(default_factory=list)

    def wrong(self, kind: str, text: str) -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= 5:
            self.said.append(f"{kind}: {text}")

    @property
    def passed(self) -> bool:
        return not any(self.counts[kind] for kind in WRONG)


WRONG = ("lost", "half", "divergence", "refused", "died", "foreign")


# -- a lane: servers, their conversations, and who kills them


class Lane:
    talks_at_once = TALKS_AT_ONCE
    steps = STEPS
    progress = PROGRESS
    full_share = FULL_SHARE
    forgets = False  # whether what is stored cannot even be read, while it is away

    def __init__(self, kind: str, seed: int, tally: Tally, done: asyncio.Queue[Talk | None]) -> None:
        self.kind, self.tally, self.done = kind, tally, done
        self.two = kind in ("two", "database")
        self.chance = random.Random(f"{seed}/{kind}")
        self.seed = seed
        self.model = Model(self._on)
        self.disk = Disk()
        self.full = self.ending = False
        self._freed_s = -RECOVERY_S
        self._awaited: tuple[str, asyncio.Future[None]] | None = None
        self._up = asyncio.Event()
        self._talks = 0

    async def start(self) -> None:
        await self.model.start()
        config = config_of(self.model, await self._l2())
        workers = 2 if self.kind == "workers" else 1
        self.servers = [ServerProcess(config, workers=workers) for _ in range(2 if self.two else 1)]
        self.up = [True] * len(self.servers)
        for server in self.servers:
            await asyncio.to_thread(server.start)
        self._up.set()

    async def _l2(self) -> dict[str, Any]:
        return in_directory(self.disk.path)

    async def stop(self) -> None:
        await asyncio.gather(*(asyncio.to_thread(s.__exit__, None, None, None) for s in self.servers))
        await self.model.stop()
        self.disk.close()

    # -- moments

    def _on(self, moment: str, name: str) -> None:
        if self._awaited is not None and self._awaited[0] == moment and not self._awaited[1].done():
            self._awaited[1].set_result(None)

    async def _moment(self) -> str:
        for _ in range(self.chance.randint(0, self.progress)):
            await self._event("read")
        moment = self.chance.choice(MOMENTS)
        if moment == "any":
            await asyncio.sleep(self.chance.uniform(0, 0.05))
        else:
            await self._event(moment)
        if moment == "answered":  # its commit is on the way
            await asyncio.sleep(self.chance.choice((0, 0.001, 0.002, 0.003, 0.005)))
        return moment

    async def _event(self, moment: str) -> None:
        """Wait for the next one, or for a while: it may not come on a full disk."""
        self._awaited = moment, asyncio.get_running_loop().create_future()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._awaited[1], EVENT_S)
        self._awaited = None

    # -- kills

    async def round(self) -> None:
        """One kill, and everything up again."""
        if full := self.chance.random() < self.full_share:
            await self._fill()
        moment = await self._moment()
        self.tally.counts["kills"] += 1
        self.tally.counts[f"kills, {moment}"] += 1
        if self.kind == "workers" and self.chance.random() < 0.7:
            await self._kill_worker()
            if full:
                await self._free()
            return
        which = range(len(self.servers))
        if self.two and self.chance.random() < 0.7:
            which = range(i := self.chance.randrange(2), i + 1)
        for i in which:
            self.up[i] = False
            try:
                os.killpg(self.servers[i].pid, signal.SIGKILL)
            except ProcessLookupError:
                self.tally.wrong("died", f"a server ended by itself: {self.servers[i].log[-2000:]}")
        if not any(self.up):
            self._up.clear()
        for i in which:
            await asyncio.to_thread(self.servers[i].kill)
        if full and self.chance.random() < 0.5:
            await self._free()
        for i in which:
            await asyncio.to_thread(self.servers[i].restart, PATIENCE_S)
            self.up[i] = True
            self._up.set()
        if self.full:
            await asyncio.sleep(FULL_S)
            await self._free()

    async def _kill_worker(self) -> None:
        server = self.servers[0]
        if workers := server.worker_pids:
            os.kill(self.chance.choice(workers), signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE_S
        while len(server.worker_pids) < 2 and time.monotonic() < deadline:
            await asyncio.sleep(0.05)  # its supervisor looks now and then; the other worker goes on

    async def _fill(self) -> None:
        self.full = True
        self.tally.counts["disk full"] += 1
        pids = [pid for s in self.servers for pid in (s.pid, *s.worker_pids)]
        self._limited = pids
        self.disk.fill(pids)
        await asyncio.sleep(FULL_S)

    async def _free(self) -> None:
        self.disk.free(self._limited)
        self.full, self._freed_s = False, time.monotonic()

    # -- conversations

    async def talk(self) -> None:
        """Conversations one after another, until the rounds are over; each goes to the quiet server."""
        connector = aiohttp.TCPConnector(limit=0, force_close=self.kind == "workers")
        timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as client:
            while not self.ending:
                self._talks += 1
                talk = self._new(f"{self.kind}{self._talks}x{self.seed}")
                self.model.factors[talk.name] = talk.factor
                while len(talk.steps) < self.steps and not self.ending and not talk.forgotten:
                    await self._turn(client, talk)
                if not talk.forgotten:
                    if talk.session:
                        await self._step(client, talk, talk.last())
                    else:
                        await self._count_turns(client, talk)
                self.tally.counts["forgotten openly"] += talk.forgotten
                await self.done.put(talk)

    def _new(self, name: str) -> Talk:
        return Talk(name)

    async def _turn(self, client: aiohttp.ClientSession, talk: Talk) -> None:
        await self._step(client, talk, talk.next())

    def _url(self) -> str:
        up = [s for s, is_up in zip(self.servers, self.up, strict=True) if is_up]
        return self.chance.choice(up or self.servers).base_url

    async def _step(self, client: aiohttp.ClientSession, talk: Talk, step: Step) -> None:
        """Sends until the answer is read to its end."""
        started = time.monotonic()
        while True:
            await self._up.wait()
            begun = time.monotonic()
            number = len(step.attempts)
            with self.model.listening(f"{talk.name}/{step.number}/{number}") as attempt:
                step.attempts.append(attempt)
                try:
                    read = await ask(client, self._url(), talk, step, number)
                except CUT:
                    self.tally.counts["answers cut"] += 1
                    read = None
            touched = self.full or begun < self._freed_s + RECOVERY_S
            if read is not None and read.answer is not None:
                self._on("read", talk.name)
                self.tally.counts["answers read"] += 1
                talk.read(step, read.answer)
                step.conversation = read.conversation
                talk.forgotten = read.memory == "lost"
                if talk.forgotten and not touched:
                    self.tally.wrong("refused", f"{talk.name}/{step.number} is not remembered")
                return
            if read is None and touched and self.forgets:
                talk.forgotten = True  # it may have been sent without memory
                return
            if read is not None and touched:
                self.tally.counts["refused, disk full"] += 1
                await asyncio.sleep(0.05)
            elif read is not None:
                self.tally.wrong("refused", f"{talk.name}/{step.number}: {read.status} {read.error}")
                await asyncio.sleep(0.05)
            if time.monotonic() - started > PATIENCE_S:
                raise RuntimeError(f"{talk.name}/{step.number} gets no answer: {self.servers[0].log[-3000:]}")

    async def _count_turns(self, client: aiohttp.ClientSession, talk: Talk) -> None:
        while True:
            await self._up.wait()
            with contextlib.suppress(*CUT):
                talk.context = await context_of(client, self._url(), talk)
                if "error" not in (talk.context or {}) or not self.forgets:
                    return
            await asyncio.sleep(0.02)


class OnPostgres(Lane):
    """The disk that is full is the server's: it stores nothing, and after a while it may end."""

    forgets = True

    async def _l2(self) -> dict[str, Any]:
        if not self.disk.mounted:
            self.full_share = 0.0
        self.postgres = Postgres(directory=self.disk.path / "postgres")
        await asyncio.to_thread(self.postgres.start)
        return {"path": str(self.disk.path / "data"), "url": self.postgres.new_database()}

    async def _free(self) -> None:
        await super()._free()
        if not self.postgres.runs:
            self.tally.counts["database ended"] += 1
            await asyncio.to_thread(self.postgres.start)
            self._freed_s = time.monotonic()

    async def stop(self) -> None:
        await asyncio.gather(*(asyncio.to_thread(s.__exit__, None, None, None) for s in self.servers))
        await asyncio.to_thread(self.postgres.__exit__)
        await super().stop()


STORES = {"directory": Lane, "postgres": OnPostgres}


async def context_of(client: aiohttp.ClientSession, url: str, talk: Talk) -> Message | None:
    """What the server knows of the conversation, as numbers that no installation's secret is in."""
    conversation = talk.steps[-1].conversation if talk.steps else None
    if conversation is None:
        return None  # it never was paged
    headers = {"authorization": f"Bearer key-{talk.name}"}
    url = f"{url.removesuffix('/v1')}/vm/context?conversation={conversation}"
    async with client.get(url, headers=headers) as r:
        found: Message = await r.json()
        return found if r.status == 200 else {"error": found}


def in_directory(path: Path) -> dict[str, Any]:
    """`tiers.l2`."""
    return {"path": str(path / "data"), "url": None}


def config_of(model: Model, l2: dict[str, Any]) -> dict[str, Any]:
    return {
        "upstream": {"base_url": model.base_url},
        "tiers": {"l0": {"reserve_tokens": 256}, "l2": l2},
        "memory": {"tools": "always"},
        "faults": {"max_per_turn": 1000, "max_tokens_per_turn": 1_000_000, "max_rounds": 64},
        "manifest": {"max_tokens": 300},
        "models": {SMALL: {"window_tokens": WINDOW_TOKENS}, WIDE: {"window_tokens": WIDE_TOKENS}},
        "log": {"level": "warning"},
    }


# -- the server that is never killed, and the comparison


class Quiet:
    """Tells a server what was told in the lanes, and compares."""

    def __init__(self, tally: Tally, verbose: bool) -> None:
        self.tally, self.verbose = tally, verbose
        self.model = Model()

    async def run(self, talks: asyncio.Queue[Talk | None]) -> None:
        async with self.model:
            with tempfile.TemporaryDirectory(prefix="llm-pager-quiet-") as folder:
                server = ServerProcess(config_of(self.model, in_directory(Path(folder))))
                await asyncio.to_thread(server.start)
                try:
                    async with aiohttp.ClientSession() as client:
                        while (talk := await talks.get()) is not None:
                            await self.compare(client, server, talk)
                finally:
                    await asyncio.to_thread(server.__exit__, None, None, None)

    async def compare(self, client: aiohttp.ClientSession, server: ServerProcess, talk: Talk) -> None:
        """One conversation: every sending of it, and how each was heard upstream."""
        self.model.factors[talk.name] = talk.factor
        self.tally.counts["conversations"] += 1
        transcript: list[Message] = [SYSTEM]
        for step in talk.steps:
            if step.answer is None or (talk.forgotten and step is talk.steps[-1]):
                break
            groups = talk.sendings(step)
            for number, attempts in enumerate(groups):
                where = f"{talk.name}/{step.number}" + (f" (sending {number + 1})" if number else "")
                with self.model.listening(f"{talk.name}/{step.number}/{number}") as quiet:
                    read = await ask(client, server.base_url, talk, step, number)
                if read.answer is None:
                    self.tally.wrong("refused", f"{where}, by the quiet server: {read.status} {read.error}")
                    return
                self.tally.counts["turns compared"] += 1
                if not self._same(where, attempts, quiet):
                    return
                if number < len(groups) - 1 and not any(a.answered for a in attempts):
                    self.tally.wrong("half", f"{where} is stored, and upstream had not answered it")
                if talk.session:  # what it has been told before this answer
                    told = [m for m in json.loads(step.body)["messages"] if m["role"] != "system"]
                    if number and transcript[-1].get("tool_calls"):  # unheard calls are taken back
                        del transcript[-len(told) - 1 :]
                    transcript += told
                    if step is not talk.steps[-1] or number < len(groups) - 1:
                        transcript.append(read.answer)
            if read.answer != step.answer:
                self.tally.wrong("divergence", f"{where} was answered {step.answer}, by the quiet server {read.answer}")
                return
            step.conversation = read.conversation
        else:
            if talk.session:
                self._whole(talk, transcript)
            elif talk.context is not None:
                known = await context_of(client, server.base_url, talk)
                self.tally.counts["histories counted"] += 1
                if known is None or talk.context.get("last_turn") != known["last_turn"]:
                    self.tally.wrong("lost", f"{talk.name}: {talk.context}, the quiet server knows {known}")

    def _same(self, where: str, attempts: list[Attempt], quiet: Attempt) -> bool:
        for i, attempt in enumerate(attempts):
            self.tally.counts["requests compared"] += len(attempt.bodies)
            for n, body in enumerate(attempt.bodies):
                other = quiet.bodies[n] if n < len(quiet.bodies) else b""
                if body != other:
                    self.tally.wrong("divergence", f"{where}, attempt {i + 1} of {len(attempts)}, round {n + 1}: "
                                     f"{difference(body, other)}")  # fmt: skip
                    return False
        if len(attempts[-1].bodies) != len(quiet.bodies):
            self.tally.wrong("divergence", f"{where}: {len(attempts[-1].bodies)} rounds, not {len(quiet.bodies)}")
            return False
        return True

    def _whole(self, talk: Talk, transcript: list[Message]) -> None:
        """A session at its end, all of whose pages the model asks for: what was said, each once, in order."""
        heard = json.loads(talk.steps[-1].attempts[-1].bodies[-1])["messages"]
        pages = {m["tool_call_id"]: m["content"] for m in heard if m.get("tool_call_id", "").startswith("call_msg_")}
        window = "\n".join(m.get("content") or str(m.get("tool_calls")) for m in heard)
        if pages:
            there = sum(NO_PAGE not in page for page in pages.values())
        else:
            there = sum(m["role"] not in ("system", "developer") for m in heard)
        missing = []
        for i, message in enumerate(transcript[1:], 1):
            page = pages.get(f"call_msg_{i:04d}", "already loaded")
            content = message.get("content") or message["tool_calls"][0]["function"]["name"]
            if content not in page and not ("already loaded" in page and content in window):
                missing.append(f"message {i} of {len(transcript) - 1}, {content[:60]!r}: {page[:160]!r}")
        if missing:
            self.tally.wrong("lost", f"{talk.name}: {missing[0]}, and {len(missing) - 1} more")
        elif there != len(transcript) - 1:
            self.tally.wrong("half", f"{talk.name} has {there} messages, and {len(transcript) - 1} were told")
        else:
            self.tally.counts["sessions read whole"] += 1


# -- all of it


async def run(
    rounds: int, seed: int, lanes: tuple[str, ...] = LANES, say: bool = True, make: type[Lane] = Lane, share: float = 1
) -> Tally:
    """`rounds` kills over the lanes, which go on side by side; `share` of a lane's conversations, and of the answers
    between two kills."""
    tally, started = Tally(), time.monotonic()
    talks: asyncio.Queue[Talk | None] = asyncio.Queue(4 * make.talks_at_once)
    made = [(OnPostgres if kind == "database" else make)(kind, seed, tally, talks) for kind in lanes]
    for some in made:
        some.talks_at_once, some.progress = int(some.talks_at_once * share), int(some.progress * share)
    quiet = asyncio.ensure_future(Quiet(tally, say).run(talks))
    left = iter(range(rounds))

    async def lane(it: Lane) -> None:
        await it.start()
        try:
            clients = [asyncio.ensure_future(it.talk()) for _ in range(it.talks_at_once)]
            for n in left:
                if quiet.done() or any(c.done() for c in clients):
                    break
                await it.round()
                if say and (n + 1) % 50 == 0:
                    _progress(tally, n + 1, time.monotonic() - started)
            it.ending = True
            await asyncio.gather(*clients)
        finally:
            await it.stop()

    try:
        await _or_fails(asyncio.gather(*map(lane, made)), quiet)
        await talks.put(None)
        await quiet
    finally:
        quiet.cancel()
    tally.counts["seconds"] = round(time.monotonic() - started)
    return tally


async def _or_fails(work: asyncio.Future[Any], watched: asyncio.Future[None]) -> None:
    await asyncio.wait((work, watched), return_when=asyncio.FIRST_COMPLETED)
    if not work.done():
        work.cancel()
        await watched
    await work


def _progress(tally: Tally, rounds: int, seconds: float) -> None:
    wrong = ", ".join(f"{tally.counts[kind]} {kind}" for kind in WRONG)
    print(f"{rounds:5} kills in {seconds:4.0f} s: {tally.counts['answers read']} answers read, "
          f"{tally.counts['requests compared']} requests compared; {wrong}", flush=True)  # fmt: skip


def report(tally: Tally, seed: int) -> None:
    print(f"\nseed {seed}")
    for name in sorted(tally.counts, key=lambda n: (n in WRONG, n)):
        if name not in WRONG:
            print(f"  {name:24}{tally.counts[name]:8}")
    for name in WRONG:
        print(f"  {name:24}{tally.counts[name]:8}")
    for text in tally.said:
        print(f"! {text}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.kills")
    parser.add_argument("--rounds", type=int, default=2000, help="kills in all")
    parser.add_argument("--seed", type=int, default=None, help="of the plans and moments; random and printed")
    parser.add_argument("--lanes", default=",".join(LANES), help="which servers are killed")
    parser.add_argument("--store", choices=STORES, default=os.environ.get("TEST_STORE", "directory"))
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed {seed}", flush=True)
    tally = asyncio.run(run(options.rounds, seed, tuple(options.lanes.split(",")), make=STORES[options.store]))
    report(tally, seed)
    sys.exit(0 if tally.passed else 1)


if __name__ == "__main__":
    main()
