"""Which entries of a page table are in RAM, and how the others come and go.

Promises: what changed since the last write stays in RAM; what comes from storage never overwrites
what is there. Entries come in whole leaves (a page's neighbours are wanted next) and leave one by
one. A read that fails changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Container

from proxy.memory.ids import parse_page_id
from proxy.memory.models import PageTableEntry
from proxy.memory.table_blocks import TableBlocks, leaf_number


class TableStore:
    """The storage below a table's dict of entries, `ram`, which both change.

    `changed`: the ids that changed since the last `write`.
    """

    def __init__(self, ram: dict[str, PageTableEntry], blocks: TableBlocks) -> None:
        self.blocks = blocks
        self.changed: set[str] = set(ram)
        self._ram = ram
        self._ids: dict[int, set[str]] = {}  # in RAM, by leaf
        self._whole: set[int] = set()  # leaves with all their entries in RAM
        for page_id, entry in ram.items():
            self.add(page_id, entry)

    def add(self, page_id: str, entry: PageTableEntry) -> None:
        """A new page, which was looked for before."""
        leaf = leaf_number(page_id, entry.position)
        self._ids.setdefault(leaf, set()).add(page_id)
        self._whole.add(leaf)

    def fetch(self, page_id: str) -> PageTableEntry | None:
        """The entry of a page that may not be in RAM; its whole leaf is, from now on."""
        position, _ = parse_page_id(page_id) or (-1, 0)
        self._fill(leaf_number(page_id, position))
        return self._ram.get(page_id)

    def fetch_window(self) -> None:
        """Bring in every leaf that has pages in L0."""
        for leaf in self.blocks.leaves(resident_only=True):
            self._fill(leaf)

    def fetch_all(self) -> None:
        """Bring in everything."""
        for leaf in self.blocks.leaves():
            self._fill(leaf)

    def write(self) -> dict[bytes, bytes]:
        """The new blocks of all leaves with a change; nothing counts as changed any more."""
        leaves = {leaf_number(i, self._ram[i].position) for i in self.changed}
        for leaf in leaves:
            self._fill(leaf)
        blocks = self.blocks.write({n: [self._ram[i] for i in self._ids[n]] for n in leaves})
        self.changed.clear()
        return blocks

    def shed(self, max_entries: int, stays: Collection[Container[str]]) -> int:
        """Drop entries until `max_entries` are in RAM, but for changed ones and those in `stays`;
        the number dropped. Nothing goes that could not be read back."""
        excess = len(self._ram) - max_entries if self.blocks.readable else 0
        gone: list[str] = []
        for page_id in self._ram:
            if len(gone) >= excess:
                break
            if page_id not in self.changed and not any(page_id in kept for kept in stays):
                gone.append(page_id)
        for page_id in gone:
            leaf = leaf_number(page_id, self._ram.pop(page_id).position)
            self._whole.discard(leaf)
            ids = self._ids[leaf]
            ids.discard(page_id)
            if not ids:
                del self._ids[leaf]
        return len(gone)

    def _fill(self, leaf: int) -> None:
        if leaf in self._whole:
            return
        entries = self.blocks.read(leaf)
        if not entries:  # never written: not worth a note, or unknown ids would pile up
            return
        ids = self._ids.setdefault(leaf, set())
        for entry in entries:
            self._ram.setdefault(entry.page_id, entry)
            ids.add(entry.page_id)
        self._whole.add(leaf)
