"""When pages were seen: stored with the turn, told in results, and asked for with `after` and `before`."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from proxy.conversation.records import Record, decode_record, encode_record, record_key
from tests.conversation.player import (
    Message,
    Player,
    call,
    calls,
    limits_of,
    says,
    script,
    tool_messages,
)

DAY_S = 86_400
FIRST_S = int(datetime(2026, 5, 1, 9, 0, tzinfo=UTC).timestamp())
PORTS = ["Bergen", "Odessa", "Lisbon", "Galway", "Trieste", "Riga", "Cadiz", "Tallinn", "Split", "Malmo"]
FILLER = "The tide ran out and the crew waited for the pilot at the quay. " * 12


def said(port: str) -> list[Message]:
    return [{"role": "user", "content": f"{FILLER}The parcel for {port} was sealed. {FILLER}"},
            {"role": "assistant", "content": f"{FILLER}I noted the parcel for {port}. {FILLER}"}]  # fmt: skip


def grown(player: Player) -> list[Message]:
    """One port a day."""
    messages: list[Message] = []
    for number, port in enumerate(PORTS):
        player.now_s = FIRST_S + number * DAY_S
        user, answer = said(port)
        messages.append(user)
        player.ask(messages, script(says(answer["content"])))
        messages.append(answer)
    player.now_s = FIRST_S + len(PORTS) * DAY_S
    return messages


def search(player: Player, messages: list[Message], **arguments: Any) -> dict[str, Any]:
    """The result of a search for the parcel."""
    asked = calls(call("search_pages", {"query": "parcel", "limit": 20, **arguments}, "s1"))
    played = player.ask([*messages, {"role": "user", "content": "Where did it go?"}], script(asked, says("There.")))
    result: dict[str, Any] = json.loads(tool_messages(played.requests[-1])[-1]["content"])
    return result


def ports(result: dict[str, Any]) -> set[str]:
    return {port for port in PORTS for one in result["results"] if port in one["hint"]}


def player() -> Player:
    return Player(limits_of(5_000, snippet_tokens=48, search_results=20))


def test_a_result_says_when_its_page_was_seen() -> None:
    it = player()
    messages = grown(it)
    found = search(it, messages)
    seen = {port: one["seen"] for port in PORTS for one in found["results"] if port in one["hint"]}
    assert len(seen) > 5
    assert seen == {port: f"2026-05-{PORTS.index(port) + 1:02d}" for port in seen}
    only = search(it, messages, after="2026-05-02", before="2026-05-03")
    assert only["seen"] == "2026-05-02" and "seen" not in only["results"][0]  # once for all


def test_a_restart_and_another_replica_say_the_same() -> None:
    one, two = player(), player()
    messages = grown(one)
    assert grown(two) == messages
    two.forget()
    first, second = ([*messages, {"role": "user", "content": "Where?"}] for _ in range(2))
    asked = script(calls(call("search_pages", {"query": "parcel"}, "s1")), says("There."))
    again = script(calls(call("search_pages", {"query": "parcel"}, "s1")), says("There."))
    assert one.ask(first, asked).bodies == two.ask(second, again).bodies


@pytest.mark.parametrize(("arguments", "which"), [
    ({"after": "2026-05-03"}, slice(2, None)), ({"before": "May 3, 2026"}, slice(0, 2)),
    ({"after": "2026-05-02", "before": "2026-05-05T08:00:00Z"}, slice(1, 4)),
    ({"after": "2026-05-03", "before": "2026-05-03"}, slice(2, 3)), ({"before": 2027}, slice(0, None)),
    ({"after": "msg_0004", "before": "msg_0009"}, slice(2, 4)), ({"before": "6 days ago"}, slice(0, 4)),
    ({"after": "2020"}, slice(0, None)), ({"after": "2026-05-01 09:00", "before": "msg_3"}, slice(0, 1)),
])  # fmt: skip
def test_after_and_before_are_kept(arguments: dict[str, Any], which: slice) -> None:
    it = player()
    messages = grown(it)
    everything = ports(search(it, messages))
    assert ports(search(it, messages, **arguments)) & everything == everything & set(PORTS[which])


def test_a_time_that_leaves_no_page_is_said() -> None:
    it = player()
    messages = grown(it)
    found = search(it, messages, before="2023-05-01")
    assert found["results"] == []
    assert found["note"] == "No page was seen then: these were from 2026-05-01 to 2026-05-10."


def test_a_question_that_names_a_day_is_about_what_was_seen_then() -> None:
    it = player()
    messages = grown(it)
    asked = calls(call("search_pages", {"query": "parcel on May 4th", "limit": 2}, "s1"))
    played = it.ask([*messages, {"role": "user", "content": "Where did it go?"}], script(asked, says("There.")))
    assert ports(json.loads(tool_messages(played.requests[-1])[-1]["content"])) == {PORTS[3]}


def test_of_a_history_that_came_at_once_no_result_says_when() -> None:
    messages = grown(player())
    it = player()
    it.now_s = FIRST_S + 30 * DAY_S
    first = search(it, messages)
    assert ports(first) and "seen" not in json.dumps(first)
    messages += [{"role": "user", "content": "Where did it go?"}, {"role": "assistant", "content": "There."}]
    it.now_s += DAY_S
    assert "seen" not in json.dumps(search(it, messages))
    assert ports(search(it, messages, after="2026-05-20")) == ports(search(it, messages))
    assert search(it, messages, before="2026-05-20")["results"] == []


def test_records_without_times_are_older_than_those_with() -> None:
    it = player()
    messages = grown(it)
    for key, value in list(it.values.items()):  # as an earlier version stored the first six turns
        if key.startswith(record_key(b"")) and (record := decode_record(value)).turn <= 6:
            fields = msgspec.msgpack.decode(value)[: Record.__struct_fields__.index("seen_s")]
            it.values[key] = msgspec.msgpack.encode(fields)
            assert decode_record(it.values[key]) == msgspec.structs.replace(record, seen_s=0, answered_s=0, request=None)
            assert encode_record(record) == value
    it.forget()
    everything = ports(search(it, messages))
    assert ports(search(it, messages, after="2026-05-08")) == everything & set(PORTS[7:])
    assert ports(search(it, messages, before="2026-05-08")) == everything & set(PORTS[:7])
    for key, value in list(it.values.items()):
        if key.startswith(record_key(b"")):
            fields = msgspec.msgpack.decode(value)[: Record.__struct_fields__.index("seen_s")]
            it.values[key] = msgspec.msgpack.encode(fields)
    it.forget()
    found = search(it, messages, before="2020")
    assert ports(found) == everything and "not known" in found["note"]


def test_what_a_client_dropped_was_seen_when_it_was() -> None:
    """The path of a history that lost its front is stored under new ids: its times go with it. (The answer at the seam counts
    as seen when the next request had it.)"""
    it = player()
    kept: list[Message] = []
    for number, port in enumerate(PORTS):
        it.now_s = FIRST_S + number * DAY_S
        user, answer = said(port)
        kept = [*kept[-6:], user]
        it.ask(kept, script(says(answer["content"])))
        kept.append(answer)
    it.forget()
    for _ in range(2):  # in the turn that joins them, and from storage
        it.now_s += DAY_S
        found = search(it, kept)
        users = [one for one in found["results"] if int(one["page_id"].removeprefix("msg_")) % 2]
        seen = {port: one["seen"] for port in PORTS for one in users if port in one["hint"]}
        assert PORTS[0] in seen and len(seen) > 5
        assert seen == {port: f"2026-05-{PORTS.index(port) + 1:02d}" for port in seen}
        kept += [{"role": "user", "content": "Where did it go?"}, {"role": "assistant", "content": "There."}]
