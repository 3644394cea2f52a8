"""The benches' own rulers: what counts as shown, as right, and what the baselines and the reader do."""

from __future__ import annotations

import asyncio
import json
import shutil
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from proxy import keys
from proxy.config import Config
from proxy.conversation.records import decode_record
from proxy.storage import open_store
from tests.bench import scale
from tests.bench.baselines import (
    Message,
    Oracle,
    SlidingWindow,
    StemmedBM25,
    fill,
)
from tests.bench.coverage import folded, is_right, share_shown, shows, window_text
from tests.bench.making import Conversation, completion, make
from tests.bench.recall import Reader, cell, ranking, setting
from tests.e2e.processes import ServerProcess

TEXT = 'Ann said:\n\t"<VM: the café\'s path is C:\\new\\table" and left.'
LONG = " ".join(f"word{i}" for i in range(400))


@pytest.mark.parametrize(
    "wrapped",
    [
        TEXT,
        f"msg_0001 U: {json.dumps(TEXT)}",
        json.dumps({"hint": TEXT}, ensure_ascii=False),
        json.dumps({"hint": TEXT}).replace("<", "\\u003c"),
        json.dumps({"again": json.dumps({"hint": TEXT})}),
    ],
)
def test_coverage_reads_a_text_through_its_quotation(wrapped: str) -> None:
    request = {"messages": [{"role": "user", "content": [{"type": "text", "text": f"x {wrapped} y"}]}]}
    assert shows(window_text(request), folded(TEXT))
    assert not shows(window_text(request), folded(TEXT + " No more"))


def test_coverage_joins_the_pieces_of_a_long_text_and_misses_a_gap() -> None:
    first, second = LONG[:1500], LONG[1500:]
    window = folded(f"msg_0007.2 U: {second!r}\nmsg_0007.1 U: {first!r}")
    assert shows(window, folded(LONG))
    assert not shows(folded(f"{first} ... {second[40:]}"), folded(LONG))
    assert share_shown(window, [folded(LONG), folded("absent")]) == 0.5


def test_coverage_calls_an_answer_right_by_two_thirds_of_its_key_words() -> None:
    assert is_right("It was on the 7th of May, in 2023.", "7th May 2023")
    assert is_right("She is a nurse", "a trained nurse at work") is False
    assert is_right("The Hague", "the") is True is not is_right("A cat", "the")


def _messages(*texts: str) -> list[Message]:
    return [Message(i, "user", text, "", None, 0, 10) for i, text in enumerate(texts)]


def test_baselines_stay_within_their_budget_and_rank_as_they_say() -> None:
    messages = _messages("a red bicycle", "the running dogs", "x", "y", "z", "w", "v")
    assert SlidingWindow(messages).window("", (), 35) == [6, 5, 4]
    assert Oracle(messages).window("", (0, 1), 30) == [0, 1, 6]
    assert StemmedBM25(messages).search("Which dog runs to the ...?", 5) == [1]
    assert StemmedBM25(messages).window("bicycles", (), 55) == [6, 5, 4, 3, 0]
    assert fill([0, 1], messages, 10, tail=0) == [0]


def test_ranking_counts_results_tokens_and_what_is_newest() -> None:
    messages = [Message(i, "user", "", "", None, i // 2, 400) for i in range(30)]
    values = ranking([5, 0, 7, 6], (0, 7), messages)
    assert (values["R@1"], values["R@5"]) == (0, 1)
    assert (values["all@1000"], values["all@2000"]) == (False, True)
    assert values["session"] == 1
    assert values["1.5k+1k"] is False and values["9k+2k"] is True


def test_reader_searches_once_faults_what_was_cut_and_then_ends() -> None:
    tools: list[dict[str, Any]] = [{"function": {"name": f"vm_{name}"}} for name in ("page_fault", "search_pages")]
    reader = Reader("Where?", ["In the Hague.", "By train."])
    request: dict[str, Any] = {"tools": tools, "messages": [{"role": "user", "content": "Where?"}]}
    [search] = reader.reply(request)["tool_calls"]
    assert search["function"]["name"] == "vm_search_pages"
    results = [{"page_id": "msg_0001", "complete": True}, {"page_id": "msg_0002"}]
    request["messages"].append({"role": "tool", "content": json.dumps({"results": results, "hint": "In the Hague."})})
    [fault] = reader.reply(request)["tool_calls"]
    assert json.loads(fault["function"]["arguments"]) == {"page_id": "msg_0002"}
    request["messages"].append({"role": "tool", "content": "By train."})
    assert reader.reply(request)["content"] and reader.shares == [0, 0.5, 1]


def test_reader_does_not_search_for_what_it_sees_nor_without_tools() -> None:
    request = {"messages": [{"role": "user", "content": "In the Hague."}]}
    assert "tool_calls" not in Reader("Where?", ["In the Hague."]).reply(request)
    assert "tool_calls" not in Reader("Where?", ["Elsewhere."]).reply(request)


def test_table_shows_the_difference_on_the_same_questions() -> None:
    assert cell({"a": 1, "b": 0}, None, "lost") == "50.0"
    assert cell({"a": 1, "b": 0, "c": 1}, {"a": 0, "b": 0}, "lost") == "66.7 +50.0±50.0"
    assert setting("prefetch.max_pages=20") == {"prefetch": {"max_pages": 20}}


TIMED = {keys.BLOCK, b"h"}  # blocks have requests with the minute in which a page was seen; a head has its time


def stored(config: Config) -> dict[bytes, object]:
    """All that a store has of conversations, but for when it was."""

    async def read() -> dict[bytes, object]:
        store = open_store(config)
        rows = {key: value for kind in set(keys.KINDS) - TIMED for key, value in store.scan(kind, limit=10_000)}
        await store.close()
        return {key: timeless(key, value) for key, value in rows.items()}

    def timeless(key: bytes, value: bytes) -> object:
        if key[:1] == keys.CONVERSATION:
            return value[:-4]
        if key[:1] != keys.RECORD:
            return value
        # (What upstream was sent tells when a page was seen, to the minute: its hash is another one after a while.)
        return msgspec.structs.replace(decode_record(value), seen_s=0, answered_s=0, request=None)

    return asyncio.run(read())


def test_a_made_conversation_is_the_one_that_the_server_stores(tmp_path: Path) -> None:
    conversation = Conversation(7)
    made, served = (scale.Engine(name, {"l2": {"path": str(tmp_path / name)}}, int) for name in ("made", "served"))
    asyncio.run(open_store(made.config(tmp_path)).close())
    shutil.copytree(tmp_path / "made", tmp_path / "served")  # one secret
    asyncio.run(make(made.config(tmp_path), [conversation.number]))

    async def talk() -> None:
        async with AsyncExitStack() as running:
            model = await asyncio.get_running_loop().create_server(scale.Model, "127.0.0.1", 0)
            running.callback(model.close)
            upstream = {"base_url": f"http://127.0.0.1:{model.sockets[0].getsockname()[1]}/v1"}
            server = running.enter_context(ServerProcess({"tiers": served.tiers, "upstream": upstream}))
            client = await scale.Client(server.port).open()
            for request, answer in conversation.turns():
                said = {"role": "assistant", "content": answer}
                await client.chat(request, conversation.headers, completion(said))
            client.close()

    asyncio.run(talk())
    ours, theirs = stored(made.config(tmp_path)), stored(served.config(tmp_path))
    assert len(ours) > 50 and ours == theirs
