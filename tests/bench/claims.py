"""What the rules of claims and summaries find in the shared conversations.

Run from the repository's root: `python -m tests.bench.claims [samples]`. Prints, per data set: claims
and their kinds, a spread of samples to be read by a person, the time per 100 messages, and how many of
the annotated questions' evidence messages a summary or a claim quotes, beside what chance would give.
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter

from proxy.memory.claims import Claim, fold_claims
from proxy.memory.claims import claim_of as read_claim
from proxy.memory.ids import make_page_id
from proxy.memory.message_text import message_text
from proxy.memory.segments import Segment, close_segment
from proxy.memory.sentences import SegmentDoc
from proxy.tokens import TokenCounter, get_counter
from tests.e2e.data import Conversation, load_beam, load_locomo, load_trajectories

SEGMENT_TOKENS = 16_000  # what an epoch of a 32k window closes


def docs_of(conversation: Conversation) -> list[SegmentDoc]:
    """The pages of a conversation, one for each message that is not the system's."""
    talk = [m for m in conversation.messages if m["role"] not in ("system", "developer")]
    return [
        SegmentDoc(make_page_id(i), m["role"], str(m.get("name") or ""), message_text(m))
        for i, m in enumerate(talk)
    ]


def segments_of(
    conversation: Conversation, counter: TokenCounter
) -> tuple[list[Segment], list[Claim], float]:
    """(segments, claims, seconds) of the whole conversation in segments of SEGMENT_TOKENS."""
    docs, start, used = docs_of(conversation), 0, 0
    segments: list[Segment] = []
    claims: tuple[Claim, ...] = ()
    number, seconds = 1, 0.0
    for end, doc in enumerate(docs, 1):
        used += len(doc.text) // 4
        if used < SEGMENT_TOKENS and end < len(docs):
            continue
        begun = time.perf_counter()
        segment = close_segment(
            len(segments) + 1, docs[start:end], claims, number, end, counter.text
        )
        seconds += time.perf_counter() - begun
        new = [c for page in segment.claims if (c := read_claim(page)) is not None]
        claims = fold_claims(claims, new, segment.superseded, segment.merged)
        number += len(new)
        segments.append(segment)
        start, used = end, 0
    return segments, list(claims), seconds


def report(name: str, conversations: tuple[Conversation, ...], samples: int) -> None:
    counter = get_counter("gpt-4o")
    found: list[Claim] = []
    kinds: Counter[str] = Counter()
    messages = quoted = claimed = evidence = summary_tokens = superseded = 0
    shares, seconds = [], 0.0
    for conversation in conversations:
        segments, claims, spent = segments_of(conversation, counter)
        seconds += spent
        messages += len(conversation.messages)
        found.extend(claims)
        kinds.update(claim.kind for claim in claims)
        superseded += sum(bool(claim.superseded_by) for claim in claims)
        summary_tokens += sum(s.summary.size_tokens or 0 for s in segments)
        in_summary = {p for s in segments for p in s.summary.provenance}
        in_claims = {p for claim in claims for p in claim.provenance}
        shares.append(len(in_summary) / max(1, len(conversation.messages)))
        for question in conversation.questions:
            pages = [make_page_id(i) for i in question.evidence]
            evidence += len(pages)
            quoted += sum(page in in_summary for page in pages)
            claimed += sum(page in in_claims for page in pages)
    print(f"\n== {name}: {len(conversations)} conversations, {messages} messages")
    print(
        f"claims {len(found)} ({len(found) / len(conversations):.1f} each), {dict(kinds)}, superseded {superseded}"
    )
    print(f"{1e5 * seconds / messages:.2f} ms per 100 messages; summaries {summary_tokens} tokens")
    if evidence:
        by_chance = 100 * sum(shares) / len(shares)
        print(
            f"evidence quoted in summaries {100 * quoted / evidence:.0f}% (pages quoted: {by_chance:.0f}%),"
            f" in claims {100 * claimed / evidence:.0f}%"
        )
    for claim in random.Random("claims").sample(found, min(samples, len(found))):
        mark = f" (superseded by {claim.superseded_by})" if claim.superseded_by else ""
        print(
            f"  [{claim.kind[:4]}] {claim.text}{mark}\n         {claim.subject} = {claim.value!r} {claim.provenance}"
        )


def main() -> None:
    samples = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    report("LoCoMo", load_locomo(), samples)
    report("BEAM", load_beam(), samples)
    report("trajectories", load_trajectories(), samples)


if __name__ == "__main__":
    main()
