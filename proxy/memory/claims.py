"""Decisions, facts and preferences that a conversation states, one short sentence each, by rules.

Promises: deterministic, no model; a claim's text is the source's own words with the speaker where it is about
the speaker; a later claim about the same subject with another value supersedes the earlier one, a restatement
merges with it, and different subjects never touch. At most CLAIMS_PER_SEGMENT claims come out of a segment
and MAX_CLAIMS are kept of a conversation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from proxy.memory.claim_readers import Finding
from proxy.memory.claim_rules import statements
from proxy.memory.models import MemoryPage, PageType, StorageTier
from proxy.memory.sentences import PageText, ReadPage, Spoken, read_pages

CLAIMS_PER_SEGMENT = 32
MAX_CLAIMS = 256
CLAIMS_PER_PAGE = 6  # one message cannot take the whole segment's share
MAX_SOURCES = 16  # page ids that one claim keeps as its provenance

_LATER_COUNTS = 0.01  # importance of one restatement, up to _MOST_RESTATED
_MOST_RESTATED = 0.99
_CHANGES_COUNT = 0.1


class Claim(msgspec.Struct, frozen=True, omit_defaults=True):
    """One statement. `claim_id` is "" until a segment numbers it. `subject` says what it is about,
    `value` what it says of it ("" where only `polarity` matters), `provenance` where it stands,
    `importance` is 0..1, `superseded_by` the id of the claim that took its place.
    """

    text: str
    kind: str  # decision | fact | preference
    subject: tuple[str, ...]
    value: str = ""
    polarity: bool = True
    provenance: tuple[str, ...] = ()
    importance: float = 0.5
    claim_id: str = ""
    superseded_by: str = ""


def claim_id(number: int) -> str:
    """7 -> "claim_0007"."""
    return f"claim_{number:04d}"


def extract_claims(docs: Sequence[PageText]) -> list[Claim]:
    """The claims of the pages in their order, a restatement merged with the first; not yet bounded
    or numbered."""
    return claims_in(read_pages(docs))


def claims_in(pages: Iterable[ReadPage]) -> list[Claim]:
    """`extract_claims` of pages that were read already."""
    out: list[Claim] = []
    last: dict[tuple[str, ...], int] = {}  # subject -> the claim that holds about it
    for page in pages:
        if page.role not in ("user", "assistant"):
            continue
        for claim in _claims_of(page):
            known = last.get(claim.subject)
            if known is not None and _agree(out[known], claim):
                out[known] = merge(out[known], claim.provenance)
            else:
                last[claim.subject] = len(out)
                out.append(claim)
    return out


def _claims_of(page: ReadPage) -> list[Claim]:
    found: list[Claim] = []
    for sentence in page.sentences:
        for finding in statements(sentence, page.speaker):
            found.append(_claim(finding, page.page_id, page.speaker))
            if len(found) == CLAIMS_PER_PAGE:
                return found
    return found


def _claim(finding: Finding, page_id: str, speaker: Spoken) -> Claim:
    owner = speaker.label.lower() if speaker.person else "user"  # an assistant's "your"
    subject = (owner, *finding.subject) if finding.mine else finding.subject
    return Claim(
        text=f"{speaker.label}: {finding.text}",
        kind=finding.kind,
        subject=subject,
        value=finding.value,
        polarity=finding.polarity,
        provenance=(page_id,),
        importance=finding.importance,
    )


def _agree(one: Claim, other: Claim) -> bool:
    """Two claims about one subject say the same: a value within the other ("March 3" in "Friday
    March 3") is the same, less precisely."""
    if one.polarity != other.polarity:
        return False
    a, b = set(one.value.split()), set(other.value.split())
    return a <= b or b <= a


def merge(claim: Claim, sources: Iterable[str]) -> Claim:
    """The claim with more provenance (the first MAX_SOURCES are kept); said again, it matters
    more."""
    sources = tuple(dict.fromkeys((*claim.provenance, *sources)))[:MAX_SOURCES]
    more = _LATER_COUNTS * (len(sources) - len(claim.provenance))
    importance = max(claim.importance, min(_MOST_RESTATED, claim.importance + more))
    return msgspec.structs.replace(claim, provenance=sources, importance=importance)


def _current(existing: Sequence[Claim], new: Claim) -> Claim | None:
    """The claim that holds about `new`'s subject."""
    for claim in reversed(existing):
        if claim.subject == new.subject and not claim.superseded_by:
            return claim
    return None


def supersede(existing: Sequence[Claim], new: Claim) -> str | None:
    """The id of the claim that `new` contradicts: same subject, another value or the opposite; None
    when there is none. `existing` is in the order in which it was said."""
    claim = _current(existing, new)
    return claim.claim_id if claim is not None and not _agree(claim, new) else None


def restated(existing: Sequence[Claim], new: Claim) -> str | None:
    """The id of the claim that `new` says again; None when there is none."""
    claim = _current(existing, new)
    return claim.claim_id if claim is not None and _agree(claim, new) else None


class Placed(NamedTuple):
    """Claims found in a segment, beside those that were known: `new` ones with their ids, (old,
    new) pairs, and (known claim, page that says it again)."""

    new: list[Claim]
    superseded: list[tuple[str, str]]
    merged: list[tuple[str, str]]


def place_claims(existing: Sequence[Claim], found: Sequence[Claim], first_number: int) -> Placed:
    """Number what is new, merge what is known, supersede what no longer holds.

    A claim that contradicts a known one is kept before others of its importance.
    """
    holds = {claim.subject: claim for claim in existing if not claim.superseded_by}
    fresh: list[Claim] = []
    merged: list[tuple[str, str]] = []
    at = dict(holds)
    for claim in found:
        known = at.get(claim.subject)
        if known is not None and known.claim_id and _agree(known, claim):
            merged.extend((known.claim_id, page) for page in claim.provenance)
            continue
        if known is not None:
            higher = max(claim.importance, min(_MOST_RESTATED, claim.importance + _CHANGES_COUNT))
            claim = msgspec.structs.replace(claim, importance=higher)
        at[claim.subject] = claim
        fresh.append(claim)
    new: list[Claim] = []
    superseded: list[tuple[str, str]] = []
    for number, claim in enumerate(most_important(fresh), first_number):
        claim = msgspec.structs.replace(claim, claim_id=claim_id(number))
        known = holds.get(claim.subject)
        if known is not None and not _agree(known, claim):
            superseded.append((known.claim_id, claim.claim_id))
        holds[claim.subject] = claim
        new.append(claim)
    return Placed(new, superseded, merged)


def most_important(claims: Sequence[Claim], limit: int = CLAIMS_PER_SEGMENT) -> list[Claim]:
    """The `limit` most important ones (the later of equals: it is nearer to what comes), in their
    order."""
    order = sorted(range(len(claims)), key=lambda i: (-claims[i].importance, -i))[:limit]
    return [claims[i] for i in sorted(order)]


def fold_claims(
    existing: Sequence[Claim],
    new: Iterable[Claim],
    superseded: Iterable[tuple[str, str]],
    merged: Iterable[tuple[str, str]],
    limit: int = MAX_CLAIMS,
) -> tuple[Claim, ...]:
    """All claims of a conversation after a segment; beyond `limit` the oldest superseded ones go
    first, then the least important, oldest first."""
    claims = {claim.claim_id: claim for claim in (*existing, *new)}
    for old, by in superseded:
        if old in claims:
            claims[old] = msgspec.structs.replace(claims[old], superseded_by=by)
    for known, page_id in merged:
        if known in claims:
            claims[known] = merge(claims[known], (page_id,))
    kept = list(claims.values())
    if len(kept) > limit:
        worst = sorted(
            range(len(kept)),
            key=lambda i: (
                not kept[i].superseded_by,
                kept[i].importance if not kept[i].superseded_by else 0,
                i,
            ),
        )
        gone = set(worst[: len(kept) - limit])
        kept = [claim for i, claim in enumerate(kept) if i not in gone]
    return tuple(kept)


def claim_text(page: MemoryPage, superseded_by: str | None) -> str:
    """What is shown of a claim page; one whose place was taken says so in front."""
    text = page.text()
    return f"(superseded by {superseded_by}) {text}" if superseded_by else text


def claim_page(claim: Claim, tokens: int, turn: int) -> MemoryPage:
    """The claim as a page; `claim_of` reads it back."""
    metadata: dict[str, Any] = {
        "kind": claim.kind,
        "subject": list(claim.subject),
        "value": claim.value,
        "polarity": claim.polarity,
        "turn": turn,
    }
    return MemoryPage(
        page_id=claim.claim_id,
        page_type=PageType.CLAIM,
        content=claim.text,
        storage_tier=StorageTier.L2,
        size_tokens=tokens,
        provenance=list(claim.provenance),
        importance=claim.importance,
        metadata=metadata,
    )


def claim_of(page: MemoryPage, superseded_by: str = "") -> Claim | None:
    """The claim that a claim page holds; None for any other page."""
    if page.page_type is not PageType.CLAIM or "subject" not in page.metadata:
        return None
    return Claim(
        text=page.text(),
        kind=str(page.metadata.get("kind", "fact")),
        subject=tuple(str(word) for word in page.metadata["subject"]),
        value=str(page.metadata.get("value", "")),
        polarity=bool(page.metadata.get("polarity", True)),
        provenance=tuple(page.provenance),
        importance=page.importance,
        claim_id=page.page_id,
        superseded_by=superseded_by,
    )
