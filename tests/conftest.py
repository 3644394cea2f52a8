"""Fixtures of the session that any test may ask for."""

from tests.services import pgbouncer, postgres, postgres_url, s3

__all__ = ["pgbouncer", "postgres", "postgres_url", "s3"]
