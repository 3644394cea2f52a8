"""Gemini's generateContent and streamGenerateContent as the script's wire.

Promises: requests are judged by the rules of `tests.e2e.providers.gemini`; system instructions,
texts, media, calls, results, thoughts and generation settings are told in OpenAI's words; answers,
streams and errors come back in Gemini's, streams as live as the script's (a call is said whole, as
Gemini says it).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from tests.contract.wires import Json, Pieces, ProviderWire, parsed
from tests.contract.wires.absences import GEMINI
from tests.contract.wires.gemini_request import flat, in_openais_words, plain, signed
from tests.e2e.providers.gemini import GeminiServer, camel
from tests.e2e.recording import Recorded

_STOPS = {"stop": "STOP", "length": "MAX_TOKENS", "tool_calls": "STOP", "function_call": "STOP",
          "content_filter": "SAFETY"}


class GeminiWire(ProviderWire):
    """A model behind `gemini/`, as litellm asks for it."""

    name = "gemini"
    absent = GEMINI

    def __init__(self) -> None:
        self._judge = GeminiServer()  # never started: its rules

    def is_chat(self, recorded: Recorded) -> bool:
        return self._judge.is_chat(recorded.target.partition("?")[0])

    def broken_rules(self, recorded: Recorded) -> list[str]:
        return self._judge.broken_rules(recorded)

    # -- heard

    def heard(self, recorded: Recorded) -> Any:
        body = camel(recorded.json)
        return in_openais_words(recorded.target, body) if isinstance(body, dict) else body

    def field(self, name: str, value: Any) -> tuple[str, Any]:
        """In the words of `heard`, where Gemini has others than OpenAI."""
        if name == "stop" and isinstance(value, str):
            return name, [value]
        if name == "max_completion_tokens":
            return "max_tokens", value
        if name == "stream":
            return name, bool(value)
        if name == "web_search_options":  # Google's search has none
            return name, {}
        if name == "functions" and value is not None:
            return "tools", [{"type": "function", "function": made} for made in value]
        if name == "tool_choice" and isinstance(value, dict):
            named = (value.get("allowed_tools") or {}).get("tools") or ()
            return name, named[0] if len(named) == 1 else value
        if name == "function_call" and isinstance(value, dict):
            return "tool_choice", {"type": "function", "function": value}
        if name == "response_format" and value is not None:
            schema = (value.get("json_schema") or {}).get("schema")
            return name, {"type": "json_schema", "schema": schema} if schema else value
        return super().field(name, value)

    def key(self, recorded: Recorded) -> str | None:
        return recorded.header("x-goog-api-key")

    def calls(self, calls: Sequence[Json] | None) -> list[Json] | None:
        """Arguments are objects here; a signature stands in `extra_content` and nowhere else."""
        return None if calls is None else [plain(call) for call in calls]

    def messages(self, messages: Sequence[Json]) -> list[Json]:
        return list(flat(messages))

    # -- said

    def whole(self, recorded: Recorded, body: Json) -> Json:
        candidates = [
            _candidate(choice["index"], list(_parts(choice["message"])), choice)
            for choice in body.get("choices") or ()
        ]
        return {**_head(body), "candidates": candidates, "usageMetadata": _usage(body.get("usage"))}

    def refusal(self, status: int, error: Json) -> Json:
        made: Json = json.loads(self._judge.refuse(status, error["message"]).body)
        return made

    def pieces(self, recorded: Recorded) -> Pieces:
        return _Pieces()


class _Pieces(Pieces):
    """Each text at once; a call when it is whole; why it stopped with the bill."""

    def __init__(self) -> None:
        self._head: Json = {}
        self._calls: dict[int, dict[int, Json]] = {}  # by choice: what came of each call
        self._ends: list[Json] = []  # candidates that have stopped, not said yet
        self._usage: Json = {}

    def event(self, data: str) -> bytes:
        if data == "[DONE]":
            return self._end()
        chunk = json.loads(data)
        if chunk.get("error"):
            detail = {"code": 503, "message": chunk["error"]["message"], "status": "UNAVAILABLE"}
            return _event({"error": detail})
        self._head = _head(chunk)
        self._usage = chunk.get("usage") or self._usage
        out = [made for choice in chunk.get("choices") or () for made in self._choice(choice)]
        if not chunk.get("choices"):
            out.append(self._end())
        return b"".join(out)

    def _choice(self, choice: Json) -> Iterator[bytes]:
        index, delta = choice.get("index") or 0, choice.get("delta") or {}
        waiting = self._calls.setdefault(index, {})
        parts = list(_parts({**delta, "tool_calls": None, "function_call": None}))
        legacy = delta.get("function_call")
        pieces = [{"index": 0, "function": legacy}] if legacy else delta.get("tool_calls") or ()
        for piece in pieces:
            if piece["index"] not in waiting:
                parts += _called(waiting.values())
                waiting.clear()
            _grow(waiting.setdefault(piece["index"], {}), piece)
        if choice.get("finish_reason"):
            parts += _called(waiting.values())
            self._ends.append(_candidate(index, parts or [{"text": ""}], choice))
        elif parts or delta.get("annotations"):
            said = {**self._head, "candidates": [_candidate(index, parts or [{"text": ""}], choice)]}
            yield _event({**said, "usageMetadata": _usage(self._usage)} if self._usage else said)

    def _end(self) -> bytes:
        ends, self._ends = self._ends, []
        if not ends:
            return b""
        return _event({**self._head, "candidates": ends, "usageMetadata": _usage(self._usage)})


def _event(payload: Json) -> bytes:
    """One event, its lines as Google's servers end them."""
    return f"data: {json.dumps(payload)}\r\n\r\n".encode()


def _head(body: Json) -> Json:
    return {"modelVersion": body.get("model"), "responseId": body.get("id")}


def _candidate(index: int, parts: list[Json], choice: Json) -> Json:
    out: Json = {"index": index, "content": {"role": "model", "parts": parts}}
    if choice.get("finish_reason"):
        out["finishReason"] = _STOPS.get(choice["finish_reason"], choice["finish_reason"])
    said = choice.get("message") or choice.get("delta") or {}
    if said.get("annotations"):
        out["groundingMetadata"] = _grounding(said["annotations"])
    tokens = (choice.get("logprobs") or {}).get("content")
    if tokens:
        chosen = [{"token": t["token"], "logProbability": t["logprob"]} for t in tokens]
        tops = [
            {"candidates": [{"token": t["token"], "logProbability": t["logprob"]}
                            for t in token["top_logprobs"]]}
            for token in tokens
        ]
        out["logprobsResult"] = {"chosenCandidates": chosen, "topCandidates": tops}
    return out


def _grounding(annotations: Sequence[Json]) -> Json:
    cited = [annotation["url_citation"] for annotation in annotations]
    return {
        "groundingChunks": [{"web": {"uri": one["url"], "title": one["title"]}} for one in cited],
        "groundingSupports": [
            {"segment": {"startIndex": one["start_index"], "endIndex": one["end_index"]},
             "groundingChunkIndices": [place]}
            for place, one in enumerate(cited)
        ],
    }


def _parts(message: Json) -> Iterator[Json]:
    """The parts of a message or of a delta."""
    for block in message.get("thinking_blocks") or ():
        if block["type"] == "thinking":
            thought = {"text": block["thinking"], "thought": True}
            yield {**thought, "thoughtSignature": block["signature"]}
    if message.get("reasoning_content"):
        yield {"text": message["reasoning_content"], "thought": True}
    if message.get("content") or signed(message):
        yield {"text": message.get("content") or "", **signed(message)}
    if message.get("audio"):
        yield {"inlineData": {"mimeType": "audio/wav", "data": message["audio"]["data"]}}
    yield from _called(message.get("tool_calls") or ())
    if message.get("function_call"):
        yield from _called([{"function": message["function_call"]}])


def _called(calls: Any) -> Iterator[Json]:
    for call in calls:
        made = call["function"]
        written = made["arguments"]
        said = {"name": made["name"], "args": parsed(written) if isinstance(written, str) else written}
        if call.get("id"):
            said["id"] = call["id"]
        yield {"functionCall": said, **signed(call)}


def _grow(call: Json, piece: Json) -> None:
    """Adds a delta to a call."""
    made = call.setdefault("function", {"name": "", "arguments": ""})
    more = piece.get("function") or {}
    made["name"] = more.get("name") or made["name"]
    made["arguments"] += more.get("arguments") or ""
    call |= {k: v for k, v in piece.items() if k not in ("index", "function") and v is not None}


def _usage(usage: Json | None) -> Json:
    """What was thought is billed beside the candidates."""
    usage = usage or {}
    prompt, said = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    thought = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    out = {"promptTokenCount": prompt, "candidatesTokenCount": said - thought,
           "thoughtsTokenCount": thought, "totalTokenCount": prompt + said}
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return {**out, "cachedContentTokenCount": cached} if cached else out
