"""The two ends of every e2e test, in one import: the recording upstream and the real server."""

from __future__ import annotations

from tests.e2e.answers import (
    Answer,
    Break,
    Drop,
    Hang,
    Response,
    Stream,
    answer,
    call,
    completion,
    error,
    message_of,
    sse_chunks,
)
from tests.e2e.data import (
    Conversation,
    Question,
    load_beam,
    load_locomo,
    load_trajectories,
    tools_of,
)
from tests.e2e.processes import (
    ServerProcess,
    free_port,
    in_process_server,
    together,
    wait_for_health,
)
from tests.e2e.recording import (
    Recorded,
    RecordingUpstream,
    messages_span,
)
from tests.e2e.rules import (
    check_openai_rules,
    count_request_tokens,
    count_text,
)

__all__ = [
    "Answer",
    "Break",
    "Conversation",
    "Drop",
    "Hang",
    "Question",
    "Recorded",
    "RecordingUpstream",
    "Response",
    "ServerProcess",
    "Stream",
    "answer",
    "call",
    "check_openai_rules",
    "completion",
    "count_request_tokens",
    "count_text",
    "error",
    "free_port",
    "in_process_server",
    "load_beam",
    "load_locomo",
    "load_trajectories",
    "message_of",
    "messages_span",
    "sse_chunks",
    "together",
    "tools_of",
    "wait_for_health",
]
