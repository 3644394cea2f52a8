"""A client that goes on talking: it appends what it was answered, and may send only the end of it all.

Promises: every answer is the scripted model's own, delivered through the gateway, and long enough to
be no greeting; what `secret` names stands in no other text of the suite.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.contract import say
from tests.contract.model import expect, quote
from tests.contract.play import CHAT, Play, fact, nearest
from tests.contract.scripted import tag_text
from tests.contract.wire import Headers, Json
from tests.e2e.answers import Answer

KEPT = 10  # messages that a client with a window of its own sends
_FILLER = "rope sail tar oakum pitch block shackle cleat buoy fender lantern chart compass sextant".split()


def user(text: str) -> Json:
    return {"role": "user", "content": text}


def secret(play: Play) -> str:
    """A word that only one conversation may see."""
    return f"quixotic-{play.tag}-zephyr"


def told(play: Play) -> list[Json]:
    """The exchange that says the secret."""
    return [user(f"My code word is {secret(play)}, keep it for me."),
            say.text("I keep the code word; nobody else hears it from me.")]


def answers(play: Play) -> Callable[[Json], Answer]:
    """Says something else each time, two lines long."""
    numbers = itertools.count()

    def step(request: Json) -> Answer:
        number = next(numbers)
        words = " ".join(_FILLER[(number + i) % len(_FILLER)] + str(number) for i in range(24))
        return say.answer(request, say.text(f"Answer {number} of {play.tag}: {words}."), number)

    return step


@dataclass
class Talk:
    """One conversation of a play. `keep`: it sends only the last so many messages; `headers`, `path`
    and `fields` go with every request, and `headers_of` says more for each by its number."""

    play: Play
    messages: list[Json] = field(default_factory=list)  # without the system message
    system: str = "Be brief."
    keep: int | None = None
    headers: Headers = ()
    headers_of: Callable[[int], Headers] = lambda number: ()
    path: str = CHAT
    fields: Json = field(default_factory=dict)
    turns: int = 0

    def sent(self) -> list[Json]:
        """What the next request says."""
        head = {"role": "system", "content": f"{self.system} {tag_text(self.play.tag)}"}
        return [head, *(self.messages if self.keep is None else self.messages[-self.keep :])]

    async def say(self, text: str) -> list[Json]:
        """One turn; returns the messages that were sent."""
        self.messages.append(user(text))
        return await self.again()

    async def again(self) -> list[Json]:
        """Sends the history as it stands (a first answer, or another one) and appends the answer."""
        sent = self.sent()
        headers = [*self.headers, *self.headers_of(self.turns)]
        reply = await self.play.send(self.play.body(sent, **self.fields), headers, self.path)
        self.messages.append(say.text(reply.ok().content()))
        self.turns += 1
        return sent


Judge = Callable[[Play, Sequence[Json]], None]


async def chatter(talk: Talk, turns: int, judge: Judge | None = None) -> None:
    """So many turns about nothing; `judge` is shown each, with the messages that were sent."""
    for number in range(turns):
        talk.play.script.calls.clear()
        sent = await talk.say(f"Turn {talk.turns}-{number}: tell me more about ropes and knots, please.")
        if judge is not None:
            judge(talk.play, sent)


async def noted(talk: Talk, turns: int) -> None:
    """So many turns that say the code of a depot each."""
    for _ in range(turns):
        number = talk.turns
        await talk.say(f"Note {number}: the code of depot {number} is {fact(number)}.")


def own_words(play: Play, sent: Sequence[Json]) -> None:
    """Each upstream call had the client's messages, and the secret in none. Where requests below a
    window have to stay as they are (and on the bare upstream) it had nothing else."""
    unseen(play, sent)
    for recorded in play.calls:
        got = recorded.json["messages"]
        if play.target.window_tokens or not play.target.proxy:
            expect(play.same_messages(recorded.json, sent), f"upstream got other messages: {quote(got, 500)}")
            continue
        newest = play.wire.messages(sent[-1:])[0]
        expect(said(newest, got), f"the newest message is not upstream; {nearest(newest, got)}")


def said(message: Json, got: Sequence[Json]) -> bool:
    """The text of a message stands in one of the same role."""
    text = json.dumps(message.get("content"))[1:-1]
    return any(one.get("role") == message.get("role") and text in json.dumps(one) for one in got)


def unseen(play: Play, sent: Sequence[Json] = ()) -> None:
    """The secret was in no upstream call. A client whose own history is trimmed may be shown the rest."""
    expect(play.calls, "nothing reached upstream")
    for recorded in play.calls:
        at = recorded.body.find(secret(play).encode())
        around = recorded.body[max(0, at - 160) : at + 60].decode("utf-8", "replace")
        expect(at < 0, f"another conversation's words went upstream: ...{quote(around, 300)}")


def searching(play: Play, query: str) -> None:
    """The model's own searches look for these words."""

    def step(request: Json, inner: Json) -> Any:
        arguments = json.loads(inner["function"]["arguments"])
        if "query" in arguments:
            arguments["query"] = query
        body = {**inner["function"], "arguments": json.dumps(arguments)}
        return say.answer(request, say.calling({**inner, "function": body}))

    play.script.inner_step = step
