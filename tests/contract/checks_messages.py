"""Messages of a request: every shape that the API takes arrives as it was sent."""

from __future__ import annotations

import base64
import io
import wave
from typing import Any

from tests.contract import say
from tests.contract.model import BOTH, SHORT, Check, Failed, Scenario, add, check, equal, quote
from tests.contract.play import Play, encode


def _wav() -> str:
    """A tenth of a second of silence, base64."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(1)
        sound.setframerate(8000)
        sound.writeframes(b"\x80" * 800)
    return base64.b64encode(file.getvalue()).decode()


PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
WAV = _wav()
USER = {"role": "user", "content": "Which code has depot 3?"}
CALLED = say.calling(say.call("call_1", "look", '{ "word" :"x"}'))
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "found"}
LOOK = [say.tool("look")]

SHAPES: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "unknown_keys": (
        "unknown keys of messages and parts",
        [
            {**USER, "x_note": [1, None]},
            {"role": "assistant", "content": "Yes.", "x_trace": {"a": 1}},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "And?", "cache_control": {"type": "ephemeral"}}
                ],
            },
        ],
        {},
    ),
    "names": (
        "name on user and assistant messages",
        [{**USER, "name": "ann"}, {**say.text("Yes."), "name": "bot"}, {**USER, "name": "bob"}],
        {},
    ),
    "empty_content": (
        "empty content of user and assistant",
        [USER, say.text(""), {"role": "user", "content": ""}],
        {},
    ),
    "null_content": ("null content beside tool calls", [USER, CALLED, RESULT], {"tools": LOOK}),
    "absent_content": (
        "no content at all beside tool calls",
        [USER, {k: v for k, v in CALLED.items() if k != "content"}, RESULT],
        {"tools": LOOK},
    ),
    "parts": (
        "arrays of text parts in user and assistant messages",
        [
            USER,
            {"role": "assistant", "content": [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]},
        ],
        {},
    ),
    "image": (
        "image parts with their detail",
        [{"role": "user", "content": [
            {"type": "text", "text": "What?"},
            {"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}},
        ]}],
        {},
    ),
    "audio": (
        "input_audio parts",
        [{"role": "user", "content": [
            {"type": "text", "text": "Hear."},
            {"type": "input_audio", "input_audio": {"data": WAV, "format": "wav"}},
        ]}],
        {},
    ),
    "file": (
        "file parts",
        [{"role": "user", "content": [
            {"type": "file", "file": {"file_id": "file-123"}},
            {"type": "text", "text": "Read."},
        ]}],
        {},
    ),
    "consecutive": (
        "consecutive messages of one role",
        [USER, {"role": "user", "content": "please"}, say.text("One."), say.text("Two."), USER],
        {},
    ),
    "refusal": (
        "an assistant's refusal, as key and as part",
        [
            USER,
            {"role": "assistant", "content": None, "refusal": "I cannot."},
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "I must not."}]},
            USER,
        ],
        {},
    ),
    "reasoning": (
        "reasoning_content, thinking_blocks and extra_content that a client sends back",
        [
            USER,
            {
                **CALLED,
                "reasoning_content": "first",
                "thinking_blocks": [{"type": "thinking", "thinking": "t", "signature": "s"}],
                "extra_content": {"google": {"thought_signature": "QUJD"}},
            },
            RESULT,
        ],
        {"tools": LOOK},
    ),
    "call_extra": (
        "unknown keys of tool calls (thought signatures)",
        [
            USER,
            say.calling(say.call("call_1", "look", extra_content={"google": {"thought_signature": "Q"}})),
            RESULT,
        ],
        {"tools": LOOK},
    ),
    "parallel_results": (
        "results of parallel calls, in the order the client gave",
        [
            USER,
            say.calling(say.call("call_1", "look"), say.call("call_2", "look", '{"word":"é"}')),
            {"role": "tool", "tool_call_id": "call_2", "content": "second"},
            {"role": "tool", "tool_call_id": "call_1", "content": "first"},
        ],
        {"tools": LOOK},
    ),
    "result_parts": (
        "tool results as parts, and empty",
        [
            USER,
            say.calling(say.call("call_1", "look"), say.call("call_2", "look")),
            {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "p"}]},
            {"role": "tool", "tool_call_id": "call_2", "content": ""},
        ],
        {"tools": LOOK},
    ),
    "custom_call": (
        "custom tool calls and their results",
        [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "call_1", "type": "custom", "custom": {"name": "sql", "input": "SELECT 1;\n"}}
            ]},
            {"role": "tool", "tool_call_id": "call_1", "content": "1"},
        ],
        {"tools": [{"type": "custom", "custom": {"name": "sql"}}]},
    ),
    "function_role": (
        "legacy function_call and function messages",
        [
            USER,
            {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": "{}"}},
            {"role": "function", "name": "look", "content": "found"},
        ],
        {"functions": [{"name": "look", "parameters": {"type": "object", "properties": {}}}]},
    ),
    "audio_id": (
        "an assistant's audio by its id",
        [USER, {"role": "assistant", "audio": {"id": "audio_abc"}}, USER],
        {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}},
    ),
    "characters": (
        "characters beyond the BMP, control characters, JSON and tags in text",
        [{"role": "user", "content": "\U0001f600\u2028\u0000\t</VM:CONTEXT>{\"a\":1}<|endoftext|>é"}],
        {},
    ),
}


def _arrives(messages: list[dict[str, Any]], fields: dict[str, Any]) -> Scenario:
    async def scenario(play: Play) -> None:
        play.says(say.text("Yes."))
        await play.chat(play.ask(*messages), **fields)
        play.newest(messages, len(messages))

    return scenario


for _name, (_promise, _messages, _fields) in SHAPES.items():
    add(Check(f"messages.{_name}", f"{_promise}: as sent", _arrives(_messages, _fields), BOTH))


@check("messages.system", "a system message stays a system message, first and whole")
async def system(play: Play) -> None:
    play.says(say.text("Yes."))
    messages = play.ask()
    await play.chat(messages)
    for recorded in play.calls:
        got, sent = recorded.json["messages"][:1], messages[:1]
        equal(play.wire.messages(got), play.wire.messages(sent), "the first message")


@check("messages.developer", "a developer message stays a developer message")
async def developer(play: Play) -> None:
    play.says(say.text("Yes."))
    messages = play.ask()
    messages[0]["role"] = "developer"
    await play.chat(messages, model=play.target.model)
    for recorded in play.calls:
        got, sent = recorded.json["messages"][:1], messages[:1]
        equal(play.wire.messages(got), play.wire.messages(sent), "the first message")


@check("messages.system_name", "name and parts of a system message stay")
async def system_name(play: Play) -> None:
    play.says(say.text("Yes."))
    messages = play.ask()
    parts = [{"type": "text", "text": messages[0]["content"], "cache_control": {"type": "ephemeral"}}]
    messages[0] = {"role": "system", "name": "house", "content": parts}
    await play.chat(messages)
    for recorded in play.calls:
        got, sent = recorded.json["messages"][:1], messages[:1]
        equal(play.wire.messages(got), play.wire.messages(sent), "the first message")


@check("messages.late_system", "a system message in mid-conversation stays before the same message")
async def late_system(play: Play) -> None:
    play.says(say.text("Yes."))
    late = {"role": "system", "content": "From now on in French."}
    sent = play.ask(say.text("Yes?"), late, USER)
    await play.chat(sent)
    for recorded in play.calls:
        got = recorded.json["messages"]
        if late not in got:
            raise Failed(f"it is not in {quote([m['role'] for m in got])}")
        after = [m for m in got[got.index(late) + 1 :] if m["role"] == "user"]
        before = [m for m in got[: got.index(late)] if m.get("content") == USER["content"]]
        if not after or before:
            raise Failed(f"it moved: {quote([m['role'] for m in got[-6:]])}")


@check("messages.lone_surrogate", "text that is no Unicode (a lone surrogate) passes", (SHORT,))
async def lone_surrogate(play: Play) -> None:
    body = encode(play.body(play.ask("@@")))
    play.says(say.text("Yes."))
    (await play.send(body.replace(b"@@", b"cut \\ud83d"))).ok()
    half = b"\\ud83d" if play.wire.verbatim else "cut \ufffd".encode()
    if half not in play.last.body.lower():
        raise Failed(f"upstream got {quote(play.last.body)}")


@check("messages.next_turn", "the answer that a client sends back stands once in the next request")
async def next_turn(play: Play) -> None:
    play.says(say.text("The code is amber."), say.text("Welcome."))
    first = play.ask()
    reply = await play.chat(first)
    messages = [*first, reply.message(), {"role": "user", "content": "Thanks, and good bye."}]
    play.script.calls.clear()
    await play.chat([{k: v for k, v in m.items() if v is not None} for m in messages])
    for recorded in play.calls:
        texts = [m.get("content") for m in recorded.json["messages"]]
        equal(texts.count("The code is amber."), 1, "times that the answer stands upstream")
        ends = [t for t in texts if isinstance(t, str) and t.endswith("Thanks, and good bye.")]
        equal(len(ends), 1, "times that the new question stands upstream")
