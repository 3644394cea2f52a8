"""What a model's name says: its plain and normal forms, and its card (window, tools, roles).

Promises: no list of providers or suffixes; a name is only ever shortened, and never so that it names
other weights: ollama's `llama3.1:8b-instruct-q4_K_M` keeps its tag, `gpt-4o:online` loses it. Cards are
litellm's model table, read from its file without importing it; the exact name counts first, then what
`normal_name` makes of it; never an exception for a model nobody has heard of.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

log = logging.getLogger(__name__)

_LITELLM = importlib.util.find_spec("litellm")  # found, not imported: importing it takes seconds
assert _LITELLM is not None and _LITELLM.origin is not None, "litellm is a dependency"
LITELLM_DIR = Path(_LITELLM.origin).parent
UNKNOWN_WINDOW_TOKENS = 32_000
USUAL_CACHED_PRICE = 0.1  # OpenAI's, Anthropic's and Google's newer models

_DEAD = re.compile(r"(?:-v\d+)?[:@][^:@/]*$")  # a routing suffix, a version: ":free", "@001", "-v1:0"
_TUNED = re.compile(r"[:.]ft-.*$")  # "gpt-3.5-turbo:ft-acme", Azure's "gpt-4o-mini.ft-1a2b"
_DATE = re.compile(r"[-@]20\d\d-?(?:0[1-9]|1[0-2])-?(?:[0-2]\d|3[01])$")
_VENDOR = re.compile(r"^(?:[a-z-]+\.)+(?=[a-z])")  # Bedrock's "us.anthropic."
_MARKS = re.compile(r"[^a-z0-9:@]+")

_SIZE = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)(b|m)(?![a-z0-9])")

_CHATS = ("chat", "completion", "responses", "")
Role = Literal["developer", "system"]


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


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What is known of a model: its input window in tokens, what its API accepts, and what a cached input token
    costs of a new one's price."""

    window_tokens: int
    known: bool
    developer_role: Role
    cached_price: float = USUAL_CACHED_PRICE


class _Row(msgspec.Struct):
    max_input_tokens: float | str | None = None
    max_tokens: float | str | None = None
    litellm_provider: str = ""
    mode: str = ""
    input_cost_per_token: float | str | None = None
    cache_read_input_token_cost: float | str | None = None
    cache_creation_input_token_cost: float | str | None = None
    output_cost_per_token: float | str | None = None

    @property
    def window_tokens(self) -> int | None:
        window = self.max_input_tokens or self.max_tokens
        return int(window) if isinstance(window, (int, float)) else None

    @property
    def cached_price(self) -> float:
        """0.0 to 1.0 of a new token's price."""
        new, cached = _usd(self.input_cost_per_token), self.cache_read_input_token_cost
        return min(1.0, max(0.0, _usd(cached) / new)) if new and cached is not None else USUAL_CACHED_PRICE


_decode_row = msgspec.json.Decoder(_Row).decode


@lru_cache(maxsize=1)
def _table() -> dict[str, msgspec.Raw]:
    data = (LITELLM_DIR / "model_prices_and_context_window_backup.json").read_bytes()
    return msgspec.json.decode(data, type=dict[str, msgspec.Raw])


@lru_cache(maxsize=1)
def _alike() -> dict[str, list[str]]:
    """The table's names by what they have in common: 20 ms and 1 MB, once, for the first name that
    is not in the table as it is."""
    found = defaultdict(list)
    for name in _table():
        found[normal_name(name)].append(name)
    return dict(found)


def load_table() -> None:
    """What the first question for a model would read: 25 ms."""
    _alike()


def _rows(names: list[str]) -> Iterator[tuple[str, _Row]]:
    """Those that state a window."""
    for name in names:
        raw = _table().get(name)
        row = None if raw is None else _decode_row(raw)
        if row is not None and row.window_tokens:
            yield name, row


def _names(model: str) -> list[str]:
    """Under which the table may have the very model: its name, and that without the prefixes before it."""
    pieces = model.split("/")
    return ["/".join(pieces[i:]) for i in range(len(pieces))] + [plain_name(model)]


def _row(model: str) -> _Row | None:
    """The table's row for a name: its own; without the prefixes before it; else what the rows say that
    name the same model: those without a provider, and the window that most of them state (of windows
    as frequent the smallest: one provider's cut-down offer is not the model's window)."""
    for _, row in _rows(_names(model)):
        return row
    alike = [pair for pair in _rows(_alike().get(normal_name(model), [])) if pair[1].mode in _CHATS]
    bare = [row for name, row in alike if "/" not in name and not _VENDOR.match(name)]
    own = bare or [row for _, row in alike]
    if not own:
        return None
    often = Counter(row.window_tokens or 0 for row in own)
    window = min(often, key=lambda tokens: (-often[tokens], tokens))
    return next(row for row in own if row.window_tokens == window)


@lru_cache(maxsize=1024)
def model_card(model: str) -> ModelCard:
    """The card from litellm's local table; an unknown model gets 32,000 tokens and one warning."""
    row = _row(model)
    window = row.window_tokens if row is not None else None
    if row is None or window is None:
        log.warning(
            "model %r is not in litellm's table: assuming a window of %d tokens; set"
            " models.<name>.window_tokens or tiers.l0.tokens to its real one",
            model,
            UNKNOWN_WINDOW_TOKENS,
        )
        return ModelCard(UNKNOWN_WINDOW_TOKENS, False, "system")
    # gpt-3.5 and the first gpt-4 know only `system`; o1-mini and o1-preview know neither.
    old = ("gpt-3.5*", "gpt-4", "gpt-4-*", "o1-mini*", "o1-preview*")
    is_old = any(fnmatch.fnmatchcase(plain_name(model), pattern) for pattern in old)
    takes = row.litellm_provider == "openai" and not is_old
    return ModelCard(window, True, "developer" if takes else "system", row.cached_price)


def parameters_b(model: str) -> float | None:
    """The billions of parameters that a model's name says: 0.5 for "qwen2.5-coder-0.5b-instruct", 0.27 for
    "gemma3-270m"; None where it says nothing."""
    sizes = [float(size) * (1 if unit == "b" else 0.001) for size, unit in _SIZE.findall(model.lower())]
    return max(sizes, default=None)


class Prices(NamedTuple):
    """US dollars a token, by the table's list price: of a prompt, of what of it was cached or was written
    into the cache, and of a completion. What the table has no price of its own for costs as a prompt does."""

    prompt: float
    cached: float
    written: float
    completion: float


@lru_cache(maxsize=1024)
def prices(model: str) -> Prices | None:
    """None for a name that the table does not have: another provider's price is not this one's."""
    for _, row in _rows(_names(model)):
        prompt, completion = _usd(row.input_cost_per_token), _usd(row.output_cost_per_token)
        if prompt > 0:
            cached, written = _usd(row.cache_read_input_token_cost), _usd(row.cache_creation_input_token_cost)
            return Prices(prompt, cached or prompt, written or prompt, completion)
    return None


def _usd(cost: float | str | None) -> float:
    return cost if isinstance(cost, float | int) else 0.0
