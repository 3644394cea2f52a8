"""The key space of the store, in one table: a key is the letter of its kind, its owner, and what else names the value.

Letters are durable. An owner is `scope` (of the credentials), `person` (of the credentials and the user) and `path` (of the
conversation: its tenant and first message); what belongs to no conversation has the first two, or one. So all that is stored
of a conversation, of a user or of a credential stands under a few beginnings of keys, and can be found, moved and erased.
All that a key is made of is hashed with the installation's secret, so no tenant can aim at another's. (L2's own few keys are
str: its secrets, its format.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

SCOPE_BYTES = 6
TENANT_BYTES = 12  # scope, person
OWNER_BYTES = 18  # scope, person, path

# Immutable, under ids that are hashes of what came before:
RECORD = b"n"  # + the id of its last node: what an answered turn adds (records.py)
BLOCK = b"t"  # + the hash of its bytes: a chunk or a root of a page table (memory/table.py)

INDEX = b"i"  # + hash of how pages and words are cut, node id: a piece of the search index (search/paths.py)

VECTOR = b"e"  # + hash of model, text: the vector of a page with that text
NEAR = b"q"  # + hash of model, history, query: the pages that a search found by meaning

TITLE = b"h"  # nothing else: when a conversation began (4 bytes, Unix time), and its first words
PINS = b"P"  # nothing else: the pages that a person pinned or unpinned (pins.py)

TIP = b"T"  # + the last of the id of its last node: the id of an answer that the conversation did not go on from, and when it left

# Sets of node ids, joined:
PAIR = b"p"  # + hash of message, answer: the delivered answers like this after one like that
LABEL = b"l"  # + hash of name: the answers given under a session's name

# Replaced by what is newer:
CONVERSATION = b"c"  # nothing else: the id of the last answer given in it, and when (4 bytes, Unix time)
SESSION = b"s"  # + hash of name: the head of a session whose client sends only what is new
RENDITION = b"v"  # + hash of version, level, kind: the artifact with that version of a page
VECTORS = b"E"  # + hash of model: another value whenever vectors of theirs arrived
MODEL = b"m"  # + scope, model: what refusals, bills and lists taught of a key's model
MODELS = b"M"  # + scope: the names of the models of which that is known
CALIBRATION = b"k"  # + scope, counter, "/", model: what a key's bills taught of counting
STATED = b"L"  # + scope: the windows that the upstream's own list of models states

# What left L2 (storage/tiered.py):
ARCHIVE = b"a"  # nothing else, joined: owner and hash of each pack that has values of a conversation
LARGE = b"o"  # + letter, rest of a key: its value is large and on its way to L3

LEASE = b"w"  # + a work's name, joined: who of all processes does it, nobody's (storage/lease.py)

# Of erasures (erasure.py), which outlive what they erase:
LINK = b"r"  # + another owner of the tenant: one of the two goes on from the other, or reads its messages there
ERASING = b"y"  # + its id: an erasure that is under way
RECEIPT = b"x"  # + scope and person, or scope and zeros, its number, its id: an erasure that is done

OF_CONVERSATION = frozenset({RECORD, BLOCK, INDEX, VECTOR, NEAR, CONVERSATION, RENDITION, ARCHIVE, LARGE, LINK, TITLE, PINS, TIP})
MOVING = OF_CONVERSATION - {CONVERSATION, ARCHIVE, LARGE, LINK, TITLE, PINS, TIP}  # kinds whose values go to L3 and L4
OF_TENANT = frozenset({PAIR, LABEL, SESSION, VECTORS})
OF_SCOPE = frozenset({MODEL, MODELS, CALIBRATION, STATED})  # no user's words


_ENDS = {
    kind: 1 + size
    for kinds, size in ((OF_CONVERSATION, OWNER_BYTES), (OF_TENANT, TENANT_BYTES), (OF_SCOPE, SCOPE_BYTES))
    for kind in kinds
}


def owner(key: bytes) -> bytes:
    """Whose value a key names: 18 bytes, 12 of a tenant's, 6 of a credential's, none of the installation's."""
    return key[1 : _ENDS.get(key[:1], 1)]


_Row = TypeVar("_Row", bound=tuple[Any, ...])  # its key is the first of it
Scan = Callable[[bytes, bytes, int], list[_Row]]  # by a key's beginning, after which key, how many


def rows_of(scan: Scan[_Row], prefix: bytes, at_once: int = 1000, after: bytes = b"") -> Iterator[_Row]:
    """All whose keys begin with `prefix` and come after `after`, so many read at once. Blocks; StorageError."""
    while rows := scan(prefix, after, at_once):
        yield from rows
        after = rows[-1][0]


def sealer(key: bytes) -> bytes:
    """Whose key seals the value: a tenant's, a credential's, or the installation's (of what outlives its owner)."""
    return owner(key)[:TENANT_BYTES]


IDS_ONLY = frozenset({PAIR, LABEL, CONVERSATION, ARCHIVE, LARGE, LEASE, LINK})  # their values are ids, and a time: hashes, as keys are

# What stands under a letter, for people:
KINDS = {
    RECORD: "record of a turn", BLOCK: "block of a page table", INDEX: "piece of a search index", VECTOR: "vector of a page", NEAR: "search's result",
    PAIR: "list of like answers", LABEL: "list of a session's answers", CONVERSATION: "last answer of a conversation",
    SESSION: "head of a session", RENDITION: "version of a page", VECTORS: "state of an embeddings endpoint",
    TITLE: "first words of a conversation", PINS: "list of a person's pins", TIP: "end of a branch",
    ARCHIVE: "list of packs", LARGE: "large value on its way", LEASE: "lease of a work",
    MODEL: "fact of a model", MODELS: "list of models", CALIBRATION: "lesson of bills", STATED: "list of stated windows",
    LINK: "link of two conversations", ERASING: "erasure under way", RECEIPT: "receipt of an erasure",
}  # fmt: skip
