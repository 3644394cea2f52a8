"""SessionManager: a conversation with virtual memory, for programs without the proxy in between.

Promises: without `enable_vm` the messages are the plain history; with it a request never exceeds
`vm_config.max_l0_tokens` less its reserve, and is what the proxy would send for the same history
(the same turns, window and fault loop). While everything fits, the messages stand as they were said.
No model is called here: the program calls it, with `get_messages_for_llm()` and `get_tools()`.
"""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

from proxy.conversation.limits import Limits
from proxy.conversation.local import LocalConversation
from proxy.memory.eviction import EvictionPolicy, ImportanceWeightedLRU
from proxy.memory.levels import CompressorRegistry
from proxy.memory.manager import MemoryManager
from proxy.memory.manifest import ManifestBuilder, ManifestPolicies
from proxy.memory.models import CompressionLevel, MemoryPage, VMMode
from proxy.memory.vm_tools import (
    PAGE_FAULT,
    SEARCH_PAGES,
    build_vm_developer_message,
    error_result,
    get_vm_tools_as_dicts,
)
from proxy.memory.working_set import WorkingSetConfig
from proxy.tokens import get_counter

DEFAULT_MODEL = "gpt-4o"
MAX_SESSION_ID_CHARS = 256
_FAULTS_PER_TURN = 3
_FAULT_SHARE = 4  # faults of a turn may bring in a quarter of the window
_PAGE_SHARE = 8  # a message above an eighth of the window becomes several pages
_MOST_ROUNDS = 64
_NO_WINDOW = WorkingSetConfig(max_l0_tokens=1 << 40, reserved_tokens=0)

Message = dict[str, Any]


class SessionManager:
    """One conversation. `session_id` names it (default: a random one, 1 to 256 characters).

    The `vm_*` options only mean something with `enable_vm`. `model` says how tokens are counted.
    `vm` is the session's MemoryManager, None without VM.
    """

    def __init__(
        self,
        session_id: str | None = None,
        system_prompt: str | None = None,
        enable_vm: bool = False,
        vm_mode: VMMode = VMMode.PASSIVE,
        vm_config: WorkingSetConfig | None = None,
        vm_eviction_policy: EvictionPolicy | None = None,
        vm_compressor_registry: CompressorRegistry | None = None,
        model: str = DEFAULT_MODEL,
    ) -> None:
        if session_id is not None and not 0 < len(session_id) <= MAX_SESSION_ID_CHARS:
            raise ValueError(f"a session id has 1 to {MAX_SESSION_ID_CHARS} characters")
        self.session_id = session_id if session_id is not None else uuid4().hex
        self.system_prompt = system_prompt
        self.vm_mode = vm_mode
        self._calls = 0
        counter = get_counter(model)
        config = (vm_config or WorkingSetConfig()) if enable_vm else _NO_WINDOW
        policy = vm_eviction_policy or ImportanceWeightedLRU()
        self._notice = self._vm_notice() if enable_vm else None
        self.vm: MemoryManager | None = None
        if enable_vm:
            self.vm = MemoryManager(
                self.session_id, config, policy, vm_compressor_registry,
                mode=vm_mode, model=model, counts=counter, load=self._load_page,
                max_faults_per_turn=_FAULTS_PER_TURN,
            )  # fmt: skip
        self._talk = LocalConversation(
            self.session_id,
            model,
            _limits(config, vm_mode),
            counter,
            policy,
            vm_compressor_registry,
            [{"role": "system", "content": system_prompt}] if system_prompt else [],
            (counter.message(self._notice) if self._notice else 0) + counter.tools(self.get_tools()),
        )

    # -- what is said

    async def user_says(self, text: str | list[dict[str, Any]], **metadata: Any) -> str:
        """The user's message: a text or content parts. Returns the session's id."""
        if self.vm is not None and self._talk.path:
            self.vm.new_turn()
        self._talk.add({"role": "user", "content": text})
        await self._remember("user", text, metadata)
        return self.session_id

    async def ai_responds(self, text: str, model: str = "", **metadata: Any) -> str:
        """The model's answer. `model` is who gave it. Returns the session's id."""
        self._talk.answer({"role": "assistant", "content": text})
        await self._remember("assistant", text, {**metadata, **({"model": model} if model else {})})
        return self.session_id

    async def tool_used(
        self,
        tool_name: str,
        arguments: dict[str, Any] | None = None,
        result: Any = None,
        error: str | None = None,
        **metadata: Any,
    ) -> str:
        """A tool of the program's was called, with this result or error. Returns the session's id."""
        self._calls += 1
        call_id = f"call_{self._calls:04d}"
        function = {"name": tool_name, "arguments": json.dumps(arguments or {}, default=str)}
        call = {"id": call_id, "type": "function", "function": function}
        self._talk.answer({"role": "assistant", "content": None, "tool_calls": [call]})
        said = {"error": error} if error is not None else result
        content = said if isinstance(said, str) else json.dumps(said, default=str)
        self._talk.add({"role": "tool", "tool_call_id": call_id, "content": content})
        await self._remember("assistant", f"{tool_name}({function['arguments']})", metadata)
        await self._remember("tool", content, metadata)
        return self.session_id

    # -- what the model is sent

    async def get_messages_for_llm(self, include_system: bool = True) -> list[Message]:
        """The messages of the next request, in Chat Completions' shape.

        With VM: the rules with manifest and <VM:CONTEXT> behind the system prompt, then the messages
        that are in the window. `include_system` false leaves both out.
        """
        messages = self._talk.request()
        if not include_system:
            first = next((i for i, m in enumerate(messages) if not _is_system(m)), len(messages))
            return messages[first:]
        if self._notice is not None and not self._paged(messages):
            at = 1 if self.system_prompt else 0
            return [*messages[:at], self._notice, *messages[at:]]
        return messages

    def get_tools(self) -> list[dict[str, Any]]:
        """The VM's tools for the request's `tools`; none without VM and in passive mode."""
        offered = self.vm is not None and self.vm_mode is not VMMode.PASSIVE
        return get_vm_tools_as_dicts() if offered else []

    # -- the model's VM calls

    async def page_fault(
        self, page_id: str, target_level: CompressionLevel | int = CompressionLevel.ABSTRACT
    ) -> dict[str, Any]:
        """Bring a page into the window; returns the tool's result (`page` and `effects`, or `error`).

        The call and its result stand in the next `get_messages_for_llm()`, as in the proxy.
        """
        arguments = {"page_id": page_id, "target_level": int(target_level)}
        return await self._vm_call(PAGE_FAULT, arguments)

    async def search_pages(
        self, query: str, modality: str | None = None, limit: int = 5
    ) -> dict[str, Any]:
        """Search the pages outside the window; returns the tool's result (`results`, or `error`)."""
        arguments: dict[str, Any] = {"query": query, "limit": limit}
        if modality is not None:
            arguments["modality"] = modality
        return await self._vm_call(SEARCH_PAGES, arguments)

    async def handle_tool_call(self, name: str, arguments: str) -> dict[str, Any]:
        """The result of a VM call as the model made it (`arguments` is its JSON text)."""
        if self.vm is None:
            return {"error": "This session has no virtual memory."}
        self._talk.request()  # there is a turn to answer in
        self._calls += 1
        function = {"name": name, "arguments": arguments}
        call = {"id": f"call_vm_{self._calls:04d}", "type": "function", "function": function}
        told = self._talk.vm_call(call) if name in (PAGE_FAULT, SEARCH_PAGES) else None
        if told is not None:
            content = told[0]["content"]
        elif self._talk.paged:
            content = error_result("No more pages in this turn; answer with what is loaded.")
        else:
            response = {"choices": [{"message": {"tool_calls": [call]}}]}
            results = await self.vm.process_response(response)
            assert isinstance(results, dict)
            content = results["tool_results"][0]["content"]
        result: dict[str, Any] = json.loads(content)
        return result

    async def _vm_call(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return await self.handle_tool_call(name, json.dumps(arguments))

    # -- the memory beside the conversation

    async def _remember(self, role: str, content: Any, metadata: dict[str, Any]) -> None:
        """While everything fits, pages are entered as they are said; then the turns enter them."""
        if self.vm is None:
            return
        state = self._talk.state
        if state is not None:
            if self.vm.page_table is not state.table:
                self.vm.adopt(state.table, self._talk.log)
        elif role == "user":
            page = await self.vm.add_user_message(content)
            page.metadata.update(metadata)
        elif role == "tool":
            await self.vm.add_tool_result(content)
        else:
            page = await self.vm.add_assistant_message(content)
            page.metadata.update(metadata)

    async def _load_page(self, page_id: str) -> MemoryPage | None:
        return self._talk.page(page_id)

    def _paged(self, messages: list[Message]) -> bool:
        """The turn has put its own rules in."""
        return any(_is_system(m) and "<VM:RULES>" in str(m.get("content")) for m in messages)

    def _vm_notice(self) -> Message:
        """The rules while every page is still in the window: the prefix stays the same until then."""
        policies = ManifestPolicies(max_faults_per_turn=_FAULTS_PER_TURN)
        passive = self.vm_mode is VMMode.PASSIVE
        manifest = "" if passive else ManifestBuilder(policies=policies).build().model_dump_json()
        text = build_vm_developer_message(
            self.vm_mode, manifest, "", max_faults_per_turn=_FAULTS_PER_TURN
        )
        return {"role": "system", "content": text}


def _is_system(message: Message) -> bool:
    return message.get("role") in ("system", "developer")


def _limits(config: WorkingSetConfig, mode: VMMode) -> Limits:
    """The proxy's bounds, in proportion to the window."""
    window = config.max_l0_tokens
    return Limits(
        working_set=config,
        window_tokens=window,
        window_known=True,
        mode=mode,
        model_takes_tools=True,
        developer_role="system",
        faults_per_turn=_FAULTS_PER_TURN,
        fault_tokens=max(64, window // _FAULT_SHARE),
        max_rounds=_MOST_ROUNDS,
        prefetch_pages=4,
        prefetch_tokens=max(64, min(2_048, window // 16)),
        manifest_tokens=max(64, min(1_024, window // 16)),
        page_tokens=max(64, min(2_048, window // _PAGE_SHARE)),
        search_results=10,
        snippet_tokens=64,
        segment_messages=512,
        max_claims=128,
    )
