"""/vm over sockets: a turn's request is what upstream got, whoever answered it and whatever happened since; explained, searched,
pinned; and nobody sees another's (invariants 5, 6, 7).
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import httpx
from openai import AsyncOpenAI

from proxy.api_key import key_hash
from tests.e2e.data import REPO
from tests.e2e.harness import ServerProcess
from tests.e2e.script import (
    LOOKUP,
    SYSTEM,
    Chat,
    Message,
    Script,
    Workers,
    developer,
    paged_config,
    talk,
)
from tests.e2e.story import Teller, nothing
from tests.e2e.test_workers import Hopping

MINE = {"authorization": "Bearer k"}
ADMIN = "operator-" + "x" * 40


async def read(http: httpx.AsyncClient, path: str, **headers: str) -> Any:
    answer = await http.get(path, headers=headers or MINE)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_requests_of_all_turns_are_what_upstream_got_with_two_workers_and_after_a_kill() -> None:
    """The whole story on changing workers; then SIGKILL, a start, and everything is asked for again."""
    script = Script()
    async with script.upstream:
        with ServerProcess(paged_config(script.upstream), workers=2) as server:
            chat = Hopping(Workers(server), [SYSTEM], tools=[LOOKUP])
            await Teller(script, chat, nothing).story()
            server.kill()
            server.restart()
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as http:
                (row,) = (await read(http, "/vm/conversations"))["conversations"]
                assert row["paged"] and row["title"].startswith("Note shortu0q.")
                path = f"/vm/conversations/{row['conversation']}"
                last = [recorded[-1].body for recorded in script.calls.values()]
                assert len(last) == row["turns"]
                told_turns = [await read(http, f"{path}/turns/{turn}") for turn in range(1, row["turns"] + 1)]
                for turn, body in enumerate(last, 1):
                    answer = await http.get(f"{path}/turns/{turn}/request", headers=MINE)
                    assert answer.content == body and answer.headers["x-llm-pager-exact"] == "true", turn
                faults = 1 + next(i for i, tag in enumerate(script.calls) if tag == "faults")
                told = told_turns[faults - 1]
                assert told["request"]["text"].encode() == last[faults - 1] and told["request"]["exact"]
                assert told["faults"] and {p["place"] for p in told["pages_in"]} >= {"native", "fault"}
                shown = [span["text"] for m in told["messages"] for span in m["spans"] if span["added"]]
                assert any("<VM:RULES>" in text for text in shown)
                client = [span["text"] for m in told["messages"] for span in m["spans"] if not span["added"]]
                assert not any("<VM:" in text for text in client), "what was added is marked as such"
                why = await read(http, f"{path}/explain?page=msg_0002&turn={faults}")
                assert why["in_window"] and f"asked for it in turn {faults}" in why["why"]
                diff = await read(http, f"{path}/turns/{faults - 1}/diff/{faults}")
                assert {change["op"] for change in diff["changes"]} >= {"same", "added"}
                memory = await read(http, f"{path}/map?first=1")
                assert memory["last"] == row["turns"] and any(turn["epoch_begun"] for turn in memory["turns"])
                for turn in (one for one in told_turns if one["paged"]):  # the map follows the log, a turn's pages are the table's
                    at, seen = turn["turn"], {page["page"]: page["since"] for page in memory["pages"]}
                    shown = {p["page"] for p in memory["pages"] for first, last, _ in p["runs"] if first <= at <= last}
                    assert shown == {page["page"] for page in turn["pages_in"]}, at
                    assert {p["page"] for p in turn["pages_out"] if p["page"] in seen} <= {p for p in seen if seen[p] <= at}, at
                hits = (await read(http, f"{path}/search?q=resultmark"))["results"]
                assert hits and "resultmark" in hits[0]["hint"]


async def test_pinned_page_comes_into_the_window_with_the_next_turn_and_stays() -> None:
    script = Script()
    async with script.upstream:
        with ServerProcess(paged_config(script.upstream)) as server:
            async with AsyncOpenAI(api_key="k", base_url=server.base_url, max_retries=0) as client:
                chat = Chat(client, [SYSTEM])
                await chat.say("The harbour master is called Olgamark.", "first")
                await talk(chat, script, "long", 12, [])
                assert developer(script.calls["long/11"][0]) and "Olgamark" not in str(script.calls["long/11"][-1].json)
                async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", headers=MINE) as http:
                    (row,) = (await read(http, "/vm/conversations"))["conversations"]
                    path = f"/vm/conversations/{row['conversation']}"
                    assert (await http.post(f"{path}/pages/msg_0001/pin")).json() == {"page": "msg_0001", "pinned": True}
                    for tag in ("after", "later", "much later"):
                        await chat.say(f"Something else: {tag}.", tag)
                        assert "Olgamark" in str(script.calls[tag][-1].json["messages"][:2])
                    page = await read(http, f"{path}/pages/msg_0001")
                    assert page["life"][-2:] and {"user"} == {e["actor"] for e in page["life"] if e["event"] == "pinned"}
                    assert "it is pinned" in page["parts"][0]["why"]
                    await http.post(f"{path}/pages/msg_0001/unpin")
                    await chat.say("Now without.", "unpinned")
                    page = await read(http, f"{path}/pages/msg_0001")
                    assert page["pin_wanted"] is False and not page["parts"][0]["pinned"]


async def test_branches_are_listed_with_what_they_share() -> None:
    script = Script()
    async with script.upstream:
        with ServerProcess(paged_config(script.upstream)) as server:
            async with AsyncOpenAI(api_key="k", base_url=server.base_url, max_retries=0) as client:
                chat = Chat(client, [SYSTEM])
                await talk(chat, script, "trunk", 3, [])
                other = chat.fork()
                await talk(chat, script, "one", 2, [])
                await talk(other, script, "two", 1, [])
                async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", headers=MINE) as http:
                    (row,) = (await read(http, "/vm/conversations"))["conversations"]
                    path = f"/vm/conversations/{row['conversation']}"
                    found = await read(http, path)
                    shape = [(b["current"], b["turns"], b["shared_messages"]) for b in found["branches"]]
                    assert shape == [(True, 4, 8), (False, 5, 6)]
                    left = await read(http, f"{path}?branch={found['branches'][1]['branch']}")
                    assert left["turns"] == 5 and [b["turns"] for b in left["branches"]] == [5, 4]


async def test_keys_of_the_server_tenants_and_the_operator() -> None:
    """Two named keys see their own, the operator's all; a stranger nothing, not even upstream; upstream gets its own key."""
    script = Script()
    async with script.upstream:
        config = paged_config(script.upstream)
        config["upstream"]["api_key"] = "sk-upstream"
        keys = {"alice": key_hash("alice-key"), "bob": key_hash("bob-key")}
        config["server"] = {"keys": keys, "admin_key": key_hash(ADMIN)}
        with ServerProcess(config) as server:
            url = f"http://127.0.0.1:{server.port}"

            async def say(key: str, text: str) -> httpx.Response:
                body: Message = {"model": "gpt-4o", "messages": [{"role": "user", "content": text}]}
                return await http.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})

            async with httpx.AsyncClient(base_url=url) as http:
                assert [(await say(k, t)).status_code for k, t in (("alice-key", "I am A"), ("bob-key", "I am B"))] == [200, 200]
                asked = len(script.upstream.calls)
                refused = await say("sk-upstream", "I am M")
                assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
                assert (await say("llm-pager:alice", "I am M")).status_code == 401, "a name is no key"
                assert len(script.upstream.calls) == asked
                assert {r.header("authorization") for r in script.upstream.calls} == {"Bearer sk-upstream"}
                names: dict[str, list[dict[str, Any]]] = {}
                for key in ("alice-key", "bob-key", ADMIN):
                    rows = await read(http, "/vm/conversations", authorization=f"Bearer {key}")
                    names[key] = rows["conversations"]
                assert [[row["title"] for row in rows] for rows in names.values()][:2] == [["I am A"], ["I am B"]]
                assert len(names[ADMIN]) == 2
                theirs = f"/vm/conversations/{names['alice-key'][0]['conversation']}"
                for path in (theirs, f"{theirs}/turns/1", f"{theirs}/turns/1/request", f"{theirs}/pages/msg_0001"):
                    got = await asyncio.gather(*(
                        http.get(path, headers={"authorization": f"Bearer {key}"}) for key in ("alice-key", "bob-key", "mallory")
                    ))  # fmt: skip
                    assert [one.status_code for one in got] == [200, 404, 401], path
                named = {"authorization": "Bearer llm-pager:alice"}  # as whom alice's own requests are known within
                for method, path in (
                    ("GET", f"{theirs}/export"), ("GET", f"/vm/context?conversation={theirs[-12:]}"), ("GET", "/vm/models"),
                    ("GET", "/vm/erasures"), ("DELETE", "/vm/erasures"), ("DELETE", f"{theirs}/messages/msg_0001"),
                    ("DELETE", "/vm/conversations?session=s"), ("DELETE", theirs), ("DELETE", "/vm/tenants/self"),
                ):  # fmt: skip
                    assert (await http.request(method, path, headers=named)).status_code == 401, (method, path)
                assert (await http.get("/vm/conversations")).status_code == 401, "with an admin key nothing is open"
                assert (await http.get("/vm/ui", follow_redirects=False)).status_code == 303
                # The operator's commands name the same callers, by the key or by its name.
                for whose in ("--key", "alice"), ("--header", "authorization: Bearer bob-key"):
                    command = [sys.executable, "-m", "proxy", "export", *whose, "--out", "-", "--config", str(server.dir / "config.yaml")]
                    told = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, cwd=REPO)
                    assert told.returncode == 0 and told.stdout.count('"role":"user"') == 1, told.stderr
                    assert ("I am A" in told.stdout, "I am B" in told.stdout) == (whose[1] == "alice", whose[1] != "alice")
                # The browser's way in: a cookie without the key in it.
                wrong = await http.post("/vm/ui/login", data={"key": "alice"})
                assert wrong.status_code == 401 and "set-cookie" not in wrong.headers
                got_in = await http.post("/vm/ui/login", data={"key": "alice-key"}, follow_redirects=False)
                cookie = got_in.headers["set-cookie"]
                assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "alice" not in cookie
                assert (await http.get("/vm/conversations")).json()["conversations"][0]["title"] == "I am A"
                pin = f"{theirs}/pages/msg_0001/pin"
                foreign = {"origin": "https://evil.example", "sec-fetch-site": "cross-site"}
                assert (await http.post(pin, headers=foreign)).status_code == 403
                assert (await http.post(pin, headers={"origin": "https://evil.example"})).status_code == 403
                assert (await http.post(pin, headers={"origin": url})).status_code == 200
                http.cookies.set("llm_pager_vm", "A" + http.cookies["llm_pager_vm"][1:], domain="127.0.0.1", path="/vm")


async def test_without_an_admin_key_it_is_open_to_this_machine_alone() -> None:
    script = Script()
    async with script.upstream:
        with ServerProcess(paged_config(script.upstream)) as server:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as http:
                assert (await http.get("/vm/ui")).status_code == 200
                for headers in ({"x-forwarded-for": "203.0.113.9"}, {"host": "evil.example"}, {"forwarded": "for=1.2.3.4"}):
                    assert (await http.get("/vm/conversations", headers=headers)).status_code == 401, headers
                assert (await http.get("/vm/conversations", headers={"sec-fetch-site": "cross-site"})).status_code == 403
                for path in ("/vm/tenants/self", "/vm/erasures", "/vm/conversations?session=s"):  # of who sends no credentials
                    assert (await http.delete(path, headers={"host": "evil.example"})).status_code == 401, path
                    assert (await http.delete(path, headers={"sec-fetch-site": "cross-site"})).status_code == 403, path
                paths = (await http.get("/vm/openapi.json")).json()["paths"]
                assert {"/vm/conversations", "/vm/conversations/{name}/turns/{turn}", "/vm/events"} <= paths.keys()
