"""OpenAI's own Node client sees no difference between llm-pager and upstream.

It runs twice, in client.cjs, through all of its tests. Where it is: the folder in the environment
variable CLIENTS_NODE_DIR, in which `npm install` was run with tests/clients/package.json.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.clients.scenes import (
    AGENT_QUESTION,
    MODEL,
    QUESTIONS,
    REPORT,
    REPORT_QUESTION,
    REPORT_SCHEMA,
    TOOL_SCHEMAS,
    opening,
    opening_with_pictures,
    picture,
    user_with_picture,
)
from tests.clients.stage import Play, Stage, check_plays
from tests.e2e.talk import assert_no_vm

FOLDER = Path(os.environ.get("CLIENTS_NODE_DIR") or "~/.cache/llm-pager-clients").expanduser()
CLIENT = Path(__file__).with_name("client.cjs")

pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed"),
    pytest.mark.skipif(
        not (FOLDER / "node_modules" / "openai").is_dir(),
        reason=f"openai's Node client is not in {FOLDER}/node_modules: see CLIENTS_NODE_DIR",
    ),
]

SCENE_OF = {
    "talk, whole": "talk",
    "talk, stream": "talk",
    "talk, stream helper": "talk",
    "runTools, whole": "agent",
    "runTools, stream": "agent",
    "json schema, whole": "report",
    "json schema, stream": "report",
    "json schema, parse": "report",
    "images, whole": "images",
    "images, stream": "images",
    "rate limit retried, whole": "limited",
    "rate limit retried, stream": "limited",
    "rate limit later retried, whole": "limited later",
    "rate limit later retried, stream": "limited later",
    "failure later retried, whole": "failed later",
    "failure later retried, stream": "failed later",
    "rate limit, whole": "always limited",
    "rate limit, stream": "always limited",
    "refused, whole": "refused",
    "refused, stream": "refused",
    "refused later, whole": "refused later",
    "refused later, stream": "refused later",
    "stream broken off": "broken",
    "stream broken off later": "broken later",
    "stream with a late error": "late error",
}

Run = tuple[dict[str, Any], dict[str, Play]]  # what was seen, and the plays, by test


def play_all(stage: Stage, url: str) -> Run:
    plays = {test: stage.play(scene) for test, scene in SCENE_OF.items()}
    given = {
        "baseURL": url,
        "keys": {test: play.key for test, play in plays.items()},
        "model": MODEL,
        "opening": opening(),
        "pictures": opening_with_pictures(),
        "questions": QUESTIONS,
        "agentQuestion": AGENT_QUESTION,
        "reportQuestion": REPORT_QUESTION,
        "pictureQuestions": [
            user_with_picture("What is this?", picture(255 - blue, 0, blue)) for blue in (0, 255)
        ],
        "tools": TOOL_SCHEMAS,
        "schema": REPORT_SCHEMA,
    }
    ended = subprocess.run(
        ["node", str(CLIENT), str(FOLDER)],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout), plays


@pytest.fixture(scope="module")
def runs(stage: Stage) -> tuple[Run, Run]:
    return play_all(stage, stage.bare), play_all(stage, stage.paged)


@pytest.mark.parametrize("test", SCENE_OF)
def test_node(runs: tuple[Run, Run], test: str) -> None:
    (expected, bare), (seen, paged) = runs
    assert "raised" not in expected[test], expected[test]
    if test == "refused later, stream":
        # The status line left with the memory round, so a later error can only be an event: the
        # base class with upstream's message and error body, without its status.
        name, message, status, *error = seen[test]
        assert [name, status, error[:2]] == ["APIError", None, expected[test][3:5]]
        assert expected[test][:3] == ["BadRequestError", f"400 {message}", 400]
    else:
        assert seen[test] == expected[test]
    check_plays(bare[test], paged[test])
    assert_no_vm(json.dumps(seen[test]))


def test_node_saw_what_was_played(runs: tuple[Run, Run]) -> None:
    _, (seen, _) = runs
    assert seen["json schema, parse"][0][0] == REPORT
    assert seen["runTools, stream"][0] == "Both are 4 degrees; the code is 23757."
    assert seen["rate limit, whole"][:3:2] == ["RateLimitError", 429]
    assert seen["refused, stream"][:3:2] == ["BadRequestError", 400]
