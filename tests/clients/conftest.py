"""One stage for all clients: its server starts once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.stage import Stage
from tests.clients.stage import stage as open_stage


@pytest.fixture(scope="session")
def stage() -> Iterator[Stage]:
    with open_stage() as opened:
        yield opened
