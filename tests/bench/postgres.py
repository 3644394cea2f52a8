"""A turn on PostgreSQL beside one in a directory: CPU of our process, latency, round trips, bytes; and a cold one.

    python -m tests.bench.postgres [--turns 30] [--talks 8]

Conversations of 120-word messages in a 4,000-token window, one request after another, against an upstream that
answers at once; each store has a server process of its own. Printed for each store: CPU milliseconds of the server
process and the median of the latency, per turn of the second half (where all of them page); for PostgreSQL the round
trips of a turn and, on a second replica, of a first one in mid-epoch; bytes per turn in its tables, and of its log.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from pathlib import Path
from typing import Any

import aiohttp

from tests.e2e.processes import ServerProcess
from tests.e2e.script import MODEL, SYSTEM, TAG, Script, filler, paged_config
from tests.services import Postgres, Tap, execute

_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


class Talk:
    def __init__(self, name: str) -> None:
        self.name, self.history = name, [SYSTEM]

    async def turn(self, client: aiohttp.ClientSession, url: str) -> float:
        """Seconds that it took."""
        number = len(self.history)
        self.history.append({"role": "user", "content": f"{self.name} {number}: {filler(f'{self.name}{number}', 120)}"})
        began = time.perf_counter()
        headers = {TAG: f"{self.name}/{number}", "authorization": f"Bearer {self.name}"}
        async with client.post(f"{url}/chat/completions", json={"model": MODEL, "messages": self.history}, headers=headers) as r:
            assert r.status == 200 and "x-llm-pager-memory" not in r.headers
            answer = (await r.json())["choices"][0]["message"]["content"]
        self.history.append({"role": "assistant", "content": answer})
        return time.perf_counter() - began


async def measure(config: dict[str, Any], turns: int, talks: int, label: str) -> None:
    with ServerProcess(config) as server:
        async with aiohttp.ClientSession() as client:
            all_talks = [Talk(f"{label}{n}") for n in range(talks)]
            for _ in range(turns // 2):
                for talk in all_talks:
                    await talk.turn(client, server.base_url)
            before, took = cpu_s(server.pid), []
            for _ in range(turns - turns // 2):
                took += [await talk.turn(client, server.base_url) for talk in all_talks]
            cpu_ms = (cpu_s(server.pid) - before) / len(took) * 1000
    print(f"{label:12}{cpu_ms:8.2f} ms CPU{statistics.median(took) * 1000:8.2f} ms median", flush=True)


async def trips(config: dict[str, Any], tap: Tap, url: str, turns: int) -> None:
    l2 = {"url": tap.url(url)}
    config = {**config, "tiers": {**config["tiers"], "l2": l2}}
    with ServerProcess(config) as one, ServerProcess(config) as other:
        async with aiohttp.ClientSession() as client:
            talk, warm = Talk("trips"), []
            for n in range(turns):
                before = tap.trips
                await talk.turn(client, one.base_url)
                warm += [tap.trips - before] if n > turns // 2 else []
            for _ in range(2):  # its statements are prepared, and what comes of a first answer is over
                await Talk("other").turn(client, other.base_url)
                await asyncio.sleep(1)
            before = tap.trips
            await talk.turn(client, other.base_url)
            cold = tap.trips - before
    print(f"round trips: {statistics.median(warm):.0f} a turn (most {max(warm)}), {cold} of a cold one after {turns} turns")


async def run(turns: int, talks: int) -> None:
    script = Script()
    with Postgres() as server:
        url = server.new_database()
        async with script.upstream:
            config = paged_config(script.upstream, log={"level": "error"})
            await measure(config, turns, talks, "directory")
            before = server.execute("SELECT pg_current_wal_lsn() AS at")[0]["at"]
            await measure({**config, "tiers": {**config["tiers"], "l2": {"url": url}}}, turns, talks, "postgres")
            count = turns * talks
            log = server.execute("SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), $1) AS bytes", before)[0]["bytes"]
            sizes = execute(url, "SELECT sum(pg_total_relation_size(oid)) AS bytes FROM pg_class WHERE relname LIKE 'llm_pager_%' AND relkind = 'r'")
            values = execute(url, "SELECT sum(octet_length(value)) AS bytes, count(*) AS rows FROM llm_pager_values")[0]
            print(f"a turn: {values['rows'] / count:.1f} values of {values['bytes'] / count:.0f} bytes in all,"
                  f" {sizes[0]['bytes'] / count:.0f} with indexes and free space, {log / count:.0f} of the log")  # fmt: skip
            with Tap(server.port) as tap:
                await trips(config, tap, server.new_database(), turns)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.postgres")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--talks", type=int, default=8)
    options = parser.parse_args()
    asyncio.run(run(options.turns, options.talks))


if __name__ == "__main__":
    main()
