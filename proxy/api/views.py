"""What was in a window and why: conversations, turns, pages and searches, read from the log. For /vm and the dashboard.

Promises: an answer holds what belongs to the one who asks (`Who`), and nothing else (invariant 6); a turn's request is what
upstream got, byte for byte, or says that it is not; every "why" is the log's, not a guess. Work is bounded: a list looks at
`_LISTED` conversations, a view at so many turns as it shows, and none of it runs on the event loop. Methods block; times are
Unix seconds; StorageError and LookupError are the store's.
"""

from __future__ import annotations

import base64
import difflib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, NamedTuple

import msgspec

from proxy import keys
from proxy.api.bill import conversation_bill
from proxy.api.memory import Memory, owner_named
from proxy.config import Config
from proxy.conversation.derived import NO_DERIVED
from proxy.conversation.effects import Search
from proxy.conversation.envelope import UpstreamRequest, request_of
from proxy.conversation.pages import PathPages
from proxy.conversation.pins import Pin, decode_pins, encode_pins, pins_key, with_pin
from proxy.conversation.records import (
    LastUse,
    Record,
    Title,
    conversation_key,
    conversation_name,
    epoch_begun,
    record_at,
    record_key,
    restore_table,
    restore_window,
)
from proxy.conversation.tree import NodeId, TenantKey
from proxy.conversation.window import KEPT, MIXED, NATIVE, SYSTEM, VM, Window
from proxy.errors import ApiError
from proxy.memory.compressor import hint
from proxy.memory.context import CONTEXT_CLOSE, CONTEXT_OPEN
from proxy.memory.ids import Hit, canonical_page_id, make_page_id, parse_page_id
from proxy.memory.models import (
    CompressionLevel,
    FaultReason,
    MutationType,
    PageMutation,
    PageTableEntry,
    PageType,
    PinKind,
    StorageTier,
)
from proxy.memory.passages import passage
from proxy.memory.planner import price, worth
from proxy.memory.table import PageTable
from proxy.model_limits import POLICIES
from proxy.storage.l2 import Damaged
from proxy.tokens import get_counter

_LISTED = 10_000  # conversations of one list or search, in the order of their keys
_PAGE = 50  # rows of a page, unless asked otherwise
_MOST = 200
_MAP_TURNS, _MAP_ROWS = 60, 400
_POINTS = 120  # of a timeline
_OUT_PAGES = 50  # that are told of a turn one by one, the newest
_LIFE_TURNS = 200  # that are looked through for what happened to a page
_HINT_WORDS = 16
_COMPARED = 1000  # messages that two requests differ in
_TIPS = 64
_SNIPPET_TOKENS = 64
_MOST_HITS = 50
_QUERY_CHARS = 1000
_UNKNOWN_MODEL = "gpt-4o"

_decode, _encode = msgspec.json.decode, msgspec.json.encode
_raw_messages = msgspec.json.Decoder(list[msgspec.Raw]).decode
_raw_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_L0 = StorageTier.L0


@dataclass(frozen=True, slots=True)
class Who:
    """Who asks: `prefix` is what the owners of all that they may see begin with; an operator's is empty."""

    prefix: bytes
    operator: bool = False
    by: str = "key"  # key | cookie | loopback

    @property
    def tenant(self) -> TenantKey:
        """Whose thread of the pool it takes."""
        return TenantKey(self.prefix or b"operator")

    def name(self, owner: bytes) -> str:
        """A conversation, as this one calls it: an operator by its whole owner."""
        return owner.hex() if self.operator else conversation_name(owner)

    def owner(self, name: str) -> bytes | None:
        """The owner that they mean; None for none of theirs."""
        if not self.operator:
            return owner_named(TenantKey(self.prefix), name)
        try:
            owner = bytes.fromhex(name)
        except ValueError:
            return None
        return owner if len(owner) == keys.OWNER_BYTES else None


def _missing(what: str, param: str) -> ApiError:
    return ApiError(404, f"There is no such {what} for these credentials.", param=param, code=f"{param}_not_found")


class Turns(NamedTuple):
    """A conversation on the path of one of its answers."""

    who: Who
    owner: bytes
    head: Record


class Views:
    """Reads for those who ask; one per process."""

    def __init__(self, config: Config, memory: Memory) -> None:
        self._config = config
        self._memory = memory
        self._policy = POLICIES[config.memory.eviction]

    # -- the list

    def conversations(self, who: Who, query: str = "", sort: str = "used", cursor: str = "", limit: int = _PAGE) -> dict[str, Any]:
        """Those of the asker, the last used first (or the first begun, or by title)."""
        store, limit, words = self._memory.store, max(1, min(limit, _MOST)), query.casefold().split()
        used = {keys.owner(k): v for k, v in self._rows(keys.CONVERSATION + who.prefix)}
        titles: dict[bytes, Title] = {}
        if words or sort != "used":  # else those that are shown are enough
            titles = {keys.owner(k): Title.decode(v) for k, v in self._rows(keys.TITLE + who.prefix)}
        found = [o for o in used if o in titles and all(w in titles[o].words.casefold() for w in words)] if words else [*used]
        if sort == "used":
            found.sort(key=lambda o: LastUse.order(used[o]), reverse=True)  # which leaves those of one second as they are
        elif sort == "began":
            found.sort(key=lambda o: titles[o].began_s if o in titles else 0, reverse=True)
        elif sort == "title":
            found.sort(key=lambda o: titles[o].words.casefold() if o in titles else "")
        else:
            raise ApiError(400, "sort must be used, began or title.", param="sort", code="invalid_value")
        start = _cursor(cursor)
        shown = {o: LastUse.decode(used[o]) for o in found[start : start + limit]}
        heads = [record_key(last.head) for last in shown.values() if self._memory.cache.get("record", last.head) is None]
        store.ahead([*heads, *(keys.TITLE + o for o in shown if o not in titles)], alone=True)
        rows = [self._row(who, o, last, titles.get(o) or self._title(o)) for o, last in shown.items()]
        more = start + limit < len(found)
        return {
            "conversations": rows, "total": len(found), "truncated": len(used) >= _LISTED,
            "next_cursor": base64.urlsafe_b64encode((start + limit).to_bytes(4, "big")).decode().rstrip("=") if more else None,
            "trouble": store.trouble,
        }  # fmt: skip

    def _title(self, owner: bytes) -> Title | None:
        with suppress(Damaged):
            if (stored := self._memory.store.get(keys.TITLE + owner)) is not None:
                return Title.decode(stored)
        return None

    def _rows(self, prefix: bytes) -> list[tuple[bytes, bytes]]:
        return self._memory.store.scan(prefix, limit=_LISTED)

    def version(self, who: Who, owner: bytes | None = None) -> bytes:
        """Another value whenever a turn was answered in the conversation, or in any of the asker's."""
        if owner is not None:
            return (self._memory.store.get(conversation_key(owner)) or b"") + (self._memory.store.get(pins_key(owner)) or b"")
        return sha256(b"".join([v for _, v in self._rows(keys.CONVERSATION + who.prefix)])).digest()

    def _row(self, who: Who, owner: bytes, last: LastUse, title: Title | None) -> dict[str, Any]:
        head = self._memory.get_record(last.head)
        row: dict[str, Any] = {"conversation": who.name(owner), "used_s": last.used_s, "damaged": False}
        if head is None:
            return {**row, "title": title.words if title else "", "damaged": True}
        if title is None:
            title = Title.of(self._memory.load_path(head)[0], 0)
        return {**row, "title": title.words, "began_s": title.began_s or None, **_summary(head)}

    # -- one conversation

    def turns(self, who: Who, name: str, branch: str = "") -> Turns:
        """The conversation of that name, on the path of its last answer, or of a branch's."""
        owner = who.owner(name)
        stored = self._memory.store.get(conversation_key(owner)) if owner is not None else None
        if owner is None or stored is None:
            raise _missing("conversation", "conversation")
        node_id = LastUse.decode(stored).head
        if branch:
            try:
                node_id = NodeId(owner + bytes.fromhex(branch))
            except ValueError:
                raise _missing("branch", "branch") from None
        head = self._memory.get_record(node_id)
        if head is None:
            raise _missing("branch", "branch") if branch else LookupError("a conversation's last answer is missing from storage")
        return Turns(who, owner, head)

    def conversation(self, at: Turns, before: int = 0, limit: int = _PAGE) -> dict[str, Any]:
        """The conversation, its branches, and a page of its turns, the newest first, before the turn `before`."""
        path = self._memory.load_path(at.head)
        title = Title.of(path[0], path[0].seen_s)
        last = self._at(at, min(at.head.turn, before - 1) if before else at.head.turn)
        records = self._back(last, max(1, min(limit, _MOST)))
        first = records[0].turn
        table = self._table(at.head)
        stats = table.get_stats()
        return {
            "conversation": at.who.name(at.owner), "title": title.words, "began_s": title.began_s or None,
            "used_s": at.head.answered_s or at.head.seen_s, **_summary(at.head),
            "pages": stats.total_pages or None,
            "window_pages": stats.pages_by_tier.get(_L0, 0) if stats.total_pages else None,
            "branches": self._branches(at),
            "turn_rows": [self._turn_row(one) for one in reversed(records)],
            "next_before": first if first > 1 else None,
            "pinned": [pin.page_id for pin in self._pins(at.owner) if pin.pinned],
        }  # fmt: skip

    def _table(self, record: Record) -> PageTable:
        return restore_table(record, self._memory.get_record, self._memory.get_block) if record.window else PageTable()

    def _at(self, at: Turns, turn: int) -> Record:
        if not 1 <= turn <= at.head.turn:
            raise ApiError(400, f"turn must be a whole number from 1 to {at.head.turn}.", param="turn", code="invalid_turn")
        return record_at(at.head, turn, self._memory.get_record, self._memory.get_block)

    def _back(self, record: Record, count: int) -> list[Record]:
        """So many records up to this one, in the order of the path."""
        records = [record]
        while len(records) < count and records[-1].parent:
            above = self._memory.get_record(records[-1].parent)
            if above is None:
                raise LookupError("a record that others continue is missing from storage")
            records.append(above)
        return records[::-1]

    def _branches(self, at: Turns) -> list[dict[str, Any]]:
        """The ends of all branches, and where each leaves the path of this one."""
        tips = [LastUse.decode(v) for _, v in self._memory.store.scan(keys.TIP + at.owner, limit=_TIPS)]
        path = self._memory.load_path(at.head)
        current = self._memory.store.get(conversation_key(at.owner))
        heads = {tip.head: tip for tip in tips}
        if current is not None:
            heads.setdefault(LastUse.decode(current).head, LastUse.decode(current))
        out = [_branch(at.head, at.head.answered_s, at.head.end, True)]
        for tip in heads.values():
            record = self._memory.get_record(tip.head)
            if record is None or (record.end <= at.head.end and path[record.end - 1].id == record.id):
                continue  # it went on after all
            other = self._memory.load_path(record)
            shared = bisect_left(range(min(record.end, at.head.end)), True, key=lambda i: other[i].id != path[i].id)
            out.append(_branch(record, tip.used_s, shared, False))
        return out

    def _turn_row(self, record: Record) -> dict[str, Any]:
        above = self._memory.get_record(record.parent) if record.parent else None
        ours, before = record.account, above.account if above is not None else None
        return {
            "turn": record.turn, "message": make_page_id(record.end - 1), "answered_s": record.answered_s or record.seen_s or None,
            "paged": bool(record.window), "delivered": record.sent is not None, "epoch_begun": epoch_begun(record),
            **_tokens(record), "billed": _billed(ours, before), **_counts(record.log),
            "cache_break": ours.broke.reason.value if ours is not None and ours.broke is not None else None,
        }  # fmt: skip

    def timeline(self, at: Turns) -> list[dict[str, Any]]:
        """Tokens of the window against those of the whole history, at no more than `_POINTS` turns."""
        last = at.head.turn
        step = max(1, -(-last // _POINTS))
        wanted = sorted({*range(1, last + 1, step), last})
        records = self._back(at.head, last) if step == 1 else [self._at(at, turn) for turn in wanted]
        return [{"turn": one.turn, **_tokens(one)} for one in records]

    # -- the memory map

    def map(self, at: Turns, first: int = 0, last: int = 0) -> dict[str, Any]:
        """Which pages were in the window of which turns, and how they came and went. `first`, `last`: turns; by default the
        newest, and never more than `_MAP_TURNS`."""
        last = min(last or at.head.turn, at.head.turn)
        first = max(1, first or last - _MAP_TURNS + 1, last - _MAP_TURNS + 1)
        records = self._back(self._at(at, last), last - first + 1)
        before = self._memory.get_record(records[0].parent) if records[0].parent else None
        came = before if before is not None and before.window else None  # the newest that paged
        how, pinned = self._standing(came) if came is not None else ({}, set())
        rows, turns, whole = _Rows(), list[dict[str, Any]](), dict[str, str]()
        for record in records:
            mutations = record.log
            if not record.window:
                new = {make_page_id(position): "native" for position in range(len(whole), record.end - 1)}
                whole |= new
                rows.turn(record.turn, whole, new if rows.last is whole else None)
            elif record.base and (came is None or record.base != came.id):
                how, pinned = self._standing(record)
                rows.turn(record.turn, how)
                came = record
            else:
                how, pinned = (how, pinned) if record.base else ({}, set())
                for mutation in mutations:
                    _follow(how, pinned, mutation)
                rows.turn(record.turn, how, {m.page_id for m in mutations} if record.base and rows.last is how else None)
                came = record
            turns.append({"turn": record.turn, "epoch_begun": epoch_begun(record), **_tokens(record), **_counts(mutations)})
        runs = rows.closed()
        shown = sorted(runs, key=lambda i: (parse_page_id(i) or (1 << 40, 0), i))
        left_out, shown = max(0, len(shown) - _MAP_ROWS), shown[-_MAP_ROWS:]
        path, ends, pages = self._memory.load_path(at.head), [record.end - 1 for record in records], []
        for page_id in shown:
            position, since = (parse_page_id(page_id) or (-1, 0))[0], runs[page_id][0][0]
            role = path[position].role if 0 <= position < len(path) else "derived"
            if 0 <= position < ends[-1]:
                since = min(since, records[bisect_right(ends, position)].turn)
            pages.append({"page": page_id, "role": role, "pinned": page_id in pinned and page_id in how, "since": since,
                          "runs": runs[page_id]})  # fmt: skip
        return {"first": first, "last": last, "turns": turns, "pages": pages, "left_out": left_out}

    def _standing(self, record: Record) -> tuple[dict[str, str], set[str]]:
        """How each page of the window stands in it after a record, and those that are pinned."""
        table = self._table(record)
        return _places(table, self._window(record)), {entry.page_id for entry in table.resident() if entry.pinned}

    def _window(self, record: Record) -> Window | None:
        """After a record's turn; kept for the page that is looked at next."""
        memory = self._memory
        window: Window | None = memory.cache.get("window", record.id)
        if window is None and (window := restore_window(record, memory.get_record, memory.get_block)) is not None:
            memory.keep_window(record, window)
        return window

    # -- a turn

    def turn(self, at: Turns, number: int) -> dict[str, Any]:
        """What upstream was sent, marked; what is the same as in the turn before; why pages were in it or not."""
        record = self._at(at, number)
        above = self._memory.get_record(record.parent) if record.parent else None
        sent, before = self._sent(record), self._sent(above) if above is not None else None
        messages = self.messages(sent, before)
        shared = _shared(before.body, sent.body) if before is not None and sent is not None else 0
        return {
            "conversation": at.who.name(at.owner), "last_turn": at.head.turn, **self._turn_row(record),
            "request": None if sent is None else {
                "text": sent.body.decode("utf-8", "replace"), "bytes": len(sent.body), "exact": sent.exact,
                "sha256": sha256(sent.body).hexdigest(), "shared_bytes": shared,
                "untouched": sent.envelope.first >= 0,
            },
            "messages": messages,
            **self._pages(record, sent),
            "answer": _text(_decode(self._memory.load_path(record)[record.end - 1].raw)),
        }  # fmt: skip

    def request(self, at: Turns, number: int) -> UpstreamRequest:
        """The exact upstream request of a turn. ApiError 404 where it is not stored."""
        sent = self._sent(self._at(at, number))
        if sent is None:
            raise ApiError(404, "The request of this turn is not stored: its answer came in a later request, was given by an"
                           " earlier version, or its client changes all of its history each time.",
                           param="turn", code="request_not_stored")  # fmt: skip
        return sent

    def _sent(self, record: Record) -> UpstreamRequest | None:
        return request_of(record, self._memory.get_record, self._memory.get_block, self._window)

    def messages(self, sent: UpstreamRequest | None, before: UpstreamRequest | None) -> list[dict[str, Any]]:
        """The request's messages, in order: which of it is the client's, and which was added and as what."""
        if sent is None:
            return []
        raws = _raws(sent.body)
        same = _same(_raws(before.body) if before is not None else [], raws)
        entries = list(sent.window.entries) if sent.window is not None else []
        by_raw = {entry.raw: entry for entry in reversed(entries)}
        position = sent.envelope.first
        out: list[dict[str, Any]] = []
        for index, raw in enumerate(raws):
            message = _decode(raw)
            spans = _spans(message, sent.window)
            entry = by_raw.get(raw)
            kind, page = "client", None
            if sent.window is None:
                if message.get("role") not in ("system", "developer"):
                    page, position = make_page_id(position), position + 1
            elif entry is not None:
                kind = {VM: "vm", MIXED: "vm", KEPT: "kept"}.get(entry.kind, "client")
                page = make_page_id(entry.position) if entry.position >= 0 and entry.kind != SYSTEM else None
                if entry.shown_tokens:
                    kind = "evidence"
            if kind == "client" and any(added for _, added in spans):
                kind = "memory"
            elif kind in ("vm", "kept"):
                spans = [(text, True) for text, _ in spans]
            out.append({
                "index": index, "role": message.get("role"), "page": page, "kind": kind, "cached": index < same,
                "bytes": len(raw), "tokens": entry.tokens if entry is not None else None,
                "evidence": list(entry.shown) if entry is not None else [],
                "spans": [{"text": text, "added": added} for text, added in spans],
            })  # fmt: skip
        return out

    def _pages(self, record: Record, sent: UpstreamRequest | None) -> dict[str, Any]:
        """The pages in and out of the window of a turn, and why."""
        if not record.window:
            return {"pages_in": [], "pages_out": [], "out": 0, "in": record.end - 1}
        table = self._table(record)
        pages = self._path_pages(record)
        facts = self._facts(record, table, sent.window if sent is not None else None)
        resident = table.resident()
        outside: list[PageTableEntry] = []
        position = record.end - 1
        while position > 0 and len(outside) < _OUT_PAGES:
            position -= 1
            for page_id in self._ids(pages, table, position):
                entry = table.lookup(page_id)
                if entry is not None and entry.tier is not _L0:
                    outside.append(entry)
        return {
            "pages_in": [self._told(e, facts, pages) for e in resident],
            "pages_out": [self._told(e, facts, pages) for e in outside],
            "in": len(resident), "out": len(table) - len(resident),
        }  # fmt: skip

    def _ids(self, pages: PathPages, table: PageTable, position: int) -> Sequence[str]:
        page_id = make_page_id(position)
        return [page_id] if table.lookup(page_id) is not None else pages[position].ids

    def _facts(self, record: Record, table: PageTable, window: Window | None = None) -> _Facts:
        window = window or self._window(record)
        used = {m.page_id for m in record.log if m.op is MutationType.ACCESS}
        return _Facts(record.turn, window, _places(table, window), used)

    def _told(self, entry: PageTableEntry, facts: _Facts, pages: PathPages) -> dict[str, Any]:
        score = self._policy.score(entry, facts.turn)
        cost = price(entry.size_tokens, entry.modality, CompressionLevel.FULL)
        value = score * worth(entry.size_tokens, entry.modality, CompressionLevel.FULL) / max(1, cost)
        place = facts.how.get(entry.page_id, "out")
        try:
            words = hint(pages.bare(entry.page_id), _HINT_WORDS)
        except (LookupError, IndexError):
            words = ""
        return {
            "page": entry.page_id, "role": pages.role(entry.page_id) or entry.page_type.value, "hint": words,
            "place": place, "level": int(entry.level), "tier": entry.tier.value,
            "tokens": entry.size_tokens, "window_tokens": entry.l0_tokens,
            "pinned": entry.pinned, "value_per_token": None if score == float("inf") else round(value, 4),
            "created_turn": entry.created_turn, "evicted_turn": entry.evicted_turn, "faulted_turn": entry.faulted_turn,
            "faults": entry.fault_count, "why": _why(entry, facts, place),
        }  # fmt: skip

    def diff(self, at: Turns, number: int, other: int) -> dict[str, Any]:
        """What of the messages of turn `other` is not in those of turn `number`, and what is new."""
        one, two = self.request(at, number), self.request(at, other)
        a, b = _raws(one.body), _raws(two.body)
        changes: list[dict[str, Any]] = []
        for tag, i, j, k, m in _opcodes(a, b):
            if tag == "equal" and i == j:
                continue
            if tag == "equal":
                changes.append({"op": "same", "messages": j - i, "bytes": sum(map(len, a[i:j]))})
                continue
            changes += [{"op": "removed", **_shown(raw)} for raw in a[i:j]]
            changes += [{"op": "added", **_shown(raw)} for raw in b[k:m]]
        fields, others = _raw_fields(one.body), _raw_fields(two.body)
        names = sorted({*fields, *others} - {"messages"})
        return {
            "turn": number, "other": other, "shared_bytes": _shared(one.body, two.body), "changes": changes,
            "fields_changed": [n for n in names if fields.get(n) != others.get(n)],
        }  # fmt: skip

    # -- pages

    def _path_pages(self, record: Record) -> PathPages:
        model = record.bill.model if record.bill is not None else _UNKNOWN_MODEL
        counter = get_counter(model, self._config.model_override(model).tokenizer)
        derived = self._memory.derived_after(record) if record.window else NO_DERIVED
        path = self._memory.load_path(record)
        return PathPages(path, counter, self._config.pages.max_tokens, derived, self._memory.get_record)

    def explain(self, at: Turns, page: str, number: int = 0) -> dict[str, Any]:
        """Why a page was in the window of a turn, or was not: the log's answer, with its facts."""
        record = self._at(at, number or at.head.turn)
        pages, table = self._path_pages(record), self._table(record)
        page_id = canonical_page_id(page)
        ids = pages.expand(page_id)
        if not ids:
            later = parse_page_id(page_id)
            if later is not None and later[0] < at.head.end:
                sentence = f"{page_id} was said after turn {record.turn}, so it could not be in its window."
                return {"page": page_id, "turn": record.turn, "in_window": False, "why": sentence, "parts": []}
            raise _missing("page", "page")
        if not record.window:
            sentence = f"Turn {record.turn} sent all of the conversation as it was, so {page_id} was in it whole."
            return {"page": page_id, "turn": record.turn, "in_window": True, "why": sentence, "parts": []}
        facts = self._facts(record, table)
        told = [self._told(entry, facts, pages) for i in ids if (entry := table.lookup(i)) is not None]
        if not told:
            raise _missing("page", "page")
        inside = [one for one in told if one["place"] != "out"]
        first = (inside or told)[0]
        why = first["why"] if len(told) == 1 else f"{len(inside)} of its {len(told)} parts were in the window; {first['why']}"
        return {"page": page_id, "turn": record.turn, "in_window": bool(inside), "why": why, "parts": told}

    def page(self, at: Turns, page: str) -> dict[str, Any]:
        """A page's text, where it is, what it rests on, and what happened to it."""
        pages, page_id = self._path_pages(at.head), canonical_page_id(page)
        ids = pages.expand(page_id)
        if not ids:
            raise _missing("page", "page")
        table = self._table(at.head)
        facts = self._facts(at.head, table) if at.head.window else None
        parts = []
        for i in ids:
            entry = table.lookup(i)
            told = self._told(entry, facts, pages) if entry is not None and facts is not None else {"page": i, "place": "native"}
            parts.append({**told, "text": pages.text(i)})
        graph, position = pages.derived.provenance, pages.position(page_id)
        wanted = next((pin.pinned for pin in reversed(self._pins(at.owner)) if pin.page_id == page_id), None)
        return {
            "conversation": at.who.name(at.owner), "page": page_id, "role": pages.role(page_id) or "derived",
            "seen_s": pages.path[position].seen_s or None if position >= 0 else None, "parts": parts,
            "derives_from": graph.derives_from(page_id), "derived": graph.derived(page_id),
            "superseded_by": pages.derived.superseded.get(page_id), "pin_wanted": wanted,
            "life": self._life(at.head, {*ids}),
        }  # fmt: skip

    def _life(self, head: Record, ids: set[str]) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        record: Record | None = head
        for _ in range(_LIFE_TURNS):
            if record is None:
                break
            for m in reversed(record.log):
                if m.page_id in ids:
                    events.append({"turn": m.turn, "page": m.page_id, "actor": m.actor.value, "event": _event(m)})
            record = self._memory.get_record(record.base) if record.base else None
        return events[::-1]

    # -- pins

    def _pins(self, owner: bytes) -> list[Pin]:
        return decode_pins(self._memory.store.get(pins_key(owner)))

    def pin(self, at: Turns, page: str, pinned: bool, now_s: int) -> tuple[bytes, bytes]:
        """What is to be stored so that the page is pinned, or not, from the next turn on."""
        page_id, path = canonical_page_id(page), self._memory.load_path(at.head)
        place = parse_page_id(page_id)
        if place is None or place[0] >= len(path):
            raise ApiError(404, "Only a page of a message can be pinned, and there is none of that name.", param="page",
                           code="page_not_found")  # fmt: skip
        pins = self._pins(at.owner)
        for i in self._path_pages(at.head).expand(page_id):
            pins = with_pin(pins, Pin(i, path[place[0]].id, pinned, now_s))
        return pins_key(at.owner), encode_pins(pins)

    def bill(self, at: Turns) -> dict[str, Any]:
        return conversation_bill(at.head, self._memory.get_record)

    def search(self, at: Turns, query: str, limit: int) -> tuple[PathPages, Search]:
        """What `Memory.search` is to be asked for the pages that a query is about; `hits_told` says what it found."""
        pages = self._path_pages(at.head)
        return pages, Search([query[:_QUERY_CHARS]], max(1, min(limit, _MOST_HITS)), len(pages.path), lambda position, part: False)


def hits_told(hits: Iterable[Hit], pages: PathPages, query: str) -> list[dict[str, Any]]:
    """Each page once, the best first, with the words around what the query is about."""
    found: dict[str, dict[str, Any]] = {}
    for hit in hits:
        page_id = pages.id_of(hit.position, hit.part)
        words = passage(pages.text(page_id), [query], _SNIPPET_TOKENS, pages.counter.text)
        found.setdefault(page_id, {"page": page_id, "role": pages.role(page_id), "score": round(hit.score, 3), "hint": words})
    return list(found.values())


@dataclass(frozen=True, slots=True)
class _Facts:
    """Of a turn: its window, how each page is in it, and those that its answer used."""

    turn: int
    window: Window | None
    how: Mapping[str, str]
    used: set[str] = field(default_factory=set)


# -- a record in numbers


def _summary(head: Record) -> dict[str, Any]:
    account = head.account
    ours, sliding, full = account.billed if account is not None else (0, 0, 0)
    return {
        "turns": head.turn, "messages": head.end, "paged": bool(head.window or head.unkept),
        "model": head.bill.model if head.bill is not None else None, **_tokens(head),
        "billed_tokens": ours, "sliding_window_tokens": sliding, "full_history_tokens": full,
    }  # fmt: skip


def _tokens(record: Record) -> dict[str, Any]:
    """Of the last request, and of all that had been said by then; null where that is not known."""
    sizes = record.account.sizes if record.account is not None else None
    window = record.bill.counted if record.bill is not None and record.sent is not None else 0
    history = sizes.messages + sizes.anchors if sizes is not None else window
    return {"window_tokens": window or None, "history_tokens": history or None}


def _counts(mutations: Iterable[PageMutation]) -> dict[str, int]:
    out = {"evidence": 0, "evidence_used": 0, "faults": 0, "evicted": 0}
    for m in mutations:
        if m.op is MutationType.FAULT_IN:
            out["faults"] += 1
        elif m.op is MutationType.EVICT:
            out["evicted"] += 1
        elif m.op is MutationType.ACCESS:
            out["evidence_used"] += 1
        elif m.op is MutationType.MAP and m.reason is FaultReason.SPECULATIVE:
            out["evidence"] += 1
        elif m.op is MutationType.MAP and m.reason is not None:
            out["faults"] += 1
    return out


def _billed(account: Any, before: Any) -> dict[str, int] | None:
    """A turn's own prompt, by the difference to the turn before."""
    if account is None:
        return None
    now, then = (_sums(one) for one in (account, before))
    told = {name: now[name] - then[name] for name in now}
    return told if told["prompt_tokens"] > 0 else None


def _sums(account: Any) -> dict[str, int]:
    sums = account.sums if account is not None else ()
    ours, sliding, full = account.billed if account is not None else (0, 0, 0)
    return {
        "prompt_tokens": sum(one.ours.prompt for one in sums), "cached_tokens": sum(one.ours.cached for one in sums),
        "completion_tokens": sum(one.ours.completion for one in sums), "full_price_tokens": ours,
        "sliding_window_tokens": sliding, "full_history_tokens": full,
    }  # fmt: skip


def _branch(record: Record, left_s: int, shared: int, current: bool) -> dict[str, Any]:
    return {
        "branch": record.id[keys.OWNER_BYTES :].hex(), "turns": record.turn, "messages": record.end, "shared_messages": shared,
        "used_s": left_s or None, "current": current,
    }  # fmt: skip


# -- why


def _places(table: PageTable, window: Window | None) -> dict[str, str]:
    """How each page of a window is in it."""
    entries = window.entries if window is not None else ()
    shown = {i for entry in entries for i in entry.shown}
    native = {entry.position for entry in entries if entry.kind in (NATIVE, MIXED)}
    return {entry.page_id: _place(entry, native, shown) for entry in table.resident()}


def _place(entry: PageTableEntry, native: set[int], shown: set[str]) -> str:
    if entry.page_id in shown:
        return "evidence"
    if entry.position in native and not entry.level:
        return "native"
    if entry.faulted_turn is not None and (entry.evicted_turn or 0) <= entry.faulted_turn:
        return "fault"
    return f"kept{int(entry.level)}"


def _follow(how: dict[str, str], pinned: set[str], m: PageMutation) -> None:
    """Where a page is after a mutation, as the page table has it."""
    was = how.get(m.page_id)
    if m.op is MutationType.EVICT:
        how.pop(m.page_id, None)
    elif m.op is MutationType.CREATE:
        if m.tier is _L0:
            how[m.page_id] = "native" if parse_page_id(m.page_id) is not None else "kept0"
    elif m.op is MutationType.FAULT_IN or (m.op is MutationType.MAP and m.reason not in (None, FaultReason.SPECULATIVE)):
        how[m.page_id] = "fault"
    elif m.op is MutationType.MAP:
        kept = f"kept{int(m.level)}" if m.level is not None else was if was is not None and was.startswith("kept") else "kept0"
        how[m.page_id] = "evidence" if m.reason is FaultReason.SPECULATIVE else kept
    elif m.op is MutationType.COMPRESS and was is not None:
        how[m.page_id] = f"kept{int(m.level)}" if m.level else "native"
    elif m.op is MutationType.PIN:
        pinned.add(m.page_id)
    elif m.op is MutationType.UNPIN:
        pinned.discard(m.page_id)


class _Rows:
    """Of each page the runs of turns in which it was in the window in one way: [first, last, place]. What does not change in
    a turn costs it nothing."""

    def __init__(self) -> None:
        self._runs: dict[str, list[list[Any]]] = {}
        self._open: dict[str, list[Any]] = {}
        self._turn = 0
        self.last: Mapping[str, str] | None = None  # what stood in the turn before

    def turn(self, turn: int, how: Mapping[str, str], changed: Iterable[str] | None = None) -> None:
        """The turn's window; `changed`: the pages that may stand otherwise than in the turn before (None: all)."""
        if turn > self._turn + 1:  # turns without a record are between
            self._close()
        for page_id in [*how, *self._open] if changed is None or self.last is None else changed:
            run, place = self._open.get(page_id), how.get(page_id)
            if run is not None and run[2] != place:
                run[1] = self._turn
                del self._open[page_id]
                run = None
            if run is None and place is not None:
                self._open[page_id] = run = [turn, turn, place]
                self._runs.setdefault(page_id, []).append(run)
        self._turn, self.last = turn, how

    def _close(self) -> None:
        for run in self._open.values():
            run[1] = self._turn
        self._open.clear()
        self.last = None

    def closed(self) -> dict[str, list[list[Any]]]:
        """All of them, up to the last turn."""
        self._close()
        return self._runs


def _why(entry: PageTableEntry, facts: _Facts, place: str) -> str:
    page, turn, window = entry.page_id, facts.turn, facts.window
    epoch = f"epoch {window.epoch}, which began in turn {window.began}" if window is not None else "the epoch"
    pinned = " It is pinned." if entry.pin_kind is PinKind.EXPLICIT else " It says something for all later answers." if entry.pinned else ""
    if place == "native":
        since = f"it came in turn {entry.created_turn}" if entry.created_turn > (window.began if window else 0) else f"{epoch}, kept it"
        return f"{page} stood in the window as it was said: {since}.{pinned}"
    if place == "evidence":
        used = " The answer took something from it." if page in facts.used else ""
        return f"{page} was shown unasked, because the newest message was about it.{used}{pinned}"
    if place == "fault":
        again = f", {entry.fault_count} times so far" if entry.fault_count > 1 else ""
        return f"{page} was in the window because the model asked for it in turn {entry.faulted_turn or entry.last_turn}{again}.{pinned}"
    if place.startswith("kept"):
        level = "word for word" if not entry.level else f"at level {int(entry.level)}"
        cause = "it is pinned" if entry.pinned else "it derives from messages" if entry.position < 0 else (
            "it is a medium" if entry.page_type is PageType.ARTIFACT else "of its value for its tokens")  # fmt: skip
        return f"{page} was kept {level} as a line of <VM:CONTEXT>, because {cause}."
    if entry.evicted_turn is None:
        return f"{page} was never in the window: there was too much behind it when it was first seen, and nothing asked for it since."
    gone = entry.evicted_turn
    asked = f" The model last asked for it in turn {entry.faulted_turn}." if entry.faulted_turn else ""
    if window is not None and gone == window.began:
        return (f"{page} left the window in turn {gone}, when epoch {window.epoch} began: what is newer, or worth more for its tokens,"
                f" stayed; neither a message nor the model asked for it since.{asked}")  # fmt: skip
    ago = turn - gone
    return f"{page} has been out of the window since turn {gone}, {ago} turn{'s' * (ago != 1)} before; in turn {turn} neither the message nor the model asked for it.{asked}"


def _event(m: PageMutation) -> str:
    level = f" at level {int(m.level)}" if m.level else ""
    if m.op is MutationType.CREATE:
        return "a page from here on, in the window" if m.tier is _L0 else "a page from here on, outside the window"
    if m.op is MutationType.MAP:
        return f"shown as evidence{level}" if m.reason is FaultReason.SPECULATIVE else (
            f"brought by a search{level}" if m.reason is not None else f"kept in the window{level}")  # fmt: skip
    names = {
        MutationType.FAULT_IN: "asked for by the model", MutationType.EVICT: "left the window", MutationType.COMPRESS: "shown shorter",
        MutationType.PIN: "pinned", MutationType.UNPIN: "unpinned", MutationType.ACCESS: "used by the answer",
        MutationType.UPDATE: "said otherwise",
    }  # fmt: skip
    return f"{names[m.op]}{level}"


# -- requests


def _raws(body: bytes) -> list[bytes]:
    return [bytes(raw) for raw in _raw_messages(_raw_fields(body)["messages"])]


def _same(a: Sequence[bytes], b: Sequence[bytes]) -> int:
    """How many they begin with."""
    shortest = min(len(a), len(b))
    return next((at for at in range(shortest) if a[at] != b[at]), shortest)


def _shared(a: bytes, b: bytes) -> int:
    """How many bytes two requests have in common from the beginning of their messages on."""
    a, b = (bytes(_raw_fields(one)["messages"]) for one in (a, b))
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a.startswith(b[low:middle], low) else (low, middle - 1)
    return low


def _text(message: Mapping[str, Any]) -> str:
    """All that a message says, for people: its text, its media by their kind, its calls as JSON."""
    content, out = message.get("content"), list[str]()
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            out.append(part)
        elif isinstance(part, dict):
            text = part.get("text")
            out.append(text if isinstance(text, str) else f"[{part.get('type')}]")
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            out.append(_encode(message[name]).decode())
    return "\n".join(out)


def _spans(message: Mapping[str, Any], window: Window | None) -> list[tuple[str, bool]]:
    """A message's text, cut where something of ours begins or ends: (text, added)."""
    text = _text(message)
    if window is None:
        return [(text, False)]
    if window.developer and (at := text.find(window.developer)) >= 0:
        end = at + len(window.developer)
        return [(t, added) for t, added in ((text[:at], False), (text[at:end], True), (text[end:], False)) if t]
    if message.get("role") in ("system", "developer") and "<VM:RULES>" in text:  # its citations were taken out
        at = text.index("<VM:RULES>")
        return [(t, added) for t, added in ((text[:at], False), (text[at:], True)) if t]
    if text.startswith(CONTEXT_OPEN) and (end := text.find(CONTEXT_CLOSE)) >= 0:
        end += len(CONTEXT_CLOSE)
        return [(t, added) for t, added in ((text[:end], True), (text[end:], False)) if t]
    return [(text, False)]


def _opcodes(a: Sequence[bytes], b: Sequence[bytes]) -> Iterator[tuple[str, int, int, int, int]]:
    """As difflib's, whose time grows with the square of what is alike: for what two windows do not begin and end with, and
    no more than so much of it."""
    head = _same(a, b)
    tail = _same(a[head:][::-1], b[head:][::-1])
    one, other = a[head : len(a) - tail], b[head : len(b) - tail]
    yield "equal", 0, head, 0, head
    if max(len(one), len(other)) <= _COMPARED:
        for tag, i, j, k, m in difflib.SequenceMatcher(None, one, other).get_opcodes():
            yield tag, head + i, head + j, head + k, head + m
    else:
        yield "replace", head, len(a) - tail, head, len(b) - tail
    yield "equal", len(a) - tail, len(a), len(b) - tail, len(b)


def _shown(raw: bytes) -> dict[str, Any]:
    message = _decode(raw)
    return {"role": message.get("role"), "text": _text(message), "bytes": len(raw)}


def _cursor(text: str) -> int:
    try:
        data = base64.urlsafe_b64decode(text + "==") if text else b"\0\0\0\0"
    except ValueError:
        data = b""
    if len(data) != 4:
        raise ApiError(400, "cursor must be the next_cursor of an answer.", param="cursor", code="invalid_cursor")
    return int.from_bytes(data, "big")


