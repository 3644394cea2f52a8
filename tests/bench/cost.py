"""What a conversation's input is billed, window by window: chats and agents, against what they would send otherwise.

    python -m tests.bench.cost [--quick] [--data agents,chats] [--windows 8000,32000] [--markdown]

Every answer of a conversation is one request of a client with its tools, replayed through the application in this
process with upstream answering as recorded, so that nobody calls a VM tool. Billed is OpenAI's rule
(`proxy.demo.bill`): a prefix sent before costs a tenth, in steps of 128 tokens from 1,024 on. Beside each other:

- `ours`, and `kept`: the same with evidence that stays in the log for good;
- `full`: the whole history each time, as if the model took it; `sliding`: the client's system message and tools,
  and the newest messages that fit what the same window leaves for a prompt, never beginning with a tool's result.

`chats`: BEAM, about 100k tokens each. `long chat`: 700k tokens of one. `agents`: the trajectories that outgrow the
window. `long agents`: those of one source behind each other, as a session with one task after another, 100k tokens.
`readers`: agents made by hand with a system prompt of 900 tokens, 900 of tools and 6 to 20 results of 2,000 tokens each.
A conversation is in a row when it outgrows the row's window. `of full`, `of sliding`: billed by these (under 1:
cheaper); `worst`: of full, the dearest conversation; `hit`: share of the input that was cached; `epochs`: per hundred requests; `evidence`: tokens per request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import httpx

import proxy.app
from proxy.config import Config
from proxy.conversation.bill import CACHED_PRICE, cached_prefix
from proxy.conversation.report import TurnReport
from proxy.tokens import get_counter
from tests.bench.ablation import HEADERS, Row, Upstream, returns, show, switch_off
from tests.bench.calls import running
from tests.e2e.data import Conversation, data_dir, load_beam, load_trajectories, tools_of

Message = dict[str, Any]
VARIANTS = (Row("ours"), Row("kept", {}, {"proxy.conversation.turn_window:stays": returns(True)}))


# ---------------------------------------------------------------- the data


def _long_chat(quick: bool) -> list[Conversation]:
    source = json.loads((data_dir() / "beam-long" / "1M_7.json").read_text())
    messages = [{"role": m["role"], "content": m["content"]} for m in source["messages"]]
    return [_until(Conversation("1M_7", messages), 150_000 if quick else 700_000)]


def _until(conversation: Conversation, most_tokens: int) -> Conversation:
    sums = accumulate(map(get_counter("gpt-4o").message, conversation.messages))
    end = sum(total <= most_tokens for total in sums)
    return Conversation(conversation.id, conversation.messages[:end])


def _long_agents(quick: bool) -> list[Conversation]:
    joined: dict[str, Conversation] = {}
    for one in load_trajectories():
        source = one.id.partition("/")[0]
        into = joined.setdefault(source, Conversation(source))
        into.messages += [m for m in one.messages if m["role"] != "system" or not into.messages]
    return [_until(c, 40_000 if quick else 100_000) for c in joined.values()]


def _readers(quick: bool) -> list[Conversation]:
    """An agent reads on through a text; the user asks for more of it once on the way."""
    counter, found = get_counter("gpt-4o"), []
    for chat, steps in zip(load_beam(), (6, 8, 10, 14, 20) if quick else (6, 7, 8, 9, 10, 12, 14, 16, 18, 20), strict=False):
        words = " ".join(m["content"] for m in chat.messages).split(" ")
        size = len(words) * 2000 // counter.text(" ".join(words))
        rules = f"You are an agent that reads files and says what stands in them. {' '.join(words[-size // 3 :])}"
        messages: list[Message] = [{"role": "system", "content": rules[: 900 * 5]}]
        for step in range(steps):
            if step in (0, steps // 2):
                messages.append({"role": "user", "content": f"Read the report from page {step} on; what does it plan?"})
            call = {"name": "read_file", "arguments": json.dumps({"path": "report.txt", "page": step})}
            called = [{"id": f"call_{step}", "type": "function", "function": call}]
            messages.append({"role": "assistant", "content": None, "tool_calls": called})
            page = " ".join(words[step * size : (step + 1) * size])
            messages.append({"role": "tool", "tool_call_id": f"call_{step}", "content": page})
            if step in (steps // 2 - 1, steps - 1):
                messages.append({"role": "assistant", "content": page[:400]})
        found.append(Conversation(f"reader {chat.id}", messages))
    return found


@dataclass(frozen=True)
class Data:
    conversations: Callable[[bool], Sequence[Conversation]]
    windows: tuple[int, ...]
    quick_windows: tuple[int, ...]


DATA = {
    "chats": Data(lambda quick: load_beam()[:: 5 if quick else 1], (8000, 16000, 32000, 64000), (16000,)),
    "long chat": Data(_long_chat, (32000, 64000), (32000,)),
    "agents": Data(lambda quick: load_trajectories()[:: 4 if quick else 1], (8000, 16000), (8000,)),
    "readers": Data(_readers, (8000, 16000), (8000,)),
    "long agents": Data(_long_agents, (8000, 16000, 32000, 64000), (8000, 16000)),
}


# ---------------------------------------------------------------- what it would cost otherwise


@dataclass
class Bill:
    """Input tokens, and how many of them were cached."""

    prompt_tokens: int = 0
    cached_tokens: int = 0

    def book(self, prompt_tokens: int, shared_tokens: int) -> None:
        """A request whose first `shared_tokens` were sent before."""
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_prefix(shared_tokens)

    @property
    def billed(self) -> float:
        return self.prompt_tokens - self.cached_tokens * (1 - CACHED_PRICE)


def requests_of(messages: Sequence[Message]) -> list[int]:
    """Where the answers stand: each is asked for by the messages before it."""
    roles = [m["role"] for m in messages]
    return [i for i in range(1, len(roles)) if roles[i] == "assistant" and roles[i - 1] != "assistant"]


def otherwise(messages: Sequence[Message], tools: Sequence[Message], budget_tokens: int) -> tuple[Bill, Bill]:
    """The bills of the full history and of a sliding window."""
    counter = get_counter("gpt-4o")
    sums = [0, *accumulate(map(counter.message, messages))]
    system = 1 if messages[0]["role"] == "system" else 0
    head = counter.tools(list(tools)) + sums[system]
    full, sliding = Bill(), Bill()
    sent, began = 0, 0
    for at in requests_of(messages):
        tokens = head + sums[at] - sums[system]
        full.book(tokens, head + sums[sent] - sums[system] if sent else 0)
        first = next(i for i in range(system, at) if head + sums[at] - sums[i] <= budget_tokens or i == at - 1)
        while messages[first]["role"] == "tool" and first < at - 1:
            first += 1
        same = sent > 0 and first == began
        sliding.book(head + sums[at] - sums[first], head + sums[sent] - sums[first] if same else head if sent else 0)
        sent, began = at, first
    return full, sliding


# ---------------------------------------------------------------- what it costs through us


@dataclass
class Cost:
    """One row on one data set in one window."""

    conversations: int = 0
    requests: int = 0
    epochs: int = 0
    evidence_tokens: int = 0
    ours: Bill = field(default_factory=Bill)
    full: Bill = field(default_factory=Bill)
    sliding: Bill = field(default_factory=Bill)
    worst: float = 0.0  # ours of the full history's bill
    reached: bool = True

    def observe(self, report: TurnReport) -> None:
        self.epochs += report.new_epoch


def evidence_tokens(messages: Sequence[Message]) -> int:
    """What stands between the tags in front of the newest user message's own text."""
    newest = next((m for m in reversed(messages) if m["role"] == "user"), {"content": ""})
    content = newest["content"]
    parts = [content] if isinstance(content, str) else [p.get("text") or "" for p in content]
    if not parts[0].startswith("<VM:CONTEXT>"):
        return 0
    return get_counter("gpt-4o").text(parts[0].partition("</VM:CONTEXT>")[0])


def _tools(conversation: Conversation) -> list[Message]:
    """What the transcript calls; a hand-made agent offers more, as applications do."""
    tools = tools_of(conversation)
    if conversation.id.startswith("reader"):
        names = ("write_file", "list_files", "search_files", "run_command", "ask_user", "fetch_page", "note")
        words = "What it does, when it is to be called and when it is not, its limits, and what it returns. " * 5
        tools += [{"type": "function", "function": {**tools[0]["function"], "name": n, "description": words}} for n in names]
    return tools


async def replay(conversations: Sequence[Conversation], window_tokens: int, config: dict[str, Any]) -> Cost:
    """All of them, one after another."""
    cost, upstream = Cost(), Upstream()
    setattr(proxy.app, "make_upstream", lambda config: upstream)  # noqa: B010
    with tempfile.TemporaryDirectory(prefix="cost-") as folder:
        base = {**config, "tiers": {"l0": {"tokens": window_tokens}, "l2": {"path": folder}}}
        app = proxy.app.create_app(Config.model_validate_json(json.dumps(base)), cost.observe)
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://bench")
        async with running(app), client:
            for conversation in conversations:
                messages = conversation.messages
                tools = _tools(conversation)
                full, sliding = otherwise(messages, tools, window_tokens)
                tokens = get_counter("gpt-4o").tools(tools) + sum(map(get_counter("gpt-4o").message, messages))
                if tokens <= window_tokens:
                    continue
                upstream.begin()
                head = json.dumps({"model": "gpt-4o", **({"tools": tools} if tools else {})}).encode()
                raws = [json.dumps(message).encode() for message in messages]
                for at in requests_of(messages):
                    upstream.recorded = messages[at]
                    upstream.requests.clear()
                    body = head[:-1] + b',"messages":[' + b",".join(raws[:at]) + b"]}"
                    reply = await client.post("/v1/chat/completions", content=body, headers=HEADERS)
                    if reply.status_code != 200:
                        raise SystemExit(f"{conversation.id}, {at}: {reply.status_code}: {reply.text[:300]}")
                    cost.requests += 1
                    cost.evidence_tokens += evidence_tokens(upstream.requests[0]["messages"])
                cost.conversations += 1
                cost.worst = max(cost.worst, upstream.account.billed_tokens / full.billed)
                for bill, more in ((cost.ours, upstream.account), (cost.full, full), (cost.sliding, sliding)):
                    bill.prompt_tokens += more.prompt_tokens
                    bill.cached_tokens += more.cached_tokens
    return cost


def measure(variant: str, data: str, window_tokens: int, quick: bool) -> Cost:
    """In a process of its own."""
    row = next(row for row in VARIANTS if row.name == variant)
    reached = switch_off(row)
    cost = asyncio.run(replay(DATA[data].conversations(quick), window_tokens, row.config))
    cost.reached = reached()
    return cost


# ---------------------------------------------------------------- the table


def line(data: str, window_tokens: int, costs: dict[str, Cost]) -> dict[str, str]:
    cost = costs["ours"]
    billed = cost.ours.billed
    cells = {
        "data": data, "window": f"{window_tokens // 1000}k", "conversations": str(cost.conversations),
        "requests": str(cost.requests), "ours": f"{billed / 1e6:.2f}M",
    }  # fmt: skip
    for name, other in costs.items():
        if name != "ours":
            cells[name] = f"{other.ours.billed / 1e6:.2f}M" if other.reached else "-"
    return {
        **cells,
        "full": f"{cost.full.billed / 1e6:.2f}M", "sliding": f"{cost.sliding.billed / 1e6:.2f}M",
        "of full": f"{billed / cost.full.billed:.2f}", "worst": f"{cost.worst:.2f}",
        "of sliding": f"{billed / cost.sliding.billed:.2f}",
        "hit": f"{cost.ours.cached_tokens / cost.ours.prompt_tokens:.2f}",
        "epochs": f"{100 * cost.epochs / cost.requests:.1f}",
        "evidence": f"{cost.evidence_tokens / cost.requests:.0f}",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="some conversations, some windows: under two minutes")
    parser.add_argument("--data", default=",".join(DATA), help="of " + ", ".join(DATA))
    parser.add_argument("--windows", default="", help="tokens, comma between them; default: each data set's own")
    parser.add_argument("--markdown", action="store_true")
    given = parser.parse_args()
    lines = []
    with ProcessPoolExecutor(1 if given.quick else 2, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        jobs = []
        for name in given.data.split(","):
            own = DATA[name].quick_windows if given.quick else DATA[name].windows
            for window in map(int, given.windows.split(",")) if given.windows else own:
                rows = {row.name: pool.submit(measure, row.name, name, window, given.quick) for row in VARIANTS}
                jobs.append((name, window, rows))
        for name, window, rows in jobs:
            costs = {variant: job.result() for variant, job in rows.items()}
            print(f"{name}: {window}", file=sys.stderr, flush=True)
            if costs["ours"].requests:
                lines.append(line(name, window, costs))
    print(show(lines, given.markdown))


if __name__ == "__main__":
    main()
