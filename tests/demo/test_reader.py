"""The demo reader is read as a dialogue: what it asks for, what it is given, what it says."""

import json
from typing import Any

import pytest

from proxy.demo.reader import read, seen_text, sentences, stem

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("weather", "page_fault", "vm_search_pages")
]
RIGGER = "The rigger, Odile, wants 1,340 euros for the forestay. She comes in May."


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def request(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": list(messages), **fields}


def calls(message: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (c["function"]["name"], json.loads(c["function"]["arguments"]))
        for c in message.get("tool_calls", [])
    ]


def result(message: dict[str, Any], number: int, value: Any) -> dict[str, Any]:
    call_id = message["tool_calls"][number]["id"]
    return {"role": "tool", "tool_call_id": call_id, "content": json.dumps(value)}


def test_answers_from_a_native_message_without_a_call() -> None:
    asked = request(user(RIGGER), user("How much does Odile want for the forestay?"), tools=TOOLS)
    assert "1,340 euros" in read(asked)["content"]


def test_answers_from_a_context_line_and_undoes_its_quoting() -> None:
    block = '<VM:CONTEXT>\nU (msg_0003): "Say \\"heron\\"\\nOdile wants 1,340 \\u003ceuros> for the forestay."\n</VM:CONTEXT>'
    asked = user([{"type": "text", "text": block}, {"type": "text", "text": "How much does Odile want for the forestay?"}])
    assert "1,340 <euros>" in read(request(asked, tools=TOOLS))["content"]
    assert 'Say "heron"\nOdile wants 1,340 <euros> for the forestay.' in seen_text(request(asked))


def test_a_reduced_line_is_only_a_lead_that_is_faulted_after_the_search() -> None:
    block = '<VM:CONTEXT>\nU (msg_0003, level 2): "Odile forestay 1,340 euros"\n</VM:CONTEXT>'
    asked = request(
        {"role": "developer", "content": block}, user("How much does Odile want for the forestay?"), tools=TOOLS
    )
    assert not any("forestay 1,340" in text for text in seen_text(asked))
    search = read(asked)
    assert calls(search)[0][0] == "vm_search_pages"
    asked["messages"] += [search, result(search, 0, {"results": []})]
    assert calls(read(asked)) == [("page_fault", {"page_id": "msg_0003"})]


def test_searches_then_faults_then_answers_and_never_repeats_itself() -> None:
    asked = request(user("What colour did Bernard pick for the hull?"), tools=TOOLS)
    made: list[str] = []
    for _ in range(9):
        said = read(asked)
        if not said.get("tool_calls"):
            break
        asked["messages"].append(said)
        for number, (name, arguments) in enumerate(calls(said)):
            made.append(json.dumps([name, arguments]))
            if name == "vm_search_pages":
                hits = [{"page_id": f"msg_{i:04d}", "hint": "Bernard and the hull"} for i in range(1, 7)]
                asked["messages"].append(result(said, number, {"results": hits}))
            else:
                text = "Bernard picked oxblood red for the hull." if arguments["page_id"] == "msg_0002" else "Rain."
                page = {"page_id": arguments["page_id"], "level": 0, "content": {"text": text}}
                asked["messages"].append(result(said, number, {"page": page}))
    assert "oxblood" in said["content"]
    assert len(made) == len(set(made)) <= 5
    assert any("oxblood" in text for text in seen_text(asked))


def test_a_complete_hit_is_evidence_and_a_cut_hint_is_not() -> None:
    asked = request(user("What red did Bernard pick for the hull?"), tools=TOOLS)
    search = read(asked)
    hits = [
        {"page_id": "msg_0001", "hint": "Bernard picked oxblood red for the hull.", "complete": True},
        {"page_id": "msg_0002", "hint": "Bernard said that the hull"},
    ]
    asked["messages"] += [search, result(search, 0, {"results": hits})]
    assert "oxblood" in read(asked)["content"]
    assert "Bernard said that the hull" not in seen_text(asked)
    asked["messages"][-1] = result(search, 0, {"results": hits[1:], "also": [f"U (msg_0003, seen 2026-05-01): {hits[0]['hint']}"]})
    assert "oxblood" in read(asked)["content"]


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": TOOLS[:1]}])
def test_without_vm_tools_it_says_that_it_does_not_know(fields: dict[str, Any]) -> None:
    said = read(request(user(RIGGER), user("What colour did Bernard pick for the hull?"), **fields))
    assert "do not know" in said["content"]


def test_gives_up_after_bounded_rounds_when_nothing_is_found() -> None:
    asked = request(user("What colour did Bernard Quince pick for the hull of Petrel?"), tools=TOOLS)
    rounds = 0
    while (said := read(asked)).get("tool_calls"):
        rounds += 1
        asked["messages"].append(said)
        for number in range(len(said["tool_calls"])):
            asked["messages"].append(result(said, number, {"error": "nothing"}))
    assert rounds <= 3 and "do not know" in said["content"]


def test_parallel_calls_can_be_forbidden() -> None:
    asked = request(user("What colour did Bernard pick?"), tools=TOOLS, parallel_tool_calls=False)
    search = read(asked)
    hits = [{"page_id": f"msg_{i:04d}", "hint": "Bernard"} for i in range(3)]
    asked["messages"] += [search, result(search, 0, {"results": hits})]
    assert len(calls(read(asked))) == 1


def test_a_statement_is_acknowledged_with_its_key_fact_and_no_call() -> None:
    said = read(request(user("It was a long day. Odile wants 1,340 euros. I am tired."), tools=TOOLS))
    assert said["content"] == "Noted: Odile wants 1,340 euros."


def test_a_forced_client_tool_is_called_and_json_is_json() -> None:
    forced = {"type": "function", "function": {"name": "weather"}}
    assert calls(read(request(user("Hello?"), tools=TOOLS, tool_choice=forced)))[0][0] == "weather"
    said = read(request(user(RIGGER), user("How much does Odile want?"), response_format={"type": "json_object"}))
    assert "1,340" in json.loads(said["content"])["answer"]


def test_seen_text_joins_the_parts_of_a_message_and_reads_memory_rendered_as_text() -> None:
    lines = ['U (msg_0004.1): "The keel is of "', 'U (msg_0004.2): "elm."']
    memory = {"page": {"page_id": "msg_0009", "level": 0, "content": {"text": "Bees."}}}
    block = "\n".join(["<VM:CONTEXT>", *lines, f"T (memory): {json.dumps(memory)}", "</VM:CONTEXT>"])
    seen = seen_text(request(user(block), user("Thanks.")))
    assert "The keel is of elm." in seen and "Bees." in seen


def test_the_same_request_gets_the_same_answer() -> None:
    asked = request(user("What colour did Bernard pick for the hull?"), tools=TOOLS)
    assert read(asked) == read(json.loads(json.dumps(asked)))


def test_words() -> None:
    assert stem("Bolts") == stem("bolt") and stem("paid") == stem("pay")
    assert sentences("Mr. Nance came. He hummed.") == ["Mr. Nance came.", "He hummed."]
