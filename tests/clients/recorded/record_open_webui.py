"""Records what Open WebUI sends upstream in a chat of eleven turns: recorded/open_webui.json.xz.

An installation of it is 7 GB, too heavy for every run of the tests. To record anew, once:

    uv venv /tmp/open-webui && uv pip install --python /tmp/open-webui/bin/python open-webui
    python -m tests.clients.recorded.record_open_webui /tmp/open-webui/bin/open-webui

It starts Open WebUI with a new data folder on the scripted upstream, signs a first user up, and does
over its API what its page in the browser does: a new chat whose messages ask for a title, tags and
follow-up questions, too. The file has every request in the order of arrival: method, target, the
headers that say something, the body as text.
"""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import httpx

from tests.clients.programs import MODEL, UNREACHABLE, Model, models_body
from tests.clients.stage import upstream_in_a_thread
from tests.clients.tasks import NOTES, QUESTION, chat_model
from tests.e2e.harness import Recorded, free_port, message_of, wait_for_health

FILE = Path(__file__).with_name("open_webui.json.xz")
KEPT = ("authorization", "content-type", "accept", "accept-encoding", "user-agent", "x-openwebui-")
ASIDES = {
    "Generate a concise title": message_of('{"title": "Codes of depots"}'),
    "useful messages this user might": message_of('{"follow_ups": ["And the next depot?"]}'),
    "Generate 1-3 broad tags": message_of('{"tags": ["Depots", "Codes"]}'),
}


def model() -> Model:
    """Of the recording, and of the test that plays it."""
    return Model(chat_model().steps, ASIDES)


def main(program: str) -> None:
    acting, order = model(), list[Recorded]()

    def respond(recorded: Recorded) -> Any:
        order.append(recorded)
        return acting.respond(recorded)

    def other(recorded: Recorded) -> Any:
        order.append(recorded)
        return models_body(recorded)

    with upstream_in_a_thread(respond, other) as upstream, tempfile.TemporaryDirectory() as data:
        port = free_port()
        server = subprocess.Popen(
            [program, "serve", "--host", "127.0.0.1", "--port", str(port)],
            cwd=data,
            env={
                "PATH": os.environ["PATH"],
                "HOME": data,
                "DATA_DIR": data,
                "WEBUI_SECRET_KEY": "secret",
                "OPENAI_API_BASE_URL": upstream.base_url,
                "OPENAI_API_KEY": "sk-application",
                "ENABLE_OLLAMA_API": "false",
                "ENABLE_FORWARD_USER_INFO_HEADERS": "true",
                "BYPASS_EMBEDDING_AND_RETRIEVAL": "true",
                "RAG_EMBEDDING_ENGINE": "openai",
                "OFFLINE_MODE": "true",
                "ANONYMIZED_TELEMETRY": "false",
                "HTTPS_PROXY": UNREACHABLE,
                "NO_PROXY": "127.0.0.1",
            },
        )
        try:
            wait_for_health(port, 300, lambda: server.poll() is None)
            talk(f"http://127.0.0.1:{port}", lambda: acting.at)
        finally:
            server.terminate()
            server.wait(60)
    assert not upstream.failures, upstream.failures
    kept = [
        {
            "method": r.method,
            "target": r.target,
            "headers": [
                [k.decode(), v.decode()]
                for k, v in r.headers
                if k.decode().lower().startswith(KEPT)
            ],
            "body": r.body.decode(),
        }
        for r in order
    ]
    FILE.write_bytes(lzma.compress(json.dumps(kept).encode()))
    print(f"{len(kept)} requests, {acting.at} of them in the conversation: {FILE}")


def talk(root: str, answered: Any) -> None:
    """A chat as the page in the browser makes it; each turn waits for the one before."""
    with httpx.Client(base_url=root, timeout=120) as client:
        who = {"name": "Ann", "email": "ann@example.org", "password": "pass-Word-1"}
        token = client.post("/api/v1/auths/signup", json=who).json()["token"]
        client.headers["authorization"] = f"Bearer {token}"
        client.get("/api/models").raise_for_status()
        messages: list[dict[str, Any]] = []
        chat = parent = None
        for text in [*NOTES, QUESTION]:
            asked, said = str(uuid.uuid4()), str(uuid.uuid4())
            messages.append({"role": "user", "content": text})
            body = {
                "stream": True,
                "model": MODEL,
                "messages": messages,
                "params": {},
                "features": {},
                "variables": {},
                "tool_servers": [],
                "session_id": "browser",
                "id": said,
                "parent_id": parent,
                "user_message": {
                    "id": asked, "parentId": parent, "childrenIds": [said], "role": "user",
                    "content": text, "timestamp": int(time.time()), "models": [MODEL],
                },
                "background_tasks": {
                    "title_generation": parent is None,
                    "tags_generation": parent is None,
                    "follow_up_generation": True,
                },
                **({"chat_id": chat} if chat else {}),
            }  # fmt: skip
            started = client.post("/api/chat/completions", json=body)
            started.raise_for_status()
            chat, parent = started.json()["chat_id"], said
            messages.append({"role": "assistant", "content": answer_of(client, chat, said)})
        time.sleep(5)  # the last follow-up questions come after the answer


def answer_of(client: httpx.Client, chat: str, message: str) -> str:
    """The chat's message when it is done: the page hears of it over a socket, this asks for it."""
    for _ in range(600):
        history = client.get(f"/api/v1/chats/{chat}").json()["chat"]["history"]["messages"]
        if history.get(message, {}).get("done"):
            return str(history[message]["content"])
        time.sleep(0.2)
    raise TimeoutError(f"no answer in chat {chat}")


if __name__ == "__main__":
    main(sys.argv[1])
