"""Model families as strict readers: what a family's chat template lets its model read of a request.

Promises: `read` returns the text that reaches the model, in its order, without what the template drops
in silence; what the template or its server refuses is raised as `Refused` in their words. Transcribed
from the behaviour of the families' published templates; no line of theirs is here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
_ALTERNATE = "onversation roles must alternate user/assistant/user/assistant/..."


class Refused(Exception):
    """The words of the refusal."""


@dataclass(frozen=True)
class Family:
    """`tools`: its server takes the field and its template shows it; "mute": the template has no place
    for a call's result."""

    name: str
    model: str
    read: Callable[[Sequence[Message]], list[str]]
    tools: str = "yes"

    def reads(self, request: Message) -> str:
        tools = request.get("tools")
        if tools and self.tools == "no":
            raise Refused(f"registry.ollama.ai/library/{self.model} does not support tools")
        shown = [json.dumps(tools)] if tools else []
        return "\n".join(shown + self.read(request["messages"]))


def _text(message: Message) -> str:
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content)
    return f"{message['role']}: {content}" + json.dumps(message.get("tool_calls") or "")


def _first_system(messages: Sequence[Message]) -> tuple[list[str], Sequence[Message]]:
    if messages[0]["role"] in ("system", "developer"):
        return [_text(messages[0])], messages[1:]
    return [], messages


def _alternating(messages: Sequence[Message], words: str) -> None:
    for index, message in enumerate(messages):
        if (message["role"] == "user") != (index % 2 == 0):
            raise Refused(words)


def _known(messages: Sequence[Message], roles: Sequence[str], words: str) -> list[str]:
    if any(message["role"] not in roles for message in messages):
        raise Refused(words)
    return [_text(message) for message in messages]


def mistral(messages: Sequence[Message]) -> list[str]:
    """System first or never, of parts only the first; turns alternate, calls and results apart."""
    content = messages[0].get("content")
    head, rest = _first_system(messages)
    if head and isinstance(content, list):
        head = [content[0]["text"]]
    _alternating([m for m in rest if m["role"] != "tool" and not m.get("tool_calls")],
                 f"After the optional system message, c{_ALTERNATE}")
    for message in rest:
        for call_id in [message.get("tool_call_id"), *(c["id"] for c in message.get("tool_calls") or ())]:
            if call_id is not None and len(call_id) < 9:
                raise Refused(f"Tool call IDs should be alphanumeric strings with length >= 9! (1){call_id}")
    words = "Only user and assistant roles are supported, with the exception of an initial optional system message!"
    return head + _known(rest, ("user", "assistant", "tool"), words)


def mixtral(messages: Sequence[Message]) -> list[str]:
    """The first ones: no tools, every message counts in the alternation."""
    head, rest = _first_system(messages)
    _alternating(rest, f"After the optional system message, c{_ALTERNATE}")
    return head + _known(rest, ("user", "assistant"), "Only user and assistant roles are supported!")


def llama_2(messages: Sequence[Message]) -> list[str]:
    head, rest = _first_system(messages)
    _alternating(rest, f"C{_ALTERNATE}")
    return head + _known(rest, ("user", "assistant"), "Only user and assistant roles are supported!")


def gemma_2(messages: Sequence[Message]) -> list[str]:
    if messages[0]["role"] == "system":
        raise Refused("System role not supported")
    _alternating(messages, f"C{_ALTERNATE}")
    return [_text(message) for message in messages]


def gemma_3(messages: Sequence[Message]) -> list[str]:
    """The system message stands in front of the first user's; a result is no turn."""
    head, rest = _first_system(messages)
    _alternating(rest, f"C{_ALTERNATE}")
    return head + [_text(message) for message in rest]


def llama_3(messages: Sequence[Message]) -> list[str]:
    """Any role, but one call at once."""
    if any(len(m.get("tool_calls") or ()) > 1 for m in messages):
        raise Refused("This model only supports single tool-calls at once!")
    return [_text(message) for message in messages]


def qwen_2(messages: Sequence[Message]) -> list[str]:
    return _known(messages, ("system", "user", "assistant", "tool"), "Unexpected message role.")


def qwen_35(messages: Sequence[Message]) -> list[str]:
    if all(m["role"] != "user" for m in messages):
        raise Refused("No user query found in messages.")
    if any(m["role"] == "system" for m in messages[1:]):
        raise Refused("System message must be at the beginning.")
    return qwen_2(messages)


def gpt_oss(messages: Sequence[Message]) -> list[str]:
    """A later system message is dropped in silence."""
    head, rest = _first_system(messages)
    called = False
    for message in rest:
        if message["role"] == "tool" and not called:
            raise Refused("Message has tool role, but there was no previous assistant message with a tool call!")
        called = called or bool(message.get("tool_calls"))
    return head + [_text(m) for m in rest if m["role"] in ("user", "assistant", "tool")]


def smollm_3(messages: Sequence[Message]) -> list[str]:
    head, rest = _first_system(messages)
    return head + [_text(m) for m in rest if m["role"] in ("user", "assistant", "tool")]


def deepseek_r1(messages: Sequence[Message]) -> list[str]:
    """The last system message is the only one."""
    systems = [_text(m) for m in messages if m["role"] == "system"]
    return systems[-1:] + [_text(m) for m in messages if m["role"] in ("user", "assistant", "tool")]


def phi_3(messages: Sequence[Message]) -> list[str]:
    """Roles that it does not know are dropped in silence."""
    return [_text(m) for m in messages if m["role"] in ("system", "user", "assistant")]


def command_r(messages: Sequence[Message]) -> list[str]:
    """The first system message is the preamble; others are turns."""
    head, rest = _first_system(messages)
    return head + [_text(m) for m in rest if m["role"] in ("system", "user", "assistant", "tool")]


FAMILIES = (
    Family("mistral", "mistralai/Mistral-Small-3.1-24B-Instruct-2503", mistral),
    Family("mixtral", "mixtral:8x7b-instruct-v0.1-q4_0", mixtral, "mute"),
    Family("llama-2", "llama2:7b-chat", llama_2, "no"),
    Family("gemma-2", "gemma2:9b", gemma_2, "no"),
    Family("gemma-3", "google/gemma-3-12b-it", gemma_3, "mute"),
    Family("llama-3", "meta-llama/Llama-3.3-70B-Instruct", llama_3),
    Family("qwen-2.5", "Qwen/Qwen2.5-7B-Instruct", qwen_2),
    Family("qwen-3.5", "Qwen3.5-35B-A3B-Q4_K_M.gguf", qwen_35),
    Family("gpt-oss", "openai/gpt-oss-20b", gpt_oss),
    Family("smollm-3", "HuggingFaceTB/SmolLM3-3B", smollm_3),
    Family("deepseek-r1", "deepseek-r1:14b", deepseek_r1),
    Family("phi-3", "phi3:mini", phi_3, "no"),
    Family("command-r", "command-r7b:7b", command_r),
)
