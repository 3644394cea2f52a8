"""`llm-pager sessions`, `show`, `search`, `top`: what they tell is what upstream got, without the server, beside it, in a directory and
in PostgreSQL (invariants 5, 6, 7)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from proxy.cli import main
from tests.e2e.harness import ServerProcess
from tests.e2e.script import LOOKUP, SYSTEM, Script, Workers, paged_config
from tests.e2e.story import Teller, nothing
from tests.e2e.test_workers import Hopping

Command = Callable[..., Awaitable[tuple[int, bytes, str]]]


@pytest.fixture
def command(capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path) -> Command:
    """Runs one: its exit status, what it told, what it complained of."""

    async def run(*words: str) -> tuple[int, bytes, str]:
        capfdbinary.readouterr()
        status = await asyncio.to_thread(main, words)
        out, err = capfdbinary.readouterr()
        return status, out, err.decode()

    return run


@pytest.mark.parametrize("store", ["directory", "postgres"])
async def test_shown_turn_is_what_upstream_got(store: str, command: Command, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue("postgres_url") if store == "postgres" else None
    script = Script()
    async with script.upstream:
        config = paged_config(script.upstream)
        config["tiers"]["l2"] = {"url": url}
        with ServerProcess(config) as server:
            chat = Hopping(Workers(server), [SYSTEM], tools=[LOOKUP])
            await Teller(script, chat, nothing).story()
            server.kill()
            at = "--config", str(server.dir / "config.yaml")
            last = [recorded[-1].body for recorded in script.calls.values()]

            status, out, _ = await command("sessions", "--json", *at)
            (row,) = json.loads(out)["conversations"]
            assert status == 0 and row["turns"] == len(last)
            name = row["conversation"][-12:]
            for turn, body in list(enumerate(last, 1))[::3]:
                assert await command("show", name, "--turn", str(turn), *at) == (0, body, ""), turn
            server.restart()
            assert await command("show", row["conversation"], "--turn", str(len(last)), *at) == (0, last[-1], ""), "named whole"

            faults = 1 + next(i for i, tag in enumerate(script.calls) if tag == "faults")
            status, out, _ = await command("show", name, "--turn", str(faults), "--why", "msg_0002", *at)
            assert status == 0 and f"asked for it in turn {faults}" in out.decode()
            status, out, _ = await command("show", name, "--turn", str(faults), "--diff", str(faults - 1), "--json", *at)
            diff = json.loads(out)
            assert (diff["turn"], diff["other"]) == (faults - 1, faults) and {"same", "added"} <= {c["op"] for c in diff["changes"]}
            status, out, _ = await command("show", name, "--turn", str(faults), "--json", *at)
            assert json.loads(out)["request"]["text"].encode() == last[faults - 1]
            status, out, _ = await command("show", name, *at)
            assert status == 0 and name in out.decode() and f"\n{faults}  " in out.decode()
            status, out, err = await command("show", name, "--before", "4", "--limit", "2", *at)
            assert [line.split()[0] for line in out.decode().splitlines()[-2:]] == ["3", "2"] and "1 older turns: --before 2" in err
            status, out, _ = await command("search", name, "resultmark", *at)
            assert status == 0 and "resultmark" in out.decode()

            # Whose it is: the one who said it finds it, nobody else does.
            for key, found in (("k", 0), ("other", 1)):
                whose = "--header", f"authorization: Bearer {key}"
                status, out, err = await command("show", name, "--turn", "1", *whose, *at)
                assert (status, out) == ((0, last[0]) if not found else (1, b"")), err
                assert (await command("sessions", *whose, *at))[0] == found
            for words, expected, said in (
                (("show", name, "--turn", str(len(last) + 1)), 2, "a whole number from 1 to"),
                (("show", name, "--why", "msg_9999"), 1, "no such page"),
                (("show", "0" * 12), 1, "no such conversation in the storage"),
                (("search", name, "zzzzqqqq"), 1, "nothing of it is about that"),
                (("sessions", "zzzzqqqq"), 1, "no such conversation"),
            ):
                status, out, err = await command(*words, *at)
                assert (status, out) == (expected, b"") and said in err and err.count("\n") == 1, (words, err)

            status, out, _ = await command("top", "--json", "--url", f"{server.base_url}")
            told = json.loads(out)  # of the process that has answered nothing since its start
            assert status == 0 and told["url"] == server.base_url.removesuffix("/v1") and "l1" in told["stats"]
            status, out, _ = await command("top", "--once", *at)
            assert status == 0 and out.decode().startswith(" ") and "requests" in out.decode()
            server.kill()
            status, _, err = await command("top", "--once", *at)
            assert status == 1 and "say where one is with --url" in err
