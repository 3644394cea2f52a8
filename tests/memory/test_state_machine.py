"""The memory core as a whole under random histories: page table, log, blocks and working set.

A branch is a live table (blocks in a dict), its log and a model: a plain table in RAM that
is never stored. Whatever is dropped, reopened or forked, the two must agree. LLM_PAGER_EXAMPLES sets
how many histories are played.
"""

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from proxy.memory import (
    CompressionLevel,
    MemoryPage,
    Modality,
    MutationLogLite,
    MutationType,
    PageMutation,
    PageTable,
    PageTableEntry,
    PageType,
    StorageTier,
)
from proxy.memory.eviction import is_held
from proxy.memory.ids import make_page_id, media_page_id
from proxy.memory.models import PinKind
from proxy.memory.table import decode_log, encode_log
from proxy.memory.working_set import TokenBudget, WorkingSetConfig, WorkingSetManager
from tests.examples import examples
from tests.memory.doors import fault_in, map_in

CONFIG = WorkingSetConfig(max_l0_tokens=1200, reserved_tokens=200)
MAX_BRANCHES = 3
PICKS = st.integers(0, 10_000)


class Branch:
    """One path: everything in RAM can be dropped but `root`, `log` and the shared store."""

    def __init__(self, store: dict[bytes, bytes], ids: list[str], log: MutationLogLite) -> None:
        self.store = store
        self.ids = ids
        self.log = log
        self.model = PageTable().replay(log.entries)
        self.root: bytes | None = None
        self.stored = 0  # mutations in `root`
        self.passed = 0  # turns that passed
        self.open()

    @property
    def turn(self) -> int:
        return max(self.passed, self.table.turn)

    def open(self) -> None:
        """Start from what is durable alone."""
        self.table = self.reopened()
        self.table._on_apply = self._applied
        self.work = WorkingSetManager(CONFIG, TokenBudget(total_limit=5000), self.table)

    def _applied(self, mutation: PageMutation) -> None:
        self.log.append(mutation)
        self.model.apply(mutation)

    def checkpoint(self) -> None:
        root, blocks = self.table.checkpoint()
        self.store.update(blocks)
        self.root, self.stored = root, len(self.log)

    def reopened(self) -> PageTable:
        """Another table of the same, so that reading it leaves the live one as it is."""
        table = PageTable() if self.root is None else PageTable.open(self.root, self.store.get)
        return table.replay(self.log.entries[self.stored :])


class Memory(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.store: dict[bytes, bytes] = {}
        self.branches = [Branch(self.store, [], MutationLogLite())]
        self.at = 0
        self.position = 0
        self.number = 0

    @property
    def branch(self) -> Branch:
        return self.branches[self.at]

    def entry(self, pick: int) -> PageTableEntry:
        entry = self.branch.table.lookup(self.branch.ids[pick % len(self.branch.ids)])
        assert entry is not None
        return entry

    def apply(self, op: MutationType, page: str, **fields: Any) -> None:
        self.branch.table.apply(PageMutation(op, page, self.branch.turn, **fields))

    # -- what happens to a conversation

    @initialize(steps=st.lists(st.sampled_from([1, 1, 64]), min_size=5, max_size=20))
    def begin(self, steps: list[int]) -> None:
        self.add(steps, "text", 100, True, Modality.TEXT)

    @rule(
        steps=st.lists(st.sampled_from([1, 1, 1, 1, 40, 64, 5000]), min_size=1, max_size=12),
        kind=st.sampled_from(
            ["text", "part", "img", "aud", "file", "summary_seg", "claim", "note"]
        ),
        tokens=st.integers(0, 300),
        inside=st.booleans(),
        modality=st.sampled_from(Modality),
    )
    def add(
        self, steps: list[int], kind: str, tokens: int, inside: bool, modality: Modality
    ) -> None:
        for step in steps:
            self.position += step
            self.number += 1
            page = MemoryPage(
                page_id=self.name(kind),
                size_tokens=tokens,
                modality=modality,
                page_type=PageType.CLAIM if kind == "claim" else PageType.TRANSCRIPT,
                storage_tier=StorageTier.L2,
            )
            if not (inside and self.branch.work.add_to_l0(page)):
                self.branch.table.register(page)
            self.branch.ids.append(page.page_id)

    def name(self, kind: str) -> str:
        if kind in ("text", "part"):
            return make_page_id(self.position, 2 if kind == "part" else 0)
        if kind in ("img", "aud", "file"):
            return media_page_id(self.position, 1, kind)
        return f"note-{self.number}-x" if kind == "note" else f"{kind}_{self.number:02d}"

    @rule(pick=PICKS, level=st.sampled_from(CompressionLevel), asked=st.booleans())
    def bring_in(self, pick: int, level: CompressionLevel, asked: bool) -> None:
        entry = self.entry(pick)
        tokens = entry.size_tokens >> level
        if self.branch.work.can_fit(tokens - entry.l0_tokens):
            bring = fault_in if asked else map_in
            bring(self.branch.table, entry.page_id, self.branch.turn, level, tokens)

    @rule(pick=PICKS, tier=st.sampled_from(["L1", "L2", "L3", "L4"]))
    def move_below(self, pick: int, tier: str) -> None:
        entry = self.entry(pick)
        self.branch.table.update_location(entry.page_id, StorageTier(tier))

    @rule(pick=PICKS, level=st.sampled_from(CompressionLevel))
    def compress(self, pick: int, level: CompressionLevel) -> None:
        entry = self.entry(pick)
        tokens = min(entry.l0_tokens, entry.size_tokens >> level)
        self.apply(MutationType.COMPRESS, entry.page_id, level=level, tokens=tokens)

    @rule(pick=PICKS, kind=st.none() | st.sampled_from(PinKind), pinned=st.booleans())
    def pin(self, pick: int, kind: PinKind | None, pinned: bool) -> None:
        op = MutationType.PIN if pinned else MutationType.UNPIN
        self.apply(op, self.entry(pick).page_id, pin_kind=kind if pinned else None)

    @rule(pick=PICKS, importance=st.floats(0, 1))
    def weigh(self, pick: int, importance: float) -> None:
        self.branch.work.set_importance(self.entry(pick).page_id, importance)
        self.apply(MutationType.ACCESS, self.entry(pick).page_id)

    @rule(turns=st.sampled_from([1, 1, 3, 60]))
    def new_turn(self, turns: int) -> None:
        self.branch.passed = self.branch.turn + turns

    @rule()
    def make_room(self) -> None:
        work, table = self.branch.work, self.branch.table
        due = work.calculate_eviction_target()
        candidates = work.get_eviction_candidates()
        inside = table.resident()
        held = {e.page_id for e in inside if is_held(e, table.turn)}
        assert {i for i, _ in candidates} == {e.page_id for e in inside} - held
        for candidate, _ in candidates:
            if work.calculate_eviction_target() == 0:
                break
            assert work.remove_from_l0(candidate)
        if not held and due:
            assert work.calculate_eviction_target() == 0 and not work.needs_eviction()

    # -- what happens to the process

    @rule()
    def checkpoint(self) -> None:
        self.branch.checkpoint()
        again = PageTable().replay(self.branch.log.entries).checkpoint()
        assert again.root == self.branch.root  # however often it was written on the way
        assert set(again.blocks) <= set(self.store)
        assert self.branch.table.checkpoint() == (self.branch.root, {})

    @rule()
    def checkpoint_and_restart(self) -> None:
        self.checkpoint()
        self.branch.open()

    @rule()
    def restart(self) -> None:
        self.branch.log = MutationLogLite(decode_log(encode_log(self.branch.log.entries)))
        self.branch.open()

    @rule()
    def fork(self) -> None:
        if len(self.branches) == MAX_BRANCHES:
            self.branches.remove(self.branches[self.at - 1])
            self.at = (self.at - 1) % len(self.branches) if self.at else 0
        old = self.branch
        old.checkpoint()
        new = Branch(self.store, list(old.ids), MutationLogLite(old.log.entries))
        new.root, new.stored = old.root, old.stored
        new.open()
        self.branches.append(new)
        self.at = len(self.branches) - 1

    @rule(pick=PICKS)
    def switch(self, pick: int) -> None:
        self.at = pick % len(self.branches)

    @rule()
    def read_all(self) -> None:
        assert list(self.branch.table) == list(self.branch.model)
        for tier in StorageTier:
            assert self.branch.table.get_by_tier(tier) == self.branch.model.get_by_tier(tier)

    # -- what must hold at every step

    @invariant()
    def the_branches_are_isolated_and_lose_no_page(self) -> None:  # invariants 4, 6
        for branch in self.branches:
            assert len(branch.table) == len(branch.ids) == len(branch.model)
            assert branch.table.get_stats() == branch.model.get_stats()
            assert branch.table.resident() == branch.model.resident()

    @invariant()
    def what_is_durable_is_enough(self) -> None:  # invariants 7, 9
        branch = self.branch
        reopened = branch.reopened()
        assert reopened == branch.model
        assert branch.log.get_context_at_turn(branch.table.turn) == branch.work.get_l0_page_ids()

    @invariant()
    def the_indexes_are_what_a_scan_says(self) -> None:
        entries, stats = list(self.branch.model), self.branch.model.get_stats()
        inside = [e for e in entries if e.tier is StorageTier.L0]
        assert {e.page_id for e in inside} == set(self.branch.work.get_l0_page_ids())
        assert (
            stats.l0_tokens == sum(e.l0_tokens for e in entries) == sum(e.l0_tokens for e in inside)
        )
        for tier in StorageTier:
            assert stats.pages_by_tier.get(tier, 0) == sum(e.tier is tier for e in entries)

    @invariant()
    def the_window_stays_in_its_room(self) -> None:  # invariant 3
        room = CONFIG.max_l0_tokens - CONFIG.reserved_tokens
        assert self.branch.work.budget.used <= room

    def teardown(self) -> None:
        for branch in self.branches:
            assert branch.log.replay() == branch.model == branch.table


Memory.TestCase.settings = settings(
    examples(50), stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
TestInvariants_03_04_06_07_09 = Memory.TestCase
