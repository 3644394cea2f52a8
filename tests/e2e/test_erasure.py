"""What is erased is gone: from every file of the storage, from every process, after a kill in the middle, however it was asked
for; and nobody else notices.

Every text of a story has its way's mark: what is said and answered, a tool's arguments and results, a picture, a PDF and
what was read of it, what models wrote of it, pages that were faulted, found and shown unasked. `Searched` reads every byte of the directory, every
value as it was before it was packed, every message, window and derived page of every record that is left, and twelve bytes of
what was stored, packed as it was, are too many. Another server is told the same by those who are not erased, and its upstream gets the same bytes.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import random
import re
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image, PngImagePlugin

from proxy import keys
from proxy.conversation.records import backwards, decode_record, record_key, restore_state
from proxy.storage.postgres import _key
from proxy.storage.sqlite import unpacked
from tests.e2e.harness import ServerProcess, Stream, call, message_of, sse_chunks
from tests.e2e.script import (
    LOOKUP,
    MODEL,
    SYSTEM,
    TAG,
    Message,
    Script,
    fault,
    filler,
    paged_config,
    search,
)
from tests.e2e.story import difference
from tests.leftovers import whole
from tests.media import samples
from tests.services import Postgres

pytestmark = pytest.mark.asyncio(loop_scope="module")

WRITER = "a-model-that-writes"


def needle(way: str) -> str:
    """What every mark of a way has in it: a word for the tokenizer."""
    return f"{way}zq"


# -- the search


@dataclass
class Searched:
    """Where each needle is found in a directory."""

    directory: Path
    database: Database | None = None  # None: SQLite's, in the directory
    texts: list[tuple[str, bytes]] = field(default_factory=list)
    files: list[tuple[str, bytes]] = field(default_factory=list)
    stored: dict[Any, bytes] = field(default_factory=dict)  # values as they stand in their rows

    def __post_init__(self) -> None:
        for path in sorted(self.directory.rglob("*")):
            if path.is_file():
                self.files.append((path.name, path.read_bytes()))
        if self.database is not None:
            self.files += self.database.files()
            self.stored = self.database.stored()
        else:
            with closing(sqlite3.connect(self.directory / "data" / "cache.db")) as database:
                self.stored = dict(database.execute("SELECT key, value FROM Cache"))
        for name, data in self.files:
            self._add(name, data)
        values = {key: unpacked(value) for key, value in self.stored.items()}
        for key, value in values.items():
            self._add(f"value {key[:1]!r}", value)
        self._records(values)

    def _add(self, where: str, data: bytes) -> None:
        self.texts += [(where if part is data else f"{where}, unpacked", part) for part in whole(data)]

    def _records(self, values: dict[Any, bytes]) -> None:
        def get(node_id: bytes) -> Any:
            data = values.get(record_key(node_id))
            return decode_record(data) if data is not None else None

        def block(owner: bytes, ref: bytes) -> bytes | None:
            return values.get(keys.BLOCK + owner + ref)

        for key, value in values.items():
            if isinstance(key, bytes) and key.startswith(keys.RECORD):
                record = decode_record(value)
                said = b"\n".join(node.raw for node in backwards(record, get))
                state = restore_state(record, get, block) if record.window else None
                self.texts.append(("a path", said + repr(record).encode()))
                if state is not None:
                    self.texts.append(("a state", repr((state.window, state.derived, list(state.table))).encode()))

    def where(self, way: str) -> set[str]:
        return self.where_of(needle(way))

    def where_of(self, text: str) -> set[str]:
        word = text.encode()
        looks = [word, word.upper(), word.decode().encode("utf-16-le"), word.hex().encode()]
        looks += [base64.b64encode(b"x" * at + word + b"x" * at)[at and 4 : -4] for at in range(3)]
        return {where for where, text in self.texts if any(look in text for look in looks)}

    def assert_no_piece_of(self, before: Searched) -> None:
        """Of no conversation's value that is not there any more do twelve bytes as they were stored stand anywhere in a
        file (but for those that stand in another value, too)."""
        stored = ((key, value) for key, value in before.stored.items() if key[:1] in keys.OF_CONVERSATION)
        gone = _pieces(value for key, value in stored if self.stored.get(key) != value)
        left = _pieces([*self.stored.values(), *(key for key in self.stored if isinstance(key, bytes))])
        assert len(gone) > 100_000
        for where, data in self.files:
            found = (_pieces([data]) & gone) - left
            assert not found, (where, sorted(found)[:20])


@dataclass
class Database:
    """PostgreSQL's: its dump, the files of its tables, perhaps once they were rewritten, and its rows."""

    server: Postgres
    url: str
    rewrites: bool = False

    def files(self) -> list[tuple[str, bytes]]:
        for table in ("llm_pager_values", "llm_pager_members") if self.rewrites else ():
            self.server.execute(f"VACUUM FULL {table}", url=self.url)
        self.server.execute("CHECKPOINT")
        dump = self.server.tool("pg_dump", self.url)
        found = [("dump", dump), *(("dump", bytes.fromhex(part.decode())) for part in re.findall(rb"\\\\x((?:[0-9a-f]{2})+)", dump))]
        paths = self.server.execute("SELECT pg_relation_filepath(oid) FROM pg_class WHERE relfilenode != 0 AND oid >= 16384", url=self.url)
        return [*found, *((path, (self.server.data / path).read_bytes()) for (path,) in paths)]

    def stored(self) -> dict[Any, bytes]:
        rows = self.server.execute("SELECT tenant, path, key, value FROM llm_pager_values", url=self.url)
        return {_key(tenant, path, key): value for tenant, path, key, value in rows}


def _pieces(texts: Iterable[bytes]) -> set[bytes]:
    return {text[at : at + 12] for text in texts for at in range(len(text) - 11)}


# -- the story


class Desk(Script):
    """The models: of the conversation, and the one that writes about it."""

    def _respond(self, request: Message, index: int) -> Any:
        if request["model"] != WRITER:
            return super()._respond(request, index)
        asked = json.dumps(request["messages"])
        words = " ".join(dict.fromkeys(re.findall(r"\w+zq\w*", asked))) or "nothing"
        claim = json.dumps({"subject": words.split()[0], "text": f"It holds: {words}.", "source": "msg_0001"})
        from tests.e2e.harness import answer

        return answer(request, message_of(f"In short {words}.\n{claim}"))


@dataclass
class Client:
    """Sends its history, or with `session` what is new, and keeps the conversation's name."""

    server: ServerProcess
    way: str
    headers: dict[str, str]
    user: str = ""
    keep: int | None = None
    new_only: bool = False
    messages: list[Message] = field(default_factory=list)
    conversation: str = ""
    memory: str | None = None  # what became of the last turn, where it was not stored

    @property
    def http(self) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer sk-{self.way}", **self.headers}
        root = self.server.base_url.removesuffix("/v1")
        return httpx.AsyncClient(base_url=root, headers=headers, timeout=60, verify=False)

    @property
    def params(self) -> dict[str, str]:
        """What a chat body says of its user, for our endpoints."""
        return {"user": self.user} if self.user else {}

    async def send(self, message: Message, tag: str) -> Message:
        history = [*self.messages, message]
        sent = history if self.keep is None else history[-self.keep :]
        body: dict[str, Any] = {"model": MODEL, "messages": [SYSTEM, *([message] if self.new_only else sent)], "tools": [LOOKUP]}
        if self.user:
            body["user"] = self.user
        async with self.http as http:
            reply = await http.post("/v1/chat/completions", json=body, headers={TAG: tag})
        assert reply.status_code == 200, reply.text
        self.conversation = reply.headers.get("x-llm-pager-conversation", "")  # where it is paged
        self.memory = reply.headers.get("x-llm-pager-memory")
        answer: Message = {k: v for k, v in reply.json()["choices"][0]["message"].items() if v is not None}
        self.messages = [*history, answer]
        return answer

    async def say(self, script: Script, name: str, *rounds: Message, parts: list[Message] | None = None) -> Message:
        word = f"{needle(self.way)}{name}"
        text = f"Note {word}. {filler(word, 90)}"
        script.plan(f"{self.way}/{self.user}{name}", *rounds, message_of(f"Noted {word}a. {filler(word, 70)}"))
        content: Any = [{"type": "text", "text": text}, *parts] if parts else text
        return await self.send({"role": "user", "content": content}, f"{self.way}/{self.user}{name}")

    async def streamed(self, text: str, tag: str) -> str:
        """What came of an answer whose turn may not be stored."""
        body = {"model": MODEL, "messages": [SYSTEM, {"role": "user", "content": text}], "tools": [LOOKUP], "stream": True}
        async with self.http as http:
            reply = await http.post("/v1/chat/completions", json=body, headers={TAG: tag})
        assert reply.status_code == 200 and reply.text.rstrip().endswith("[DONE]"), reply.text
        return "".join(re.findall(r'"content":"([^"]*)"', reply.text))

    async def delete(self, path: str, **params: str) -> dict[str, Any]:
        async with self.http as http:
            reply = await http.delete(f"/vm/{path}", params={**self.params, **params})
        assert reply.status_code == 200, reply.text
        told: dict[str, Any] = reply.json()
        return told


def picture(word: str) -> bytes:
    about = PngImagePlugin.PngInfo()
    about.add_text("Comment", word)
    file = io.BytesIO()
    Image.effect_noise((160, 120), 60).save(file, "PNG", pnginfo=about)
    return file.getvalue()


async def tell(script: Script, client: Client, turns: int = 5) -> None:
    """Everything that a conversation may have in it; it is paged at its end."""
    word = needle(client.way)
    await client.say(script, "first")
    script.plan(f"{client.way}/{client.user}tool", message_of(f"Let me see {word}.", [call("c1", "lookup", {"word": f"{word}args"})]))
    await client.send({"role": "user", "content": f"Look up {word}asked."}, f"{client.way}/{client.user}tool")
    script.plan(f"{client.way}/{client.user}result", message_of(f"It is {word}found."))
    result = json.dumps({"rows": [{"name": f"{word}json{n}", "at": n} for n in range(30)]})
    await client.send({"role": "tool", "tool_call_id": "c1", "content": result}, f"{client.way}/{client.user}result")
    pdf = samples.file_part(samples.pdf([f"Signed by {word}pdf."]), "application/pdf", f"{word}.pdf")
    await client.say(script, "media", parts=[samples.image_part(picture(f"{word}png")), pdf])
    for turn in range(turns):
        await client.say(script, f"turn{turn}")
    if client.keep is None:
        await client.say(script, "fault", fault("msg_0001", "msg_0005"))
        await client.say(script, "search", search(f"{word}turn1"))
    await client.say(script, "last")


@asynccontextmanager
async def served(url: str | None = None, **sections: Any) -> AsyncIterator[tuple[Desk, ServerProcess]]:
    """`url`: of PostgreSQL; None: SQLite."""
    script = Desk()
    async with script.upstream:
        config = paged_config(script.upstream, **sections)
        tiers = {**config["tiers"], "l2": {"url": url}}
        with ServerProcess({**config, "tiers": tiers}) as server:
            yield script, server


async def test_nothing_is_left_in_postgresql(postgres: Postgres, postgres_url: str) -> None:
    """VACUUM leaves in a page's free space what stood there; rewritten tables have none of it (docs/erasure.md)."""
    async with served(postgres_url) as (script, server):
        database = Database(postgres, postgres_url)
        tellers = [client for client in clients(server, False) if client.way in ("conversation", "delta", "operator")]
        stays = Client(server, "stays", {})
        for client in (*tellers, stays):
            await tell(script, client, 3)
        before = Searched(server.dir, database)
        assert all({"a path", "dump"} <= before.where(client.way) for client in tellers)
        for client in tellers:
            told = await erase(client, server)
            assert told["values"]["record of a turn"] >= 6
        found = Searched(server.dir, database)
        assert not [where for client in tellers for where in found.where(client.way) if not where.startswith("base/")]
        found = Searched(server.dir, Database(postgres, postgres_url, rewrites=True))
        assert not (left := {client.way: found.where(client.way) for client in tellers if found.where(client.way)}), left
        assert {"a path", "dump"} <= found.where("stays")
        await stays.say(script, "again")
        script.check()


async def told_of(client: Client) -> list[dict[str, Any]]:
    async with client.http as http:
        found: list[dict[str, Any]] = (await http.get("/vm/erasures", params=client.params)).json()["erasures"]
    return found


async def until_done(client: Client) -> list[dict[str, Any]]:
    """The receipts, once nothing is under way."""
    async with asyncio.timeout(20):
        found = await told_of(client)
        while any(told.get("under_way") for told in found):
            await asyncio.sleep(0.05)  # another process finishes it: there is no event to wait for
            found = await told_of(client)
    return found


def forget(server: ServerProcess, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "proxy.cli", "forget", *arguments, "--yes", "--json", "--config", str(server.dir / "config.yaml")]
    repo = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": repo}, check=False)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


async def erase(client: Client, server: ServerProcess) -> dict[str, Any]:
    """By the client's way."""
    credential = ("--header", f"authorization: Bearer sk-{client.way}")
    if client.way in ("conversation", "trimmed"):
        return await client.delete(f"conversations/{client.conversation}")
    if client.way in ("session", "delta"):
        return await client.delete("conversations", session="notes")
    if client.way == "user":
        return await client.delete("tenants/self")
    if client.way == "operator":
        return await asyncio.to_thread(forget, server, "user", *credential, "--user", client.user)
    assert client.way == "key"
    return await asyncio.to_thread(forget, server, "key", *credential)


def clients(server: ServerProcess, bystander: bool) -> Iterator[Client]:
    names: dict[str, dict[str, str]] = {"session": {"x-session-id": "notes"}, "delta": {"x-llm-pager-session": "notes"}}
    for way in ("conversation", "session", "delta", "trimmed", "user", "operator", "key"):
        if bystander:  # another user of the same credential; of a conversation, session or history another one of the same user
            other = Client(server, way, {}, "bob" if way in ("user", "operator") else "")
            other.way = way
            if way != "key":
                yield other
        else:
            named = names.get(way, {})
            yield Client(server, way, named, "ann" if way in ("user", "operator") else "",
                         keep=6 if way == "trimmed" else None, new_only=way == "delta")  # fmt: skip


class Bystander:
    """A short conversation that stays, told to two servers."""

    def __init__(self, client: Client) -> None:
        self.client = client

    async def go_on(self, script: Script, first: int, turns: int) -> None:
        for turn in range(first, first + turns):
            tag = f"stays/{self.client.way}/{turn}"
            word = f"stays{self.client.way}{turn}"
            script.plan(tag, *([fault("msg_0001")] if turn == first + 1 and first else []), message_of(f"Noted {word}a. {filler(word, 120)}"))
            await self.client.send({"role": "user", "content": f"Note {word}. {filler(word, 120)}"}, tag)


async def test_nothing_of_what_is_erased_is_left_and_nobody_else_notices() -> None:
    async with served() as (script, server), served() as (quiet_script, quiet):
        ours = [Bystander(client) for client in clients(server, True)]
        theirs = [Bystander(client) for client in clients(quiet, True)]
        for one, other in zip(ours, theirs, strict=True):
            await one.go_on(script, 0, 7)
            await other.go_on(quiet_script, 0, 7)
        tellers = list(clients(server, False))
        for client in tellers:
            await tell(script, client)
        before = Searched(server.dir)
        for client in tellers:
            assert {"a path", "a state"} <= before.where(client.way), f"{client.way}: the search finds nothing"
        for client in tellers:
            told = await erase(client, server)
            assert told["ended_s"] and told["values"].get("record of a turn", 0) >= 8, (client.way, told)
            raw = json.dumps(client.messages[0]).encode()
            if client.way == "conversation":
                digests = set(told["messages_sha256"])
                assert sha256(raw).hexdigest() in digests or len(digests) > 20
            assert needle(client.way) not in json.dumps(await told_of(client))
        found = Searched(server.dir)
        assert not (left := {client.way: found.where(client.way) for client in tellers if found.where(client.way)}), left
        found.assert_no_piece_of(before)
        for one, other in zip(ours, theirs, strict=True):
            await one.go_on(script, 7, 2)
            await other.go_on(quiet_script, 7, 2)
        for tag in (tag for tag in quiet_script.calls if tag.startswith("stays/")):
            mine, its = script.bodies(tag), quiet_script.bodies(tag)
            assert len(mine) == len(its)
            for a, b in zip(mine, its, strict=True):
                assert a == b, f"{tag}: {difference(a, b)}"
        script.check()
        for client in tellers:  # what is said now is said for the first time
            shown = len(script.upstream.calls)
            await client.say(script, "again")
            if client.new_only:
                assert needle(client.way) + "first" not in json.dumps(script.upstream.calls[shown].json)
            (receipt,) = await told_of(client)
            assert receipt["by"] == ("operator" if client.way in ("operator", "key") else "tenant")
        assert "zq" not in server.log
        before = Searched(server.dir)
        by_retention(server)
        server.stop()
        await asyncio.to_thread(server.restart)
        async with asyncio.timeout(20):
            while "retention" not in [told["by"] for told in await until_done(ours[0].client)]:
                await asyncio.sleep(0.05)  # the server does it in the background
        for client in tellers:
            await until_done(client)
        found = Searched(server.dir)
        assert not [client.way for client in (*tellers, *(one.client for one in ours)) if found.where(client.way)]
        assert not [text for where, text in found.texts if b"stays" in text and where != "server.log"]
        found.assert_no_piece_of(before)


def by_retention(server: ServerProcess) -> None:
    """From its next start on it keeps nothing for longer than a tenth of a second."""
    config = {**server.config, "storage": {"retention_days": 0.1 / 86_400}}
    (server.dir / "config.yaml").write_text(json.dumps(config))


async def test_one_message_goes_and_its_conversation_goes_on() -> None:
    """Also out of what a model wrote of it, and out of what was faulted, found and shown."""
    async with served(compression={"model": WRITER}) as (script, server):
        client = Client(server, "message", {"x-llm-pager-session": "notes"}, new_only=True)
        word = needle("message")
        for turn in "abcdefghijk":
            await client.say(script, f"turn{turn}")
        await client.say(script, "fault", fault("msg_0003", "msg_0004"))
        await client.say(script, "search", search(f"{word}turnb"))
        for turn in "lm":
            await client.say(script, f"turn{turn}")
        before = Searched(server.dir)
        gone, kept = f"{word}turnb", f"{word}turnc"
        assert len(before.where_of(gone)) > 3, before.where_of(gone)
        told = await client.delete(f"conversations/{client.conversation}/messages/msg_0003")
        assert len(told["messages_sha256"]) == 1 and told["what"] == "message"
        cli = await asyncio.to_thread(forget, server, "message", client.conversation, "msg_0004")
        assert len(cli["messages_sha256"]) == 1 and cli["by"] == "operator"
        found = Searched(server.dir)
        assert not (left := found.where_of(gone)), left
        assert found.where_of(kept)
        await client.say(script, "after", fault("msg_0003", "msg_0005"))
        _, request = script.calls["message/after"]
        shown = json.dumps(request.json["messages"])
        assert "[erased]" in shown and gone not in shown and kept in shown
        async with client.http as http:
            asked = {"session": "notes", "page": "msg_0003"}
            assert (await http.get("/vm/provenance", params=asked)).json()["page_id"] == "msg_0003"
            for path, code in (("messages/msg_0099", "page_not_found"), ("messages/claim_0001", "page_not_found")):
                reply = await http.delete(f"/vm/conversations/{client.conversation}/{path}")
                assert (reply.status_code, reply.json()["error"]["code"]) == (404, code)
            reply = await http.delete(f"/vm/conversations/{client.conversation}", headers={"authorization": "Bearer other"})
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "conversation_not_found")
            reply = await http.delete("/vm/tenants/self", headers={"authorization": "Bearer other"})
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "tenant_not_found")
            assert [told["conversation"] for told in (await http.get("/vm/conversations")).json()["conversations"]] == [
                client.conversation
            ]
            assert len(await told_of(client)) == 2
            assert (await http.delete("/vm/erasures")).status_code == 204 and await told_of(client) == []
        script.check()
        server.stop()
        check = [sys.executable, "-m", "proxy.cli", "check", "--storage", "--config", str(server.dir / "config.yaml")]
        repo = str(Path(__file__).resolve().parents[2])
        done = await asyncio.to_thread(subprocess.run, check, env={**os.environ, "PYTHONPATH": repo}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        await asyncio.to_thread(server.restart)


async def test_a_second_process_forgets_and_a_turn_on_its_way_is_not_stored() -> None:
    async with served() as (script, server):
        shared = {**server.config, "server": {}, "tiers": {**server.config["tiers"], "l2": {"path": str(server.dir / "data"), "url": None}}}
        with ServerProcess(shared) as other:
            client = Client(server, "session", {"x-llm-pager-session": "notes"}, new_only=True)
            stays = Client(server, "stays", {"x-llm-pager-session": "notes"}, new_only=True)
            for turn in range(10):
                client.server, stays.server = (server, other)[:: 1 - turn % 2 * 2]
                await client.say(script, f"turn{turn}")
                await stays.say(script, f"turn{turn}")
            client.server, stays.server = other, server
            begun, go_on = asyncio.Event(), asyncio.Event()

            def slow(way: str) -> Callable[[Message], Stream]:
                def answered(request: Message) -> Stream:
                    begun.set()
                    return Stream([*sse_chunks(request, message_of(f"Late {needle(way)}late.")), go_on])

                return answered

            script.plan("session/late", slow("session"))
            late = asyncio.ensure_future(client.streamed(f"Once more {needle('session')}more.", "session/late"))
            script.plan("stays/late", slow("stays"))
            own = asyncio.ensure_future(stays.streamed(f"Once more {needle('stays')}more.", "stays/late"))
            while len(script.calls.get("session/late", [])) + len(script.calls.get("stays/late", [])) < 2:
                begun.clear()
                await begun.wait()
            eraser = Client(server, "session", client.headers)
            await eraser.delete("conversations", session="notes")
            go_on.set()
            assert needle("session") + "late" in await late and needle("stays") + "late" in await own
            left = Searched(server.dir).where("session")
            assert not left, left
            assert Searched(server.dir).where("stays")
            async with asyncio.timeout(1.5):  # the other one looks twice a second
                async with client.http as http:
                    while (await http.get("/vm/context", params={"session": "notes"})).status_code != 404:
                        await asyncio.sleep(0.05)
            for one in (client, stays):
                at = len(script.upstream.calls)
                await one.say(script, "after")
                sent = json.dumps(script.upstream.calls[at].json)
                assert (needle(one.way) + "turn9" in sent, needle(one.way) + "more" in sent) == (one is stays,) * 2
            script.check()


async def test_sigkill_in_the_middle_is_finished_at_the_next_start() -> None:
    moments = random.Random(13)
    async with served() as (script, server):
        for way in ("alpha", "beta", "gamma"):
            client = Client(server, way, {})
            await tell(script, client, 3)
            began_s = asyncio.get_running_loop().time()
            deletion = asyncio.ensure_future(client.delete("tenants/self"))
            await asyncio.sleep(moments.uniform(0.005, 0.25))
            server.kill()
            with suppress(httpx.HTTPError):
                await deletion
            killed_s = asyncio.get_running_loop().time() - began_s
            await asyncio.to_thread(server.restart)
            receipts = await until_done(client)
            if not receipts:  # it was killed before it had promised anything
                await client.delete("tenants/self")
            found = Searched(server.dir)
            assert not (left := found.where(way)), (way, killed_s, left)
