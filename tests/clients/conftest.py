"""One stage for all clients: its server starts once."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import certifi
import pytest

from tests.clients.stage import Stage
from tests.clients.stage import stage as open_stage


@pytest.fixture(scope="package", autouse=True)
def one_certificate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every client reads all certificates when it is made, for 30 ms; here it needs none of them."""
    end = ssl.PEM_FOOTER
    first = Path(certifi.where()).read_text().split(end)[0] + end + "\n"
    file = tmp_path_factory.mktemp("certificates") / "one.pem"
    file.write_text(first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(file))
        yield


@pytest.fixture(scope="package")
def stage(one_certificate: None) -> Iterator[Stage]:
    with open_stage() as opened:
        yield opened
