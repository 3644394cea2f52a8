"""A Responses answer, whole or streamed, as Chat Completions writes it. Pure.

Promises: one choice; text, refusal, calls and citations of web pages in the order in which they came;
usage with cached and reasoning tokens, if there is one; a failed response is an error. Reasoning items
that led to tool calls stand under `reasoning_items` of the message, so that they come back with the
calls' results; those of a final answer have done their work and are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from proxy.upstream.responses_request import REASONING, TEXT

Json = dict[str, Any]

_CALLS: Final = {"function_call": "function", "custom_tool_call": "custom"}
_ARGUMENTS: Final = {"function": "arguments", "custom": "input"}  # of a call, in both APIs
_REASONS: Final = {"max_output_tokens": "length", "content_filter": "content_filter"}
_STATUS: Final = {"rate_limit_exceeded": 429, "server_error": 500, "vector_store_timeout": 504}
_CITED: Final = "url_citation"
_BETWEEN: Final = "\n\n"  # between two messages of one response


def failure(response: Json) -> tuple[int, Json] | None:
    """Status and error body of a response that failed; None: it did not."""
    if response.get("status") != "failed" and not response.get("error"):
        return None
    error = response.get("error") or {}
    code = error.get("code")
    status = _STATUS.get(str(code), 500 if code is None else 400)
    return status, error_body(error.get("message"), code, None, status)


def error_body(
    message: Any, code: Any, param: Any, status: int = 500, kind: str | None = None
) -> Json:
    """An error in OpenAI's shape. `kind`: its type, if upstream says one."""
    kind = kind or ("invalid_request_error" if status == 400 else "server_error")
    said = str(message or "The response failed.")
    return {"error": {"message": said, "type": kind, "param": param, "code": code}}


def to_chat(response: Json) -> Json:
    """A whole response as a chat completion. KeyError, TypeError, AttributeError: it is none."""
    texts: list[str] = []
    refusals: list[str] = []
    summaries: list[str] = []
    notes: list[Json] = []
    calls: list[Json] = []
    reasoning = _Reasoning()
    message: Json = {"role": "assistant", "content": None, "refusal": None}
    for item in response["output"]:
        kind = item.get("type")
        reasoning.follow(item)
        if kind == "reasoning":
            summaries += [part.get("text") or "" for part in item.get("summary") or ()]
            reasoning.add(item)
        elif kind == "message":
            if item.get("phase"):
                message.setdefault("phase", item["phase"])
            parts = item.get("content") or ()
            said = [p["text"] for p in parts if p.get("type") == "output_text"]
            refused = [p["refusal"] for p in parts if p.get("type") == "refusal"]
            if said or not refused:  # who only refuses has no content, not an empty one
                texts.append("".join(said))
            refusals += refused
            notes += [note for p in parts for a in p.get("annotations") or () for note in _citation(a)]
        elif kind in _CALLS:
            calls.append(_call(item))
    if texts and (any(texts) or not calls):
        message["content"] = _BETWEEN.join(texts)
    message["refusal"] = "".join(refusals) or None
    if summaries:
        message["reasoning_content"] = _BETWEEN.join(summaries)
    if notes:
        message["annotations"] = notes
    if calls:
        message["tool_calls"] = calls
        message.update(reasoning.delta())
    choice = {"index": 0, "message": message, "logprobs": None}
    choice["finish_reason"] = finish_reason(response, bool(calls))
    whole: Json = {**identity(response), "object": "chat.completion", "choices": [choice]}
    billed = usage(response)
    return whole if billed is None else {**whole, "usage": billed}


def identity(response: Json) -> Json:
    """What all of an answer's chunks share."""
    same = {
        "id": "chatcmpl-" + str(response.get("id") or "").removeprefix("resp_"),
        "created": int(response.get("created_at") or 0),
        "model": response.get("model") or "",
    }
    if response.get("service_tier"):
        same["service_tier"] = response["service_tier"]
    return same


def finish_reason(response: Json, called: bool) -> str:
    """Why the answer ended, in Chat Completions' words."""
    if response.get("status") == "incomplete":
        reason = (response.get("incomplete_details") or {}).get("reason")
        return _REASONS.get(str(reason), "length")
    return "tool_calls" if called else "stop"


def usage(response: Json) -> Json | None:
    """Tokens, in Chat Completions' words."""
    said = response.get("usage")
    if not said:
        return None
    return {
        "prompt_tokens": said.get("input_tokens") or 0,
        "completion_tokens": said.get("output_tokens") or 0,
        "total_tokens": said.get("total_tokens") or 0,
        "prompt_tokens_details": {"cached_tokens": 0, **(said.get("input_tokens_details") or {})},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            **(said.get("output_tokens_details") or {}),
        },
    }


def _call(item: Json) -> Json:
    kind = _CALLS[item["type"]]
    key = _ARGUMENTS[kind]
    return {
        "id": item["call_id"],
        "type": kind,
        kind: {"name": item["name"], key: item.get(key) or ""},
    }


def _citation(annotation: Json) -> list[Json]:
    """Of a page on the web; Chat Completions has no other kind, and nothing that others could be."""
    if annotation.get("type") != _CITED:
        return []
    return [{"type": _CITED, _CITED: {k: v for k, v in annotation.items() if k != "type"}}]


class _Reasoning:
    """Reasoning items, each with the text or call that follows it: none is valid without."""

    def __init__(self) -> None:
        self._open: list[Json] = []
        self._known: list[Json] = []

    def add(self, item: Json) -> None:
        """A whole reasoning item; one without its content could only be looked up, and is not kept."""
        if item.get("encrypted_content"):
            self._open.append({k: v for k, v in item.items() if k != "status"})

    def follow(self, item: Json) -> None:
        """An item begins; what was open led to it."""
        kind = item.get("type")
        if kind == "reasoning":
            return
        if kind == "message" or kind in _CALLS:
            before = TEXT if kind == "message" else item["call_id"]
            self._known += [{"before": before, "item": reasoned} for reasoned in self._open]
        self._open = []

    def delta(self) -> Json:
        """The key for a message that calls tools; what was given is not given again."""
        known, self._known = self._known, []
        return {REASONING: known} if known else {}


class ChatStream:
    """Responses events in, chat completion chunks out. `ended`: the answer is complete."""

    def __init__(self, include_usage: bool) -> None:
        self.ended = False
        self._include_usage = include_usage
        self._identity: Json = identity({})
        self._calls: dict[Any, tuple[int, str]] = {}  # output index -> (index, kind)
        self._with_arguments: set[Any] = set()
        self._messages = 0
        self._reasoning = _Reasoning()

    def feed(self, event: Json) -> Iterator[Json]:
        """The chunks of one event; an error is a body with `error`."""
        kind = str(event.get("type") or "")
        if kind == "response.created":
            self._identity = identity(event["response"])
            yield self._chunk({"role": "assistant", "content": None})
        elif kind == "response.output_text.delta":
            yield self._chunk({"content": event["delta"]})
        elif kind == "response.refusal.delta":
            yield self._chunk({"refusal": event["delta"]})
        elif kind == "response.reasoning_summary_text.delta":
            yield self._chunk({"reasoning_content": event["delta"]})
        elif kind == "response.output_text.annotation.added":
            notes = _citation(event["annotation"])
            if notes:
                yield self._chunk({"annotations": notes})
        elif kind == "response.output_item.added":
            yield from self._begin(event)
        elif kind.endswith((".function_call_arguments.delta", ".custom_tool_call_input.delta")):
            yield from self._arguments(event, event["delta"])
        elif kind == "response.output_item.done":
            yield from self._done(event)
        elif kind in ("response.completed", "response.incomplete"):
            yield from self._end(event["response"])
        elif kind == "response.failed":
            failed = failure({**event["response"], "status": "failed"})
            if failed is not None:
                yield failed[1]
        elif kind == "error":
            inside = event.get("error") or {}  # OpenAI's servers nest it, their reference does not
            said = inside or event
            body = said.get("message"), said.get("code"), said.get("param")
            yield error_body(*body, kind=inside.get("type"))

    def _begin(self, event: Json) -> Iterator[Json]:
        item = event["item"]
        self._reasoning.follow(item)
        if item["type"] == "message":
            self._messages += 1
            if self._messages > 1:
                yield self._chunk({"content": _BETWEEN})
            elif item.get("phase"):
                yield self._chunk({"phase": item["phase"]})
        elif item["type"] in _CALLS:
            kind = _CALLS[item["type"]]
            index = len(self._calls)
            self._calls[event["output_index"]] = index, kind
            opened = _call({**item, _ARGUMENTS[kind]: ""})
            calls = {"tool_calls": [{"index": index, **opened}]}
            yield self._chunk({**self._reasoning.delta(), **calls})

    def _arguments(self, event: Json, text: str) -> Iterator[Json]:
        index, kind = self._calls[event["output_index"]]
        self._with_arguments.add(event["output_index"])
        yield self._chunk({"tool_calls": [{"index": index, kind: {_ARGUMENTS[kind]: text}}]})

    def _done(self, event: Json) -> Iterator[Json]:
        item = event["item"]
        if item["type"] == "reasoning":
            self._reasoning.add(item)
        elif item["type"] in _CALLS and event["output_index"] not in self._with_arguments:
            text = item.get(_ARGUMENTS[_CALLS[item["type"]]])
            if text:  # a server that does not stream them
                yield from self._arguments(event, text)

    def _end(self, response: Json) -> Iterator[Json]:
        self.ended = True
        if response.get("service_tier"):  # only now the one that served it
            self._identity = {**self._identity, "service_tier": response["service_tier"]}
        yield self._chunk({}, finish_reason(response, bool(self._calls)))
        if self._include_usage:
            yield {**self._chunk({}), "choices": [], "usage": usage(response)}

    def _chunk(self, delta: Json, finish: str | None = None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        head = {**self._identity, "object": "chat.completion.chunk"}
        more = {"usage": None} if self._include_usage else {}
        return {**head, "choices": [choice], **more}
