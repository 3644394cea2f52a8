"""MemoryManager: messages in, Chat Completions requests out, the model's VM calls answered between.

Promises: a request is what the proxy would send for the same history: the same turns, window, search
and bounds (`settings` are the proxy's). Table, log and pages are views of these turns: what a caller
pins or weighs counts for them, what he moves by hand does not change the window.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from proxy.config import Config, effective_reserve
from proxy.conversation.channel import TOOLS, Channel, vm_names
from proxy.conversation.limits import Limits
from proxy.library.local import LocalConversation
from proxy.library.working_set import WorkingSetManager
from proxy.memory.artifacts_bridge import ArtifactsBridge
from proxy.memory.eviction_policy import EvictionPolicy, ImportanceWeightedLRU
from proxy.memory.fault_handler import PageFaultHandler
from proxy.memory.levels import CompressorRegistry
from proxy.memory.metrics import UserExperienceMetrics
from proxy.memory.models import (
    CompressionLevel,
    MemoryPage,
    Modality,
    MutationType,
    PageMutation,
    VMMode,
)
from proxy.memory.mutation_log import MutationLogLite
from proxy.memory.page_table import PageTable
from proxy.memory.pages import page_id
from proxy.memory.provenance import ProvenanceGraph
from proxy.memory.tlb import PageTLB, TLBWithPageTable
from proxy.memory.vm_args import parse_fault_args, parse_search_args
from proxy.memory.vm_prompts import PAGE_FAULT, SEARCH_PAGES
from proxy.memory.vm_results import error_result, search_result
from proxy.memory.working_set import WorkingSetConfig
from proxy.tokens import get_counter, model_card

DEFAULT_MODEL = "gpt-4o"
_VM = Channel(TOOLS, True, vm_names([]))  # which called names mean our tools
_NO_MORE = error_result("No more pages in this turn; answer with what is loaded.")
_TOO_MANY = error_result("Too many calls at once; answer with what you have.")

Message = dict[str, Any]


class MemoryManager:
    """The memory of one session. `config` is its window (default: the model's own, less the usual
    reserve); everything else is as `settings` have it (default: the proxy's defaults). `storage` keeps
    checkpoints.
    """

    def __init__(
        self,
        session_id: str = "",
        config: WorkingSetConfig | None = None,
        policy: EvictionPolicy | None = None,
        registry: CompressorRegistry | None = None,
        *,
        mode: VMMode = VMMode.STRICT,
        model: str = DEFAULT_MODEL,
        system_prompt: str | None = None,
        storage: ArtifactsBridge | None = None,
        settings: Config | None = None,
    ) -> None:
        settings = settings or Config()
        self.session_id = session_id
        self.mode = mode
        self.limits = _limits(settings, model, config, mode)
        self.config = self.limits.working_set
        self.storage = storage or ArtifactsBridge()
        self.metrics = UserExperienceMetrics()
        self._policy = policy or ImportanceWeightedLRU()
        self._counter = get_counter(model)
        self._talk = LocalConversation(
            session_id,
            model,
            self.limits,
            self._counter,
            self._policy,
            registry,
            [{"role": "system", "content": system_prompt}] if system_prompt else [],
            settings.search.index_pages,
        )
        self._metadata: dict[str, dict[str, Any]] = {}
        self._pages = _Pages(self._page)
        self._calls = 0
        self._faults: tuple[TLBWithPageTable, PageFaultHandler] | None = None

    # -- adding

    async def add_user_message(self, content: Any, **metadata: Any) -> MemoryPage:
        """A message of the user's: a text, or Chat Completions content parts. Returns its page."""
        return self.add_message({"role": "user", "content": content}, metadata)

    async def add_assistant_message(self, content: Any, **metadata: Any) -> MemoryPage:
        """The answer to the last request. Returns its page."""
        return self.add_message({"role": "assistant", "content": content}, metadata)

    async def add_tool_result(
        self, content: Any, tool_name: str = "tool", arguments: Mapping[str, Any] | None = None,
        **metadata: Any,
    ) -> MemoryPage:
        """A tool of the application's was called and returned this; returns the result's page."""
        self._calls += 1
        call, result = tool_messages(self._calls, tool_name, arguments, content)
        self.add_message(call, metadata)
        return self.add_message(result, metadata)

    def add_message(self, message: Message, metadata: Mapping[str, Any] | None = None) -> MemoryPage:
        """Any Chat Completions message; an assistant's is the answer to the last request."""
        if message.get("role") == "assistant":
            report = self._talk.answer(message)
            if report is not None and report.channel != "bypass":
                report.record(self.metrics)
        else:
            self._talk.add(message)
        name = page_id(len(self._talk.path) - 1)
        if metadata:
            self._metadata[name] = dict(metadata)
        return self._pages[name]

    # -- showing

    @property
    def paged(self) -> bool:
        """Whether the conversation outgrew its window."""
        return self._talk.paged

    def request(self) -> dict[str, Any]:
        """The body of the next request: `model`, `messages`, and `tools` once pages are outside."""
        return self._talk.request()

    def build_request(self, user_input: str) -> dict[str, Any]:
        """The same for what the user says now, which is added unless it was the last message."""
        last = self._talk.path[-1:]
        said = json.loads(last[0].raw) if last else {}
        if (said.get("role"), said.get("content")) != ("user", user_input):
            self._talk.add({"role": "user", "content": user_input})
        return self._talk.request()

    async def check_and_evict(self) -> list[str]:
        """What the next request makes room for, ahead of it: the ids of the pages that leave."""
        self._talk.request()
        report = self._talk.open_report
        return list(report.evicted_pages) if report is not None else []

    def get_context_at_turn(self, turn: int) -> list[str]:
        """Ids of the pages that were in the window at the end of an answered `turn`."""
        return self.log.get_context_at_turn(turn)

    # -- the model's calls

    async def process_response(self, response: Any) -> dict[str, Any] | str:
        """The answer's text; or `{"tool_results": [...]}` with a message for each of its calls, and the
        media of pages that were loaded in a user's message. They stand in the next `request()`, too.

        `response` is a Chat Completions response, as an object or as a dict.
        """
        message = _field(_field(response, "choices")[0], "message")
        calls = [self._plain(call) for call in _field(message, "tool_calls") or ()]
        if not calls:
            return _field(message, "content") or ""
        return {"tool_results": await self._answered(calls, _field(message, "content"))}

    async def page_fault(
        self, page_id: str, target_level: CompressionLevel | int = CompressionLevel.ABSTRACT
    ) -> dict[str, Any]:
        """Bring a page into the window, within the turn's limits: the tool's result (`page` and
        `effects`, or `error`)."""
        asked = {"page_id": page_id, "target_level": int(target_level)}
        return await self.call(PAGE_FAULT, json.dumps(asked))

    async def search_pages(
        self, query: str, modality: Modality | str | None = None, limit: int = 5
    ) -> dict[str, Any]:
        """Search the pages outside the window: the tool's result (`results`, or `error`)."""
        asked: dict[str, Any] = {"query": query, "limit": limit}
        if modality is not None:
            asked["modality"] = modality.value if isinstance(modality, Modality) else modality
        return await self.call(SEARCH_PAGES, json.dumps(asked))

    async def call(self, name: str, arguments: str) -> dict[str, Any]:
        """The result of a VM call as the model made it (`arguments` is its JSON text)."""
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        (told, *_) = await self._answered([self._plain(call)], None)
        result: dict[str, Any] = json.loads(told["content"])
        return result

    def _plain(self, call: Any) -> Message:
        """A tool call as a dict with an id."""
        self._calls += 1
        function = _field(call, "function")
        name, arguments = _field(function, "name"), _field(function, "arguments") or ""
        call_id = _field(call, "id") or f"call_vm_{self._calls:04d}"
        body = {"name": name, "arguments": arguments}
        return {"id": call_id, "type": "function", "function": body}

    async def _answered(self, calls: Sequence[Message], content: Any) -> list[Message]:
        ours = [call for call in calls if _VM.tool(call["function"]["name"])]
        self._talk.request()  # there is a turn to answer in
        told = self._talk.vm_calls(ours, content) if ours else []
        results = {m.get("tool_call_id"): m for m in told or () if m["role"] == "tool"}
        for call in calls:
            tool = _VM.tool(call["function"]["name"])
            if tool is None:
                said = error_result(f"Unknown tool: {call['function']['name']}")
            elif told is None and not self.paged:
                said = await self._inside(tool, call["function"]["arguments"])
            else:
                said = _TOO_MANY if results else _NO_MORE
            result = {"role": "tool", "tool_call_id": call["id"], "content": said}
            results.setdefault(call["id"], result)
        return [*(results[call["id"]] for call in calls), *(m for m in told or () if m["role"] == "user")]

    async def _inside(self, tool: str, arguments: str) -> str:
        """The result of a call while every page is in the window."""
        if tool == SEARCH_PAGES:
            search = parse_search_args(arguments)
            return error_result(search) if isinstance(search, str) else search_result([], 0)
        fault = parse_fault_args(arguments)
        if isinstance(fault, str):
            return error_result(fault)
        result = await self.fault_handler.handle_fault(fault.page_id, fault.level)
        if result.page is None:
            return error_result(result.error or "")
        return self.fault_handler.build_tool_result(result.page).model_dump_json()

    # -- views

    @property
    def combined(self) -> TLBWithPageTable:
        """The conversation's page table behind its TLB: the open turn's, else the last answered one's."""
        return self._talk.table

    @property
    def page_table(self) -> PageTable:
        """The table itself."""
        return self.combined.page_table

    @property
    def tlb(self) -> PageTLB:
        """Its recently used entries."""
        return self.combined.tlb

    @property
    def log(self) -> MutationLogLite:
        """What happened to the pages, up to the last answer."""
        return self._talk.log

    @property
    def provenance(self) -> ProvenanceGraph:
        """Which derived page rests on which, walked both ways."""
        return self._talk.derived.provenance

    @property
    def working_set(self) -> WorkingSetManager:
        """The table's L0 and L1 as a budget; an importance that is set here counts for the turns."""
        return WorkingSetManager(self.config, None, self.combined, self._policy, change=self._talk.change)

    @property
    def fault_handler(self) -> PageFaultHandler:
        """Serves faults beside the turns, for callers that show the page themselves."""
        table = self.combined
        if self._faults is None or self._faults[0] is not table:
            handler = PageFaultHandler(
                table, self._get_page, self.limits.faults_per_turn, self.limits.fault_tokens,
                count=self._counter.text, part_tokens=self._counter.part, turn=table.turn,
            )  # fmt: skip
            self._faults = table, handler
        return self._faults[1]

    def new_turn(self) -> None:
        """`fault_handler` begins again with nothing spent. (The turns begin with what is said.)"""
        self.fault_handler.new_turn()

    def pin(self, page_id: str) -> None:
        """Never evict this page. KeyError for an unknown one."""
        self._talk.change(PageMutation(MutationType.PIN, page_id, self.combined.turn))

    def unpin(self, page_id: str) -> None:
        """Take a pin back."""
        self._talk.change(PageMutation(MutationType.UNPIN, page_id, self.combined.turn))

    async def checkpoint(self, name: str) -> str:
        """Store the full pages of the window under a name; returns the checkpoint's id."""
        found = [await self._get_page(entry.page_id) for entry in self.combined.resident()]
        return await self.storage.checkpoint([page for page in found if page is not None], name)

    def _page(self, name: str) -> MemoryPage | None:
        """A page of the conversation, level 0; a long message's is all of it."""
        parts = self._talk.pages(name)
        if not parts:
            return None
        update: dict[str, Any] = {"metadata": parts[0].metadata | self._metadata.get(name, {})}
        if len(parts) > 1:
            text = "".join(part.text() for part in parts)
            update |= {"page_id": name, "content": text, "size_tokens": None}
        return parts[0].model_copy(update=update)

    async def _get_page(self, name: str) -> MemoryPage | None:
        """A page of the conversation, or what a caller put into `_pages` or `storage`."""
        page: MemoryPage | None = self._pages.get(name)
        entry = self.combined.lookup(name)
        if page is None and entry is not None and entry.artifact_id is not None:
            page = await self.storage.load_page(entry.artifact_id)
        return page


class _Pages(dict[str, MemoryPage]):
    """The conversation's pages, made when they are asked for, and those that a caller puts in."""

    def __init__(self, find: Callable[[str], MemoryPage | None]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, name: str) -> MemoryPage:
        page = self._find(name)
        if page is None:
            raise KeyError(name)
        return page

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and self._find(name) is not None)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default


def tool_messages(
    number: int, name: str, arguments: Mapping[str, Any] | None, result: Any
) -> tuple[Message, Message]:
    """The call of an application's tool and its result; values that are no text become JSON."""
    call_id = f"call_{number:04d}"
    function = {"name": name, "arguments": json.dumps(arguments or {}, default=str)}
    call = {"id": call_id, "type": "function", "function": function}
    content = result if isinstance(result, str) else json.dumps(result, default=str)
    return (
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call_id, "content": content},
    )


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def _limits(
    settings: Config, model: str, config: WorkingSetConfig | None, mode: VMMode
) -> Limits:
    """The proxy's bounds for a model, with this window."""
    card = model_card(model)
    window, l0 = card.window_tokens, settings.tiers.l0
    if config is None:
        tokens = window if l0.tokens == "auto" else l0.tokens
        config = WorkingSetConfig(
            max_l0_tokens=tokens,
            reserved_tokens=effective_reserve(tokens, l0.reserve_tokens),
            eviction_threshold=l0.eviction_threshold,
            target_utilization=l0.target_utilization,
        )
    return Limits(
        working_set=config,
        window_tokens=window,
        window_known=card.known,
        mode=mode,
        model_takes_tools=True,
        developer_role=card.developer_role,
        faults_per_turn=settings.faults.max_per_turn,
        fault_tokens=settings.faults.max_tokens_per_turn,
        max_rounds=settings.faults.max_rounds,
        prefetch_pages=settings.prefetch.max_pages,
        prefetch_tokens=settings.prefetch.max_tokens,
        manifest_tokens=settings.manifest.max_tokens,
        page_tokens=settings.pages.max_tokens,
        search_results=settings.search.max_results,
        snippet_tokens=settings.search.snippet_tokens,
        segment_messages=settings.segments.max_messages,
        summary_tokens=settings.segments.summary_tokens,
        max_claims=settings.segments.max_claims,
    )
