"""What encryption at rest and surviving a loss of power cost: our own gateway with and without, side by side.

Promises: as the overhead bench (whose load it is): CPU per request by the kernel's account, the gateways taking turns;
beside it the wall time of a request, of 16 at once, which has the disk's fsync in it.

    python -m tests.bench.durability [--quick] [--rows S-new,S-grow,H]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import statistics
import time
from collections.abc import Awaitable, Callable

from tests.bench.gateways import Gateway, start_ours, start_upstream
from tests.bench.overhead import FULL, QUICK, SIZES, Bench, Scale

ROWS = ("S-new", "S-grow", "H")
KEY = base64.b64encode(bytes(range(32))).decode()


class Timed(Bench):
    """Wall milliseconds per request, too: of all of a round, whose requests overlap."""

    def __init__(self, scale: Scale) -> None:
        super().__init__(scale)
        self.wall: dict[tuple[str, str], list[float]] = {}

    async def measure(self, row: str, gateway: Gateway, count: int, work: Callable[[], Awaitable[object]]) -> float:
        async def timed() -> None:
            began_s = time.perf_counter()
            await work()
            self.wall.setdefault((row, gateway.name), []).append(1e3 * (time.perf_counter() - began_s) / count)

        return await super().measure(row, gateway, count, timed)


async def run(scale: Scale, rows: list[str]) -> None:
    upstream = start_upstream()
    gateways: list[Gateway] = []
    try:
        gateways.append(start_ours(upstream.port, "plain"))
        gateways.append(start_ours(upstream.port, "encrypted", storage={"encryption": {"keys": [KEY]}}))
        gateways.append(start_ours(upstream.port, "power", l2={"durability": "power"}))
        bench = Timed(scale)
        for row in rows:
            await bench.row(row, gateways)
        for row in rows:
            plain = bench.costs[(row, "plain")].median
            for gateway in gateways:
                cost, wall = bench.costs[(row, gateway.name)], bench.wall[(row, gateway.name)][1:]  # warm
                text = f"{cost.median:.3f} ms CPU (mean {cost.mean:.3f}), {cost.median / plain:.2f} of plain; {statistics.median(wall):.2f} ms wall"
                if row in SIZES:
                    text += f"; first sight {bench.first_sight[(row, gateway.name)]:.0f} ms CPU"
                print(f"{row:8} {gateway.name:10} {text}")
    finally:
        for gateway in gateways:
            gateway.stop()
        upstream.stop()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.durability")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and requests")
    parser.add_argument("--rows", default=",".join(ROWS), help="a part of the rows")
    options = parser.parse_args()
    asyncio.run(run(QUICK if options.quick else FULL, options.rows.split(",")))


if __name__ == "__main__":
    main()
