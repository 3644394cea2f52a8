"""SessionManager: a conversation with virtual memory, for programs without the proxy in between.

Promises: without `enable_vm` the messages are the plain history; with it a request never exceeds the
window less its reserve, and is what the proxy would send for the same history. While everything fits,
the messages stand as they were said, behind rules that stay the same (as long as these fit, too).
No model is called here: the program calls it, with `get_messages_for_llm()` and `get_tools()`.
"""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

from proxy.library.manager import DEFAULT_MODEL, MemoryManager, Message
from proxy.memory.eviction import EvictionPolicy
from proxy.memory.levels import CompressorRegistry
from proxy.memory.manifest import ManifestBuilder, ManifestPolicies
from proxy.memory.models import SYSTEM_ROLES, VMMode
from proxy.memory.vm_tools import build_vm_developer_message, get_vm_tools_as_dicts
from proxy.memory.working_set import WorkingSetConfig
from proxy.tokens import get_counter

MAX_SESSION_ID_CHARS = 256
_NO_VM = {"error": "This session has no virtual memory."}


class SessionManager:
    """One conversation. `session_id` names it (default: a random one, 1 to 256 characters).

    The `vm_*` options only mean something with `enable_vm`: see `MemoryManager`. `model` says how
    tokens are counted. `vm` is the session's MemoryManager, None without VM.
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
        self,
        tool_name: str,
        arguments: dict[str, Any] | None = None,
        result: Any = None,
        error: str | None = None,
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
            first = next((i for i, m in enumerate(messages) if not _is_system(m)), len(messages))
            return list(messages[first:])
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


def _is_system(message: Message) -> bool:
    return message.get("role") in SYSTEM_ROLES
