"""Nothing got slower: each row of the overhead bench, ours against the passthrough of the same run.

    python -m tests.bench.guard [--rows S-new,H]

Promises: a row fails when its ratio is above `GUARDED` in every one of `TRIES` runs, so that a noisy minute
fails nothing; exit status 0 when none does. The figures stand here and nowhere else: what
`python -m tests.bench.overhead` measured, times `MARGIN`. Lower them when the program gets faster.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

from tests.bench.gateways import start_ours, start_passthrough, start_upstream
from tests.bench.overhead import ROWS, Bench, Scale

MEASURED = {"S-new": 2.9, "S-grow": 3.0, "H": 4.9, "X": 2.1, "stream": 1.7}  # the highest of three runs, ratio of medians
MARGIN = 1.3
TRIES = 3
SCALE = Scale(rounds=3, small=160, h=12, x=4, stream=64, ttft=0)


async def run(rows: list[str]) -> bool:
    """Measures every row, those that are above their figure again."""
    upstream = start_upstream()
    gateways = []
    try:
        gateways.append(start_ours(upstream.port))
        gateways.append(start_passthrough(upstream.port))
        for left in range(TRIES, 0, -1):
            bench = Bench(SCALE)
            for row in rows:
                await bench.row(row, gateways)
            slower = []
            for row in rows:
                ours, other = (bench.costs[(row, g.name)].median for g in gateways)
                ratio, most = ours / other, MEASURED[row] * MARGIN
                slower += [row] if ratio > most else []
                said = "ok" if ratio <= most else "again" if left > 1 else "SLOWER"
                print(f"{row:8} {ratio:6.2f} times the passthrough, at most {most:.2f}  {said}", flush=True)
            rows = slower
            if not rows:
                return True
        return False
    finally:
        for gateway in gateways:
            gateway.stop()
        upstream.stop()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.guard")
    parser.add_argument("--rows", default=",".join(ROWS), help="a part of the rows")
    options = parser.parse_args()
    rows = options.rows.split(",")
    if unknown := set(rows) - set(ROWS):
        parser.error(f"unknown rows {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    sys.exit(0 if asyncio.run(run(rows)) else 1)


if __name__ == "__main__":
    main()
