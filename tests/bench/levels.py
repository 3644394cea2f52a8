"""Tokens of every modality at every level, on real media made here.

    python -m tests.bench.levels [--model gpt-4o] [--data ../shared/data]

Prints one row per page: its tokens at levels 0 to 3 by the model's rules, and what it took to make
level 1. Then, where the shared conversations are there, what share of each kind of thing that is
costly to lose level 1 of text keeps, beside the same number of characters from the page's start.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from proxy.memory.compressor import compress_text
from proxy.memory.levels import CompressorRegistry
from proxy.memory.models import Counts, MemoryPage, Modality
from proxy.tokens import get_counter
from tests.media import samples

TEXT = (
    "Thanks for the summary, that helps a lot. I looked at the two options again over lunch. "
    "We decided to use PostgreSQL 16 for the billing service because of row level security. "
    "It was a nice day and everybody was in a good mood. The sun was out for once. "
    "The function parse_invoice in billing/core.py must never round before 2027. "
    "Some people had coffee, some had tea, and there was cake as well. "
    "Maria Keller owns the migration, and the deadline is 14 March. "
    "After that we talked about this and that for a while. It was fun, as it always is there. "
    "Then most of us walked home along the river, slowly, and some of us stayed a bit longer. "
)


def orders(count: int = 40) -> str:
    """A tool's result: an array of records, with a long string and a failure in it."""
    rows = [
        {
            "id": 1000 + index,
            "customer": {"name": f"Customer {index}", "email": f"c{index}@example.com"},
            "total": 19.99 + index,
            "status": "failed" if index == 7 else "paid",
            "notes": "Delivered to the front desk, signed by the porter. " * 3,
        }
        for index in range(count)
    ]
    return json.dumps({"orders": rows, "next": None, "total_count": count})


def page(page_id: str, modality: Modality, content: Any, **metadata: Any) -> MemoryPage:
    return MemoryPage(page_id=page_id, modality=modality, content=content, metadata=metadata)


def pages() -> dict[str, MemoryPage]:
    """One page of each kind, by what the table calls it."""
    report = samples.pdf(["\n".join(TEXT.split(". ")) + f"\nPage {number}" for number in (1, 2, 3)])
    png = samples.image_part(samples.png())
    said = TEXT * 3
    film = samples.mp4(scenes=4, seconds_per_scene=3.0)
    return {
        "text": page("msg_0001", Modality.TEXT, TEXT * 2),
        "structured, 40 records": page("msg_0002", Modality.STRUCTURED, orders()),
        "PNG 1600x1200": page("img_0003_1", Modality.IMAGE, png),
        "PNG, with a caption": page(
            "img_0003_2",
            Modality.IMAGE,
            png,
            caption="Bar chart of quarterly revenue 2026 with twelve navy bars.",
        ),
        "JPEG 800x600": page(
            "img_0004_1",
            Modality.IMAGE,
            samples.image_part(samples.jpeg(800, 600), "image/jpeg"),
        ),
        "WAV 42 s": page("aud_0005_1", Modality.AUDIO, samples.audio_part(samples.wav(42.0))),
        "WAV 120 s, transcript": page(
            "aud_0005_2", Modality.AUDIO, samples.audio_part(samples.wav(120.0)), transcript=said
        ),
        "MP4 12 s, 4 scenes": page("vid_0006_1", Modality.VIDEO, samples.video_part(film)),
        "MP4, with a summary": page(
            "vid_0006_2",
            Modality.VIDEO,
            samples.video_part(film),
            summary="A red square wanders over four plain colours.",
        ),
        "PDF 3 pages": page(
            "file_0007_1", Modality.TEXT, samples.file_part(report, "application/pdf", "report.pdf")
        ),
    }


def shown(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    return " + ".join(part.get("text", part["type"]) for part in parts)


KINDS = {
    "numbers": re.compile(r"\d+(?:[.,:/-]\d+)*"),
    "names": re.compile(r"(?<=[a-z,] )[A-Z][a-z]+(?: [A-Z][a-z]+)*"),
    "identifiers": re.compile(r"\b\w+(?:_\w+)+\b|\b[a-z]+[A-Z]\w+|\b\w+(?:[./]\w+)+\b|\b\w+\(\)"),
    "decisions": re.compile(
        r"[^.!?\n]*\b(?:decided|agreed|must|never|always|deadline|prefer|remember)\b[^.!?\n]*"
    ),
}


def texts(data: Path) -> Iterator[str]:
    """Messages of 400 characters and more, of users, assistants and tools."""
    for path in sorted((data / "beam").glob("*.json")):
        for message in json.loads(path.read_text(encoding="utf-8"))["messages"]:
            yield str(message.get("content") or "")
    for path in sorted((data / "trajectories").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            for message in json.loads(line)["messages"]:
                if message["role"] != "system" and isinstance(message.get("content"), str):
                    yield message["content"]


def print_kept(data: Path, most: int = 4000) -> None:
    count = get_counter("gpt-4o").text
    kept: Counter[tuple[str, str]] = Counter()
    total: Counter[str] = Counter()
    chars = full_chars = pages_seen = 0
    for text in texts(data):
        if len(text) < 400 or pages_seen >= most:
            continue
        pages_seen += 1
        short = compress_text(text, 1, None, count)
        start = text[: len(short)]
        chars, full_chars = chars + len(short), full_chars + len(text)
        for kind, pattern in KINDS.items():
            for found in {match.group().strip() for match in pattern.finditer(text)}:
                total[kind] += 1
                kept[kind, "level 1"] += found in short
                kept[kind, "start"] += found in start
    print(f"\nlevel 1 of {pages_seen} messages: {chars / full_chars:.0%} of the characters keep")
    for kind in KINDS:
        ours, naive = kept[kind, "level 1"] / total[kind], kept[kind, "start"] / total[kind]
        print(f"  {kind:12} {ours:6.1%}   the page's start {naive:6.1%}   of {total[kind]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", default="gpt-4o", help="whose rules count")
    args = parser.parse_args()
    data = args.data
    counts = get_counter(args.model)
    registry = CompressorRegistry.default()
    print(f"{'page':26}{'L0':>7}{'L1':>7}{'L2':>7}{'L3':>7}{'L1 ms':>9}   levels 1, 2, 3")
    for name, full in pages().items():
        sizes = [full_tokens(full, counts)]
        words = []
        took = 0.0
        for level in (1, 2, 3):
            start = time.perf_counter()
            lower = registry.compress(full, level, counts)
            took = took or time.perf_counter() - start
            sizes.append(lower.size_tokens or 0)
            words.append(shown(lower.content).replace("\n", " "))
        row = "".join(f"{size:7}" for size in sizes)
        print(f"{name:26}{row}{took * 1000:9.1f}   {words[0][:60]!r}")
        for word in words[1:]:
            print(f"{'':66}{word!r}")
    if (data / "beam").is_dir():
        print_kept(data)


def full_tokens(full: MemoryPage, counts: Counts) -> int:
    if isinstance(full.content, dict):
        return counts.part(full.content)
    return counts.text(full.text())


if __name__ == "__main__":
    main()
