"""Random conversations for the property tests: a client, a user who changes his mind, and a model
that answers, faults, searches, calls the client's tools or does all of it at once.

What everybody does depends on the seed and the turn only, never on the upstream bodies, so that two
players given one scenario can be compared byte for byte.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from proxy.memory import VMMode
from tests.conversation.player import (
    Message,
    Model,
    Played,
    Player,
    call,
    calls,
    limits_of,
    says,
    script,
)

WORDS = """harbour violin ledger comet walnut glacier tram orchid copper lantern meadow quartz
saddle thunder umbrella velvet willow yogurt zephyr anchor basil canyon dolphin ember falcon ginger
hazel island jasmine kettle lemon marble nectar olive pepper quilt raven saffron tulip the of and a
is was to in we will then because very 17 204 3.5 é 日本 naïve""".split()
LOOKUP = "lookup"


@dataclass(frozen=True)
class Scenario:
    """`moves` is what the user does; `habit` what the model likes to do."""

    seed: int
    budget: int
    moves: tuple[str, ...]
    habit: str
    system_share: float = 0.1
    tools: int = 0
    mode: VMMode = VMMode.RELAXED
    stream: bool = True
    systems: bool = True  # system messages in mid-conversation

    def limits(self) -> Any:
        return limits_of(self.budget, mode=self.mode, page_tokens=max(32, self.budget // 16))


MOVES = ("say", "say", "say", "say", "big", "list", "system", "regenerate", "edit", "retry", "force")
HABITS = ("answer", "fault", "search", "mixed", "client", "any", "stubborn")


@st.composite
def scenarios(draw: st.DrawFn, turns: int = 14, **fixed: Any) -> Scenario:
    values: dict[str, Any] = {
        "seed": draw(st.integers(0, 10**6)),
        "budget": draw(st.sampled_from((1200, 1500, 2000, 3000, 5000, 9000, 20_000))),
        "moves": tuple(draw(st.lists(st.sampled_from(MOVES), min_size=turns, max_size=turns))),
        "habit": draw(st.sampled_from(HABITS)),
        "system_share": draw(st.sampled_from((0.0, 0.05, 0.25))),
        "tools": draw(st.sampled_from((0, 1, 3))),
        "mode": draw(st.sampled_from((VMMode.RELAXED, VMMode.STRICT, VMMode.PASSIVE))),
        "stream": draw(st.booleans()),
    }
    return Scenario(**{**values, **fixed})


@dataclass
class Run:
    """What came of it; `histories` are the client's messages at each request."""

    played: list[Played] = field(default_factory=list)
    histories: list[list[Message]] = field(default_factory=list)

    @property
    def bodies(self) -> list[bytes]:
        return [body for one in self.played for body in one.bodies]


def text_of(rng: random.Random, words: int, name: str) -> str:
    """About `words` words; `name` stands in it once and nowhere else."""
    return " ".join([name, *rng.choices(WORDS, k=max(1, words))])


def tools_of(count: int) -> list[Message]:
    body = {"description": "Looks a word up in the ledger.", "parameters": {"type": "object"}}
    names = (LOOKUP, "page_fault", "archive")[:count]  # one of them collides with ours
    return [{"type": "function", "function": {"name": name, **body}} for name in names]


def play(
    scenario: Scenario,
    player: Player | None = None,
    before_turn: Callable[[Player, int], None] = lambda player, turn: None,
) -> Run:
    """The whole scenario; `before_turn` may drop caches."""
    client = _Client(scenario, player or Player(scenario.limits()), before_turn)
    for number, move in enumerate(scenario.moves):
        client.move(number, move)
    return client.run


class _Client:
    def __init__(
        self, scenario: Scenario, player: Player, before_turn: Callable[[Player, int], None]
    ) -> None:
        self.scenario, self.player, self.before_turn = scenario, player, before_turn
        self.run = Run()
        self.rng = random.Random(scenario.seed)
        self.asked = 0
        self.messages: list[Message] = []
        if scenario.system_share:
            words = int(scenario.budget * scenario.system_share / 2)
            self.messages.append({"role": "system", "content": text_of(self.rng, words, "system")})

    def move(self, number: int, move: str) -> None:
        users = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
        extra: dict[str, Any] = {}
        if move == "regenerate" and users:
            del self.messages[users[-1] + 1 :]
        elif move == "edit" and len(users) > 2:
            del self.messages[self.rng.choice(users[-3:]) :]
            self._say(number, 0.05, False)
        elif move == "retry" and users:
            last = max(i for i, m in enumerate(self.messages) if m["role"] in ("user", "tool"))
            del self.messages[last + 1 :]
        elif move == "system" and self.scenario.systems:
            text = text_of(self.rng, self.scenario.budget // 100, f"note{number}")
            at = len(self.messages) - (self.rng.random() < 0.3 and bool(users))
            if at < len(self.messages) and self.messages[at]["role"] == "tool":
                at = len(self.messages)
            self._say(number, 0.03, False)
            self.messages.insert(at, {"role": "system", "content": text})
        elif move == "big":
            self._say(number, self.rng.choice((0.3, 0.8, 2.5)), False)
        else:
            if move == "force":
                extra = self.rng.choice(
                    ({"n": 1, "logprobs": True}, {"tool_choice": "none"}, {"functions": [{}]})
                )
            self._say(number, self.rng.choice((0.01, 0.02, 0.08)), move == "list")
        self._ask(extra)

    def _say(self, number: int, share: float, as_list: bool) -> None:
        text = text_of(self.rng, int(self.scenario.budget * share / 1.6), f"user{number}x")
        if self.rng.random() < 0.6:
            text += " what did we say about " + " ".join(self.rng.choices(WORDS, k=4)) + "?"
        content: Any = [{"type": "text", "text": text}] if as_list else text
        self.messages.append({"role": "user", "content": content})

    def _ask(self, extra: dict[str, Any]) -> None:
        if self.scenario.tools:
            extra = {"tools": tools_of(self.scenario.tools), **extra}
        for loop in range(3):
            self.before_turn(self.player, self.asked)
            self.run.histories.append([dict(m) for m in self.messages])
            stream = self.scenario.stream and self.rng.random() < 0.5
            played = self.player.ask(
                self.messages, self._model(loop == 2), **({"stream": True} if stream else {}), **extra
            )
            self.asked += 1
            self.run.played.append(played)
            assert played.message is not None
            self.messages.append(self._echo(played.message))
            wanted = played.message.get("tool_calls") or ()
            if not wanted:
                return
            for one in wanted:
                words = int(self.scenario.budget * self.rng.choice((0.01, 0.1)) / len(wanted))
                text = text_of(self.rng, words, f"result{self.asked}x{one['id']}")
                self.messages.append({"role": "tool", "tool_call_id": one["id"], "content": text})

    def _echo(self, message: Message) -> Message:
        """The answer as some clients send it back: fewer fields, another order, other spaces."""
        kept = {"content": message.get("content") or "", "role": "assistant"}
        if message.get("tool_calls"):
            kept["tool_calls"] = [
                {
                    **{k: v for k, v in one.items() if k != "index"},
                    "function": {
                        "arguments": json.dumps(json.loads(one["function"]["arguments"]), indent=1),
                        "name": one["function"]["name"],
                    },
                }
                for one in message["tool_calls"]
            ]
            if self.rng.random() < 0.5:
                kept["content"] = message.get("content")
        return kept

    def _model(self, last: bool) -> Model:
        rng = random.Random(f"{self.scenario.seed}-{self.asked}")
        asked, budget, habit = self.asked, self.scenario.budget, self.scenario.habit
        rounds = 0

        def model(request: Message) -> Message:
            nonlocal rounds
            rounds += 1
            names = [tool["function"]["name"] for tool in request.get("tools") or ()]
            fault = next((n for n in ("vm_page_fault", "page_fault") if n in names), None)
            ours = "search_pages" in names
            does = habit if habit != "any" else rng.choice(HABITS[:5])
            answer = says(text_of(rng, int(budget * rng.choice((0.01, 0.05))), f"answer{asked}x"))
            free = request.get("tool_choice") != "none" or (habit == "stubborn" and ours)
            if not free or (does == "answer") or (habit != "stubborn" and rng.random() < 0.4):
                return answer
            wanted: list[Message] = []
            if ours and fault and does in ("fault", "mixed", "stubborn"):
                for i in range(rng.choice((1, 2, 50)) if habit == "stubborn" else rng.choice((1, 3))):
                    page = {"page_id": f"msg_{rng.randint(1, 2 * asked + 2):04d}"}
                    level = {"target_level": rng.randint(0, 3)} if rng.random() < 0.3 else {}
                    wanted.append(call(fault, {**page, **level}, f"vm_{asked}_{rounds}_{i}"))
            if ours and does in ("search", "stubborn"):
                query = {"query": " ".join(rng.choices(WORDS, k=3))}
                wanted.append(call("search_pages", query, f"vs_{asked}_{rounds}"))
            if LOOKUP in names and does in ("client", "mixed") and not last:
                for i in range(rng.choice((1, 2))):
                    arguments = {"word": rng.choice(WORDS)}
                    wanted.insert(0, call(LOOKUP, arguments, f"cl_{asked}_{rounds}_{i}"))
            text = text_of(rng, rng.choice((2, 30)), f"pre{asked}x") if rng.random() < 0.5 else None
            return calls(*wanted, text=text) if wanted else answer

        return model


def grown(player: Player, turns: int, words: int = 60, **extra: Any) -> list[Message]:
    """A plain conversation of so many answered turns."""
    messages: list[Message] = []
    for i in range(turns):
        rng = random.Random(i)
        messages.append({"role": "user", "content": text_of(rng, words, f"user{i}x")})
        answer = says(text_of(rng, words, f"answer{i}x"))
        player.ask(messages, script(answer), **extra)
        messages.append({"role": "assistant", "content": answer["content"]})
    return messages
