"""A path's new messages as pages: how they enter the table. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from proxy.conversation.pathpages import PathPages
from proxy.memory.importance import importance_of, is_standing
from proxy.memory.models import MEDIA_PART, MutationType, PageMutation, PageType, StorageTier
from proxy.memory.page_table import DEFAULT_IMPORTANCE


def new_pages(
    pages: PathPages, first: int, floor: int, turn: int
) -> Iterator[PageMutation]:
    """The messages from position `first` on stand in the window, but for those before `floor`;
    standing instructions are pinned."""
    for position in range(first, len(pages.path)):
        tier = StorageTier.L0 if position >= floor else StorageTier.L2
        role, text = pages.path[position].role, pages.parts(position)[0]
        weight = importance_of(role, text)
        ids = pages.ids(position)
        for i, tokens in zip(ids, pages.sizes(position), strict=True):
            kind = pages.page_type(position, MEDIA_PART if pages.is_medium(i) else 0)
            yield PageMutation(
                MutationType.CREATE, i, turn, None, tier, tokens,
                importance=None if weight == DEFAULT_IMPORTANCE else weight,
                modality=pages.modality(i),
                page_type=None if kind is PageType.TRANSCRIPT else kind,
            )  # fmt: skip
        if is_standing(role, text, pages.text_tokens(position)):
            yield PageMutation(MutationType.PIN, ids[0], turn)
