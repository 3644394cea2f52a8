"""Conversations that outgrow their window, with any of these servers behind the proxy."""

from __future__ import annotations

from typing import Any

from tests.e2e.providers import ProviderServer, Said, texts_of
from tests.e2e.script import Chat, filler

PAGED: dict[str, Any] = {
    "tiers": {"l0": {"tokens": 4000, "reserve_tokens": 1000}},
    "faults": {"max_per_turn": 64, "max_tokens_per_turn": 100_000, "max_rounds": 24},
    "prefetch": {"max_pages": 2, "max_tokens": 300},
    "manifest": {"max_tokens": 300},
}


async def outgrow(chat: Chat, server: ProviderServer, turns: int = 5) -> None:
    """Turns of about 700 tokens, every second one streamed; each has a mark on either side: u0q in
    the first message, a0q in the second, and so on."""
    answers = [f"Noted a{turn}q. {filler(f'a{turn}', 130)}" for turn in range(turns)]
    server.plan(*(Said(answer) for answer in answers))
    for turn, answer in enumerate(answers):
        got = await chat.say(f"Note u{turn}q. {filler(f'u{turn}', 130)}", "", stream=turn % 2 == 1)
        assert (got.text, got.finish) == (answer, "stop")


def said_in(value: Any, words: str) -> bool:
    """Some text of a request, wherever it stands, has these words."""
    return any(words in text for text in texts_of(value))
