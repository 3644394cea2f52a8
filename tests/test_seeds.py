"""Every Python block of the seed documents runs against this library, in document order.

The import root `chuk_ai_session_manager` reads `proxy`; a later `class MemoryManager:` block ("...
(previous code)") goes on with the class before it; nothing is skipped, and what a block builds is
used. Where ../shared/seeds is absent the tests are skipped; `test_the_seeds_api_in_our_words` is not.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import os
import re
import textwrap
import threading
from collections.abc import Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

import proxy.memory
from proxy.memory import MemoryPage, StorageTier

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("LLM_PAGER_DATA", str(ROOT.parent / "shared" / "data")))
SEEDS = DATA.parent / "seeds"
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Names that the guide uses without importing them: it has imported their neighbours above.
_ASSUMED = ("AvailablePageEntry", "PageType")


def documents() -> list[str]:
    files = sorted(SEEDS.glob("*.txt"))
    if not files:
        pytest.skip(f"the seed documents are not in {SEEDS}")
    return [path.read_text(encoding="utf-8") for path in files]


def blocks(document: str) -> list[str]:
    return [b.replace("chuk_ai_session_manager", "proxy") for b in _BLOCK.findall(document)]


def compiled(source: str) -> CodeType:
    """The block with top-level `await`; a snippet with a top-level `return` becomes a function."""
    goes_on = "(previous code)" in source
    if goes_on:
        source = source.replace("class MemoryManager:", "class MemoryManager(MemoryManager):")
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    try:
        return compile(source, "<seed block>", "exec", flags)
    except SyntaxError as error:
        if "'return' outside function" not in str(error):
            raise
    body = textwrap.indent(source, "    ")
    return compile(f"async def _snippet():\n{body}\n_result = await _snippet()\n", "<seed block>",
                   "exec", flags)


def run(source: str, names: dict[str, Any]) -> None:
    code = compiled(source)
    if code.co_flags & inspect.CO_COROUTINE:
        async def awaited() -> None:
            await eval(code, names)

        asyncio.run(awaited())
    else:
        exec(code, names)


class Upstream:
    """A Chat Completions server on a free port of this machine; its second answer is a fault."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        told = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                told.requests.append(body)
                data = json.dumps(told.answer(len(told.requests))).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @staticmethod
    def answer(number: int) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": f"answer {number}"}
        if number == 2:
            arguments = json.dumps({"page_id": "msg_0000", "target_level": 2})
            call = {"name": "page_fault", "arguments": arguments}
            tool_calls = [{"id": "call_1", "type": "function", "function": call}]
            message = {"role": "assistant", "content": None, "tool_calls": tool_calls}
        reason = "tool_calls" if number == 2 else "stop"
        choice = {"index": 0, "message": message, "finish_reason": reason}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        return {"id": f"chatcmpl-{number}", "object": "chat.completion", "created": 1,
                "model": "gpt-4o", "choices": [choice], "usage": usage}


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[Upstream]:
    server = Upstream()
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    yield server
    server.close()


def snippet_names(manager: Any) -> dict[str, Any]:
    """What the guide's snippets take for granted: a memory with a few pages, and one page more."""
    memory = manager("session_snippets")
    for number in range(3):
        asyncio.run(memory.add_user_message(f"message number {number}"))
    page = MemoryPage(page_id="msg_extra", content="one page more", storage_tier=StorageTier.L0)
    memory.combined.register(page)
    return {
        "memory": memory,
        "page": page,
        "page_id": "msg_0001",
        "estimated_tokens": page.estimate_tokens(),
        "system_pages": [memory._pages["msg_0000"]],
        "get_current_pages": lambda: list(memory._pages.values()),
        "datetime": datetime,
    }


def after(source: str, names: dict[str, Any], upstream: Upstream) -> None:
    """Use what a block made."""
    if "class InfiniteVMConversation" in source:
        asyncio.run(_close_a_segment(names["InfiniteVMConversation"]("session_infinite")))
    elif "class TracingMemoryManager" in source:
        asyncio.run(_evict_under_trace(names["TracingMemoryManager"]("session_traced")))
    elif "AsyncOpenAI" in source:
        _check_the_talk(upstream)
    elif "on_topic_change" in source:
        asyncio.run(names["on_topic_change"]())
    elif "[Content unavailable" in source:
        assert names["_result"] is None  # msg_0001 is there, so no fallback
    elif "build_context_for_model" in source:
        message, tools = asyncio.run(names["build_context_for_model"]())
        assert "<VM:CONTEXT>" in message and '(msg_002): "Assistant response"' in message
        assert [tool.function.name for tool in tools] == ["page_fault", "search_pages"]
    elif "sm.get_messages_for_llm" in source:
        text = json.dumps(names["messages"])
        assert "What's the best auth approach?" in text and "JWT tokens" in text
        assert "VM:CONTEXT" in text


async def _close_a_segment(talk: Any) -> None:
    await talk.memory.add_user_message("We chose JWT.")
    await talk.memory.add_assistant_message("Agreed: JWT it is.")
    await talk.on_segment_complete()
    memory = talk.memory
    assert memory.working_set.get_l0_page_ids() == ["summary_seg_01"]
    entry = memory.page_table.lookup("msg_0000")
    assert entry.tier is StorageTier.L2
    stored = await memory.storage.load_page(entry.artifact_id)
    assert stored.content == "We chose JWT."
    back = await memory.fault_handler.handle_fault("msg_0001", 0)
    assert back.success and back.page.content == "Agreed: JWT it is."


async def _evict_under_trace(memory: Any) -> None:
    for number in range(5):
        await memory.add_user_message(f"{number} " + "many words of it " * 5_500)
    before = memory.working_set.get_l0_page_ids()
    await memory.check_and_evict()
    kept = memory.working_set.get_l0_page_ids()
    assert 0 < len(kept) < len(before) == 5
    gone = next(i for i in before if i not in kept)
    result = await memory.fault_handler.handle_fault(gone, 0)
    assert result.success and result.page.content.startswith(gone[-1])


def _check_the_talk(upstream: Upstream) -> None:
    assert len(upstream.requests) == 4  # three messages, one of them with a fault
    first, _, with_results, _ = upstream.requests
    assert [t["function"]["name"] for t in first["tools"]] == ["page_fault", "search_pages"]
    assert "<VM:MANIFEST_JSON>" in first["messages"][0]["content"]
    result = json.loads(with_results["messages"][-1]["content"])
    assert result["page"]["page_id"] == "msg_0000"
    assert "authentication" in result["page"]["content"]["text"]
    assert result["effects"]["promoted_to_working_set"] is True


def test_every_block_of_the_seeds_runs(
    upstream: Upstream, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = []
    for document in documents():
        names: dict[str, Any] = {"__name__": "seed"}
        names |= {name: getattr(proxy.memory, name) for name in _ASSUMED}
        found = blocks(document)
        assert len(found) == document.count("```python")
        for source in found:
            if "# Reserve tokens" in source:  # the first snippet: from here on a memory is assumed
                names |= snippet_names(names["MemoryManager"])
            run(source, names)
            after(source, names, upstream)
        counts.append(len(found))
    printed = capsys.readouterr().out
    for line in ("What's the weather like?", "Recall success rate", "Assistant: answer 1", "TLB hit rate",
                 "[TRACE] Created page msg_0000 in L0", "[TRACE] Evicted", "Faults this turn"):
        assert line in printed
    with capsys.disabled():
        print(f"\nseed blocks run: {' + '.join(map(str, counts))} = {sum(counts)}, skipped: 0")
    assert sum(counts) == sum(document.count("```python") for document in documents()) >= 20


# Blocks that take any `MemoryManager` with the guide's attributes: the library's own has them too.
_FOR_ANY_MANAGER = ("class InfiniteVMConversation", "class TracingMemoryManager")


async def test_the_librarys_manager_stands_in_for_the_guides() -> None:
    found = [b for document in documents() for b in blocks(document)]
    names: dict[str, Any] = {"__name__": "seed", "MemoryManager": proxy.memory.MemoryManager}
    names |= {name: getattr(proxy.memory, name) for name in ("MemoryPage", "Modality", "StorageTier")}
    for source in found:
        if any(wanted in source for wanted in _FOR_ANY_MANAGER):
            exec(compiled(source), names)
    talk = names["InfiniteVMConversation"]("session")
    await talk.memory.add_user_message("We chose JWT.")
    await talk.memory.add_assistant_message("Agreed.")
    await talk.on_segment_complete()
    assert talk.memory.working_set.get_l0_page_ids() == ["summary_seg_01"]
    back = await talk.memory.fault_handler.handle_fault("msg_0001", 0)
    assert back.success and back.page.content == "We chose JWT."
    config = proxy.memory.WorkingSetConfig(max_l0_tokens=1_200, reserved_tokens=100)
    traced = names["TracingMemoryManager"]("session", config)
    for number in range(20):
        page = await traced.add_user_message(f"{number} " + "words " * 60)
        await traced.check_and_evict()
        traced.new_turn()
    assert page.page_id == "msg_0020" and len(traced.working_set.get_l0_page_ids()) < 20


async def test_the_seeds_api_in_our_words(capsys: pytest.CaptureFixture[str]) -> None:
    """The names, signatures, fields and results that the documents show, without the documents."""
    memory = proxy.memory
    table = memory.PageTable()
    tlb = memory.PageTLB(max_entries=512)
    combined = memory.TLBWithPageTable(table, tlb)
    config = memory.WorkingSetConfig(max_l0_tokens=128_000, max_l1_pages=100, reserved_tokens=4000)
    budget = memory.TokenBudget(total_limit=128_000, reserved=4000)
    working_set = memory.WorkingSetManager(config=config, budget=budget)
    storage = memory.ArtifactsBridge(backend=memory.InMemoryBackend())
    pages: dict[str, MemoryPage] = {}

    async def get_page(page_id: str) -> MemoryPage | None:
        return pages.get(page_id)

    handler = memory.PageFaultHandler(page_table=table, get_page=get_page, max_faults_per_turn=3)
    page = MemoryPage(page_id="msg_001", modality=memory.Modality.TEXT, content="What now?",
                      storage_tier=StorageTier.L0, metadata={"role": "user"})  # fmt: skip
    entry = combined.register(page)
    working_set.add_to_l0(page)
    pages["msg_001"] = page
    assert (entry.page_id, entry.tier, entry.modality.value) == ("msg_001", StorageTier.L0, "text")
    assert working_set.get_l0_page_ids() == ["msg_001"] and working_set.can_fit(100)
    assert not working_set.needs_eviction() and working_set.calculate_eviction_target() == 0
    assert isinstance(working_set.get_eviction_candidates(from_tier=StorageTier.L0), list)

    artifact_id = await storage.store_page(page)
    table.update_location("msg_001", tier=StorageTier.L2, artifact_id=artifact_id)
    working_set.remove_from_l0("msg_001", page)
    assert [e.page_id for e in table.get_by_tier(StorageTier.L2)] == ["msg_001"]
    assert handler.can_fault()
    result = await handler.handle_fault("msg_001", 0)
    assert result.success and result.page is not None and result.error is None
    told = json.loads(handler.build_tool_result(result.page).model_dump_json())
    assert told["page"]["content"]["text"] == "What now?" and told["effects"]["tokens_est"] > 0
    assert handler.get_metrics().faults_this_turn == 1
    handler.new_turn()
    assert handler.get_metrics().faults_this_turn == 0

    available = memory.AvailablePageEntry(
        page_id="msg_002", modality="text", tier="L2", levels=[0, 1, 2], hint="tokens and claims"
    )
    found = memory.PageSearchHandler(available_pages=[available]).search(
        query="token", modality=None, limit=5
    )
    assert json.loads(found.model_dump_json())["results"][0]["page_id"] == "msg_002"
    builder = memory.ManifestBuilder(
        session_id="s", policies=memory.ManifestPolicies(max_faults_per_turn=3)
    )
    builder.add_working_set_page(page)
    builder.add_available_page_entry(available)
    packed = memory.ContextPacker().pack([page])
    message = memory.build_vm_developer_message(
        mode=memory.VMMode.STRICT,
        manifest_json=builder.build().model_dump_json(),
        context=packed.content,
    )
    assert 'U (msg_001): "What now?"' in message and '"msg_002"' in message
    assert memory.get_vm_tools()[0].function.name == "page_fault"
    assert memory.get_vm_tools_as_dicts()[1]["function"]["name"] == "search_pages"

    checkpoint_id = await storage.checkpoint(pages=[page], name="segment_1")
    assert [p.page_id for p in await storage.load_checkpoint(checkpoint_id)] == ["msg_001"]
    working_set.set_importance("msg_001", importance=0.9)
    assert table.get_stats().total_pages == 1 and 0 <= tlb.get_stats().hit_rate <= 1
    stats = working_set.get_stats()
    assert (stats.l0_pages, stats.tokens_used) == (0, 0) and stats.utilization == 0
    pinned = memory.PinnedSet(pin_last_n_turns=3)
    pinned.pin("system_prompt")
    assert pinned.is_pinned("system_prompt")
    memory.AntiThrashPolicy(eviction_cooldown_turns=3, fault_protection_turns=2)
    assert memory.MutationLogLite().get_context_at_turn(turn=5) == []
    metrics = memory.UserExperienceMetrics()
    assert metrics.recall_success_rate() == metrics.thrash_index() == 0
