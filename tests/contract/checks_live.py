"""Time: streams flow as they come, and a client that leaves is missed at once.

Promises: liveness is shown in lockstep (upstream says the next piece only after the client has read
the one before); the measured delays and cancellations run with nothing else beside them.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

from tests.contract import say
from tests.contract.model import LONG, LONG_STREAM, SHORT, STREAMS, Failed, check, expect
from tests.contract.play import Play
from tests.e2e.answers import Hang

PIECES = 40
WARM = 10  # pieces at the start that a gateway may hold until it knows what they are
MOST_DELAY_MS = 15.0  # median, upstream's write to client's read
CANCEL_MS = 100.0
TRIES = 3
HOLD_S = 2.0  # for the first text of a stream
PATIENCE_S = 4.0


def _word(number: int) -> str:
    return f"word{number:03d} "


def _lockstep(play: Play) -> tuple[list[asyncio.Event], list[float]]:
    """Scripts a stream of PIECES words, each let go by its event; returns these and send times."""
    gates = [asyncio.Event() for _ in range(PIECES)]
    sent: list[float] = []

    def stream(request: dict[str, Any]) -> Any:
        events = say.chunks(request, say.text("".join(map(_word, range(PIECES)))), piece=8)
        steps: list[Any] = [events[0]]
        for gate, event in zip(gates, events[1:], strict=False):
            steps += [gate, lambda: sent.append(time.perf_counter()), event]
        return say.streamed([*steps, *events[1 + PIECES :]])

    play.says(stream)
    return gates, sent


@check("live.lockstep", "each piece of text reaches the client before upstream says the next", STREAMS)
async def lockstep(play: Play) -> None:
    gates, _ = _lockstep(play)
    for gate in gates[:WARM]:
        gate.set()
    live = await play.open(play.body())
    for number in range(WARM, PIECES):
        await live.until(_word(number - 1).strip(), PATIENCE_S)
        gates[number].set()
    (await live.rest()).ok()


@check("live.delay", f"delay per chunk, upstream to client: median at most {MOST_DELAY_MS:g} ms", STREAMS,
       alone=True)
async def delay(play: Play) -> None:
    gates, sent = _lockstep(play)
    for gate in gates[:WARM]:
        gate.set()
    live = await play.open(play.body())
    await live.until(_word(WARM - 1).strip(), PATIENCE_S)
    delays = []
    for number in range(WARM, PIECES):
        gates[number].set()
        await live.until(_word(number).strip(), PATIENCE_S)
        delays.append((live.reply.pieces[-1][0] - sent[number]) * 1000)
    (await live.rest()).ok()
    median = statistics.median(delays)
    play.note = f"median {median:.2f} ms, longest {max(delays):.2f} ms"
    expect(median <= MOST_DELAY_MS, f"delay per chunk: {play.note}")


@check("live.headers", "the response's head reaches the client when upstream's arrives", STREAMS)
async def headers(play: Play) -> None:
    gate = asyncio.Event()

    def stream(request: dict[str, Any]) -> Any:
        return say.streamed([gate, *say.chunks(request, say.text("Yes."))])

    play.says(stream)
    live = await play.open(play.body())  # comes only when it does not wait for the first event
    gate.set()
    (await live.rest()).ok()


@check("live.first_text", f"the first words reach the client within {HOLD_S:g} s though upstream then "
       "pauses", STREAMS)
async def first_text(play: Play) -> None:
    gate = asyncio.Event()

    def stream(request: dict[str, Any]) -> Any:
        events = say.chunks(request, say.text("Just a moment, please"))
        return say.streamed([*events[:2], gate, *events[2:]])

    play.says(stream)
    live = await play.open(play.body())
    await live.until("Just a", HOLD_S)
    gate.set()
    (await live.rest()).ok()


@check("live.comments", "upstream's own keep-alive comments reach a waiting client", STREAMS)
async def comments(play: Play) -> None:
    gate = asyncio.Event()

    def stream(request: dict[str, Any]) -> Any:
        return say.streamed([b": PROCESSING\n\n", gate, *say.chunks(request, say.text("Yes."))])

    play.says(stream)
    live = await play.open(play.body())
    await live.until(": ", PATIENCE_S)
    gate.set()
    (await live.rest()).ok()


@check("live.done", "[DONE] reaches the client though upstream keeps its connection open", STREAMS)
async def done(play: Play) -> None:
    play.says(lambda request: say.streamed([*say.chunks(request, say.text("Yes.")), Hang()]), inner=0)
    live = await play.open(play.body())
    await live.until("[DONE]", PATIENCE_S)


@check("live.keepalive", "comments keep the connection alive while an inner round takes its time",
       (LONG_STREAM,), needs="loop")
async def keepalive(play: Play) -> None:
    gate = asyncio.Event()

    def slow(request: dict[str, Any], inner: dict[str, Any]) -> Any:
        events = say.chunks(request, say.calling(inner))
        return say.streamed([*events[:2], gate, *events[2:]])

    play.script.inner_step = slow
    play.says(say.text("Yes."))
    live = await play.open(play.body())
    try:
        await live.until("\n:" if live.reply.text else ":", PATIENCE_S)
    except Failed:
        if not live.reply.text.startswith(":"):
            raise
    gate.set()
    (await live.rest()).ok()


async def _left(play: Play, when: str) -> None:
    """The client leaves; measures until upstream's connection is closed, best of TRIES."""
    best = float("inf")
    for attempt in range(TRIES):
        play.script.calls.clear()
        play.script.inner_calls.clear()
        live = None
        if when == "streaming":
            live = await play.open(play.body())
            await live.until("word", PATIENCE_S)
        else:
            task = asyncio.ensure_future(play.open(play.body()))
            async with asyncio.timeout(PATIENCE_S):
                while not play.script.calls or len(play.script.calls) <= play.script.inner:
                    await asyncio.sleep(0.005)
        recorded = play.script.calls[-1]
        await asyncio.sleep(0.02)
        left = time.perf_counter()
        if live is not None:
            live.leave()
        else:
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():  # it ended by itself: its failure is no surprise to the loop
                task.exception()
        try:
            await asyncio.wait_for(recorded.disconnected.wait(), PATIENCE_S)
        except TimeoutError:
            if attempt == TRIES - 1 and best == float("inf"):
                raise Failed(f"upstream was not cancelled within {PATIENCE_S:g} s") from None
            continue
        best = min(best, (time.perf_counter() - left) * 1000)
        if best <= CANCEL_MS:
            break
    play.note = f"{best:.1f} ms"
    expect(best <= CANCEL_MS, f"upstream was cancelled after {best:.0f} ms, more than {CANCEL_MS:g}")


@check("live.gone_streaming", f"a client that leaves in mid-stream cancels upstream within {CANCEL_MS:g} ms",
       STREAMS, alone=True)
async def gone_streaming(play: Play) -> None:
    play.says(lambda request: say.streamed(
        [*say.chunks(request, say.text("word " * 80))[:30], Hang()]
    ))
    await _left(play, "streaming")


@check("live.gone_waiting", f"a client that leaves before the answer cancels upstream within {CANCEL_MS:g} ms",
       (SHORT, LONG, *STREAMS), alone=True)
async def gone_waiting(play: Play) -> None:
    play.says(Hang(), inner=0)
    await _left(play, "waiting")
