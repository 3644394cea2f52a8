"""Writes what goes upstream and what goes back, changing only what has to change. Pure.

Promises: every field that is not ours keeps the client's bytes and place; a response keeps the
upstream's fields; several rounds look like one. A spoken answer goes by its id while upstream keeps it,
then by the words that came with it; an id whose answer was never seen here stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from proxy.conversation.bill import Account, usage_of
from proxy.conversation.body import Fields
from proxy.conversation.effects import Said
from proxy.conversation.records import GetRecord
from proxy.conversation.tree import Node
from proxy.memory.context import CONTEXT_CLOSE

_decode, _encode = msgspec.json.decode, msgspec.json.encode
_raw_fields = msgspec.json.Decoder(Fields).decode
LEAST_ANSWER_TOKENS = 64  # a later round may say so much, or all that the client allowed if less



def request_body(fields: Fields, order: Sequence[str], messages: bytes, changed: Mapping[str, bytes | None]) -> bytes:
    """The client's body with other messages and with `changed` fields (None: left out)."""
    before, after = around_messages(fields, order, changed)
    return before + messages + after


def around_messages(fields: Fields, order: Sequence[str], changed: Mapping[str, bytes | None]) -> tuple[bytes, bytes]:
    """Of that body what stands before and behind the messages array."""
    pieces: list[bytes] = []
    before = b""
    for name in order:
        if name == "messages":
            before = b"".join([piece + b"," for piece in pieces])
            pieces = []
            continue
        if name in changed:
            value = changed[name]
        else:
            value = bytes(fields[name])
        if value is not None:
            pieces.append(_encode(name) + b":" + value)
    for name, value in changed.items():
        if name not in fields and value is not None:
            pieces.append(_encode(name) + b":" + value)
    return b"{" + before + b'"messages":', b"".join([b"," + piece for piece in pieces]) + b"}"


def answer_limits(decoded: Mapping[str, Any]) -> dict[str, int]:
    """How many tokens the client lets the answer have, by the field that says so."""
    found = ((name, decoded.get(name)) for name in ("max_completion_tokens", "max_tokens") if name in decoded)
    return {name: limit for name, limit in found if type(limit) is int and limit > 0}


def answer_budget(decoded: Mapping[str, Any], spent_tokens: int) -> dict[str, bytes | None]:
    """The client's limit for its answer, less what earlier rounds took of it: the fields to change.

    One limit holds for all rounds, so that memory does not make an answer dearer than the client
    allowed; but the answer itself never gets less than `LEAST_ANSWER_TOKENS` of it.
    """
    return {
        name: b"%d" % max(limit - spent_tokens, min(limit, LEAST_ANSWER_TOKENS))
        for name, limit in answer_limits(decoded).items()
    }


def spent_tokens(responses: Iterable[Said], count: Callable[[dict[str, Any]], int]) -> int:
    """Tokens that the model has made in these rounds: upstream's count, else ours."""
    total = 0
    for said in responses:
        billed = (said.usage or {}).get("completion_tokens")
        if isinstance(billed, int):
            total += billed
        elif said.messages:
            total += count(said.messages[0])
    return total


def shown_messages(said: Said, client: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answer as the client receives it: without VM calls. `client` are its own calls."""
    if said.shown is not None:
        return [said.shown]
    if len(said.messages) > 1 or not said.messages[0].get("tool_calls"):
        return said.messages
    message = {k: v for k, v in said.messages[0].items() if k != "tool_calls"}
    return [{**message, "tool_calls": list(client)} if client else message]


def stream_options(decoded: Mapping[str, Any]) -> dict[str, bytes | None]:
    """The client's stream options with usage asked for, as the field to change."""
    options = decoded.get("stream_options")
    options = options if isinstance(options, dict) else {}
    if options.get("include_usage") is True:
        return {}
    return {"stream_options": _encode({**options, "include_usage": True})}


def is_cut(call: Mapping[str, Any]) -> bool:
    """A call whose arguments ended in the middle: they are no JSON object."""
    arguments = (call.get("function") or {}).get("arguments")
    if not isinstance(arguments, str | bytes) or not arguments:
        return False
    try:
        return not isinstance(msgspec.json.decode(arguments), dict)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return True


def with_context(message: dict[str, Any], block: str) -> dict[str, Any]:
    """A user message with a <VM:CONTEXT> block in front of the user's own text."""
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": [{"type": "text", "text": block}, *content]}
    return {**message, "content": f"{block}\n\n{content or ''}"}


def without_context(message: dict[str, Any]) -> dict[str, Any]:
    """A message as it was before `with_context`. No line of a block can close it."""
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": content[1:]}
    return {**message, "content": str(content).partition(f"{CONTEXT_CLOSE}\n\n")[2]}


def as_input(message: dict[str, Any]) -> dict[str, Any]:
    """An answer as a request may carry it: without the null and empty fields of a response, each
    call with its type and its arguments as text, which some servers leave out or send as an object."""
    kept = {k: v for k, v in message.items() if v is not None and v != []}
    kept.pop("index", None)
    if isinstance(kept.get("tool_calls"), list):
        kept["tool_calls"] = [_call_as_input(call) for call in kept["tool_calls"]]
    kept.setdefault("role", "assistant")
    if "content" not in kept:
        kept["content"] = None if kept.get("tool_calls") or kept.get("function_call") else ""
    return kept


def _call_as_input(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    body = call.get("function")
    if isinstance(body, dict) and not isinstance(body.get("arguments"), str):
        text = _encode(body.get("arguments") or {}).decode()
        call = {**call, "function": {**body, "arguments": text}}
    return call if call.get("type") else {**call, "type": "custom" if "custom" in call else "function"}


def total_usage(
    usages: Sequence[Mapping[str, Any] | None], faults: int, account: Account | None = None
) -> dict[str, Any] | None:
    """One usage for the rounds of a paged turn.

    `prompt_tokens` is the last round's (clients use it as a gauge), `completion_tokens` the sum;
    what all rounds were billed stands in `vm`, with what the conversation was by now and would have been
    otherwise (`account`): whole numbers of a fixed few names, which clients can add up. None when
    upstream gave none.
    """
    known = [usage for usage in usages if usage]
    if not known:
        return None
    told = [one for usage in known if (one := usage_of(usage, 0.0)) is not None]
    last = dict(known[-1])
    if len(known) > 1:
        last["completion_tokens"] = completion = sum(int(u.get("completion_tokens") or 0) for u in known)
        last["total_tokens"] = int(last.get("prompt_tokens") or 0) + completion
    last["vm"] = {
        "rounds": len(usages), "faults": faults, "prompt_tokens": sum(one.prompt for one in told),
        "cached_tokens": sum(one.cached or 0 for one in told), "written_tokens": sum(one.written for one in told),
        "completion_tokens": sum(one.completion for one in told),
    }  # fmt: skip
    if account is not None:
        names = ("conversation", "sliding_window", "full_history")
        last["vm"] |= {f"{n}_billed_tokens": t for n, t in zip(names, account.billed, strict=True)}
    return last


def with_usage(body: bytes, usage: Mapping[str, Any]) -> bytes:
    """A response with another usage, every other field as upstream wrote it."""
    fields = _raw_fields(body)
    fields["usage"] = msgspec.Raw(_encode(usage))
    return b"{" + b",".join(_encode(name) + b":" + value for name, value in fields.items()) + b"}"


def response_body(
    response: dict[str, Any], first: dict[str, Any], shown: dict[str, Any], finish_reason: str | None,
    usage: dict[str, Any] | None,
) -> bytes:
    """The last round's response as the client sees it, under the first round's identity."""
    choice = {**response["choices"][0], "message": shown, "finish_reason": finish_reason}
    same = {k: first[k] for k in ("id", "created", "model") if k in first}
    return _encode({**response, **same, "choices": [choice], **({"usage": usage} if usage else {})})


# -- spoken answers


def with_transcripts(messages: bytes, path: Sequence[Node], get: GetRecord | None, now_s: float, usable: bool) -> bytes:
    """The messages array with words in place of audio that is gone.

    `usable` False: upstream refused an id, so all of them are replaced. `now_s` is compared with each
    answer's `expires_at` (Unix seconds). Bytes without assistant audio come back as they are.
    """
    if get is None or b'"audio"' not in messages:
        return messages
    decoded = _decode(messages)
    spoken = [m for m in decoded if m.get("role") == "assistant" and _audio_id(m) is not None]
    if not spoken:
        return messages
    wanted = {_audio_id(m) for m in spoken}
    known = _answers(path, get, wanted)
    changed = False
    for message in spoken:
        audio = message["audio"]
        answer = known.get(_audio_id(message), audio)
        words, expires = answer.get("transcript"), answer.get("expires_at")
        gone = not usable or (isinstance(expires, int | float) and expires <= now_s)
        if isinstance(words, str) and gone:
            del message["audio"]
            text = message.get("content")
            message["content"] = f"{text}\n\n{words}" if isinstance(text, str) and text else words
            changed = True
        elif len(audio) > 1:  # an answer of ours, whole: a request names only its id
            message["audio"] = {"id": audio["id"]}
            changed = True
    return _encode(decoded) if changed else messages


def _answers(path: Sequence[Node], get: GetRecord, wanted: set[str | None]) -> dict[str | None, dict[str, Any]]:
    """The audio of the answers on the path, as upstream gave it, by id."""
    found: dict[str | None, dict[str, Any]] = {}
    for node in reversed(path):
        if node.role != "assistant" or b'"audio"' not in node.raw:
            continue
        record = get(node.id)
        raw = record.raws[-1] if record is not None else node.raw
        message = _decode(raw)
        audio_id = _audio_id(message)
        if audio_id in wanted:
            found[audio_id] = message["audio"]
            if len(found) == len(wanted):
                break
    return found


def _audio_id(message: dict[str, Any]) -> str | None:
    audio = message.get("audio")
    found = audio.get("id") if isinstance(audio, dict) else None
    return found if isinstance(found, str) else None
