"""The virtual memory: pages, levels, the page table and what the model is shown of them.

Pure: no clock, no random number, no I/O; time is the turn number, and whatever else is needed (a
token counter, a loader) is handed in. The invariants of the whole proxy, by the numbers that tests
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

from proxy.memory.anti_thrash import AntiThrashPolicy
from proxy.memory.artifacts_bridge import (
    ArtifactError,
    ArtifactsBridge,
    Checkpoint,
    InMemoryBackend,
)
from proxy.memory.claims import Claim
from proxy.memory.compressor import compress_text, hint
from proxy.memory.context_packer import (
    ContextPacker,
    PackedContext,
    context_block,
    context_line,
    context_parts,
)
from proxy.memory.core import MemoryCore
from proxy.memory.eviction_policy import (
    LRU,
    EvictionPolicy,
    ImportanceWeightedLRU,
    ModalityAwareLRU,
)
from proxy.memory.fault_handler import (
    FaultMetrics,
    FaultPolicy,
    FaultResult,
    PageFaultHandler,
)
from proxy.memory.levels import CompressorRegistry, levels_of
from proxy.memory.manager import ClosedSegment, MemoryManager
from proxy.memory.manifest import (
    AvailablePageEntry,
    ManifestBuilder,
    ManifestPolicies,
    VMManifest,
)
from proxy.memory.metrics import UserExperienceMetrics
from proxy.memory.models import (
    Actor,
    CompressionLevel,
    ContextPrefix,
    Counts,
    FaultReason,
    MemoryPage,
    Modality,
    MutationType,
    PageMutation,
    PageTableEntry,
    PageTableStats,
    PageType,
    PinKind,
    StorageTier,
    VMMode,
)
from proxy.memory.mutation_log import MutationLogLite
from proxy.memory.pack_cache import PackCache, PackCacheStats
from proxy.memory.page_table import PageTable
from proxy.memory.pages import (
    message_text,
    modality_of,
    page_id,
    parse_page_id,
    prefix_of,
    split_text,
)
from proxy.memory.pins import PinnedSet
from proxy.memory.prefetcher import Prefetcher
from proxy.memory.search_handler import PageSearchHandler
from proxy.memory.segments import ProvenanceGraph
from proxy.memory.tlb import PageTLB, TLBStats, TLBWithPageTable
from proxy.memory.vm_args import parse_fault_args, parse_search_args
from proxy.memory.vm_prompts import (
    build_vm_developer_message,
    get_vm_tools,
    get_vm_tools_as_dicts,
)
from proxy.memory.vm_results import (
    FaultToolResult,
    SearchResultEntry,
    SearchToolResult,
    error_result,
    fault_result,
    search_result,
)
from proxy.memory.working_set import (
    TokenBudget,
    WorkingSetConfig,
    WorkingSetManager,
    WorkingSetStats,
    watermarks,
)

__all__ = [
    "LRU",
    "Actor",
    "AntiThrashPolicy",
    "ArtifactError",
    "ArtifactsBridge",
    "AvailablePageEntry",
    "Checkpoint",
    "Claim",
    "ClosedSegment",
    "CompressionLevel",
    "CompressorRegistry",
    "ContextPacker",
    "ContextPrefix",
    "Counts",
    "EvictionPolicy",
    "FaultMetrics",
    "FaultPolicy",
    "FaultReason",
    "FaultResult",
    "FaultToolResult",
    "ImportanceWeightedLRU",
    "InMemoryBackend",
    "ManifestBuilder",
    "ManifestPolicies",
    "MemoryCore",
    "MemoryManager",
    "MemoryPage",
    "Modality",
    "ModalityAwareLRU",
    "MutationLogLite",
    "MutationType",
    "PackCache",
    "PackCacheStats",
    "PackedContext",
    "PageFaultHandler",
    "PageMutation",
    "PageSearchHandler",
    "PageTLB",
    "PageTable",
    "PageTableEntry",
    "PageTableStats",
    "PageType",
    "PinKind",
    "PinnedSet",
    "Prefetcher",
    "ProvenanceGraph",
    "SearchResultEntry",
    "SearchToolResult",
    "StorageTier",
    "TLBStats",
    "TLBWithPageTable",
    "TokenBudget",
    "UserExperienceMetrics",
    "VMManifest",
    "VMMode",
    "WorkingSetConfig",
    "WorkingSetManager",
    "WorkingSetStats",
    "build_vm_developer_message",
    "compress_text",
    "context_block",
    "context_line",
    "context_parts",
    "error_result",
    "fault_result",
    "get_vm_tools",
    "get_vm_tools_as_dicts",
    "hint",
    "levels_of",
    "message_text",
    "modality_of",
    "page_id",
    "parse_fault_args",
    "parse_page_id",
    "parse_search_args",
    "prefix_of",
    "search_result",
    "split_text",
    "watermarks",
]
