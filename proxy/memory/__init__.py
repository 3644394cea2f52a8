"""The virtual memory: pages, levels, the page table and what the model is shown of them.

Pure: no clock, no random number, no I/O; time is the turn number, and whatever else is needed (a
token counter, a loader) is handed in. README.md, beside this file, is the way in; what is exported
here is for callers from outside, and our own modules import from each other. The invariants of the whole proxy, by the numbers that tests
use (`test_invariant_07_...`):

 1. Never break the client: what would have succeeded without the proxy succeeds with it; a request
    that we changed and upstream refused with a 4xx is sent once more unchanged if that fits, and
    the lesson is kept per model.
 2. Under budget, nothing is touched: the bytes up are the client's and the bytes down are
    upstream's, whatever names a session; but for a session of new messages, which the client asked
    for, and a history that is proved to be trimmed.
 3. The window never exceeds its budget, fixed part, tools, mapped pages and reserve included, in
    the model's tokens.
 4. A full body is never lost: pages are immutable and addressed by content, compression adds a
    representation and replaces none, demotion writes below before it drops above.
 5. What was answered is remembered: once a client has read the end of a response, its pages survive
    `kill -9`.
 6. A miss loses memory; it never mixes it: no page of one tenant, user or abandoned branch is
    visible to another, and a likeness is no proof.
 7. Deterministic: the same history, configuration and log give byte-identical upstream requests, on
    any replica; what was learned is part of the log.
 8. Tool calls stay whole: a call and its results are evicted, mapped and restored as one group.
 9. RAM is a cache: deleting everything in L1 at any moment changes no later prompt.
10. Every loop, queue, cache and body has a limit, named in `config.yaml` with its unit.
"""

from typing import TYPE_CHECKING

from proxy.memory.artifacts_bridge import ArtifactsBridge, InMemoryBackend
from proxy.memory.caches import PageTLB, TLBWithPageTable
from proxy.memory.context import ContextPacker
from proxy.memory.eviction import (
    LRU,
    AntiThrashPolicy,
    EvictionPolicy,
    ImportanceWeightedLRU,
    ModalityAwareLRU,
    PinnedSet,
)
from proxy.memory.faults import PageFaultHandler
from proxy.memory.levels import CompressorRegistry
from proxy.memory.manifest import AvailablePageEntry, ManifestBuilder, ManifestPolicies
from proxy.memory.metrics import UserExperienceMetrics
from proxy.memory.models import (
    CompressionLevel,
    FaultReason,
    MemoryPage,
    Modality,
    MutationType,
    PageMutation,
    PageTableEntry,
    PageType,
    StorageTier,
    VMMode,
)
from proxy.memory.search_handler import PageSearchHandler
from proxy.memory.table import MutationLogLite, PageTable
from proxy.memory.vm_tools import (
    build_vm_developer_message,
    get_vm_tools,
    get_vm_tools_as_dicts,
)
from proxy.memory.working_set import TokenBudget, WorkingSetConfig, WorkingSetManager

if TYPE_CHECKING:
    from proxy.library import MemoryManager

__all__ = [
    "LRU",
    "AntiThrashPolicy",
    "ArtifactsBridge",
    "AvailablePageEntry",
    "CompressionLevel",
    "CompressorRegistry",
    "ContextPacker",
    "EvictionPolicy",
    "FaultReason",
    "ImportanceWeightedLRU",
    "InMemoryBackend",
    "ManifestBuilder",
    "ManifestPolicies",
    "MemoryManager",
    "MemoryPage",
    "Modality",
    "ModalityAwareLRU",
    "MutationLogLite",
    "MutationType",
    "PageFaultHandler",
    "PageMutation",
    "PageSearchHandler",
    "PageTLB",
    "PageTable",
    "PageTableEntry",
    "PageType",
    "PinnedSet",
    "StorageTier",
    "TLBWithPageTable",
    "TokenBudget",
    "UserExperienceMetrics",
    "VMMode",
    "WorkingSetConfig",
    "WorkingSetManager",
    "build_vm_developer_message",
    "get_vm_tools",
    "get_vm_tools_as_dicts",
]


def __getattr__(name: str) -> object:
    """The guide's home of the manager, which stands on the turns, a floor above."""
    if name == "MemoryManager":
        from proxy.library import MemoryManager

        return MemoryManager
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
