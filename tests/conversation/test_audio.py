"""Audio of earlier answers: by id while it lasts, then in words."""

from __future__ import annotations

import json
from typing import Any

from proxy.conversation.audio import with_transcripts
from proxy.conversation.effects import Refused
from proxy.conversation.records import Record
from proxy.conversation.tree import Identity
from proxy.conversation.turn import Turn
from tests.conversation.player import Player, limits_of, says, script
from tests.conversation.scenario import grown

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


def test_an_id_goes_up_while_it_lasts_and_its_words_afterwards() -> None:
    assert sent(now_s=999)[1] == ECHO
    assert sent(now_s=1000)[1] == {"role": "assistant", "content": "Hello, said aloud."}
    assert sent(now_s=0, usable=False)[1] == {"role": "assistant", "content": "Hello, said aloud."}
    beside = {**ECHO, "content": "Here."}
    assert sent(1000, echo=beside)[1]["content"] == "Here.\n\nHello, said aloud."


def test_a_whole_answer_names_only_its_id() -> None:
    assert sent(0, echo={"role": "assistant", "audio": SOUND})[1]["audio"] == {"id": "audio_1"}


def test_what_is_not_known_stays() -> None:
    other = {"role": "assistant", "audio": {"id": "audio_2"}}
    assert sent(2000, usable=False, echo=other)[1] == other
    body = b'[{"role":"user","content":"the \\"audio\\""}]'
    assert with_transcripts(body, [], {}.get, 0, False) is body


def test_a_refused_id_is_replaced_in_the_next_try() -> None:
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
