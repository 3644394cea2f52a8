"""What a tools array costs.

Promises: OpenAI's published rule (the cookbook's num_tokens_for_tools) for its models, carried on
into nested schemas so that no word of one is left out; for other providers the JSON itself, which
is what their chat templates render. Nothing raises on odd schemas; recursion is bounded.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec

from proxy.tokens.names import plain_name

Text = Callable[[str], int]

PER_TOOLS = 12  # the namespace around a tools array ("func_end")
PER_TOOL = 8  # around the JSON of one
PROP_INIT = 3
PROP_KEY = 3
ENUM_INIT = -3
ENUM_ITEM = 3
_MAX_DEPTH = 24  # a schema nested deeper is counted as its JSON
_BRANCHES = ("anyOf", "oneOf", "allOf", "prefixItems")
_DEFINITIONS = ("$defs", "definitions")
# Read by the rule itself, or rendered as a mark ("?") or not at all.
_STRUCTURE = frozenset(
    """
    type description properties items enum required additionalProperties $schema $id $ref title
    strict nullable
    """.split()
) | {*_BRANCHES, *_DEFINITIONS}


@dataclass(frozen=True, slots=True)
class ToolRule:
    """`published`: OpenAI's rule, else JSON; `overhead`: tokens around any tools array."""

    name: str
    published: bool
    overhead: int = PER_TOOLS


OPENAI = ToolRule("", True)
JSON = ToolRule("json-tools", False)
# Anthropic puts a system prompt of its own before the tools (tool_choice auto: 346 tokens).
CLAUDE = ToolRule("claude-tools", False, 346)
_OPENAI_MODELS = ("gpt-*", "chatgpt-*", "o[1-9]", "o[1-9]-*", "computer-use-*", "codex-*")


@lru_cache(maxsize=1024)
def tool_rule(model: str) -> ToolRule:
    """The rule of a model's provider, by the model's name."""
    name = plain_name(model)
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in _OPENAI_MODELS):
        return OPENAI
    return CLAUDE if "claude" in name else JSON


def count_tools(tools: Sequence[Any], rule: ToolRule, func_init: int, text: Text) -> int:
    """Tokens of a tools array (also of legacy functions, and of any JSON values in the prompt)."""
    if not tools:
        return 0
    total, overhead = 0, PER_TOOLS
    for tool in tools:
        function = _function(tool)
        if function is not None:
            overhead = rule.overhead
        if function is None or not rule.published:
            total += PER_TOOL + text(compact(tool))
        else:
            total += func_init + _function_tokens(function, text)
    return total + overhead


def compact(value: Any) -> str:
    """JSON without spaces; Python's own spelling of what JSON cannot say."""
    try:
        return msgspec.json.encode(value).decode()
    except (TypeError, ValueError):
        return str(value)


def _function(tool: Any) -> Mapping[str, Any] | None:
    """What the model is shown of a tool: a function's or a custom tool's own object."""
    if not isinstance(tool, Mapping):
        return None
    for key in ("function", "custom"):
        inner = tool.get(key)
        if isinstance(inner, Mapping) and isinstance(inner.get("name"), str):
            return inner
    legacy = isinstance(tool.get("name"), str) and "parameters" in tool
    return tool if legacy else None


def _function_tokens(function: Mapping[str, Any], text: Text) -> int:
    total = text(f"{function['name']}:{_words(function)}")
    total += _schema(function.get("parameters"), text, 0)
    rest = {
        key: value
        for key, value in function.items()
        if key not in ("name", "description", "parameters", "strict", "type")
    }
    return total + (text(compact(rest)) if rest else 0)


def _schema(schema: Any, text: Text, depth: int) -> int:
    """What a schema holds beside its own name, type and description."""
    if not isinstance(schema, Mapping):
        return 0
    if depth >= _MAX_DEPTH:
        return text(compact(schema))
    total = 0
    for key in ("properties", *_DEFINITIONS):
        inner = schema.get(key)
        if isinstance(inner, Mapping) and inner:
            total += PROP_INIT
            total += sum(_property(str(k), prop, text, depth + 1) for k, prop in inner.items())
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), Mapping):
            total += _inner(schema[key], text, depth + 1)
    for key in _BRANCHES:
        inner = schema.get(key)
        for branch in inner if isinstance(inner, list) else ():
            total += 1 + _inner(branch, text, depth + 1)  # and the stroke between two
    total += _enum(schema.get("enum"), text)
    rest = {key: value for key, value in schema.items() if key not in _STRUCTURE}
    return total + (text(compact(rest)) if rest else 0)


def _property(key: str, prop: Any, text: Text, depth: int) -> int:
    if not isinstance(prop, Mapping):
        return PROP_KEY + text(f"{key}:{compact(prop)}")
    line = f"{key}:{_kind(prop)}:{_words(prop)}"
    return PROP_KEY + text(line) + _schema(prop, text, depth)


def _inner(schema: Any, text: Text, depth: int) -> int:
    """A schema without a name: an array's items, one of several alternatives."""
    if not isinstance(schema, Mapping):
        return text(compact(schema))
    return text(f"{_kind(schema)}:{_words(schema)}") + _schema(schema, text, depth)


def _enum(items: Any, text: Text) -> int:
    if not isinstance(items, list):
        return 0
    total = ENUM_INIT
    for item in items:  # a number stands without quotation marks
        total += ENUM_ITEM + text(item) if isinstance(item, str) else 1 + text(compact(item))
    return max(0, total)


def _kind(schema: Mapping[str, Any]) -> str:
    kind = schema.get("type", schema.get("$ref", ""))
    return "|".join(map(str, kind)) if isinstance(kind, list) else str(kind)


def _words(schema: Mapping[str, Any]) -> str:
    return str(schema.get("description") or "").removesuffix(".")
