"""What an open dashboard costs the requests: the overhead bench's rows, with one open and without.

    python -m tests.bench.dashboard [--rows S-new,H] [--quick]

Promises: three servers of ours take turns round by round: one alone, one more alone (the difference of the two is the noise),
and one that is watched as a browser watches it: the home page and the page of the newest conversation are open, each with
its stream of /vm/events, and are loaded anew at each event, however fast these come. `time` is what a request takes at its
client; what the pages themselves cost is the CPU that the watched server used more, for each page that was loaded.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp

from tests.bench.gateways import Gateway, start_ours, start_upstream
from tests.bench.overhead import QUICK, ROWS, Bench, Scale

ALONE, AGAIN, WATCHED = "alone", "alone again", "watched"
SCALE = Scale(rounds=7, small=320, h=30, x=8, stream=96, ttft=0)


class Browser:
    """Pages that are open, and how often they were loaded."""

    def __init__(self, session: aiohttp.ClientSession, root: str) -> None:
        self._session, self._root, self.loaded = session, root, 0

    async def get(self, path: str) -> aiohttp.ClientResponse:
        async with self._session.get(self._root + path) as answer:
            await answer.read()
            answer.raise_for_status()
            return answer

    async def follow(self, events: str, page: str, opened: asyncio.Event) -> None:
        """As proxy/ui/static/app.js does."""
        await self.get(page)
        async with self._session.get(self._root + events, timeout=aiohttp.ClientTimeout()) as stream:
            async for line in stream.content:
                opened.set()
                if line.startswith(b"event: turn"):
                    await self.get(page)
                    self.loaded += 1


@asynccontextmanager
async def watching(port: int) -> AsyncIterator[Browser]:
    """The home page and the newest conversation's, open."""
    async with aiohttp.ClientSession() as session:
        browser = Browser(session, f"http://127.0.0.1:{port}")
        newest = (await (await browser.get("/vm/conversations?limit=1")).json())["conversations"][0]["conversation"]
        opened = [asyncio.Event(), asyncio.Event()]
        streams = ["/vm/events", f"/vm/events?conversation={newest}"]
        pages = ["/vm/ui", f"/vm/ui/conversations/{newest}"]
        followed = [asyncio.ensure_future(browser.follow(*one)) for one in zip(streams, pages, opened, strict=True)]
        await asyncio.gather(*(event.wait() for event in opened))
        yield browser
        for one in followed:
            if one.done():
                one.result()  # it must not have ended
            one.cancel()


class Watched(Bench):
    """Which also has what each request of a round took, in milliseconds."""

    def __init__(self, scale: Scale) -> None:
        super().__init__(scale)
        self.times: dict[tuple[str, str], list[float]] = {}
        self.pages, self.pages_ms = 0, 0.0
        self._browser: Browser | None = None

    async def row(self, row: str, gateways: list[Gateway]) -> None:
        async with AsyncExitStack() as self._opened:
            await super().row(row, gateways)
        self._browser = None

    async def measure(self, row: str, gateway: Gateway, count: int, work: Callable[[], Awaitable[object]]) -> float:
        async def timed() -> None:
            began_s = time.perf_counter()
            await work()
            self.times.setdefault((row, gateway.name), []).append(1e3 * (time.perf_counter() - began_s) / count)

        if gateway.name != WATCHED or (row, ALONE) not in self.costs:  # or warming up
            return await super().measure(row, gateway, count, timed)
        if self._browser is None:  # open from the first round on
            self._browser = await self._opened.enter_async_context(watching(gateway.port))
        loaded = self._browser.loaded
        spent = await super().measure(row, gateway, count, timed)
        self.pages += self._browser.loaded - loaded
        self.pages_ms += (spent - self.costs[row, ALONE].rounds[-1]) * count
        return spent

    async def warm_up(self, row: str, gateway: Gateway) -> None:
        await super().warm_up(row, gateway)
        del self.times[row, gateway.name]


async def run(scale: Scale, rows: list[str]) -> None:
    """Prints a line a row."""
    upstream = start_upstream()
    gateways: list[Gateway] = []
    try:
        gateways += [start_ours(upstream.port, name) for name in (ALONE, AGAIN, WATCHED)]
        bench = Watched(scale)
        for row in rows:
            await bench.row(row, gateways)
        print(f"\n| row | time, ms a request | {AGAIN} | {WATCHED} |\n|---|---|---|---|")
        for row in rows:
            alone, again, watched = (statistics.median(bench.times[row, name]) for name in (ALONE, AGAIN, WATCHED))
            print(f"| {row} | {alone:.2f} | {again / alone:.2f} | {watched / alone:.2f} |")
        print(f"medians of {scale.rounds} rounds; {bench.pages} pages were loaded, {bench.pages_ms / max(1, bench.pages):.0f} ms of CPU each")
    finally:
        for gateway in gateways:
            gateway.stop()
        upstream.stop()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.dashboard")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and requests")
    parser.add_argument("--rows", default=",".join(ROWS), help="a part of the rows")
    options = parser.parse_args()
    rows = options.rows.split(",")
    if unknown := set(rows) - set(ROWS):
        parser.error(f"unknown rows {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    asyncio.run(run(QUICK if options.quick else SCALE, rows))


if __name__ == "__main__":
    main()
