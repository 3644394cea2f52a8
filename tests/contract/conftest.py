"""Plays the selected cases of a gateway at once, when its first test asks, and lets each read its own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import cache

import pytest

from tests.contract.expectation import Outcomes
from tests.contract.gateways import started, upstream_of
from tests.contract.model import Case, Outcome
from tests.contract.runner import play_all


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    """By gateway: what became of every case that this run of pytest has selected."""
    wanted: dict[str, list[Case]] = {}
    for item in request.session.items:
        spec = getattr(item, "callspec", None)
        if spec is not None and "gateway" in spec.params and "case" in spec.params:
            wanted.setdefault(spec.params["gateway"], []).append(spec.params["case"])
    return cache(lambda gateway: asyncio.run(_play(gateway, wanted[gateway])))


async def _play(gateway: str, cases: Sequence[Case]) -> dict[str, Outcome]:
    async with upstream_of(gateway) as upstream, started(gateway, upstream.port) as target:
        return await play_all(target, upstream, cases)
