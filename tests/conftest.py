"""Fixtures of the session that any test may ask for; and what holds for every property."""

from hypothesis import settings

from tests.examples import examples
from tests.services import az, gs, pgbouncer, postgres, postgres_url, s3

__all__ = ["az", "gs", "pgbouncer", "postgres", "postgres_url", "s3"]

settings.register_profile("tests", examples(30))
settings.load_profile("tests")
