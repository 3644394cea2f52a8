"""Reading a body with a warm cache gives what reading it with an empty one gives."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.body import (
    Body,
    HistoryCache,
    Known,
    _locate,
    is_short,
    recognise,
    remembered,
    split_body,
)
from proxy.conversation.identify import chain
from proxy.conversation.tree import Identity, KeyScope, TenantKey
from proxy.errors import ApiError
from tests.cpu import cpu_within
from tests.examples import examples


def read_body(body: bytes, scope: bytes, cache: HistoryCache) -> Body:
    """As a request that is small enough for the event loop is read."""
    return split_body(body, recognise(body, KeyScope(scope), cache))


many = examples(30)
SCOPE = b"scope"
Message = dict[str, Any]

values = st.none() | st.booleans() | st.integers() | st.text('ab"\\{}[],: \u00e9\u2028😀', max_size=12)
contents = st.text('ab"\\{}[],: \u00e9\n', max_size=30) | st.lists(
    st.fixed_dictionaries({"type": st.just("text"), "text": values}), max_size=2
)


def message(roles: list[str]) -> st.SearchStrategy[Message]:
    return st.fixed_dictionaries(
        {"role": st.sampled_from(roles), "content": contents},
        optional={"name": st.text(max_size=3), "x": st.dictionaries(st.text(max_size=3), values, max_size=2)},
    )


@st.composite
def rendered(draw: st.DrawFn, value: Any) -> str:
    """JSON of a message in any spelling: key order, whitespace, escapes."""
    if isinstance(value, dict) and draw(st.booleans()):
        value = dict(draw(st.permutations(list(value.items()))))
    text = json.dumps(value, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
    if draw(st.integers(0, 5)) == 0:
        text = text.replace('"role"', '"r\\u006fle"').replace('"system"', '"syst\\u0065m"')
    return text


@st.composite
def conversations(draw: st.DrawFn) -> list[bytes]:
    """Bodies of one conversation as it goes on, is edited, and is sometimes malformed."""
    system = draw(st.lists(message(["system", "developer"]), max_size=2))
    history = [json.dumps({"role": "user", "content": "long enough to be looked for " * 4})]
    bodies: list[bytes] = []
    gap = draw(st.sampled_from([", ", ",", " ,\n\t"]))
    opening = draw(st.sampled_from(["", " \n"]))
    for _ in range(draw(st.integers(1, 5))):
        if draw(st.integers(0, 3)) == 0:  # edited
            del history[draw(st.integers(1, len(history))) :]
        roles = ["user", "assistant", "user", "assistant", "tool", "system"]
        history += [draw(rendered(draw(message(roles)))) for _ in range(draw(st.integers(0, 3)))]
        if draw(st.integers(0, 3)) == 0:  # the date in it changes
            system = draw(st.lists(message(["system"]), max_size=2))
        head = [json.dumps(m) for m in system]
        array = "[" + opening + gap.join([*head, *history])
        fields = [f"{json.dumps(k)}: {json.dumps(draw(values | st.just([{}])))}" for k in draw(
            st.lists(st.sampled_from(["model", "n", "messages\\", "the rest of messages", "é"]), max_size=3)
        )]
        fields.insert(draw(st.integers(0, len(fields))), f'"messages":{array}]')
        body = "{" + draw(st.sampled_from(["", "\n "])) + gap.join(fields) + "}" + draw(
            st.sampled_from(["", " \n"])
        )
        bodies.append(draw(damaged(body)).encode())
    return bodies


@st.composite
def damaged(draw: st.DrawFn, body: str) -> str:
    how = draw(st.integers(0, 11))
    if how == 0:
        return body + draw(st.sampled_from(["}", "x", ",", "{}"]))
    if how == 1:
        return body[: draw(st.integers(0, len(body)))]
    if how == 2:  # a doubled key, in front or behind
        second = draw(st.sampled_from(['"messages": [{"role": "user"}]', '"messag\\u0065s": [{}]', '"model": 2']))
        before = draw(st.booleans())
        return body.replace("{", "{" + second + ",", 1) if before else body.rstrip()[:-1] + "," + second + "}"
    if how == 3:
        at = draw(st.integers(0, len(body)))
        return body[:at] + draw(st.sampled_from([",", "}", "]", "\\", '"', "{", "0"])) + body[at:]
    if how == 4:
        at = body.rfind("]")
        return body[:at] + "," + body[at:]
    return body


def outcome(body: bytes, cache: HistoryCache) -> Any:
    try:
        split = read_body(body, SCOPE, cache)
    except ApiError as error:
        assert error.status == 400 and json.loads(error.body())["error"]["message"]
        return error.code, error.param
    raws = known_raws(split) + [raw for raw, _ in split.new]
    assert all(json.loads(raw) == decoded for raw, decoded in split.new)
    return {k: bytes(v) for k, v in split.fields.items()}, split.order, split.system, raws


def known_raws(split: Body) -> list[bytes]:
    if split.known is None:
        return []
    ends = [0, *split.known.ends]
    cut = [bytes(split.known.history[a:b]) for a, b in pairwise(ends)]
    return [raw.lstrip(b" \t\r\n,") for raw in cut[: split.shared]]


def remember(split: Body, cache: HistoryCache) -> None:
    known = remembered(split, [], [], b"t")
    if known is not None:
        cache.add(SCOPE, known, split.continued)


@many
@given(conversations())
def test_warm_cache_reads_what_an_empty_one_reads(bodies: list[bytes]) -> None:
    cache = HistoryCache(1 << 20)
    for body in bodies:
        assert outcome(body, cache) == outcome(body, HistoryCache(1 << 20))
        try:
            remember(read_body(body, SCOPE, cache), cache)
        except ApiError:
            pass  # refused both ways, and remembered in none


@many
@given(conversations())
def test_what_is_read_is_what_json_says(bodies: list[bytes]) -> None:
    for body in bodies:
        try:
            value = json.loads(body)
            split = read_body(body, SCOPE, HistoryCache(0))
        except (ValueError, ApiError):
            continue
        assert [json.loads(r) for r in split.system] + [m for _, m in split.new] == value["messages"]
        assert split.order == list(value)
        assert {k: json.loads(bytes(v)) for k, v in split.fields.items()} == {
            k: v for k, v in value.items() if k != "messages"
        }
        if split.history is not None:
            assert json.loads(b"[" + split.history + b"]") == [m for _, m in split.new]


def test_second_body_of_a_conversation_is_recognised_by_its_bytes() -> None:
    cache = HistoryCache(1 << 20)
    messages = [{"role": "system", "content": "x"}] + [
        {"role": "user", "content": f"message {i} " * 9} for i in range(9)
    ]
    remember(read_body(json.dumps({"messages": messages}).encode(), SCOPE, cache), cache)
    messages[0]["content"] = "another date"
    messages.append({"role": "user", "content": "new"})
    body = json.dumps({"model": "m", "messages": messages}).encode()
    split = read_body(body, SCOPE, cache)
    assert split.shared == 9 and [m["content"] for _, m in split.new] == ["new"]
    assert read_body(body, b"another tenant", cache).known is None


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_type"),
        (b"{}", "missing_required_parameter"),
        (b'{"messages": 1}', "invalid_type"),
        (b'{"messages": null}', "invalid_type"),
        (b'{"messages": []}', "empty_array"),
        (b'{"messages": [1]}', "invalid_type"),
        (b'{"messages": [{"role": "user"},]}', "invalid_json"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', "invalid_json"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "invalid_json"),
        (b'{"messages": [{"role": "system" "content": 1}]}', "invalid_json"),
        (b'{"messages": [{"role": "system", "content": "\xff"}, {"role": "user"}]}', "invalid_json"),
        (b'{"a": ' + b"[" * 100_000, "invalid_json"),
        (b'{"messages": [{"role":"user","content":' + b"[" * 5000 + b"]" * 5000 + b"}]}", "invalid_json"),
    ],
)
def test_invariant_01_what_is_no_chat_request_gets_one_sentence_and_400(body: bytes, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_body(body, SCOPE, HistoryCache(0))
    assert (caught.value.status, caught.value.code) == (400, code)


@pytest.mark.parametrize(
    "tail",
    [
        "]}", ",]}", ", ]}", "]", "}", "]}x", "]},", ',{"role":"user"}]}', ',{"role":"user"},]}',
        ',{"role":"user"}', ",1]}", '],"messages":[{}]}', '],"the rest of messages":[{}]}',
        '],"model":2}', '],"n":NaN}', ',{"role":"user","content":"\\ud800"}]}', "",
    ],
)
def test_whatever_follows_the_known_messages_is_read_as_without_a_cache(tail: str) -> None:
    cache = HistoryCache(1 << 20)
    opening = '{"model":1,"messages":[' + json.dumps({"role": "user", "content": "hello " * 20})
    remember(read_body((opening + "]}").encode(), SCOPE, cache), cache)
    body = (opening + tail).encode()
    assert cache.find(SCOPE, body, 23) is not None
    assert outcome(body, cache) == outcome(body, HistoryCache(0))


# -- the cache of histories: exact, inside its scope, bounded


def known(messages: list[bytes]) -> Known:
    history, ends = b"", []
    for raw in messages:
        history += (b"," if history else b"") + raw
        ends.append(len(history))
    return Known(memoryview(history), ends, list(range(1, len(ends) + 1)), [], [], b"t")


raws = st.lists(st.sampled_from([b"{a}", b"{" + b"b" * 70 + b"}", b"{" + b"c" * 300 + b"}"]), min_size=1, max_size=6)


@many
@given(st.lists(raws, min_size=1, max_size=6), raws, st.integers(0, 3))
def test_what_is_found_is_really_shared_and_at_most_what_is_shared(
    kept: list[list[bytes]], wanted: list[bytes], start: int
) -> None:
    cache = HistoryCache(1 << 20)
    for messages in kept:
        cache.add(b"s", known(messages), None)
    body = b"x" * start + bytes(known(wanted).history)
    found = cache.find(b"s", body, start)
    assert cache.find(b"other", body, start) is None
    if found is None:
        return
    history, shared = found
    end = history.ends[shared - 1]
    assert shared > 0 and body[start : start + end] == history.history[:end]
    assert shared == len(history.ends) or body[start:][: history.ends[shared]] != history.history[: history.ends[shared]]


def test_longest_of_several_continuations_is_found() -> None:
    cache = HistoryCache(1 << 20)
    first = [b"{" + b"a" * 100 + b"}"]
    longer = [*first, b"{b}", b"{c}"]
    cache.add(b"s", known(first), None)
    cache.add(b"s", known(longer), None)
    found = cache.find(b"s", bytes(known([*longer, b"{d}"]).history), 0)
    assert found is not None and found[1] == 3


@many
@given(st.lists(st.tuples(raws, st.booleans()), max_size=20), st.integers(100, 2000))
def test_invariant_10_bytes_kept_are_bounded(steps: list[tuple[list[bytes], bool]], limit: int) -> None:
    cache = HistoryCache(limit)
    last: Known | None = None
    for messages, forget in steps:
        new = known(messages)
        cache.add(b"s", new, last if last is not None and bytes(new.history).startswith(last.history) else None)
        if forget:
            cache.forget(new)
        last = new
        kept = {id(k): k.size_bytes for bucket in cache._buckets.values() for k in bucket}
        assert sum(kept.values()) <= cache._bytes <= limit
    cache.clear()
    assert cache._bytes == 0 and cache.find(b"s", b"{" + b"a" * 100 + b"}", 0) is None


def test_history_that_rests_is_recognised_and_keeps_its_messages_alone() -> None:
    cache, identity, tenant = HistoryCache(1 << 24), Identity(bytes(32)), TenantKey(b"t" * 32)
    message = b'{"role":"user","content":"%d %d, and so on: longer than what is kept for nobody"}'
    bodies = [b'{"messages":[%b]}' % b",".join(message % (n, i) for i in range(3)) for n in range(80)]
    spaced = bodies[0].replace(b"},{", b"}, {")
    for body in (spaced, *bodies):
        split = read_body(body, SCOPE, cache)
        known = remembered(split, *chain(split, identity, tenant), tenant)
        assert known is not None
        cache.add(SCOPE, known, split.continued)
    kept = {bytes(known.history): known for known, _ in cache._keys.values()}
    rests = [known._history is None for known in kept.values()]
    assert rests == [False, *[True] * (len(bodies) - 64), *[False] * 64]  # the first is not what its messages make
    for body in (spaced, *bodies):
        seen = recognise(body[:-2] + b',{"role":"user","content":"more"}]}', SCOPE, cache)
        assert seen.shared == 3


def test_continuation_takes_the_place_of_what_it_continues() -> None:
    cache = HistoryCache(1 << 20)
    first = known([b"{" + b"a" * 100 + b"}"])
    second = known([b"{" + b"a" * 100 + b"}", b"{b}"])
    cache.add(b"s", first, None)
    cache.add(b"s", second, first)
    assert len(cache._keys) == 1


@pytest.mark.parametrize("where", ["head", "message"])
def test_invariant_10_brackets_by_the_million_are_left_to_the_parser(where: str) -> None:
    many = b"[" + b"[]," * 100_000 + b"[]]"
    head = b'"x":' + many + b"," if where == "head" else b""
    more = b',"x":' + many if where == "message" else b""
    body = b'{"model":"m",' + head + b'"messages":[{"content":"hi","role":"user"' + more + b"}]}"
    with cpu_within(0.1):  # measured 0.015; 3 million took 1.1
        assert _locate(body) is None
    split = read_body(body, SCOPE, HistoryCache(1 << 20))
    assert len(split.new) == 1 and split.new[0][1]["content"] == "hi" and split.history is None


def test_a_body_is_looked_for_where_that_is_less_than_to_parse_it() -> None:
    message = '{"role":"user","content":"hi"}'
    assert is_short(f'{{"model":"m","messages":[{",".join([message] * 12)}]}}'.encode())
    assert not is_short(f'{{"model":"m","messages":[{",".join([message] * 13)}]}}'.encode())
    assert not is_short(f'{{"model":"m","messages":[{message}],"user":"{"x" * 8192}"}}'.encode())


def test_a_second_role_that_is_the_systems_is_seen_by_the_parser() -> None:
    """A first message whose role comes first is not read to its end."""
    twice = b'{"role":"user","content":"rules","role":"system"}'
    body = b'{"model":"m","messages":[' + twice + b',{"role":"user","content":"hi"}]}'
    split = read_body(body, SCOPE, HistoryCache(1 << 20))
    assert split.system == [twice] and split.history is None
