"""AutoGen's assistant that is shown its last ten messages remembers the others on llm-pager.

This is where an application is better off than on the bare upstream: what its own window dropped
is in the memory. All that it said before is the same.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.programs import every, how, needs_python, play_twice
from tests.clients.tasks import (
    CODE,
    L0_TOKENS,
    RESERVE_TOKENS,
    given,
    long_chat,
    long_chat_model,
)

pytestmark = needs_python("app-libraries")

KEEP = 10


@pytest.mark.parametrize("stream", every([False, True], [False]), ids=how)
def test_what_a_buffered_context_dropped_is_found(tmp_path: Path, stream: bool) -> None:
    task = given("chat", long_chat(), stream, keep=KEEP)
    bare, paged = play_twice(
        tmp_path,
        lambda at: at.drive("app-libraries", "run_autogen.py", task),
        long_chat_model,
        l0_tokens=L0_TOKENS,
        reserve_tokens=RESERVE_TOKENS,
    )
    assert all(len(c.json["messages"]) <= 1 + KEEP for c in bare.model.calls)
    assert paged.seen[:-1] == bare.seen[:-1]
    assert [bare.seen[-1], paged.seen[-1]] == ["I do not know.", CODE]
