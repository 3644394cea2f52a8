"""The key space of the store, in one table: a key is the letter of its kind, then what names the value.

Letters are durable. What a key is made of is hashed with the installation's secret, or is itself such
a hash, so no tenant can aim at another's. (L2's own few keys are str: its secrets, its format.)
"""

from __future__ import annotations

# Immutable, under ids that are hashes of what came before:
RECORD = b"n"  # + the id of its last node: what an answered turn adds (records.py)
BLOCK = b"t"  # + the hash of its bytes: a chunk or a root of a page table (memory/table.py)

VECTOR = b"e"  # + hash of tenant, model, text: the vector of a page with that text
NEAR = b"q"  # + hash of tenant, model, path, query: the pages that a search found by meaning

# Sets of node ids, joined:
PAIR = b"p"  # + hash of tenant, message, answer: the delivered answers like this after one like that
LABEL = b"l"  # + hash of tenant, name: the answers given under a session's name

# Replaced by what is newer:
CONVERSATION = b"c"  # + tenant, beginning of its root's id: the last answer given in a window of it
SESSION = b"s"  # + hash of tenant, name: the head of a session whose client sends only what is new
RENDITION = b"v"  # + hash of tenant, version, level, kind: the artifact with that version of a page
VECTORS = b"E"  # + hash of tenant, model: another value whenever vectors of theirs arrived
MODEL = b"m"  # + scope, model: what refusals, bills and lists taught of a key's model
MODELS = b"M"  # + scope: the names of the models of which that is known
CALIBRATION = b"k"  # + scope, counter, "/", model: what a key's bills taught of counting
STATED = b"L"  # + scope: the windows that the upstream's own list of models states

# What stands under a letter, for people:
KINDS = {
    RECORD: "record of a turn", BLOCK: "block of a page table", VECTOR: "vector of a page", NEAR: "search's result",
    PAIR: "list of like answers", LABEL: "list of a session's answers", CONVERSATION: "last answer of a conversation",
    SESSION: "head of a session", RENDITION: "version of a page", VECTORS: "state of an embeddings endpoint",
    MODEL: "fact of a model", MODELS: "list of models", CALIBRATION: "lesson of bills", STATED: "list of stated windows",
}  # fmt: skip
