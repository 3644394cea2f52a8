"""A server that speaks Gemini's generateContent and streamGenerateContent.

Promises: strict where the real one is (contents begin with the user; no part is empty; a function
call stands directly after the user and before exactly as many responses, of the same ids; a call of
the newest step keeps the thought signature that it was given, or has the word that stands for one;
before Gemini 3 no function goes with JSON; no unknown field). Fields may be written in either case,
as protobuf's JSON has it.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tests.e2e.answers import Answer, Response
from tests.e2e.providers import (
    Call,
    Json,
    ProviderServer,
    Said,
    events_stream,
    json_response,
    pieces,
    tokens_of,
    unknown_keys,
)
from tests.e2e.recording import Recorded

_FIELDS = (
    "contents systemInstruction tools toolConfig safetySettings generationConfig cachedContent labels"
    " serviceTier"
).split()
_DATA = ("text", "inlineData", "fileData", "functionCall", "functionResponse")
_PART = (*_DATA, "thought", "thoughtSignature", "mediaResolution", "videoMetadata")
_DECLARATION = ("name", "description", "parameters", "parametersJsonSchema", "response", "behavior")
_GEMINI_3 = re.compile(r"/models/gemini-(?![12][.-])\d")  # and newer
_FREE = ("args", "response", "parameters", "parametersJsonSchema", "responseSchema", "responseJsonSchema")
_TOOLS = (
    "functionDeclarations googleSearch googleSearchRetrieval codeExecution urlContext googleMaps"
    " computerUse fileSearch"
).split()
_CONFIG = (
    "stopSequences responseMimeType responseSchema responseJsonSchema responseFormat responseModalities"
    " candidateCount maxOutputTokens temperature topP topK seed presencePenalty frequencyPenalty"
    " responseLogprobs logprobs enableEnhancedCivicAnswers speechConfig thinkingConfig imageConfig"
    " mediaResolution"
).split()
_STATUS = {400: "INVALID_ARGUMENT", 404: "NOT_FOUND", 429: "RESOURCE_EXHAUSTED", 503: "UNAVAILABLE"}
# Documented for calls that no Gemini 3 model has made; taken in place of a signature.
SKIPS_SIGNATURE = base64.b64encode(b"skip_thought_signature_validator").decode()


def camel(value: Any) -> Any:
    """Keys in camelCase down to a part's data; what a function takes or gives stays as it is."""
    if isinstance(value, list):
        return [camel(item) for item in value]
    if not isinstance(value, dict):
        return value
    out = {}
    for key, item in value.items():
        head, *rest = key.split("_")
        name = head + "".join(word.title() for word in rest)
        out[name] = item if name in _FREE else camel(item)
    return out


class GeminiServer(ProviderServer):
    """The model and the key's header are checked like the body."""

    def __init__(self) -> None:
        super().__init__()
        self.signed: dict[str, str] = {}  # signature -> name of the function called under it

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1beta"

    def is_chat(self, path: str) -> bool:
        name, _, method = path.partition(":")
        return name.startswith("/v1beta/models/") and method in (
            "generateContent",
            "streamGenerateContent",
        )

    def refuse(self, status: int, message: str, kind: str | None = None) -> Response:
        detail = {"code": status, "message": message, "status": kind or _STATUS.get(status, "INTERNAL")}
        return json_response({"error": detail}, status)

    def bodies(self) -> list[Json]:
        return [camel(call.json) for call in self.calls]

    # -- the rules

    def broken_rules(self, request: Recorded) -> list[str]:
        broken = [] if request.header("x-goog-api-key") else ["API key not found"]
        body = camel(request.json)
        if not isinstance(body, dict) or not body.get("contents"):
            return [*broken, "contents is not specified"]
        broken += unknown_keys("body", body, _FIELDS)
        config = body.get("generationConfig") or {}
        broken += unknown_keys("generationConfig", config, _CONFIG)
        for tool in body.get("tools") or ():
            broken += unknown_keys("tools", tool, _TOOLS)
            for made in tool.get("functionDeclarations") or ():
                broken += unknown_keys("functionDeclarations", made, _DECLARATION)
        contents = body["contents"]
        if contents[0].get("role") != "user":
            broken.append("Please ensure that multiturn requests begin with a user turn")
        for part in (body.get("systemInstruction") or {}).get("parts") or ():
            if not part.get("text"):
                broken.append("systemInstruction: required oneof field 'data' must have one initialized field")
        for i, content in enumerate(contents):
            broken += _content_rules(f"contents[{i}]", content)
            before = contents[i - 1] if i else {"parts": []}
            calls, results = _of(before, "functionCall"), _of(content, "functionResponse")
            if len(calls) != len(results):
                broken.append(
                    f"contents[{i}]: Please ensure that the number of function response parts is equal to"
                    " the number of function call parts of the function call turn."
                )
            elif sorted(map(_whose, calls)) != sorted(map(_whose, results)):
                broken.append(f"contents[{i}]: functionResponse names or ids differ from the calls'")
            if _of(content, "functionCall") and (not i or before["role"] != "user"):
                broken.append(
                    f"contents[{i}]: Please ensure that function call turn comes immediately after a user"
                    " turn or after a function response turn."
                )
        if _of(contents[-1], "functionCall"):
            broken.append("function call turn comes last")
        newer = _GEMINI_3.search(request.target) is not None
        if body.get("tools") and config.get("responseMimeType") == "application/json" and not newer:
            broken.append("Function calling with a response mime type: 'application/json' is unsupported")
        return broken + list(self._signature_rules(contents, needed=newer))

    def _signature_rules(self, contents: Sequence[Json], needed: bool) -> Iterator[str]:
        """In the steps since the user last spoke, the first call of each keeps its signature.
        `needed`: one that never had any needs the word that stands for one."""
        asked = [i for i, c in enumerate(contents) if c["role"] == "user" and not _of(c, "functionResponse")]
        spoke = max(asked, default=0)
        for i, content in enumerate(contents[spoke:], spoke):
            calls = [part for part in content["parts"] if "functionCall" in part]
            if not calls:
                continue
            name, signature = calls[0]["functionCall"]["name"], calls[0].get("thoughtSignature", "")
            lost = name in self.signed.values() and self.signed.get(signature) != name
            if lost or (needed and not signature):
                yield f"contents[{i}]: Function call is missing a thought_signature"

    # -- the answer

    def put(self, request: Recorded, said: Said) -> Answer:
        parts: list[Json] = []
        if said.thinking is not None:
            parts.append({"text": said.thinking, "thought": True})
        parts += [{"text": piece} for piece in pieces(said.text)]
        for i, call in enumerate(said.calls):
            parts.append(self._call(request, call, sign=i == 0 and said.thinking is not None))
        usage = {"promptTokenCount": tokens_of(request.json), "candidatesTokenCount": tokens_of(parts)}
        usage["totalTokenCount"] = sum(usage.values())
        head = {"modelVersion": "gemini-test", "responseId": f"r{request.index}"}
        stop = said.stop or "STOP"

        def response(parts: Sequence[Json], last: bool) -> Json:
            candidate: Json = {"index": 0, "content": {"role": "model", "parts": list(parts)}}
            if last:
                candidate["finishReason"] = stop
            return {**head, "candidates": [candidate], "usageMetadata": usage}

        if ":streamGenerateContent" in request.target:
            *first, end = [[part] for part in parts] or [[{"text": ""}]]
            events = [*(response(p, False) for p in first), response(end, True)]
            return events_stream(events, named=False)
        return json_response(response(parts, True))

    def _call(self, request: Recorded, call: Call, *, sign: bool) -> Json:
        part: Json = {"functionCall": {"name": call.name, "args": call.input}}
        if sign:
            seed = f"{request.index}{call.name}{call.input}".encode()
            signature = base64.b64encode(hashlib.sha256(seed).digest()).decode()
            self.signed[signature] = call.name
            part["thoughtSignature"] = signature
        return part


def _of(content: Json, kind: str) -> list[Json]:
    return [part[kind] for part in content.get("parts") or () if kind in part]


def _whose(called: Json) -> tuple[str, str]:
    return called["name"], called.get("id") or ""


def _content_rules(where: str, content: Json) -> Iterator[str]:
    yield from unknown_keys(where, content, ("role", "parts"))
    if content.get("role") not in ("user", "model"):
        yield f"{where}: Please use a valid role: user, model"
    if not content.get("parts"):
        yield f"{where}.parts must not be empty"
    for part in content.get("parts") or ():
        yield from unknown_keys(where, part, _PART)
        if sum(kind in part for kind in _DATA) != 1:
            yield f"{where}: a part must have one of the data fields: {sorted(part)}"
        if part in ({}, {"text": ""}):  # protobuf's JSON: nothing is set
            yield f"{where}.parts.data: required oneof field 'data' must have one initialized field"
        if not isinstance(part.get("functionCall", {}).get("args", {}), dict):
            yield f"{where}: functionCall.args is no object"
        for kind, role in (("functionCall", "model"), ("functionResponse", "user")):
            if kind in part and content.get("role") != role:
                yield f"{where}: {kind} in a {content.get('role')} turn"
