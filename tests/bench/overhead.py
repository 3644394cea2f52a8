"""What a request costs in the gateway: ours, a passthrough and LiteLLM's proxy, side by side.

Promises: every figure is CPU time per request from the kernel's account of the gateway's processes
(so a noisy machine matters little), median over rounds in which the gateways take turns, all
against one upstream that costs them nothing. The two floors are those of the main job: at most 3
times the passthrough, at least 10 times less than LiteLLM's proxy in its fastest setting.

    python -m tests.bench.overhead [--quick] [--no-rivals] [--rows S-new,H]

The rivals are LiteLLM's proxy and headroom, where they are installed (tests/bench/gateways.py says how).

Rows: S-new   about 1 KB, 16 at once, each a new conversation
      S-grow  the second turn of such a conversation (two messages more), 16 at once
      H       1,000 messages, 400 KB: consecutive turns over a 32,000-token window
      X       10,000 messages, 4 MB: likewise
      stream  50 chunks, 16 at once, each a new conversation of about 1 KB
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from tests.bench.gateways import (
    Gateway,
    cpu_seconds,
    rss_mb,
    start_headroom,
    start_litellm,
    start_ours,
    start_passthrough,
    start_upstream,
)
from tests.bench.load import Answered, Connection, Growing, many, turns

AT_ONCE = 16
SETTLE_S = 0.15  # what a gateway does after its answer belongs to the request
MAX_OF_PASSTHROUGH = 3.0
MIN_LITELLM_OF_OURS = 10.0
SMALL_CHARS = 950
SIZES = {"H": 1_000, "X": 10_000}
ROWS = ("S-new", "S-grow", "H", "X", "stream")
SLOW = {"litellm openai/", "headroom"}  # seconds per large request: one round, and nothing to learn from X


@dataclass(frozen=True)
class Scale:
    """Rounds, and requests per round of each row."""

    rounds: int
    small: int
    h: int
    x: int
    stream: int
    ttft: int


FULL = Scale(rounds=5, small=480, h=40, x=10, stream=160, ttft=40)
QUICK = Scale(rounds=3, small=160, h=15, x=4, stream=64, ttft=15)


@dataclass
class Cost:
    """One gateway in one row: CPU milliseconds per request, one value per round."""

    rounds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.rounds)


class Bench:
    """The rows; each method does one round of one row with one gateway."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.costs: dict[tuple[str, str], Cost] = {}
        self.first_sight: dict[tuple[str, str], float] = {}
        self.growing: dict[tuple[str, str], Growing] = {}
        self.serial = 0

    def _small(self, gateway: Gateway, count: int) -> list[Growing]:
        self.serial += 1
        seeds = (f"{gateway.name}/{self.serial}/{i}" for i in range(count))
        return [Growing(s, gateway.model, 1, SMALL_CHARS) for s in seeds]

    async def measure(
        self, row: str, gateway: Gateway, count: int, work: Callable[[], Awaitable[object]]
    ) -> float:
        """CPU milliseconds per request of `work`, which makes `count` of them."""
        await asyncio.sleep(SETTLE_S)
        before = cpu_seconds(gateway.pid)
        await work()
        await asyncio.sleep(SETTLE_S)
        spent = 1e3 * (cpu_seconds(gateway.pid) - before) / count
        self.costs.setdefault((row, gateway.name), Cost()).rounds.append(spent)
        return spent

    async def small(self, row: str, gateway: Gateway, count: int) -> None:
        stream = row == "stream"
        conversations = self._small(gateway, count)
        if row == "S-grow":
            first = [c.body() for c in conversations]
            for c, a in zip(conversations, await many(gateway.port, first, AT_ONCE), strict=True):
                c.answered(a.text)
        bodies = [c.body(stream) for c in conversations]
        answers: list[Answered] = []

        async def work() -> None:
            answers.extend(await many(gateway.port, bodies, AT_ONCE))

        await self.measure(row, gateway, count, work)
        if stream and not all(a.body.rstrip().endswith(b"[DONE]") for a in answers):
            raise RuntimeError(f"{gateway.name} ended a stream without [DONE]")

    async def large(self, row: str, gateway: Gateway, count: int) -> None:
        conversation = self.growing[(row, gateway.name)]
        await self.measure(
            row, gateway, count, lambda: turns(gateway.port, conversation, count)
        )

    async def warm_up(self, row: str, gateway: Gateway) -> None:
        """Unmeasured, but for what ours pays when it sees a long history for the first time."""
        key = (row, gateway.name)
        if row not in SIZES:
            await self.small(row, gateway, 2 * AT_ONCE)
            del self.costs[key]
            return
        conversation = Growing(f"{row}/{gateway.name}", gateway.model, SIZES[row])
        self.growing[key] = conversation
        first = await self.measure(row, gateway, 1, lambda: turns(gateway.port, conversation, 1))
        self.first_sight[(row, gateway.name)] = first
        await turns(gateway.port, conversation, 2)
        del self.costs[key]

    async def row(self, row: str, gateways: list[Gateway]) -> None:
        """Warm-up of each gateway, then the rounds, in which they take turns."""
        for gateway in gateways:
            if gateway.name not in SLOW or row != "X":
                await self.warm_up(row, gateway)
        counts = {"H": self.scale.h, "X": self.scale.x, "stream": self.scale.stream}
        for n in range(self.scale.rounds):
            for gateway in gateways:
                if gateway.name in SLOW and (n > 0 or row == "X"):
                    continue
                if row in SIZES:
                    count = min(counts[row], 5) if gateway.name in SLOW else counts[row]
                    await self.large(row, gateway, count)
                else:
                    await self.small(row, gateway, counts.get(row, self.scale.small))
        done = "  ".join(
            f"{g.name} {self.costs[(row, g.name)].median:.3f}"
            for g in gateways
            if (row, g.name) in self.costs
        )
        print(f"  {row}: {done}", flush=True)

    async def ttft_ms(self, gateway: Gateway | None, upstream_port: int) -> float:
        """Median time to the first chunk of a stream, one request at a time."""
        port = gateway.port if gateway else upstream_port
        model = gateway.model if gateway else "gpt-4o"
        connection = await Connection(port).open()
        times = []
        for i in range(self.scale.ttft):
            body = Growing(f"ttft/{port}/{model}/{i}", model, 1, SMALL_CHARS).body(stream=True)
            times.append((await connection.chat(body)).first_byte_s)
        await connection.close()
        return 1e3 * statistics.median(times)


def report(bench: Bench, gateways: list[Gateway], rows: list[str], ttft: dict[str, float]) -> bool:
    """Prints the table; True when every floor that was measured holds."""
    print(f"\nCPU ms per request, median of {bench.scale.rounds} rounds"
          " (ours also: the mean, which has the epochs' rebuilds in it)")  # fmt: skip
    names = [g.name for g in gateways]
    print(f"{'':16}" + "".join(f"{row:>10}" for row in rows) + f"{'TTFT ms':>10}{'RSS MB':>9}")
    for g in gateways:
        cells = [bench.costs.get((row, g.name)) for row in rows]
        shown = "".join(f"{c.median:>10.3f}" if c else f"{'-':>10}" for c in cells)
        note = "  (for reference)" if g.name in SLOW else ""
        print(f"{g.name:16}{shown}{ttft[g.name]:>10.2f}{rss_mb(g.pid):>9.0f}{note}")
        if g.name == "ours":
            print(f"{'ours, mean':16}" + "".join(f"{c.mean:>10.3f}" for c in cells if c))
    print(f"{'no gateway':16}" + f"{'':>10}" * len(rows) + f"{ttft['']:>10.2f}")
    print()
    passed = True
    for row in rows:
        ours = bench.costs[(row, "ours")].median
        for name, floor in (("passthrough", MAX_OF_PASSTHROUGH), ("litellm", MIN_LITELLM_OF_OURS)):
            if name not in names:
                continue
            other = bench.costs[(row, name)].median
            if name == "passthrough":
                ratio, ok = ours / other, ours / other <= floor
                text = f"ours / passthrough {ratio:7.2f}  (at most {floor:g})"
            else:
                ratio, ok = other / ours, other / ours >= floor
                text = f"litellm / ours     {ratio:7.2f}  (at least {floor:g})"
            passed &= ok
            print(f"{row:8} {text:44} {'PASS' if ok else 'FAIL'}")
    for (row, name), ms in bench.first_sight.items():
        if name == "ours":
            print(f"{row:8} first sight of {SIZES[row]:,} messages: {ms:.1f} ms CPU (ours, once)")
    return passed


async def run(scale: Scale, with_rivals: bool, rows: list[str], with_ours: bool = True) -> bool:
    """Starts everything, measures every row, stops everything."""
    upstream = start_upstream()
    gateways: list[Gateway] = []
    try:
        gateways.append(start_passthrough(upstream.port))
        if with_ours:
            gateways.insert(0, start_ours(upstream.port))
        for start in (start_litellm, start_headroom) if with_rivals else ():
            try:
                gateways += start(upstream.port)
            except FileNotFoundError as e:
                print(f"left out: {e}", file=sys.stderr)
        bench, started = Bench(scale), time.monotonic()
        for row in rows:
            await bench.row(row, gateways)
        ttft = {g.name: await bench.ttft_ms(g, upstream.port) for g in gateways}
        ttft[""] = await bench.ttft_ms(None, upstream.port)
        if not with_ours:
            gateways.insert(0, gateways[0])
            for row in rows:
                bench.costs[(row, "ours")] = bench.costs[(row, "passthrough")]
        passed = report(bench, gateways, rows, ttft)
        print(f"{time.monotonic() - started:.0f} s")
        return passed
    finally:
        for gateway in gateways:
            gateway.stop()
        upstream.stop()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.overhead")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and requests")
    parser.add_argument("--no-rivals", action="store_true", help="without LiteLLM's proxy and headroom")
    parser.add_argument("--rows", default=",".join(ROWS), help="a part of the rows")
    options = parser.parse_args()
    rows = options.rows.split(",")
    if unknown := set(rows) - set(ROWS):
        parser.error(f"unknown rows {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    passed = asyncio.run(run(QUICK if options.quick else FULL, not options.no_rivals, rows))
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
