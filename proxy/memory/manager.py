"""MemoryManager: messages in, Chat Completions requests out, the model's VM calls answered between.

Promises: a message becomes a page, and so does each medium in it; a request holds the window's
pages at the levels at which they are shown, within a bounded manifest of the rest; every VM call
gets a result that the model can use. For programs without a proxy; the proxy's turns hold the same
core (`core.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from proxy.memory.context import (
    PackedContext,
    context_parts,
    page_words,
)
from proxy.memory.core import MemoryCore
from proxy.memory.faults import FaultResult
from proxy.memory.manifest import AvailablePageEntry, ManifestBuilder, ManifestPolicies
from proxy.memory.models import (
    CompressionLevel,
    MemoryPage,
    Modality,
    PageTableEntry,
    StorageTier,
    VMMode,
)
from proxy.memory.pages import media_page_id, message_text, modality_of
from proxy.memory.pages import page_id as message_page_id
from proxy.memory.search_handler import PageSearchHandler
from proxy.memory.segments import index_page
from proxy.memory.vm_tools import (
    PAGE_FAULT,
    SEARCH_PAGES,
    SearchToolResult,
    build_vm_developer_message,
    error_result,
    get_vm_tools_as_dicts,
    parse_fault_args,
    parse_search_args,
)

_MANIFEST_ENTRIES = 64  # listed at most; older pages are one line per segment
_MANIFEST_TOKENS = 1_024
KEEP_LAST_PAGES = 4  # stay in the window when a segment ends
_MOST_CALLS = 8  # VM calls of one response that are answered


class MemoryManager(MemoryCore):
    """The memory of one session, for a program of its own. See `MemoryCore` for the parameters."""

    # -- adding

    async def add_user_message(self, content: Any) -> MemoryPage:
        """A message of the user's: a text, or Chat Completions content parts. Returns its page."""
        return self._add("user", content)

    async def add_assistant_message(self, content: Any) -> MemoryPage:
        """An answer. Returns its page."""
        return self._add("assistant", content)

    async def add_tool_result(
        self, content: Any, tool_name: str = "", arguments: Mapping[str, Any] | None = None
    ) -> MemoryPage:
        """What a tool of the application's returned; values that are no text become JSON."""
        text = content if isinstance(content, str) else _compact(content)
        call = f"{tool_name}({_compact(arguments)}) -> " if tool_name and arguments else ""
        return self._add("tool", call + text, modality_of({"role": "tool", "content": text}))

    async def add_page(self, page: MemoryPage) -> PageTableEntry:
        """A page of the caller's making: a summary, a claim."""
        return self.register(page)

    def _add(self, role: str, content: Any, modality: Modality = Modality.TEXT) -> MemoryPage:
        """One page for the words, one for each medium."""
        number = self._messages
        self._messages += 1
        text = content if isinstance(content, str) else message_text({"content": content})
        words = MemoryPage(
            page_id=message_page_id(number),
            modality=modality,
            content=text,
            storage_tier=StorageTier.L0,
            session_id=self.session_id or None,
            metadata={"role": role},
        )
        self.register(words)
        media = content if isinstance(content, list) else ()
        kinds = [modality_of({"content": [part]}) for part in media]
        found = [(p, k) for p, k in zip(media, kinds, strict=True) if k in _MEDIA_PREFIX]
        for index, (part, kind) in enumerate(found, 1):
            self.register(
                words.model_copy(
                    update={
                        "page_id": media_page_id(number, index, _MEDIA_PREFIX[kind]),
                        "modality": kind,
                        "content": part,
                        "provenance": [words.page_id],
                    }
                )
            )
        return words

    # -- showing

    def build_request(self, user_input: str) -> dict[str, Any]:
        """A Chat Completions request: rules, manifest and context, then what the user says now.

        The user's message that was added last is not shown twice.
        """
        pages = self._window_pages(user_input)
        packed = self.packer.pack(pages)
        message = build_vm_developer_message(
            self.mode,
            self._manifest(pages) if self.mode is not VMMode.PASSIVE else "",
            "" if packed.has_media else packed.content,
            max_faults_per_turn=self._limits[0],
        )
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [
                {"role": "developer", "content": message},
                {"role": "user", "content": _user_content(packed, user_input)},
            ],
        }
        if self.mode is not VMMode.PASSIVE:
            request["tools"] = get_vm_tools_as_dicts()
        return request

    def _window_pages(self, user_input: str) -> list[MemoryPage]:
        """The pages in L0, as they are shown there."""
        pages: list[MemoryPage] = []
        for entry in self.page_table.resident():
            page = self._shown.get(entry.page_id) or self._pages.get(entry.page_id)
            if page is not None:
                pages.append(page)
        last = pages[-1] if pages else None
        if last is not None and last.metadata.get("role") == "user" and last.text() == user_input:
            pages.pop()
        return pages

    def _manifest(self, shown: Sequence[MemoryPage]) -> str:
        builder = ManifestBuilder(
            self.session_id, ManifestPolicies(max_faults_per_turn=self._limits[0])
        )
        for page in shown:
            builder.add_working_set_page(page)
        outside = self._outside()
        for entry in outside[:_MANIFEST_ENTRIES]:
            builder.add_available_page_entry(self._available(entry))
        rest = outside[_MANIFEST_ENTRIES:]
        if rest:
            oldest, newest = rest[-1].page_id, rest[0].page_id
            builder.add_segment(oldest, newest, len(rest), self._hints.get(oldest, ""))
        return builder.fit(_MANIFEST_TOKENS, self._counts.text).model_dump_json()

    def _outside(self) -> list[PageTableEntry]:
        """Pages that are not in the window, the nearest first."""
        tiers = [tier for tier in StorageTier if tier is not StorageTier.L0]
        found = [entry for tier in tiers for entry in self.page_table.get_by_tier(tier)]
        found.sort(key=lambda e: (e.position, e.part, e.sequence), reverse=True)
        return found

    def _available(self, entry: PageTableEntry) -> AvailablePageEntry:
        return AvailablePageEntry(
            page_id=entry.page_id,
            modality=entry.modality.value,
            tier=entry.tier.value,
            hint=self._hints.get(entry.page_id, ""),
        )

    # -- the model's calls

    async def process_response(self, response: Any) -> dict[str, Any] | str:
        """The answer's text; or `{"tool_results": [...]}` with a message for each of its calls.

        `response` is a Chat Completions response, as an object or as a dict. Media of a page that
        was loaded follow as a user's message.
        """
        message = _field(_field(response, "choices")[0], "message")
        calls = _field(message, "tool_calls")
        if not calls:
            return _field(message, "content") or ""
        results: list[dict[str, Any]] = []
        media: list[dict[str, Any]] = []
        for call in calls:
            function = _field(call, "function")
            name, arguments = _field(function, "name"), _field(function, "arguments") or ""
            if len(results) >= _MOST_CALLS:
                content = error_result("Too many calls at once; answer with what you have.")
            else:
                content = await self._call(name, arguments, media)
            results.append({"role": "tool", "tool_call_id": _field(call, "id"), "content": content})
        if media:
            results.append({"role": "user", "content": context_parts(media)})
        return {"tool_results": results}

    async def _call(self, name: str, arguments: str, media: list[dict[str, Any]]) -> str:
        if name == PAGE_FAULT:
            wanted = parse_fault_args(arguments)
            if isinstance(wanted, str):
                return error_result(wanted)
            result = await self.page_fault(wanted.page_id, wanted.level)
            media.extend(result.parts)
            if result.page is None:
                return error_result(result.error or "")
            return self.fault_handler.build_tool_result(result.page).model_dump_json()
        if name == SEARCH_PAGES:
            asked = parse_search_args(arguments)
            if isinstance(asked, str):
                return error_result(asked)
            return self.search_pages(*asked).model_dump_json()
        return error_result(f"Unknown tool: {name}")

    async def page_fault(
        self, page_id: str, target_level: CompressionLevel | int = CompressionLevel.ABSTRACT
    ) -> FaultResult:
        """Bring a page into the window, within the turn's limits."""
        result = await self.fault_handler.handle_fault(page_id, target_level)
        self.metrics.record_recall(result.success)
        if result.success and result.page is not None and not result.resident:
            self.metrics.record_fault(result.refault)
            self._shown[page_id] = result.page
            body = await self._get_page(page_id)
            if body is not None:
                self._pages[page_id] = body
        return result

    def search_pages(
        self, query: str, modality: Modality | str | None = None, limit: int = 5
    ) -> SearchToolResult:
        """Pages outside the window by the words of their hints, best first."""
        available = [self._available(entry) for entry in self._outside()]
        found = PageSearchHandler(available).search(query, modality, limit)
        self.metrics.record_recall(bool(found.results))
        return found

    # -- segments

    async def close_segment(self, keep_last: int = KEEP_LAST_PAGES) -> ClosedSegment | None:
        """End a segment: checkpoint its pages, evict them, and leave a line that says what they were about.

        The segment is the conversation's pages in the window but the newest `keep_last`. None when
        there are no such pages.
        """
        talk = [e for e in self.page_table.resident() if e.position >= 0]
        closing = talk[: max(0, len(talk) - keep_last)]
        bodies = [await self._get_page(e.page_id) for e in closing]
        pages = [page for page in bodies if page is not None]
        if not pages:
            return None
        self._segments += 1
        checkpoint_id = await self.storage.checkpoint(pages, f"segment_{self._segments}")
        ids, texts = [p.page_id for p in pages], [page_words(p) for p in pages]
        index = index_page(self._segments, ids, texts, self.turn, self._counts.text)
        self.provenance.add_page(index)
        artifact_id = await self.storage.store_page(index)
        self.register(index.model_copy(update={"artifact_id": artifact_id}))
        self._pages.pop(index.page_id, None)
        for entry in closing:
            if not self.pinned.held(entry, self.turn):
                await self._evict(entry)
        return ClosedSegment(checkpoint_id, index)


class ClosedSegment(NamedTuple):
    """What `MemoryManager.close_segment` left."""

    checkpoint_id: str
    line: MemoryPage  # index_seg_01


_MEDIA_PREFIX = {Modality.IMAGE: "img", Modality.AUDIO: "aud", Modality.VIDEO: "vid"}


def _user_content(packed: PackedContext, user_input: str) -> str | list[dict[str, Any]]:
    """The user's words; behind the context when that has media, which belong to a user's message."""
    if not packed.has_media:
        return user_input
    return [*context_parts(packed.parts), {"type": "text", "text": user_input}]


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
