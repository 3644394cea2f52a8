"""A PDF, an image and a film that would cost seconds and hundreds of megabytes: nobody else notices, and once is enough."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import httpx
from openai import AsyncOpenAI

from tests.api.test_decoding import HOSTILE
from tests.e2e.harness import Recorded, ServerProcess, call, message_of
from tests.e2e.script import SYSTEM, Chat, Script, filler
from tests.media import samples

BOMBS = {  # page and part, each of a tenant of its own
    "pdf": ("file_0001_1", lambda: samples.file_part(HOSTILE["pages that share a stream"][1](), "application/pdf", "x.pdf")),
    "png": ("img_0001_1", lambda: samples.image_part(HOSTILE["a png of 39 megapixels, transparent"][1]())),
    "jpeg": ("img_0001_1", lambda: samples.image_part(HOSTILE["a progressive jpeg of many scans"][1](), "image/jpeg")),
    "avi": ("vid_0001_1", lambda: samples.video_part(HOSTILE["an 8K film"][1](), "video/avi")),
}


def processes_of(server: ServerProcess) -> list[str]:
    """The command lines of the processes that a server has started."""
    pids = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    return [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in pids]


def shown_of(recorded: Recorded) -> str:
    """What a request shows of the media of turns before."""
    return json.dumps(recorded.json["messages"][1:])


async def test_nobody_pays_for_a_hostile_medium_and_it_is_decoded_once() -> None:
    script = Script()
    limits = {"cpu_s": 0.6, "memory_bytes": 96 << 20, "timeout_s": 30.0, "wait_s": 60.0}
    config = {"upstream": {"provider": "openai"}, "tiers": {"l0": {"tokens": 5000, "reserve_tokens": 1000}},
              "decoders": limits, "faults": {"max_per_turn": 1}}  # fmt: skip
    async with script.upstream:
        config["upstream"] |= {"base_url": script.upstream.base_url}
        with ServerProcess(config) as server:
            async with AsyncOpenAI(api_key="none", base_url=server.base_url, max_retries=0) as client:
                chats = {name: Chat(client.with_options(api_key=name), [SYSTEM]) for name in BOMBS}

                async def told(name: str) -> None:
                    said = {"type": "text", "text": f"Here is the {name}."}
                    await chats[name].send({"role": "user", "content": [said, BOMBS[name][1]()]}, name)
                    for at in range(7):
                        await chats[name].say(filler(f"{name}/{at}", 500), f"{name}/talk/{at}")
                    await asked(name, "now")

                async def asked(name: str, when: str) -> None:
                    wanted = call("call_1", "page_fault", {"page_id": BOMBS[name][0], "target_level": 1})
                    script.plan(f"{name}/{when}", message_of(None, [wanted]), message_of("Seen."))
                    await chats[name].say("Show it again.", f"{name}/{when}")

                async def health() -> list[float]:
                    waits = []
                    async with httpx.AsyncClient() as http:
                        while not done.is_set():
                            began_s = time.perf_counter()
                            assert (await http.get(server.base_url.replace("/v1", "/health"))).status_code == 200
                            waits.append(time.perf_counter() - began_s)
                            await asyncio.sleep(0.02)
                    return waits

                done = asyncio.Event()
                watching = asyncio.ensure_future(health())
                await asyncio.gather(*map(told, BOMBS))
                done.set()
                waits = sorted(await watching)
                assert waits[len(waits) // 2] < 0.1, "others waited"
                assert processes_of(server) and all("proxy.decoder" in line for line in processes_of(server))
                mapped = Path(f"/proc/{server.pid}/maps").read_text()
                assert "PIL/" not in mapped and "/av/" not in mapped, "a codec is in the server"
                shown = {name: shown_of(script.calls[f"{name}/now"][1]) for name in BOMBS}
                assert "aaaa" in shown["pdf"], "its first pages were not kept"
                server.kill()
                await asyncio.to_thread(server.restart)
                for chat in chats.values():
                    del chat.messages[-2:]  # it is asked anew
                await asyncio.gather(*(asked(name, "later") for name in BOMBS))
                again = {name: shown_of(script.calls[f"{name}/later"][1]) for name in BOMBS}
                assert again == shown
                assert processes_of(server) == [], "decoded again"
        script.check()
