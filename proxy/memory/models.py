"""The vocabulary of the virtual memory: enums, the page, its table entry and the mutation.

Promises: these are data types with no behaviour beyond defaults and token estimates; no clock, no
random number, no I/O. Time is the turn number (int). `MemoryPage` is the pydantic door of the
seeds; `PageTableEntry` and `PageMutation` are msgspec's structs, because a conversation has ten
thousand of them.

Entries and mutations are stored as they are defined here: an enum's member by its value, a field by
its place. So values are durable, and a new field stands at the end, with a default.
"""

from __future__ import annotations

import json
from enum import Enum, IntEnum
from hashlib import blake2b
from typing import Any, NewType, Protocol

import msgspec
from pydantic import BaseModel, ConfigDict, Field

PageId = NewType("PageId", str)  # short and stable along a path: msg_0042, img_0042_1, claim_0007
ChunkRef = NewType("ChunkRef", bytes)  # the hash of a stored chunk of a page table

DEFAULT_IMPORTANCE = 0.5


class CompressionLevel(IntEnum):
    """How much of a page is shown: 0 is the page itself, higher levels say less in fewer tokens."""

    FULL = 0
    REDUCED = 1
    ABSTRACT = 2
    REFERENCE = 3


SYSTEM_ROLES = ("system", "developer")  # what the application says, in front of any conversation


class Modality(str, Enum):
    """What kind of content a page holds."""

    TEXT = "text"
    IMAGE = "image"
    AUDIO = "audio"
    VIDEO = "video"
    STRUCTURED = "structured"


class StorageTier(str, Enum):
    """Where a page lives: L0 is the model's window, L4 the cold archive."""

    L0 = "L0"
    L1 = "L1"
    L2 = "L2"
    L3 = "L3"
    L4 = "L4"


class PageType(str, Enum):
    """What a page is for; decides how readily it is evicted."""

    TRANSCRIPT = "transcript"
    SUMMARY = "summary"
    ARTIFACT = "artifact"
    CLAIM = "claim"
    PROCEDURE = "procedure"
    INDEX = "index"


class VMMode(str, Enum):
    """How the model is told about its memory."""

    STRICT = "strict"
    RELAXED = "relaxed"
    PASSIVE = "passive"


class FaultReason(str, Enum):
    """Why a page was brought into the window."""

    USER_REQUESTED_RECALL = "user_requested_recall"
    RESOLVE_REFERENCE = "resolve_reference"
    TOOL_PREREQUISITE = "tool_prereq"
    SPECULATIVE = "speculative"


class MutationType(str, Enum):
    """The only ways in which the page table changes."""

    CREATE = "create"
    FAULT_IN = "fault_in"  # the model asked for the page: it enters L0 and counts as a fault
    EVICT = "evict"
    COMPRESS = "compress"  # a resident page is shown at another level
    PIN = "pin"
    UNPIN = "unpin"
    UPDATE = "update"
    MAP = "map"  # the proxy put the page into L0 (planner, prefetch): no fault
    ACCESS = "access"  # the page was used where it is


class PinKind(str, Enum):
    """How firm a pin is."""

    EXPLICIT = "explicit"  # somebody asked for it: it holds until it is taken back
    INFERRED = "inferred"  # a guess of ours: it decays when the page is not used


class Actor(str, Enum):
    """Who caused a mutation."""

    USER = "user"
    MODEL = "model"
    TOOL = "tool"
    SYSTEM = "system"


class ContextPrefix(str, Enum):
    """The letter that opens a line of <VM:CONTEXT>."""

    USER = "U"
    ASSISTANT = "A"
    TOOL = "T"
    SUMMARY = "S"
    IMAGE = "I"
    AUDIO = "D"
    VIDEO = "V"
    STRUCTURED = "J"


# A page's part from here on is a medium: MEDIA_PART + its number in the message.
MEDIA_PART = 1 << 20


def estimate_text_tokens(text: str) -> int:
    """About how many tokens `text` has (4 UTF-8 bytes each), for callers that were given no
    counter.
    """
    return (len(text.encode("utf-8", "surrogatepass")) + 3) // 4


def json_text(value: Any) -> str:
    """A value as compact JSON; "" for what cannot be JSON (cycles, keys that are no strings)."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
    except (TypeError, ValueError, RecursionError):
        return ""


class Counts(Protocol):
    """Counts tokens as a model's provider does; never raises."""

    def text(self, text: str) -> int:
        """Tokens of a text."""

    def part(self, part: dict[str, Any]) -> int:
        """Tokens of one content part of a message, media included."""


class MemoryPage(BaseModel):
    """One unit of content with identity; immutable in content, addressed by `page_id` along its
    path.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    page_id: str = Field(min_length=1)
    modality: Modality = Modality.TEXT
    page_type: PageType = PageType.TRANSCRIPT
    content: Any = None
    storage_tier: StorageTier = StorageTier.L1
    compression_level: CompressionLevel = CompressionLevel.FULL
    size_tokens: int | None = Field(default=None, ge=0)
    provenance: list[str] = Field(default_factory=list)
    importance: float = Field(default=DEFAULT_IMPORTANCE, ge=0.0, le=1.0)
    pinned: bool = False
    metadata: dict[str, Any] = Field(default_factory=dict)
    artifact_id: str | None = None
    session_id: str | None = None

    def text(self) -> str:
        """The content as text: a string as it is, nothing as "", other values as compact JSON."""
        if self.content is None:
            return ""
        if isinstance(self.content, str):
            return self.content
        return json_text(self.content)

    @property
    def version(self) -> str:
        """The content's hash (16 hex digits of BLAKE2b): the same content is the same version."""
        kind = b"s" if isinstance(self.content, str) else b"j"
        return blake2b(kind + self.text().encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()

    def estimate_tokens(self) -> int:
        """`size_tokens` when it is known, else an estimate from the content's length."""
        if self.size_tokens is not None:
            return self.size_tokens
        return estimate_text_tokens(self.text())


class PageTableEntry(msgspec.Struct, array_like=True, gc=False):
    """What the table knows of one page. Read it freely; only `PageTable.apply` writes it.

    `position` is the message's 0-based place along the path and `part` the piece of it (0: whole
    message); a page whose id names no message has position -1. `size_tokens` is the full page,
    `l0_tokens` what it costs in the window at its present level (0 outside L0). The `*_turn` fields
    are turn numbers.
    """

    page_id: PageId
    position: int
    part: int
    sequence: int  # order of registration
    size_tokens: int
    tier: StorageTier
    last_turn: int
    created_turn: int
    # In the order of how often they are not at their default: the ends of stored rows are cut there.
    evicted_turn: int | None = None
    access_count: int = 0
    l0_tokens: int = 0
    level: CompressionLevel = CompressionLevel.FULL
    importance: float = DEFAULT_IMPORTANCE
    modality: Modality = Modality.TEXT
    page_type: PageType = PageType.TRANSCRIPT
    faulted_turn: int | None = None
    fault_count: int = 0
    refault_count: int = 0
    pin_kind: PinKind | None = None  # None: not pinned
    pinned_turn: int | None = None
    artifact_id: str | None = None
    estimated: bool = False  # `size_tokens` is, from the size in bytes

    @property
    def pinned(self) -> bool:
        return self.pin_kind is not None


class PageMutation(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One change of the page table, immutable. None means: leave as it is.

    `tokens` is the page's full size for CREATE and UPDATE, and its cost in the window for MAP,
    FAULT_IN and COMPRESS. `importance` is 0..1. `modality` and `page_type` only mean something for
    CREATE, `pin_kind` for PIN (None: explicit), and so does `estimated`: `tokens` are about so many, until an UPDATE
    has counted them.
    """

    op: MutationType
    page_id: str
    turn: int
    level: CompressionLevel | None = None
    tier: StorageTier | None = None
    tokens: int | None = None
    actor: Actor = Actor.SYSTEM
    reason: FaultReason | None = None
    importance: float | None = None
    modality: Modality | None = None
    page_type: PageType | None = None
    artifact_id: str | None = None
    pin_kind: PinKind | None = None
    estimated: bool = False


class PageTableStats(BaseModel):
    """Counts over the whole table."""

    total_pages: int = 0
    total_tokens: int = 0
    l0_tokens: int = 0
    pages_by_tier: dict[StorageTier, int] = Field(default_factory=dict)
