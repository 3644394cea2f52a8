"""The sections of the configuration: each key's type, unit, default and limits.

Promises: strict types, no unknown keys, immutable; nothing printed from a section shows a secret.
"""

import re
from collections.abc import Iterator, Mapping
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

MASK = "***"
_SECRET_KEYS = frozenset({"api_key"})
_SECRET_HEADERS = frozenset({"authorization", "proxy-authorization", "cookie", "api-key"})
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#@\s,]+")
_HOST_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_URL_USERINFO = re.compile(r"(?<=://)[^/?#]*@")
_URL_SECRET = re.compile(r"(?i)([?&][^=&#]*(?:key|secret|token|password|sig)[^=&#]*=)[^&#]*")


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


def _origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    if not all(origin == "*" or _ORIGIN.fullmatch(origin) for origin in origins):
        raise ValueError("not origins")
    return origins


def _host_names(names: tuple[str, ...]) -> tuple[str, ...]:
    if not all(_HOST_NAME.fullmatch(name) for name in names):
        raise ValueError("not host names")
    return names


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
    body_ratio: AtLeast1 = 200
    history_cache_bytes: AtLeast0 = 268_435_456


    cors_origins: Annotated[
        tuple[str, ...],
        AfterValidator(_origins),
        Field(strict=False, description='a list of origins such as "https://chat.example.com", or ["*"]'),
    ] = ()
    allowed_hosts: Annotated[
        tuple[str, ...],
        AfterValidator(_host_names),
        Field(strict=False, description="a list of host names without ports"),
    ] = ()
    drain_s: Annotated[
        float, Field(ge=0, le=600, description="a number of seconds from 0 to 600")
    ] = 1.0


class UpstreamConfig(Section):
    provider: Annotated[
        Literal["openai", "litellm", "demo"], _one_of("openai", "litellm", "demo")
    ] = "openai"
    base_url: BaseUrl = "https://api.openai.com/v1"
    api_key: OptionalText = None
    timeout_s: Seconds = 600.0
    connect_timeout_s: Seconds = 10.0
    max_connections: AtLeast1 = 1000
    retries: AtLeast0 = 2
    retry_wait_s: Annotated[
        float, Field(ge=0, le=3600, description="a number of seconds from 0 to 3600")
    ] = 10.0
    drop_params: Annotated[bool, Field(description="true or false")] = False

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
    eviction: Annotated[
        Literal["importance", "lru", "modality"], _one_of("importance", "lru", "modality")
    ] = "importance"


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
    keepalive_s: Annotated[
        float, Field(ge=0, le=3600, description="a number of seconds from 0 (off) to 3600")
    ] = 15.0
    event_limit_bytes: AtLeast1 = 64 << 20


class LogConfig(Section):
    format: Annotated[Literal["text", "json"], _one_of("text", "json")] = "text"
    level: Annotated[
        Literal["debug", "info", "warning", "error"], _one_of("debug", "info", "warning", "error")
    ] = "info"


HeaderNames = Annotated[
    tuple[str, ...],
    AfterValidator(_header_names),
    Field(
        strict=False,
        description="a list of different header names that do not carry credentials",
    ),
]


class SessionsConfig(Section):
    headers: HeaderNames = ("x-session-id",)
    delta_headers: HeaderNames = ()
    reattach: Flag = True


class ModelOverride(Section):
    """What is known better than litellm's table about one model; None: the table's word."""

    window_tokens: Annotated[
        int | None, Field(ge=512, description="a whole number of tokens of at least 512")
    ] = None
    tools: Annotated[bool | None, Field(description="true or false")] = None
    tools_with_json: Annotated[bool | None, Field(description="true or false")] = None
    developer_role: Annotated[Literal["developer", "system"] | None, _one_of("developer", "system")] = None
    tokenizer: Annotated[
        str | None, Field(min_length=1, description="a tiktoken encoding such as o200k_base")
    ] = None
    mid_system: Annotated[bool | None, Field(description="true or false")] = None
    system_role: Annotated[bool | None, Field(description="true or false")] = None
    alternate: Annotated[bool | None, Field(description="true or false")] = None
    stream_usage: Annotated[bool | None, Field(description="true or false")] = None
    prompt_cache_key: Annotated[bool | None, Field(description="true or false")] = None
    bridge: Annotated[Literal["responses"] | None, _one_of("responses")] = None
    api_base: Annotated[BaseUrl | None, Field(description="an http:// or https:// URL")] = None
