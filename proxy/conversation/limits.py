"""Every bound that a turn keeps, in one value: from the configuration, the model and the request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from proxy.memory.models import VMMode
from proxy.memory.working_set import WorkingSetConfig


@dataclass(frozen=True, slots=True)
class Limits:
    """Tokens unless the name says otherwise. `window_tokens` is what the model itself takes."""

    working_set: WorkingSetConfig  # max_l0_tokens, reserved_tokens and the watermarks
    window_tokens: int
    window_known: bool
    mode: VMMode
    model_takes_tools: bool
    developer_role: Literal["developer", "system"]
    faults_per_turn: int
    fault_tokens: int
    max_rounds: int
    prefetch_pages: int
    prefetch_tokens: int
    manifest_tokens: int
    page_tokens: int
    search_results: int
    snippet_tokens: int
    segment_messages: int  # messages of a segment that are read for its summary and claims
    summary_tokens: int
    max_claims: int
    tools_with_json: bool = True  # the model takes tools in a request whose answer has to be JSON
    not_with_tools: frozenset[str] = frozenset()  # fields of a request that exclude tools
    written_by_models: bool = False  # a model writes summaries and captions off the request path

    @property
    def budget_tokens(self) -> int:
        """What a whole upstream request may count: L0 less the reserve for the answer."""
        return self.working_set.max_l0_tokens - self.working_set.reserved_tokens
