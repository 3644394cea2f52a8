"""The real conversations that the tests replay, and where they come from.

Promises: read only from the folder `LLM_PAGER_DATA` (default `../shared/data` beside the
repository), never copied; where it is absent the calling test is skipped with a reason. The mapping
of LoCoMo and BEAM to OpenAI messages is the one of `shared/bench/recall.py`.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[2]
LOCOMO_CATEGORY = {
    1: "multi-hop",
    2: "temporal",
    3: "open-domain",
    4: "single-hop",
    5: "adversarial",
}


@dataclass(frozen=True)
class Question:
    """A question about a conversation; `evidence` holds indexes into its messages."""

    text: str
    category: str
    evidence: tuple[int, ...]


@dataclass
class Conversation:
    """OpenAI messages in order; tool transcripts have no questions."""

    id: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)

    def turns(self) -> list[int]:
        """Indexes of the answers: an assistant message right after a user message."""
        roles = [m["role"] for m in self.messages]
        return [
            i
            for i in range(1, len(roles))
            if roles[i] == "assistant" and roles[i - 1] == "user"
        ]


def data_dir() -> Path:
    """The folder of the data sets; skips the calling test when it is not there."""
    path = Path(os.environ.get("LLM_PAGER_DATA", str(REPO.parent / "shared" / "data")))
    if not path.is_dir():
        pytest.skip(f"the data sets are not in {path} (set LLM_PAGER_DATA to their folder)")
    return path


@lru_cache(maxsize=1)
def load_locomo() -> tuple[Conversation, ...]:
    """Five two-person chats; speaker_a is the user; photo captions become text."""
    out = []
    for d in json.loads((data_dir() / "locomo" / "locomo-dev.json").read_text()):
        source, conv, ids = d["conversation"], Conversation(d["sample_id"]), {}
        sessions = (int(k.split("_")[1]) for k in source if re.fullmatch(r"session_\d+", k))
        for session in sorted(sessions):
            for turn in source[f"session_{session}"]:
                text = f"{turn['speaker']}: {turn['text']}"
                if turn.get("blip_caption"):
                    text += f" [shares image: {turn['blip_caption']}]"
                ids[turn["dia_id"]] = len(conv.messages)
                role = "user" if turn["speaker"] == source["speaker_a"] else "assistant"
                conv.messages.append({"role": role, "content": text})
        for q in d["qa"]:
            evidence = _dia_ids(q["evidence"], ids)
            if evidence:  # a few questions have no usable evidence id
                category = LOCOMO_CATEGORY[q["category"]]
                conv.questions.append(Question(q["question"], category, evidence))
        out.append(conv)
    return tuple(out)


def _dia_ids(evidence: list[str], ids: dict[str, int]) -> tuple[int, ...]:
    """Mends 'D8:6; D9:17', 'D:11:26' and 'D30:05'; drops ids that do not exist."""
    found: list[int] = []
    for item in evidence:
        for session, turn in re.findall(r"D:?(\d+):(\d+)", item):
            i = ids.get(f"D{int(session)}:{int(turn)}")
            if i is not None and i not in found:
                found.append(i)
    return tuple(found)


@lru_cache(maxsize=1)
def load_beam() -> tuple[Conversation, ...]:
    """Ten user/assistant chats of about 100k tokens each."""
    out = []
    for path in sorted((data_dir() / "beam").glob("*.json"), key=lambda p: int(p.stem[5:])):
        d = json.loads(path.read_text())
        messages = [{"role": m["role"], "content": m["content"]} for m in d["messages"]]
        questions = [
            Question(q["question"], q["category"], tuple(q["evidence"]))
            for q in d["questions"]
            if q["evidence"]
        ]
        out.append(Conversation(d["id"], messages, questions))
    return tuple(out)


@lru_cache(maxsize=1)
def load_trajectories() -> tuple[Conversation, ...]:
    """158 agent transcripts with tool calls, as their authors recorded them."""
    out = []
    for path in sorted((data_dir() / "trajectories").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            d = json.loads(line)
            out.append(Conversation(f"{path.stem}/{d['id']}", d["messages"]))
    return tuple(out)


def tools_of(conversation: Conversation) -> list[dict[str, Any]]:
    """A tools array that offers every function the transcript calls, sorted by name."""
    names = {
        call["function"]["name"]
        for message in conversation.messages
        for call in message.get("tool_calls") or ()
    }
    schema = {"type": "object", "properties": {}, "additionalProperties": True}
    return [
        {"type": "function", "function": {"name": n, "description": n, "parameters": schema}}
        for n in sorted(names)
    ]
