"""Replays a trace on a page table as the proxy would, under an eviction policy or with foresight.

What is real: the page table and its mutations (so a refault raises importance, a fault protects for
two turns, an eviction cools), the policies, the planner, the watermarks and shares of an epoch.
What is assumed: tools and system messages take no room, a model faults exactly what it needs and
does not see, at full size, at most FAULTS_PER_TURN pages in a turn.

`foresee` is the clairvoyant's rebuild (Belady with sizes and levels): it knows every later access,
is bound by the same watermarks and by demand (nothing enters that was not new or faulted), and may
fill the whole low watermark as it likes: of the pages in the window, those needed soonest stay,
each at the cheapest level that still shows what will be needed. Only the newest message has to
stay.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field

from proxy.memory.eviction import EvictionPolicy, is_cooling
from proxy.memory.metrics import UserExperienceMetrics
from proxy.memory.models import CompressionLevel, MutationType, PageMutation, StorageTier
from proxy.memory.planner import Budget, Group, Plan, plan, price
from proxy.memory.table import PageTable
from proxy.memory.working_set import WorkingSetConfig, watermarks
from proxy.tokens import TokenCounter
from tests.bench.policy_traces import Access, Trace
from tests.memory.doors import fault_in, pin

FAULTS_PER_TURN = 3
_CONTEXT_SHARE = 0.25  # of the low watermark, as proxy/conversation/epoch.py
_MANIFEST_SHARE = 0.20
_NEVER = 1 << 40
_RESULT_ROLES = ("tool", "function")
_LEVELS = (CompressionLevel.ABSTRACT, CompressionLevel.REDUCED, CompressionLevel.FULL)


@dataclass(slots=True)
class Score:
    """Counts of one replay; add them up over conversations."""

    accesses: int = 0
    hits: int = 0
    far: int = 0
    far_hits: int = 0
    rebuilds: int = 0
    metrics: UserExperienceMetrics = field(default_factory=UserExperienceMetrics)

    def add(self, other: Score) -> None:
        """Add another's counts."""
        self.accesses += other.accesses
        self.hits += other.hits
        self.far += other.far
        self.far_hits += other.far_hits
        self.rebuilds += other.rebuilds
        for name in ("faults", "refaults", "evictions", "turns"):
            setattr(self.metrics, name, getattr(self.metrics, name) + getattr(other.metrics, name))

    @property
    def hit_rate(self) -> float:
        """Hits per access."""
        return self.hits / self.accesses if self.accesses else 0.0

    @property
    def far_hit_rate(self) -> float:
        """Hits per access to anything but the message before."""
        return self.far_hits / self.far if self.far else 0.0

    @property
    def refault_rate(self) -> float:
        """Evictions that a fault took back within the cooldown, per eviction."""
        metrics = self.metrics
        return metrics.refaults / metrics.evictions if metrics.evictions else 0.0


Rebuild = Callable[["Replay"], list[PageMutation]]


class Replay:
    """One conversation in a window with room for `room_tokens`."""

    def __init__(
        self, trace: Trace, room_tokens: int, rebuild: Rebuild, counter: TokenCounter
    ) -> None:
        self.trace = trace
        self.table = PageTable()
        self.high, self.low = watermarks(room_tokens, WorkingSetConfig())
        self.turn = 0
        self.end = 0  # messages so far
        self.native_from = 0
        self.counter = counter
        self._rebuild = rebuild
        self._score = Score()

    def run(self) -> Score:
        """All turns."""
        for number, turn in enumerate(self.trace.turns, 1):
            self.turn = number
            self._register(turn.end)
            if self.table.get_stats().l0_tokens > self.high:
                self._begin_epoch()
            faults = 0
            for access in turn.accesses:
                faults += self._access(access, faults < FAULTS_PER_TURN)
            self._score.metrics.turns += 1
        return self._score

    def _register(self, end: int) -> None:
        for pages in self.trace.pages[self.end : end]:
            for page in pages:
                self.table.apply(
                    PageMutation(
                        MutationType.CREATE,
                        page.page_id,
                        self.turn,
                        tier=StorageTier.L0,
                        tokens=page.tokens,
                        modality=page.modality,
                    )
                )
                if page.standing:
                    pin(self.table, page.page_id, self.turn)
        self.end = end

    def _begin_epoch(self) -> None:
        mutations = self._rebuild(self)
        self.table.replay(mutations)
        self._score.rebuilds += 1
        self._score.metrics.evictions += sum(m.op is MutationType.EVICT for m in mutations)

    def _access(self, access: Access, may_fault: bool) -> bool:
        """Count it; true when it took a fault."""
        entry = self.table.lookup(access.page_id)
        if entry is None:
            raise LookupError(access.page_id)
        score = self._score
        inside = entry.tier is StorageTier.L0
        hit = inside and self.trace.shows(access, entry.level, self.counter)
        score.accesses += 1
        score.hits += hit
        score.far += access.far
        score.far_hits += hit and access.far
        if hit or not may_fault:
            return False
        score.metrics.faults += 1
        score.metrics.refaults += is_cooling(entry, self.turn)
        fault_in(self.table, access.page_id, self.turn)
        return True

    def groups(self) -> list[Group]:
        """As `proxy.conversation.epoch` makes them: what is older than the native run can only be a
        context line."""
        roles = self.trace.roles
        last_user = max((p for p in range(self.end) if roles[p] == "user"), default=-1)
        resident = {entry.position for entry in self.table.resident()}
        found: list[Group] = []
        at = 0
        while at < self.end:
            last = at + 1
            while last < self.end and roles[last] in _RESULT_ROLES:
                last += 1
            must = last == self.end or at <= last_user < last
            if must or at >= self.native_from or resident & set(range(at, last)):
                native = at >= self.native_from or must
                found.append(
                    Group(
                        at,
                        last,
                        sum(self.trace.tokens[at:last]) if native else _NEVER,
                        tuple(
                            page.page_id for p in range(at, last) for page in self.trace.pages[p]
                        ),
                        mandatory=must,
                        answer=last - at == 1 and roles[at] == "assistant",
                    )
                )
            at = last
        return found


def replay(trace: Trace, room_tokens: int, rebuild: Rebuild, counter: TokenCounter) -> Score:
    """The counts of one conversation in one window."""
    return Replay(trace, room_tokens, rebuild, counter).run()


def by_policy(policy: EvictionPolicy) -> Rebuild:
    """The proxy's rebuild with a policy."""

    def rebuild(state: Replay) -> list[PageMutation]:
        low = state.low
        context = int(low * _CONTEXT_SHARE)
        native = low - int(low * _MANIFEST_SHARE) - context
        made: Plan = plan(state.table, state.groups(), Budget(native, context), policy, state.turn)
        edge = state.end
        for group in reversed(made.native):
            if group.last == edge:
                edge = group.first
        state.native_from = edge
        return made.mutations

    return rebuild


class Foresight:
    """The clairvoyant of one trace."""

    def __init__(self, trace: Trace) -> None:
        self._uses: dict[str, list[tuple[int, Access]]] = {}
        for number, turn in enumerate(trace.turns, 1):
            for access in turn.accesses:
                self._uses.setdefault(access.page_id, []).append((number, access))

    def next_use(self, page_id: str, turn: int) -> tuple[int, Access] | None:
        """The first access in `turn` or later."""
        uses = self._uses.get(page_id, [])
        at = bisect_right(uses, turn - 1, key=lambda use: use[0])
        return uses[at] if at < len(uses) else None


def foresee(trace: Trace) -> Rebuild:
    """The rebuild that knows the future."""
    foresight = Foresight(trace)

    def rebuild(state: Replay) -> list[PageMutation]:
        left = state.low
        wanted = []
        for entry in state.table.resident():
            use = foresight.next_use(entry.page_id, state.turn)
            newest = entry.position == state.end - 1
            wanted.append((not newest, use[0] if use else _NEVER, entry.size_tokens, entry, use))
        wanted.sort(key=lambda row: row[:3])
        mutations = []
        for must_not, _, size, entry, use in wanted:
            level, cost = CompressionLevel.FULL, size
            if use is not None and must_not:
                for tried in _LEVELS:
                    if trace.shows(use[1], tried, state.counter):
                        shorter = price(entry.size_tokens, entry.modality, tried)
                        if shorter < size:
                            level, cost = tried, shorter
                        break
            if must_not and (use is None or cost > left):
                gone = PageMutation(
                    MutationType.EVICT, entry.page_id, state.turn, tier=StorageTier.L2
                )
                mutations.append(gone)
                continue
            left -= cost
            if level is not entry.level or cost != entry.l0_tokens:
                kept = PageMutation(
                    MutationType.COMPRESS, entry.page_id, state.turn, level, tokens=cost
                )
                mutations.append(kept)
        return mutations

    return rebuild
