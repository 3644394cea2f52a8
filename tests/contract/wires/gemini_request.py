"""A request to Gemini in OpenAI's words, and what its protocol keeps of OpenAI's messages.

Promises: pure; nothing of a request's contents, settings, tools and choices is left out; a signature
stands in `extra_content`, where Google's own OpenAI-compatible endpoint has it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.contract.wires import Json, parsed
from tests.e2e.providers.gemini import SKIPS_SIGNATURE

_CHOICES = {"AUTO": "auto", "VALIDATED": "auto", "ANY": "required", "NONE": "none"}
_DEFAULT_TEMPERATURE = 1.0
_CONFIG = {"temperature": "temperature", "topP": "top_p", "topK": "top_k", "seed": "seed",
           "candidateCount": "n", "maxOutputTokens": "max_tokens", "stopSequences": "stop",
           "frequencyPenalty": "frequency_penalty", "presencePenalty": "presence_penalty",
           "responseLogprobs": "logprobs", "logprobs": "top_logprobs"}
_TIERS = {"standard": "default", "priority": "auto"}
_ROLES = {"developer": "system"}
_SIGNED_ID = "__thought__"  # litellm hides a call's signature behind its id


def in_openais_words(target: str, body: Json) -> Json:
    """A request. `target`: its path, which names the model and the method; `body`: keys in camelCase."""
    model, _, method = target.partition("?")[0].rpartition("/")[2].partition(":")
    out: Json = {"model": model, "messages": list(_messages(body))}
    out |= _settings(body.get("generationConfig") or {})
    tools = [made for tool in body.get("tools") or () for made in _tools(tool)]
    if tools:
        out["tools"] = tools
    if any("googleSearch" in tool for tool in body.get("tools") or ()):
        out["web_search_options"] = {}
    choice = (body.get("toolConfig") or {}).get("functionCallingConfig")
    if choice:
        out["tool_choice"] = _choice(choice)
    if "serviceTier" in body:
        out["service_tier"] = _TIERS.get(body["serviceTier"], body["serviceTier"])
    out["stream"] = method == "streamGenerateContent"
    if out["stream"]:  # usage is always said
        out["stream_options"] = {"include_usage": True}
    return out


def _settings(config: Json) -> Json:
    out = {_CONFIG[name]: value for name, value in config.items() if name in _CONFIG}
    if out.get("temperature") == _DEFAULT_TEMPERATURE:  # some releases of litellm say it for Gemini 3
        del out["temperature"]
    if "thinkingLevel" in (config.get("thinkingConfig") or {}):
        out["reasoning_effort"] = config["thinkingConfig"]["thinkingLevel"]
    if "responseModalities" in config:
        out["modalities"] = [name.lower() for name in config["responseModalities"]]
    schema = config.get("responseJsonSchema") or config.get("responseSchema")
    if schema:
        out["response_format"] = {"type": "json_schema", "schema": schema}
    elif "responseMimeType" in config:
        json_only = config["responseMimeType"] == "application/json"
        out["response_format"] = {"type": "json_object" if json_only else "text"}
    return out


def _tools(tool: Json) -> Iterator[Json]:
    for made in tool.get("functionDeclarations") or ():
        schema = {"parameters": made["parametersJsonSchema"]} if "parametersJsonSchema" in made else {}
        kept = {key: made[key] for key in ("name", "description", "parameters") if key in made}
        yield {"type": "function", "function": {**kept, **schema}}


def _choice(config: Json) -> Any:
    names = config.get("allowedFunctionNames") or ()
    named = [{"type": "function", "function": {"name": name}} for name in names]
    if len(named) == 1:
        return named[0]
    mode = _CHOICES[config["mode"]]
    if named:
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}
    return mode


def _messages(body: Json) -> Iterator[Json]:
    for part in (body.get("systemInstruction") or {}).get("parts") or ():
        yield {"role": "system", "content": part["text"]}
    for content in body.get("contents") or ():
        model = content.get("role") == "model"
        yield from [_model(content["parts"])] if model else _user(content["parts"])


def _model(parts: Sequence[Json]) -> Json:
    """Texts become one message, each a part where there are several."""
    texts = [part for part in parts if "text" in part and not part.get("thought")]
    out: Json = {"role": "assistant", "content": None}
    if len(texts) == 1:
        out["content"] = texts[0]["text"]
    elif texts:
        out["content"] = [{"type": "text", "text": part["text"]} for part in texts]
    out |= _extra(texts[0]) if texts else {}
    thoughts = [part for part in parts if part.get("thought")]
    if thoughts:
        out["reasoning_content"] = "".join(part["text"] for part in thoughts)
    signed = [part for part in thoughts if "thoughtSignature" in part]
    if signed:
        out["thinking_blocks"] = [
            {"type": "thinking", "thinking": part["text"], "signature": part["thoughtSignature"]}
            for part in signed
        ]
    called = [part for part in parts if "functionCall" in part]
    calls = [_call(part) for part in called if "id" in part["functionCall"]]
    if calls:
        out["tool_calls"] = calls
    elif called:  # litellm sends the ids of tool calls: this is a legacy one
        out["function_call"] = _function(called[0])
    return out


def _call(part: Json) -> Json:
    return {"id": part["functionCall"]["id"], "type": "function", "function": _function(part),
            **_extra(part)}


def _function(part: Json) -> Json:
    made = part["functionCall"]
    return {"name": made["name"], "arguments": json.dumps(made.get("args") or {})}


def _extra(part: Json) -> Json:
    signature = part.get("thoughtSignature")
    if not signature or signature == SKIPS_SIGNATURE:
        return {}
    return {"extra_content": {"google": {"thought_signature": signature}}}


def _user(parts: Sequence[Json]) -> Iterator[Json]:
    """Results first, each a message; then each text, or all texts with the media beside them."""
    for result in [part["functionResponse"] for part in parts if "functionResponse" in part]:
        said = result["response"]
        text = said["content"] if set(said) == {"content"} else json.dumps(said)
        if "id" in result:
            yield {"role": "tool", "tool_call_id": result["id"], "content": text}
        else:
            yield {"role": "function", "name": result["name"], "content": text}
    rest = [part for part in parts if "functionResponse" not in part]
    if all("text" in part for part in rest):
        yield from ({"role": "user", "content": part["text"]} for part in rest)
    elif rest:
        yield {"role": "user", "content": [_part(part) for part in rest]}


def _part(part: Json) -> Json:
    if "text" in part:
        return {"type": "text", "text": part["text"]}
    if "fileData" in part:
        return {"type": "file", "file": {"file_id": part["fileData"]["fileUri"]}}
    kind, data = part["inlineData"]["mimeType"], part["inlineData"]["data"]
    if kind.startswith("audio/"):
        sound = {"format": kind.removeprefix("audio/"), "data": data}
        return {"type": "input_audio", "input_audio": sound}
    url = f"data:{kind};base64,{data}"
    if not kind.startswith("image/"):
        return {"type": "file", "file": {"file_data": url}}
    level = (part.get("mediaResolution") or {}).get("level")
    detail = {"detail": level.rpartition("_")[2].lower()} if level else {}
    return {"type": "image_url", "image_url": {"url": url, **detail}}


# ---------------------------------------------------------------- as the protocol keeps them


def plain(call: Mapping[str, Any]) -> Json:
    made = call["function"]
    out = {"id": _plain_id(call.get("id")), "type": "function",
           "function": {"name": made["name"], "arguments": parsed(made["arguments"])}}
    if call.get("extra_content"):
        out["extra_content"] = call["extra_content"]
    return out


def _plain_id(id: str | None) -> str | None:
    return None if id is None else id.partition(_SIGNED_ID)[0]


def flat(messages: Sequence[Mapping[str, Any]]) -> Iterator[Json]:
    """One item per thought, text, medium, call and result, whoever's message it stood in, with its
    signature; a refusal is a text, and empty texts, names and unknown keys are not kept."""
    for message in messages:
        role, content = _ROLES.get(message["role"], message["role"]), message.get("content")
        if role in ("tool", "function"):
            text = content if isinstance(content, str) else "".join(p["text"] for p in content or ())
            id = {"id": _plain_id(message["tool_call_id"])} if role == "tool" else {}
            yield {"role": role, **id, "text": text}
            continue
        if message.get("reasoning_content"):
            yield {"role": role, "thought": message["reasoning_content"]}
        if signed(message):
            yield {"role": role, **signed(message)}
        content = content or message.get("refusal")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or ()
        for part in parts:
            text = part.get(part["type"]) if part["type"] in ("text", "refusal") else None
            if text is None:
                yield {"role": role, "part": part["type"]}
            elif text.strip():
                yield {"role": role, "text": text}
        for call in message.get("tool_calls") or ():
            made = plain(call)
            body = made["function"]
            yield {"role": role, "id": made["id"], "name": body["name"], "input": body["arguments"],
                   **signed(made)}
        if message.get("function_call"):
            body = message["function_call"]
            yield {"role": role, "name": body["name"], "input": parsed(body["arguments"])}


def signed(said: Mapping[str, Any]) -> Json:
    signature = ((said.get("extra_content") or {}).get("google") or {}).get("thought_signature")
    return {"thoughtSignature": signature} if signature else {}
