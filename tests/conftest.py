"""Fixtures of the session that any test may ask for; and what holds for every property."""

import gc
import os
import sys

from hypothesis import settings

from tests.examples import examples
from tests.services import az, gs, pgbouncer, postgres, postgres_url, s3

__all__ = ["az", "gs", "pgbouncer", "postgres", "postgres_url", "s3"]

# Without bytecode every process that a test starts compiles all that it imports: ours for a second of CPU, litellm for five.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

settings.register_profile("tests", examples(30))
settings.load_profile("tests")


def pytest_collection_finish() -> None:
    """What the tests are made of stays; no collection has to look at it again."""
    gc.collect()
    gc.freeze()
