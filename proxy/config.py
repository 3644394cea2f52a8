"""The settings: their names, units, defaults and limits, and the four places they come from.

Promises: a `Config` that exists is valid and never changes; every problem of a bad one is told at
once, each in one sentence with the key's path, the value and what is allowed; nothing printed
from a `Config` (its repr, `masked()`, an error) shows a secret.

Precedence, lowest first: the defaults here, `config.yaml`, `LLM_PAGER_*` variables, flags: a later one
replaces single keys. The sentences are made in `config_text.py`; pydantic-settings merges.
"""

import fnmatch
import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from proxy.config_text import Sentences, mask, read_file
from proxy.errors import ConfigError

EFFECTIVE_CONFIG_VARIABLE = "LLM_PAGER_EFFECTIVE_CONFIG"
DEFAULT_FILE = Path("config.yaml")
_PREFIX = "LLM_PAGER_"
_NOT_SETTINGS = frozenset({EFFECTIVE_CONFIG_VARIABLE, "LLM_PAGER_DATA"})
# Kubernetes describes a service named llm-pager to every pod in variables of these shapes.
_SERVICE_LINK = re.compile(r"LLM_PAGER_(SERVICE_(HOST|PORT)(_\w+)?|PORT_\d+_(TCP|UDP)(_\w+)?)")
_SERVICE_ADDRESS = re.compile(r"(tcp|udp)://")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_OBJECT_STORES = ("file", "s3", "gs", "az")
_RESERVE_TOKENS = 4096  # of a window, for the answer
_SECRET_HEADERS = frozenset({"authorization", "proxy-authorization", "cookie", "api-key"})


# ---------------------------------------------------------------- what a value may be
# A description is the end of the sentence "... is not allowed; it must be ..."; numbers with a least
# value, choices and switches have one by their type.


def _url(value: str) -> str:
    parts = urlsplit(value)
    usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    if not usable or parts.query or parts.fragment or re.search(r"\s", value):
        raise ValueError("not a base URL")
    return value.rstrip("/")


def is_loopback(host: str) -> bool:
    """Only this machine reaches a server that listens there, or has that address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")


def _objects_url(url: str | None) -> str | None:
    if url is not None and (not url.strip() or ("://" in url and url.partition("://")[0] not in _OBJECT_STORES)):
        raise ValueError("not a store of objects")
    return url


def _database_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("postgresql", "postgres") or re.search(r"\s", value) or not parts.path.strip("/"):
        raise ValueError("not a database's URL")
    return value


def _path(value: object) -> object:
    if not isinstance(value, str | Path) or not str(value).strip() or "\0" in str(value):
        raise ValueError("not a path")
    return value


def _window(tokens: int | str) -> int | str:
    if isinstance(tokens, int) and tokens < 512:
        raise ValueError("too small")
    return tokens


def _header_names(names: tuple[str, ...]) -> tuple[str, ...]:
    lowered = tuple(name.lower() for name in names)
    named = all(_HEADER_NAME.fullmatch(name) for name in lowered)
    if not named or len(set(lowered)) != len(lowered) or _SECRET_HEADERS.intersection(lowered):
        raise ValueError("not header names")
    return lowered


def _each_like(pattern: str) -> Callable[[tuple[str, ...]], tuple[str, ...]]:
    def check(items: tuple[str, ...]) -> tuple[str, ...]:
        if not all(re.fullmatch(pattern, item) for item in items):
            raise ValueError("not such items")
        return items

    return check


def _networks(items: tuple[str, ...]) -> tuple[str, ...]:
    for item in items:
        ipaddress.ip_network(item)  # ValueError
    return items


AtLeast0 = Annotated[int, Field(ge=0)]
AtLeast1 = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, le=86_400, description="a number of seconds above 0 and up to 86400")]
Share = Annotated[float, Field(gt=0, le=1, description="a number above 0 and up to 1")]
Text = Annotated[str, Field(min_length=1, description="a text that is not empty")]
OptionalText = Annotated[str | None, Field(min_length=1, description="null or a text that is not empty")]
KeyHash = Annotated[
    str,
    Field(pattern=r"^sha256:[0-9a-f]{64}$", description="the hash of a key, as `llm-pager api-key` makes it: sha256: and 64 hexadecimal digits"),
]
BaseUrl = Annotated[
    str,
    AfterValidator(_url),
    Field(description="an http:// or https:// URL with a host and no query, such as http://127.0.0.1:11434/v1"),
]
HeaderNames = Annotated[
    tuple[str, ...],
    AfterValidator(_header_names),
    Field(strict=False, description="a list of different header names that do not carry credentials"),
]


# ---------------------------------------------------------------- the sections


class Section(BaseModel):
    """A part of the configuration: strict types, no unknown keys, immutable, masked repr."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        for name in type(self).model_fields:
            yield name, mask(name, getattr(self, name))


class ServerConfig(Section):
    host: Text = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535, description="a port from 0 (any free one) to 65535")] = 8080
    body_limit_bytes: Annotated[int, Field(ge=1024)] = 67_108_864
    bodies_limit_bytes: Annotated[int, Field(ge=1024)] = 100_663_296
    body_ratio: AtLeast1 = 200
    head_limit_bytes: Annotated[int, Field(ge=1024)] = 65_536
    receive_timeout_s: Seconds = 15.0
    receive_bytes_per_s: AtLeast0 = 500
    send_timeout_s: Seconds = 300.0
    connections: AtLeast1 = 8192
    connections_per_address: AtLeast1 = 2048
    trusted_proxies: Annotated[
        tuple[str, ...],
        AfterValidator(_networks),
        Field(strict=False, description="a list of addresses or networks such as 10.0.0.0/8"),
    ] = ()
    pipelined_requests: AtLeast1 = 16
    history_cache_bytes: AtLeast0 = 268_435_456
    cors_origins: Annotated[
        tuple[str, ...],
        AfterValidator(_each_like(r"\*|[A-Za-z][A-Za-z0-9+.-]*://[^/?#@\s,]+")),
        Field(strict=False, description='a list of origins such as "https://chat.example.com", or ["*"]'),
    ] = ()
    allowed_hosts: Annotated[
        tuple[str, ...],
        AfterValidator(_each_like(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")),
        Field(strict=False, description="a list of host names without ports"),
    ] = ()
    drain_s: Annotated[float, Field(ge=0, le=600, description="a number of seconds from 0 to 600")] = 1.0
    keys: Annotated[
        dict[Text, KeyHash], Field(description="a mapping of names to hashes of keys, as `llm-pager api-key` makes them")
    ] = Field(default_factory=dict)
    event_streams: AtLeast0 = 64
    admin_key: Annotated[
        KeyHash | None, Field(description="null or the hash of a key, as `llm-pager api-key` makes it: sha256: and 64 hexadecimal digits")
    ] = None
    drain_answers_s: Annotated[
        int, Field(ge=1, le=86_400, description="a whole number of seconds from 1 to 86400")
    ] = 60


class UpstreamConfig(Section):
    provider: Literal["openai", "litellm", "demo"] = "openai"
    base_url: BaseUrl = "https://api.openai.com/v1"
    api_key: OptionalText = None
    timeout_s: Seconds = 600.0
    connect_timeout_s: Seconds = 10.0
    max_connections: AtLeast1 = 1000
    retries: AtLeast0 = 2
    retry_wait_s: Annotated[float, Field(ge=0, le=3600, description="a number of seconds from 0 to 3600")] = 10.0
    drop_params: bool = False

    @model_validator(mode="after")
    def _connecting_is_part_of_the_wait(self) -> Self:
        if self.connect_timeout_s > self.timeout_s:
            raise ValueError(
                f"connect_timeout_s {self.connect_timeout_s:g} must not be above "
                f"timeout_s {self.timeout_s:g}"
            )
        return self


class MemoryConfig(Section):
    mode: Literal["strict", "relaxed", "passive"] = "relaxed"
    tools: Literal["auto", "always"] = "auto"
    eviction: Literal["importance", "lru", "modality"] = "importance"


class L0Config(Section):
    tokens: Annotated[
        int | Literal["auto"],
        AfterValidator(_window),
        Field(description="auto or a whole number of tokens of at least 512"),
    ] = "auto"
    reserve_tokens: Annotated[
        AtLeast1 | Literal["auto"], Field(description="auto or a whole number of tokens of at least 1")
    ] = "auto"
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
        Path, BeforeValidator(_path), AfterValidator(Path.expanduser),
        Field(strict=False, description="a directory's path"),
    ] = Path("data")  # fmt: skip
    queue_records: AtLeast1 = 10_000
    durability: Literal["process", "power"] = "process"
    url: Annotated[
        Annotated[str, AfterValidator(_database_url)] | None,
        Field(description="null or a URL such as postgresql://user:password@host:5432/database"),
    ] = None
    connections: AtLeast1 = 10
    timeout_s: Seconds = 5.0
    days: Annotated[float | None, Field(ge=0, le=36_500, description="null or a number of days from 0 to 36500")] = None
    tokens: Annotated[int | None, Field(ge=1, description="null or a whole number of at least 1")] = None


class ObjectsConfig(Section):
    url: Annotated[
        str | None,
        AfterValidator(_objects_url),
        Field(description="null, a directory, or a URL of file, s3, gs or az such as s3://bucket/prefix"),
    ] = None
    options: Annotated[
        dict[Text, str], Field(description="a mapping of the provider's options to texts")
    ] = Field(default_factory=dict)
    timeout_s: Seconds = 10.0


class L3Config(ObjectsConfig):
    min_bytes: Annotated[int, Field(ge=1024)] = 65_536


class L4Config(ObjectsConfig):
    cache_bytes: AtLeast1 = 67_108_864


class TiersConfig(Section):
    l0: L0Config = L0Config()
    l1: L1Config = L1Config()
    l2: L2Config = L2Config()
    l3: L3Config = L3Config()
    l4: L4Config = L4Config()
    demotion_s: Seconds = 60.0

    @model_validator(mode="after")
    def _what_leaves_goes_somewhere(self) -> Self:
        if self.l4.url is None and (self.l2.days is not None or self.l2.tokens is not None):
            name = "days" if self.l2.days is not None else "tokens"
            raise ValueError(f"l2.{name} {getattr(self.l2, name):g} needs l4.url: what leaves L2 has to go somewhere")
        return self


class EncryptionConfig(Section):
    keys: Annotated[
        tuple[str, ...],
        BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
        AfterValidator(_each_like(r"file:.+|[A-Za-z0-9+/]{43}=")),
        Field(strict=False, description="a list of keys of 32 bytes in base64 (openssl rand -base64 32), or of file:PATH"),
    ] = ()
    key_store: Annotated[
        Annotated[str, AfterValidator(lambda value: _database_url(value) if "://" in value else _path(value))] | None,
        Field(description="null, a directory, or a URL such as postgresql://user:password@host:5432/database"),
    ] = None
    cache_keys: AtLeast1 = 10_000
    cache_s: Seconds = 60.0


class StorageConfig(Section):
    encryption: EncryptionConfig = EncryptionConfig()
    retention_days: Annotated[float | None, Field(gt=0, description="null or a number of days above 0")] = None


class PagesConfig(Section):
    max_tokens: Annotated[int, Field(ge=64)] = 1024


class FaultsConfig(Section):
    max_per_turn: AtLeast0 = 3
    max_tokens_per_turn: AtLeast1 = 8192
    max_rounds: AtLeast1 = 8


class PrefetchConfig(Section):
    tokens: Annotated[
        Literal["auto"] | AtLeast0,
        Field(validation_alias=AliasChoices("tokens", "max_tokens"), description='"auto" or a whole number of at least 0'),
    ] = "auto"
    max_pages: AtLeast0 = 64


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


class DecodersConfig(Section):
    processes: AtLeast1 = 2
    queue_jobs: AtLeast0 = 64
    wait_s: Seconds = 10.0
    timeout_s: Seconds = 8.0
    cpu_s: Seconds = 2.0
    memory_bytes: Annotated[int, Field(ge=1 << 24)] = 201_326_592
    input_bytes: AtLeast1 = 67_108_864
    pixels: AtLeast1 = 40_000_000
    idle_s: Seconds = 30.0


class SearchConfig(Section):
    max_results: AtLeast1 = 20
    snippet_tokens: AtLeast1 = 128
    index_pages: AtLeast1 = 200_000
    embeddings: Literal["none", "static", "upstream"] = "none"
    embeddings_model: OptionalText = None
    embeddings_wait_ms: Annotated[
        int, Field(ge=0, le=60_000, description="a whole number of milliseconds from 0 to 60000")
    ] = 250
    embeddings_timeout_s: Seconds = 30.0
    embeddings_calls: AtLeast1 = 2
    embeddings_batch_pages: AtLeast1 = 64
    embeddings_pages_per_minute: AtLeast1 = 3000
    embeddings_queue_pages: AtLeast1 = 10_000

    @model_validator(mode="after")
    def _vectors_come_from_a_model(self) -> Self:
        if self.embeddings == "upstream" and self.embeddings_model is None:
            raise ValueError("embeddings 'upstream' needs embeddings_model")
        return self


class PoolConfig(Section):
    threads: AtLeast1 = 4
    queue_jobs: AtLeast1 = 1000


class StreamConfig(Section):
    hold_tokens: AtLeast0 = 24
    hold_ms: Annotated[int, Field(ge=0, le=60_000, description="a whole number of milliseconds from 0 to 60000")] = 500
    keepalive_s: Annotated[float, Field(ge=0, le=3600, description="a number of seconds from 0 (off) to 3600")] = 15.0
    event_limit_bytes: AtLeast1 = 64 << 20


class LogConfig(Section):
    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


class SessionsConfig(Section):
    headers: HeaderNames = ("x-session-id",)
    delta_headers: HeaderNames = ()
    reattach: bool = True


class ModelOverride(Section):
    """What is known better than litellm's table about one model; None: the table's word."""

    window_tokens: Annotated[int | None, Field(ge=512, description="a whole number of tokens of at least 512")] = None
    tools: bool | None = None
    tools_with_json: bool | None = None
    developer_role: Literal["developer", "system"] | None = None
    tokenizer: Annotated[str | None, Field(min_length=1, description="a tiktoken encoding such as o200k_base")] = None
    mid_system: bool | None = None
    system_role: bool | None = None
    alternate: bool | None = None
    stream_usage: bool | None = None
    prompt_cache_key: bool | None = None
    bridge: Literal["responses"] | None = None
    api_base: Annotated[BaseUrl | None, Field(description="an http:// or https:// URL")] = None


class Config(Section):
    """Every setting of one server. Unit and meaning of each key: `config.yaml`."""

    server: ServerConfig = ServerConfig()
    upstream: UpstreamConfig = UpstreamConfig()
    memory: MemoryConfig = MemoryConfig()
    tiers: TiersConfig = TiersConfig()
    storage: StorageConfig = StorageConfig()
    pages: PagesConfig = PagesConfig()
    faults: FaultsConfig = FaultsConfig()
    prefetch: PrefetchConfig = PrefetchConfig()
    manifest: ManifestConfig = ManifestConfig()
    segments: SegmentsConfig = SegmentsConfig()
    compression: CompressionConfig = CompressionConfig()
    decoders: DecodersConfig = DecodersConfig()
    search: SearchConfig = SearchConfig()
    pool: PoolConfig = PoolConfig()
    stream: StreamConfig = StreamConfig()
    sessions: SessionsConfig = SessionsConfig()
    log: LogConfig = LogConfig()
    models: Annotated[
        dict[Text, ModelOverride], Field(description="a mapping of model names to overrides")
    ] = Field(default_factory=dict)

    def model_override(self, model: str) -> ModelOverride:
        """The override for `model`."""
        name = self.model_class(model)
        return self.models[name] if name is not None else ModelOverride()

    def model_class(self, model: str) -> str | None:
        """What `models` calls it: its exact name, else the longest glob that matches, else None."""
        if model in self.models:
            return model
        globs = [name for name in self.models if fnmatch.fnmatchcase(model, name)]
        return max(globs, key=len, default=None)

    def masked(self) -> dict[str, Any]:
        """Plain data (JSON types) for people to read: secrets are replaced by `***`."""
        return {name: mask(name, value) for name, value in self.model_dump(mode="json").items()}

    def notes(self) -> list[str]:
        """What a valid configuration does that its author may not expect; one sentence each."""
        return list(self._notes())

    def _notes(self) -> Iterator[str]:
        l0, upstream = self.tiers.l0, self.upstream
        if isinstance(l0.tokens, int):
            reserve = effective_reserve(l0.tokens, l0.reserve_tokens)
            if l0.reserve_tokens != "auto" and reserve < l0.reserve_tokens:
                yield (
                    f"tiers.l0.reserve_tokens: {l0.reserve_tokens} is more than a quarter of the "
                    f"{l0.tokens}-token window, so {reserve} tokens are reserved for the answer."
                )
            if self.pages.max_tokens > l0.tokens // 2:
                yield (
                    f"pages.max_tokens: a page of {self.pages.max_tokens} tokens takes more than "
                    f"half of the {l0.tokens}-token window; smaller pages will be found more often."
                )
        if upstream.provider == "demo" and upstream.base_url != UpstreamConfig().base_url:
            yield "upstream.base_url: not used with provider demo."
        if self.search.embeddings == "upstream" and upstream.provider != "openai":
            yield "search.embeddings: upstream is used with provider openai only."
        if self.storage.encryption.keys and self.storage.encryption.key_store is None:
            yield (
                "storage.encryption.key_store: the tenants' keys stand beside the data, so who copies all of it has them, "
                "too; name a place of their own where dropping a key shall erase backups (docs/encryption.md)."
            )
        for name, model in self.models.items():
            if model.bridge is not None and upstream.provider != "openai":
                yield f"models.{name}.bridge: used with provider openai only."
            if model.api_base is not None and upstream.provider != "litellm":
                yield f"models.{name}.api_base: used with provider litellm only."


def require_keys(config: Config) -> None:
    """ConfigError for a server that would let any machine that reaches it spend its key."""
    if config.upstream.api_key and not config.server.keys and not is_loopback(config.server.host):
        raise ConfigError(
            f"server.host: {config.server.host} lets other machines spend upstream.api_key; give them keys of this server"
            " (server.keys, made with `llm-pager api-key`), or listen on 127.0.0.1."
        )


def effective_reserve(l0_tokens: int, reserve_tokens: int | Literal["auto"], factor: float = 1.0) -> int:
    """Tokens of an `l0_tokens` window that are kept free for the answer, whatever the client asks for, where the
    model has no room for it beside that window; `factor`: what upstream bills for a token.

    Never more than a quarter of the window, so that the default leaves room for memory in a small one.
    """
    return min(int((_RESERVE_TOKENS if reserve_tokens == "auto" else reserve_tokens) / factor), l0_tokens // 4)


# ---------------------------------------------------------------- the sources


class _Given(EnvSettingsSource):
    """Variables and flags: values by names such as `server__port`, of their keys' types already."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(cast(Any, Config), case_sensitive=True, env_nested_delimiter="__")
        self.env_vars = values
        self.config = SettingsConfigDict()  # no strict types here: it would turn texts into them

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        return value


def _merged(given: Mapping[str, Any], file: Mapping[str, Any]) -> dict[str, Any]:
    """Both in one, key by key, and judged by nobody: `Config` does that, in sentences."""

    class Merged(BaseSettings):
        model_config = SettingsConfigDict(extra="allow", case_sensitive=True)

        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *_: Any, **__: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return _Given(given), InitSettingsSource(settings_cls, dict(file))

    return Merged().model_extra or {}


def load_config(path: Path | None, environ: Mapping[str, str], flags: Mapping[str, object]) -> Config:
    """The effective configuration.

    `path` is the file given with `--config` and must exist; None: `config.yaml` in the working
    directory, if there is one. `flags` maps dotted keys ("upstream.base_url") to values; None
    means not given. Raises ConfigError with every problem found.
    """
    file = path if path is not None else DEFAULT_FILE
    sentences = Sentences(Config, _PREFIX, str(file))
    data = sentences.filled(read_file(file, must_exist=path is not None), environ)
    given: dict[str, Any] = {}
    for variable in sorted(environ):
        if not variable.startswith(_PREFIX) or variable in _NOT_SETTINGS:
            continue
        if _SERVICE_LINK.fullmatch(variable):
            continue
        if variable == "LLM_PAGER_PORT" and _SERVICE_ADDRESS.match(environ[variable]):
            continue
        given |= sentences.variable(variable, environ[variable])
    for flag, value in flags.items():
        if value is not None:
            sentences.origins[tuple(flag.split("."))] = "the command line"
            given[flag.replace(".", "__")] = value
    # A section of the file that is none is told, though a variable could stand in for it.
    broken = {name for name, section in data.items() if not isinstance(section, dict)} - given.keys()
    given = {name: v for name, v in given.items() if name.partition("__")[0] not in broken}
    try:
        config = Config.model_validate(_merged(given, data))
    except ValidationError as error:
        sentences.invalid(error)
        config = Config()
    if sentences.problems:
        raise ConfigError(*sentences.problems)
    return config


def effective_config(environ: Mapping[str, str]) -> Config:
    """What a worker process uses: the configuration its parent handed down, else `load_config`."""
    handed = environ.get(EFFECTIVE_CONFIG_VARIABLE)
    if handed is None:
        return load_config(None, environ, {})
    try:
        return Config.model_validate_json(handed)
    except ValueError as error:
        raise ConfigError(
            f"{EFFECTIVE_CONFIG_VARIABLE} is set by llm-pager for its own worker processes and "
            "does not hold a valid configuration; unset it and use LLM_PAGER_* variables."
        ) from error
