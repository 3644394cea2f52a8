"""The library: the proxy's memory for programs that call the model themselves.

`SessionManager` keeps a conversation, `MemoryManager` its memory under the guide's names: messages in, Chat
Completions requests out, the model's VM calls answered between. No model is called here.

Promises: a request is, byte for byte, what the proxy sends for the same history with the same settings, because
it is made by the proxy's own turns, against records in RAM; a turn that is never answered leaves no trace. Table
and pages are views of these turns: what a caller weighs counts for them, what he moves by hand does not change
the window. A session without `enable_vm` gives the plain history; with it, while everything fits, the messages
stand as they were said, behind rules that stay the same (as long as these fit, too).
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import dropwhile
from typing import Any
from uuid import uuid4

import msgspec

from proxy.config import Config
from proxy.conversation.body import Body
from proxy.conversation.channel import TOOLS, Channel, vm_names
from proxy.conversation.compose import as_input
from proxy.conversation.context import TurnContext
from proxy.conversation.derived import NO_DERIVED
from proxy.conversation.effects import Append, Complete, Effect, Load, Said, Search
from proxy.conversation.identify import Place
from proxy.conversation.model_facts import capabilities
from proxy.conversation.pages import PathPages
from proxy.conversation.records import (
    Record,
    State,
    block_key,
    decode_record,
    record_key,
    restore_state,
)
from proxy.conversation.tree import Identity, Node
from proxy.conversation.turn import Answer, Turn
from proxy.conversation.turn_window import created
from proxy.errors import ApiError
from proxy.memory.artifacts_bridge import ArtifactsBridge
from proxy.memory.caches import PageTLB, TLBWithPageTable
from proxy.memory.eviction import EvictionPolicy
from proxy.memory.faults import PageFaultHandler
from proxy.memory.ids import Hit, make_page_id
from proxy.memory.levels import CompressorRegistry
from proxy.memory.manifest import ManifestBuilder, ManifestPolicies
from proxy.memory.models import SYSTEM_ROLES, MemoryPage, PageMutation, VMMode
from proxy.memory.table import PageTable
from proxy.memory.vm_tools import (
    SEARCH_PAGES,
    SearchToolResult,
    build_vm_developer_message,
    error_result,
    get_vm_tools_as_dicts,
    parse_fault_args,
    parse_search_args,
)
from proxy.memory.working_set import WorkingSetConfig, WorkingSetManager
from proxy.model_limits import POLICIES, limits_of
from proxy.search.paths import PathIndexes, make_encoder
from proxy.tokens import PER_REPLY, get_counter

DEFAULT_MODEL = "gpt-4o"
MAX_SESSION_ID_CHARS = 256
_VM = Channel(TOOLS, True, vm_names([]))  # which called names mean our tools
_NO_MORE = error_result("No more pages in this turn; answer with what is loaded.")
_NO_VM = {"error": "This session has no virtual memory."}
_TOO_MANY = error_result("Too many calls at once; answer with what you have.")
_json = msgspec.json.encode
_decode = msgspec.json.decode

Message = dict[str, Any]


class _OpenTurn:
    """A turn that waits for the model: `request` is what it would ask, `offered` whether it may call
    the VM tools.
    """

    def __init__(self, turn: Turn) -> None:
        self.turn = turn
        self.dialogue: Generator[Effect, Any, Answer] = turn.run()
        self.request: dict[str, Any] = {}
        self.offered = False


class MemoryManager:
    """The memory of one session. `config` is its window (default: the model's own, less the usual
    reserve); everything else is as `settings` have it (default: the proxy's defaults). `storage` is for the
    caller's checkpoints.
    """

    def __init__(
        self, session_id: str = "", config: WorkingSetConfig | None = None, policy: EvictionPolicy | None = None,
        registry: CompressorRegistry | None = None, *, mode: VMMode = VMMode.STRICT, model: str = DEFAULT_MODEL,
        system_prompt: str | None = None, settings: Config | None = None,
    ) -> None:  # fmt: skip
        settings = settings or Config()
        limits, override = limits_of(settings, model, {}), settings.model_override(model)
        self.session_id = session_id
        self.limits = replace(
            limits, mode=mode, working_set=config or limits.working_set, written_by_models=False,
            answer_beside=limits.answer_beside and config is None,
        )
        self.config = self.limits.working_set
        self.storage = ArtifactsBridge()
        self.path: Sequence[Node] = []
        self._model = model
        self._counter = get_counter(model, override.tokenizer)
        self._capabilities = capabilities(override.model_dump(), {}, {})
        self._policy = policy or POLICIES[settings.memory.eviction]
        self._registry = registry
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        self._system = [_json(message) for message in system]
        self._fixed_tokens = sum(self._counter.message(message) for message in system)
        self._identity = Identity(blake2b(session_id.encode(), digest_size=32).digest())
        self._tenant = self._identity.tenant("", "")
        self._values: dict[bytes, bytes] = {}  # the store: records and the table's blocks
        self._indexes = PathIndexes(settings.search.index_pages, make_encoder(settings.search.embeddings))
        self._record: Record | None = None  # of the last answer
        self._state: State | None = None  # after it; None while everything fits
        self._open: _OpenTurn | None = None
        self._unpaged: PageTable | None = None
        self._combined: TLBWithPageTable | None = None
        self._entered = 0  # messages that are in `_unpaged`
        self._changes: list[PageMutation] = []  # the caller's, that no answered turn has yet
        self._pages: dict[str, MemoryPage] = {}  # as they were said, and what a caller puts in
        self._calls = 0
        self._faults: tuple[PageTable, PageFaultHandler] | None = None

    # -- adding

    async def add_user_message(self, content: Any) -> MemoryPage:
        """A message of the user's: a text, or Chat Completions content parts. Returns its page."""
        return self.add_message({"role": "user", "content": content})

    async def add_assistant_message(self, content: Any) -> MemoryPage:
        """The answer to the last request. Returns its page."""
        return self.add_message({"role": "assistant", "content": content})

    def add_message(self, message: Message) -> MemoryPage:
        """Any Chat Completions message but a system one (ValueError: these stand in front, as
        `system_prompt`); an assistant's is the answer to the last request."""
        if message.get("role") in SYSTEM_ROLES:
            raise ValueError("a system message is the `system_prompt` of the conversation")
        if message.get("role") == "assistant":
            self._answer(message)
        else:
            self._add(message)
        pages = self._path_pages()
        said = pages[len(self.path) - 1]
        self._pages |= {i: pages.page(i) for i in said.ids}
        name, first = make_page_id(said.position), said.ids[0]
        if first != name:  # a long message, in parts
            whole = {"page_id": name, "content": "".join(said.parts), "size_tokens": None}
            self._pages[name] = self._pages[first].model_copy(update=whole)
        return self._pages[name]

    def _add(self, message: Message) -> None:
        """A message without a turn of its own; an open turn is given up."""
        self._give_up()
        self.path = self._identity.extend(self._tenant, self.path, [(_json(message), message)])

    def _answer(self, message: Message) -> None:
        """The end of the open turn; a message that only calls tools of the caller's is one, too."""
        if self._open is None and self.path and self.path[-1].role != "assistant":
            self._begin()
        if self._open is None:
            self._add(as_input(message))
            return
        opened, self._open = self._open, None
        reason = "tool_calls" if message.get("tool_calls") else "stop"
        self._play(opened, Said([message], reason, None))
        turn = opened.turn
        self.path, self._record = turn.path, turn.record
        if turn.window is None or turn.record is None:
            self._state = None
            return
        self._state = State(turn.window, turn.table, turn.pages.derived)
        self._changes.clear()
        self._unpaged = None

    # -- showing

    @property
    def paged(self) -> bool:
        """Whether the conversation outgrew its window."""
        opened = self._open is not None and self._open.turn.window is not None
        return opened or self._state is not None

    @property
    def tokens(self) -> int:
        """Of the whole conversation in one request, as long as nothing is paged."""
        pages = self._path_pages()
        said = sum(pages.tokens(position) for position in range(len(self.path)))
        return self._fixed_tokens + said + PER_REPLY

    def request(self) -> dict[str, Any]:
        """The body of the next request: `model`, `messages`, and `tools` when the VM's are on offer."""
        if not self.path:
            return {"model": self._model, "messages": [_decode(raw) for raw in self._system]}
        if self.path[-1].role != "assistant":
            return (self._open or self._begin()).request
        shown = self._begin().request  # nobody is asked yet: as it would look
        self._give_up()
        return shown

    def build_request(self, user_input: str) -> dict[str, Any]:
        """`request()` for what the user says now, which is added unless it was the last message."""
        said = json.loads(self.path[-1].raw) if self.path else {}
        if (said.get("role"), said.get("content")) != ("user", user_input):
            self.add_message({"role": "user", "content": user_input})
        return self.request()

    async def check_and_evict(self) -> list[str]:
        """What the next request makes room for, ahead of it: the ids of the pages that leave."""
        self.request()
        return list(self._open.turn.report.evicted_pages) if self._open is not None else []

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
        return {"tool_results": await self._results(calls, _field(message, "content"))}

    async def call(self, name: str, arguments: str) -> dict[str, Any]:
        """The result of a VM call as the model made it (`arguments` is its JSON text)."""
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        (told, *_) = await self._results([self._plain(call)], None)
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

    async def _results(self, calls: Sequence[Message], content: Any) -> list[Message]:
        """A tool message for each call, then the media of pages that were loaded in a user's message."""
        self.request()  # there is a turn to answer in
        ours = [call for call in calls if _VM.tool(call["function"]["name"])]
        exchange = self._exchange(ours, content) if ours else []
        results = {m["tool_call_id"]: m for m in exchange or () if m["role"] == "tool"}
        refusal = _TOO_MANY if results else _NO_MORE
        for call in calls:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            said = refusal
            if call not in ours:
                said = error_result(f"Unknown tool: {name}")
            elif exchange is None and not self.paged:
                said = await self._inside(str(_VM.tool(name)), arguments)
            result = {"role": "tool", "tool_call_id": call["id"], "content": said}
            results.setdefault(call["id"], result)
        media = [message for message in exchange or () if message["role"] == "user"]
        return [*(results[call["id"]] for call in calls), *media]

    def _exchange(self, calls: Sequence[Message], content: Any) -> list[Message] | None:
        """What the open turn answers to these VM calls in one message of the model's: [] when the window
        has no room for it, None when no VM call is welcome now."""
        if self._open is None or not self._open.offered:
            return None
        said = {"role": "assistant", "content": content, "tool_calls": list(calls)}
        if not self._play(self._open, Said([said], "tool_calls", None)):  # it was taken for the answer
            self._give_up()
            return None
        messages, ids = self._open.request["messages"], {call["id"] for call in calls}
        at = len(messages)
        while at and messages[at - 1]["role"] != "assistant":
            at -= 1
        made = messages[at - 1].get("tool_calls") if at else None
        return list(messages[at:]) if made and made[0]["id"] in ids else []

    async def _inside(self, tool: str, arguments: str) -> str:
        """The result of a VM call while every page is in the window."""
        if tool == SEARCH_PAGES:
            search = parse_search_args(arguments)
            return error_result(search) if isinstance(search, str) else SearchToolResult().model_dump_json()
        fault = parse_fault_args(arguments)
        if isinstance(fault, str):
            return error_result(fault)
        result = await self.fault_handler.handle_fault(fault.page_id, fault.level)
        if result.page is None:
            return error_result(result.error or "")
        return self.fault_handler.build_tool_result(result.page).model_dump_json()

    # -- views

    @property
    def page_table(self) -> PageTable:
        """The page table: the open turn's, else that after the last answer. While everything fits no turn
        has one; then it is what the first turn that pages will find."""
        if self._open is not None and self._open.turn.window is not None:
            return self._open.turn.table
        if self._state is not None:
            return self._state.table
        return self._view()

    @property
    def combined(self) -> TLBWithPageTable:
        """The page table behind a TLB."""
        table = self.page_table
        if self._combined is None or self._combined.page_table is not table:
            self._combined = TLBWithPageTable(table)
        return self._combined

    @property
    def tlb(self) -> PageTLB:
        """Its recently used entries."""
        return self.combined.tlb

    @property
    def working_set(self) -> WorkingSetManager:
        """The table's L0 and L1 as a budget; an importance that is set here counts for the turns."""
        return WorkingSetManager(self.config, None, self.page_table, self._policy, change=self._change)

    @property
    def fault_handler(self) -> PageFaultHandler:
        """Serves faults beside the turns, for callers that show the page themselves."""
        table = self.page_table
        if self._faults is None or self._faults[0] is not table:
            handler = PageFaultHandler(
                table, self._get_page, self.limits.faults_per_turn, self.limits.fault_tokens,
                registry=self._registry, counts=self._counter, turn=table.turn,
            )  # fmt: skip
            self._faults = table, handler
        return self._faults[1]

    def new_turn(self) -> None:
        """`fault_handler` begins again with nothing spent. (The turns begin with what is said.)"""
        self.fault_handler.new_turn()

    def _view(self) -> PageTable:
        """What the first turn that pages will find."""
        if self._unpaged is None:
            self._unpaged, self._entered = PageTable(), 0
        turn = 1 + sum(node.role == "assistant" for node in self.path[: self._entered])
        for position in range(self._entered, len(self.path)):
            for mutation in created(self._path_pages(position + 1), position, 0, turn):
                self._unpaged.apply(mutation)
            turn += self.path[position].role == "assistant"
        self._entered = len(self.path)
        return self._unpaged

    def _change(self, mutation: PageMutation) -> None:
        """An importance of the caller's: it holds at once, and in the log from the next answered turn on."""
        self.page_table.apply(mutation)
        self._changes.append(mutation)

    async def _get_page(self, name: str) -> MemoryPage | None:
        """A page of the conversation, or one that the caller put into `_pages`."""
        return self._pages.get(name)

    def _path_pages(self, end: int | None = None) -> PathPages:
        """The pages of the first `end` messages (None: all), and what derives from them."""
        derived = self._state.derived if self._state is not None else NO_DERIVED
        return PathPages(self.path[:end], self._counter, self.limits.page_tokens, derived)

    # -- turns

    def _begin(self) -> _OpenTurn:
        """A turn up to its first request."""
        turn = Turn(self._context())
        if self._registry is not None:
            turn.pages.registry = self._registry
        self._open = _OpenTurn(turn)
        if not self._play(self._open, None):
            raise ApiError(500, "A turn ended without a request.")
        return self._open

    def _give_up(self) -> None:
        """Forget the open turn; the table that it changed comes back from the records."""
        if self._open is None:
            return
        self._open.dialogue.close()
        self._open = None
        if self._state is not None and self._record is not None:
            self._state = restore_state(self._record, self._get, self._block)
            self._state.table.replay(self._changes)

    def _play(self, opened: _OpenTurn, reply: Any) -> bool:
        """Perform effects up to the next request; False when the turn has ended."""
        try:
            while True:
                effect = opened.dialogue.send(reply)
                if isinstance(effect, Complete):
                    opened.request, opened.offered = _decode(effect.body), effect.offer
                    return True
                if isinstance(effect, Append):
                    for key, value in effect.puts:
                        self._values.setdefault(key, value)
                    reply = None
                elif isinstance(effect, Search):
                    reply = self._search(opened.turn.pages, effect)
                elif isinstance(effect, Load):
                    reply = opened.turn.pages.at(effect.page_id, effect.level)
                else:
                    reply = None  # nobody else waits for this thread
        except StopIteration:
            return False

    def _context(self) -> TurnContext:
        model = msgspec.Raw(_json(self._model))
        raws = b",".join([*self._system, *(node.raw for node in self.path)])
        return TurnContext(
            body=b'{"model":' + bytes(model) + b',"messages":[' + raws + b"]}",
            sent=Body({"model": model}, ["model", "messages"], self._system, None, 0, [], None),
            decoded={"model": self._model}, place=Place(self.path, 0, 0, [], self._record), state=self._state,
            limits=self.limits, counter=self._counter, policy=self._policy, identity=self._identity,
            tenant=self._tenant, fixed_tokens=lambda: self._fixed_tokens, substitutes=self._substitutes,
            get_record=self._get, get_block=self._block, capabilities=lambda: self._capabilities, now_s=time.time(),
            changes=self._changes, given_answers=True,
        )  # fmt: skip

    # -- the store

    def _get(self, node_id: bytes) -> Record | None:
        data = self._values.get(record_key(node_id))
        return None if data is None else decode_record(data)

    def _block(self, owner: bytes, ref: bytes) -> bytes | None:
        return self._values.get(block_key(owner, ref))

    def _substitutes(self, node_id: bytes) -> Sequence[bytes]:
        record = self._get(node_id)
        return record.substitute if record is not None else ()

    def _search(self, pages: PathPages, effect: Search) -> list[Hit]:
        ids = pages.index_keys(effect.before)
        return self._indexes.search(
            ids, pages.docs, effect.queries, effect.limit, effect.skip, effect.seen_s, least=effect.least
        )


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


class SessionManager:
    """One conversation. `session_id` names it (default: a random one, 1 to 256 characters).

    The `vm_*` options only mean something with `enable_vm`: see `MemoryManager`. `model` says how
    tokens are counted. `vm` is the session's MemoryManager, None without VM.
    """

    def __init__(
        self, session_id: str | None = None, system_prompt: str | None = None, enable_vm: bool = False,
        vm_mode: VMMode = VMMode.PASSIVE, vm_config: WorkingSetConfig | None = None,
        vm_eviction_policy: EvictionPolicy | None = None, vm_compressor_registry: CompressorRegistry | None = None,
        model: str = DEFAULT_MODEL,
    ) -> None:  # fmt: skip
        if session_id is not None and not 0 < len(session_id) <= MAX_SESSION_ID_CHARS:
            raise ValueError(f"a session id has 1 to {MAX_SESSION_ID_CHARS} characters")
        self.session_id = session_id if session_id is not None else uuid4().hex
        self.system_prompt = system_prompt
        self.vm_mode = vm_mode
        self._messages: list[Message] = []  # without VM
        self._calls = 0
        self._counter = get_counter(model)
        self.vm: MemoryManager | None = None
        if enable_vm:
            self.vm = MemoryManager(
                self.session_id, vm_config, vm_eviction_policy, vm_compressor_registry,
                mode=vm_mode, model=model, system_prompt=system_prompt,
            )  # fmt: skip

    # -- what is said

    async def user_says(self, text: str | list[dict[str, Any]]) -> str:
        """The user's message: a text or content parts. Returns the session's id."""
        return self._say({"role": "user", "content": text})

    async def ai_responds(self, text: str, model: str = "") -> str:
        """The model's answer; `model`, who gave it, changes nothing. Returns the session's id."""
        return self._say({"role": "assistant", "content": text})

    async def tool_used(
        self, tool_name: str, arguments: dict[str, Any] | None = None, result: Any = None, error: str | None = None
    ) -> str:
        """A tool of the program's was called, with this result or error (JSON, when it is no text). Returns
        the session's id."""
        self._calls += 1
        call_id = f"call_{self._calls:04d}"
        function = {"name": tool_name, "arguments": json.dumps(arguments or {}, default=str)}
        call = {"id": call_id, "type": "function", "function": function}
        told = {"error": error} if error is not None else result
        content = told if isinstance(told, str) else json.dumps(told, default=str)
        self._say({"role": "assistant", "content": None, "tool_calls": [call]})
        return self._say({"role": "tool", "tool_call_id": call_id, "content": content})

    def _say(self, message: Message) -> str:
        if self.vm is not None:
            self.vm.add_message(message)
        else:
            self._messages.append(message)
        return self.session_id

    # -- what the model is sent

    async def get_messages_for_llm(self, include_system: bool = True) -> list[Message]:
        """The messages of the next request, in Chat Completions' shape.

        With VM: the rules with manifest and <VM:CONTEXT> behind the system prompt, then the messages
        that are in the window. `include_system` false leaves both out.
        """
        if self.vm is not None:
            messages = self.vm.request()["messages"]
        else:
            system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
            messages = [*system, *self._messages]
        if not include_system:
            return list(dropwhile(lambda m: m["role"] in SYSTEM_ROLES, messages))
        at = 1 if self.system_prompt else 0
        rules = self._rules()
        return [*messages[:at], *([rules] if rules else []), *messages[at:]]

    def get_tools(self) -> list[dict[str, Any]]:
        """The VM's tools for the next request's `tools`; none without VM and in passive mode."""
        if self.vm is None:
            return []
        tools = self.vm.request().get("tools") or []
        if not tools and self.vm_mode is not VMMode.PASSIVE and self._rules():
            tools = get_vm_tools_as_dicts()
        return list(tools)

    def _rules(self) -> Message | None:
        """The rules while every page is still in the window; None when they are there, or do not fit."""
        if self.vm is None or self.vm.paged:
            return None
        mode, faults = self.vm.limits.mode, self.vm.limits.faults_per_turn
        builder = ManifestBuilder(policies=ManifestPolicies(max_faults_per_turn=faults))
        tools = [] if mode is VMMode.PASSIVE else get_vm_tools_as_dicts()
        manifest = builder.build().model_dump_json() if tools else ""
        text = build_vm_developer_message(mode, manifest, "", max_faults_per_turn=faults)
        rules = {"role": "system", "content": text}
        added = self._counter.message(rules) + self._counter.tools(tools)
        return rules if self.vm.tokens + added <= self.vm.limits.budget_tokens else None

    # -- the model's VM calls

    async def handle_tool_call(self, name: str, arguments: str) -> dict[str, Any]:
        """The result of a VM call as the model made it (`arguments` is its JSON text): a page or what was found,
        or `error`. Call and result stand in the next `get_messages_for_llm()`, as in the proxy."""
        return dict(_NO_VM) if self.vm is None else await self.vm.call(name, arguments)
