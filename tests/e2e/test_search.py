"""What a search shows, over sockets: the words that were searched, wherever they stand in what left the window, and when
that was seen. In-process server: nothing is killed here (tests/e2e/test_kill.py has a search)."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from tests.e2e.harness import RecordingUpstream, answer, call, in_process_server, message_of
from tests.e2e.talk import CHAT, body, config, raw, results_of, tool
from tests.memory.test_passages import CASES

SKIPPED = ("no line and no space",)  # one word of 3,000 characters is no page's telling part
TOOLS = [tool("read_file", path={"type": "string"})]


def history() -> list[dict[str, Any]]:
    """Each case as a file that a tool has read, or as what the user pasted: the one long enough to be cut in parts."""
    messages: list[dict[str, Any]] = []
    for number, (text, *_) in enumerate(CASES.values()):
        if number % 2:
            made = call(f"call_r{number}", "read_file", {"path": f"{number}.txt"})
            messages += [{"role": "user", "content": f"Read file {number}."}, message_of(None, [made]),
                         {"role": "tool", "tool_call_id": f"call_r{number}", "content": text}]  # fmt: skip
        else:
            messages.append({"role": "user", "content": f"Keep this:\n{text}"})
        messages.append({"role": "assistant", "content": f"Kept, number {number}."})
    return messages


async def test_a_search_shows_the_words_at_their_place_and_when_they_were_seen() -> None:
    asked: dict[str, Any] = {}

    def reply(request: dict[str, Any], _: int) -> Any:
        last = request["messages"][-1]
        if last["role"] == "user" and "number" in asked:
            return answer(request, message_of(None, [call("call_s", "search_pages", asked["arguments"])]))
        if last["role"] == "user" and last["content"].startswith("Read file"):
            number = last["content"].removeprefix("Read file ").removesuffix(".")
            return answer(request, message_of(None, [call(f"call_r{number}", "read_file", {"path": f"{number}.txt"})]))
        return answer(request, message_of("So it is."))

    messages, said = history(), list[dict[str, Any]]()
    async with RecordingUpstream(reply) as upstream:
        sizes = {"tiers": {"l0": {"tokens": 4000, "reserve_tokens": 500}}, "pages": {"max_tokens": 512}}
        with in_process_server(config(upstream, **sizes)) as base_url:
            async with raw(base_url) as client:

                async def ask(history: list[dict[str, Any]]) -> dict[str, Any]:
                    response = await client.post(CHAT, json=body(history, tools=TOOLS))
                    assert response.status_code == 200, response.text
                    message: dict[str, Any] = response.json()["choices"][0]["message"]
                    return message

                for message in messages:  # turn by turn, each answered
                    if message["role"] == "assistant":
                        message = await ask(said)
                    said.append(message)
                days = {datetime.now(UTC).strftime("%Y-%m-%d")}
                missing, searched = [], 0
                for name, (_, query, wanted) in CASES.items():
                    if name in SKIPPED:
                        continue
                    asked.update(number=name, arguments={"query": query, "limit": 3, "after": "2020-01-01"})
                    await ask([*said, {"role": "user", "content": f"What of {name}?"}])
                    (found,) = results_of(upstream.calls[-1])
                    days.add(datetime.now(UTC).strftime("%Y-%m-%d"))
                    assert {found.get("seen"), *(one.get("seen") for one in found["results"])} - {None} <= days
                    hints = [one["hint"] for one in found["results"]]
                    window = json.dumps(upstream.calls[-1].json["messages"][:-1], ensure_ascii=False)
                    resident = all(json.dumps(part, ensure_ascii=False)[1:-1] in window for part in wanted)
                    searched += not resident
                    if not resident and not all(any(part in hint for hint in hints) for part in wanted):
                        missing.append((name, hints))
                assert missing == [] and searched > 7
                asked["arguments"] = {"query": "vault", "before": "2020-01-01"}
                await ask([*said, {"role": "user", "content": "And before that?"}])
                (found,) = results_of(upstream.calls[-1])
                assert found["results"] == [] and "No page was seen then" in found["note"]
    assert upstream.violations == [] and not upstream.failures
