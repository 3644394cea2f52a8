"""What stands in the window of a chat request, page by page, for the demo reader and for tests.

Promises: pure; `passages` lists native messages, `<VM:CONTEXT>` lines and the results of VM calls
with the JSON quoting undone; `full` is true only for text that is not shortened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

_BLOCK = re.compile(r"<VM:(?P<tag>[A-Z_]+)>(?P<body>.*?)</VM:(?P=tag)>", re.DOTALL)
_LINE = re.compile(r'^\s*(?P<kind>\w+)\s*\((?P<label>[^)]*)\)\s*:\s*(?P<text>".*")\s*$')
_REDUCED = re.compile(r"(?:\blevel|\blvl|\bl)\W*[1-9]|reduced|abstract|reference", re.IGNORECASE)
_MEMORY = re.compile(r"^\s*T \(memory\):\s*(?P<json>\{.*\})\s*$")
_PART = re.compile(r"^msg_(?P<number>\d+)(?:\.(?P<part>\d+))?$")


@dataclass(frozen=True)
class Passage:
    """One page as it stands in the window; `full` is False for a lead (a summary, a cut hint)."""

    page_id: str | None
    text: str
    role: str
    full: bool
    before: str = ""
    after: str = ""
    rank: int | None = None  # place among the results of a search, 0 for the best


def text_of(content: object) -> str:
    """The text of a message's content: a string, or the text parts joined by a newline."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [p for p in content if isinstance(p, dict)]
        return "\n".join(str(p["text"]) for p in parts if isinstance(p.get("text"), str))
    return ""


def _own_text(content: object) -> str:
    return _BLOCK.sub("", text_of(content)).strip()


def question_of(request: dict[str, Any]) -> str:
    """The newest user message's own text, without what the proxy put in front of it."""
    index = newest_user(messages_of(request))
    return "" if index is None else _own_text(messages_of(request)[index].get("content"))


def messages_of(request: dict[str, Any]) -> list[dict[str, Any]]:
    messages = request.get("messages")
    return [m for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []


def newest_user(messages: list[dict[str, Any]]) -> int | None:
    asked = [i for i, m in enumerate(messages) if m.get("role") == "user"]
    own = [i for i in asked if _own_text(messages[i].get("content"))]
    return own[-1] if own else asked[-1] if asked else None


def _context_passages(text: str) -> Iterator[Passage]:
    for block in _BLOCK.finditer(text):
        if block["tag"] != "CONTEXT":
            continue
        for line in block["body"].splitlines():
            if memory := _MEMORY.match(line):  # an earlier VM exchange, rendered without tools
                yield from _result_passages(_json_object(memory["json"]))
            found = _LINE.match(line)
            if found is None:
                continue
            page_id, _, rest = found["label"].partition(" ")
            try:
                quoted = json.loads(found["text"])
            except ValueError:
                continue  # a line that was cut in the middle is not a page
            page_id = page_id.rstrip(",;")
            full = not _REDUCED.search(rest)
            role = "user" if found["kind"].upper().startswith("U") else "assistant"
            yield Passage(page_id, str(quoted), role, full)


def vm_calls(messages: list[dict[str, Any]]) -> dict[str, tuple[str, dict[str, Any]]]:
    """tool_call_id -> (page_fault or search_pages, its arguments)."""
    calls: dict[str, tuple[str, dict[str, Any]]] = {}
    for message in messages:
        for call in message.get("tool_calls") or []:
            function = call.get("function") or {}
            kind = vm_kind(str(function.get("name", "")))
            if kind:
                calls[str(call.get("id"))] = (kind, _json_object(function.get("arguments")))
    return calls


def vm_kind(name: str) -> str | None:
    return next((k for k in ("page_fault", "search_pages") if name.endswith(k)), None)


def _json_object(text: object) -> dict[str, Any]:
    try:
        value = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _result_passages(result: dict[str, Any]) -> Iterator[Passage]:
    page = result.get("page")
    if isinstance(page, dict):
        content = page.get("content")
        text = content.get("text") if isinstance(content, dict) else content
        yield Passage(str(page.get("page_id")), str(text or ""), "user", not page.get("level"))
    for rank, hit in enumerate(result.get("results") or []):
        if isinstance(hit, dict):
            text, full = str(hit.get("hint") or ""), hit.get("complete") is True
            yield Passage(str(hit.get("page_id")), text, "user", full, rank=rank)


def passages(request: dict[str, Any]) -> list[Passage]:
    """Everything in the window but the newest user message's own text, oldest first."""
    messages = messages_of(request)
    calls, newest = vm_calls(messages), newest_user(messages)
    found: list[Passage] = []
    native: list[Passage] = []
    for i, message in enumerate(messages):
        role, text = str(message.get("role")), text_of(message.get("content"))
        if role == "tool" and str(message.get("tool_call_id")) in calls:
            found.extend(_result_passages(_json_object(text)))
            continue
        found.extend(_context_passages(text))
        own = _BLOCK.sub("", text).strip()
        if own and i != newest:
            native.append(Passage(None, own, role, True))
    return [*_with_paged_neighbours(found), *_with_neighbours(native)]


def _with_neighbours(native: list[Passage]) -> Iterator[Passage]:
    for i, p in enumerate(native):
        before = native[i - 1].text if i else ""
        after = native[i + 1].text if i + 1 < len(native) else ""
        yield replace(p, before=before, after=after)


def _with_paged_neighbours(found: list[Passage]) -> list[Passage]:
    best: dict[str, Passage] = {}
    for p in found:
        key = p.page_id or p.text
        known = best.get(key)
        if known is None or (p.full and not known.full):
            best[key] = p
        elif not known.full and known.rank is None and p.rank is not None:
            best[key] = replace(known, rank=p.rank)  # a reduced page that a search names again
    by_number: dict[int, str] = {}
    for p in best.values():
        if match := _PART.match(p.page_id or ""):
            number = int(match["number"])
            by_number[number] = f"{by_number.get(number, '')} {p.text}"
    linked = []
    for p in best.values():
        match = _PART.match(p.page_id or "")
        number = int(match["number"]) if match else -9
        before, after = by_number.get(number - 1, ""), by_number.get(number + 1, "")
        linked.append(replace(p, before=before, after=after))
    return linked


def seen_text(request: dict[str, Any]) -> list[str]:
    """All page texts that are in full in the request's window, decoded; parts also joined."""
    texts = [p.text for p in passages(request) if p.full]
    own = question_of(request)
    for message in messages_of(request):
        for call in message.get("tool_calls") or []:
            function = call.get("function") or {}
            if not vm_kind(str(function.get("name", ""))):
                texts.append(f"{function.get('name')} {function.get('arguments')}")
    parts: dict[int, dict[int, str]] = {}
    for p in passages(request):
        match = _PART.match(p.page_id or "")
        if match and match["part"] and p.full:
            parts.setdefault(int(match["number"]), {})[int(match["part"])] = p.text
    joined = ["".join(text for _, text in sorted(of.items())) for of in parts.values() if len(of) > 1]
    return [*texts, *joined, *([own] if own else [])]
