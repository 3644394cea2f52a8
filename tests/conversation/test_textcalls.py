"""Calls written as text: every shape in every dress is the call that it is; talk about the tools is talk."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.channel import PASSIVE, TOOLS, Channel, vm_names
from proxy.conversation.chunks import MessageBuilder, decode_chunk
from proxy.conversation.sieve import Round, Sieve
from proxy.conversation.textcalls import Spoken, Watch, calls_in, unwrapped
from proxy.sse import EventParser
from tests.cpu import cpu_within
from tests.examples import examples

OURS = Channel(TOOLS, True, vm_names())
FAULT, SEARCH = "page_fault", "search_pages"
dump = json.dumps


def _python(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v!r}" for k, v in arguments.items())


def _tags(arguments: dict[str, Any], opening: str, closing: str) -> str:
    return "\n".join(opening.format(k) + str(v) + closing.format(k) for k, v in arguments.items())


# How model families write a call: (name, arguments) -> text.
SHAPES: dict[str, Any] = {
    "bare": lambda n, a: dump({"name": n, "arguments": a}),
    "parameters": lambda n, a: dump({"name": n, "parameters": a}, indent=2),
    "typed": lambda n, a: dump({"type": "function", "name": n, "parameters": a}),
    "openai": lambda n, a: dump({"id": "c1", "type": "function", "function": {"name": n, "arguments": dump(a)}}),
    "message": lambda n, a: dump({"tool_calls": [{"function": {"name": n, "arguments": dump(a)}}]}),
    "tool_call": lambda n, a: dump({"tool_call": {"name": n, "arguments": a}}),
    "tool": lambda n, a: dump({"tool": n, "tool_input": a}),
    "action": lambda n, a: dump({"action": n, "action_input": a}),
    "flat": lambda n, a: dump({"name": n, **a}),
    "keyed": lambda n, a: dump({n: a}),
    "arguments_first": lambda n, a: dump({"arguments": a, "name": n}),
    "single_quotes": lambda n, a: repr({"name": n, "arguments": a}),
    "doubled": lambda n, a: "{" + dump({"name": n, "arguments": a}) + "}",
    "list": lambda n, a: dump([{"name": n, "arguments": a}]),
    "hermes": lambda n, a: f"<tool_call>\n{dump({'name': n, 'arguments': a})}\n</tool_call>",
    "unclosed": lambda n, a: f"<tool_call>\n{dump({'name': n, 'arguments': a})}",
    "cut_brace": lambda n, a: dump({"name": n, "arguments": a})[:-1],
    "llama_tag": lambda n, a: f"<function={n}>{dump(a)}</function>",
    "qwen_coder": lambda n, a: f"<tool_call>\n<function={n}>\n" + _tags(
        a, "<parameter={}>\n", "\n</parameter>") + "\n</function>\n</tool_call>",
    "invoke": lambda n, a: f'<invoke name="{n}">\n' + _tags(a, '<parameter name="{}">', "</parameter>") + "\n</invoke>",
    "cline": lambda n, a: f"<{n}>\n" + _tags(a, "<{}>", "</{}>") + f"\n</{n}>",
    "glm": lambda n, a: f"<tool_call>{n}\n" + "\n".join(
        f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>" for k, v in a.items()) + "\n</tool_call>",
    "mistral": lambda n, a: f"[TOOL_CALLS][{dump({'name': n, 'arguments': a})}]",
    "mistral_spaced": lambda n, a: f"[TOOL_CALLS] [{dump({'name': n, 'arguments': a})}]",
    "mistral_args": lambda n, a: f"[TOOL_CALLS]{n}[ARGS]{dump(a)}",
    "python_tag": lambda n, a: f"<|python_tag|>{dump({'name': n, 'parameters': a})}",
    "python_tag_call": lambda n, a: f"<|python_tag|>{n}.call({_python(a)})",
    "granite": lambda n, a: f"<|tool_call|>[{dump({'name': n, 'arguments': a})}]",
    "phi": lambda n, a: f"<|tool_call|>{dump({'name': n, 'arguments': a})}<|/tool_call|>",
    "harmony": lambda n, a: f"<|channel|>commentary to=functions.{n} <|constrain|>json<|message|>{dump(a)}<|call|>",
    "deepseek": lambda n, a: "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>"
                f"{n}\n```json\n{dump(a)}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "kimi": lambda n, a: "<|tool_calls_section_begin|><|tool_call_begin|>functions."
            f"{n}:0<|tool_call_argument_begin|>{dump(a)}<|tool_call_end|><|tool_calls_section_end|>",
    "fence": lambda n, a: f"```json\n{dump({'name': n, 'arguments': a})}\n```",
    "fence_tool": lambda n, a: f"```tool_call\n{dump({'name': n, 'arguments': a})}\n```",
    "fence_python": lambda n, a: f"```python\n{n}({_python(a)})\n```",
    "gemma": lambda n, a: f"```tool_code\nprint(default_api.{n}({_python(a)}))\n```",
    "pythonic": lambda n, a: f"[{n}({_python(a)})]",
    "call": lambda n, a: f"{n}({_python(a)})",
    "call_object": lambda n, a: f"{n}({dump(a)})",
    "object_behind": lambda n, a: f"{n} {dump(a)}",
    "react": lambda n, a: f"Action: {n}\nAction Input: {dump(a)}",
}  # fmt: skip
SHAPES |= {
    "react_words": lambda n, a: f"Action: {n}\nAction Input: {next(iter(a.values()))}",
    "escaped": lambda n, a: dump({"name": n, "arguments": a}).replace("_", "\\_"),
    "yaml": lambda n, a: f"{n}:\n" + "\n".join(f"  {k}: {v}" for k, v in a.items()),
}
DRESSES = ["{}", "functions.{}", "default_api.{}", "tools/{}", "{}_tool", "vm_{}"]
PREAMBLES = ["", "\n", "Let me look:\n", "I need to find that first.\n\n", "<think>I could use page_fault.</think>\n\n",
             "Sure, one moment. "]  # fmt: skip
CALLS = [
    (FAULT, {"page_id": "msg_0036"}), (FAULT, {"page_id": "msg_0004.2", "target_level": 0}),
    (SEARCH, {"query": "flooring"}), (SEARCH, {"query": "marley flooring (black)", "limit": 3}),
]  # fmt: skip


def normal(spoken: list[Spoken] | None) -> Any:
    """Arguments in tags are text, whatever they mean."""
    assert spoken is not None
    return [(tool, {k: str(v) for k, v in json.loads(arguments).items()}) for tool, arguments in spoken]


def expected(tool: str, arguments: dict[str, Any]) -> Any:
    return [(tool, {k: str(v) for k, v in arguments.items()})]


@pytest.mark.parametrize("shape", SHAPES)
def test_call_is_read_in_every_shape_and_dress(shape: str) -> None:
    for (tool, arguments), dress, preamble in itertools.product(CALLS, DRESSES, PREAMBLES):
        if shape in ("cline", "call", "fence_python", "pythonic") and "/" in dress:
            continue
        if shape == "react_words":
            arguments = dict([next(iter(arguments.items()))])
        text = preamble + SHAPES[shape](dress.format(tool), arguments)
        assert normal(calls_in(text, OURS)) == expected(tool, arguments), text


def test_calls_in_a_row_are_all_read() -> None:
    two = [SHAPES["hermes"](tool, arguments) for tool, arguments in (CALLS[0], CALLS[2])]
    made = [*expected(*CALLS[0]), *expected(*CALLS[2])]
    assert normal(calls_in("\n".join(two), OURS)) == made
    array = dump([{"name": t, "arguments": a} for t, a in (CALLS[0], CALLS[2])])
    assert normal(calls_in(f"[TOOL_CALLS]{array}", OURS)) == made
    assert normal(calls_in("[page_fault(page_id='msg_0036'), search_pages(query='flooring')]", OURS)) == made
    assert normal(calls_in("page_fault msg_0036", OURS)) == made[:1]


@pytest.mark.parametrize("text", [
    '{"name": "search_pages", "arguments": {"quer', '{"name": "page_fault", "arguments": {"page": ',
    '<tool_call>\n{"name": "search_pages", "arguments": {}}\n</tool_call>', "search_pages(query=",
    "[TOOL_CALLS]search_pages[ARGS]", "<function=page_fault>", '{"name": "page_fault"}',
])  # fmt: skip
def test_call_that_cannot_be_read_is_no_answer(text: str) -> None:
    assert calls_in(text, OURS) == []


LONG = "The function takes a page's id and loads the whole text of it into the window of the model. " * 3
ANSWERS = [
    "I could use page_fault to load that page, but I think that we do not need it.",
    "A page fault occurs when a program touches memory that is not mapped.",
    "The tools are called page_fault and search_pages.",
    "`page_fault(page_id)` loads a page; `search_pages(query)` finds one.",
    f"{LONG}\n\n```json\n{SHAPES['bare'](FAULT, {'page_id': 'msg_0036'})}\n```\n\n{LONG}",
    f"{LONG}\n\n```python\nsearch_pages(query='x')\n```",
    '{"answer": "page_fault is a tool of llm-pager"}',
    '{"name": "Jon", "arguments": {"page_id": "msg_0001"}}',
    "def page_fault_handler(page_id):\n    return None",
    "He looked at marley flooring.", "", '{"name": "lookup", "arguments": {"query": "x"}}',
    "<think>I will call search_pages(query='x') now",
]


@pytest.mark.parametrize("text", ANSWERS)
def test_answer_is_an_answer_whatever_it_speaks_of(text: str) -> None:
    assert calls_in(text, OURS) is None


def test_call_with_an_imagined_result_is_a_call() -> None:
    text = SHAPES["hermes"](*CALLS[2]) + "\n<tool_response>\n" + LONG + "</tool_response>\nHe liked it."
    assert normal(calls_in(text, OURS)) == expected(*CALLS[2])


def test_reading_is_bounded_whatever_the_text() -> None:
    for text in ("page_fault{" * 180, "[{" * 900 + "page_fault", "search_pages(" * 150, "<page_fault>" * 150,
                 "{'page_fault': " * 130, '"' * 1900 + "page_fault("):  # fmt: skip
        with cpu_within(0.5, text[:20]):
            found = calls_in(text, OURS)
            watch = Watch()
            for char in text[:600]:
                watch.feed(char)
        assert not found, "none of them ends"


def test_where_people_speak_of_the_tools_an_example_is_an_answer_and_a_mere_call_is_a_call() -> None:
    call = SHAPES["bare"](FAULT, {"page_id": "msg_0036"})
    example = f"You can call it like this:\n\n```json\n{call}\n```\nIt loads the page."
    assert calls_in(example, OURS, lambda: True) is None
    assert calls_in(call, OURS, lambda: True) and calls_in(f"```json\n{call}\n```", OURS, lambda: True)
    assert calls_in(f"Let me look:\n{call}", OURS, lambda: True)
    passive = Channel(PASSIVE, False, vm_names())  # nobody offered it: people asked for the text
    assert calls_in(call, passive, lambda: True) is None
    assert calls_in(call, passive, lambda: False)


def test_text_that_calls_a_clients_tool_is_the_clients() -> None:
    channel = Channel(TOOLS, True, vm_names(["page_fault"]), frozenset({"page_fault"}), True)
    assert calls_in(SHAPES["bare"](FAULT, {"page_id": "msg_0036"}), channel) is None
    ours = calls_in(SHAPES["bare"]("vm_page_fault", {"page_id": "msg_0036"}), channel)
    assert normal(ours) == expected(FAULT, {"page_id": "msg_0036"})


def test_calls_within_a_call_are_ours_when_all_of_them_are() -> None:
    fault = {"recipient_name": "functions.page_fault", "parameters": {"page_id": "msg_0036"}}
    other = {"recipient_name": "functions.lookup", "parameters": {"query": "x"}}
    assert normal(unwrapped(dump({"tool_uses": [fault]}), OURS)) == expected(FAULT, {"page_id": "msg_0036"})
    assert unwrapped(dump({"tool_uses": [fault, other]}), OURS) == []
    assert unwrapped("{", OURS) == [] == unwrapped(dump({"page_id": "msg_0036"}), OURS)


# -- in a stream


def stream(text: str, cuts: list[int], hold: int = 8, offer: bool = True) -> tuple[Round, str]:
    """(the round, what the client has read) of a text that comes in pieces."""
    sieve = Sieve(OURS, hold, 500, False, False, lambda piece: len(piece.split()))
    sieve.begin_round(offer)
    at = sorted({cut % (len(text) + 1) for cut in cuts})
    pieces = [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]
    out: list[bytes] = []
    for piece in [*pieces, None]:
        delta = {"content": piece} if piece is not None else {}
        choice = {"index": 0, "delta": delta, "finish_reason": None if piece is not None else "stop"}
        chunk = {"id": "x", "created": 1, "model": "m", "choices": [choice]}
        out += sieve.feed(b"data: " + dump(chunk).encode() + b"\n\n", 0.0)
    ended, ready = sieve.end_round()
    builder = MessageBuilder()
    for event in EventParser().feed(b"".join([*out, *ready])):
        chunk = decode_chunk(event.data) or {}
        builder.add(chunk["choices"][0]["delta"])
    return ended, builder.build()["content"] or ""


cuts = st.lists(st.integers(0, 400), max_size=60)


@examples(60)
@given(st.sampled_from(sorted(SHAPES)), st.sampled_from(CALLS), st.sampled_from(PREAMBLES), cuts,
       st.integers(0, 30), st.booleans())
def test_call_as_text_stays_inside_however_its_stream_is_cut(
    shape: str, call: tuple[str, dict[str, Any]], preamble: str, cut: list[int], hold: int, offer: bool
) -> None:
    text = preamble + SHAPES[shape](*call)
    ended, shown = stream(text, cut, hold, offer)
    if shape == "react_words":
        call = call[0], dict([next(iter(call[1].items()))])
    made = [c["function"] for c in ended.message["tool_calls"]]
    assert normal([Spoken(c["name"], c["arguments"]) for c in made]) == expected(*call)
    assert shown.count("<think>") == shown.count("</think>")
    assert not re.search("page|search|tool", shown.rpartition("</think>")[2], re.IGNORECASE), shown
    most = preamble + ("Action: " if "react" in shape else "")  # which may begin an answer as well
    assert most.startswith(shown)


@examples(30)
@given(st.sampled_from(ANSWERS), cuts, st.integers(0, 30), st.booleans())
def test_answer_leaves_whole_however_its_stream_is_cut(
    text: str, cut: list[int], hold: int, offer: bool
) -> None:
    ended, shown = stream(text, cut, hold, offer)
    assert shown == text and not ended.message.get("tool_calls") and not ended.unread


@examples(60)
@given(st.text("pagefultsrch_s {}[]<>|`\n\"':(),.aT=/", max_size=60), cuts)
def test_stream_and_a_whole_answer_give_the_same(text: str, cut: list[int]) -> None:
    ended, shown = stream(text, cut)
    whole = calls_in(text, OURS)
    if whole is None:
        assert shown == text
    else:
        assert ended.unread or len(ended.message["tool_calls"]) == len(whole)


PROSE = ("He looked at marley flooring, which is soft, and cheap: about 4 < 5 dollars. I would search the page "
         "of the shop (it has one) for more; see [the list](https://x.y) and **notes**.\n\n- one\n- two\n") * 3


def test_prose_flows_as_it_comes() -> None:
    watch, late = Watch(), 0
    for word in re.findall(r"\s*\S+|\s+$", PROSE):
        late += watch.feed(word)
    assert late <= 8  # one word behind "search", "page" and a link, once


@pytest.mark.parametrize(("text", "most"), [
    ('{"city": "Oslo", "people": 700000}', 12), ('{"name": "Jon", "age": 3, "x": "y"}', 16),
    ("```python\ndef area(r):\n    return 3 * r * r\n```", 26), ("[1] The first source says so.", 7),
    ("<div>\n  <p>Hello there, my friend, how are you?</p></div>", 40), ("[The shop](https://x.y) has it.", 8),
])  # fmt: skip
def test_what_only_begins_like_a_call_is_held_until_that_is_clear(text: str, most: int) -> None:
    watch = Watch()
    held = [watch.feed(char) for char in text]
    assert sum(held) <= most and not all(held)


def test_what_is_held_is_bounded() -> None:
    watch = Watch()
    held = [watch.feed(piece) for piece in ['{"name": "page_fault", ', *["x " * 20] * 100]]
    assert held[0] and not held[-1] and sum(held) < 60


def test_invariant_10_a_piece_of_megabytes_is_no_call_and_costs_nothing() -> None:
    watch = Watch()
    with cpu_within(0.5):  # measured 0.01; read as a call might be, 1.6
        assert not watch.feed("p" * 20_000_000 + "page_fault(")
        assert not watch.feed("page_id=")
        assert watch.feed("x" * 20_000_000 + "</think>page_fault(")
