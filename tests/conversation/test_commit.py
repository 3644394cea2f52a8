"""What is stored of a turn (see test_tree for paths that come back)."""

from __future__ import annotations

from proxy.conversation.commit import SessionNames, append_effect, new_records
from tests.conversation.test_tree import IDENTITY, TENANT, path_of


def test_nothing_new_is_nothing_to_store() -> None:
    path = path_of([("user", "a"), ("assistant", "b")])
    records = new_records(path, None, {})
    assert new_records(path, records[0], {}) == []


def test_each_choice_is_a_branch_of_its_own_and_the_first_is_the_sessions_head() -> None:
    one = path_of([("user", "a"), ("assistant", "b")])
    two = path_of([("user", "a"), ("assistant", "c")])
    heads = [(path, new_records(path, None, {})) for path in (one, two)]
    effect = append_effect(heads, IDENTITY, TENANT, SessionNames(b"l", b"s"), {})
    assert [r.id for r in effect.records] == [one[1].id, two[1].id]
    assert dict(effect.puts)[b"s"] == one[1].id == dict(effect.joins)[b"l"]
