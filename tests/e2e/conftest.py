"""The server that the tests of branches and of trimming clients talk to: one for each module."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from tests.e2e.processes import ServerProcess
from tests.e2e.script import Script, Stand, paged_config


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scripted_server() -> AsyncIterator[tuple[Script, ServerProcess]]:
    script = Script()
    async with script.upstream:
        with ServerProcess(paged_config(script.upstream)) as server:
            yield script, server


@pytest_asyncio.fixture(loop_scope="module")
async def stand(scripted_server: tuple[Script, ServerProcess]) -> AsyncIterator[Stand]:
    """The module's server with an empty script, which is checked at the test's end."""
    stand = Stand(*scripted_server)
    stand.script.rounds.clear()
    stand.script.calls.clear()
    yield stand
    await stand.close()
    stand.script.check()
