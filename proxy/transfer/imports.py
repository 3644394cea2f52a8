"""`llm-pager import`: other people's conversations and our own become a tenant's, for its clients to go on with.

Promises: a file is known by what is in it, not by its name; nothing is sent upstream; a client that sends the imported
messages with its next question is on their path, and one of new messages goes on by the session's name; what was there stays,
and a conversation that has gone on since is not set back.
"""

from __future__ import annotations

import io
import re
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import msgspec
import zstandard

from proxy import keys
from proxy.config import Config
from proxy.conversation.exported import (
    FORMAT,
    VERSION,
    Conversation,
    Grown,
    Header,
    Heading,
    Line,
    written,
)
from proxy.conversation.records import (
    LastUse,
    Record,
    block_key,
    conversation_key,
    decode_record,
    record_key,
)
from proxy.conversation.tree import TenantKey
from proxy.errors import ConfigError
from proxy.terminal import Advance, progress, tell_json
from proxy.transfer.accounts import NOT_AS_TOLD, GetFile, is_account_export, read_conversation
from proxy.transfer.desk import DONE, LEFT_OUT, Desk, batches, with_store
from proxy.transfer.exports import tenant_named, whole_file
from proxy.whose import Whose, tenant_asked

_ZSTD, _ZIP = b"\x28\xb5\x2f\xfd", b"PK\x03\x04"


class Unreadable(NamedTuple):
    """A conversation that cannot be read, and why."""

    title: str
    why: str


Found: TypeAlias = "Conversation | Unreadable"


class What(NamedTuple):
    """A file, of which `tenant`'s conversations are meant where it has several; `session_prefix` begins the names by which
    clients go on; `to` gets what would be stored."""

    file: Path
    tenant: str = ""
    session_prefix: str | None = None
    to: str = ""


def run(config: Config, what: What, whose: Whose, as_json: bool) -> int:
    """Raises ConfigError and StorageError."""
    return with_store(config, lambda desk: _import(desk, what, tenant_asked(whose, config, desk.identity), as_json))


def _import(desk: Desk, what: What, tenant: TenantKey | None, as_json: bool) -> int:
    if tenant is None and not what.to:
        raise ConfigError("Say whose the conversations are to be: --header 'authorization: Bearer ...', as the client sends it.")
    left_out: list[Unreadable] = []
    counts = dict.fromkeys(("conversations", "new", "messages", "answers", "unanswered"), 0)
    with progress("imported", not as_json) as advance:
        found = read_file(what.file, tenant_named(what.tenant) if what.tenant else b"", advance)
        if what.to:
            with whole_file(what.to) as out:
                out.write(msgspec.json.encode(Header(FORMAT, VERSION, int(time.time()))) + b"\n")
                for conversation in _readable(found, left_out):
                    counts["conversations"] += 1
                    counts["messages"] += len(conversation.lines)
                    out.writelines(written(conversation))
        elif tenant is not None:
            for conversation in _readable(found, left_out):
                try:
                    grown = Grown(conversation.lines, desk.identity, tenant)
                    if not grown.heads:
                        raise ValueError("it has no answer")
                except NOT_AS_TOLD as error:
                    left_out.append(_unreadable(conversation.title or conversation.name, error))
                    continue
                answers = _stored(desk, tenant, grown, conversation, what.session_prefix)
                counts["conversations"] += 1
                counts["new"] += answers > 0
                counts["answers"] += answers
                counts["messages"] += len(conversation.lines)
                counts["unanswered"] += grown.unanswered
    if as_json:
        tell_json({**counts, "left_out": [each._asdict() for each in left_out]})
    else:
        for each in left_out:
            print(f"llm-pager: left out: {each.title}: {each.why}", file=sys.stderr)
        print(f"{counts['conversations']} conversations with {counts['messages']} messages"
              + ("" if what.to else f", of which {counts['answers']} answers were not there yet")
              + (f"; {counts['unanswered']} messages behind the last answer are left out" if counts["unanswered"] else "")
              + ".")  # fmt: skip
    return LEFT_OUT if left_out else DONE


def _readable(found: Iterable[Found], left_out: list[Unreadable]) -> Iterator[Conversation]:
    for each in found:
        if isinstance(each, Unreadable):
            left_out.append(each)
        else:
            yield each


# -- storing


def _stored(desk: Desk, tenant: TenantKey, grown: Grown, conversation: Conversation, prefix: str | None) -> int:
    """Store what is not there; how many answers that were. A parent before its child, the names at the end: a command that
    was killed is repeated."""
    new = 0
    erased, secret = desk.identity.erased, desk.identity.secret

    def get_record(node_id: bytes) -> Record | None:
        data = desk.get(record_key(node_id))
        return decode_record(data) if data is not None else None

    def get_block(owner: bytes, ref: bytes) -> bytes | None:
        return desk.get(block_key(owner, ref))

    for rows in grown.branches(get_record, get_block):
        for adds in batches(rows):
            known = desk.commit(puts=(), adds=adds, secret=secret, erased=erased)
            new += sum(1 for key, _ in adds if key.startswith(keys.RECORD) and key not in known)
    puts: list[tuple[bytes, bytes]] = []
    for owner, use in grown.heads.items():
        use = use._replace(used_s=use.used_s or conversation.last_s or int(time.time()))
        before = desk.get(conversation_key(owner))
        if before is None or LastUse.decode(before).used_s < use.used_s:
            puts.append((conversation_key(owner), use.encode()))
    joins: list[tuple[bytes, bytes]] = []
    titles = [" ".join(conversation.title.split())] if prefix is not None else []  # an id is nobody else's, a title may be
    for name in dict.fromkeys(f"{prefix or ''}{name}" for name in (conversation.name, *titles) if name):
        joins.append((desk.identity.label(tenant, name), grown.head))
        key = desk.identity.session(tenant, name.encode().decode("latin-1"))  # as a header brings it
        before = desk.get(key)
        if before is None or grown.has(before):
            puts.append((key, grown.head))
    desk.commit(puts=puts, joins=joins, secret=secret, erased=erased)
    return new


# -- reading


def read_file(path: Path, tenant: bytes, advance: Advance) -> Iterator[Found]:
    """The conversations of a file; `tenant`: whose, of several. Raises ConfigError for one of no known kind."""
    try:
        with open(path, "rb") as file:
            beginning = file.read(len(_ZSTD))
            file.seek(0)
            if beginning == _ZIP:
                yield from _zipped(file, advance)
                return
            size = path.stat().st_size
            stream: BinaryIO = file
            if beginning == _ZSTD:
                stream = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file))
            first = stream.readline()
            head = _header(first)
            if head is not None:
                yield from _ours(stream, head, tenant, lambda: advance(file.tell(), size))
                return
            found = list(_values(first + stream.read()) or ())
            if not found:
                raise ConfigError(f"{path} is no export of llm-pager, ChatGPT or Claude.")
            yield from _accounts(found, lambda _: None, advance)
    except (OSError, zipfile.BadZipFile, zstandard.ZstdError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error


def _header(line: bytes) -> Header | None:
    try:
        head = msgspec.json.decode(line, type=Header)
    except (ValueError, RecursionError):
        return None
    if head.format != FORMAT:
        return None
    if head.version > VERSION:
        raise ConfigError(f"The file is of version {head.version}; this llm-pager reads {VERSION}: use a newer one.")
    return head


_NAMED = 4  # of the tenants of a file, where one has to be chosen
_BEGINS = re.compile(rb'\s*\{\s*"conversation"')  # a conversation's heading has its name first
_line = msgspec.json.Decoder(Line).decode
_heading = msgspec.json.Decoder(Heading).decode


def _ours(stream: BinaryIO, head: Header, tenant: bytes, advance: Any) -> Iterator[Found]:
    if len(head.tenants) > 1 and not tenant:
        some = ", ".join(head.tenants[:_NAMED]) + ", ..." * (len(head.tenants) > _NAMED)
        raise ConfigError(
            f"The file has conversations of {len(head.tenants)} tenants, who must not see each other's: name one of its first line"
            f" with --tenant ({some})."
        )
    heading: Heading | None = None
    lines: list[Line] = []
    why = ""
    for number, data in enumerate(chain(stream, (None,)), 2):
        if data is not None and not _BEGINS.match(data):
            try:
                if data.strip():
                    lines.append(_line(data))
            except (ValueError, RecursionError) as error:
                why = why or f"line {number}: {error}"
            continue
        if heading is not None and tenant.hex() in ("", heading.tenant):
            title = heading.title or heading.conversation
            yield Unreadable(title, why) if why else Conversation(heading.conversation, heading.title, lines, heading.last_s)
        advance()
        heading, lines, why = None, [], ""
        if data is not None:
            try:
                heading = _heading(data)
            except ValueError as error:
                heading, why = Heading(f"line {number}", tenant=tenant.hex()), str(error)


def _values(data: bytes) -> list[msgspec.Raw] | None:
    """The conversations of a JSON file: an array's elements, those of its `conversations`, or itself; None: it has none."""
    try:
        try:
            values = msgspec.json.decode(data, type=list[msgspec.Raw])
        except msgspec.ValidationError:
            fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
            more = fields.get("conversations")
            values = msgspec.json.decode(more, type=list[msgspec.Raw]) if more is not None else [msgspec.Raw(data)]
        known = any(is_account_export(msgspec.json.decode(value)) for value in values[:100])
    except (ValueError, RecursionError):
        return None
    return values if known else None


def _accounts(values: list[msgspec.Raw], get_file: GetFile, advance: Advance) -> Iterator[Found]:
    for number, raw in enumerate(values):
        title = f"conversation {number + 1}"
        try:
            value = msgspec.json.decode(raw)
            title = str(value.get("title") or value.get("name") or title)
            if not is_account_export(value):
                raise ValueError("it has neither `mapping` nor `chat_messages`")
            yield read_conversation(value, get_file)
        except NOT_AS_TOLD as error:
            yield _unreadable(title, error)
        advance(number + 1, len(values))


def _zipped(file: BinaryIO, advance: Advance) -> Iterator[Found]:
    """Every JSON file in it that has conversations: large exports are cut into several."""
    with zipfile.ZipFile(file) as archive:
        names = {name.rpartition("/")[2]: name for name in archive.namelist()}

        def get_file(file_id: str) -> bytes | None:  # its name goes on with a dash or a dot
            named = (whole for last, whole in names.items() if re.match(re.escape(file_id) + r"(?![A-Za-z0-9])", last))
            name = next(named, None) if file_id else None
            return archive.read(name) if name is not None else None

        there = False
        for name in sorted(archive.namelist()):
            if name.endswith(".json") and "__MACOSX" not in name and (values := _values(archive.read(name))):
                there = True
                yield from _accounts(values, get_file, advance)
    if not there:
        raise ConfigError("The archive has no conversations of ChatGPT or Claude.")


def _unreadable(title: str, error: Exception) -> Unreadable:
    missing = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return Unreadable(title, missing or type(error).__name__)
