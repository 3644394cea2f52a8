"""The stream sieve: the client gets its part, once, in order, whatever the framing."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.channel import TOOLS, Channel, vm_names
from proxy.conversation.chunks import MessageBuilder, decode_chunk
from proxy.conversation.sieve import Sieve
from proxy.sse import EventParser
from tests.examples import examples

many = examples(30)
VM = frozenset({"page_fault", "search_pages"})
OURS = Channel(TOOLS, True, vm_names(), frozenset({"look", "lookup", "page", "page_fault_2"}), True)
Delta = dict[str, Any]


def sieve(hold_tokens: int = 6, hold_ms: float = 100, hold_text: bool = False) -> Sieve:
    return Sieve(OURS, hold_tokens, hold_ms, hold_text, False, lambda text: len(text.split()))


def chunk(delta: Delta, finish: str | None = None, **fields: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    head = {"id": "id-1", "object": "chat.completion.chunk", "created": 7, "model": "m"}
    return {**head, **fields, "choices": [choice]}


def event(value: Any, ending: bytes = b"\n") -> bytes:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return b"data: " + data + ending * 2


def call_deltas(name: str, arguments: str, index: int | None, call_id: str, pieces: int) -> list[Delta]:
    where = {} if index is None else {"index": index}
    size = max(1, len(arguments) // pieces)
    cut = [arguments[i : i + size] for i in range(0, len(arguments), size)]
    first = {**where, "id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}
    return [first, *({**where, "function": {"arguments": piece}} for piece in cut)]


@st.composite
def rounds(draw: st.DrawFn, last: bool) -> tuple[list[dict[str, Any]], bool]:
    """Chunks of one round, and whether it has calls of the memory. The last one has none alone."""
    indexed, roles = draw(st.booleans()), draw(st.sampled_from(["first", "every"]))
    texts = draw(st.lists(st.text("ab \n", min_size=1, max_size=12), max_size=6))
    unknown = draw(st.sampled_from([{}, {"provider": "x"}, {"usage": None}]))
    deltas: list[Delta] = [{"content": text} for text in texts]
    kinds = ["client"] if last else ["vm"]
    names: list[str] = []
    if not last or draw(st.booleans()):
        names = draw(st.lists(st.sampled_from([*kinds, "vm", "client"] if not last else kinds),
                              min_size=1, max_size=4))
        if not last and "vm" not in names:
            names[0] = "vm"
    for i, kind in enumerate(names):
        name = draw(st.sampled_from(sorted(VM) if kind == "vm" else ["look", "page", "page_fault_2"]))
        for one in call_deltas(name, json.dumps({"a": str(i)}), i if indexed else None, f"c{i}{name}", 3):
            deltas.append({"tool_calls": [one]})
    if draw(st.booleans()) and indexed and names:  # all calls at once in one chunk
        whole = [d["tool_calls"][0] for d in deltas if "tool_calls" in d]
        deltas = [d for d in deltas if "tool_calls" not in d] + [{"tool_calls": whole}]
    if roles == "every":
        deltas = [{"role": "assistant", **delta} for delta in deltas]
    else:
        deltas.insert(0, {"role": "assistant", "content": ""})
    chunks = [chunk(delta, **unknown) for delta in deltas]
    finish = "tool_calls" if names else "stop"
    if draw(st.booleans()) and deltas:
        chunks[-1]["choices"][0]["finish_reason"] = finish
    else:
        chunks.append(chunk({"role": "assistant"} if roles == "every" else {}, finish, **unknown))
    return chunks, "vm" in names


def assemble(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    builder = MessageBuilder()
    for one in chunks:
        builder.add(one["choices"][0]["delta"])
    return builder.build()


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({c % (len(data) + 1) for c in cuts})
    return [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)]


def received(data: bytes) -> tuple[dict[str, Any], list[str], list[dict[str, Any]]]:
    """What a client makes of a stream: its message, its finish reasons, its chunks."""
    parser, builder = EventParser(), MessageBuilder()
    chunks, finishes = [], []
    events = [*parser.feed(data), *parser.close()]
    assert events[-1].data == b"[DONE]" and data.count(b"[DONE]") == 1
    for one in events[:-1]:
        value = decode_chunk(one.data)
        assert value is not None
        chunks.append(value)
        for choice in value["choices"]:
            assert choice["index"] == 0
            builder.add(choice["delta"])
            if choice.get("finish_reason"):
                finishes.append(choice["finish_reason"])
    return builder.build(), finishes, chunks


@many
@given(st.data(), st.booleans(), st.sampled_from([b"\n", b"\r\n"]),
       st.lists(st.integers(0, 4000), max_size=8))
def test_client_gets_exactly_its_part_once(
    data: st.DataObject, hold_text: bool, ending: bytes, cuts: list[int]
) -> None:
    it = sieve(hold_text=hold_text)
    out, texts, preamble = b"", [], ""
    shown_calls: list[tuple[str, str]] = []
    for _ in range(data.draw(st.integers(0, 2))):
        chunks, _ = data.draw(rounds(last=False))
        said = assemble(chunks)
        if any(c["function"]["name"] not in VM for c in said["tool_calls"]):
            shown_calls = [(c["function"]["name"], c["function"]["arguments"])
                           for c in said["tool_calls"] if c["function"]["name"] not in VM]
            last = chunks
            break
        out += feed(it, chunks, True, ending, cuts)
        ended, ready = it.end_round()
        out += b"".join(ready)
        assert ended.message == said and ended.complete and ended.finish_reason == "tool_calls"
        preamble = (it.shown().get("content") or "")
        texts.append(said["content"] or "")
    else:
        last, _ = data.draw(rounds(last=True))
        said = assemble(last)
        shown_calls = [(c["function"]["name"], c["function"]["arguments"])
                       for c in said.get("tool_calls") or ()]
    out += feed(it, last, True, ending, cuts)
    ended, ready = it.end_round()
    assert ended.message == said and ended.complete
    out += b"".join(ready) + b"".join(it.finish(ended.finish_reason, None))
    message, finishes, chunks = received(out)
    assert message == it.shown()
    assert finishes == [ended.finish_reason]
    got = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls") or ()]
    assert sorted(got) == sorted(shown_calls)
    text, said_text = message["content"] or "", said["content"] or ""
    assert text == preamble + said_text  # beside calls of ours too: the round is the client's
    if said_text and shown_calls:  # in the order in which the model said it
        speaks = [bool(c["choices"][0]["delta"].get("tool_calls")) for c in chunks
                  if c["choices"] and any(c["choices"][0]["delta"].get(k) for k in ("content", "tool_calls"))]
        assert speaks == sorted(speaks)
    assert preamble == "" or preamble in "".join(texts)
    assert not any(b'"name":"%s"' % vm.encode() in out.replace(b" ", b"") for vm in VM)
    assert sum(bool(c["choices"][0]["delta"].get("role")) for c in chunks) == 1
    assert len({(c["id"], c["created"], c["model"]) for c in chunks}) == 1
    indexes = [c["index"] for one in chunks for c in one["choices"][0]["delta"].get("tool_calls") or ()]
    assert sorted(set(indexes)) == list(range(len(shown_calls)))


def feed(it: Sieve, chunks: list[dict[str, Any]], offer: bool, ending: bytes, cuts: list[int]) -> bytes:
    it.begin_round(offer)
    raw = b"".join(event(one, ending) for one in [*chunks, b"[DONE]"])
    return b"".join(piece for data in split(raw, cuts) for piece in it.feed(data, 0.0))


@many
@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.integers(0, 8))
def test_no_more_than_hold_tokens_are_held(sizes: list[int], hold_tokens: int) -> None:
    it = sieve(hold_tokens=hold_tokens, hold_ms=1e9)
    it.begin_round(True)
    fed = 0
    for size in sizes:
        fed += size
        it.feed(event(chunk({"content": "w " * size})), 0.0)
        shown = (it.shown().get("content") or "").count("w")
        assert shown == (fed if fed > hold_tokens else 0)


def test_text_is_held_for_hold_ms_at_most() -> None:
    it = sieve(hold_ms=100)
    it.begin_round(True)
    assert it.deadline_ms is None
    opening = event(chunk({"role": "assistant", "content": ""}))
    assert it.feed(opening, 5.0) == [opening]  # at once
    assert it.deadline_ms is None
    it.feed(event(chunk({"content": "Let"})), 10.0)
    it.feed(event(chunk({"content": " me"})), 90.0)
    assert it.deadline_ms == 110.0
    assert it.poll(109.9) == [] and len(it.poll(110.0)) == 2
    assert it.deadline_ms is None and len(it.feed(event(chunk({"content": " see"})), 111.0)) == 1


def one_call(name: str, call_id: str = "c", index: int = 0, **beside: Any) -> bytes:
    function = {"name": name, "arguments": "{}"}
    made = {"index": index, "id": call_id, "type": "function", "function": function}
    return event(chunk({**beside, "tool_calls": [made]}))


def test_text_beside_a_mixed_call_leaves_before_the_clients_call() -> None:
    it = sieve()
    it.begin_round(True)
    opening = it.feed(event(chunk({"role": "assistant", "content": ""})), 0.0)
    assert it.feed(event(chunk({"content": "Now the code."})), 0.0) == []
    assert it.feed(one_call("page_fault", "v"), 0.0) == []
    assert it.deadline_ms is None  # it waits for the client's call, however long the round is
    assert it.feed(event(chunk({"content": " And"})), 0.0) == [] == it.poll(1e9)
    out = b"".join([*opening, *it.feed(one_call("look", "c", 1), 0.0), *it.feed(event(chunk({}, "tool_calls")), 0.0),
                    *it.end_round()[1], *it.finish("tool_calls", None)])
    message, _, chunks = received(out)
    assert message["content"] == "Now the code. And"
    assert [c["id"] for c in message["tool_calls"]] == ["c"] and b"page_fault" not in out
    assert [sorted(c["choices"][0]["delta"]) for c in chunks] == [
        ["content", "role"], ["content"], ["content"], ["tool_calls"], []]


def test_opening_leaves_before_the_words_that_come_with_it() -> None:
    it = sieve()
    it.begin_round(True)
    (opening,) = it.feed(event(chunk({"role": "assistant", "content": "Let", "refusal": None})), 0.0)
    assert json.loads(opening[6:]) == chunk({"role": "assistant", "refusal": None})
    (words,) = it.poll(100.0)
    assert json.loads(words[6:]) == chunk({"content": "Let", "refusal": None})


@pytest.mark.parametrize("opens", [True, False])
def test_of_rounds_that_stay_inside_the_first_opening_leaves_alone(opens: bool) -> None:
    it = sieve()
    for i in range(2):
        it.begin_round(True, opens=opens)
        azure = b'data: {"id":"","choices":[],"prompt_filter_results":[%d]}\n\n' % i
        out = [*it.feed(azure, 0.0), *it.feed(event(chunk({"role": "assistant", "content": ""})), 0.0),
               *it.feed(event(chunk({"content": "Let me see."})), 0.0), *it.poll(50.0),
               *it.feed(one_call("page_fault"), 0.0), *it.feed(event(chunk({}, "tool_calls")), 0.0)]
        opening = [azure, event(chunk({"role": "assistant", "content": ""}))]
        assert [*out, *it.end_round()[1]] == (opening if opens and i == 0 else [])
    it.begin_round(True, opens=opens)
    answer = [b'data: {"id":"","choices":[],"prompt_filter_results":[2]}\n\n',
              event(chunk({"role": "assistant", "refusal": "I am sorry."}))]
    shown = [*it.feed(b"".join(answer), 0.0), *it.poll(100.0)]
    if not opens:
        assert shown == answer  # the shown round's own bytes
    else:
        assert [json.loads(e[6:]) for e in shown] == [chunk({"refusal": "I am sorry."})]


def test_a_stream_that_came_to_nothing_goes_on_as_the_one_that_was_opened() -> None:
    it = sieve()
    it.opened(event(chunk({"role": "assistant", "content": ""})))
    it.begin_round(False)
    other = {**chunk({"role": "assistant"}), "id": "another"}
    assert it.feed(event(other), 0.0) == []  # one role
    words = {**chunk({"content": "Yes."}), "id": "another"}
    assert [json.loads(e[6:]) for e in it.feed(event(words), 0.0)] == [chunk({"content": "Yes."})]


def test_clients_call_opens_as_the_round_did() -> None:
    it = sieve()
    it.begin_round(True)
    assert it.feed(one_call("search_pages", "v", role="assistant", content=None, refusal=None), 0.0) == []
    _, _, chunks = received(b"".join([*it.feed(one_call("look", "c", 1), 0.0), b"data: [DONE]\n\n"]))
    delta = chunks[0]["choices"][0]["delta"]
    assert {k: v for k, v in delta.items() if k != "tool_calls"} == {
        "role": "assistant", "content": None, "refusal": None}
    assert [c["index"] for c in delta["tool_calls"]] == [0]


def test_response_format_holds_text_to_the_end_of_the_round() -> None:
    it = sieve(hold_text=True)
    it.begin_round(True)
    it.feed(event(chunk({"content": "{" * 200 + " a b c d e f g h i"})), 0.0)
    assert it.deadline_ms is None and it.poll(1e12) == [] and it.shown()["content"] is None
    it.end_round()
    assert it.shown()["content"].startswith("{")


def test_what_needs_no_change_leaves_as_it_came() -> None:
    it = sieve()
    it.begin_round(False)
    raw = [
        b": ping\n\n",
        b'data: {"id":"","choices":[],"prompt_filter_results":[1]}\n\n',
        event(chunk({"role": "assistant", "content": ""})),
        event(chunk({"content": "hi"}, service_tier=None)),
        event(chunk({"tool_calls": [{"index": 0, "id": "c", "function": {"name": "look", "arguments": ""}}]})),
        event(chunk({"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]})),
    ]
    end = event(chunk({}, "tool_calls"))
    assert [out for one in raw for out in it.feed(one, 0.0)] == raw
    assert it.feed(end, 0.0) == [] and it.end_round()[1] == []
    assert it.finish("tool_calls", None) == [end, b"data: [DONE]\n\n"]


def test_chunk_with_text_and_a_call_gives_each_once() -> None:
    it = sieve()
    it.begin_round(True)
    delta = {"role": "assistant", "content": "so",
             "tool_calls": [{"index": 0, "id": "c", "function": {"name": "look", "arguments": "{}"}}]}
    out = b"".join([*it.feed(event(chunk(delta, "tool_calls")), 0.0), *it.end_round()[1],
                    *it.finish("tool_calls", None)])
    message, finishes, _ = received(out)
    assert message["content"] == "so" and len(message["tool_calls"]) == 1
    assert finishes == ["tool_calls"] and out.count(b'"role"') == 1


def test_name_that_one_of_ours_begins_with_belongs_to_the_client() -> None:
    it = sieve()
    it.begin_round(True)
    delta = {"tool_calls": [{"index": 0, "id": "c", "function": {"name": "page", "arguments": "{}"}}]}
    at_once = it.feed(event(chunk(delta)), 0.0)
    assert at_once  # arguments have come: the name is whole, though one of ours begins with it
    out = b"".join([*at_once, *it.end_round()[1], *it.finish("tool_calls", None)])
    message, _, chunks = received(out)
    assert message["tool_calls"][0]["function"]["name"] == "page" and chunks[0]["id"] == "id-1"


def test_stream_that_breaks_off_is_not_complete_and_a_late_error_is_kept() -> None:
    it = sieve()
    it.begin_round(False)
    it.feed(event(chunk({"content": "a"})), 0.0)
    assert not it.end_round()[0].complete
    it.begin_round(False)
    error = b'data: {"error": {"message": "overloaded"}}\n\n'
    it.feed(error, 0.0)
    assert it.end_round()[0].error == error


def test_usage_goes_down_when_it_was_asked_for() -> None:
    it = Sieve(OURS, 6, 100, False, True, len)
    it.begin_round(False)
    it.feed(event(chunk({"role": "assistant", "content": "a"}, "stop")), 0.0)
    usage = {"id": "id-1", "object": "chat.completion.chunk", "created": 7, "model": "m",
             "choices": [], "usage": {"prompt_tokens": 3}}
    it.feed(event(usage) + event(b"[DONE]"), 0.0)
    ended, _ = it.end_round()
    assert ended.usage == {"prompt_tokens": 3}
    out = it.finish("stop", {"prompt_tokens": 3})
    assert out[1:] == [event(usage), b"data: [DONE]\n\n"]
    assert json.loads(it.finish("stop", {"prompt_tokens": 9})[1][6:])["usage"] == {"prompt_tokens": 9}


USAGE = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}


def _stream(*chunks: dict[str, Any], asked: bool) -> list[Any]:
    """The chunks that the client gets of a round with these; the last is the usage chunk's, if any."""
    sieve = Sieve(OURS, 0, 500.0, False, asked, len)
    sieve.begin_round(True)
    out: list[bytes] = []
    for one in chunks:
        out += sieve.feed(b"data: " + json.dumps(one).encode() + b"\n\n", 0.0)
    ended, ready = sieve.end_round()
    out += [*ready, *sieve.finish(ended.finish_reason, ended.usage)]
    assert out[-1] == b"data: [DONE]\n\n"
    return [json.loads(event[6:]) for event in out[:-1]]


def _one(delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    return {"id": "c", "created": 1, "model": "m", "choices": choices, **more}


@pytest.mark.parametrize("told", [{}, {"usage": None}])
def test_usage_is_null_on_every_chunk_and_one_last_chunk_for_who_asked(told: dict[str, Any]) -> None:
    chunks = [_one({"role": "assistant", "content": "a"}, **told), _one({}, "stop", **told)]
    last = {**_one({}), "choices": [], "usage": USAGE}
    *rest, usage = _stream(*chunks, last, asked=True)
    assert usage == last
    assert all("usage" in chunk and chunk["usage"] is None for chunk in rest)


@pytest.mark.parametrize("told", [{}, {"usage": None}])
def test_usage_is_nowhere_for_who_did_not_ask(told: dict[str, Any]) -> None:
    azure = {"id": "", "choices": [], "prompt_filter_results": [], **told}
    chunks = [azure, _one({"role": "assistant", "content": "a"}, **told), _one({}, "stop", **told)]
    found = _stream(*chunks, {**_one({}), "choices": [], "usage": USAGE}, asked=False)
    assert len(found) == 4 and all("usage" not in chunk for chunk in found)


def test_usage_beside_the_finish_reason_stays_there_unless_it_was_asked_for() -> None:
    chunks = [_one({"role": "assistant", "content": "a"}), _one({}, "stop", usage=USAGE)]
    assert _stream(*chunks, asked=False)[-1]["usage"] == USAGE
    *_, finish, usage = _stream(*chunks, asked=True)
    assert finish["usage"] is None and finish["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == [] and usage["usage"] == USAGE


def test_calls_keep_their_order_when_one_begins_like_ours() -> None:
    def opened(index: int, name: str) -> dict[str, Any]:
        function = {"name": name, "arguments": ""}
        return _one({"tool_calls": [{"index": index, "id": f"c{index}", "function": function}]})

    found = _stream(opened(0, "page"), opened(1, "lookup"), _one({}, "tool_calls"), asked=False)
    calls = [c for chunk in found for c in chunk["choices"][0]["delta"].get("tool_calls") or ()]
    assert [(c["index"], c["function"]["name"]) for c in calls] == [(0, "page"), (1, "lookup")]


def test_last_event_without_its_blank_line_is_whole_for_the_client() -> None:
    sieve = Sieve(None, 0, 500.0, False, False, len)
    sieve.begin_round(False)
    out = sieve.feed(b"data: " + json.dumps(_one({"content": "a"}, "stop")).encode(), 0.0)
    ended, ready = sieve.end_round()
    text = b"".join([*out, *ready, *sieve.finish("stop", None)])
    assert all(line.startswith(b"data: ") for line in text.split(b"\n\n") if line)
    assert ended.message["content"] == "a"
