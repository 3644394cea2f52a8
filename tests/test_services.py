"""The services that other tests run on: they are ours, they come back, and they leave nothing."""

from __future__ import annotations

import pytest

from tests.services import PgBouncer, Postgres, execute


def test_a_server_crashes_and_has_what_was_committed(postgres: Postgres, postgres_url: str) -> None:
    execute(postgres_url, "CREATE TABLE kept AS SELECT 7 AS number")
    postgres.restart("immediate")
    assert execute(postgres_url, "SELECT number FROM kept")[0]["number"] == 7
    assert b"CREATE TABLE public.kept" in postgres.tool("pg_dump", postgres_url)


def test_a_pooler_comes_back(postgres_url: str, pgbouncer: PgBouncer) -> None:
    through = pgbouncer.url(postgres_url)
    with pytest.raises(OSError):
        pgbouncer.kill()
        execute(through, "SELECT 1")
    pgbouncer.start()
    assert execute(through, "SELECT current_database() AS it")[0]["it"] in postgres_url
