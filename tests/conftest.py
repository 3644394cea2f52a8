"""Fixtures of the session that any test may ask for; what holds for every property; which worker runs what, and when."""

import gc
import os
import sys
from typing import Any

import pytest
from hypothesis import settings

from tests.examples import examples
from tests.services import az, gs, pgbouncer, postgres, postgres_url, s3

__all__ = ["az", "gs", "pgbouncer", "postgres", "postgres_url", "s3"]

# Without bytecode every process that a test starts compiles all that it imports: ours for a second of CPU, litellm for five.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

settings.register_profile("tests", examples(30))
settings.load_profile("tests")

# One worker runs them: litellm is imported once, here and where servers are forked from.
_WITH_LITELLM = (
    "tests/clients/test_litellm.py", "tests/contract/test_providers.py", "tests/e2e/test_providers.py",
    "tests/upstream/test_gemini.py", "tests/upstream/test_litellm.py",
)  # fmt: skip
_LONGEST = ("tests/clients/", "tests/contract/", "tests/ui/", "tests/chaos/", "tests/e2e/", "tests/storage/", "tests/conversation/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first: no worker is left with one while the others have nothing more to do."""

    def place(item: pytest.Item) -> tuple[bool, int]:
        name = item.nodeid.partition("::")[0]
        return name not in _WITH_LITELLM, next((n for n, part in enumerate(_LONGEST) if name.startswith(part)), len(_LONGEST))

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile`, but that files which share what is slow to make are one."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            name: str = super()._split_scope(nodeid)
            return "with litellm" if name in _WITH_LITELLM else name

    return Files(config, log)


def pytest_collection_finish() -> None:
    """What the tests are made of stays; no collection has to look at it again."""
    gc.collect()
    gc.freeze()
