"""The events of a response that is said piece by piece, as the Responses API streams it.

Promises: events are numbered from 0; one output item is open at a time and its text grows in it, so
`done` events repeat what was said; `fits_event` and `fits_response` raise ValidationError for what
the official `openai` package's models do not take.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, get_args

from openai.types.responses import Response, ResponseStreamEvent

Json = dict[str, Any]

_MODELS = {  # by the event's type: the package's union would try all of them
    get_args(model.model_fields["type"].annotation)[0]: model
    for model in get_args(get_args(ResponseStreamEvent)[0])
}
_TEXTS: dict[str, tuple[str, str, Json]] = {  # of a part or a call: its events, its key, more fields
    "output_text": ("output_text", "text", {"logprobs": []}),
    "refusal": ("refusal", "refusal", {}),
    "summary_text": ("reasoning_summary_text", "text", {}),
    "function_call": ("function_call_arguments", "arguments", {}),
    "custom_tool_call": ("custom_tool_call_input", "input", {}),
}
_PARTS = {  # of an item: where they stand, what their events are called
    "message": ("content", "content_part", "content_index"),
    "reasoning": ("summary", "reasoning_summary_part", "summary_index"),
}


def fits_event(event: Json) -> None:
    _MODELS[event["type"]].model_validate(event)


def fits_response(response: Json) -> None:
    Response.model_validate(response)


def text_of(item: Json) -> str:
    """What an item says: its first part's text, or a call's arguments."""
    holder = _holder(item)
    return "" if holder is None else str(holder[_TEXTS[holder["type"]][1]])


def empty_of(item: Json) -> Json:
    """The item before anything was said."""
    empty = copy.deepcopy(item)
    holder = _holder(empty)
    if holder is not None:
        holder[_TEXTS[holder["type"]][1]] = ""
    return empty


def _holder(item: Json) -> Json | None:
    """What has the item's text."""
    if item["type"] not in _PARTS:
        return item
    parts: list[Json] = item[_PARTS[item["type"]][0]]
    return parts[0] if parts else None


class ResponseEvents:
    """`output`: the items that are done."""

    def __init__(self) -> None:
        self.output: list[Json] = []
        self._made = 0
        self._item: Json = {}  # the open one

    def event(self, kind: str, **fields: Any) -> Json:
        """An event of any kind."""
        self._made += 1
        return {"type": kind, **fields, "sequence_number": self._made - 1}

    def begin(self, response: Json) -> Iterator[Json]:
        begun = {**response, "status": "in_progress", "incomplete_details": None, "output": [],
                 "usage": None}
        yield self.event("response.created", response=begun)
        yield self.event("response.in_progress", response=begun)

    def open(self, item: Json) -> Iterator[Json]:
        """An item with an empty text begins."""
        self._item = item
        added = {**item, "status": "in_progress"}
        part_of = _PARTS.get(item["type"])
        if part_of is not None:
            added[part_of[0]] = []
        yield self.event("response.output_item.added", output_index=len(self.output), item=added)
        holder = _holder(item)
        if part_of is not None and holder is not None:
            yield self.event(f"response.{part_of[1]}.added", **self._at(), part=dict(holder))

    def more(self, text: str) -> Json:
        """The open item goes on."""
        holder = _holder(self._item)
        assert holder is not None
        name, key, fields = _TEXTS[holder["type"]]
        holder[key] += text
        return self.event(f"response.{name}.delta", **self._at(), delta=text, **fields)

    def close(self) -> Iterator[Json]:
        """The open item is done."""
        item, holder = self._item, _holder(self._item)
        if holder is not None:
            name, key, fields = _TEXTS[holder["type"]]
            fields = fields | ({"name": item["name"]} if name == "function_call_arguments" else {})
            yield self.event(f"response.{name}.done", **self._at(), **{key: holder[key]}, **fields)
            if item["type"] in _PARTS:
                part = _PARTS[item["type"]][1]
                yield self.event(f"response.{part}.done", **self._at(), part=holder)
        yield self.event("response.output_item.done", output_index=len(self.output), item=item)
        self.output.append(item)

    def end(self, response: Json) -> Json:
        return self.event(f"response.{response['status']}", response=response)

    def _at(self) -> Json:
        at = {"item_id": self._item["id"], "output_index": len(self.output)}
        part_of = _PARTS.get(self._item["type"])
        return at if part_of is None else {**at, part_of[2]: 0}
