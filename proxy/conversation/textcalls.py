"""VM calls that a model wrote as text. Pure.

Promises: a text is read as calls by what it says, not by a list of formats: it names one of the VM tools
where a call would name it, valid arguments for that tool stand with the name (as JSON, keyword arguments,
or in tags), and around the calls stands nothing but markup and a short preamble. An answer that talks
about the tools is an answer. `Watch` tells, piece by piece, whether what came last may become a call, so
that a stream can hold it: text that begins like none of them is never held, and nothing longer than
`LONGEST_CHARS`, nor what comes after a preamble of `PREAMBLE_CHARS`, is a call.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from proxy.conversation.channel import Channel
from proxy.memory.ids import parse_page_id
from proxy.memory.vm_tools import (
    PAGE_FAULT,
    FaultArgs,
    SearchArgs,
    parse_fault_args,
    parse_search_args,
)

LONGEST_CHARS = 2_000  # of a text that is read as calls, a preamble and all
PREAMBLE_CHARS = 400  # what has said so much before a call is an answer
_OUTSIDE_WORDS = 40  # beside calls, in all
_IMAGINED_WORDS = 150  # behind a call that a text begins with: what the model thinks that came of it
_TALKED_WORDS = 10  # before a call, where the conversation itself speaks of the tools; none after it
_GAP_WORDS = 3  # between a tool's name and its arguments: "json", "Action Input", "arguments"
_GAP_CHARS = 120
_MOST_CALLS = 16  # that are read, and mentions that are looked at
_MOST_OPENINGS = 24  # brackets in front of a mention that are tried as JSON
_PARAMETERS = {
    PAGE_FAULT: ("page_id", "target_level"),
    "search_pages": ("query", "modality", "limit", "after", "before"),
}
_ANY_PARAMETER = re.compile(r"\b(page_id|target_level|query|modality|limit)\b", re.IGNORECASE)
# A parameter and its value: behind `:` or `=`, or between tags.
_PAIR = {
    tool: re.compile(
        rf"(?<!/)\b({'|'.join(names)})\b[\"'`*]*\s*(?:[:=]\s*(\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|[^\n,;>\]}}]+)"
        r"|(?:>|</\w+>)\s*(?:<[^<>]*>\s*)*([^<>]+))",
        re.IGNORECASE,
    )
    for tool, names in _PARAMETERS.items()
}
_SEP = r"[_.\-\\]{0,2}"  # between the words of a name; some models escape it
_MENTION = re.compile(rf"page{_SEP}fault|search{_SEP}pages", re.IGNORECASE)
_NAME_CHARS = re.compile(r"[\w.:/\-]*")
_NAME_BEFORE = re.compile(r"[\w.:/\-]*$")
THOUGHT_END = "</think>"
_SPECIAL = re.compile(r"<[|｜][^<>\n]{0,80}[|｜]>[\w]{0,20}|</?[｜|]?\w[^<>\n]{0,120}>|\[/?[A-Z_]{3,20}\]")
_FENCE = re.compile(r"```[\w+\-]*")
_LETTERS = re.compile(r"[^\W\d_]{2,}")
_BRACKETS = re.compile(r"\\.|[\"'{}\[\]()]", re.DOTALL)
_CLOSING = {"{": "}", "[": "]", "(": ")"}
_json = json.JSONDecoder(strict=False)


class Spoken(NamedTuple):
    """A call: the tool (page_fault or search_pages) and its arguments as a JSON object."""

    tool: str
    arguments: str


class _Found(NamedTuple):
    start: int
    end: int
    calls: list[Spoken]


def calls_in(text: str, channel: Channel, talked: Callable[[], bool] = lambda: False) -> list[Spoken] | None:
    """The VM calls that a round's whole text is; [] when it is a call that cannot be read; None for an
    answer. `talked`: the conversation itself speaks of the tools by name, asked only where that matters.
    """
    text = text.rpartition(THOUGHT_END)[2].replace("\\_", "_")
    if len(text) > LONGEST_CHARS or not _MENTION.search(text):
        return None
    if "<think>" in text:
        return None  # it thinks; it has not said anything yet
    found, broken = _find(text, channel)
    if not found and broken is None:
        return None
    before, after = _outside(text, found, broken)
    most = _OUTSIDE_WORDS if before else _IMAGINED_WORDS
    if before + after > most or (found and found[0].start > PREAMBLE_CHARS):
        return None
    if not channel.listed and talked():
        return None
    if before + after and talked() and (after or before > _TALKED_WORDS):
        return None
    return [call for one in found for call in one.calls][:_MOST_CALLS]


def as_message(message: Mapping[str, Any], spoken: list[Spoken], channel: Channel) -> dict[str, Any]:
    """A round's message with its spoken calls as real ones, in front of those that it made."""
    calls = [
        {"type": "function", "function": {"name": channel.names[tool], "arguments": arguments}}
        for tool, arguments in spoken
    ]
    return {**message, "content": None, "tool_calls": [*calls, *(message.get("tool_calls") or ())]}


def as_tool_calls(message: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """A message, or its delta, with an old `function_call` as a tool call, where no function is the
    client's; else itself."""
    call = message.get("function_call")
    if channel.client_calls or not isinstance(call, dict):
        return message
    rest = {k: v for k, v in message.items() if k != "function_call"}
    return {**rest, "tool_calls": [{"index": 0, "type": "function", "function": call}]}


def said_text(message: Mapping[str, Any]) -> str:
    """The text of a message's content, without parts that are no text."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else ()
    texts = (part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text")
    return "".join(text for text in texts if isinstance(text, str))


def is_silent(message: Mapping[str, Any]) -> bool:
    """A message in which nothing stands for the user: no word after its thoughts, no call, no media."""
    content = message.get("content")
    if isinstance(content, str):
        content = content.rpartition(THOUGHT_END)[2].strip()
    rest = ("tool_calls", "function_call", "refusal", "audio", "images")
    return not content and not any(message.get(key) for key in rest)


def unwrapped(arguments: object, channel: Channel) -> list[Spoken]:
    """The VM calls within another call's arguments, when these are nothing else
    (`multi_tool_use.parallel`)."""
    value: Any = arguments
    if isinstance(value, str):
        try:
            value = _json.decode(value) if _MENTION.search(value) else None
        except (ValueError, RecursionError):
            return []
    uses = next((v for v in value.values() if isinstance(v, list)), []) if isinstance(value, dict) else []
    found = [_walk(use, channel) for use in uses]
    return [call for calls in found for call in calls] if all(found) else []


# -- finding calls


def _find(text: str, channel: Channel) -> tuple[list[_Found], int | None]:
    """The calls of a text in their order, and where a call begins that cannot be read."""
    found: list[_Found] = []
    broken: int | None = None
    read: dict[int, tuple[Any, int] | None] = {}  # the JSON that begins at a bracket
    at = 0
    for mention in itertools.islice(_MENTION.finditer(text), _MOST_CALLS):
        if mention.start() < at:
            continue
        before = _NAME_BEFORE.search(text, at, mention.start())
        start = before.start() if before else mention.start()
        behind = _NAME_CHARS.match(text, mention.end())
        end = behind.end() if behind else mention.end()
        tool = channel.tool(text[start:end])
        if tool is None:
            continue
        one = _json_around(text, at, mention.start(), channel, read) or _called(text, start, end, tool)
        if one is not None:
            found.append(one)
            at = one.end
        elif broken is None and _like_a_call(text, at, start, end):
            broken = start
    return found, broken


def _json_around(
    text: str, least: int, mention: int, channel: Channel, read: dict[int, tuple[Any, int] | None]
) -> _Found | None:
    """The JSON value that a mention stands in, read as calls."""
    for opening in itertools.islice(re.finditer(r"[{\[]", text[least:mention]), _MOST_OPENINGS):
        start = least + opening.start()
        if start not in read:
            read[start] = _value_at(text, start) if len(read) < _MOST_OPENINGS else None
        found = read[start]
        if found and found[1] > mention and (calls := _walk(found[0], channel)):
            return _Found(start, found[1], calls)
    return None


def _value_at(text: str, start: int) -> tuple[Any, int] | None:
    """The JSON value or Python literal that begins at `start`, and where it ends; brackets that the
    text leaves open are closed."""
    try:
        return _json.raw_decode(text, start)
    except (ValueError, RecursionError):
        pass
    end, closing = _balanced(text, start)
    for decode in (_json.decode, ast.literal_eval):
        try:
            return decode(text[start:end] + closing), end
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return None


def _balanced(text: str, start: int) -> tuple[int, str]:
    """The end of the bracket that opens at `start`, and what would close it if the text does not."""
    waiting: list[str] = []
    quote = ""
    for match in _BRACKETS.finditer(text, start):
        char = match.group()
        if char[0] == "\\":
            continue
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in _CLOSING:
            waiting.append(_CLOSING[char])
        elif waiting and char == waiting[-1]:
            waiting.pop()
            if not waiting:
                return match.end(), ""
    return len(text), "" if quote else "".join(reversed(waiting))


def _walk(value: Any, channel: Channel, depth: int = 0) -> list[Spoken]:
    """The calls in a JSON value: objects in which a name of a tool and its arguments stand."""
    if depth > 8:
        return []
    if isinstance(value, list):
        return [call for item in value for call in _walk(item, channel, depth + 1)]
    if not isinstance(value, dict):
        return []
    for key, named in value.items():
        if (tool := _tool_in(key, channel)) and (call := _spoken(tool, named)):
            return [call]
        if isinstance(named, str) and (tool := _tool_in(named, channel)):
            rest = {k: v for k, v in value.items() if k != key}
            for arguments in (*rest.values(), rest):
                if call := _spoken(tool, arguments):
                    return [call]
    return [call for item in value.values() for call in _walk(item, channel, depth + 1)]


def _tool_in(name: object, channel: Channel) -> str | None:
    return channel.tool(name) if isinstance(name, str) and _MENTION.search(name) else None


def _spoken(tool: str, arguments: Any) -> Spoken | None:
    """A call of this tool, if these are arguments for it."""
    if isinstance(arguments, str):
        try:
            arguments = _json.decode(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict):
        return None
    known = {k: v for k, v in arguments.items() if k in _PARAMETERS[tool]}
    try:
        text = json.dumps(known)
    except (TypeError, ValueError, RecursionError):
        return None
    read = parse_fault_args(text) if tool == PAGE_FAULT else parse_search_args(text)
    return Spoken(tool, text) if isinstance(read, FaultArgs | SearchArgs) else None


def _called(text: str, start: int, end: int, tool: str) -> _Found | None:
    """A call whose arguments stand behind the name, in any of the ways."""
    following = _MENTION.search(text, end)
    last = following.start() if following else len(text)
    for way in (_in_brackets, _as_object, _as_pairs, _as_line):
        if found := way(text, end, last, tool):
            arguments, close = found
            if call := _spoken(tool, arguments):
                return _Found(start, close, [call])
    return None


_Args = tuple[dict[str, Any], int] | None


def _in_brackets(text: str, at: int, last: int, tool: str) -> _Args:
    """`(query="x")`, `("x", limit=3)`, `({"query": "x"})`."""
    opening = re.compile(r"[\s`*\"']{0,3}\(").match(text, at)
    if not opening:
        return None
    end, closing = _balanced(text, opening.end() - 1)
    inner = text[opening.end() : end] + closing
    try:
        call = ast.parse(f"f({inner.strip()}" if inner.endswith(")") else f"f({inner})", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not isinstance(call, ast.Call):
        return None
    arguments: dict[str, Any] = {}
    for name, node in zip(_PARAMETERS[tool], call.args, strict=False):
        arguments[name] = _value(node)
    arguments |= {word.arg: _value(word.value) for word in call.keywords if word.arg}
    whole = arguments.get(_PARAMETERS[tool][0])
    if isinstance(whole, dict):
        arguments = whole
    return {k: v for k, v in arguments.items() if v is not None}, end


def _value(node: ast.expr) -> Any:
    """A literal, or a bare page id."""
    if isinstance(node, ast.Name):
        word = node.id
        if word in ("true", "false"):
            return word == "true"
        return word if parse_page_id(word.lower()) else None
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def _as_object(text: str, at: int, last: int, tool: str) -> _Args:
    """A JSON object soon behind the name, with nothing but markup and a word or so between."""
    start = text.find("{", at, min(last, at + _GAP_CHARS))
    if start < 0 or len(_LETTERS.findall(_SPECIAL.sub(" ", text[at:start]))) > _GAP_WORDS:
        return None
    while text.startswith("{", start + 1):
        start += 1
    value, end = _value_at(text, start) or (None, start)
    if not isinstance(value, dict) or _spoken(tool, value):
        return (value, end) if isinstance(value, dict) else None
    return next(((v, end) for v in value.values() if _spoken(tool, v)), None)


def _as_pairs(text: str, at: int, last: int, tool: str) -> _Args:
    """`query="x" limit=3`, lines of `query: x`, `<parameter=query>x</parameter>`, `<query>x</query>`,
    `<arg_key>query</arg_key><arg_value>x…`."""
    arguments: dict[str, Any] = {}
    end = at
    for match in _PAIR[tool].finditer(text[:last], at):
        if len(_LETTERS.findall(_SPECIAL.sub(" ", text[end : match.start()]))) > _GAP_WORDS:
            break
        name, value, tagged = match.groups()
        if tagged is None:
            value = value.strip().strip("\"'`")
            value = value if "(" in value else value.rstrip(")")
        arguments.setdefault(name.lower(), value if tagged is None else tagged.strip())
        end = match.end()
    return (arguments, end) if arguments else None


def _as_line(text: str, at: int, last: int, tool: str) -> _Args:
    """`page_fault msg_0042`, `search_pages "flooring"`, `Action Input: flooring` in the next line."""
    match = re.compile(
        r"[\s:`\"'>(\[]{1,4}([a-z]+_[\d._]*\d)\b|\s+\"([^\"\n]+)\"|`?\s*\n[\w ]{1,20}:[ \t]*[\"'`]?([^\n\"'`]+)"
    ).match(text, at, last)
    if match is None:
        return None
    words = next(group for group in match.groups() if group).strip()
    if tool == PAGE_FAULT:
        return ({"page_id": words}, match.end()) if parse_page_id(words) else None
    return ({"query": words}, match.end()) if match.group(1) is None else None


def _like_a_call(text: str, least: int, start: int, end: int) -> bool:
    """A name stands where a call would have it: behind or before a bracket, a tag, a quote."""
    before, behind = text[least:start], text[end : end + 24].lstrip()
    if before.endswith(("`", "**")) and before.strip("`* \n"):
        return False  # a name that is quoted within a sentence
    if before.endswith(('"', "'")):
        return behind[:1] in ("", '"', "'") and bool(re.search(r"[{<\[(]", before))
    if re.match(r"\(\s*(?:\Z|[{\"']|\w+\s*=)|\{|\[ARGS|<[|｜]|>", behind):
        return True
    opened = before.rstrip().endswith(("=", "]", ">", "<", ":"))
    return opened and bool(re.search(r"[{<\[]", before))


def _outside(text: str, found: list[_Found], broken: int | None) -> tuple[int, int]:
    """Words before the first call, and between and after the calls, without markup."""
    if not found:
        start = text.find("{")
        at = min(broken or 0, start) if start >= 0 else broken or 0
        return _count(text[:at]), 0
    between = 0
    for one, other in itertools.pairwise(found):
        between += _count(text[one.end : other.start])
    return _count(text[: found[0].start]), between + _count(text[found[-1].end :])


def _count(text: str) -> int:
    text = re.sub(r"\b\w{1,10}=\s*$|\b\w+\($", " ", text)
    return len(_LETTERS.findall(_FENCE.sub(" ", _SPECIAL.sub(" ", text))))


# -- watching a stream

_PART = (
    rf"(?:p(?:a(?:g(?:e{_SEP}(?:f(?:a(?:ul?)?)?)?)?)?)?|s(?:e(?:a(?:r(?:c(?:h{_SEP}(?:p(?:a(?:ge?)?)?)?)?)?)?)?)?)\Z"
)
_START = re.compile(
    rf"[<{{\[]|`{{1,3}}(?=\Z|[\w\n{{\[<`])|page{_SEP}fault|search{_SEP}pages|(?<![^\W_]){_PART}", re.IGNORECASE
)
_suspicious = re.compile(
    rf"[<{{\[`]|[Pp][Aa][Gg][Ee]{_SEP}[Ff]|[Ss][Ee][Aa][Rr][Cc][Hh]{_SEP}[Pp]|(?<![^\W_])(?i:{_PART})"
).search
_PARTLY = re.compile(_PART, re.IGNORECASE)
_OPEN_CHARS = 240  # of markup without a tool's name
_LINE_CHARS = 120
_CALL_KEYS = frozenset(
    "name tool tools function functions call calls action recipient type id role command method "
    "arguments args parameters params input thought thoughts reasoning content query page uses".split()
)
_NAMING_KEYS = frozenset("name tool function action recipient command method".split())
_KEY = re.compile(r"""[{\[\s]*["']?([\w\- ]{1,40})["']?\s*:\s*(?:["']([^"']*)["'])?""")


class Watch:
    """Follows a round's text; feed() says whether what came last may be a call, and must be held."""

    def __init__(self) -> None:
        self._text = ""  # from where a call may have begun; empty for most of most answers
        self._before = 0  # characters before it
        self._scanned = 0  # no call begins before it, in the text
        self._off = False  # it is an answer, or a thought, by now

    def feed(self, piece: str) -> bool:
        if len(piece) > LONGEST_CHARS:  # only the end of a thought matters in it, or what comes behind that
            _, mark, piece = piece.rpartition(THOUGHT_END)
            if mark:
                self._text, self._before, self._scanned, self._off = "", 0, 0, False
            self._before += max(0, len(piece) - LONGEST_CHARS)
            piece = piece[-LONGEST_CHARS:]
        if not self._text and not _suspicious(piece):
            self._before += len(piece)
            return False
        self._text = (self._text + piece).replace("\\_", "_")
        if THOUGHT_END in self._text:
            self._text = self._text.rpartition(THOUGHT_END)[2]
            self._before, self._scanned, self._off = 0, 0, False
        if "<think>" in self._text or self._before + len(self._text) > LONGEST_CHARS:
            self._off = True
        if not self._off and self._held():
            return True
        self._before += len(self._text)
        tail = self._text[-len(THOUGHT_END) :]
        self._text = tail[tail.rfind("<") :] if "<" in tail else ""  # the end of a thought, perhaps
        self._before -= len(self._text)
        self._scanned = len(self._text)
        return False

    def _held(self) -> bool:
        while match := _START.search(self._text, self._scanned):
            if self._before + match.start() > PREAMBLE_CHARS:
                return False
            if _open(self._text, match.start()):
                self._scanned = match.start()
                return True
            self._scanned = match.start() + 1
        return False


def _open(text: str, at: int) -> bool:
    """What begins here may still become a call."""
    mention = _MENTION.search(text, at)
    if mention is not None:
        behind = _NAME_CHARS.match(text, mention.end())
        rest = text[behind.end() if behind else mention.end() :]
        return text[at] in "<{[" or text.startswith("```", at) or _called_soon(rest)
    return bool(_PARTLY.match(text, at)) or (text[at] in _OPENS and _OPENS[text[at]](text[at:]))


def _called_soon(rest: str) -> bool:
    """What follows a bare name: brackets, a quote, a line's end, an argument; not a word of prose."""
    plain = rest.lstrip("`*\"' \t")
    if not plain:
        return True
    if plain[0] in "({[<:=\n":
        return True
    word = re.match(r"[\w.]+", plain)
    if word is None:
        return False
    if word.end() == len(plain):
        return any(name.startswith(plain.lower()) for names in _PARAMETERS.values() for name in names) or (
            re.fullmatch(r"[a-z]{1,3}|[a-z]{3}_[\d._]*", plain) is not None
        )
    return bool(_ANY_PARAMETER.fullmatch(word.group()) or parse_page_id(word.group().lower()))


def _object_open(piece: str) -> bool:
    if len(piece) > _OPEN_CHARS:
        return False
    plain = piece.lstrip("{[ \t\r\n")
    if not plain:
        return True
    key = _KEY.match(piece)
    if key is None:
        return re.fullmatch(r"""["']?[\w\- ]{0,40}["']?\s*""", plain) is not None
    words = set(re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", key.group(1)).replace("_", " ").lower()))
    if not words & _CALL_KEYS and not _ANY_PARAMETER.search(key.group(1)):
        return False
    return not (key.group(2) is not None and words & _NAMING_KEYS)


def _bracket_open(piece: str) -> bool:
    plain = piece[1:].lstrip()
    if not plain or plain[0] == "<":
        return not plain or _tag_open(plain)
    if plain[0] in "{[":
        return _object_open(plain)
    label = re.match(r"/?[A-Z_]*(\])?", plain)
    assert label is not None
    if label.end() == len(plain):
        return True
    if label.group(1):
        rest = plain[label.end() :].lstrip()
        if not rest or rest[0] in "{[":
            return not rest or _object_open(rest)
        return label.end() > 3 and len(rest) <= 48 and "\n\n" not in rest
    return re.fullmatch(r"[\w.]{0,40}", plain) is not None


def _tag_open(piece: str) -> bool:
    if len(piece) > _OPEN_CHARS or not re.match(r"<(?:\Z|[|｜\w])", piece):
        return False
    plain = re.sub(r"<[^<>]*(?:>|\Z)", " ", piece).strip()
    unclosed = len(piece) - piece.rfind("<") if piece.rfind("<") > piece.rfind(">") else 0
    if unclosed > 80:
        return False
    if plain.startswith(("{", "[")):
        return _OPENS[plain[0]](plain)
    return len(plain) <= 48 and len(_LETTERS.findall(plain)) <= _GAP_WORDS


def _fence_open(piece: str) -> bool:
    ticks = re.match(r"`{1,3}", piece)
    assert ticks is not None
    if ticks.end() < 3:  # inline code, or a fence that is not whole
        rest = piece[ticks.end() :]
        return not rest or re.fullmatch(r"[\w.]{0,24}", rest) is not None
    info, newline, code = piece[3:].partition("\n")
    if not newline:
        return len(info) <= 24
    code = code.lstrip()
    if not code or code[0] in "{[<":
        return not code or _OPENS[code[0]](code)
    return "\n" not in code and len(code) <= _LINE_CHARS


_OPENS: dict[str, Callable[[str], bool]] = {
    "{": _object_open, "[": _bracket_open, "<": _tag_open, "`": _fence_open,
}  # fmt: skip
