"""Our token counts beside those of a counter written from the providers' published rules.

Promises: `Published` shares no code with proxy/tokens: it is the cookbook's num_tokens_from_messages
and num_tokens_for_tools, the vision guide's arithmetic, and 10 tokens a second for sound, written
down as literally as they are published. What they leave open (tool calls, nested schemas) is counted
as in tests/e2e/rules.py.

Run from the repository's root:  python -m tests.bench.token_error
"""

from __future__ import annotations

import base64
import io
import json
import math
import wave
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import tiktoken
from PIL import Image

from proxy.tokens import PER_REPLY, get_counter
from tests.e2e.data import Conversation, load_beam, load_locomo, load_trajectories

Message = dict[str, Any]

# The vision guide's tables.
TILES = {
    "gpt-4o": (85, 170), "gpt-4.1": (85, 170), "gpt-4.5-preview": (85, 170), "gpt-4o-mini": (2833, 5667),
    "o1": (75, 150), "o1-pro": (75, 150), "o3": (75, 150), "gpt-5": (70, 140),
    "gpt-5-chat-latest": (70, 140), "computer-use-preview": (65, 129),
}  # fmt: skip
PATCHES = {
    "gpt-4.1-mini": 1.62, "gpt-4.1-nano": 2.46, "o4-mini": 1.72, "gpt-5-mini": 1.62, "gpt-5-nano": 2.46,
}  # fmt: skip
SIZES = (
    (64, 64), (128, 64), (512, 512), (513, 512), (800, 600), (1024, 1024), (1024, 1325), (1800, 2400),
    (1920, 1080), (2048, 4096), (2049, 513), (2050, 513), (3000, 300), (4000, 3000), (5, 6000),
)  # fmt: skip


class Published:
    """One model's published rules."""

    def __init__(self, model: str) -> None:
        self.model = model
        try:
            self.encoding = tiktoken.encoding_for_model(model)
        except KeyError:
            self.encoding = tiktoken.get_encoding("o200k_base")
        self.func_init = 7 if model.startswith("gpt-4o") else 10

    def text(self, text: str) -> int:
        return len(self.encoding.encode(text, disallowed_special=()))

    def request(self, messages: Iterable[Message], tools: Sequence[Message] = ()) -> int:
        total = sum(self.message(message) for message in messages) + 3
        return total + self.tools(tools)

    def message(self, message: Message) -> int:
        total = 3
        for key, value in message.items():
            if isinstance(value, str):
                total += self.text(value)
            elif key == "content" and value is not None:
                total += sum(self.part(part) for part in value)
            elif key == "tool_calls":
                total += sum(self.call(call) for call in value)
            if key == "name":
                total += 1
        return total

    def call(self, call: Message) -> int:
        function = call["function"]
        words = (call["id"], function["name"], function["arguments"])
        return 3 + sum(self.text(word) for word in words)

    def tools(self, tools: Sequence[Message]) -> int:
        if not tools:
            return 0
        total = 0
        for tool in tools:
            function = tool["function"]
            total += self.func_init
            description = function.get("description", "").removesuffix(".")
            total += self.text(f"{function['name']}:{description}")
            properties = function.get("parameters", {}).get("properties")
            if properties:
                total += 3
                for name, prop in properties.items():
                    total += 3
                    if "enum" in prop:
                        total -= 3
                        for item in prop["enum"]:
                            total += 3 + self.text(item)
                    description = prop.get("description", "").removesuffix(".")
                    total += self.text(f"{name}:{prop.get('type', '')}:{description}")
        return total + 12

    def part(self, part: Message) -> int:
        if part["type"] == "image_url":
            head, _, encoded = part["image_url"]["url"].partition(",")
            assert head.endswith(";base64")
            size = Image.open(io.BytesIO(base64.b64decode(encoded))).size
            return self.image(*size, part["image_url"].get("detail", "auto"))
        if part["type"] == "input_audio":
            with wave.open(io.BytesIO(base64.b64decode(part["input_audio"]["data"]))) as sound:
                return math.ceil(sound.getnframes() / sound.getframerate() * 10)
        return self.text(part["text"])

    def image(self, width: int, height: int, detail: str) -> int:
        if self.model in PATCHES:
            return math.ceil(_patches(width, height) * PATCHES[self.model])
        base, tile = TILES[self.model]
        return base if detail == "low" else base + tile * _tiles(width, height)


def _tiles(width: float, height: float) -> int:
    if max(width, height) > 2048:  # "scaled to fit within a 2048 x 2048 square"
        width, height = (round(s * 2048 / max(width, height)) for s in (width, height))
    if min(width, height) > 768:  # "such that the shortest side is 768 px long"
        width, height = (round(s * 768 / min(width, height)) for s in (width, height))
    return math.ceil(max(width, 1) / 512) * math.ceil(max(height, 1) / 512)


def _patches(width: int, height: int) -> int:
    covering = math.ceil(width / 32) * math.ceil(height / 32)
    if covering <= 1536:
        return covering
    shrink = math.sqrt(1536 * 32**2 / (width * height))
    across, down = width * shrink / 32, height * shrink / 32
    shrink *= min(max(math.floor(across), 1) / across, max(math.floor(down), 1) / down)
    # "so that it can be covered by no more than 1536 patches"
    return min(1536, math.ceil(round(width * shrink) / 32) * math.ceil(round(height * shrink) / 32))


def png_part(width: int, height: int, detail: str | None = None) -> Message:
    url = "data:image/png;base64," + base64.b64encode(_png(width, height)).decode()
    return {"type": "image_url", "image_url": {"url": url, **({"detail": detail} if detail else {})}}


@lru_cache(maxsize=64)
def _png(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("1", (width, height)).save(out, "PNG")
    return out.getvalue()


def wav_part(seconds: float, rate: int = 16_000) -> Message:
    out = io.BytesIO()
    with wave.open(out, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(bytes(2 * round(seconds * rate)))
    data = base64.b64encode(out.getvalue()).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def schema_tools(conversation: Conversation) -> list[Message]:
    """The functions that a transcript calls, with the parameters that it calls them with."""
    found: dict[str, dict[str, Message]] = {}
    for message in conversation.messages:
        for call in message.get("tool_calls") or ():
            properties = found.setdefault(call["function"]["name"], {})
            try:
                arguments = json.loads(call["function"]["arguments"])
            except ValueError:
                continue
            for key, value in arguments.items() if isinstance(arguments, dict) else ():
                kind = {str: "string", int: "integer", list: "array"}.get(type(value), "object")
                properties[key] = {"type": kind, "description": f"The {key.replace('_', ' ')}."}
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": f"Runs {name.replace('_', ' ')} and returns what it found.",
                "parameters": {"type": "object", "properties": properties},
            },
        }
        for name, properties in sorted(found.items())
    ]


def counts(conversation: Conversation, model: str) -> tuple[int, int]:
    """(ours, published) tokens of a whole conversation with its tools."""
    counter, tools = get_counter(model), schema_tools(conversation)
    ours = sum(counter.message(m) for m in conversation.messages) + PER_REPLY + counter.tools(tools)
    return ours, Published(model).request(conversation.messages, tools)


def data_sets() -> dict[str, tuple[Conversation, ...]]:
    return {"locomo": load_locomo(), "beam": load_beam(), "trajectories": load_trajectories()}


def main() -> None:
    """Print the tables."""
    print(f"{'data set':14}{'model':10}{'convers.':>9}{'tokens':>11}{'mean error':>12}{'worst':>9}")
    for name, conversations in data_sets().items():
        for model in ("gpt-4o", "gpt-4"):
            pairs = [counts(conversation, model) for conversation in conversations]
            errors = [(ours - published) / published for ours, published in pairs]
            mean = sum(abs(error) for error in errors) / len(errors)
            worst = max(errors, key=abs)
            tokens = sum(published for _, published in pairs)
            print(f"{name:14}{model:10}{len(pairs):>9}{tokens:>11,}{mean:>12.3%}{worst:>+9.3%}")
    models = ("gpt-4o", "gpt-4o-mini", "o3", "gpt-5", "gpt-4.1-mini", "o4-mini", "claude-sonnet-4-5", "gemini-2.5-pro")
    print("\nimage tokens, ours (published in brackets where it differs)")
    print(f"{'size':>12}{'detail':>7}" + "".join(f"{model:>18}" for model in models))
    for width, height in SIZES:
        for detail in (None, "low") if (width, height) == (1024, 1024) else (None,):
            part, row = png_part(width, height, detail), ""
            for model in models:
                ours, known = get_counter(model).part(part), model in TILES or model in PATCHES
                wanted = Published(model).part(part) if known else ours
                row += f"{ours if ours == wanted else f'{ours} ({wanted})':>18}"
            print(f"{f'{width}x{height}':>12}{detail or 'auto':>7}{row}")
    print("\naudio tokens (WAV)\n     seconds    ours  published")
    for seconds in (0.4, 3.0, 12.5, 60.0, 300.0):
        part = wav_part(seconds)
        ours, wanted = get_counter("gpt-4o").part(part), Published("gpt-4o").part(part)
        print(f"{seconds:>12}{ours:>8}{wanted:>11}")


if __name__ == "__main__":
    main()
