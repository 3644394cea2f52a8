"""The settings: their names, units, defaults and limits, and the four places they come from.

Promises: a `Config` that exists is valid and never changes; every problem of a bad one is told at
once, each in one sentence with the key's path, the value and what is allowed; nothing printed
from a `Config` (its repr, `masked()`, an error) shows a secret.

Precedence, lowest first: the defaults in `config_sections.py`, `config.yaml`, `LLM_PAGER_*`
variables, flags. How the four are read and merged is in `config_sources.py`.
"""

import fnmatch
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from proxy.config_sections import (
    MASK,
    CompressionConfig,
    FaultsConfig,
    LogConfig,
    ManifestConfig,
    MemoryConfig,
    ModelOverride,
    PagesConfig,
    PrefetchConfig,
    SearchConfig,
    Section,
    SegmentsConfig,
    ServerConfig,
    SessionsConfig,
    StreamConfig,
    Text,
    TiersConfig,
    UpstreamConfig,
    mask,
)
from proxy.errors import ConfigError

EFFECTIVE_CONFIG_VARIABLE = "LLM_PAGER_EFFECTIVE_CONFIG"

__all__ = [
    "EFFECTIVE_CONFIG_VARIABLE",
    "MASK",
    "CompressionConfig",
    "Config",
    "ModelOverride",
    "Section",
    "SessionsConfig",
    "effective_config",
    "effective_reserve",
    "load_config",
    "mask",
]


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
    log: LogConfig = LogConfig()
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


def effective_reserve(l0_tokens: int, reserve_tokens: int) -> int:
    """Tokens of an `l0_tokens` window that are kept free for the answer, whatever the client asks for.

    Never more than a quarter of the window, so that the default leaves room for memory in a small one.
    """
    return min(reserve_tokens, l0_tokens // 4)


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
        reserve = effective_reserve(l0.tokens, l0.reserve_tokens)
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
    for name, model in config.models.items():
        if model.bridge is not None and config.upstream.provider != "openai":
            yield f"models.{name}.bridge: used with provider openai only."
        if model.api_base is not None and config.upstream.provider != "litellm":
            yield f"models.{name}.api_base: used with provider litellm only."
