"""A path's messages as pages: ids, texts, media, levels and sizes. Pure; bodies are on the path.

Promises: a page's id and content depend only on its message, on the system messages beside it and on
`pages.max_tokens`, never on the window or on the model that is asked; a page at level 0 is the
original, byte for byte (invariant 4); a tool's result is never shown without its call, nor a call
without its results (invariant 8); nothing raises on parts that no provider has.

A message is counted when its size is first asked for, and counting has no other effect: who asks `tokens` gets the
exact number whether it was known or not, so no plan depends on what a process has counted before (invariant 7). Of a
long history that is new, what is far in front of any window is not counted. `size` tells of it by its bytes, at the
rate of the messages that are near, which all follow from the request; the table keeps that as estimated
until the page is shown. Windows are made of exact numbers alone (invariant 3).

A system message in mid-conversation is outside the tree and so no page of its own: it is a part of the
page of a message beside it (`owner`), with which it leaves the window and comes back.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import msgspec

from proxy.conversation.derived import NO_DERIVED, Derived
from proxy.conversation.tree import HASH_BYTES, Anchor, Node
from proxy.keys import OWNER_BYTES
from proxy.media.parts import read_part
from proxy.memory.caches import CacheStats, PackCache, PackedLine
from proxy.memory.compressor import compress_text
from proxy.memory.context import ContextPacker, context_line
from proxy.memory.ids import MEDIA_KINDS, Doc, make_page_id, media_page_id, parse_page_id
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
from proxy.memory.standing import Standing, standing_in
from proxy.tokens import PER_MESSAGE, TokenCounter, get_counter

if TYPE_CHECKING:  # a window's pages are made here, and records store windows
    from proxy.conversation.records import GetRecord

RESULT_ROLES = ("tool", "function")  # what answers a call stands after it, in one group

_ARTIFACT_TOKENS = 2048  # a tool's output above this is an artifact, not talk
_SHOWN_WITH_TOKENS = 100  # of a call shown with its result, or a result with its call
_LONG_CHARS = 400  # and only what is longer is shortened
_SHORTENED_CHARS = 32_768  # that are read for it: a result may be megabytes
_SEEN_PART = 2 * MEDIA_PART  # in a search hit: a medium of the message before
_CUT_BY = "gpt-4o"  # whose tokens cut long messages into pages, whatever model is asked

_decode = msgspec.json.Decoder(dict[str, Any]).decode
_lines = PackCache()  # the same pages are shown epoch after epoch
_registry = CompressorRegistry.default()


@dataclass(frozen=True, slots=True)
class Medium:
    """What a media page shows: `content`, the client's own part, at `index` of its message's content
    (-1: an answer's own sound)."""

    index: int
    modality: Modality
    content: dict[str, Any]
    name: str = ""
    transcript: str = ""


class Page(NamedTuple):
    """A page of one message: its text (`part` 0), the n-th part of a text too large for one page (n), or a
    medium (MEDIA_PART + its number in the message). `tokens` are of the page at level 0."""

    id: str
    position: int
    part: int
    tokens: int
    modality: Modality
    page_type: PageType
    medium: Medium | None = None


@dataclass(frozen=True, slots=True)
class _Reading:
    """How the messages of a path are read."""

    counter: TokenCounter
    page_tokens: int
    get_record: GetRecord | None
    cutter: TokenCounter
    cuts_alike: bool  # the cutter's tokens are the counter's


class MessagePages:
    """One message of a path, with the system messages beside it (`notes`, in order).

    `tokens` are the native message's, `notes_tokens` those of the notes as messages of their own,
    `text_tokens` both without the media; `media` are the pages of its images, sounds, videos and files.
    What costs more, counting too, is done once, when it is first asked for. (It knows nothing of the path, nor a page of
    it: without circles, what a request held is free when it ends.)
    """

    __slots__ = (
        "_how", "_message", "_pages", "_parts", "_tokens", "is_plain", "media", "node", "notes", "position",
    )  # fmt: skip

    def __init__(self, how: _Reading, position: int, node: Node, notes: Sequence[Anchor]) -> None:
        self._how = how
        self._message: dict[str, Any] | None = None
        self._parts: list[str] | None = None
        self._pages: tuple[Page, ...] | None = None
        self.position = position
        self.node = node
        self.notes = notes
        self.is_plain = b'"type"' not in node.raw and b'"audio"' not in node.raw  # words, told without decoding
        self._tokens = node.tokens if not node.counter or node.counter == how.counter.name else -1
        self.media = () if self.is_plain else self._read_media()

    @property
    def tokens(self) -> int:
        if self._tokens < 0:
            self._tokens = self._how.counter.message(self.message)
            self.node.counted(self._tokens, self._how.counter.name)
        return self._tokens

    @property
    def notes_tokens(self) -> int:
        return sum(anchor_tokens(note, self._how.counter) for note in self.notes) if self.notes else 0

    @property
    def text_tokens(self) -> int:
        return self._without_media(self.tokens) + self.notes_tokens

    def _without_media(self, tokens: int) -> int:
        return max(0, tokens - sum(page.tokens for page in self.media)) if self.media else tokens

    @property
    def message(self) -> dict[str, Any]:
        if self._message is None:
            self._message = _decode(self.node.raw)
        return self._message

    @property
    def said(self) -> dict[str, Any]:
        """The message as upstream gave it: a client echoes of a spoken answer only the id."""
        node, get = self.node, self._how.get_record
        echo = node.role == "assistant" and b'"audio"' in node.raw and b'"transcript"' not in node.raw
        record = get(node.id) if echo and get is not None else None
        return self.message if record is None else _decode(record.raws[-1])

    @property
    def own_text(self) -> str:
        """The message's text, without its notes."""
        if self.is_plain:
            return message_text(self.message)
        return message_text(self.said, {page.medium.index: page.id for page in self.media if page.medium})

    def _read_media(self) -> tuple[Page, ...]:
        found: list[Page] = []

        def add(prefix: str, medium: Medium) -> None:
            number = len(found) + 1
            page_id = media_page_id(self.position, number, prefix)
            tokens, part = self._how.counter.part(medium.content), MEDIA_PART + number
            kind = PageType.ARTIFACT
            found.append(Page(page_id, self.position, part, tokens, medium.modality, kind, medium))

        message = self.said
        content = message.get("content")
        for index, part in enumerate(content if isinstance(content, list) else ()):
            read = read_part(part) if isinstance(part, dict) else None
            if read is not None:
                prefix, modality = MEDIA_KINDS[read.kind]
                add(prefix, Medium(index, modality, part, read.name or ""))
        spoken = message.get("audio")
        if isinstance(spoken, Mapping) and isinstance(spoken.get("data"), str):
            part = {"type": "input_audio", "input_audio": {"data": spoken["data"], "format": "wav"}}
            words = spoken.get("transcript")
            transcript = words if isinstance(words, str) else ""
            add("aud", Medium(-1, Modality.AUDIO, part, transcript=transcript))
        return tuple(found)

    @property
    def standing(self) -> list[Standing]:
        """What of it its speaker said for all later answers."""
        return standing_in(self.node.role, self.own_text) if self.node.role == "user" else []

    @property
    def parts(self) -> list[str]:
        """Its text, then its notes', cut into pages when that is too large for one."""
        if self._parts is None:
            text = self.own_text
            if self.notes:
                text = "\n\n".join(filter(None, (text, *map(note_text, self.notes))))
            small = len(text) <= self._how.page_tokens or self._is_small()
            self._parts = [text] if small else self._cut(text)
        return self._parts

    def _cut(self, text: str) -> list[str]:
        """In pages. Cutting counts all of the text, so it is done once in the message's life."""
        how = self._how
        key, kept = hash((text, how.page_tokens)), self.node.cuts
        if kept is not None and kept[0] == key:
            return [text[start:end] for start, end in pairwise((0, *kept[1]))]
        parts = split_text(text, how.page_tokens, how.cutter.text)
        self.node.cuts = key, tuple(accumulate(map(len, parts)))
        return parts

    def _is_small(self) -> bool:
        """One page holds the text. Counted alike for all models: the ids that a table, an index or a
        window knows stay good when the client changes its model."""
        cutter, limit = self._how.cutter, self._how.page_tokens
        if len(self.node.raw) + sum(len(note.raw) for note in self.notes) <= limit:
            return True  # no token is shorter than a byte
        if self._how.cuts_alike and not self.media:
            return self.text_tokens <= limit
        tokens = cutter.message(self.message)
        tokens += sum(cutter.message(_decode(note.raw)) for note in self.notes)
        media = (page.medium.content for page in self.media if page.medium is not None)
        return tokens - sum(map(cutter.part, media)) <= limit

    @property
    def pages(self) -> tuple[Page, ...]:
        """Its text's page, or one for each part of it, then its media's."""
        if self._pages is None:
            self._pages = self.sized(self.tokens)
        return self._pages

    def sized(self, tokens: int) -> tuple[Page, ...]:
        """The same pages, of a message of so many tokens."""
        at, is_result = self.position, self.node.role in RESULT_ROLES
        count = 1 if self._is_small() else len(self.parts)
        each = (self._without_media(tokens) + self.notes_tokens) // count
        plain = bool(self.notes) or (self.is_plain and not is_result)
        modality = Modality.TEXT if plain else modality_of(self.message)
        long = is_result and len(self.node.raw) > _ARTIFACT_TOKENS and self.tokens > _ARTIFACT_TOKENS
        kind = PageType.ARTIFACT if long else PageType.TRANSCRIPT
        numbers = (0,) if count == 1 else range(1, count + 1)
        texts = [Page(make_page_id(at, n), at, n, each, modality, kind) for n in numbers]
        return (*texts, *self.media)

    @property
    def texts(self) -> tuple[Page, ...]:
        """Its pages without the media."""
        return self.pages[: len(self.pages) - len(self.media)]

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(page.id for page in self.pages)


class PathPages:
    """Pages of `path` and what derives from them, for one request."""

    def __init__(
        self,
        path: Sequence[Node],
        counter: TokenCounter,
        page_tokens: int,
        derived: Derived = NO_DERIVED,
        get_record: GetRecord | None = None,
        anchors: Sequence[Anchor] = (),
    ) -> None:
        self.path = path
        self.counter = counter
        self.derived = derived
        self.registry = _registry
        self._packer: ContextPacker | None = None
        cutter = get_counter(_CUT_BY)
        alike = counter.name.partition("/")[0] == cutter.name.partition("/")[0]
        self._how = _Reading(counter, page_tokens, get_record, cutter, alike)
        self._notes: dict[int, list[Anchor]] = {}
        for anchor in anchors:
            self._notes.setdefault(owner(path, anchor.position), []).append(anchor)
        self._messages: dict[int, MessagePages] = {}
        self.far = 0  # the new messages before it never were in a window: there are too many behind them
        self._rate = 0.0  # tokens for a byte of those behind it

    @property
    def owner(self) -> bytes:
        """Whose they are (keys.py): the conversation of a path that is not empty."""
        return self.path[0].id[:OWNER_BYTES]

    def before(self, end: int) -> PathPages:
        """The pages of the first `end` messages, without the system messages behind the last of them."""
        other = copy(self)
        other.path = self.path[:end]
        kept = {at: [n for n in notes if n.position < end] for at, notes in self._notes.items()}
        other._notes = {at: notes for at, notes in kept.items() if notes}
        other._messages = self._messages.copy()
        for at in range(end - 1, len(self.path)):
            other._messages.pop(at, None)
        return other

    def __getitem__(self, position: int) -> MessagePages:
        found = self._messages.get(position)
        if found is None:
            found = MessagePages(self._how, position, self.path[position], self._notes.get(position, ()))
            self._messages[position] = found
        return found

    def forget(self, position: int) -> None:
        """It will hardly be asked for again: of a long history, only what is in reach is kept in memory."""
        self._messages.pop(position, None)

    @property
    def packer(self) -> ContextPacker:
        """Makes lines of pages."""
        if self._packer is None:
            self._packer = ContextPacker(self.counter, _lines)
        return self._packer

    def tokens(self, position: int) -> int:
        """Tokens of the native message."""
        node = self.path[position]
        return node.tokens if node.tokens >= 0 and node.counter == self.counter.name else self[position].tokens

    def leave_far(self, far: int) -> None:
        """Do not count what stands before `far` for sums and for the table."""
        near = range(far, len(self.path))
        self.far, self._rate = far, sum(map(self.tokens, near)) / sum(len(self.path[at].raw) for at in near)

    def size(self, position: int) -> int:
        """Tokens of the native message; before `far` about so many."""
        return self.tokens(position) if position >= self.far else round(self._rate * len(self.path[position].raw))

    # -- by id

    def expand(self, page_id: str) -> list[str]:
        """The page ids that an id names: all parts for a cut message's own id; [] for an unknown one."""
        if page_id in self.derived.pages:
            return [page_id]
        place = parse_page_id(page_id)
        if place is None or place[0] >= len(self.path):
            return []
        position, part = place
        if part >= MEDIA_PART:
            return [page.id for page in self[position].media if parse_page_id(page_id) == parse_page_id(page.id)]
        texts = self[position].texts
        return [page.id for page in texts] if part == 0 else [page.id for page in texts[part - 1 : part]]

    def position(self, page_id: str) -> int:
        """The position of a page of this path; -1 for a derived one."""
        place = parse_page_id(page_id)
        return place[0] if place else -1

    def id_of(self, position: int, part: int) -> str:
        """The id of a place that a search found."""
        if part >= _SEEN_PART:  # found by what the answer says of it
            position, part = position - 1, part - MEDIA_PART
        if part >= MEDIA_PART:
            return self[position].media[part - MEDIA_PART - 1].id
        return make_page_id(position, part)

    def medium(self, page_id: str) -> Page | None:
        """The media page of that id; None for any other."""
        place = parse_page_id(page_id)
        if place is None or place[1] < MEDIA_PART:
            return None
        return self[place[0]].media[place[1] - MEDIA_PART - 1]

    def modality(self, page_id: str) -> Modality:
        """What kind of content a page holds."""
        medium = self.medium(page_id)
        if medium is not None:
            return medium.modality
        position = self.position(page_id)
        return Modality.TEXT if position < 0 else self[position].pages[0].modality

    # -- for the search index

    def docs(self, first: int, last: int) -> Iterator[Doc]:
        """The pages of positions first..last-1. Keeps nothing in memory.

        What stands at a position depends on it and the messages before it only, because branches
        share an index: what an answer says of the media before it is a page beside the answer.
        """
        seen_media: Sequence[Page] = self[first - 1].media if 0 < first < last else ()
        for position in range(first, last):
            here = self[position]
            name, role = here.message.get("name"), here.node.role
            speaker = name if isinstance(name, str) else ""
            parts = here.parts
            for index, text in enumerate(parts, 1):
                yield Doc(position, index if len(parts) > 1 else 0, role, speaker, text)
            own = self._own_words(position) if here.media else ""
            for page in here.media:
                yield Doc(position, page.part, role, speaker, f"{_named(page)} {own}")
            for page in seen_media:
                if seen := self._seen_words(position - 1):
                    words = f"{_named(page)} {seen}"
                    yield Doc(position, page.part + MEDIA_PART, role, speaker, words)
            seen_media = here.media
            self._messages.pop(position, None)
            self._messages.pop(position - 1, None)

    def index_keys(self, before: int) -> Sequence[bytes]:
        """What the search index knows the pages of the first `before` messages by: each key names all
        that stands there and before."""
        digest, places, digests = b"", list[int](), [b""]
        for position in sorted(self._notes):
            for note in self._notes[position]:
                digest = blake2b(digest + note.said, digest_size=HASH_BYTES).digest()
            places.append(position)
            digests.append(digest)
        return _IndexKeys(self.path, min(before, len(self.path)), places, digests)

    def notes_digest(self, end: int) -> bytes:
        """What the system messages in the pages of positions 0..end-1 are known by; b"" for none."""
        inside = sorted(position for position in self._notes if position < end)
        said = [note.said for position in inside for note in self._notes[position]]
        return blake2b(b"".join(said), digest_size=HASH_BYTES).digest() if said else b""

    # -- contents

    def bare(self, page_id: str) -> str:
        """A page's own words, without the call or the results that it is shown with."""
        place = parse_page_id(page_id)
        if place is None or place[1] >= MEDIA_PART:
            return self.text(page_id)
        return self[place[0]].parts[place[1] - 1 if place[1] else 0]

    def text(self, page_id: str) -> str:
        """A page's whole text, shown with the call that it answers or the results of its calls."""
        if page_id in self.derived.pages:
            return self.derived.text(page_id)
        position, part = _place(page_id)
        if part >= MEDIA_PART:
            medium = self[position].media[part - MEDIA_PART - 1].medium
            return f"{medium.name if medium else ''} {self._caption(position)}"
        parts = self[position].parts
        text = parts[part - 1 if part else 0]
        if part <= 1:
            text = self._call_of(position) + text
        if part in (0, len(parts)):
            text += self._results_of(position)
        return text

    def page(self, page_id: str) -> MemoryPage:
        """The page itself, level 0. KeyError for one that is not on this path."""
        derived = self.derived.pages.get(page_id)
        if derived is not None:
            return derived.model_copy(update={"content": self.derived.text(page_id)})
        position, part = _place(page_id)
        here = self[position]
        metadata = {"role": here.node.role}
        if part >= MEDIA_PART:
            page = here.media[part - MEDIA_PART - 1]
            assert page.medium is not None
            metadata["caption"] = self._caption(position)
            if page.medium.transcript:
                metadata["transcript"] = page.medium.transcript
            return MemoryPage(
                page_id=page.id,
                modality=page.modality,
                page_type=PageType.ARTIFACT,
                content=page.medium.content,
                storage_tier=StorageTier.L2,
                size_tokens=page.tokens,
                provenance=[make_page_id(position)],
                metadata=metadata,
            )
        text, parts = self.text(page_id), here.parts
        # A call shown with its result, or a medium's name, is not in the message's own count.
        plain = text == parts[part - 1 if part else 0] and not here.media
        return MemoryPage(
            page_id=page_id,
            modality=here.pages[0].modality,
            page_type=here.pages[0].page_type,
            content=text,
            storage_tier=StorageTier.L2,
            size_tokens=here.text_tokens // len(parts) if plain else None,
            metadata=metadata,
        )

    def line(self, page_id: str) -> PackedLine:
        """The page at level 0 as its line of <VM:CONTEXT>."""
        place = None if page_id in self.derived.pages else parse_page_id(page_id)
        if place is None or place[1] >= MEDIA_PART:
            packed = self.packer.pack([self.page(page_id)])
            return PackedLine(packed.content, packed.tokens_est)
        position, part = place
        raw, counted_by = self.path[position].raw, self.counter.name
        as_written = (page_id, raw, counted_by)  # what a line depends on that shows the message's own words alone
        alone = not part and position not in self._notes
        if alone and (known := _lines.lookup(as_written)) is not None:
            return known
        here, text, count = self[position], self.text(page_id), self.counter.text
        role, modality, own = here.node.role, here.pages[0].modality, text is here.message.get("content")
        key = as_written if alone and own else (page_id, role, modality, text, counted_by)
        if key is not as_written and (known := _lines.lookup(key)) is not None:
            return known
        if own and len(here.message) == 2 and role in ("user", "assistant"):  # its tokens are the message's
            count = partial(self.counter.quoting, text, here.tokens - PER_MESSAGE)
        line = context_line(page_id, role, text, 0, modality)
        return _lines.keep(key, PackedLine(line, count(f"{line}\n")))

    def role(self, page_id: str) -> str:
        """Who speaks on the page; "" for a derived one."""
        position = self.position(page_id)
        return "" if position < 0 else self.path[position].role

    def at(self, page_id: str, level: CompressionLevel | int) -> MemoryPage:
        """The page at a level. Slow for media, whose levels 1 are encoded anew."""
        return self.shown(self.page(page_id), level)

    def shown(self, page: MemoryPage, level: CompressionLevel | int) -> MemoryPage:
        """A version of a page, at a level at least as short."""
        if int(level) <= page.compression_level:
            return page
        return self.registry.compress(page, CompressionLevel(level), self.counter)

    def _caption(self, position: int) -> str:
        """Words about a message's media: of the model that saw them, else of the message itself."""
        return self._seen_words(position) or self._own_words(position)

    def _seen_words(self, position: int) -> str:
        after = position + 1
        if after >= len(self.path) or self.path[after].role != "assistant":
            return ""
        return self._abstract(message_text(self[after].message))

    def _own_words(self, position: int) -> str:
        media = {page.medium.index for page in self[position].media if page.medium is not None}
        content = self[position].message.get("content")
        words = [part for i, part in enumerate(content or ()) if i not in media]
        return self._abstract(message_text({"content": words}) if isinstance(content, list) else "")

    def _abstract(self, text: str) -> str:
        return compress_text(text[:_SHORTENED_CHARS], CompressionLevel.ABSTRACT, None, self._how.cutter.text)

    def _call_of(self, position: int) -> str:
        """`name(arguments) -> ` for a tool's result."""
        if self.path[position].role != "tool":
            return ""
        call_id = self[position].message.get("tool_call_id")
        at = position - 1
        while at >= 0 and self.path[at].role == "tool":
            at -= 1
        for call in calls_of(self[at].message) if at >= 0 else ():
            if call.get("id") == call_id:
                return self._short(message_text({"tool_calls": [call]})) + " -> "
        return ""

    def _results_of(self, position: int) -> str:
        """The results of an assistant message's calls, shortened when they are long."""
        if self.path[position].role != "assistant" or not calls_of(self[position].message):
            return ""
        out = ""
        at = position + 1
        while at < len(self.path) and self.path[at].role == "tool":
            out += "\n-> " + self._short(message_text(self[at].message))
            at += 1
        return out

    def _short(self, text: str) -> str:
        level = 0 if len(text) < _LONG_CHARS else 1
        return compress_text(text[:_SHORTENED_CHARS], level, _SHOWN_WITH_TOKENS, self.counter.text)


class _IndexKeys(Sequence[bytes]):
    """Node ids, each with the digest of the notes at the `places` up to its own."""

    def __init__(self, path: Sequence[Node], length: int, places: list[int], digests: list[bytes]) -> None:
        self._path, self._length, self._places, self._digests = path, length, places, digests

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, at: int) -> bytes: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[bytes]: ...
    def __getitem__(self, at: int | slice) -> bytes | Sequence[bytes]:
        if isinstance(at, slice):
            return [self[position] for position in range(*at.indices(self._length))]
        at = range(self._length)[at]
        key = self._path[at].id
        return key + self._digests[bisect_right(self._places, at)] if self._places else key


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
    kept = anchor.kept
    if kept is None or kept[1] != counter.name:
        kept = anchor.kept = counter.message(_decode(anchor.raw)), counter.name
    return kept[0]


def _named(page: Page) -> str:
    return f"{page.modality.value} {page.medium.name if page.medium else ''}"


def _place(page_id: str) -> tuple[int, int]:
    """KeyError for a page that is neither a message's nor derived."""
    place = parse_page_id(page_id)
    if place is None:
        raise KeyError(f"no page {page_id!r} on this path")
    return place


def forget_lines() -> None:
    _lines.clear()


def packed_lines() -> CacheStats:
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
