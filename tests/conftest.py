"""Fixtures of the session that any test may ask for; and what holds for every property."""

from hypothesis import settings

from tests.services import pgbouncer, postgres, postgres_url, s3

__all__ = ["pgbouncer", "postgres", "postgres_url", "s3"]

settings.register_profile("tests", deadline=None, derandomize=True, database=None)  # on however slow a machine
settings.load_profile("tests")
