"""What is written changes only what has to change; a spoken answer goes by its id while it lasts, then in words."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from proxy.conversation.compose import (
    LEAST_ANSWER_TOKENS,
    answer_budget,
    as_input,
    request_body,
    response_body,
    total_usage,
    with_context,
    with_transcripts,
)
from proxy.conversation.effects import Refused
from proxy.conversation.records import Record
from proxy.conversation.tree import Identity
from proxy.conversation.turn import Turn
from tests.conversation.player import Player, limits_of, says, script
from tests.conversation.scenario import grown


def test_fields_keep_their_bytes_and_places() -> None:
    body = b'{"a": 1.50, "messages": [ 1 ], "\\u00e9" :{ "x":null }, "tools" : []}'
    fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    order = list(fields)
    del fields["messages"]
    out = request_body(fields, order, b"[2]", {"tools": b"[3]", "tool_choice": b'"none"'})
    assert out == '{"a":1.50,"messages":[2],"é":{ "x":null },"tools":[3],"tool_choice":"none"}'.encode()
    assert request_body(fields, order, b"[2]", {"tools": None, "x": None}).endswith(b"null }}")


def test_context_stands_in_front_of_the_users_own_text() -> None:
    assert with_context({"role": "user", "content": "hi", "name": "n"}, "B") == {
        "role": "user", "content": "B\n\nhi", "name": "n"
    }
    part = {"type": "image_url"}
    assert with_context({"content": [part]}, "B")["content"] == [{"type": "text", "text": "B"}, part]
    assert with_context({"content": None}, "B")["content"] == "B\n\n"


def test_answer_becomes_a_message_that_a_request_may_carry() -> None:
    said = {"index": 0, "role": "assistant", "content": None, "refusal": None, "annotations": [], "x": 0}
    assert as_input(said) == {"role": "assistant", "content": "", "x": 0}
    assert as_input({"content": None, "tool_calls": [1]}) == {
        "role": "assistant", "content": None, "tool_calls": [1]
    }


def test_usage_of_several_rounds() -> None:
    one = {"prompt_tokens": 10, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
    two = {"prompt_tokens": 20, "completion_tokens": 3, "odd": 1}
    assert total_usage([one, None, two], 2) == {
        "prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25, "odd": 1,
        "vm": {"rounds": 3, "faults": 2, "prompt_tokens": 30, "cached_tokens": 4, "written_tokens": 0, "completion_tokens": 5},
    }
    assert total_usage([None], 0) is None


def test_last_response_goes_down_under_the_first_ones_identity() -> None:
    last = {"id": "2", "created": 2, "model": "m2", "choices": [{"index": 0, "logprobs": None}], "x": 1}
    body = json.loads(response_body(last, {"id": "1", "created": 1, "model": "m"}, {"a": 1}, "stop", None))
    assert body == {
        "id": "1", "created": 1, "model": "m", "x": 1,
        "choices": [{"index": 0, "logprobs": None, "message": {"a": 1}, "finish_reason": "stop"}],
    }


def test_calls_as_input_have_a_type_and_text_for_arguments() -> None:
    whole = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    loose = [
        {"id": "a", "function": {"name": "f", "arguments": {}}},
        {"id": "a", "type": "function", "function": {"name": "f"}},
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}},
    ]
    assert as_input({"role": "assistant", "tool_calls": loose})["tool_calls"] == [whole] * 3
    custom = {"id": "c", "custom": {"name": "g", "input": "x"}}
    assert as_input({"tool_calls": [custom]})["tool_calls"] == [{**custom, "type": "custom"}]


def test_later_round_gets_what_the_limit_leaves_but_never_too_little() -> None:
    assert answer_budget({"max_tokens": 500, "max_completion_tokens": None}, 120) == {"max_tokens": b"380"}
    assert answer_budget({"max_tokens": 500}, 499) == {"max_tokens": b"%d" % LEAST_ANSWER_TOKENS}
    assert answer_budget({"max_completion_tokens": 20}, 300) == {"max_completion_tokens": b"20"}
    assert answer_budget({"max_tokens": "many"}, 3) == {}


# -- spoken answers

SOUND = {"id": "audio_1", "data": "UklGRg==", "expires_at": 1000, "transcript": "Hello, said aloud."}
ECHO = {"role": "assistant", "audio": {"id": "audio_1"}}
ASKED = {"role": "user", "content": "say it"}


def sent(now_s: float, usable: bool = True, echo: Any = ECHO) -> list[dict[str, Any]]:
    """What goes upstream for a conversation whose answer was heard here."""
    messages = [ASKED, echo, {"role": "user", "content": "again"}]
    raws = [(json.dumps(m).encode(), m) for m in messages]
    path = Identity(b"s" * 32).extend(b"t", [], raws)
    whole = json.dumps({"role": "assistant", "content": None, "audio": SOUND}).encode()
    ids = [node.id for node in path[:2]]
    record = Record(b"", 0, ids, ids, ["user", "assistant"], [path[0].raw, whole], [1, 1], 1)
    bytes_ = json.dumps(messages).encode()
    found = with_transcripts(bytes_, path, {path[1].id: record}.get, now_s, usable)
    assert found is bytes_ or found != bytes_
    made: list[dict[str, Any]] = json.loads(found)
    return made


def test_id_goes_up_while_it_lasts_and_its_words_afterwards() -> None:
    assert sent(now_s=999)[1] == ECHO
    assert sent(now_s=1000)[1] == {"role": "assistant", "content": "Hello, said aloud."}
    assert sent(now_s=0, usable=False)[1] == {"role": "assistant", "content": "Hello, said aloud."}
    beside = {**ECHO, "content": "Here."}
    assert sent(1000, echo=beside)[1]["content"] == "Here.\n\nHello, said aloud."


def test_whole_answer_names_only_its_id() -> None:
    assert sent(0, echo={"role": "assistant", "audio": SOUND})[1]["audio"] == {"id": "audio_1"}


def test_what_is_not_known_stays() -> None:
    other = {"role": "assistant", "audio": {"id": "audio_2"}}
    assert sent(2000, usable=False, echo=other)[1] == other
    body = b'[{"role":"user","content":"the \\"audio\\""}]'
    assert with_transcripts(body, [], {}.get, 0, False) is body


def test_refused_id_is_replaced_in_the_next_try() -> None:
    player = Player(limits_of(4000))
    history = grown(player, 50)
    gone = Refused(404, b'{"error":{"message":"Audio audio_1 has expired."}}')
    spoken = {"role": "assistant", "content": None, "audio": SOUND}
    first = player.ask([*history, ASKED], script(spoken))
    assert first.message is not None and first.message["audio"] == SOUND
    messages = [*history, ASKED, ECHO, {"role": "user", "content": "again"}]
    get, run = player.get_record, Turn.__init__

    def knowing(turn: Turn, given: Any) -> None:
        given.get_record = get
        run(turn, given)

    Turn.__init__ = knowing  # type: ignore[method-assign]
    try:
        played = player.ask(messages, script(gone, says("ok")))
    finally:
        Turn.__init__ = run  # type: ignore[method-assign]
    assert len(played.bodies) == 2
    assert ECHO in played.requests[0]["messages"]
    assert SOUND["transcript"] in [m.get("content") for m in played.requests[1]["messages"]]
