"""A turn's bounds: from the configuration, the model's card, and what was learned of the model."""

from __future__ import annotations

from collections.abc import Mapping

from proxy.config import Config, effective_reserve
from proxy.conversation.limits import Limits
from proxy.memory.eviction import LRU, EvictionPolicy, ImportanceWeightedLRU, ModalityAwareLRU
from proxy.memory.models import VMMode
from proxy.memory.working_set import WorkingSetConfig
from proxy.tokens import model_card, parameters_b

UPSTREAM_WINDOW = "upstream_window_tokens"  # of what is learned of a model: what upstream's list states
POLICIES: dict[str, EvictionPolicy] = {  # by `memory.eviction`
    "importance": ImportanceWeightedLRU(),
    "lru": LRU(),
    "modality": ModalityAwareLRU(),
}


def limits_of(config: Config, model: str, facts: Mapping[str, object], factor: float = 1.0) -> Limits:
    """`facts`: what was learned of the model; `factor`: what upstream bills for a token as we count it.

    An override (configuration) goes before what was learned, and that before the model's card.
    """
    override, card, l0 = config.model_override(model), model_card(model), config.tiers.l0
    stated = facts.get(UPSTREAM_WINDOW) if override.window_tokens is None else None
    stated = stated if isinstance(stated, int) else None
    window = override.window_tokens or stated or card.window_tokens
    tokens = int((window if l0.tokens == "auto" else min(l0.tokens, stated or l0.tokens)) / factor)
    tools = override.tools  # a bridge is there so that the model can call them
    if tools is None:
        tools = override.bridge is not None or bool(facts.get("tools", True))
    with_json = override.tools_with_json
    if with_json is None:
        with_json = facts.get("tools_with_json") is not False
    excluded = facts.get("not_with_tools")
    role = override.developer_role or facts.get("developer_role") or card.developer_role
    return Limits(
        working_set=WorkingSetConfig(
            max_l0_tokens=tokens, reserved_tokens=effective_reserve(tokens, l0.reserve_tokens, factor),
            eviction_threshold=l0.eviction_threshold, target_utilization=l0.target_utilization,
        ),
        window_tokens=int(window / factor),
        window_known=card.known or override.window_tokens is not None or stated is not None,
        mode=VMMode(config.memory.mode),
        model_takes_tools=tools,
        tools_with_json=with_json,
        not_with_tools=frozenset(excluded if isinstance(excluded, list | tuple) else ()),
        developer_role="developer" if role == "developer" else "system",
        faults_per_turn=config.faults.max_per_turn,
        fault_tokens=config.faults.max_tokens_per_turn,
        max_rounds=config.faults.max_rounds,
        prefetch_pages=config.prefetch.max_pages,
        prefetch_tokens=None if config.prefetch.tokens == "auto" else config.prefetch.tokens,
        manifest_tokens=config.manifest.max_tokens,
        page_tokens=config.pages.max_tokens,
        search_results=config.search.max_results,
        snippet_tokens=config.search.snippet_tokens,
        segment_messages=config.segments.max_messages,
        max_claims=config.segments.max_claims,
        written_by_models=config.compression.model is not None,
        parameters_b=parameters_b(model),
        cached_price=card.cached_price,
        tokens_factor=factor,
        answer_beside=l0.reserve_tokens == "auto",
    )
