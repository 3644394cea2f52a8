"""OpenAI's Responses API as the script's wire: what `models.<name>.bridge: responses` speaks.

Promises: requests are judged by the rules of `tests.e2e.providers.responses`, but that a field which
neither of OpenAI's APIs knows is another server's own and passes; input items, tools and settings are
told in Chat Completions' words; answers, streams and errors in them come back in Responses', streams
as live as the script's, each event one that the official package takes. A request that Responses
cannot express comes to /chat/completions, where nothing is put into other words.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from openai.types.chat.completion_create_params import CompletionCreateParamsBase
from openai.types.responses.response_create_params import ResponseCreateParamsBase

from tests.contract.wires import ABSENT, Json, Pieces, Wire, in_pieces, sse
from tests.contract.wires.absences import RESPONSES
from tests.contract.wires.responses_request import flat, in_chats_words, tool_of
from tests.e2e.answers import Answer, Response, Stream
from tests.e2e.providers.responses import ResponsesServer, response_of
from tests.e2e.providers.responses_events import ResponseEvents, fits_event, fits_response
from tests.e2e.recording import Recorded

_ITEMS = {"function": ("function_call", "arguments"), "custom": ("custom_tool_call", "input")}
_REASONS = {"length": "max_output_tokens", "content_filter": "content_filter"}
_KNOWN = {*CompletionCreateParamsBase.__annotations__, *ResponseCreateParamsBase.__annotations__, "stream"}
_TOOL_KEYS = ("type", "name", "description", "parameters", "strict", "format")


class ResponsesWire(Wire):
    """A model whose chat requests come to /responses, and the others to /chat/completions."""

    name = "responses"
    absent = RESPONSES
    verbatim = False
    verbatim_errors = True

    def __init__(self) -> None:
        self._judge = ResponsesServer()  # never started: its rules and the reasoning that it gave

    def is_chat(self, recorded: Recorded) -> bool:
        """A request of a client's own to /responses is none of the bridge's, which lists items."""
        if super().is_chat(recorded):
            return True
        return _bridged(recorded) and isinstance((_asked(recorded) or {}).get("input"), list)

    def broken_rules(self, recorded: Recorded) -> list[str]:
        if not _bridged(recorded):
            return super().broken_rules(recorded)
        return self._judge.broken_rules(replace(recorded, json=_openais(recorded.json)))

    # -- heard

    def heard(self, recorded: Recorded) -> Any:
        return in_chats_words(recorded.json) if _bridged(recorded) else recorded.json

    def field(self, name: str, value: Any) -> tuple[str, Any]:
        return {"max_tokens": "max_completion_tokens"}.get(name, name), ABSENT if value is None else value

    def tools(self, tools: Sequence[Json]) -> list[Json]:
        return [tool_of(tool) for tool in tools]

    def messages(self, messages: Sequence[Json]) -> list[Json]:
        return list(flat(messages))

    def prompt(self, recorded: Recorded) -> str:
        if not _bridged(recorded):
            return super().prompt(recorded)
        return json.dumps(_asked(recorded)["input"])[:-1]

    def usage(self, usage: Json) -> Json:
        """With the details that the API knows."""
        said = _usage(usage)
        return {
            **{key: usage[key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")},
            "prompt_tokens_details": said["input_tokens_details"],
            "completion_tokens_details": said["output_tokens_details"],
        }

    # -- said

    def said(self, recorded: Recorded, reply: Answer) -> Answer:
        if not _bridged(recorded):
            return reply
        if isinstance(reply, Stream) and reply.status == 200 and _is_events(reply):
            return Stream(list(in_pieces(_Pieces(self, recorded), reply.steps)), 200, reply.headers)
        if not isinstance(reply, Response) or reply.status != 200:
            return reply
        body = json.loads(reply.body)
        if "choices" not in body:
            return reply
        return Response(json.dumps(self._whole(recorded, body)).encode(), 200, reply.headers)

    def _whole(self, recorded: Recorded, body: Json) -> Json:
        choice = body["choices"][0]
        output = list(_output(recorded, choice["message"]))
        self.gave(output)
        made = response(recorded, output, choice["finish_reason"], body, body.get("usage"))
        fits_response(made)
        return made

    def gave(self, output: Sequence[Json]) -> None:
        """What was reasoned may come back."""
        self._judge.reasoned |= {item["id"]: item for item in output if "encrypted_content" in item}


def _bridged(recorded: Recorded) -> bool:
    path = recorded.target.partition("?")[0]
    return recorded.method == "POST" and path.endswith("/responses")


def _asked(recorded: Recorded) -> Any:
    return json.loads(recorded.body)


def _is_events(reply: Stream) -> bool:
    return any(value.startswith(b"text/event-stream") for _, value in reply.headers)


def _openais(body: Json) -> Json:
    """The request without the fields, and the tools without the keys, that OpenAI does not know."""
    out = {name: value for name, value in body.items() if name in _KNOWN}
    if "tools" in out:
        out["tools"] = [{k: v for k, v in tool.items() if k in _TOOL_KEYS} for tool in out["tools"]]
    return out


# ---------------------------------------------------------------- an answer in Responses' words


def response(
    recorded: Recorded, output: Sequence[Json], finish: str | None, head: Json, usage: Json | None
) -> Json:
    """The whole object. `finish`: in Chat Completions' words; `head`: what has model and date."""
    stop = _REASONS.get(finish or "")
    made = response_of(replace(recorded, json=_asked(recorded)), output, stop, _usage(usage or {}))
    said = {"model": head["model"], "created_at": head["created"]}
    tier = {"service_tier": head["service_tier"]} if "service_tier" in head else {}
    return {**made, **said, **tier, **({} if usage else {"usage": None})}


def _usage(usage: Json) -> Json:
    read, thought = usage.get("prompt_tokens_details") or {}, usage.get("completion_tokens_details") or {}
    return {
        "input_tokens": usage.get("prompt_tokens"),
        "input_tokens_details": {"cached_tokens": read.get("cached_tokens", 0), "cache_write_tokens": 0},
        "output_tokens": usage.get("completion_tokens"),
        "output_tokens_details": {"reasoning_tokens": thought.get("reasoning_tokens", 0)},
        "total_tokens": usage.get("total_tokens"),
    }


def _output(recorded: Recorded, message: Json) -> Iterator[Json]:
    """The output items of a message, in the order in which a stream would open them."""
    if message.get("reasoning_content"):
        item = _reasoning(recorded, 0)
        item["summary"][0]["text"] = message["reasoning_content"]
        yield item
    calls = message.get("tool_calls") or ()
    if message.get("content") or message.get("refusal") or not calls:
        parts = [{**_part(kind), key: message[name]} for kind, key, name in _PARTS if message.get(name)]
        yield {**_message(recorded, 1, "output_text"), "content": parts or [_part("output_text")]}
    for place, call in enumerate(calls, start=2):
        kind, key = _ITEMS["custom" if "custom" in call else "function"]
        yield {**_call(recorded, place, call), key: call[kind.partition("_")[0]][key]}


_PARTS = (("output_text", "text", "content"), ("refusal", "refusal", "refusal"))


def _part(kind: str) -> Json:
    if kind == "refusal":
        return {"type": kind, "refusal": ""}
    return {"type": kind, "text": "", "annotations": [], "logprobs": []}


def _message(recorded: Recorded, place: int, kind: str) -> Json:
    return {"type": "message", "id": f"msg_{recorded.index}_{place}", "role": "assistant",
            "status": "completed", "content": [_part(kind)]}


def _reasoning(recorded: Recorded, place: int) -> Json:
    """What comes back has to be what was given: `ResponsesServer` compares it."""
    item: Json = {"type": "reasoning", "id": f"rs_{recorded.index}_{place}",
                  "summary": [{"type": "summary_text", "text": ""}]}
    if _asked(recorded).get("include"):
        item["encrypted_content"] = f"gAAAA{recorded.index}.{place}"
    return item


def _call(recorded: Recorded, place: int, call: Mapping[str, Any]) -> Json:
    """A call that has no arguments yet."""
    made = "custom" if "custom" in call else "function"
    kind, key = _ITEMS[made]
    return {"type": kind, "id": f"fc_{recorded.index}_{place}", "call_id": call["id"],
            "name": call[made]["name"], key: "", "status": "completed"}


class _Pieces(Pieces):
    """Opens and closes output items as the chunks' deltas need it."""

    def __init__(self, wire: ResponsesWire, recorded: Recorded) -> None:
        self._wire, self._recorded = wire, recorded
        self._events = ResponseEvents()
        self._head: Json = {}
        self._open: object = None  # a part's kind, or a call's index
        self._finish: str | None = None
        self._usage: Json | None = None

    def event(self, data: str) -> bytes:
        made = list(self._end() if data == "[DONE]" else self._chunk(json.loads(data)))
        for one in made:
            if one["type"] != "error":  # the package's type is flat, as the reference has it
                fits_event(one)
        return b"".join(sse(one, one["type"]) for one in made)

    def _chunk(self, chunk: Json) -> Iterator[Json]:
        if chunk.get("error"):
            # nested as OpenAI's servers say it: https://github.com/openai/openai-dotnet/issues/881
            yield self._events.event("error", error=chunk["error"])
            return
        if not self._head:
            self._head = chunk
            yield from self._events.begin(response(self._recorded, [], None, chunk, None))
        self._usage = chunk.get("usage") or self._usage
        for choice in (chunk.get("choices") or ())[:1]:
            yield from self._delta(choice.get("delta") or {})
            self._finish = choice.get("finish_reason") or self._finish

    def _delta(self, delta: Json) -> Iterator[Json]:
        place = len(self._events.output) + 1
        if delta.get("reasoning_content"):
            yield from self._begin("reasoning", lambda: _reasoning(self._recorded, place))
            yield self._events.more(delta["reasoning_content"])
        for kind, _, name in _PARTS:
            if delta.get(name):
                yield from self._begin(kind, lambda kind=kind: _message(self._recorded, place, kind))
                yield self._events.more(delta[name])
        for call in delta.get("tool_calls") or ():
            made = "custom" if "custom" in call else "function"
            said = call[made].get(_ITEMS[made][1])
            yield from self._begin(call["index"], lambda call=call: _call(self._recorded, place, call))
            if said:
                yield self._events.more(said)

    def _begin(self, what: object, make: Any) -> Iterator[Json]:
        if self._open != what:
            yield from self._close()
            self._open = what
            yield from self._events.open(make())

    def _close(self) -> Iterator[Json]:
        if self._open is not None:
            self._open = None
            yield from self._events.close()
            self._wire.gave(self._events.output[-1:])

    def _end(self) -> Iterator[Json]:
        """Without a reason why it ended the answer is not complete."""
        yield from self._close()
        if self._finish is None:
            return
        if not self._events.output:
            yield from self._events.open(_message(self._recorded, 1, "output_text"))
            yield from self._events.close()
        output = self._events.output
        yield self._events.end(response(self._recorded, output, self._finish, self._head, self._usage))
