"""`llm-pager sessions`, `show` and `search`: what stands in the configured storage, told as /vm tells it (api/views.py).

Promises: servers may run meanwhile, or none; nothing of a conversation is changed; where standard output is no terminal,
`show --turn` writes the bytes that upstream got and nothing else, or says that they are not the same.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from rich.console import Console
from rich.text import Text

from proxy import keys
from proxy.api.memory import Memory
from proxy.api.views import Turns, Views, Who, hits_told
from proxy.config import Config
from proxy.conversation.records import conversation_name
from proxy.errors import ConfigError, StorageError
from proxy.readable import ago, harmless, share, short, when
from proxy.storage.sqlite import DATABASE
from proxy.terminal import console, tell_json, tell_table
from proxy.whose import Whose, conversation_asked, tenant_asked

FOUND, NOTHING = 0, 1  # exit statuses


class _Reader:
    """The storage's views for those whom the options name, or for its operator."""

    def __init__(self, config: Config, memory: Memory, whose: Whose) -> None:
        self.config, self.memory, self.views = config, memory, Views(config, memory)
        self._whose = whose

    def who(self) -> Who:
        tenant = tenant_asked(self._whose, self.config, self.memory.identity)
        return Who(b"", operator=True) if tenant is None else Who(tenant[: keys.TENANT_BYTES])

    def turns(self, name: str, branch: str) -> Turns:
        """StorageError or ApiError for a conversation or a branch that is not there."""
        owner = conversation_asked(name, self._whose, self.config, self.memory.identity, self.memory.store.scan)
        if owner is None:
            raise StorageError("There is no such conversation in the storage.")
        return self.views.turns(Who(owner[: keys.TENANT_BYTES]), conversation_name(owner), branch)


def _read(config: Config, whose: Whose, work: Callable[[_Reader], Awaitable[int]]) -> int:
    """Raises ConfigError, StorageError, and what the views raise."""
    if config.tiers.l2.url is None and not (config.tiers.l2.path / DATABASE).exists():
        raise ConfigError(f"There is no storage in {config.tiers.l2.path}.")

    async def main() -> int:
        memory, status = Memory(config), NOTHING

        async def told() -> None:
            nonlocal status
            status = await work(_Reader(config, memory, whose))

        try:
            if memory.store.trouble is not None:
                raise StorageError(memory.store.trouble)
            await memory.beside(told())
        except LookupError as error:
            raise StorageError(f"The storage is damaged: {error}; llm-pager check --storage finds all of it.") from error
        finally:
            await memory.close()
        return status

    return asyncio.run(main())


# ---------------------------------------------------------------- sessions, search


def sessions(config: Config, whose: Whose, words: str, sort: str, cursor: str, limit: int, as_json: bool) -> int:
    """Conversations, those that begin with some words or all."""

    async def work(reader: _Reader) -> int:
        found = reader.views.conversations(reader.who(), words, sort, cursor, limit)
        if as_json:
            tell_json(found)
        elif found["total"]:
            _tell_sessions(found)
        else:
            print("llm-pager: there is no such conversation.", file=sys.stderr)
        return FOUND if found["total"] else NOTHING

    return _read(config, whose, work)


def _tell_sessions(found: dict[str, Any]) -> None:
    now_s, rows = time.time(), []
    for row in found["conversations"]:
        name = row["conversation"][-2 * (keys.OWNER_BYTES - keys.TENANT_BYTES) :]
        if row["damaged"]:
            rows.append([name, ago(row["used_s"], now_s), "–", "–", "–", "–", f"(damaged) {row['title']}"])
            continue
        saved = row["full_history_tokens"] - row["billed_tokens"]
        rows.append([name, ago(row["used_s"], now_s), str(row["turns"]), short(row["window_tokens"]), short(row["history_tokens"]),
                     share(saved, row["full_history_tokens"]), row["title"]])  # fmt: skip
    tell_table(["conversation", "used", "turns", "window", "of", "saved", "begins with"], rows)
    more = found["total"] - len(rows)
    if found["next_cursor"]:
        print(f"{more} more: --cursor {found['next_cursor']}, or --limit", file=sys.stderr)


def search(config: Config, whose: Whose, name: str, query: str, branch: str, limit: int, as_json: bool) -> int:
    """The pages of a conversation that a query is about."""

    async def work(reader: _Reader) -> int:
        at = reader.turns(name, branch)
        pages, asked = reader.views.search(at, query, limit)
        hits = await reader.memory.search(at.who.tenant, asked, pages) if query.strip() else []
        results = hits_told(hits, pages, query)
        if as_json:
            tell_json({"results": results})
        elif results:
            rows = [[hit["page"], f"{hit['score']:.2f}", hit["role"] or "derived", hit["hint"]] for hit in results]
            tell_table(["page", "score", "role", "around what was asked"], rows)
        else:
            print("llm-pager: nothing of it is about that.", file=sys.stderr)
        return FOUND if results else NOTHING

    return _read(config, whose, work)


# ---------------------------------------------------------------- show


def show(
    config: Config, whose: Whose, name: str, turn: int | None, other: int | None, page: str, branch: str, before: int, limit: int,
    as_json: bool,
) -> int:
    """A conversation; the upstream request of a turn, or its difference to another's; why a page was in a turn's window."""

    async def work(reader: _Reader) -> int:
        views, at = reader.views, reader.turns(name, branch)
        if page:
            return _tell(views.explain(at, page, turn or 0), _tell_why, as_json)
        if other is not None:
            return _tell(views.diff(at, other, turn or at.head.turn), _tell_difference, as_json)
        if turn is None:
            return _tell(views.conversation(at, before, limit), _tell_conversation, as_json)
        if as_json or sys.stdout.isatty():
            return _tell(views.turn(at, turn), _tell_turn, as_json)
        sent = views.request(at, turn)
        sys.stdout.buffer.write(sent.body)
        sys.stdout.buffer.flush()
        if not sent.exact:
            print("llm-pager: these are not surely the bytes that upstream got.", file=sys.stderr)
        return FOUND if sent.exact else NOTHING

    return _read(config, whose, work)


def _tell(told: dict[str, Any], how: Callable[[Console, dict[str, Any]], None], as_json: bool) -> int:
    if as_json:
        tell_json(told)
    else:
        how(console(), told)
    return FOUND


def _tell_conversation(to: Console, told: dict[str, Any]) -> None:
    now_s = time.time()
    print(f"conversation  {told['conversation']}: {harmless(told['title'])}")
    print(f"used          {ago(told['used_s'], now_s)}, {told['turns']} turns, {told['messages']} messages since {when(told['began_s'])}")
    print(f"model         {harmless(told['model'] or 'unknown')}")
    print(f"window        {short(told['window_tokens'])} tokens of {short(told['history_tokens'])} that were said"
          + (f"; {told['window_pages']} of {told['pages']} pages" if told["pages"] else "; all of it fits"))  # fmt: skip
    if told["full_history_tokens"]:
        print(f"billed        {short(told['billed_tokens'])} tokens of input at the full price; a sliding window "
              f"{short(told['sliding_window_tokens'])}, the full history {short(told['full_history_tokens'])}")  # fmt: skip
    else:
        print("billed        unknown: no turn was paged yet, or the upstream tells no usage")
    if told["pinned"]:
        print(f"pinned        {', '.join(told['pinned'])}")
    for branch in told["branches"][1:]:
        print(f"branch        {branch['branch']}: {branch['turns']} turns, {branch['shared_messages']} messages are the same")
    rows = []
    for row in told["turn_rows"]:
        began, broke = row["epoch_begun"] is not None, row["cache_break"]
        notes = [f"epoch {row['epoch_begun']} began" if began else "", f"cache: {broke}" if broke and not (began and broke == "epoch") else "",
                 "" if row["delivered"] else "came in a request"]  # fmt: skip
        billed = row["billed"] or {}
        rows.append([str(row["turn"]), ago(row["answered_s"], now_s), short(row["window_tokens"]), short(row["history_tokens"]),
                     f"{row['evidence']} ({row['evidence_used']})", str(row["faults"]), str(row["evicted"]),
                     share(billed.get("cached_tokens"), billed.get("prompt_tokens")), "; ".join(filter(None, notes))])  # fmt: skip
    print()
    tell_table(["turn", "answered", "window", "of", "shown", "faults", "out", "cached", ""], rows)
    if told["next_before"]:
        print(f"{told['next_before'] - 1} older turns: --before {told['next_before']}; one of them: --turn N", file=sys.stderr)


def _tell_turn(to: Console, told: dict[str, Any]) -> None:
    """The request as a person reads it: what was added is marked with a plus."""
    sent = told["request"]
    if sent is None:
        print(f"turn {told['turn']} of {told['last_turn']}: its request is not stored.")
        return
    how = "as the client sent it" if sent["untouched"] else "with what was added (+)"
    print(f"turn {told['turn']} of {told['last_turn']}: {sent['bytes']} bytes, {how}; the first {sent['shared_bytes']} bytes of its messages"
          f" are those of the turn before{'' if sent['exact'] else '; not surely what upstream got'}")  # fmt: skip
    for message in told["messages"]:
        notes = [message["page"], None if message["kind"] == "client" else message["kind"], "cached" if message["cached"] else None]
        to.print(Text(f"\n{harmless(str(message['role']))}  {', '.join(filter(None, notes))}", "bold"))
        for span in message["spans"]:
            _mark(to, span["text"], *(("+ ", "cyan") if span["added"] else ("  ", "")))
    print(f"\n{told['in']} pages in the window, {told['out']} outside; --why PAGE says why. Into a file or a pipe the exact bytes are written.")


def _tell_difference(to: Console, told: dict[str, Any]) -> None:
    print(f"turn {told['other']} against turn {told['turn']}: the first {told['shared_bytes']} bytes of the messages are the same"
          + (f"; other fields that changed: {', '.join(map(harmless, told['fields_changed']))}" if told["fields_changed"] else ""))  # fmt: skip
    for change in told["changes"]:
        if change["op"] == "same":
            to.print(Text(f"  {change['messages']} messages are the same", "dim"))
            continue
        mark, style = ("+ ", "green") if change["op"] == "added" else ("- ", "red")
        _mark(to, f"{change['role']}: {change['text']}", mark, style)


def _tell_why(to: Console, told: dict[str, Any]) -> None:
    print(harmless(told["why"]))
    rows = [[part["page"], part["place"], str(part["level"]), part["tier"], str(part["tokens"]), str(part["value_per_token"] or "–"),
             str(part["faults"]), part["hint"]] for part in told["parts"]]  # fmt: skip
    if rows:
        tell_table(["page", "place", "level", "tier", "tokens", "value", "faults", "begins with"], rows)


def _mark(to: Console, text: str, mark: str, style: str) -> None:
    for line in harmless(text).splitlines() or [""]:
        to.print(Text(mark + line, style), soft_wrap=True)
