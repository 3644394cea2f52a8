"""Erasures over what played conversations left, killed before and after each of their commits.

Promises: the store is a dict, so every point can be tried; tests/e2e/test_erasure.py has the files, the sockets and SIGKILL.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import pytest

from proxy import keys
from proxy.api.erasure import Erasures, erased_since
from proxy.config import Config
from proxy.conversation.erasure import ERASED, Erasure, What, is_tombstone, prefixes
from proxy.conversation.records import (
    LastUse,
    Record,
    backwards,
    conversation_key,
    decode_record,
    owner_of,
    record_key,
)
from proxy.conversation.tree import ID_BYTES
from proxy.storage import open_store
from proxy.storage.tiered import Tiered
from tests.conversation.player import (
    SECRET,
    Message,
    Player,
    call,
    calls,
    limits_of,
    says,
    script,
)
from tests.examples import ASKED
from tests.leftovers import files_with, whole
from tests.services import Postgres, buckets
from tests.storage.test_tiered import NOW_S, OBJECT, PACK, demoted, files, opened

pytestmark = pytest.mark.filterwarnings("ignore")
DAY_S = 86_400
Values = dict[bytes, bytes]


def fault(page: str) -> Message:
    return calls(call("page_fault", {"page_id": page}, f"call_{page}"))


class Died(BaseException):
    """The process was killed."""


@dataclass
class Dict:
    """A store that is killed at its `dies_at`-th commit, before or after it."""

    values: Values
    dies_at: int = -1
    before: bool = True
    commits: int = 0
    erased: int = 0
    objects: dict[bytes, str] = field(default_factory=dict)

    def get(self, key: bytes) -> bytes | None:
        return self.values.get(key)

    def scan(self, prefix: bytes, after: bytes = b"", limit: int = 1000) -> list[tuple[bytes, bytes]]:
        found = sorted(k for k in self.values if isinstance(k, bytes) and k.startswith(prefix) and k > after)
        return [(key, self.values[key]) for key in found[:limit]]

    def look(self) -> None: ...
    async def scrub(self) -> None: ...
    async def drop_key(self, owner: bytes) -> None: ...
    def large_at(self, keys: Sequence[bytes]) -> list[str]:
        return []

    async def delete_large(self, names: Sequence[str]) -> None: ...

    def secret(self) -> bytes:
        return SECRET

    async def commit(
        self, puts: Sequence[tuple[bytes, bytes]], joins: object = (), adds: object = (), secret: object = None,
        erased: object = None, drops: Sequence[bytes] = (), leaves: Sequence[tuple[bytes, bytes]] = (), erases: bool = False,
    ) -> frozenset[bytes]:  # fmt: skip
        dies = self.commits == self.dies_at
        self.commits += 1
        if dies and self.before:
            raise Died
        for prefix in drops:
            for key in [key for key in self.values if isinstance(key, bytes) and key.startswith(prefix)]:
                del self.values[key]
        for key, owner in leaves:
            left = b"".join(node for node in nodes(self.values.pop(key, b"")) if not node.startswith(owner))
            self.values.update({key: left} if left else {})
        self.erased += erases
        self.values.update(puts)
        if dies:
            raise Died
        return frozenset()


def nodes(ids: bytes) -> list[bytes]:
    return [ids[at : at + ID_BYTES] for at in range(0, len(ids), ID_BYTES)]


def long(*words: str) -> str:
    return " ".join(f"{word}{n}" for n in range(12) for word in (*words, "amber", "basin", "cedar"))


@dataclass
class House:
    """What is stored of several tenants: `owner[name]` is the conversation whose texts have `name` in each."""

    player: Player = field(default_factory=lambda: Player(limits_of(700)))
    owner: dict[str, bytes] = field(default_factory=dict)
    messages: dict[str, list[Message]] = field(default_factory=dict)

    def talk(self, name: str, turns: int = 8, last: int | None = None, **extra: str) -> None:
        """`last`: of its messages that the client sends."""
        said = self.messages.setdefault(name, [])
        for turn in range(len(said), len(said) + 2 * turns, 2):
            said.append({"role": "user", "content": f"{name}mark {long(f'{name}u{turn}')}"})
            rounds = [says(f"{name}mark noted {long(f'{name}a{turn}')}")]
            if turn == 12:
                rounds.insert(0, fault("msg_0002"))
            played = self.player.ask(said[-(last or len(said)) :], script(*rounds), **extra)
            assert played.message is not None
            said.append(played.message)
            self.owner.setdefault(name, owner_of(played.turn.path[0].id))

    def left(self, name: str, values: Values) -> list[bytes]:
        """The keys of the values that have something of it."""
        mark, owner = name.encode() + b"mark", self.owner[name]
        return [key for key, value in values.items() if mark in value or owner in key or owner in value]


@pytest.fixture(scope="module")
def house() -> House:
    house = House()
    house.talk("red", user="ann", session="s")
    fork = house.messages["red"][:9]
    house.player.ask([*fork, {"role": "user", "content": "redmark otherwise"}], script(says("redmark fork")), user="ann")
    house.talk("blue", user="ann")
    house.talk("green", 5, user="bob")
    house.talk("black", 5, key="other")
    return house


@pytest.fixture(scope="module")
def trimmed() -> House:
    """A client that sends its six newest messages, whose front moves on twice before it is believed."""
    house = House()
    house.talk("red", 5, 5, user="tom")
    house.talk("blue", 5, user="tom")
    return house


async def killed_anywhere(
    values: Values, begin: Callable[[Erasures], object], check: Callable[[Dict], None]
) -> Iterator[Dict] | None:
    """`begin` is killed at each of its commits, before it and behind it; what is left is finished by another process."""
    whole = Dict(dict(values))
    await begin(Erasures(whole))  # type: ignore[arg-type, misc]
    check(whole)
    for at in range(whole.commits):
        for before in (True, False):
            store = Dict(dict(values), at, before)
            with pytest.raises(Died):
                await begin(Erasures(store))  # type: ignore[arg-type, misc]
            if before and not at:
                assert store.values == values  # nobody was told that it had begun
                continue
            await Erasures(store).finish_open()  # type: ignore[arg-type]
            assert not store.scan(keys.ERASING)
            check(store)
            receipts = store.scan(keys.RECEIPT)
            await Erasures(store).finish_open()  # type: ignore[arg-type]
            assert store.scan(keys.RECEIPT) == receipts, "what is done is not done again"
    return None


def same(values: Values, store: Dict, *letters: bytes, owner: bytes = b"") -> None:
    before = {key: value for key, value in values.items() if key[:1] in letters and key[1:].startswith(owner)}
    assert before and before == {key: store.values.get(key) for key in before}


async def test_all_of_a_conversation_goes_and_nothing_of_another(house: House) -> None:
    red = house.owner["red"]
    made = keys.OF_CONVERSATION - {keys.RECORD, keys.CONVERSATION, keys.LINK}
    values = {**{kind + red + bytes(16): b"redmark" for kind in made}, **house.player.values}
    assert {key[:1] for key in house.left("red", values)} >= made | {keys.RECORD, keys.CONVERSATION, keys.PAIR, keys.LABEL}
    said = {sha256(raw).hexdigest() for raw in raws(values, red)}

    def check(store: Dict) -> None:
        assert [key[:1] for key in house.left("red", store.values)] == [keys.RECEIPT]
        assert b"mark" not in store.scan(keys.RECEIPT)[0][1]
        for name in ("blue", "green", "black"):
            same(values, store, *keys.OF_CONVERSATION, owner=house.owner[name])
        for key in (key for key in values if key[:1] in keys.OF_TENANT):
            left = [node for node in nodes(values[key]) if not node.startswith(red)]
            assert nodes(store.values.get(key, b"")) == left
        (receipt,) = Erasures(store).receipts(red[:12])  # type: ignore[arg-type]
        told = receipt.told()
        assert set(told["messages_sha256"]) == said and len(said) == 18
        assert told["conversations"] == [red[12:].hex()] and told["ended_s"]
        assert told["values"]["record of a turn"] == 9

    await killed_anywhere(values, lambda e: e.erase("conversation", "tenant", [red]), check)


async def test_a_user_and_a_credential_go_whole(house: House) -> None:
    values = {**house.player.values, keys.MODEL + house.owner["red"][:6] + b"gpt": b"fact"}

    def none_of(*names: str) -> Callable[[Dict], None]:
        def check(store: Dict) -> None:
            kept = set(house.owner) - set(names)
            for name in names:
                owner = house.owner[name]
                assert not any(owner[:12] in key and key[:1] != keys.RECEIPT for key in store.values)
                assert not any(name.encode() + b"mark" in value for value in store.values.values())
            for name in kept:
                same(values, store, *keys.OF_CONVERSATION, owner=house.owner[name])
            assert (keys.MODEL + house.owner["red"][:6] + b"gpt" in store.values) == ("green" in kept)
            assert len(Erasures(store).receipts(house.owner["red"])) == 1  # type: ignore[arg-type]

        return check

    ann, credential = house.owner["red"][:12], house.owner["red"][:6]
    await killed_anywhere(values, lambda e: e.erase("user", "tenant", [ann]), none_of("red", "blue"))
    await killed_anywhere(values, lambda e: e.erase("key", "operator", [credential]), none_of("red", "blue", "green"))


@pytest.mark.parametrize("asked", ["the first", "the last"])
async def test_a_trimmed_history_goes_with_the_conversations_that_it_went_on_from(trimmed: House, asked: str) -> None:
    values = trimmed.player.values
    owners = {owner_of(key[1:]) for key in values if key[:1] == keys.RECORD} - {trimmed.owner["blue"]}
    assert len(owners) == 3, "its front has moved on to two beginnings"
    ordered = sorted(owners, key=lambda owner: owner != trimmed.owner["red"])
    one = ordered[0 if asked == "the first" else -1]

    def check(store: Dict) -> None:
        assert not [key for key, value in store.values.items() if b"redmark" in value]
        assert not any(owner in key for key in store.values for owner in owners)
        same(values, store, *keys.OF_CONVERSATION, owner=trimmed.owner["blue"])
        assert len(Erasures(store).receipts(one)[0].owners) == 3  # type: ignore[arg-type]

    await killed_anywhere(values, lambda e: e.erase("conversation", "tenant", [one]), check)


def raws(values: Values, owner: bytes) -> list[bytes]:
    records = [decode_record(value) for key, value in values.items() if key.startswith(keys.RECORD + owner)]
    return [raw for record in sorted(records, key=lambda record: record.first) for raw in record.raws]


async def test_of_one_message_a_tombstone_stays_and_the_client_goes_on(house: House) -> None:
    """In a session that sends only what is new nothing else tells the model what was said."""
    player = Player(limits_of(1500))
    for turn in range(14):
        rounds = [says(f"answered{turn} {long(f'a{turn}')}")]
        if turn == 12:
            rounds.insert(0, fault("msg_0003"))
        text = f"redmark{turn}x {long(f'r{turn}')}"
        played = player.ask([{"role": "user", "content": text}], script(*rounds), session="s")
    owner, values = owner_of(played.turn.path[0].id), dict(player.values)
    states = [decode_record(value).window for key, value in values.items() if key[:1] == keys.RECORD]
    assert any(b"redmark1x" in window for window in states), "it is shown in a window, and stored there"
    content = played.turn.path[2].content
    texts = {bytes(raw) for raw in raws(values, owner) if b"redmark1x" in raw}

    def check(store: Dict) -> None:
        assert not [key for key, value in store.values.items() if b"redmark1x" in value]
        assert not any(key[:1] in (keys.BLOCK, keys.INDEX) for key in store.values)
        head = LastUse.decode(store.values[conversation_key(owner)]).head

        def get(node_id: bytes) -> Record | None:
            data = store.values.get(record_key(node_id))
            return decode_record(data) if data is not None else None

        record = get(head)
        assert record is not None
        path = list(backwards(record, get))[::-1]
        assert [is_tombstone(node.raw) for node in path] == [at == 2 for at in range(28)]
        assert json.loads(path[2].raw) == {"role": "user", "content": ERASED} and path[2].content == content
        told = Erasures(store).receipts(owner)[0].told()  # type: ignore[arg-type]
        assert told["messages_sha256"] == [sha256(raw).hexdigest() for raw in texts]

        later = Player(limits_of(1500))
        later.values = dict(store.values)
        played = later.ask([{"role": "user", "content": "What was the second?"}], script(says("Gone.")), session="s")
        assert played.turn.window is not None and len(played.turn.path) == 30
        assert b"redmark1x" not in played.bodies[0] and b"redmark13x" in played.bodies[0]
        search = later.ask([{"role": "user", "content": "Load it."}], script(fault("msg_0003"), says("Gone.")), session="s")
        assert ERASED.encode() in search.bodies[-1] and b"redmark1x" not in search.bodies[-1]

    await killed_anywhere(values, lambda e: e.erase("message", "operator", [owner], content), check)


async def test_a_message_with_calls_stays_a_message_with_calls(house: House) -> None:
    player = Player(limits_of(4000))
    asked = calls(call("lookup", {"word": "redmark"}, "c1"), text="redmark")
    history: list[Message] = [{"role": "user", "content": "Look."}, asked,
                              {"role": "tool", "tool_call_id": "c1", "content": "found"}]  # fmt: skip
    played = player.ask(history, script(says("Done.")))
    store = Dict(dict(player.values))
    owner = owner_of(played.turn.path[0].id)
    await Erasures(store).erase("message", "tenant", [owner], played.turn.path[1].content)  # type: ignore[arg-type]
    kept = [json.loads(raw) for raw in raws(store.values, owner)]
    assert kept[1] == {"role": "assistant", "content": ERASED,
                       "tool_calls": [call("lookup", {}, "c1")]}  # fmt: skip
    assert kept[2] == history[2] and not any(b"redmark" in value for value in store.values.values())


async def test_what_nobody_used_for_so_long_goes_once_for_each_tenant(house: House, trimmed: House) -> None:
    store = Dict({**house.player.values, **trimmed.player.values})
    now_s = 1_000 * DAY_S
    used = {"red": 10, "blue": 40, "green": 41, "black": 40}  # days ago
    for name, days in used.items():
        key = conversation_key(house.owner[name])
        head = LastUse.decode(store.values[key]).head
        store.values[key] = LastUse(head, now_s - days * DAY_S).encode()
    linked = {owner_of(key[1:]) for key in trimmed.player.values if key[:1] == keys.RECORD}
    for owner in linked:  # of those that belong together one was used
        head = LastUse.decode(store.values[conversation_key(owner)]).head
        days = 1 if owner == trimmed.owner["red"] else 90
        store.values[conversation_key(owner)] = LastUse(head, now_s - days * DAY_S).encode()
    await Erasures(store).expire(now_s - 30 * DAY_S)  # type: ignore[arg-type]
    there = {owner_of(key[1:]) for key in store.values if key[:1] == keys.CONVERSATION}
    assert there == {house.owner["red"], *linked - {trimmed.owner["blue"]}}
    for name in ("green", "black"):
        (receipt,) = Erasures(store).receipts(house.owner[name])  # type: ignore[arg-type]
        assert receipt.by == "retention" and receipt.owners == [house.owner[name]]


async def test_only_a_turn_of_what_is_erased_is_turned_away(house: House) -> None:
    store = Dict(dict(house.player.values))
    red, green = house.owner["red"], house.owner["green"]
    assert not erased_since(store, red, 0)  # type: ignore[arg-type]
    await Erasures(store).erase("conversation", "tenant", [red])  # type: ignore[arg-type]
    number = store.erased
    assert erased_since(store, red, number - 1) and not erased_since(store, red, number)  # type: ignore[arg-type]
    assert erased_since(store, house.owner["blue"], 0), "it may have read what belongs to another of its tenant's"  # type: ignore[arg-type]
    assert not erased_since(store, green, 0) and not erased_since(store, house.owner["black"], 0)  # type: ignore[arg-type]
    await Erasures(store).erase("key", "operator", [green[:6]])  # type: ignore[arg-type]
    assert erased_since(store, green, number) and not erased_since(store, house.owner["black"], 0)  # type: ignore[arg-type]
    dying = Dict(dict(house.player.values), dies_at=1)
    with pytest.raises(Died):
        await Erasures(dying).erase("user", "tenant", [red[:12]])  # type: ignore[arg-type]
    assert erased_since(dying, red, 0) and not erased_since(dying, green, 0)  # type: ignore[arg-type]


async def test_what_stands_in_objects_goes_from_there(house: House, tmp_path: Path) -> None:
    """A cold conversation in packs with a large message beside them: first one message goes, then all of it."""
    player = Player(limits_of(4000))
    texts = ["redmark1x " + "large " * 30_000, "redmark2x", "redmark3x"]
    for text in texts:
        played = player.ask([{"role": "user", "content": text}], script(says("Noted.")), session="s")
    owner = owner_of(played.turn.path[0].id)
    store = opened(tmp_path, l3=str(tmp_path / "l3"), l4=str(tmp_path / "l4"))
    await store.commit(list(player.values.items()))
    await demoted(store)
    assert files(tmp_path, PACK) and files(tmp_path, OBJECT) and not store.engine.scan(keys.RECORD)
    assert files_with(tmp_path, b"redmark1x") and files_with(tmp_path, b"redmark2x")
    erasures = Erasures(store, store.objects_of)
    await erasures.erase("message", "tenant", [owner], played.turn.path[0].content)
    assert not files_with(tmp_path, b"redmark1x") and files_with(tmp_path, b"redmark2x")
    assert [ERASED.encode() in value for key, value in store.scan(keys.RECORD + owner)].count(True) == 1
    await demoted(store)
    assert files(tmp_path, PACK) and not files_with(tmp_path, b"redmark1x")
    receipt = await erasures.erase("conversation", "tenant", [owner])
    assert len(receipt.objects) == 1 and receipt.objects[0].endswith(PACK) and len(receipt.messages) == 3
    assert not files_with(tmp_path, b"redmark") and files(tmp_path, PACK) == files(tmp_path, OBJECT) == []
    await store.close()


WAYS: dict[What | Literal["retention"], str] = {"message": "sk-1", "conversation": "sk-1", "user": "sk-1", "key": "sk-2", "retention": "sk-1"}
AGES_AGO_S = 1


@pytest.fixture(scope="module")
def everybody() -> tuple[Values, dict[str, bytes], bytes]:
    """What is stored of a conversation for each way, and of one that stays; their owners; what the one message says."""
    player, owners, content = Player(limits_of(700)), {}, b""
    for name, key in {**WAYS, "stays": "sk-1"}.items():
        said: list[Message] = []
        for turn in range(6):
            many = long(*(f"{name}{turn}w{n}" for n in range(40 if turn == 1 else 3)))
            said.append({"role": "user", "content": f"{name}mark {many}" if turn == 1 or name != "message" else many})
            rounds = [fault("msg_0001"), says(f"noted {many}")] if turn == 5 else [says("noted" if turn == 1 else f"noted {many}")]
            played = player.ask(said, script(*rounds), key=key, user=name, session=name)
            assert played.message is not None
            said.append(played.message)
        owners[name] = owner_of(played.turn.path[0].id)
        content = played.turn.path[2].content if name == "message" else content
        last = conversation_key(owners[name])
        used_s = AGES_AGO_S if name == "retention" else int(NOW_S) - 2 * DAY_S
        player.values[last] = LastUse(LastUse.decode(player.values[last]).head, used_s).encode()
    return dict(player.values), owners, content


class Mortal:
    """The parts of a store that write: its process dies at the `at`-th step, before or behind it."""

    def __init__(self, store: Tiered, at: int, before: bool) -> None:
        self.steps, self._at, self._before = 0, at, before
        for part, name in ((store.engine, "commit"), (store.engine, "scrub"), (store.l3, "drop"), (store.l4, "drop")):
            if part is not None:
                setattr(part, name, self._dying(getattr(part, name)))

    def _dying(self, work: Callable[..., Any]) -> Callable[..., Any]:
        async def step(*arguments: Any, **more: Any) -> Any:
            self.steps += 1
            dies = self.steps - 1 == self._at
            if dies and self._before:
                raise Died
            done = await work(*arguments, **more)
            if dies:
                raise Died
            return done

        return step


@pytest.mark.parametrize("engine", ["directory", "PostgreSQL", "directory, file", "PostgreSQL, s3"])
async def test_each_way_on_each_engine_killed_in_its_middle_leaves_no_byte(
    engine: str, everybody: tuple[Values, dict[str, bytes], bytes], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Each is killed once, and once again who finishes them. LLM_PAGER_EXAMPLES=N: at N moments."""
    values, owners, content = everybody
    engine, _, objects = engine.partition(", ")
    url = request.getfixturevalue("postgres_url") if engine == "PostgreSQL" else None
    postgres: Postgres | None = request.getfixturevalue("postgres") if url else None
    below = dict(zip(("l3", "l4"), buckets(request, tmp_path, objects, objects), strict=True)) if objects else {}
    tiers = {"l2": {"path": str(tmp_path / "data"), "url": url}, **below, "demotion_s": 1e-6}
    if objects:
        tiers["l3"]["min_bytes"] = 3000
    config = Config.model_validate({"tiers": tiers})

    async def at_once(work: Callable[[Erasures, Tiered], Awaitable[object]], at: int = -1, before: bool = True) -> int:
        """By a process of its own, which may die; the steps that it came to."""
        store = open_store(config)
        mortal = Mortal(store, at, before)
        with suppress(Died):
            await work(Erasures(store, store.objects_of), store)
        await store.close()
        return mortal.steps

    async def stored(erasures: Erasures, store: Tiered) -> None:
        await store.commit(list(values.items()))
        if objects:
            await demoted(store)
            endings = {name.rpartition(".")[2] for name in objects_of(store)}
            assert endings == {OBJECT[1:], PACK[1:]} and not store.engine.scan(keys.RECORD)

    begun: list[Callable[[Erasures, Tiered], Awaitable[object]]] = [
        lambda e, _: e.erase("message", "tenant", [owners["message"]], content),
        lambda e, _: e.erase("conversation", "tenant", [owners["conversation"]]),
        lambda e, _: e.erase("user", "operator", [owners["user"][:12]]),
        lambda e, _: e.erase("key", "operator", [owners["key"][:6]]),
        lambda e, _: e.expire(AGES_AGO_S + 1),
    ]
    for n in range(ASKED or 1):
        await at_once(stored)
        assert marks_in(await everything(config, postgres)) == owners.keys()
        for number, begin in enumerate(begun):  # from its first commit on it is told of
            step, behind = divmod(1 + (number + 2 * n + len(engine)) % (8 + n), 2)
            await at_once(begin, step, not behind)
        await at_once(lambda e, _: e.finish_open(), 3 + n)
        await at_once(lambda e, _: e.finish_open())
        store = open_store(config)
        assert not store.scan(keys.ERASING) and len(store.scan(keys.RECEIPT)) >= len(begun)
        assert all(store.get(key) == value for key, value in values.items() if key[1:19] == owners["stays"])
        await store.close()
        assert marks_in(await everything(config, postgres)) == {"stays"}


@pytest.mark.parametrize("behind", [False, True])
async def test_a_message_whose_object_s_deletion_is_killed_takes_nothing_else_along(
    behind: bool, everybody: tuple[Values, dict[str, bytes], bytes], tmp_path: Path
) -> None:
    values, owners, content = everybody
    owner = owners["message"]
    tiers = {"l2": {"path": tmp_path / "data"}, "l3": {"url": str(tmp_path / "l3"), "min_bytes": 3000}, "l4": {"url": str(tmp_path / "l4")}}
    config = Config.model_validate({"tiers": {**tiers, "demotion_s": 1e-6}})
    store = open_store(config)
    await store.commit([(key, value) for key, value in values.items() if owner in key])
    await demoted(store)
    assert store.l3 is not None and list(store.l3.names())
    delete = store.l3.delete

    def killed(names: Sequence[str]) -> None:
        if behind:
            delete(names)
        if names:
            raise Died

    store.l3.delete = killed  # type: ignore[method-assign]
    with pytest.raises(Died):
        await Erasures(store).erase("message", "tenant", [owner], content)
    await store.close()
    store = open_store(config)
    await Erasures(store).finish_open()
    assert Erasures(store).content_of(owner, "msg_0012") is not None, "its path is whole"
    (receipt,) = Erasures(store).receipts(owner)
    assert receipt.objects
    await store.close()
    assert "message" not in marks_in(await everything(config, None))


def objects_of(store: Tiered) -> dict[str, bytes]:
    """All objects, by name."""
    tiers = [tier for tier in (store.l3, store.l4) if tier is not None]
    return {name: tier.get(name) or b"" for tier in tiers for name, _ in tier.names()}


async def everything(config: Config, postgres: Postgres | None) -> list[bytes]:
    """All that is stored, as it stands in rows, dumps, files and objects, and what is compressed in it."""
    store = open_store(config)
    found = [value for prefix in keys.KINDS for _, value in store.engine.scan(prefix, limit=100_000)]
    found += objects_of(store).values()
    await store.close()
    if postgres is not None:
        dump = postgres.tool("pg_dump", config.tiers.l2.url or "")
        found += [bytes.fromhex(value.decode()) for value in re.findall(rb"\\\\x((?:[0-9a-f]{2})+)", dump)]
    elif config.tiers.l2.path.exists():
        found += [path.read_bytes() for path in config.tiers.l2.path.rglob("*") if path.is_file()]
    return [part for data in found for part in whole(data)]


def marks_in(texts: list[bytes]) -> set[str]:
    return {name for name in (*WAYS, "stays") if any(f"{name}mark".encode() in text for text in texts)}


def test_every_kind_of_key_goes_with_its_owner() -> None:
    owner = bytes(range(18))
    assert {prefix[:1] for prefix in prefixes(owner[:6])} == keys.OF_CONVERSATION | keys.OF_TENANT | keys.OF_SCOPE
    assert {prefix[:1] for prefix in prefixes(owner[:12])} == keys.OF_CONVERSATION | keys.OF_TENANT
    assert {prefix[:1] for prefix in prefixes(owner)} == keys.OF_CONVERSATION - {keys.LINK}
    kinds = keys.OF_CONVERSATION | keys.OF_TENANT | keys.OF_SCOPE
    assert set(keys.KINDS) - kinds == {keys.ERASING, keys.RECEIPT, keys.LEASE}, "a new kind says whose it is"
    assert not Erasure(b"i", "user", "tenant", 0, [owner[:12]]).concerns(b"x" * 18)
