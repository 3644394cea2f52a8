"""Plays the selected cases once per gateway, all at once, and lets each test read its outcome."""

from __future__ import annotations

import asyncio

import pytest

from tests.contract.gateways import started
from tests.contract.model import Case, Outcome
from tests.contract.runner import play_all
from tests.contract.scripted import ScriptedUpstream

Key = tuple[str, str]  # gateway, case


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest) -> dict[Key, Outcome]:
    """What became of every case that this run of pytest has selected."""
    wanted: dict[str, list[Case]] = {}
    for item in request.session.items:
        spec = getattr(item, "callspec", None)
        if spec is not None and "gateway" in spec.params and "case" in spec.params:
            wanted.setdefault(spec.params["gateway"], []).append(spec.params["case"])
    return asyncio.run(_play(wanted))


async def _play(wanted: dict[str, list[Case]]) -> dict[Key, Outcome]:
    found: dict[Key, Outcome] = {}
    async with ScriptedUpstream() as upstream:

        async def on(gateway: str) -> None:
            async with started(gateway, upstream.port) as target:
                played = await play_all(target, upstream, wanted[gateway])
            found.update({(gateway, id): outcome for id, outcome in played.items()})

        await asyncio.gather(*(on(gateway) for gateway in wanted))
    return found
