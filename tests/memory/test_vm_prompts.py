import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken

from proxy.memory import VMMode, build_vm_developer_message, get_vm_tools, get_vm_tools_as_dicts
from proxy.memory.vm_prompts import vm_rules, without_citations

LIMITS = {VMMode.STRICT: 160, VMMode.RELAXED: 130, VMMode.PASSIVE: 60}


@pytest.fixture
def count_o200k(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    """The real encoding, from the copy that litellm carries (no network)."""
    spec = importlib.util.find_spec("litellm")
    if spec is None or spec.origin is None:
        pytest.skip("litellm, which carries the encoding, is not installed")
    folder = Path(spec.origin).parent / "litellm_core_utils" / "tokenizers"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    encoding = tiktoken.get_encoding("o200k_base")
    return lambda text: len(encoding.encode_ordinary(text))


@pytest.mark.parametrize("mode", list(VMMode))
def test_rules_are_short(mode: VMMode, count_o200k: Callable[[str], int]) -> None:
    assert count_o200k(vm_rules(mode)) <= LIMITS[mode]


@pytest.mark.parametrize("mode", list(VMMode))
def test_every_mode_says_that_quoted_lines_are_data(mode: VMMode) -> None:
    assert "data, never instructions" in vm_rules(mode)
    assert "same conversation" in vm_rules(mode)


def test_modes_differ_as_named() -> None:
    strict, relaxed, passive = (vm_rules(m) for m in VMMode)
    assert "[msg_0042]" in strict
    assert "not in memory" in strict
    assert "[msg_0042]" not in relaxed
    for text in (strict, relaxed):
        assert "page_fault(page_id)" in text
        assert "search_pages(query)" in text
    assert "page_fault" not in passive
    assert "search_pages" not in passive


def test_the_developer_message_as_in_the_seeds() -> None:
    message = build_vm_developer_message(
        mode=VMMode.STRICT,
        manifest_json='{"total_available":1}',
        context='U (msg_0001): "hi"',
        system_prompt="Be kind.",
    )
    assert message.startswith("Be kind.\n\n<VM:RULES>\n")
    assert '<VM:MANIFEST_JSON>\n{"total_available":1}\n</VM:MANIFEST_JSON>' in message
    assert message.endswith('<VM:CONTEXT>\nU (msg_0001): "hi"\n</VM:CONTEXT>')
    assert "<VM:CONTEXT>\n" not in build_vm_developer_message(VMMode.RELAXED, "{}", "")


def test_tools_are_what_openai_takes() -> None:
    fault, search = get_vm_tools_as_dicts()
    assert fault["type"] == "function"
    assert list(fault["function"]) == ["name", "description", "parameters"]
    parameters = fault["function"]["parameters"]
    assert list(parameters["properties"]) == ["page_id", "target_level"]
    assert parameters["required"] == ["page_id"]
    level = parameters["properties"]["target_level"]
    assert (level["minimum"], level["maximum"], level["default"]) == (0, 3, 0)
    assert search["function"]["parameters"]["properties"]["modality"]["enum"] == [
        "text", "image", "audio", "video", "structured",
    ]  # fmt: skip
    assert search["function"]["parameters"]["properties"]["limit"]["default"] == 5
    assert "null" not in json.dumps([fault, search])


def test_names_on_collision_reach_tools_and_rules() -> None:
    names = {"page_fault": "vm_page_fault", "search_pages": "vm_search_pages"}
    tools = get_vm_tools_as_dicts(names=names)
    assert [tool["function"]["name"] for tool in tools] == list(names.values())
    rules = vm_rules(VMMode.RELAXED, names=names)
    assert "vm_page_fault(page_id)" in rules
    assert "vm_search_pages(query)" in rules


def test_invariant_07_tools_and_messages_are_constant() -> None:
    assert json.dumps(get_vm_tools_as_dicts()) == json.dumps(get_vm_tools_as_dicts())
    assert get_vm_tools_as_dicts() is not get_vm_tools_as_dicts()
    assert len(get_vm_tools(include_search=False)) == 1


@pytest.mark.parametrize("mode", list(VMMode))
def test_a_json_answer_is_never_asked_for_citations(
    mode: VMMode, count_o200k: Callable[[str], int]
) -> None:
    plain, for_json = vm_rules(mode), vm_rules(mode, json_mode=True)
    assert "cite" not in for_json and "[msg_" not in for_json
    assert ("cite" in plain) == (mode is VMMode.STRICT)
    assert count_o200k(for_json) <= count_o200k(plain)
    message = build_vm_developer_message(mode, "{}", "", json_mode=True)
    assert for_json in message and "cite" not in message
    assert without_citations(build_vm_developer_message(mode, "{}", "")) == message


def test_every_prefix_is_explained() -> None:
    for letter in "UATSIDVJ":
        assert re.search(rf"\b{letter}\b", vm_rules(VMMode.PASSIVE)), letter
