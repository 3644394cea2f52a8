"""Plays cases against a gateway and says how each ended.

Promises: every case ends within CASE_S; cases that measure time run when nothing else does; a
failure of the harness itself is a failure of the case, with its place.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Sequence

from tests.contract.model import (
    REASON_CHARS,
    Case,
    Failed,
    NotApplicable,
    Outcome,
    quote,
)
from tests.contract.play import Play, Target
from tests.contract.scripted import ScriptedUpstream
from tests.contract.wire import Client

AT_ONCE = 6
CASE_S = 30.0
GATEWAY_S = 1800.0  # for all cases; what has not begun by then has failed


async def play_all(
    target: Target, upstream: ScriptedUpstream, chosen: Sequence[Case], at_once: int = AT_ONCE
) -> dict[str, Outcome]:
    """The outcome of each case, by its id, in the order of `chosen`."""
    found: dict[str, Outcome] = {}
    async with Client() as client:
        limit = asyncio.Semaphore(at_once)
        loop = asyncio.get_running_loop()
        end = loop.time() + GATEWAY_S

        async def one(case: Case) -> None:
            async with limit:
                if loop.time() > end:
                    found[case.id] = Outcome("failed", f"not begun within {GATEWAY_S:g} s")
                    return
                found[case.id] = await play(case, target, upstream, client)

        await asyncio.gather(*(one(case) for case in chosen if not case.check.alone))
        for case in chosen:
            if case.check.alone:
                await one(case)
    return {case.id: found[case.id] for case in chosen}


async def play(
    case: Case, target: Target, upstream: ScriptedUpstream, client: Client
) -> Outcome:
    """One case's outcome; never raises for what the gateway does."""
    missing = _missing(case, target) or upstream.wire.why_absent(case.check.id, case.id)
    if missing:
        return Outcome("n/a", missing)
    scene = Play(target, case.variant, upstream, client)
    outcome = await _ending(case, scene)
    try:
        scene.close()
    except Exception as error:  # noqa: BLE001 (a mistake of ours is no pass)
        return Outcome("failed", f"the script raised {error!r}")
    return outcome


async def _ending(case: Case, scene: Play) -> Outcome:
    try:
        async with asyncio.timeout(CASE_S):
            await case.check.scenario(scene)
        scene.end()
    except Failed as failure:
        return Outcome("failed", quote(str(failure), REASON_CHARS))
    except NotApplicable as reason:
        return Outcome("n/a", str(reason))
    except TimeoutError:
        return Outcome("failed", f"not over after {CASE_S:g} s")
    except Exception as error:  # noqa: BLE001 (whatever a gateway's answer makes a scenario raise)
        place = traceback.extract_tb(error.__traceback__)
        own = [f for f in place if "tests/contract" in f.filename] or list(place)
        where = f"{own[-1].name}:{own[-1].lineno}"
        return Outcome("failed", quote(f"{error!r} at {where}", REASON_CHARS))
    return Outcome("passed", scene.note)


def _missing(case: Case, target: Target) -> str:
    needs = case.check.needs
    if needs == "proxy" and not target.proxy:
        return "there is no proxy"
    if needs == "loop" and not target.loops:
        return "it answers no calls inside"
    if needs == "window" and not target.window_tokens:
        return "it keeps no window"
    return ""
