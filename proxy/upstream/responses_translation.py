"""Chat Completions requests in the words of OpenAI's Responses API, and its answers back. Pure.

Promises, of requests: the same conversation, tools and limits; what that API cannot express is not
dropped: `to_responses` says None and the request stays with Chat Completions. Left out are only `seed`
(which promises nothing), names on messages and keys of theirs that are not of the API's (it refuses
unknown ones), empty texts of the assistant's, and settings at their defaults.

Of answers: one choice; text, refusal, calls and citations of web pages in the order in which they came;
usage with cached and reasoning tokens, if there is one; a failed response is an error. Reasoning items
that led to tool calls stand under `reasoning_items` of the message, so that they come back with the
calls' results, in front of the very item that they preceded, or not at all: the API refuses one without
its follower, and one that it would have to look up. Those of a final answer have done their work.

By hand, because litellm's bridge keeps no encrypted reasoning and drops what it cannot say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from proxy.memory.models import SYSTEM_ROLES

Json = dict[str, Any]

REASONING: Final = "reasoning_items"  # our key on an assistant message: [{before, item}]
TEXT: Final = "message"  # `before` of an item that preceded the message's text
_ITEMS: Final = {"function": "function_call", "custom": "custom_tool_call"}
_ARGUMENTS: Final = {"function": "arguments", "custom": "input"}  # of a call, in both APIs
_LEAST_OUTPUT_TOKENS: Final = 16  # the API's own minimum
_NO_PARAMETERS: Final[Json] = {"type": "object", "properties": {}}
# Said in other words below, or only about the form of the answer.
_TRANSLATED: Final = frozenset(
    """
    messages tools tool_choice max_tokens max_completion_tokens reasoning_effort response_format verbosity stream_options
    store seed
    """.split()
)
# Settings that Responses does not have, with the values that mean nothing.
_WITHOUT: Final[Mapping[str, tuple[Any, ...]]] = {
    "n": (1,), "stop": ([],), "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},), "presence_penalty": (0,),
    "frequency_penalty": (0,), "prediction": (), "functions": ([],), "function_call": (), "web_search_options": (),
    "audio": (), "modalities": (["text"],),
}  # fmt: skip


class _Untranslatable(Exception):
    """Responses has no word for it."""


def to_responses(fields: Json) -> Json | None:
    """The body for /v1/responses; None when it cannot say what the request says."""
    try:
        return _request(fields)
    except (_Untranslatable, KeyError, TypeError, AttributeError):
        return None  # also a malformed request: upstream shall say so itself


def _request(fields: Json) -> Json:
    body: Json = {}
    for name, value in fields.items():
        if name in _WITHOUT:
            if value is not None and value not in _WITHOUT[name]:
                raise _Untranslatable(name)
        elif name not in _TRANSLATED and value is not None:
            body[name] = value
    body["input"] = list(_items(fields["messages"]))
    body["store"] = bool(fields.get("store"))
    body["include"] = ["reasoning.encrypted_content"]
    tokens = fields.get("max_completion_tokens") or fields.get("max_tokens")
    if tokens is not None:
        body["max_output_tokens"] = max(tokens, _LEAST_OUTPUT_TOKENS)
    if (effort := fields.get("reasoning_effort")) is not None:
        body["reasoning"] = {**(body.get("reasoning") or {}), "effort": effort}
    if (form := fields.get("response_format")) is not None:
        body["text"] = {"format": {"type": form["type"], **(form.get("json_schema") or {})}}
    if (verbosity := fields.get("verbosity")) is not None:
        body["text"] = {**body.get("text", {}), "verbosity": verbosity}
    if fields.get("tools"):
        body["tools"] = [_tool(tool) for tool in fields["tools"]]
    if (choice := fields.get("tool_choice")) is not None:
        body["tool_choice"] = _tool_choice(choice)
    obfuscation = (fields.get("stream_options") or {}).get("include_obfuscation")
    if obfuscation is not None:
        body["stream_options"] = {"include_obfuscation": obfuscation}
    return body


def _tool(tool: Json) -> Json:
    if tool["type"] == "function":
        said = tool["function"]
        # Chat Completions means "not strict" where Responses means "strict".
        return {
            "type": "function", **said, "parameters": said.get("parameters") or _NO_PARAMETERS,
            "strict": bool(said.get("strict")),
        }  # fmt: skip
    if tool["type"] == "custom":
        said = tool["custom"]
        form = said.get("format")
        if form is not None and form["type"] == "grammar":
            form = {"type": "grammar", **form["grammar"]}
        return {"type": "custom", **said, **({} if form is None else {"format": form})}
    raise _Untranslatable(tool["type"])


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, str):
        return choice
    if choice["type"] == "allowed_tools":
        allowed = choice["allowed_tools"]
        tools = [_tool_choice(tool) for tool in allowed["tools"]]
        return {"type": "allowed_tools", "mode": allowed["mode"], "tools": tools}
    return {"type": choice["type"], "name": choice[choice["type"]]["name"]}


def _items(messages: Sequence[Json]) -> Iterator[Json]:
    custom: set[str] = set()  # ids of calls of custom tools: their results have their own type
    for message in messages:
        role = message["role"]
        if role == "assistant":
            yield from _assistant_items(message)
            calls = message.get("tool_calls") or ()
            custom.update(call["id"] for call in calls if call.get("type") == "custom")
        elif role == "tool":
            call_id, output = message["tool_call_id"], _content(message.get("content"))
            kind = _ITEMS["custom" if call_id in custom else "function"]
            yield {"type": f"{kind}_output", "call_id": call_id, "output": output}
        elif role in ("user", *SYSTEM_ROLES):
            yield {"type": "message", "role": role, "content": _content(message.get("content"))}
        else:
            raise _Untranslatable(role)


def _content(content: Any) -> Any:
    """Input content: a text, or parts."""
    if content is None or isinstance(content, str):
        return content or ""
    return [_part(part) for part in content]


def _part(part: Json) -> Json:
    kind = part["type"]
    kept = {k: part[k] for k in ("prompt_cache_breakpoint",) if k in part}
    if kind == "text":
        return {"type": "input_text", "text": part["text"], **kept}
    if kind == "image_url":
        image = part["image_url"]
        image = {"url": image} if isinstance(image, str) else image
        detail = image.get("detail") or "auto"
        return {"type": "input_image", "image_url": image["url"], "detail": detail, **kept}
    if kind == "file":
        known = ("file_id", "file_data", "filename")
        return {"type": "input_file", **{k: v for k, v in part["file"].items() if k in known}, **kept}
    raise _Untranslatable(kind)


def _assistant_items(message: Json) -> Iterator[Json]:
    """The message's text and calls, each behind the reasoning that led to it."""
    if message.get("audio") or message.get("function_call"):
        raise _Untranslatable("audio or function_call")
    before: dict[str, list[Json]] = {}
    for entry in message.get(REASONING) or ():
        before.setdefault(entry["before"], []).append(entry)
    parts = list(_output_parts(message))
    if parts:
        yield from (entry["item"] for entry in before.get(TEXT, ()))
        plain = len(parts) == 1 and parts[0]["type"] == "output_text"
        content = parts[0]["text"] if plain else parts
        phase = {"phase": message["phase"]} if message.get("phase") else {}
        yield {"type": "message", "role": "assistant", "content": content, **phase}
    for call in message.get("tool_calls") or ():
        yield from (entry["item"] for entry in before.get(call["id"], ()))
        yield _call_item(call)


def _output_parts(message: Json) -> Iterator[Json]:
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    for part in content or ():
        if part["type"] == "text" and part["text"]:
            yield {"type": "output_text", "text": part["text"]}
        elif part["type"] == "refusal":
            yield {"type": "refusal", "refusal": part["refusal"]}
    if message.get("refusal"):
        yield {"type": "refusal", "refusal": message["refusal"]}


def _call_item(call: Json) -> Json:
    kind = "custom" if call.get("type") == "custom" else "function"
    key, said = _ARGUMENTS[kind], call[kind]
    return {"type": _ITEMS[kind], "call_id": call["id"], "name": said["name"], key: said[key]}


# ---------------------------------------------------------------- answers

_CALLS: Final = {item: kind for kind, item in _ITEMS.items()}
_REASONS: Final = {"max_output_tokens": "length", "content_filter": "content_filter"}
_STATUS: Final = {"rate_limit_exceeded": 429, "server_error": 500, "vector_store_timeout": 504}
_DELTAS: Final = {
    "response.output_text.delta": "content",
    "response.refusal.delta": "refusal",
    "response.reasoning_summary_text.delta": "reasoning_content",
}
_CITED: Final = "url_citation"
_BETWEEN: Final = "\n\n"  # between two messages of one response


def failure(response: Json) -> tuple[int, Json] | None:
    """Status and error body of a response that failed; None: it did not."""
    if response.get("status") != "failed" and not response.get("error"):
        return None
    error = response.get("error") or {}
    code = error.get("code")
    status = _STATUS.get(str(code), 500 if code is None else 400)
    kind = "invalid_request_error" if status == 400 else "server_error"
    return status, _error_body({"type": kind, **error})


def _error_body(error: Json) -> Json:
    """Upstream's error in OpenAI's shape."""
    message, kind = error.get("message") or "The response failed.", error.get("type") or "server_error"
    said = {"message": str(message), "type": kind, "param": error.get("param"), "code": error.get("code")}
    return {"error": said}


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
        elif kind in _DELTAS:
            yield self._chunk({_DELTAS[kind]: event["delta"]})
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
            # OpenAI's servers nest it, their reference does not.
            yield _error_body(event.get("error") or {**event, "type": None})

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
