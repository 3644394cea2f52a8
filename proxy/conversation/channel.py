"""Chooses how a request that needs paging reaches its pages. Pure.

`tools`: the model may call the VM tools. `passive`: it may not (the client forbids or forces a tool,
wants several choices or log probabilities, or uses what tools cannot go with: a grammar for the answer,
say), so pages are brought
in before the call. The tools array stays the same in both wherever the API allows it, because it is
part of the cached prefix.

A VM tool is known by what its called name means, whatever stands around it (`functions.page_fault`,
`PageFault_tool`, `page_fault<|channel|>commentary`); a name that is a client's tool, or nearer to one,
is the client's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import msgspec

from proxy.conversation.limits import Limits
from proxy.memory.models import VMMode
from proxy.memory.vm_tools import PAGE_FAULT, SEARCH_PAGES, get_vm_tools_as_dicts
from proxy.tokens import TokenCounter

MAX_TOOLS = 128  # OpenAI's limit for one request
TOOLS, PASSIVE = "tools", "passive"
_MAX_NAME_CHARS = 200  # of a called name that is looked into
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_A-Za-z]+|\d+")
# Gemini's own tools, by their keys: function tools cannot stand beside them.
_ALONE = frozenset(
    ("codeExecution", "code_execution", "enterpriseWebSearch", "googleMaps", "googleSearch",
     "googleSearchRetrieval", "google_search", "urlContext", "url_context")
)  # fmt: skip
# A field that holds the answer to a grammar, whatever the server calls it (llama.cpp's grammar and
# json_schema, vLLM's guided_* and structured_outputs, SGLang's regex and ebnf): calls do not obey it.
_CONSTRAINS = re.compile(r"grammar|ebnf|regex|guided|structur|schema|constrain")


@dataclass(frozen=True, slots=True)
class Channel:
    """`offer`: the model may call VM tools; `listed`: they are in the tools array.

    `names` maps page_fault and search_pages to what they are called beside this client's tools, whose
    names are `client`. `client_calls`: the client can take a call.
    """

    name: str
    listed: bool
    names: Mapping[str, str]
    client: frozenset[str] = frozenset()
    client_calls: bool = False

    @property
    def offer(self) -> bool:
        return self.name == TOOLS

    def tool(self, called: object) -> str | None:
        """The VM tool that a called name means: page_fault, search_pages, or None."""
        if not isinstance(called, str) or called in self.client or len(called) > _MAX_NAME_CHARS:
            return None
        found, length = None, max((_spelled(called, own) for own in self.client), default=0)
        for tool, name in self.names.items():
            if (own := _spelled(called, name)) > length:
                found, length = tool, own
        return found


def _words(name: str) -> list[str]:
    return [word.casefold() for word in _WORD.findall(name)]


def _spelled(called: str, name: str) -> int:
    """How many letters of `name` stand in a called name, as whole words and in one piece; 0: not all."""
    letters, words = "".join(_words(name)), _words(called)
    for first in range(len(words)):
        joined = ""
        for word in words[first:]:
            joined += word
            if joined == letters:
                return len(letters)
            if not letters.startswith(joined):
                break
    return 0


def choose_channel(fields: Mapping[str, Any], limits: Limits) -> Channel:
    """`fields` are the request's decoded top-level fields."""
    tools = fields.get("tools") or []
    client = client_names(tools)
    names = vm_names(client)
    functions = fields.get("functions")
    if isinstance(functions, list):
        client |= client_names([{"function": function} for function in functions])
    takes = bool(tools or functions)
    choice = fields.get("tool_choice")
    without = (
        limits.mode is VMMode.PASSIVE
        or not (limits.model_takes_tools and limits.calls)
        or any(fields.get(key) for key in ("functions", "function_call", "prediction"))
        or fields.get("web_search_options") is not None
        or (fields.get("n") or 1) != 1
        or len(tools) + len(names) > MAX_TOOLS
        or choice == "required"
        or (bool(fields.get("logprobs")) and bool(tools) and choice in (None, "auto"))
        or (not limits.tools_with_json and wants_json(fields))
        or any(_CONSTRAINS.search(key) and fields[key] for key in fields)
        or any(fields.get(key) for key in limits.not_with_tools)
        or any(isinstance(tool, dict) and not _ALONE.isdisjoint(tool) for tool in tools)
    )
    if without:
        return Channel(PASSIVE, False, names, client, takes)
    if choice in (None, "auto") and not fields.get("logprobs"):
        return Channel(TOOLS, True, names, client, takes)
    return Channel(PASSIVE, True, names, client, takes)


def unlisted(channel: Channel) -> Channel:
    """The same conversation without the VM tools."""
    return replace(channel, name=PASSIVE, listed=False)


def wants_json(fields: Mapping[str, Any]) -> bool:
    """The answer has to be JSON."""
    wanted = fields.get("response_format")
    return isinstance(wanted, dict) and wanted.get("type", "text") != "text"


def vm_names(client: Iterable[str] = ()) -> dict[str, str]:
    """The VM tools' names, prefixed until no tool of the client is called so, in any spelling."""
    taken = {"".join(_words(name)) for name in client}
    names: dict[str, str] = {}
    for tool in (PAGE_FAULT, SEARCH_PAGES):
        name = tool
        while taken and "".join(_words(name)) in taken:
            name = f"vm_{name}"
        names[tool] = name
    return names


def client_names(tools: Any) -> frozenset[str]:
    """What the client's own tools are called."""
    found = [tool for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
    bodies = (tool.get("function") or tool.get("custom") for tool in found)
    names = (body.get("name") for body in bodies if isinstance(body, dict))
    return frozenset(name for name in names if isinstance(name, str))


def tools_array(client: bytes | None, channel: Channel) -> bytes | None:
    """The upstream tools array: the client's own bytes, then the VM tools in fixed order."""
    if not channel.listed:
        return client
    vm = _vm_array(*channel.names.values())
    inner = (client or b"").strip()
    inner = inner[1:-1].strip() if inner.startswith(b"[") else b""
    return b"[" + inner + b"," + vm[1:] if inner else vm


def vm_tools_tokens(channel: Channel, counter: TokenCounter) -> int:
    """What listing the VM tools costs."""
    return _vm_tokens(counter, *channel.names.values()) if channel.listed else 0


@lru_cache(maxsize=64)
def _vm_array(page_fault: str, search_pages: str) -> bytes:
    names = {PAGE_FAULT: page_fault, SEARCH_PAGES: search_pages}
    return msgspec.json.encode(get_vm_tools_as_dicts(names=names))


@lru_cache(maxsize=64)
def _vm_tokens(counter: TokenCounter, page_fault: str, search_pages: str) -> int:
    return counter.tools(msgspec.json.decode(_vm_array(page_fault, search_pages)))
