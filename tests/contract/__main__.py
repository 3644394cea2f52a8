"""`python -m tests.contract`: plays the suite and prints the table. Exits 1 when a check failed on
`bare` or on the gateway given by `--base-url`."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from pathlib import Path

from tests.contract import report, suite
from tests.contract.gateways import (
    CHANNEL_HEADER,
    PAGE_ARGUMENTS,
    NotInstalled,
    started,
    upstream_of,
)
from tests.contract.model import Case, Outcome
from tests.contract.play import Target
from tests.contract.runner import AT_ONCE, play_all
from tests.contract.scripted import ScriptedUpstream


def main() -> int:
    asked = _arguments()
    chosen = suite.cases(asked.only)
    if not chosen:
        raise SystemExit(f"no check is called {asked.only}")
    if asked.list:
        for case in chosen:
            print(f"{case.id:48} {case.check.promise}")
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # gateways end with us
    results = asyncio.run(_play(asked, chosen))
    promises = {case.id: case.check.promise for case in chosen}
    parts = [report.totals(chosen, results), report.notes(results)]
    parts.append(report.reasons(results, promises))
    if not asked.brief:
        parts.insert(0, report.table(chosen, results))
    print("\n\n".join(part for part in parts if part))
    if asked.json:
        plain = {
            name: r if isinstance(r, str) else {id: [o.status, o.note] for id, o in r.items()}
            for name, r in results.items()
        }
        Path(asked.json).write_text(json.dumps(plain, indent=1))
    judged = results.get("given", results.get("bare", {}))
    if isinstance(judged, str):
        return 1
    return int(any(o.status == "failed" for o in judged.values()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.contract", description=__doc__)
    parser.add_argument("--gateways", default="bare,llm-pager", help="names, comma-separated")
    parser.add_argument("--only", help="a case, a check, a category, or the beginning of an id")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--brief", action="store_true", help="totals and failures only")
    parser.add_argument("--json", help="write every outcome to this file")
    parser.add_argument("--at-once", type=int, default=AT_ONCE, metavar="CASES",
                        help="played side by side: fewer for a gateway that is slow to answer")
    parser.add_argument("--base-url", help="a running proxy's /v1, instead of --gateways")
    parser.add_argument("--upstream-port", type=int, default=0, help="where that proxy forwards to")
    parser.add_argument("--model", default="gpt-4o", help="the model to ask that proxy for")
    parser.add_argument("--window", type=int, default=0, metavar="TOKENS",
                        help="that proxy keeps requests below so many tokens, by paging as llm-pager does")
    return parser.parse_args()


async def _play(
    asked: argparse.Namespace, chosen: list[Case]
) -> dict[str, dict[str, Outcome] | str]:
    results: dict[str, dict[str, Outcome] | str] = {}
    if asked.base_url:
        async with ScriptedUpstream(asked.upstream_port) as upstream:
            window = {"loops": True, "window_tokens": asked.window, "arguments": PAGE_ARGUMENTS,
                      "channel_header": CHANNEL_HEADER}
            given = Target("given", asked.base_url, asked.base_url, asked.model,
                           **(window if asked.window else {}))
            return {"given": await play_all(given, upstream, chosen, asked.at_once)}
    for name in asked.gateways.split(","):
        try:
            async with upstream_of(name) as upstream, started(name, upstream.port) as target:
                results[name] = await play_all(target, upstream, chosen, asked.at_once)
        except (NotInstalled, RuntimeError) as error:
            results[name] = str(error)
        except KeyError:
            raise SystemExit(f"no gateway is called {name}") from None
    return results


if __name__ == "__main__":
    sys.exit(main())
