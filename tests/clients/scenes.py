"""The scripted conversations that every client plays: what is said, and what the model answers.

Promises: a scene is data and depends on nothing; its model asks for pages only where the memory
tools are on offer, so the same scene can be played against the proxy and against a bare upstream.
Every scene starts behind a history that is larger than the window.
"""

from __future__ import annotations

import base64
import functools
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from tests.e2e.answers import CREATED
from tests.e2e.harness import (
    Answer,
    Break,
    Drop,
    Response,
    Stream,
    answer,
    call,
    completion,
    error,
    message_of,
    sse_chunks,
)
from tests.e2e.talk import fault, search

MODEL = "gpt-4o"
PAIRS = 10  # about 3600 tokens in few messages: the clients' own cost goes by messages
L0_TOKENS = 3000
RESERVE_TOKENS = 600
BUDGET_TOKENS = L0_TOKENS - RESERVE_TOKENS

_STEMS = "amber basin cedar delta ember fjord grove heron".split()

Message = dict[str, Any]
Reply = Message | Answer | Callable[[Message], Answer]

SYSTEM = "You keep the notes of the depots."
QUESTIONS = ("What was noted first?", "And what was noted second?", "Thank you. Anything else?")
AGENT_QUESTION = "Compare the weather in Oslo and Rome, then give me the code of depot 3."


@dataclass(frozen=True)
class Turn:
    """One answer of the model.

    `first`: messages with memory calls that it makes before, where it is offered the tools.
    `beside`: memory calls that stand in front of the calls of `reply`, in the same message.
    """

    reply: Reply
    first: tuple[Message, ...] = ()
    beside: tuple[Message, ...] = ()


def weather(city: str) -> str:
    """The weather in a city."""
    return f"It is {len(city)} degrees in {city}."


def depot_code(depot: int) -> str:
    """The code of a depot."""
    return f"code {depot * 7919}"


TOOL_SCHEMAS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "depot_code",
            "description": "The code of a depot.",
            "parameters": {
                "type": "object",
                "properties": {"depot": {"type": "integer"}},
                "required": ["depot"],
                "additionalProperties": False,
            },
        },
    },
]
FUNCTIONS: dict[str, Callable[..., str]] = {"weather": weather, "depot_code": depot_code}

REPORT = {"depot": 3, "code": "x7", "notes": ["dry", "cold"]}
REPORT_SCHEMA = {
    "type": "object",
    "properties": {
        "depot": {"type": "integer"},
        "code": {"type": "string"},
        "notes": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["depot", "code", "notes"],
    "additionalProperties": False,
}
REPORT_QUESTION = "Report on depot 3."

ERROR_400 = "Invalid value: 'bananas'. Supported values are: 'low' and 'high'."
LONG_TEXT = " ".join(f"word{i}" for i in range(60)) + "."


def _limited(request: Message) -> Answer:
    headers = [(b"retry-after-ms", b"20"), (b"retry-after", b"1")]
    return error(
        429, "Rate limit reached.", type="requests", code="rate_limit_exceeded", headers=headers
    )


def _refused(request: Message) -> Answer:
    return error(400, ERROR_400, code="invalid_value", param="detail")


def _broken(request: Message) -> Answer:
    return Stream([*sse_chunks(request, message_of(LONG_TEXT))[:30], Break()])


def _late_error(request: Message) -> Answer:
    late = {"error": {"message": "The server had an error", "type": "server_error", "code": None}}
    event = b"data: " + json.dumps(late).encode() + b"\n\n"
    return Stream([*sse_chunks(request, message_of(LONG_TEXT))[:30], event])


def _later_broken(request: Message) -> Answer:
    """Nothing of the answer came but its head."""
    return Stream([*sse_chunks(request, message_of(LONG_TEXT))[:1], Break()])


def _failed(request: Message) -> Answer:
    headers = [(b"retry-after-ms", b"20")]
    return error(503, "Overloaded.", type="server_error", code=None, headers=headers)


def _choices(request: Message) -> Answer:
    """Two choices with the probabilities of their tokens."""
    made = [_choice(i, text) for i, text in enumerate(("Heads it is.", "Tails it is."))]
    head = {
        "id": "chatcmpl-two",
        "created": CREATED,
        "model": MODEL,
        "system_fingerprint": "fp_test",
    }
    usage = {"prompt_tokens": 9, "completion_tokens": 8, "total_tokens": 17}
    if not request.get("stream"):
        whole = {"object": "chat.completion", **head, "choices": made, "usage": usage}
        return Response(json.dumps(whole).encode())
    events = []
    for choice in made:
        for finish, delta in ((None, choice["message"]), ("stop", {})):
            logprobs = choice["logprobs"] if finish is None else None
            entry = {"index": choice["index"], "delta": delta, "logprobs": logprobs}
            chunk = {"object": "chat.completion.chunk", **head}
            events.append({**chunk, "choices": [{**entry, "finish_reason": finish}]})
    lines = [b"data: " + json.dumps(e).encode() + b"\n\n" for e in events]
    return Stream([*lines, b"data: [DONE]\n\n"])


def _choice(index: int, text: str) -> Message:
    probability = {"token": text[:5], "logprob": -0.25, "bytes": list(text[:5].encode())}
    return {
        "index": index,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": {"content": [{**probability, "top_logprobs": []}], "refusal": None},
        "finish_reason": "stop",
    }


def _declined(request: Message) -> Answer:
    """A refusal, which stands in a field of its own."""
    said = "I am sorry, I cannot help with that."
    if not request.get("stream"):
        return answer(request, {"role": "assistant", "content": None, "refusal": said})
    return _edited(request, {"role": "assistant", "refusal": said}, "stop")


def _cut_off(request: Message) -> Answer:
    """The answer's tokens ran out in the middle of it."""
    said = '{"depot": 3, "code": "x'
    if not request.get("stream"):
        whole = json.loads(completion(request, message_of(said)).body)
        whole["choices"][0]["finish_reason"] = "length"
        return Response(json.dumps(whole).encode())
    return _edited(request, {"role": "assistant", "content": said}, "length")


def _edited(request: Message, delta: Message, finish: str) -> Answer:
    """A stream of one delta with this end."""
    head, *_ = sse_chunks(request, message_of(""))
    chunk = json.loads(head.removeprefix(b"data: "))
    lines = []
    for one, end in ((delta, None), ({}, finish)):
        chunk["choices"] = [{"index": 0, "delta": one, "finish_reason": end}]
        lines.append(b"data: " + json.dumps(chunk).encode() + b"\n\n")
    return Stream([*lines, b"data: [DONE]\n\n"])


def _calls(*made: Message) -> Message:
    return message_of(None, list(made))


_TALK = (
    Turn(
        message_of("The first note is about depot 0."),
        first=(
            {**search("code of depot 0"), "content": "Let me look."},
            fault("msg_0001"),
            fault("msg_0003", "call_g"),
        ),
    ),
    Turn(
        message_of("The second note, naïve as it is, says 「depot 1」."), first=(fault("msg_0002"),)
    ),
    Turn(message_of(LONG_TEXT)),
)
_AGENT = (
    Turn(
        _calls(
            call("call_oslo", "weather", {"city": "Oslo"}),
            call("call_rome", "weather", {"city": "Rome"}),
        ),
        first=(search("depot 3"),),
        beside=(call("call_v1", "page_fault", {"page_id": "msg_0007"}),),
    ),
    Turn(
        message_of("Now the code.", [call("call_code", "depot_code", {"depot": 3})]),
        first=(fault("msg_0008"),),
        beside=(call("call_v2", "search_pages", {"query": "depot 3"}),),
    ),
    Turn(
        message_of("Both are 4 degrees; the code is 23757."), first=(fault("msg_0009", "call_h"),)
    ),
)
_REPORT = (
    Turn(message_of(json.dumps(REPORT)), first=(fault("msg_0007"),)),
    Turn(message_of(json.dumps({**REPORT, "code": "y8"}))),
)
_IMAGES = (
    Turn(message_of("A red square."), first=(fault("msg_0001"),)),
    Turn(message_of("Still a red square, and a blue one.")),
)

SCENES: dict[str, tuple[Turn, ...]] = {
    "talk": _TALK,
    "agent": _AGENT,
    "report": _REPORT,
    # The schema stands in a tool that the client forces: no memory tool may be on offer.
    "forced": (Turn(_calls(call("call_report", "Report", REPORT))),),
    "forced call": (Turn(_calls(call("call_code", "depot_code", {"depot": 3}))),),
    "left": (Turn(message_of(LONG_TEXT * 20), first=(fault("msg_0001"),)), _TALK[1]),
    # Pydantic AI's output tools: a normal call, then the one that ends the run.
    "output tool": (
        Turn(_calls(call("call_oslo", "weather", {"city": "Oslo"}))),
        Turn(_calls(call("call_final", "final_result", REPORT))),
    ),
    "agent report": (*_AGENT[:2], Turn(message_of(json.dumps(REPORT)))),
    "images": _IMAGES,
    "limited": (Turn(_limited), Turn(_limited), _TALK[0]),
    "always limited": (Turn(_limited),),
    "refused": (Turn(_refused),),
    "broken": (Turn(_broken), _TALK[0]),
    # What fails after a memory round: the client's own retry starts the loop again.
    "limited later": (Turn(_limited, first=(fault("msg_0001"),)), _TALK[0]),
    "always limited later": (Turn(_limited, first=(fault("msg_0001"),)),),
    "refused later": (Turn(_refused, first=(fault("msg_0001"),)),),
    "failed later": (Turn(_failed, first=(fault("msg_0001"),)), _TALK[0]),
    "dropped later": (Turn(Drop(), first=(fault("msg_0001"),)), _TALK[0]),
    "broken later": (Turn(_later_broken, first=(fault("msg_0001"),)), _TALK[0]),
    "choices": (Turn(_choices),),
    "declined": (Turn(_declined, first=(fault("msg_0001"),)), _REPORT[1]),
    "cut off": (Turn(_cut_off, first=(fault("msg_0001"),)), _REPORT[1]),
    "late error": (Turn(_late_error), _TALK[0]),
}


def opening() -> list[Message]:
    """The system message and the history."""
    out = [{"role": "system", "content": SYSTEM}]
    for i in range(PAIRS):
        more = " ".join(f"{_STEMS[(i + 5 * j) % 8]}{(7 * i + j) % 89}" for j in range(75))
        out.append(user(f"Note {i}: the code of depot {i} is c{i * 7919}. {more}"))
        out.append({"role": "assistant", "content": f"Noted for depot {i}. {more}"})
    return out


def user(text: str) -> Message:
    return {"role": "user", "content": text}


@functools.cache
def picture(red: int, green: int, blue: int) -> str:
    """A data URL of a small PNG."""
    out = io.BytesIO()
    Image.new("RGB", (64, 64), (red, green, blue)).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def user_with_picture(text: str, url: str) -> Message:
    parts = [
        {"type": "text", "text": text},
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
    ]
    return {"role": "user", "content": parts}


def opening_with_pictures() -> list[Message]:
    """A history whose first message, long out of the window, and last exchange have a picture."""
    leading, *rest = opening()
    first = user_with_picture("This is the first depot.", picture(255, 0, 0))
    last = user_with_picture("And this is the last depot.", picture(0, 255, 0))
    noted = {"role": "assistant", "content": "Noted."}
    return [leading, first, noted, *rest, last, noted]
