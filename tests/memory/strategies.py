"""Random but possible histories of a page table, for the property tests."""

from hypothesis import strategies as st

from proxy.memory import (
    CompressionLevel,
    FaultReason,
    Modality,
    MutationType,
    PageMutation,
    PageType,
    StorageTier,
)
from proxy.memory.ids import make_page_id, media_page_id
from proxy.memory.models import Actor, PinKind

LEVELS = st.sampled_from(CompressionLevel)
BELOW_L0 = st.sampled_from([t for t in StorageTier if t is not StorageTier.L0])
_LATER = [op for op in MutationType if op is not MutationType.CREATE]


def _ids(number: int) -> st.SearchStrategy[str]:
    """Ids of a text page, a medium or a derived page that no other number has."""
    return st.one_of(
        st.integers(0, 2).map(lambda part: make_page_id(number, part)),
        st.sampled_from(["img", "aud", "vid", "file"]).map(
            lambda kind: media_page_id(number // 3, number + 1, kind)
        ),
        st.sampled_from([f"summary_seg_{number:02d}", f"claim_{number:04d}", f"note-{number}-x"]),
    )


@st.composite
def histories(draw: st.DrawFn, max_size: int = 60) -> list[PageMutation]:
    """Mutations that apply without an error to an empty table, with turns that never go back."""
    history: list[PageMutation] = []
    resident: dict[str, bool] = {}
    turn = 0
    for _ in range(draw(st.integers(0, max_size))):
        turn += draw(st.integers(0, 2))
        if not resident or draw(st.booleans()):
            mutation = PageMutation(
                MutationType.CREATE,
                draw(_ids(len(resident))),
                turn,
                draw(LEVELS),
                draw(st.sampled_from(StorageTier)),
                draw(st.integers(0, 5000)),
                draw(st.sampled_from(Actor)),
                None,
                draw(st.none() | st.floats(0, 1)),
                draw(st.sampled_from(Modality)),
                draw(st.sampled_from(PageType)),
                draw(st.none() | st.just("art_1")),
            )
            resident[mutation.page_id] = mutation.tier is StorageTier.L0
        else:
            mutation = _later(draw, draw(st.sampled_from(sorted(resident))), turn, resident)
        history.append(mutation)
    return history


def _later(draw: st.DrawFn, page: str, turn: int, resident: dict[str, bool]) -> PageMutation:
    op = draw(st.sampled_from(_LATER))
    tokens = draw(st.none() | st.integers(0, 5000))
    if op in (MutationType.MAP, MutationType.FAULT_IN):
        resident[page] = True
        reason = draw(st.none() | st.sampled_from(FaultReason))
        return PageMutation(
            op, page, turn, draw(LEVELS), StorageTier.L0, tokens, Actor.MODEL, reason
        )
    if op is MutationType.EVICT:
        resident[page] = False
        return PageMutation(op, page, turn, tier=draw(st.none() | BELOW_L0))
    if op is MutationType.COMPRESS:
        return PageMutation(op, page, turn, draw(LEVELS), tokens=tokens)
    if op is MutationType.UPDATE:
        tier = None if resident[page] else draw(st.none() | BELOW_L0)
        weight = draw(st.none() | st.floats(0, 1))
        return PageMutation(op, page, turn, tier=tier, tokens=tokens, importance=weight)
    kind = draw(st.none() | st.sampled_from(PinKind)) if op is MutationType.PIN else None
    return PageMutation(op, page, turn, pin_kind=kind)
