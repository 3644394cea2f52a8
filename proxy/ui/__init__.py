"""The dashboard at /vm/ui: pages for people over the views of /vm, rendered on the server.

Promises: a page needs nothing from other hosts and no script of its own text (a strict Content-Security-Policy); it reads
and shows what its reader may see (`Access`) and is made in a thread of the pool; without scripts everything but the live
updates works. Live: a server-sent event says that a turn was answered, and htmx loads the part of the page that is `#live` anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

import jinja2
from fastapi import Depends, FastAPI, Request
from fastapi.responses import RedirectResponse, Response

from proxy import keys
from proxy.api.access import COOKIE, SESSION_S
from proxy.api.endpoints import export_of
from proxy.api.erasure import Erasures
from proxy.api.views import Who
from proxy.api.visit import Stats
from proxy.api.vm import Vm
from proxy.config import Config
from proxy.conversation.records import conversation_name
from proxy.conversation.tree import KeyScope
from proxy.errors import ApiError
from proxy.readable import ago, number, share, short, when
from proxy.ui.charts import branch_bars, map_chart, timeline_chart

_HERE = Path(__file__).parent
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".LICENSE": "text/plain"}
_FORM_BYTES = 8192
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
    " connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cache-control": "no-store",
}
_HOME_ROWS = 50
_LIVE = {"home.html": False, "conversations.html": False, "conversation.html": True}  # pages with a stream; of one conversation?


class Dashboard:
    """The routes; one per process."""

    def __init__(
        self, vm: Vm, stats: Stats, model_table: Callable[[KeyScope], list[dict[str, Any]]], erasures: Erasures, config: Config
    ) -> None:
        self._vm, self._stats, self._model_table, self._erasures, self._config = vm, stats, model_table, erasures, config
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(_HERE / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )  # fmt: skip
        environment.filters.update(number=number, short=short, when=when, ago=ago, share=share)
        self._template = environment.get_template
        self._static = {
            file.name: (file.read_bytes(), _TYPES.get(file.suffix, "text/plain")) for file in (_HERE / "static").iterdir()
        }

    def _page(self, template: str, who: Who | None, status: int = 200, **values: Any) -> Response:
        text = self._template(template).render(who=who, now_s=time.time(), **values)
        return Response(text, status, _HEADERS, "text/html; charset=utf-8")

    async def _made(self, who: Who, template: str, values: Callable[[], dict[str, Any]]) -> Response:
        """A page, in a thread of the pool; what is wrong, as a page."""

        def page() -> Response:
            began_s = time.thread_time()
            made = self._page(template, who, **values())
            if template in _LIVE:
                self._vm.page_s[_LIVE[template]] = time.thread_time() - began_s
            return made

        try:
            return await self._vm.run(who, page)
        except (ApiError, LookupError) as error:
            status = error.status if isinstance(error, ApiError) else 500
            message = error.message if isinstance(error, ApiError) else f"{error}. The storage is damaged."
            return self._page("error.html", who, status, title="Not found" if status == 404 else "Not shown", message=message)

    def mount(self, app: FastAPI) -> None:
        views, vm, Asker = self._vm.views, self._vm, Depends(self._add_sign_in(app))

        @app.get("/vm/ui/static/{name}", include_in_schema=False)
        async def static(name: str) -> Response:
            if name not in self._static:
                return Response(status_code=404)
            data, kind = self._static[name]
            return Response(data, headers={"cache-control": "max-age=3600", "x-content-type-options": "nosniff"}, media_type=kind)

        @app.get("/vm/ui", include_in_schema=False)
        @app.get("/vm/ui/", include_in_schema=False)
        async def home(who: Who = Asker) -> Response:
            return await self._made(who, "home.html", lambda: self._home(who))

        @app.get("/vm/ui/conversations", include_in_schema=False)
        async def conversations(who: Who = Asker, q: str = "", sort: str = "used", cursor: str = "") -> Response:
            return await self._made(who, "conversations.html", lambda: {
                "q": q, "sort": sort, "cursor": cursor, "found": views.conversations(who, q, sort, cursor),
            })  # fmt: skip

        @app.get("/vm/ui/conversations/{name}", include_in_schema=False)
        async def conversation(
            name: str, who: Who = Asker, branch: str = "", before: int = 0, last: int = 0, q: str = ""
        ) -> Response:
            results = None
            if q:
                try:
                    results = await vm.search(who, name, branch, q)
                except (ApiError, LookupError):
                    results = []

            def values() -> dict[str, Any]:
                at = views.turns(who, name, branch)
                found = views.conversation(at, before)
                return {
                    "name": name, "branch": branch, "c": found, "q": q, "results": results, "before": before,
                    "map": map_chart(views.map(at, last=last)), "timeline": timeline_chart(views.timeline(at)),
                    "bars": branch_bars(found["branches"]), "bill": views.bill(at),
                }  # fmt: skip

            return await self._made(who, "conversation.html", values)

        @app.get("/vm/ui/conversations/{name}/turns/{turn}", include_in_schema=False)
        async def turn(name: str, turn: int, who: Who = Asker, branch: str = "", diff: int = 0) -> Response:
            def values() -> dict[str, Any]:
                at = views.turns(who, name, branch)
                told = views.turn(at, turn)
                other = diff or (turn - 1)
                try:
                    changes = views.diff(at, other, turn) if 1 <= other <= at.head.turn and other != turn else None
                except ApiError:  # the other's request is not stored
                    changes = None
                return {"name": name, "branch": branch, "t": told, "diff": changes}

            return await self._made(who, "turn.html", values)

        @app.get("/vm/ui/conversations/{name}/pages/{page}", include_in_schema=False)
        async def page(name: str, page: str, who: Who = Asker, branch: str = "", turn: int = 0) -> Response:
            def values() -> dict[str, Any]:
                at = views.turns(who, name, branch)
                return {"name": name, "branch": branch, "p": views.page(at, page), "x": views.explain(at, page, turn)}

            return await self._made(who, "page.html", values)

        @app.post("/vm/ui/conversations/{name}/pages/{page}/{action}", include_in_schema=False)
        async def act(name: str, page: str, action: str, who: Who = Asker, branch: str = "") -> Response:
            if action not in ("pin", "unpin"):
                return Response(status_code=404)
            await vm.pin(who, name, branch, page, action == "pin")
            return RedirectResponse(f"/vm/ui/conversations/{quote(name)}/pages/{quote(page)}?branch={quote(branch)}", 303)

        @app.get("/vm/ui/conversations/{name}/export", include_in_schema=False)
        async def export(name: str, who: Who = Asker) -> Response:
            at = await vm.run(who, views.turns, who, name)
            return export_of(at.owner, conversation_name(at.owner), vm.memory)

        @app.post("/vm/ui/conversations/{name}/forget", include_in_schema=False)
        async def forget(name: str, who: Who = Asker) -> Response:
            at = await vm.run(who, views.turns, who, name)
            done = await self._erasures.erase("conversation", "operator" if who.operator else "tenant", [at.owner])
            vm.memory.renew()
            return self._page("forgotten.html", who, receipt=done.told())

    def _add_sign_in(self, app: FastAPI) -> Callable[[Request], Who]:
        """Who asks for a page; who is not known is shown where to sign in."""

        def asker(request: Request) -> Who:
            try:
                return self._vm.who(request)
            except ApiError as error:
                if error.status != 401:
                    raise
                raise _NotSignedIn(request.url.path) from None

        @app.exception_handler(_NotSignedIn)
        async def sign_in(request: Request, error: Exception) -> Response:
            if request.headers.get("hx-request"):
                return Response(status_code=401, headers={"hx-redirect": "/vm/ui/login"})
            return RedirectResponse(f"/vm/ui/login?next={quote(str(error))}", 303)

        @app.get("/vm/ui/login", include_in_schema=False)
        async def login_form(next: str = "") -> Response:
            return self._page("login.html", None, next=next, wrong=False)

        app.post("/vm/ui/login", include_in_schema=False)(self._login)

        @app.post("/vm/ui/logout", include_in_schema=False)
        async def logout() -> Response:
            answer = RedirectResponse("/vm/ui/login", 303)
            answer.delete_cookie(COOKIE, path="/vm")
            return answer

        return asker

    async def _login(self, request: Request) -> Response:
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > _FORM_BYTES:
                return Response(status_code=413)
        form = {name: values[0] for name, values in parse_qs(body.decode("utf-8", "replace")).items()}
        key, user, path = form.get("key", "").strip(), form.get("user", "").strip(), form.get("next", "")
        access = self._vm.access
        try:
            if access.is_admin(key):
                who = Who(b"", operator=True)
            elif key:
                scope = {**request.scope, "headers": [(b"authorization", f"Bearer {key}".encode("latin-1", "replace"))]}
                who = access.tenant(scope, [("user", user)] if user else [])
            else:
                raise ApiError(401, "No key.")
            found = who.operator or bool(await self._vm.run(who, lambda: self._vm.views.conversations(who, limit=1)["total"]))
        except ApiError:
            found = False
        if not found:  # nothing is said of which keys there are
            return self._page("login.html", None, 401, next=path, wrong=True)
        answer = RedirectResponse(path if path.startswith("/vm/ui") else "/vm/ui", 303)
        secure = request.url.scheme == "https"
        answer.set_cookie(COOKIE, access.signed(who), SESSION_S, path="/vm", httponly=True, samesite="strict", secure=secure)
        return answer

    def _home(self, who: Who) -> dict[str, Any]:
        found = self._vm.views.conversations(who, limit=_HOME_ROWS)
        rows = [row for row in found["conversations"] if not row["damaged"]]
        store, stats = self._vm.memory.store, self._stats.snapshot()
        scopes = [key[1:] for key, _ in store.scan(keys.MODELS + who.prefix[: keys.SCOPE_BYTES], limit=100)]
        models: dict[str, dict[str, Any]] = {}
        for scope in scopes or [b""]:
            for row in self._model_table(KeyScope(scope)):
                models.setdefault(row["model"], row)
        return {
            "found": found, "recent": found["conversations"][:8], "stats": stats, "bill": self._stats.bill(),
            "totals": self._stats.totals(), "models": list(models.values()),
            "sums": {
                name: sum(row[name] for row in rows)
                for name in ("billed_tokens", "sliding_window_tokens", "full_history_tokens")
            },
            "store": {
                "trouble": store.trouble, "damaged": dict(store.damaged), "repaired": store.repaired,
                "bytes": _size(self._config.tiers.l2.path), "path": str(self._config.tiers.l2.path) if who.operator else "",
            },
            "config": self._config,
        }  # fmt: skip


class _NotSignedIn(Exception):
    """To be asked who they are; the message is where they wanted to go."""


def _size(directory: Path) -> int:
    try:
        return sum(entry.stat().st_size for entry in directory.iterdir() if entry.is_file())
    except OSError:
        return 0

