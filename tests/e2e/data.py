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
from datetime import datetime
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
    """A question about a conversation; `evidence` holds indexes into its messages. BEAM's have no
    `answer`."""

    text: str
    category: str
    evidence: tuple[int, ...]
    answer: str = ""


@dataclass
class Conversation:
    """OpenAI messages in order; tool transcripts have no questions, times and sessions."""

    id: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    times: list[datetime | None] = field(default_factory=list)  # of each message
    sessions: list[int] = field(default_factory=list)  # of each message; BEAM's are days

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
            when = datetime.strptime(source[f"session_{session}_date_time"], "%I:%M %p on %d %B, %Y")
            for turn in source[f"session_{session}"]:
                text = f"{turn['speaker']}: {turn['text']}"
                if turn.get("blip_caption"):
                    text += f" [shares image: {turn['blip_caption']}]"
                ids[turn["dia_id"]] = len(conv.messages)
                role = "user" if turn["speaker"] == source["speaker_a"] else "assistant"
                conv.messages.append({"role": role, "content": text})
                conv.times.append(when)
                conv.sessions.append(session)
        for q in d["qa"]:
            evidence = _dia_ids(q["evidence"], ids)
            if evidence:  # a few questions have no usable evidence id
                category = LOCOMO_CATEGORY[q["category"]]
                answer = str(q.get("answer", ""))
                conv.questions.append(Question(q["question"], category, evidence, answer))
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
    return _beam("beam", "100K")


@lru_cache(maxsize=2)
def load_beam_long(size: str) -> tuple[Conversation, ...]:
    """Three chats of about 500k tokens ("500K"), or two of about a million ("1M")."""
    return _beam("beam-long", size)


def _beam(folder: str, size: str) -> tuple[Conversation, ...]:
    out = []
    paths = (data_dir() / folder).glob(f"{size}_*.json")
    for path in sorted(paths, key=lambda p: int(p.stem.partition("_")[2])):
        d = json.loads(path.read_text())
        messages = [{"role": m["role"], "content": m["content"]} for m in d["messages"]]
        questions = [
            Question(q["question"], q["category"], tuple(q["evidence"]))
            for q in d["questions"]
            if q["evidence"]
        ]
        conv = Conversation(d["id"], messages, questions)
        for m in d["messages"]:
            when = _day(m.get("time")) or (conv.times[-1] if conv.times else None)
            another = bool(conv.times) and when != conv.times[-1]
            conv.sessions.append((conv.sessions[-1] if conv.sessions else 0) + another)
            conv.times.append(when)
        out.append(conv)
    return tuple(out)


def _day(text: str | None) -> datetime | None:
    try:
        return datetime.strptime(text, "%B-%d-%Y") if text else None
    except ValueError:  # some are written otherwise
        return None


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
