"""What ChatGPT and Claude accounts export, as conversations of an API's client. Pure.

Promises: what a person and a model said to each other becomes user and assistant messages in turns, which every model's
template takes: plain texts stay as they are, so a client that shows them sends the very same; a tool's calls and results
stand as text in the answer that they were for; branches stay branches. What was not said to the other is left out:
system messages, custom instructions (`user_editable_context`), hidden messages, thoughts. Neither provider documents its
format, so what is not known is read by what it has (`parts`, `text`, `result`), not by a list of types.

ChatGPT: `{title, conversation_id, create_time, update_time, current_node, mapping: {id: {message, parent, children}}}`; a
message has `author {role, name}`, `recipient` ("all", or a tool), `content {content_type, parts | text | result}`.
Claude: `{uuid, name, created_at, updated_at, chat_messages: [{uuid, sender, text, content: [{type, ...}], attachments:
[{file_name, extracted_content}], files: [{file_name}], parent_message_uuid}]}`; older ones have no blocks, or no parents.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NamedTuple, TypeAlias

import msgspec

from proxy.conversation.exported import Conversation, Tree
from proxy.media.headers import image_info

GetFile = Callable[[str], bytes | None]  # a file of the export by its id
Said: TypeAlias = "tuple[str, Any, int]"  # role, content, Unix seconds

# What reading a conversation raises that is not as told above
NOT_AS_TOLD = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)
_json = msgspec.json.encode


def is_account_export(value: Any) -> bool:
    """Whether this is one conversation of either."""
    return isinstance(value, dict) and ("mapping" in value or "chat_messages" in value)


def read_conversation(value: dict[str, Any], get_file: GetFile = lambda _: None) -> Conversation:
    """Raises one of `NOT_AS_TOLD`."""
    return _chatgpt(value, get_file) if "mapping" in value else _claude(value)


class _Message(NamedTuple):
    """A message of an export. `said`: None for what was not said."""

    id: str
    parent: str | None
    said: Said | None


def _grown(messages: Iterable[_Message], current: str | None) -> Tree:
    """The tree of turns: what stands between two messages of the user is one answer."""
    tree, at = Tree(), {message.id: message for message in messages}
    children: dict[str | None, list[str]] = {}
    for message in at.values():
        children.setdefault(message.parent if message.parent in at else None, []).append(message.id)
    seen: set[str] = set()
    while current is not None and current in children and current not in seen:  # the newest leaf of the branch that was shown last
        seen.add(current)
        current = children[current][-1]
    # (message, the turn before it, the pieces of an answer that is not ended yet: the last and those before)
    stack: list[tuple[str, int | None, Any]] = [(root, None, None) for root in reversed(children.get(None, []))]
    while stack:
        name, above, pieces = stack.pop()
        if (said := at[name].said) is not None:
            role, content, seen_s = said
            if role == "user":
                above, pieces = _answered(tree, above, pieces), None
                above = tree.add(above, {"role": "user", "content": content}, seen_s)
            else:
                pieces = (content, seen_s, pieces)
        following = children.get(name, [])
        if not following:
            above = _answered(tree, above, pieces)
            if above is not None and (name == current or tree.head is None):
                tree.head = above
        stack.extend((child, above, pieces) for child in reversed(following))
    return tree


def _answered(tree: Tree, above: int | None, pieces: Any) -> int | None:
    texts, seen_s = [], 0
    while pieces is not None:
        text, last_s, pieces = pieces
        texts.append(text)
        seen_s = seen_s or last_s
    if not texts:
        return above
    return tree.add(above, {"role": "assistant", "content": "\n\n".join(reversed(texts))}, seen_s)


# -- ChatGPT


def _chatgpt(value: dict[str, Any], get_file: GetFile) -> Conversation:
    mapping: Mapping[str, Any] = value["mapping"]
    messages = [_Message(name, node.get("parent"), _chatgpt_said(node.get("message"), get_file))
                for name, node in mapping.items()]  # fmt: skip
    tree = _grown(messages, value.get("current_node"))
    name = value.get("conversation_id") or value.get("id") or ""
    return Conversation(str(name), value.get("title") or "", tree.lines(), int(value.get("update_time") or 0))


def _chatgpt_said(message: dict[str, Any] | None, get_file: GetFile) -> Said | None:
    if not message or (message.get("metadata") or {}).get("is_visually_hidden_from_conversation"):
        return None
    author, content = message["author"], message.get("content") or {}
    role, seen_s = author["role"], int(message.get("create_time") or 0)
    images: list[str] = []
    text = "\n".join(_chatgpt_texts(content, get_file if role == "user" else None, images))
    if role == "user":
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
        if parts:
            return "user", [*parts, *([{"type": "text", "text": text}] if text else [])], seen_s
        return ("user", text, seen_s) if text else None
    if role == "system" or not text.strip():
        return None
    recipient = message.get("recipient") or "all"
    if role == "tool":
        text = _result(author.get("name"), text)
    elif recipient != "all":
        text = _call(recipient, text)
    return "assistant", text, seen_s


def _chatgpt_texts(content: dict[str, Any], get_file: GetFile | None, images: list[str]) -> Iterator[str]:
    """The texts of a content; the pictures of its parts as data URLs, where they can be had."""
    for part in content.get("parts") or (content,):
        if isinstance(part, str):
            yield part
            continue
        text = next((part[name] for name in ("text", "result") if isinstance(part.get(name), str)), None)
        if text:
            where = [part[name] for name in ("title", "url") if isinstance(part.get(name), str)]
            yield "\n".join([*where, text])
        for pointer in _pointers(part):
            data = get_file(pointer.rpartition("/")[2]) if get_file is not None else None
            if data is not None and (info := image_info(data)) is not None:
                images.append(f"data:image/{info.format.lower()};base64,{base64.b64encode(data).decode()}")
            else:
                yield f"[file: {pointer}]"


def _pointers(part: dict[str, Any]) -> Iterator[str]:
    """`file-service://file-ID`, `sediment://file_ID`; a video's and a voice's are one further down."""
    for value in (part, *part.values()):
        if isinstance(value, dict) and isinstance(pointer := value.get("asset_pointer"), str):
            yield pointer


# -- Claude


def _claude(value: dict[str, Any]) -> Conversation:
    messages: list[_Message] = []
    before: str | None = None
    for number, message in enumerate(value["chat_messages"]):
        name = str(message.get("uuid") or number)
        parent = message.get("parent_message_uuid", before)  # none is named: they stand in their order
        messages.append(_Message(name, parent, _claude_said(message)))
        before = name
    tree = _grown(messages, value.get("current_leaf_message_uuid") or before)
    return Conversation(str(value.get("uuid") or ""), value.get("name") or "", tree.lines(), _seconds(value.get("updated_at")))


def _claude_said(message: dict[str, Any]) -> Said | None:
    role = "user" if message["sender"] == "human" else "assistant"
    blocks = message.get("content") or ()
    pieces = [blocks] if isinstance(blocks, str) else [text for block in blocks for text in _claude_texts(block)]
    if not pieces and message.get("text"):
        pieces = [message["text"]]
    attached = message.get("attachments") or ()
    for each in attached:
        pieces.append(f"[file: {each.get('file_name') or 'pasted'}]\n{each.get('extracted_content') or ''}".rstrip())
    there = {each.get("file_name") for each in attached}
    pieces += [f"[file: {each.get('file_name')}]" for each in message.get("files") or () if each.get("file_name") not in there]
    text = "\n\n".join(pieces)
    return (role, text, _seconds(message.get("created_at"))) if text.strip() else None


def _claude_texts(block: dict[str, Any]) -> Iterator[str]:
    if block.get("type") == "tool_use":
        yield _call(block.get("name"), _json(block.get("input")).decode())
    elif block.get("type") == "tool_result":
        content = block.get("content") or ()
        parts = [content] if isinstance(content, str) else [_text_of(part) for part in content]
        yield _result(block.get("name"), "\n".join(parts))
    elif isinstance(text := block.get("text"), str) and text:
        yield text


def _text_of(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    return text if isinstance(text, str) else _json(part).decode()


def _seconds(time: Any) -> int:
    return int(datetime.fromisoformat(time.replace("Z", "+00:00")).timestamp()) if time else 0


# -- both


def _call(tool: Any, text: str) -> str:
    return f"[{tool} was called]\n{text}"


def _result(tool: Any, text: str) -> str:
    return f"[{tool} answered]\n{text}"
