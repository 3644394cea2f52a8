"""A path's messages seen as pages: ids, texts, media, levels and sizes. Pure; bodies are on the path.

Promises: a page's id and content depend only on its message, on the system messages beside it and on
`pages.max_tokens`, never on the window or on the model that is asked; a page at level 0 is the
original, byte for byte (invariant 4); a tool's result is never shown without its call, nor a call
without its results (invariant 8).

A system message in mid-conversation is outside the tree and so no page of its own: it is a part of the
page of a message beside it (`owner`), with which it leaves the window and comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from hashlib import blake2b
from typing import Any

import msgspec

from proxy.conversation.derived import NO_DERIVED, Derived
from proxy.conversation.mediapages import MediaPage, media_pages
from proxy.conversation.tree import ID_BYTES, Anchor, GetRecord, Node
from proxy.memory.compressor import compress_text
from proxy.memory.context_packer import ContextPacker
from proxy.memory.ids import Doc, make_page_id, parse_page_id
from proxy.memory.levels import CompressorRegistry
from proxy.memory.message_text import message_text, modality_of, split_text
from proxy.memory.models import (
    MEDIA_PART,
    CompressionLevel,
    MemoryPage,
    Modality,
    PageType,
    StorageTier,
)
from proxy.memory.pack_cache import PackCache, PackCacheStats
from proxy.tokens import TokenCounter, get_counter

RESULT_ROLES = ("tool", "function")  # what answers a call stands after it, in one group

_KEPT_LINES = 4096  # packed pages remembered: the same pages are shown epoch after epoch
_ARTIFACT_TOKENS = 2048  # a tool's output above this is an artifact, not talk
_SHOWN_WITH_TOKENS = 100  # of a call shown with its result, or a result with its call
_LONG_CHARS = 400  # and only what is longer is shortened

_SEEN_PART = 2 * MEDIA_PART  # in a search hit: a medium of the message before
_CUT_BY = "gpt-4o"  # whose tokens cut long messages into pages, whatever model is asked

_decode = msgspec.json.Decoder(dict[str, Any]).decode
_lines = PackCache(_KEPT_LINES)
_registry = CompressorRegistry.default()


class PathPages:
    """Pages of `path` and what derives from them; texts are computed when asked for and kept for one
    request.
    """

    def __init__(
        self,
        path: Sequence[Node],
        counter: TokenCounter,
        page_tokens: int,
        derived: Derived = NO_DERIVED,
        registry: CompressorRegistry = _registry,
        get_record: GetRecord | None = None,
        anchors: Sequence[Anchor] = (),
    ) -> None:
        self.path = path
        self._notes: dict[int, list[Anchor]] = {}
        for anchor in anchors:
            self._notes.setdefault(owner(path, anchor.position), []).append(anchor)
        self._get_record = get_record
        self.derived = derived
        self.registry = registry
        self.packer = ContextPacker(counter.text, _lines, counter.part)
        self._counter = counter
        self._page_tokens = page_tokens
        self._messages: dict[int, dict[str, Any]] = {}
        self._parts: dict[int, list[str]] = {}
        self._media: dict[int, Sequence[MediaPage]] = {}
        self._cutter = get_counter(_CUT_BY)
        self._same_encoding = _encoding(counter) == _encoding(self._cutter)

    def before(self, end: int) -> PathPages:
        """The pages of the first `end` messages, without the system messages behind the last of them."""
        other = copy(self)
        other.path = self.path[:end]
        kept = {at: [n for n in notes if n.position < end] for at, notes in self._notes.items()}
        other._notes = {at: notes for at, notes in kept.items() if notes}
        other._parts = {at: parts for at, parts in self._parts.items() if at < end - 1}
        return other

    # -- messages

    def message(self, position: int) -> dict[str, Any]:
        found = self._messages.get(position)
        if found is None:
            found = self._messages[position] = _decode(self.path[position].raw)
        return found

    def said(self, position: int) -> dict[str, Any]:
        """The message as upstream gave it: a client echoes of a spoken answer only the id."""
        node = self.path[position]
        echo = node.role == "assistant" and b'"audio"' in node.raw and b'"transcript"' not in node.raw
        record = self._get_record(node.id) if echo and self._get_record is not None else None
        return self.message(position) if record is None else _decode(record.raws[-1])

    def tokens(self, position: int) -> int:
        """Tokens of the native message; counted once in the node's life, for one kind of counting."""
        node, name = self.path[position], self._counter.name
        if node.tokens < 0 or (node.counter and node.counter != name):
            node.tokens = self._counter.message(self.message(position))
        node.counter = name
        return node.tokens

    def notes(self, position: int) -> Sequence[Anchor]:
        """The system messages that belong to this message's page, in order."""
        return self._notes.get(position, ())

    def notes_tokens(self, position: int) -> int:
        """Tokens of these as messages of their own."""
        return sum(anchor_tokens(note, self._counter) for note in self.notes(position))

    def media(self, position: int) -> Sequence[MediaPage]:
        """The images, sounds, videos and files in a message, each a page of its own."""
        found = self._media.get(position)
        if found is None:
            raw = self.path[position].raw
            plain = b'"type"' not in raw and b'"audio"' not in raw  # a text message is not decoded
            found = () if plain else media_pages(position, self.said(position), self._counter)
            self._media[position] = found
        return found

    def text_tokens(self, position: int) -> int:
        """Tokens of a message without its media, with the system messages of its page."""
        media = sum(page.tokens for page in self.media(position))
        return max(0, self.tokens(position) - media) + self.notes_tokens(position)

    def own_text(self, position: int) -> str:
        """The message's text, without the system messages of its page."""
        names = {page.index: page.page_id for page in self.media(position)}
        return message_text(self.said(position), names)

    def parts(self, position: int) -> list[str]:
        """The text of the message, then of the system messages beside it, cut into pages when it is too
        large for one."""
        found = self._parts.get(position)
        if found is None:
            notes = (note_text(note) for note in self.notes(position))
            text = "\n\n".join(filter(None, (self.own_text(position), *notes)))
            limit = self._page_tokens
            small = len(text) <= limit or self._is_small(position)
            found = [text] if small else split_text(text, limit, self._cutter.text)
            self._parts[position] = found
        return found

    def _is_small(self, position: int) -> bool:
        """One page holds the message's text. Counted alike for all models: the ids that a table, an
        index or a window knows stay good when the client changes its model."""
        raw, limit, notes = self.path[position].raw, self._page_tokens, self.notes(position)
        size = len(raw) + sum(len(note.raw) for note in notes) if notes else len(raw)
        if size <= limit:  # no token is shorter than a byte
            return True
        media = self.media(position)
        if self._same_encoding and not media:
            return self.text_tokens(position) <= limit
        tokens = self._cutter.message(self.message(position))
        tokens += sum(self._cutter.message(_decode(note.raw)) for note in notes)
        return tokens - sum(self._cutter.part(page.content) for page in media) <= limit

    # -- ids

    def ids(self, position: int) -> tuple[str, ...]:
        """The page ids of a message: its text's (one, or one for each part), then its media's."""
        media = tuple(page.page_id for page in self.media(position))
        count = 1 if self._is_small(position) else len(self.parts(position))
        if count == 1:
            return (make_page_id(position), *media)
        return (*(make_page_id(position, part) for part in range(1, count + 1)), *media)

    def sizes(self, position: int) -> tuple[int, ...]:
        """Tokens of each of `ids(position)`."""
        media = self.media(position)
        texts = len(self.ids(position)) - len(media)
        return (*[self.text_tokens(position) // texts] * texts, *(page.tokens for page in media))

    def expand(self, wanted: str) -> list[str]:
        """The page ids that an id names: all parts for a cut message's own id; [] for an unknown one."""
        if wanted in self.derived.pages:
            return [wanted]
        place = parse_page_id(wanted)
        if place is None or place[0] >= len(self.path):
            return []
        position, part = place
        ids = self.ids(position)
        if part >= MEDIA_PART:
            return [i for i in ids if parse_page_id(i) == place]
        texts = ids[: len(ids) - len(self.media(position))]
        if part == 0:
            return list(texts)
        if part > len(texts):
            return []
        return [texts[part - 1]]

    def position(self, wanted: str) -> int:
        """The position of a page of this path; -1 for a derived one."""
        place = parse_page_id(wanted)
        return place[0] if place else -1

    def id_of(self, position: int, part: int) -> str:
        """The id of a place that a search found."""
        if part >= _SEEN_PART:  # found by what the answer says of it
            position, part = position - 1, part - MEDIA_PART
        if part >= MEDIA_PART:
            return self.media(position)[part - MEDIA_PART - 1].page_id
        return make_page_id(position, part)

    def modality(self, wanted: str) -> Modality:
        """What kind of content a page holds."""
        medium = self._medium(wanted)
        if medium is not None:
            return medium.modality
        place = parse_page_id(wanted)
        return Modality.TEXT if place is None else self._words_as(place[0])

    def _words_as(self, position: int) -> Modality:
        return Modality.TEXT if self.notes(position) else modality_of(self.message(position))

    def page_type(self, position: int, part: int = 0) -> PageType:
        """Media and very long tool outputs are artifacts; the rest of a path is transcript."""
        long = self.path[position].role in RESULT_ROLES and self.tokens(position) > _ARTIFACT_TOKENS
        return PageType.ARTIFACT if part >= MEDIA_PART or long else PageType.TRANSCRIPT

    def docs(self, first: int, last: int) -> Iterator[Doc]:
        """The pages of positions first..last-1, for the search index. Keeps nothing in memory.

        What stands at a position depends on it and the messages before it only, because branches
        share an index: what an answer says of the media before it is a page beside the answer.
        """
        for position in range(first, last):
            message = self.message(position)
            name, role = message.get("name"), self.path[position].role
            speaker = name if isinstance(name, str) else ""
            parts = self.parts(position)
            for index, text in enumerate(parts, 1):
                yield Doc(position, index if len(parts) > 1 else 0, role, speaker, text)
            own = self._own_words(position) if self.media(position) else ""
            for medium in self.media(position):
                words = f"{medium.modality.value} {medium.name} {own}"
                yield Doc(position, medium.part, role, speaker, words)
            for medium in self.media(position - 1) if position else ():
                if seen := self._seen_words(position - 1):
                    words = f"{medium.modality.value} {medium.name} {seen}"
                    yield Doc(position, medium.part + MEDIA_PART, role, speaker, words)
            for kept in (self._messages, self._parts, self._media):
                kept.pop(position, None)
                kept.pop(position - 1, None)

    def index_keys(self, before: int) -> list[bytes]:
        """What the search index knows the pages of the first `before` messages by: each key names all
        that stands there and before."""
        ids = [node.id for node in self.path[:before]]
        if not self._notes:
            return ids
        digest, keys = b"", []
        for position, node_id in enumerate(ids):
            for note in self.notes(position):
                digest = blake2b(digest + note.said, digest_size=ID_BYTES).digest()
            keys.append(node_id + digest)
        return keys

    def notes_digest(self, end: int) -> bytes:
        """What the system messages in the pages of positions 0..end-1 are known by; b"" for none."""
        inside = sorted(position for position in self._notes if position < end)
        said = [note.said for position in inside for note in self._notes[position]]
        return blake2b(b"".join(said), digest_size=ID_BYTES).digest() if said else b""

    # -- contents

    def bare(self, wanted: str) -> str:
        """A page's own words, without the call or the results that it is shown with."""
        place = parse_page_id(wanted)
        if place is None or place[1] >= MEDIA_PART:
            return self.text(wanted)
        return self.parts(place[0])[place[1] - 1 if place[1] else 0]

    def text(self, wanted: str) -> str:
        """A page's whole text, shown with the call that it answers or the results of its calls."""
        if wanted in self.derived.pages:
            return self.derived.text(wanted)
        position, part = _place(wanted)
        if part >= MEDIA_PART:
            return f"{self.media(position)[part - MEDIA_PART - 1].name} {self._caption(position)}"
        parts = self.parts(position)
        text = parts[part - 1 if part else 0]
        if part <= 1:
            text = self._call_of(position) + text
        if part in (0, len(parts)):
            text += self._results_of(position)
        return text

    def page(self, wanted: str) -> MemoryPage:
        """The page itself, level 0."""
        derived = self.derived.pages.get(wanted)
        if derived is not None:
            return derived.model_copy(update={"content": self.derived.text(wanted)})
        position, part = _place(wanted)
        if part >= MEDIA_PART:
            return self._medium_page(position, self.media(position)[part - MEDIA_PART - 1])
        text, parts = self.text(wanted), self.parts(position)
        # A call shown with its result, or a medium's name, is not in the message's own count.
        plain = text == parts[part - 1 if part else 0] and not self.media(position)
        return MemoryPage(
            page_id=wanted,
            modality=self._words_as(position),
            page_type=self.page_type(position),
            content=text,
            storage_tier=StorageTier.L2,
            size_tokens=self.text_tokens(position) // len(parts) if plain else None,
            metadata={"role": self.path[position].role},
        )

    def _medium_page(self, position: int, medium: MediaPage) -> MemoryPage:
        metadata = {"role": self.path[position].role, "caption": self._caption(position)}
        if medium.transcript:
            metadata["transcript"] = medium.transcript
        return MemoryPage(
            page_id=medium.page_id,
            modality=medium.modality,
            page_type=PageType.ARTIFACT,
            content=medium.content,
            storage_tier=StorageTier.L2,
            size_tokens=medium.tokens,
            provenance=[make_page_id(position)],
            metadata=metadata,
        )

    def at(self, wanted: str, level: CompressionLevel | int) -> MemoryPage:
        """The page at a level. Slow for media, whose levels 1 are encoded anew."""
        return self.shown(self.page(wanted), level)

    def shown(self, page: MemoryPage, level: CompressionLevel | int) -> MemoryPage:
        """A version of a page, at a level at least as short."""
        if int(level) <= page.compression_level:
            return page
        return self.registry.compress(page, CompressionLevel(level), self._counter)

    @property
    def counter_name(self) -> str:
        """Whose tokens the levels were chosen by."""
        return self._counter.name

    def is_medium(self, wanted: str) -> bool:
        return self._medium(wanted) is not None

    def _medium(self, wanted: str) -> MediaPage | None:
        place = parse_page_id(wanted)
        if place is None or place[1] < MEDIA_PART:
            return None
        return self.media(place[0])[place[1] - MEDIA_PART - 1]

    def _caption(self, position: int) -> str:
        """Words about a message's media: of the model that saw them, else of the message itself."""
        return self._seen_words(position) or self._own_words(position)

    def _seen_words(self, position: int) -> str:
        after = position + 1
        if after >= len(self.path) or self.path[after].role != "assistant":
            return ""
        seen = message_text(self.message(after))
        return compress_text(seen, CompressionLevel.ABSTRACT, None, self._cutter.text)

    def _own_words(self, position: int) -> str:
        media = {medium.index for medium in self.media(position)}
        content = self.message(position).get("content")
        words = [part for i, part in enumerate(content or ()) if i not in media]
        own = message_text({"content": words}) if isinstance(content, list) else ""
        return compress_text(own, CompressionLevel.ABSTRACT, None, self._cutter.text)

    def _call_of(self, position: int) -> str:
        """`name(arguments) -> ` for a tool's result."""
        if self.path[position].role != "tool":
            return ""
        call_id = self.message(position).get("tool_call_id")
        at = position - 1
        while at >= 0 and self.path[at].role == "tool":
            at -= 1
        for call in calls_of(self.message(at)) if at >= 0 else ():
            if call.get("id") == call_id:
                return self._short(message_text({"tool_calls": [call]})) + " -> "
        return ""

    def _results_of(self, position: int) -> str:
        """The results of an assistant message's calls, shortened when they are long."""
        if self.path[position].role != "assistant" or not calls_of(self.message(position)):
            return ""
        out = ""
        at = position + 1
        while at < len(self.path) and self.path[at].role == "tool":
            out += "\n-> " + self._short(message_text(self.message(at)))
            at += 1
        return out

    def _short(self, text: str) -> str:
        return compress_text(text, 0 if len(text) < _LONG_CHARS else 1, _SHOWN_WITH_TOKENS, self._count)

    @property
    def _count(self) -> Callable[[str], int]:
        return self._counter.text


def owner(path: Sequence[Node], position: int) -> int:
    """The message whose page holds the system messages that stand before `position`: the one before
    them when an answer follows (they are what it answered), or nothing yet; else the one after them."""
    answered = position == len(path) or path[position].role == "assistant"
    return max(0, position - 1) if answered else position


def note_text(note: Anchor) -> str:
    """What a page says of a system message in mid-conversation."""
    message = _decode(note.raw)
    return f"{message.get('role')}: {message_text(message)}"


def anchor_tokens(anchor: Anchor, counter: TokenCounter) -> int:
    """Tokens of a system message in mid-conversation; counted once in its life, for one kind of counting."""
    if anchor.tokens < 0 or anchor.counter != counter.name:
        anchor.tokens, anchor.counter = counter.message(_decode(anchor.raw)), counter.name
    return anchor.tokens


def _encoding(counter: TokenCounter) -> str:
    return counter.name.partition("/")[0]


def _place(page_id: str) -> tuple[int, int]:
    """KeyError for a page that is neither a message's nor derived."""
    place = parse_page_id(page_id)
    if place is None:
        raise KeyError(f"no page {page_id!r} on this path")
    return place


def packed_lines() -> PackCacheStats:
    """How often a line of <VM:CONTEXT> did not have to be packed again, over all conversations."""
    return _lines.get_stats()


def calls_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """A message's tool calls; [] when it has none."""
    calls = message.get("tool_calls")
    return [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []


def groups_of(path: Sequence[Node], first: int, last: int) -> list[tuple[int, int]]:
    """(first, last) of each group in positions first..last-1: a message with the results after it."""
    groups: list[tuple[int, int]] = []
    at = first
    while at < last:
        end = at + 1
        while end < last and path[end].role in RESULT_ROLES:
            end += 1
        groups.append((at, end))
        at = end
    return groups


def group_start(path: Sequence[Node], position: int) -> int:
    """Where the group of the message at `position` begins."""
    while position > 0 and path[position].role in RESULT_ROLES:
        position -= 1
    return position
