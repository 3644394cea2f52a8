"""Several workers over one directory say what one alone would say (invariants 5 and 7).

Each request goes over a new connection to the worker after the last one's; which worker accepts it
is decided by the test, not by luck (see script.Workers).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from openai import AsyncOpenAI

from tests.e2e.harness import ServerProcess, together
from tests.e2e.script import LOOKUP, SYSTEM, Chat, Got, Message, Script, Workers, paged_config, talk
from tests.e2e.story import Teller, assert_same, nothing, reread


class Hopping(Chat):
    """A client whose every request goes to the next worker."""

    def __init__(self, workers: Workers, messages: Sequence[Message], **fields: Any) -> None:
        super().__init__(None, messages, **fields)  # type: ignore[arg-type]
        self.workers, self.turn = workers, itertools.count()

    def fork(self, upto: int | None = None) -> Chat:
        fields = {"keep": self.keep, "headers": self.headers, **self.fields}
        twin = Hopping(self.workers, self.messages[:upto], **fields)
        twin.turn = self.turn
        return twin

    async def send(self, message: Message, tag: str, *, stream: bool = False) -> Got:
        async with self.workers.client(next(self.turn) % 2) as self.client:
            return await super().send(message, tag, stream=stream)


async def test_invariant_7_turns_on_changing_workers_send_what_one_worker_sends() -> None:
    """The whole story; a trimming client, a session that sends its new messages only, and a fork."""
    one, two = Script(), Script()
    async with one.upstream, two.upstream:
        with together(
            ServerProcess(paged_config(one.upstream), workers=2),
            ServerProcess(paged_config(two.upstream)),
        ) as (server, quiet):
            workers = Workers(server)
            assert len(server.worker_pids) == 2
            async with AsyncOpenAI(api_key="k", base_url=quiet.base_url, max_retries=0) as client:

                def chats(tools: list[Message], **fields: Any) -> tuple[Chat, Chat]:
                    given = {"tools": tools, **fields}
                    return Hopping(workers, [SYSTEM], **given), Chat(client, [SYSTEM], **given)

                hopping, settled = chats([LOOKUP])
                told, other = Teller(one, hopping, nothing), Teller(two, settled, nothing)
                await told.story()
                await other.story()
                assert hopping.messages == settled.messages
                for name, fields in {
                    "trimming": {"keep": 6},
                    "session": {"keep": 1, "headers": {"x-llm-pager-session": "hop"}},
                }.items():
                    for script, chat in zip((one, two), chats([LOOKUP], **fields), strict=True):
                        await talk(chat, script, name, 13, [])
                for script, teller in ((one, told), (two, other)):
                    await talk(teller.chat.fork(21), script, "fork", 3, [])
                found = await reread(told)
    assert_same(one, two)  # all but what only the hopping client was asked to reread
    missing = [mark for mark in told.marks if mark not in found]
    assert not missing, f"a worker does not know of {missing}"
    one.check()
    two.check()
