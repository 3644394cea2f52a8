"""Moto's server: an S3 store, and a store of Google Cloud's for who comes with a bearer token.

Google's XML API, which the client speaks, is S3's but for its signature and for what becomes of an object that is deleted
and not there (404). None of the emulators on PyPI speaks it (gcp-storage-emulator 2026.7 and fake-gcs-server 1.54 list
or take nothing that way).

    python -m tests.object_server PORT
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple
from werkzeug.test import run_wsgi_app

moto = DomainDispatcherApplication(create_backend_app)


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    if environ.get("HTTP_AUTHORIZATION", "").startswith("Bearer ") and environ["REQUEST_METHOD"] == "DELETE":
        status = run_wsgi_app(moto, {**environ, "REQUEST_METHOD": "HEAD"})[1]
        if status.startswith("404"):
            start_response(status, [("content-length", "0")])
            return []
    return moto(environ, start_response)


if __name__ == "__main__":
    run_simple("127.0.0.1", int(sys.argv[1]), application, threaded=True)
