"""Who may see what of /vm, and who may use this server at all (`server.keys`).

Promises: keys are compared by their hashes, in constant time, and nothing of them is stored or logged; a tenant sees what is
under its own credentials, `server.admin_key` all; without an admin key all is open to this machine alone: to a connection from a
loopback address that no proxy forwarded, under a local name. A browser has a cookie that is signed with the store's
secret, says whose it is and until when, and never holds a key; what changes something comes from our own pages or from no
browser (Fetch: Sec-Fetch-Site, Origin).
"""

from __future__ import annotations

import hmac
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from functools import lru_cache, partial
from hashlib import blake2b

from fastapi import Request

from proxy.api.caller import Caller, caller_of
from proxy.api.http import Scope, is_private_name
from proxy.api.memory import Memory
from proxy.api.views import Who
from proxy.api_key import KEY_HEADERS, bearer, key_hash, key_name, with_name
from proxy.config import Config, is_loopback
from proxy.errors import ApiError
from proxy.keys import TENANT_BYTES
from proxy.upstream import Header

COOKIE = "llm_pager_vm"
SESSION_S = 12 * 3600
_FORWARDED = (b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via", b"x-forwarded-host")
_OF_USER = ("user", "safety_identifier", "metadata.")  # of a chat request's body, in a query
_KEY_NAME = "llm_pager.key"  # in a scope: of this server's, that came with the request
_TIME_BYTES, _MAC_BYTES = 4, 16


class Access:
    """One per process."""

    def __init__(self, config: Config, memory: Memory) -> None:
        self._server, self._sessions, self._memory = config.server, config.sessions, memory
        self._names = lru_cache(256)(partial(key_name, keys=config.server.keys))

    # -- the chat path

    def admitted(self, scope: Scope) -> tuple[Scope, ApiError | None]:
        """The request with the name of its key in place of the key, where this server has keys; or why it is refused."""
        if not self._server.keys:
            return scope, None
        headers: list[Header] = scope["headers"]
        name = next((n for header in headers if header[0] in KEY_HEADERS and (n := self._names(header))), None)
        if name is None:
            return scope, _no_key()
        named = with_name(headers, name, self._memory.identity.secret)
        return {**scope, "headers": named, _KEY_NAME: name}, None

    # -- /vm

    def who(self, request: Request) -> Who:
        """Who asks. ApiError 401 where nobody does, 403 for a page of another site's."""
        who = self._who(request)
        if who.by != "key" and not _is_ours(request):
            raise _other_site()
        return who

    def _who(self, request: Request) -> Who:
        given = next((bearer(v) for h, v in request.scope["headers"] if h in KEY_HEADERS), "")
        if given and self.is_admin(given):
            return Who(b"", operator=True)
        if not given and (who := self._of_cookie(request.cookies.get(COOKIE, ""))):
            return who
        if not given and self._is_at_home(request):
            return Who(b"", operator=True, by="loopback")
        if not given:
            raise _nobody()
        return self.tenant(request.scope, request.query_params.multi_items())

    def tenant(self, scope: Scope, query: Sequence[tuple[str, str]] = ()) -> Who:
        """The tenant of a chat request with these headers; what its body would say of its user stands in the query. ApiError
        401 for no key of this server's."""
        if self._server.keys and _KEY_NAME not in scope:
            scope, refusal = self.admitted(scope)
            if refusal is not None:
                raise refusal
        told = [pair for pair in query if pair[0].startswith(_OF_USER)]  # what else stands there is a question
        who = caller_of(scope["headers"], told, self._sessions)
        return Who(self._memory.identity.tenant(who.credentials, who.person)[:TENANT_BYTES])

    def caller(self, request: Request) -> Caller:
        """Who asks for, or erases, what stands under the credentials of their chat requests. ApiError 401 for no key of this
        server's, and for nobody's credentials under a name that may be another site's; 403 for a page of another site's."""
        if self._server.keys and _KEY_NAME not in request.scope:
            raise _no_key()
        who, headers = self.told(request), {name for name, _ in request.scope["headers"]}
        if headers.isdisjoint(KEY_HEADERS):
            if not _is_ours(request):
                raise _other_site()
            if not who.credentials and not is_private_name(request.headers.get("host", "")):
                raise _nobody()
        return who

    def told(self, request: Request) -> Caller:
        """Who a request says that it is of: for what everybody may see."""
        return caller_of(request.scope["headers"], request.query_params.multi_items(), self._sessions)

    def is_admin(self, key: str) -> bool:
        known = self._server.admin_key
        return known is not None and hmac.compare_digest(key_hash(key), known)

    def _is_at_home(self, request: Request) -> bool:
        """This machine's own user, as far as can be told: no admin key is set, nobody else's page or name is in it."""
        if self._server.admin_key is not None or request.client is None or not is_loopback(request.client.host):
            return False
        if any(name in _FORWARDED for name, _ in request.scope["headers"]):
            return False
        return is_private_name(request.headers.get("host", ""))

    # -- browsers

    def signed(self, who: Who) -> str:
        """A cookie's value."""
        data = int(time.time() + SESSION_S).to_bytes(_TIME_BYTES, "big") + who.prefix
        return urlsafe_b64encode(self._mac(data) + data).decode()

    def _of_cookie(self, value: str) -> Who | None:
        try:
            data = urlsafe_b64decode(value)
        except ValueError:
            return None
        mac, data = data[:_MAC_BYTES], data[_MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(data)) or int.from_bytes(data[:_TIME_BYTES], "big") < time.time():
            return None
        prefix = data[_TIME_BYTES:]
        return Who(prefix, operator=not prefix, by="cookie")

    def _mac(self, data: bytes) -> bytes:
        """With the store's secret and the admin key's hash: another key signs everybody out."""
        person = (self._server.admin_key or "").encode()[-16:]
        return blake2b(data, digest_size=_MAC_BYTES, key=self._memory.identity.secret, person=person).digest()


def _no_key() -> ApiError:
    message = "Incorrect API key provided: this server takes keys of its own (server.keys)."
    return ApiError(401, message, code="invalid_api_key")


def _other_site() -> ApiError:
    return ApiError(403, "A web page of another site cannot use what you are signed in to here.", code="cross_site_request")


def _nobody() -> ApiError:
    message = "Send the credentials of your chat requests, or the key of server.admin_key, as Authorization: Bearer KEY."
    return ApiError(401, message, code="missing_credentials")


def _is_ours(request: Request) -> bool:
    """A browser asks for one of our pages, or nobody's browser does."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is not None:
        opened = request.method == "GET" and request.headers.get("sec-fetch-mode") == "navigate"
        return site in ("same-origin", "none") or opened  # a link to us may be followed from anywhere
    return origin is None or origin.partition("://")[2] == request.headers.get("host")
