"""Providers that do not speak OpenAI's protocol, through litellm, turned back into wire bytes.

Promises: litellm is imported at the start, in a thread, and never asks the network for its
price table; nothing is retried here; an error of the provider keeps its status and its words, also
when a stream was asked for; one after a stream's first chunk is its last event. Where a model is:
`models.<name>.api_base`, else `upstream.base_url`, else the provider's own address. A client cannot
use litellm's own settings (another `api_base`, credentials, files): such a field is refused.
What is said and what comes back is put into the other side's words in `dialects.py`.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, cast

from proxy.errors import ApiError
from proxy.upstream import CHAT_PATH, BytesReply, Header, Reply, Upstream, UpstreamBroken, dialects

if TYPE_CHECKING:
    from proxy.config import Config

_DEFAULT_BASE_URL: Final = "https://api.openai.com/v1"
_JSON_HEADERS: Final[list[Header]] = [(b"content-type", b"application/json")]
_SSE_HEADERS: Final[list[Header]] = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
]
_KEEPALIVE: Final = b": keep-alive\n\n"
# litellm reads these from the call like settings: where to connect, as whom, which file holds the key.
_SETTING_NAMES: Final = frozenset(
    """
    api_base api_key api_version base_url default_headers deployment_id extra_body extra_headers
    extra_query model_list organization timeout
    """.split()
)
_SETTING_PREFIXES: Final = tuple(
    """
    _ aws_ azure_ databricks_ gcs_ litellm_ oci_ s3_ sagemaker_ snowflake_ vertex_ watsonx_
    """.split()
)
_OPENAI_NAMES: Final = frozenset(("metadata",))


class _Head:
    """What a provider's answer began with; status 0: none has come, or litellm's own client took it."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}


# Where a request's task finds the head of the answer that it waits for.
_waiting: ContextVar[_Head | None] = ContextVar("_waiting", default=None)


class _Library:
    """litellm itself, imported once per process off the loop (it takes seconds)."""

    def __init__(self, timeout_s: float) -> None:
        os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
        module: Any = importlib.import_module("litellm")
        module.telemetry = False
        module.suppress_debug_info = True
        module.drop_params = False
        types: Any = importlib.import_module("litellm.types.utils")
        self.acompletion: Any = module.acompletion
        # Which of litellm's errors a failed connection becomes differs by provider; the cause in
        # its chain does not.
        httpx: Any = importlib.import_module("httpx")
        self.transport_error: type[Exception] = httpx.TransportError
        self.transport_timeout: type[Exception] = httpx.TimeoutException
        # litellm drops the headers of Gemini's answers; a client of ours notes them.
        http: Any = importlib.import_module("litellm.llms.custom_httpx.http_handler")
        self.noting_client: Any = http.AsyncHTTPHandler(
            timeout=httpx.Timeout(timeout_s),
            event_hooks={"response": [_note]},
            follow_redirects=False,  # the key would go with it
        )
        self._provider_of: Any = module.get_llm_provider
        self._mapped: Any = module.exception_type
        self._settings = (frozenset(types.all_litellm_params) | _SETTING_NAMES) - _OPENAI_NAMES

    def is_setting(self, field: str) -> bool:
        """True for a body field that litellm would take as its own setting."""
        return field in self._settings or field.startswith(_SETTING_PREFIXES)

    def as_litellms(self, stream: Any, error: Exception) -> Exception:
        """The error that litellm makes of a provider's: it knows, say, an overflow by its words."""
        try:
            made = self._mapped(stream.model, error, stream.custom_llm_provider)
        except Exception as raised:  # noqa: BLE001 - it raises some and returns some
            made = raised
        return made if isinstance(made, Exception) else error

    def wire(self, model: str) -> dialects.Wire | None:
        """By whose rules a model is called."""
        try:
            name, provider, *_ = self._provider_of(model)
        except Exception:  # noqa: BLE001 - a model of no known provider is refused by the call
            return None
        return dialects.wire_of(str(provider), str(name))


class LitellmUpstream(Upstream):
    """`Upstream` over `litellm.acompletion`."""

    def __init__(self, config: Config) -> None:
        upstream = config.upstream
        base_url = upstream.base_url.rstrip("/")
        self._api_base = None if base_url == _DEFAULT_BASE_URL else base_url
        self._override = config.model_override
        self._api_key = upstream.api_key
        self._timeout_s = upstream.timeout_s
        self._drop_params = upstream.drop_params
        self._keepalive_s = config.stream.keepalive_s
        self._models = [name for name in config.models if not set(name) & set("*?[")]
        self._loading: asyncio.Future[_Library] | None = None

    async def chat(self, body: bytes, headers: Sequence[Header], query: bytes = b"", path: str = CHAT_PATH) -> Reply:
        library = await self._library()
        fields = _decode(body)
        for field in fields:
            if library.is_setting(field):
                raise ApiError(
                    400,
                    f"The field {field!r} is a setting of this proxy's provider library;"
                    " a request cannot set it. Remove it.",
                    code="unsupported_parameter",
                    param=field,
                )
        streaming = bool(fields.get("stream"))
        model = str(fields["model"])
        wire = library.wire(model)
        fields = dialects.prepare(fields, wire)
        head = _Head()
        _waiting.set(head)
        settings = {
            "stream": streaming,
            "num_retries": 0,
            "max_retries": 0,
            "timeout": self._timeout_s,
            "api_key": self._api_key or _bearer(headers),
            "api_base": self._override(model).api_base or self._api_base,
            "extra_headers": dialects.request_headers(headers) or None,
            "client": library.noting_client if wire is dialects.GEMINI else None,
            # Without it, any request with tools imports litellm's MCP gateway, which needs a
            # package that litellm does not depend on, and lets a client's tool reach into it.
            "_skip_mcp_handler": True,
            "drop_params": self._drop_params,
        }
        fields.update((name, value) for name, value in settings.items() if value is not None)
        try:
            async with asyncio.timeout(self._timeout_s):
                result = await library.acompletion(**fields)
                if streaming:
                    await _ask(library, result)
        except Exception as error:  # noqa: BLE001 - reported to the client below
            return self._refusal(library, error, head)
        back = dialects.reply_headers(result, head.headers)
        if streaming:
            options = fields.get("stream_options")
            with_usage = isinstance(options, dict) and bool(options.get("include_usage"))
            return StreamReply(result, back, with_usage, self._keepalive_s)
        answer = dialects.whole_answer(result.model_dump(exclude_none=True))
        return BytesReply(200, [*_JSON_HEADERS, *back], _json_bytes(answer))

    async def forward(
        self, method: str, path: str, query: bytes, headers: Sequence[Header], body: AsyncIterator[bytes] | None
    ) -> Reply:
        if method == "GET" and path.rstrip("/") == "/models":
            data = [
                {"id": name, "object": "model", "created": 0, "owned_by": "llm-pager"}
                for name in self._models
            ]
            return BytesReply(200, _JSON_HEADERS, _json_bytes({"object": "list", "data": data}))
        raise ApiError(
            404,
            f"{method} {path} is not available: with upstream.provider 'litellm' this proxy"
            " serves only POST /v1/chat/completions and GET /v1/models.",
            code="not_found",
        )

    async def start(self) -> None:
        """The library is there before the first request waits for it."""
        await self._library()

    async def close(self) -> None:
        """Open replies are closed by their readers; litellm keeps its own connections."""
        if self._loading is not None and self._loading.done() and not self._loading.exception():
            await self._loading.result().noting_client.close()

    async def _library(self) -> _Library:
        if self._loading is None:
            self._loading = asyncio.ensure_future(asyncio.to_thread(_Library, self._timeout_s))
        # Shielded: the first client may leave, the import goes on for the next one.
        return await asyncio.shield(self._loading)

    def _refusal(self, library: _Library, error: Exception, head: _Head) -> Reply:
        status, told = dialects.provider_status(error), dialects.error_object(error)
        if isinstance(error, TimeoutError) or dialects.caused_by(error, library.transport_timeout):
            words = f"The provider did not answer within {self._timeout_s:g} s: {error}"
            raise ApiError(504, words, "api_error", "upstream_timeout") from error
        if 300 <= head.status < 400:
            status, back = head.status, dialects.relayed(head.headers.items())
        elif status is None or dialects.caused_by(error, library.transport_error):
            words = f"The provider could not be reached: {error}"
            raise ApiError(502, words, "api_error", "upstream_unreachable") from error
        elif 200 <= head.status < 300:
            words = f"The provider's answer cannot be read: {told['message']}"
            raise ApiError(502, words, "api_error", "upstream_unreadable") from error
        else:
            back = dialects.error_headers(error)
        return BytesReply(status, [*_JSON_HEADERS, *back], _json_bytes({"error": told}))


class StreamReply(Reply):
    """A running litellm stream as server-sent events. `with_usage`: the client asked for usage.
    litellm keeps the provider's pings to itself, so a comment of ours stands for them."""

    def __init__(self, stream: Any, headers: Sequence[Header], with_usage: bool, keepalive_s: float) -> None:
        self.status = 200
        self.headers: list[Header] = [*_SSE_HEADERS, *headers]
        self._stream = stream
        self._keepalive_s = keepalive_s or None
        self._openai = dialects.Chunks(with_usage)
        self._pending: asyncio.Future[Any] | None = None
        self._closed = False

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        try:
            while True:
                self._pending = asyncio.ensure_future(anext(self._stream))
                while not (await asyncio.wait((self._pending,), timeout=self._keepalive_s))[0]:
                    yield _KEEPALIVE
                try:
                    chunk = self._pending.result()
                except StopAsyncIteration:
                    break
                except asyncio.CancelledError:
                    if self._closed:  # close() from another task, not our own cancellation
                        raise UpstreamBroken("closed") from None
                    raise
                except Exception as error:  # noqa: BLE001 - it becomes the last event
                    yield b"data: " + _json_bytes({"error": dialects.error_object(error)}) + b"\n\n"
                    return
                said = self._openai.chunk(chunk.model_dump(exclude_none=True, exclude_unset=True))
                yield b"data: " + _json_bytes(said) + b"\n\n"
            yield b"data: [DONE]\n\n"
        finally:
            await self.close()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._pending is not None and not self._pending.done():
            self._pending.cancel()
            # The stream cannot be closed while its reader is inside it.
            await asyncio.wait((self._pending,))
        await self._stream.aclose()


async def _ask(library: _Library, stream: Any) -> None:
    """litellm asks some providers at the first chunk only; a refusal shall be a status, and an
    answer's head shall not wait for its first word. Raises what a whole answer's call would."""
    try:
        await stream.fetch_stream()
    except BaseException as error:  # also when the client leaves or has waited long enough
        await stream.aclose()
        if isinstance(error, Exception):
            raise library.as_litellms(stream, error) from error
        raise


async def _note(response: Any) -> None:
    head = _waiting.get()
    if head is not None:
        head.status, head.headers = response.status_code, dict(response.headers)


def _decode(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except ValueError as error:
        raise ApiError(400, f"The request body is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ApiError(400, "The request body must be a JSON object.")
    for name in ("model", "messages"):
        if name not in fields:
            raise ApiError(400, f"Missing required parameter: '{name}'.", param=name)
    messages = fields["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ApiError(400, "'messages' must be an array of messages.", param="messages")
    if b"\\ud" in body or b"\\uD" in body:  # half a surrogate pair is no character that UTF-8 could carry: U+FFFD stands for it
        text = json.dumps(fields, ensure_ascii=False).encode("utf-16-le", "surrogatepass")
        fields = json.loads(text.decode("utf-16-le", "replace"))
    return cast("dict[str, Any]", fields)


def _bearer(headers: Sequence[Header]) -> str | None:
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].strip().decode("latin-1") or None
    return None


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str).encode()
