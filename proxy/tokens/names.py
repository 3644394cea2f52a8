"""A model's name without what gateways hang on it. Pure.

Promises: no list of providers or suffixes; a name is only ever shortened, and never so that it names
other weights: ollama's `llama3.1:8b-instruct-q4_K_M` keeps its tag, `gpt-4o:online` loses it.
"""

from __future__ import annotations

import re
from functools import lru_cache

_DEAD = re.compile(r"(?:-v\d+)?[:@][^:@/]*$")  # a routing suffix, a version: ":free", "@001", "-v1:0"
_TUNED = re.compile(r"[:.]ft-.*$")  # "gpt-3.5-turbo:ft-acme", Azure's "gpt-4o-mini.ft-1a2b"
_DATE = re.compile(r"[-@]20\d\d-?(?:0[1-9]|1[0-2])-?(?:[0-2]\d|3[01])$")
_VENDOR = re.compile(r"^(?:[a-z-]+\.)+(?=[a-z])")  # Bedrock's "us.anthropic."
_MARKS = re.compile(r"[^a-z0-9:@]+")


@lru_cache(maxsize=1024)
def plain_name(model: str) -> str:
    """The name in lower case, without provider prefixes, routing suffixes and what made a fine-tune of
    it: "gpt-4o" for "openai/GPT-4o:online", "gpt-4o-mini-2024-07-18" for its "ft:...:org::id"."""
    name = model.lower().strip().rsplit("/", 1)[-1]
    if name.startswith("ft:"):
        name = name[3:].partition(":")[0]
    name = _TUNED.sub("", name)
    while (dead := _DEAD.search(name)) is not None and not _of_weights(dead[0]):
        name = name[: dead.start()]
    return name


def _of_weights(tag: str) -> bool:
    """A size or a quantisation ("8b-q4_K_M"): letters and digits, where a date or a version is digits
    and a route is a word."""
    word = tag.rpartition(":")[2].rpartition("@")[2]
    return any(c.isdigit() for c in word) and any(c.isalpha() for c in word)


def normal_name(model: str) -> str:
    """What names of one model have in common, whoever writes them: the plain name without vendor and
    date, every mark a dash."""
    name = _DATE.sub("", plain_name(model))
    return _MARKS.sub("-", _VENDOR.sub("", name)).strip("-")


def is_bare(name: str) -> bool:
    """Neither a provider's prefix nor a vendor's."""
    return "/" not in name and not _VENDOR.match(name)
