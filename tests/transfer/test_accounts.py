"""What ChatGPT and Claude accounts export, in the shapes that public converters describe, and what becomes of it."""

from __future__ import annotations

import base64
import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.exported import Conversation, Grown
from proxy.conversation.tree import Identity, TenantKey
from proxy.transfer.accounts import NOT_AS_TOLD, is_account_export, read_conversation
from tests.examples import examples
from tests.media.samples import png

Message = dict[str, Any]
WHEN_S = 1_700_000_000


def node(name: str, parent: str | None, role: str = "", content: Any = None, **more: Any) -> dict[str, Any]:
    if isinstance(content, str):
        content = {"content_type": "text", "parts": [content]}
    author = {"role": role, "name": more.pop("tool", None), "metadata": {}}
    message = {"id": name, "author": author, "create_time": WHEN_S, "content": content, "metadata": {}, **more}
    return {"id": name, "parent": parent, "children": [], "message": message if role else None}


def mapping(*nodes: dict[str, Any], current: str) -> dict[str, Any]:
    return {"title": "T", "conversation_id": "c", "update_time": WHEN_S + 0.5, "current_node": current,
            "mapping": {n["id"]: n for n in nodes}}  # fmt: skip


def branch(read: Conversation, n: int | None = None) -> list[Message]:
    """The messages up to one; by default up to the head."""


    by_n = {line.n: line for line in read.lines}
    at = by_n[n] if n is not None else next(line for line in read.lines if line.head)
    out: list[Message] = []
    while True:
        out.append(json.loads(bytes(at.message)))
        if at.parent is None:
            return out[::-1]
        at = by_n[at.parent]


def user(text: Any) -> Message:
    return {"role": "user", "content": text}


def model(text: str) -> Message:
    return {"role": "assistant", "content": text}


HIDDEN = {"metadata": {"is_visually_hidden_from_conversation": True}}


def test_chatgpt_what_was_said_is_in_turns_and_what_was_not_is_left_out() -> None:
    read = read_conversation(mapping(
        node("root", None),
        node("sys", "root", "system", ""),
        node("ctx", "sys", "user", {"content_type": "user_editable_context", "user_profile": "I am", "user_instructions": "x"}),
        node("u1", "ctx", "user", "Plot it."),
        node("th", "u1", "assistant", {"content_type": "thoughts", "thoughts": [{"summary": "s", "content": "c"}]}),
        node("say", "th", "assistant", "Let me see."),
        node("code", "say", "assistant", {"content_type": "code", "language": "python", "text": "print(6*7)"}, recipient="python"),
        node("out", "code", "tool", {"content_type": "execution_output", "text": "42"}, tool="python"),
        node("quote", "out", "tool", {"content_type": "tether_quote", "url": "http://a", "title": "A", "text": "words"}, tool="browser"),
        node("hid", "quote", "tool", "noise", tool="bio", **HIDDEN),
        node("a1", "hid", "assistant", "It is 42."),
        node("recap", "a1", "assistant", {"content_type": "reasoning_recap", "content": "Thought for 3s"}),
        node("u2", "recap", "user", "Thanks."),
        node("a2", "u2", "assistant", {"content_type": "text", "parts": ["You are", "welcome."]}),
        current="a2",
    ))  # fmt: skip
    assert branch(read) == [
        user("Plot it."),
        model("Let me see.\n\n[python was called]\nprint(6*7)\n\n[python answered]\n42\n\n"
              "[browser answered]\nA\nhttp://a\nwords\n\nIt is 42."),
        user("Thanks."), model("You are\nwelcome."),
    ]  # fmt: skip
    assert (read.name, read.title, read.last_s, read.lines[0].seen_s) == ("c", "T", WHEN_S, WHEN_S)


def test_chatgpt_branches_stay_and_the_shown_one_is_the_head() -> None:
    read = read_conversation(mapping(
        node("u1", None, "user", "Hi."), node("a1", "u1", "assistant", "Hello."), node("b1", "u1", "assistant", "Hey."),
        node("u2", "a1", "user", "One?"), node("u3", "a1", "user", "Two?"),
        node("a2", "u2", "assistant", "1"), node("a3", "u3", "assistant", "2"),
        current="a2",
    ))  # fmt: skip
    assert len(read.lines) == 7
    assert branch(read) == [user("Hi."), model("Hello."), user("One?"), model("1")]
    leaves = {line.n for line in read.lines} - {line.parent for line in read.lines}
    assert [user("Hi."), model("Hey.")] in [branch(read, n) for n in leaves] and len(leaves) == 3


def test_chatgpt_a_ring_and_an_orphan_are_no_end_of_the_world() -> None:
    read = read_conversation(mapping(
        node("x", "y", "user", "ring"), node("y", "x", "user", "ring"),
        node("u1", "gone", "user", "Hi."), node("a1", "u1", "assistant", "Hello."), current="x",
    ))  # fmt: skip
    assert [line.parent for line in read.lines] == [None, 0]


def test_chatgpt_pictures_come_out_of_the_archive_and_what_is_not_there_is_named() -> None:
    picture = png(8, 8)
    parts = [
        {"content_type": "image_asset_pointer", "asset_pointer": "sediment://file_1"},
        {"content_type": "real_time_user_audio_video_asset_pointer", "audio_asset_pointer": {"asset_pointer": "sediment://file_2"}},
        {"content_type": "audio_transcription", "text": "spoken"}, "What is it?",
    ]  # fmt: skip
    content = {"content_type": "multimodal_text", "parts": parts}
    value = mapping(node("u1", None, "user", content), node("a1", "u1", "assistant", "A cat."), current="a1")
    read = read_conversation(value, {"file_1": picture}.get)
    url = "data:image/png;base64," + base64.b64encode(picture).decode()
    text = "[file: sediment://file_2]\nspoken\nWhat is it?"
    assert branch(read)[0]["content"] == [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    assert branch(read_conversation(value))[0] == user(f"[file: sediment://file_1]\n{text}")


def claude(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"uuid": "u", "name": "N", "created_at": "2023-11-14T22:13:20.5Z", "updated_at": "2023-11-14T22:13:20.5Z",
            "chat_messages": list(messages), **more}  # fmt: skip


def spoken(name: str, sender: str, *blocks: Any, **more: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": b, "citations": []} if isinstance(b, str) else b for b in blocks]
    return {"uuid": name, "sender": sender, "text": "not read where there are blocks", "content": content,
            "created_at": "2023-11-14T22:13:20Z", "attachments": [], "files": [], **more}  # fmt: skip


def test_claude_blocks_attachments_and_files_are_text() -> None:
    use = {"type": "tool_use", "id": None, "name": "web_search", "input": {"q": "x"}}
    result = {"type": "tool_result", "name": "web_search", "content": [{"type": "text", "text": "found"}, {"type": "knowledge", "title": "t"}]}
    attached = {"file_name": "a.md", "file_size": 3, "file_type": "md", "extracted_content": "# A"}
    read = read_conversation(claude(
        spoken("1", "human", "Read it.", attachments=[attached, {"file_name": "", "extracted_content": "pasted text"}],
               files=[{"file_name": "a.md"}, {"file_name": "b.png"}]),
        spoken("2", "assistant", {"type": "thinking", "thinking": "hm"}, "I look.", use, result, "Done."),
    ))  # fmt: skip
    assert branch(read) == [
        user("Read it.\n\n[file: a.md]\n# A\n\n[file: pasted]\npasted text\n\n[file: b.png]"),
        model('I look.\n\n[web_search was called]\n{"q":"x"}\n\n[web_search answered]\nfound\n{"type":"knowledge","title":"t"}\n\nDone.'),
    ]  # fmt: skip
    assert (read.name, read.title, read.last_s, read.lines[1].seen_s) == ("u", "N", WHEN_S, WHEN_S)


@pytest.mark.parametrize("rooted", [True, False])
def test_claude_old_exports_are_in_order_and_new_ones_have_parents(rooted: bool) -> None:
    old = [{"uuid": str(n), "sender": s, "text": f"t{n}", "created_at": None} for n, s in enumerate(("human", "assistant") * 2)]
    if rooted:
        root = "00000000-0000-4000-8000-000000000000"
        for message, parent in zip(old, (root, "0", "1", "2"), strict=True):
            message["parent_message_uuid"] = parent
        old.append({**old[3], "uuid": "4", "text": "again", "parent_message_uuid": "2"})
    read = read_conversation(claude(*old, **({"current_leaf_message_uuid": "3"} if rooted else {})))
    assert branch(read) == [user("t0"), model("t1"), user("t2"), model("t3")]
    assert len(read.lines) == len(old)


def changed(value: Any, at: list[int], other: Any) -> Any:
    """With something else at a place somewhere in it."""
    if not at or not isinstance(value, dict | list) or not value:
        return other
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = keys[at[0] % len(value)]
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = changed(value[key], at[1:], other)
    return copy


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.just("m1"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "parts", "role", "id", "type"]), inner, max_size=3),
    max_leaves=6,
)


@given(st.booleans(), st.lists(st.integers(0, 50), min_size=1, max_size=7), anything)
@examples(90)
def test_whatever_stands_in_an_export_it_is_read_or_refused(is_chatgpt: bool, at: list[int], other: Any) -> None:
    whole = mapping(
        node("m1", None, "user", {"content_type": "multimodal_text", "parts": ["a", {"asset_pointer": "x://y"}]}),
        node("m2", "m1", "assistant", "b", recipient="python"), node("m3", "m2", "tool", "c", tool="python"), current="m3",
    ) if is_chatgpt else claude(
        spoken("m1", "human", "a", attachments=[{"file_name": "f", "extracted_content": "x"}], files=[{"file_name": "g"}]),
        spoken("m2", "assistant", {"type": "tool_use", "name": "n", "input": {}}, {"type": "tool_result", "content": [{"text": "r"}]}),
    )  # fmt: skip
    broken = changed(whole, at, other)
    if is_account_export(broken):
        with suppress(*NOT_AS_TOLD):
            read = read_conversation(broken, {"y": b"no picture"}.get)
            grown = Grown(read.lines, Identity(bytes(32)), TenantKey(bytes(22)))
            assert all(branch.records for branch in grown.branches(lambda _: None, lambda *_: None))
