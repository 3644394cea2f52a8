"""`models.<name>.bridge: responses`: chat requests of such a model over the upstream's /v1/responses.

Promises: other models' requests are not touched; a request that Responses cannot express goes to
/chat/completions as it is; nothing is stored upstream unless the client asks for it; refusals and
headers are upstream's own; the rest is in `responses_translation.py`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from proxy.sse import Event, EventParser, EventTooLong, lines_of
from proxy.upstream import CHAT_PATH, BytesReply, Header, Reply, UpstreamBroken
from proxy.upstream.openai import OpenAIUpstream
from proxy.upstream.responses_translation import ChatStream, failure, to_chat, to_responses

if TYPE_CHECKING:
    from proxy.config import Config

_PATH: Final = "/responses"
_NO_ENCRYPTED: Final = b"encrypted content is not supported"  # by a model that does not reason
_PLAIN_MODELS: Final = 256  # names of such models that are remembered
_NO_JSON: Final = (ValueError, RecursionError)  # bytes that are no UTF-8 too
_NO_RESPONSE: Final = (*_NO_JSON, KeyError, TypeError, AttributeError)
_encode = msgspec.json.encode
_decode = msgspec.json.decode
Json = dict[str, Any]


class _Model(msgspec.Struct):
    model: str = ""


_model = msgspec.json.Decoder(_Model).decode


class ResponsesBridge(OpenAIUpstream):
    """An OpenAI-compatible upstream, with some models on its other API."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._override = config.model_override
        self._limit_bytes = config.server.body_limit_bytes
        self._event_limit_bytes = config.stream.event_limit_bytes  # the last event repeats the whole answer
        self._plain: set[str] = set()

    async def chat(self, body: bytes, headers: Sequence[Header], query: bytes = b"", path: str = CHAT_PATH) -> Reply:
        bridged = self._bridged(body)
        if bridged is None:
            return await super().chat(body, headers, query, path)
        request, include_usage = bridged
        reply = await self._ask(request, headers, query)
        if reply.status >= 300:
            return reply
        kind = next((value for name, value in reply.headers if name == b"content-type"), b"")
        if request.get("stream") and not kind.startswith(b"application/json"):
            return StreamReply(reply, include_usage, self._event_limit_bytes)
        raw = await reply.read(self._limit_bytes)
        try:
            response = _decode(raw)
            failed = failure(response)
            status, answer = failed if failed is not None else (200, to_chat(response))
        except _NO_RESPONSE:
            return BytesReply(reply.status, reply.headers, raw)  # the client shall see it
        return BytesReply(status, reply.headers, _encode(answer))

    def _bridged(self, body: bytes) -> tuple[Json, bool] | None:
        """The translated request and whether its stream shall tell usage; None: not ours to change."""
        try:
            if self._override(_model(body).model).bridge is None:
                return None
            fields = _decode(body)
        except _NO_JSON:
            return None  # upstream says what is wrong with it
        translated = to_responses(fields)
        if translated is None:
            return None
        return translated, bool((fields.get("stream_options") or {}).get("include_usage"))

    async def _ask(self, request: Json, headers: Sequence[Header], query: bytes) -> Reply:
        """Upstream's reply; a model that has no reasoning to encrypt is asked again without it."""
        if request["model"] in self._plain:
            del request["include"]
        reply = await super().chat(_encode(request), headers, query, _PATH)
        if reply.status != 400 or "include" not in request:
            return reply
        refusal = await reply.read(self._limit_bytes)
        if _NO_ENCRYPTED not in refusal.lower():
            return BytesReply(reply.status, reply.headers, refusal)
        if len(self._plain) < _PLAIN_MODELS:
            self._plain.add(request["model"])
        del request["include"]
        return await super().chat(_encode(request), headers, query, _PATH)


class StreamReply(Reply):
    """A running Responses stream as a chat completion's events; upstream's comments stay."""

    def __init__(self, reply: Reply, include_usage: bool, event_limit_bytes: int) -> None:
        self.status = reply.status
        self.headers = reply.headers
        self._reply = reply
        self._stream = ChatStream(include_usage)
        self._parser = EventParser(event_limit_bytes)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        try:
            async for data in self._reply.chunks():
                if out := self._said(self._parser.feed(data)):
                    yield out
            if out := self._said(self._parser.close()):  # the last event may have no blank line
                yield out
        except EventTooLong as error:
            raise UpstreamBroken(str(error)) from error
        except _NO_RESPONSE as error:
            raise UpstreamBroken(f"the upstream's event is none of Responses: {error!r}") from error
        finally:
            await self._reply.close()

    def _said(self, events: Sequence[Event]) -> bytes:
        """With [DONE] right behind the answer's end: upstream may keep its connection open."""
        out: list[bytes] = []
        for event in events:
            if event.raw.startswith(b":") or b"\n:" in event.raw or b"\r:" in event.raw:
                out += [line + b"\n\n" for line in lines_of(event.raw) if line.startswith(b":")]
            said = _decode(event.data) if event.data and event.data != b"[DONE]" else None
            if isinstance(said, dict) and not self._stream.ended:
                out += [b"data: " + _encode(chunk) + b"\n\n" for chunk in self._stream.feed(said)]
                if self._stream.ended:
                    out.append(b"data: [DONE]\n\n")
        return b"".join(out)

    async def close(self) -> None:
        await self._reply.close()
