"""What any upstream would check of a request, and what a client may expect of a fault."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import msgspec

from proxy.memory.context import CONTEXT_CLOSE, CONTEXT_OPEN
from proxy.memory.message_text import message_text
from tests.bench.token_error import Published
from tests.conversation.player import Message, Played, count_tokens, tool_messages


def without_evidence(message: Message) -> Message:
    """A user's message without what was shown in front of its text, for its turn."""
    content = message.get("content")
    if isinstance(content, list):
        first = content[0] if content else {}
        shown = str(first.get("text")).startswith(CONTEXT_OPEN) and str(first.get("text")).endswith(CONTEXT_CLOSE)
        return {**message, "content": content[1:]} if shown else message
    if message.get("role") != "user" or not str(content).startswith(CONTEXT_OPEN):
        return message
    return {**message, "content": str(content).partition(f"{CONTEXT_CLOSE}\n\n")[2]}


def goes_on(before: bytes, after: bytes) -> bool:
    """The messages `after` begin with those `before`, byte for byte, but for evidence that was taken out."""
    old, new = (msgspec.json.decode(messages, type=list[msgspec.Raw]) for messages in (before, after))
    return len(old) <= len(new) and all(
        bytes(one) == bytes(other) or json.loads(bytes(other)) == without_evidence(json.loads(bytes(one)))
        for one, other in zip(old, new, strict=False)
    )


def upstream_tokens(request: Message) -> int:
    """A request's tokens by the published rules, media included."""
    model = str(request["model"])
    text = Published(model)
    media = Published("gpt-4o" if model == "gpt-4" else model)  # it takes none: nothing is published
    total, messages = 0, []
    for message in request["messages"]:
        content = message.get("content")
        if isinstance(content, list):
            total += sum(media.part(part) for part in content if part["type"] != "text")
            content = [part for part in content if part["type"] == "text"]
        messages.append({**message, "content": content})
    return total + count_tokens({**request, "messages": messages}, text)  # type: ignore[arg-type]


def check_media_messages(request: Message) -> None:
    """Only user messages carry media, and none stands between a call and its results (check_pairs)."""
    for message in request["messages"]:
        content = message.get("content")
        kinds = {part["type"] for part in content} if isinstance(content, list) else {"text"}
        assert kinds <= {"text"} or message["role"] == "user", message["role"]


def whole_text(message: Message, number: str) -> str:
    """All text of a message's pages, with the ids of its media where these stand."""
    content = message["content"] if isinstance(message["content"], list) else []
    kinds = {"image_url": "img", "input_audio": "aud"}
    media = [i for i, part in enumerate(content) if part["type"] in kinds]
    ids = {i: f"{kinds[content[i]['type']]}_{number}_{k}" for k, i in enumerate(media, 1)}
    return message_text(message, ids)


def check_full_pages(played: Played, spoken: list[Message]) -> None:
    """Invariant 4: a page that a fault gave at level 0 is the original, its media byte for byte."""
    for before, request in pairwise(played.requests):
        for result in tool_messages(request)[len(tool_messages(before)) :]:
            page = json.loads(result["content"]).get("page") if result["content"][:1] == "{" else None
            if not page or page["level"] or not page["page_id"].startswith(("msg_", "img_", "aud_")):
                continue
            place = re.findall(r"\d+", page["page_id"])
            message = spoken[int(place[0]) - 1]
            if page["page_id"].startswith("msg_"):
                whole, text = whole_text(message, place[0]), page["content"]["text"]
                assert text in whole or whole in text or message["role"] != "user"
            else:
                part = [p for p in message["content"] if p["type"] != "text"][int(place[1]) - 1]
                shown = [p for m in request["messages"] for p in m["content"] or () if p == part]
                assert shown, "an original medium did not come back"
