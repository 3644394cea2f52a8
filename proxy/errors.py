"""The errors that reach a person: for whoever starts the server, for whoever runs it, for whoever calls it.

They carry complete sentences, so the place that catches them prints or sends them as they are.
"""

import json
from collections.abc import Mapping


class ConfigError(Exception):
    """The configuration cannot be used. Each problem is one sentence: what is wrong, what to do."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class StartError(Exception):
    """The machine does not let a command start; the message is one sentence."""


class StorageError(Exception):
    """The storage cannot do what was asked; the message is one sentence for the operator."""


class ErasedMeanwhile(StorageError):
    """Something was erased since what was to be stored began: it may hold what is gone."""


class ApiError(Exception):
    """An HTTP answer in OpenAI's error shape.

    `status` is the HTTP status; `headers` are added to the response (for example `retry-after`).
    """

    def __init__(
        self, status: int, message: str, type: str = "invalid_request_error", code: str | None = None,
        param: str | None = None, headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The response body: `{"error": {"message", "type", "param", "code"}}` as JSON bytes."""
        error = {
            "message": self.message, "type": self.type, "param": self.param, "code": self.code,
        }  # fmt: skip
        return json.dumps({"error": error}, ensure_ascii=False).encode("utf-8", "replace")
