"""Three replicas on one PostgreSQL, and everything between them breaks: what was answered is there, on each of them.

    python -m tests.chaos.replicas --rounds 500 [--seed N]

Fifty conversations at once, each turn to a random replica: whole histories and sessions of new messages, streamed and
not, with tools, faults and edits, as in kills.py, and two branches of one conversation at the same moment. Two
replicas reach the server directly, one through PgBouncer in transaction mode. In each round one of:

    replica    one is killed with SIGKILL, at any byte of what it reads, writes or stores
    cut        the connection of a commit is cut: before the server has got it, or while it stores it
    database   the server is restarted at once, as if it had crashed
    pooler     PgBouncer is killed and started again

What has to hold is what kills.py counts, beside a server of one process on a directory that is told the same:
`lost`, `half`, `divergence`, `refused`, `died`; and `foreign`, a mark of another conversation in a request. While the
database is away a turn may be answered without being remembered, if its answer says so; a commit whose connection is
cut is found out: that is never told to anybody. Exit status 0: all are 0.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import sys
import time

import aiohttp

from tests.chaos.kills import Lane, Step, Talk, Tally, config_of, report, run
from tests.chaos.model import Message
from tests.e2e.processes import ServerProcess
from tests.services import PgBouncer, Postgres, Tap

REPLICAS = 3
EVENTS = ("replica",) * 9 + ("cut",) * 9 + ("database", "pooler")
FORK_SHARE = 0.3  # of the conversations with whole histories, which have two branches at once now and then
TIMEOUT_S = 20.0  # of a statement: everything here shares two cores
AWAY_S = (0.0, 0.1, 0.4)  # that the server stays away
_MARK = re.compile(rb"(replicas\d+x\d+)[ua]\d+q")


class Forking(Talk):
    """A conversation that is asked two things at once. Nothing is learned of its bills (there are none): which of the
    two is billed first would be seen in what comes after."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.session, self.factor = False, 0.0
        self.aside: set[int] = set()  # steps that nobody goes on from

    def fork(self, step: Step) -> Step:
        """The same history with another question."""
        body = json.loads(step.body)
        number = len(self.steps)
        body["messages"][-1] = {"role": "user", "content": f"Or {self.name}u{number}q, aside?"}
        self.aside.add(number)
        self.steps.append(Step(number, json.dumps(body).encode(), body["stream"]))
        return self.steps[-1]

    def read(self, step: Step, answer: Message) -> None:
        if step.number in self.aside:
            step.answer = answer
        else:
            super().read(step, answer)


class Replicas(Lane):
    """The lane: `servers` are the replicas; `full` while the database is away."""

    talks_at_once = 50
    steps = 16
    forgets = True

    async def start(self) -> None:
        await self.model.start()
        self.cuts = 0  # that are due
        self.postgres = await asyncio.to_thread(Postgres().start)
        self.pooler = await asyncio.to_thread(PgBouncer(self.postgres).start)
        self.tap = Tap(self.postgres.port, self._cut).__enter__()
        url = self.postgres.new_database()
        self.servers, config = [], config_of(self.model, {})
        for n in range(REPLICAS):
            way = self.pooler.url(url) if n == REPLICAS - 1 else self.tap.url(url)
            l2 = {"path": str(self.disk.path / f"data{n}"), "url": way, "timeout_s": TIMEOUT_S}
            self.servers.append(ServerProcess({**config, "tiers": {**config["tiers"], "l2": l2}}))
        self.up = [True] * REPLICAS
        await asyncio.gather(*(asyncio.to_thread(server.start) for server in self.servers))
        self._up.set()

    async def stop(self) -> None:
        for n, server in enumerate(self.servers if not self.tally.passed else ()):
            told = [line for line in server.log.splitlines() if " ERROR " in line or " WARNING " in line or line.startswith(" ")]
            self.tally.said += [f"log of replica {n}: {line[:300]}" for line in told[-60:]]
        await super().stop()
        self.tap.__exit__()
        await asyncio.to_thread(self.pooler.__exit__)
        await asyncio.to_thread(self.postgres.__exit__)

    def _cut(self, commit: bool) -> str:
        """In the tap's thread: the next commits' connections are cut."""
        if not commit or not self.cuts:
            return ""
        self.cuts -= 1
        self.tally.counts["commits cut"] += 1
        return self.chance.choice(("before", "after"))

    async def round(self) -> None:
        event = self.chance.choice(EVENTS)
        if event == "cut":
            self.cuts = self.chance.randint(1, 3)
            await self._event("answered")
        else:
            await self._moment()
        self.tally.counts[f"rounds, {event}"] += 1
        self.tally.counts["kills"] += 1
        if event == "replica":
            i = self.chance.randrange(REPLICAS)
            self.up[i] = False
            try:
                os.killpg(self.servers[i].pid, signal.SIGKILL)
            except ProcessLookupError:
                self.tally.wrong("died", f"a replica ended by itself: {self.servers[i].log[-2000:]}")
            await asyncio.to_thread(self.servers[i].kill)
            await asyncio.to_thread(self.servers[i].restart)
            self.up[i] = True
        elif event in ("database", "pooler"):
            self.full = True
            away_s = self.chance.choice(AWAY_S)
            if event == "database":
                await asyncio.to_thread(self.postgres.stop, "immediate")
                await asyncio.sleep(away_s)
                await asyncio.to_thread(self.postgres.start)
            else:
                await asyncio.to_thread(self.pooler.kill)
                await asyncio.sleep(away_s)
                await asyncio.to_thread(self.pooler.start)
            self.full, self._freed_s = False, time.monotonic()

    def _new(self, name: str) -> Talk:
        return Forking(name) if random.Random(f"{name}/fork").random() < FORK_SHARE else Talk(name)

    async def _turn(self, client: aiohttp.ClientSession, talk: Talk) -> None:
        step = talk.next()
        steps = [step]
        if isinstance(talk, Forking) and talk.plan.random() < 0.3 and talk.history[-1]["role"] == "user":
            steps.append(talk.fork(step))
            self.tally.counts["branches at once"] += 1
        await asyncio.gather(*(self._step(client, talk, one) for one in steps))
        for body in (body for one in steps for attempt in one.attempts for body in attempt.bodies):
            for name in {*map(bytes.decode, _MARK.findall(body))} - {talk.name}:
                self.tally.wrong("foreign", f"{talk.name}/{step.number} was sent with a mark of {name}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.replicas")
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--seed", type=int, default=None, help="of the plans and moments; random and printed")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed {seed}", flush=True)
    tally = asyncio.run(replicas(options.rounds, seed))
    report(tally, seed)
    sys.exit(0 if tally.passed else 1)


class Few(Replicas):
    talks_at_once = 16


async def replicas(rounds: int, seed: int, say: bool = True, lane: type[Replicas] = Replicas) -> Tally:
    return await run(rounds, seed, ("replicas",), say, lane)


if __name__ == "__main__":
    main()
