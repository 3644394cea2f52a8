"""Who speaks in the random histories: users, tools and models whose every text bears a mark.

Promises: what somebody says depends on seeds and, for models, on the request; two installations that
are asked the same hear the same.
"""

from __future__ import annotations

import json
import random
import re

from tests.conversation.player import Message, Model, call, calls, says
from tests.conversation.scenario import WORDS

HABITS = ("answer", "repeat", "fault", "search", "mixed", "client", "stubborn")
SIZES = ("short", "short", "short", "long", "wide")  # "wide" is larger than the window
_PAGE_ID = re.compile(r"(?:msg|img|aud)_\d{4}[_.\d]*\d|summary_seg_\d+|claim_\d+")
_STATEMENTS = (
    "We decided to use {} for the ledger. {}",
    "Actually, we decided to use {} instead for the ledger. {}",
    "From now on always answer in {}. {}",
    "I prefer {} for the lanterns. {}",
    "My name is {} and the deadline is 17 May. {}",
)


class Speakers:
    """`budget` is that of whole requests: texts are sized by it. `made` counts the marks."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.made = 0

    def mark(self) -> str:
        self.made += 1
        return f"Zq{self.made}z"

    def text(self, rng: random.Random, words: int) -> str:
        return " ".join([self.mark(), *rng.choices(WORDS, k=max(1, words))])

    def say(self, rng: random.Random, size: str) -> str:
        budget = self.budget
        share = {"short": rng.choice((0.01, 0.05)), "long": rng.choice((0.2, 0.5)), "wide": 1.6}[size]
        text = self.text(rng, int(budget * share / 1.6))
        if rng.random() < 0.5:
            text = rng.choice(_STATEMENTS).format(rng.choice(WORDS[:30]), self.mark()) + " " + text
        if rng.random() < 0.5:
            text += " what did we say about " + " ".join(rng.choices(WORDS, k=4)) + "?"
        return text

    def answerer(self, habit: str, seed: int, last: bool) -> Model:
        """A model that does the same in both installations; `last`: it calls no client's tool."""
        rng, budget = random.Random(seed), self.budget
        words = [self.text(rng, int(budget * rng.choice((0.01, 0.05, 0.3)) / 1.6)) for _ in range(9)]
        marks = [self.mark() for _ in range(9)]
        rounds = 0

        def model(request: Message) -> Message:
            nonlocal rounds
            rounds += 1
            own, number = random.Random(f"{seed} {rounds}"), min(rounds, 9) - 1
            answer = says("As before." if habit == "repeat" else words[number])
            names = [tool["function"]["name"] for tool in request.get("tools") or ()]
            fault = next((n for n in ("vm_page_fault", "page_fault") if n in names), None)
            ours = "search_pages" in names
            stubborn = habit == "stubborn" and ours
            forbidden = request.get("tool_choice") == "none" and not stubborn
            if forbidden or habit in ("answer", "repeat") or (not stubborn and own.random() < 0.35):
                return answer
            wanted: list[Message] = []
            if ours and fault and habit in ("fault", "mixed", "stubborn"):
                known = sorted(set(_PAGE_ID.findall(json.dumps(request["messages"]))))
                for i in range(own.choice((1, 2, 12) if stubborn else (1, 3))):
                    page = own.choice([*known, f"msg_{own.randint(1, 60):04d}", "claim_0099", "x"])
                    level = {"target_level": own.randint(0, 3)} if own.random() < 0.4 else {}
                    call_id = f"vm_{marks[number]}_{i}" if own.random() < 0.9 else "same"
                    wanted.append(call(fault, {"page_id": page, **level}, call_id))
            if ours and habit in ("search", "stubborn"):
                query = {"query": " ".join(own.choices(WORDS, k=3))}
                wanted.append(call("search_pages", query, f"vs_{marks[number]}"))
            if "lookup" in names and habit in ("client", "mixed") and not last:
                for i in range(own.choice((1, 2, 4))):
                    word = {"word": own.choice(WORDS), "why": marks[number]}
                    wanted.insert(0, call("lookup", word, f"cl_{marks[number]}_{i}"))
            text = words[number] if own.random() < 0.3 else None
            return calls(*wanted, text=text) if wanted else answer

        return model

    def results(self, rng: random.Random, wanted: list[Message]) -> list[Message]:
        """What the client's tools return: words, or a large JSON list."""
        out: list[Message] = []
        for one in wanted:
            size = int(self.budget * rng.choice((0.01, 0.1, 0.6)) / len(wanted))
            if rng.random() < 0.5:
                rows = [{"id": i, "name": rng.choice(WORDS), "mark": self.mark()} for i in range(size // 20 + 1)]
                content = json.dumps({"rows": rows, "total": len(rows)})
            else:
                content = self.text(rng, size // 2)
            out.append({"role": "tool", "tool_call_id": one["id"], "content": content})
        return out


def echo(message: Message, rng: random.Random) -> Message:
    """The answer as the client sends it back."""
    kept: Message = {"role": "assistant", "content": message.get("content") or ""}
    if message.get("tool_calls"):
        kept["tool_calls"] = [{k: v for k, v in c.items() if k != "index"} for c in message["tool_calls"]]
        if rng.random() < 0.5:
            kept["content"] = message.get("content")
    return kept
