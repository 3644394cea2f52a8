"""The settings: their names, units, defaults and limits, and the four places they come from.

Promises: a `Config` that exists is valid and never changes; every problem of a bad one is told at
once, each in one sentence with the key's path, the value and what is allowed; nothing printed
from a `Config` (its repr, `masked()`, an error) shows a secret.

Precedence, lowest first: the defaults below, `config.yaml`, `LLM_PAGER_*` variables, flags.
How the four are read and merged is in `config_sources.py`.
"""

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from proxy.errors import ConfigError

MASK = "***"
EFFECTIVE_CONFIG_VARIABLE = "LLM_PAGER_EFFECTIVE_CONFIG"

_SECRET_KEYS = frozenset({"api_key"})
_SECRET_HEADERS = frozenset({"authorization", "proxy-authorization", "cookie", "api-key"})
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_URL_USERINFO = re.compile(r"(?<=://)[^/?#]*@")
_URL_SECRET = re.compile(r"(?i)([?&][^=&#]*(?:key|secret|token|password|sig)[^=&#]*=)[^&#]*")


# ---------------------------------------------------------------- what a value may be
# The description of a type is the end of the sentence "... is not allowed; it must be ...".


def _url(value: str) -> str:
    parts = urlsplit(value)
    usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    if not usable or parts.query or parts.fragment or re.search(r"\s", value):
        raise ValueError("not a base URL")
    return value.rstrip("/")


def _path(value: object) -> object:
    if not isinstance(value, str | Path) or not str(value).strip() or "\0" in str(value):
        raise ValueError("not a path")
    return value


def _header_names(names: tuple[str, ...]) -> tuple[str, ...]:
    lowered = tuple(name.lower() for name in names)
    named = all(_HEADER_NAME.fullmatch(name) for name in lowered)
    if not named or len(set(lowered)) != len(lowered) or _SECRET_HEADERS.intersection(lowered):
        raise ValueError("not header names")
    return lowered


def _count(at_least: int) -> Any:
    return Field(ge=at_least, description=f"a whole number of at least {at_least}")


def _seconds() -> Any:
    return Field(gt=0, le=86_400, description="a number of seconds above 0 and up to 86400")


def _share() -> Any:
    return Field(gt=0, le=1, description="a number above 0 and up to 1")


def _one_of(*names: str) -> Any:
    return Field(description="one of " + ", ".join(names))


AtLeast0 = Annotated[int, _count(0)]
AtLeast1 = Annotated[int, _count(1)]
Seconds = Annotated[float, _seconds()]
Share = Annotated[float, _share()]
Flag = Annotated[bool, Field(description="true or false")]
Text = Annotated[str, Field(min_length=1, description="a text that is not empty")]
OptionalText = Annotated[
    str | None, Field(min_length=1, description="null or a text that is not empty")
]
BaseUrl = Annotated[
    str,
    AfterValidator(_url),
    Field(description="an http:// or https:// URL with a host and no query, such as http://127.0.0.1:11434/v1"),
]
StoreUrl = Annotated[
    str | None, Field(min_length=1, description="null or an fsspec URL such as s3://bucket/prefix")
]
WindowTokens = Annotated[
    int | Literal["auto"],
    Field(description="auto or a whole number of tokens of at least 512"),
    AfterValidator(lambda tokens: _window(tokens)),
]


def _window(tokens: int | str) -> int | str:
    if isinstance(tokens, int) and tokens < 512:
        raise ValueError("too small")
    return tokens


# ---------------------------------------------------------------- the sections


class Section(BaseModel):
    """A part of the configuration: strict types, no unknown keys, immutable, masked repr."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, hide_input_in_errors=True
    )

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        for name in type(self).model_fields:
            yield name, mask(name, getattr(self, name))


class ServerConfig(Section):
    host: Text = "127.0.0.1"
    port: Annotated[
        int, Field(ge=0, le=65_535, description="a port from 0 (any free one) to 65535")
    ] = 8080
    body_limit_bytes: Annotated[int, _count(1024)] = 67_108_864
    history_cache_bytes: AtLeast0 = 268_435_456


class UpstreamConfig(Section):
    provider: Annotated[
        Literal["openai", "litellm", "demo"], _one_of("openai", "litellm", "demo")
    ] = "openai"
    base_url: BaseUrl = "https://api.openai.com/v1"
    api_key: OptionalText = None
    timeout_s: Seconds = 600.0
    connect_timeout_s: Seconds = 10.0
    max_connections: AtLeast1 = 1000

    @model_validator(mode="after")
    def _connecting_is_part_of_the_wait(self) -> Self:
        if self.connect_timeout_s > self.timeout_s:
            raise ValueError(
                f"connect_timeout_s {self.connect_timeout_s:g} must not be above "
                f"timeout_s {self.timeout_s:g}"
            )
        return self


class MemoryConfig(Section):
    mode: Annotated[
        Literal["strict", "relaxed", "passive"], _one_of("strict", "relaxed", "passive")
    ] = "relaxed"


class L0Config(Section):
    tokens: WindowTokens = "auto"
    reserve_tokens: AtLeast1 = 4096
    eviction_threshold: Share = 0.90
    target_utilization: Share = 0.50

    @model_validator(mode="after")
    def _an_epoch_frees_something(self) -> Self:
        if self.target_utilization >= self.eviction_threshold:
            raise ValueError(
                f"target_utilization {self.target_utilization:g} must be lower than "
                f"eviction_threshold {self.eviction_threshold:g}"
            )
        return self


class L1Config(Section):
    tokens: AtLeast1 = 1_000_000


class L2Config(Section):
    path: Annotated[
        Path,
        BeforeValidator(_path),
        AfterValidator(Path.expanduser),
        Field(strict=False, description="a directory's path"),
    ] = Path("data")
    tokens: AtLeast1 = 100_000_000
    queue_records: AtLeast1 = 10_000


class ArchiveConfig(Section):
    url: StoreUrl = None


class TiersConfig(Section):
    l0: L0Config = L0Config()
    l1: L1Config = L1Config()
    l2: L2Config = L2Config()
    l3: ArchiveConfig = ArchiveConfig()
    l4: ArchiveConfig = ArchiveConfig()

    @model_validator(mode="after")
    def _a_cache_is_not_larger_than_its_source(self) -> Self:
        if self.l1.tokens > self.l2.tokens:
            raise ValueError(
                f"l1.tokens {self.l1.tokens} must not be above l2.tokens {self.l2.tokens}, "
                "because L1 holds copies of what is in L2"
            )
        return self


class PagesConfig(Section):
    max_tokens: Annotated[int, _count(64)] = 1024


class FaultsConfig(Section):
    max_per_turn: AtLeast0 = 3
    max_tokens_per_turn: AtLeast1 = 8192
    max_rounds: AtLeast1 = 8


class PrefetchConfig(Section):
    max_pages: AtLeast0 = 5
    max_tokens: AtLeast0 = 1024


class ManifestConfig(Section):
    max_tokens: AtLeast1 = 1024


class SegmentsConfig(Section):
    max_messages: AtLeast1 = 512
    summary_tokens: AtLeast0 = 160
    max_claims: AtLeast0 = 128


class CompressionConfig(Section):
    model: OptionalText = None
    transcription_model: OptionalText = None
    max_jobs: AtLeast1 = 2
    queue_jobs: AtLeast1 = 64


class SearchConfig(Section):
    max_results: AtLeast1 = 20
    snippet_tokens: AtLeast1 = 128
    index_pages: AtLeast1 = 200_000


class StreamConfig(Section):
    hold_tokens: AtLeast0 = 24
    hold_ms: Annotated[
        int, Field(ge=0, le=60_000, description="a whole number of milliseconds from 0 to 60000")
    ] = 500


class SessionsConfig(Section):
    headers: Annotated[
        tuple[str, ...],
        AfterValidator(_header_names),
        Field(
            strict=False,
            description="a list of different header names that do not carry credentials",
        ),
    ] = ("x-session-id",)
    reattach: Flag = True


class ModelOverride(Section):
    """What is known better than litellm's table about one model; None: the table's word."""

    window_tokens: Annotated[
        int | None, Field(ge=512, description="a whole number of tokens of at least 512")
    ] = None
    tools: Annotated[bool | None, Field(description="true or false")] = None
    developer_role: Annotated[Literal["developer", "system"] | None, _one_of("developer", "system")] = None
    tokenizer: Annotated[
        str | None, Field(min_length=1, description="a tiktoken encoding such as o200k_base")
    ] = None
    bridge: Annotated[Literal["responses"] | None, _one_of("responses")] = None
    api_base: Annotated[BaseUrl | None, Field(description="an http:// or https:// URL")] = None


class Config(Section):
    """Every setting of one server. Unit and meaning of each key: `config.yaml`."""

    server: ServerConfig = ServerConfig()
    upstream: UpstreamConfig = UpstreamConfig()
    memory: MemoryConfig = MemoryConfig()
    tiers: TiersConfig = TiersConfig()
    pages: PagesConfig = PagesConfig()
    faults: FaultsConfig = FaultsConfig()
    prefetch: PrefetchConfig = PrefetchConfig()
    manifest: ManifestConfig = ManifestConfig()
    segments: SegmentsConfig = SegmentsConfig()
    compression: CompressionConfig = CompressionConfig()
    search: SearchConfig = SearchConfig()
    stream: StreamConfig = StreamConfig()
    sessions: SessionsConfig = SessionsConfig()
    models: Annotated[
        dict[Text, ModelOverride], Field(description="a mapping of model names to overrides")
    ] = Field(default_factory=dict)

    def model_override(self, model: str) -> ModelOverride:
        """The override for `model`: its exact name, else the longest glob that matches."""
        exact = self.models.get(model)
        if exact is not None:
            return exact
        globs = [name for name in self.models if fnmatch.fnmatchcase(model, name)]
        return self.models[max(globs, key=len)] if globs else ModelOverride()

    def masked(self) -> dict[str, Any]:
        """Plain data (JSON types) for people to read: secrets are replaced by `***`."""
        return {name: mask(name, value) for name, value in self.model_dump(mode="json").items()}

    def to_json(self) -> str:
        """Everything, secrets included, for a worker process; `from_json` reads it back."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """The inverse of `to_json`. Raises pydantic's ValidationError (a ValueError)."""
        return cls.model_validate_json(text)

    def notes(self) -> list[str]:
        """What a valid configuration does that its author may not expect; one sentence each."""
        return list(_notes(self))


def mask(name: str, value: Any) -> Any:
    """`value` of the key `name` as it may be shown: no keys, no credentials inside URLs."""
    if name in _SECRET_KEYS:
        return value if value is None else MASK
    if isinstance(value, str):
        return _URL_SECRET.sub(rf"\1{MASK}", _URL_USERINFO.sub(f"{MASK}@", value))
    if isinstance(value, Mapping):
        return {key: mask(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mask("", item) for item in value)
    return value


def effective_reserve(l0_tokens: int, reserve_tokens: int, client_max_tokens: int | None) -> int:
    """Tokens of an `l0_tokens` window that are kept free for the answer.

    The configured reserve never takes more than a quarter of the window, so that the default
    leaves room for memory in a small one. A client that asks for a longer answer
    (`max_tokens`, `max_completion_tokens`) gets it reserved, up to half of the window.
    """
    return max(min(reserve_tokens, l0_tokens // 4), min(client_max_tokens or 0, l0_tokens // 2))


def load_config(
    path: Path | None, environ: Mapping[str, str], flags: Mapping[str, object]
) -> Config:
    """The effective configuration.

    `path` is the file given with `--config` and must exist; None: `config.yaml` in the working
    directory, if there is one. `flags` maps dotted keys ("upstream.base_url") to values; None
    means not given. Raises ConfigError with every problem found.
    """
    from proxy.config_sources import merge_sources

    return merge_sources(path, environ, flags)


def effective_config(environ: Mapping[str, str]) -> Config:
    """What a worker process uses: the configuration its parent handed down, else `load_config`."""
    handed = environ.get(EFFECTIVE_CONFIG_VARIABLE)
    if handed is None:
        return load_config(None, environ, {})
    try:
        return Config.from_json(handed)
    except ValueError as error:
        raise ConfigError(
            f"{EFFECTIVE_CONFIG_VARIABLE} is set by llm-pager for its own worker processes and "
            "does not hold a valid configuration; unset it and use LLM_PAGER_* variables."
        ) from error


def _notes(config: Config) -> Iterable[str]:
    l0 = config.tiers.l0
    if isinstance(l0.tokens, int):
        reserve = effective_reserve(l0.tokens, l0.reserve_tokens, None)
        if "reserve_tokens" in l0.model_fields_set and reserve < l0.reserve_tokens:
            yield (
                f"tiers.l0.reserve_tokens: {l0.reserve_tokens} is more than a quarter of the "
                f"{l0.tokens}-token window, so {reserve} tokens are reserved for the answer."
            )
        if config.pages.max_tokens > l0.tokens // 2:
            yield (
                f"pages.max_tokens: a page of {config.pages.max_tokens} tokens takes more than "
                f"half of the {l0.tokens}-token window; smaller pages will be found more often."
            )
    if config.tiers.l4.url is not None:
        yield "tiers.l4.url: this version keeps no cold archive, so nothing is sent there."
    if config.upstream.provider == "demo" and config.upstream.base_url != UpstreamConfig().base_url:
        yield "upstream.base_url: not used with provider demo."
