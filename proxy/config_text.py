"""The configuration's words: its file read, its values masked, each of its problems one sentence.

Promises: reads one file and nothing else; text from variables becomes the type its key has (so a numeric
API key stays text); no sentence contains a secret. It knows no setting: keys are followed through the
pydantic model that it is given.
"""

import difflib
import re
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from proxy.errors import ConfigError

MASK = "***"
_SECRET_KEYS = frozenset({"api_key", "keys"})
_FREE_NAMES = "options"  # a mapping whose names others have chosen: ...
_SECRET_OPTION = re.compile(r"(?i)key|secret|token|password|credential|sas|sig|account_json")
_URL_USERINFO = re.compile(r"(?<=://)[^/?#]*@")
_URL_SECRET = re.compile(r"(?i)([?&][^=&#]*(?:key|secret|token|password|sig)[^=&#]*=)[^&#]*")
_MASKED = re.compile(r"\A\*\*\*\Z|://\*\*\*@|=\*\*\*(?:&|\Z)")  # as `mask` leaves it
_REFERENCE = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}|\$\{")

Key = tuple[str | int, ...]


def mask(name: str, value: Any) -> Any:
    """`value` of the key `name` as it may be shown: no keys, no credentials inside URLs."""
    if name in _SECRET_KEYS:
        return value if value is None or value in ([], (), {}) else MASK
    if isinstance(value, str):
        return _URL_SECRET.sub(rf"\1{MASK}", _URL_USERINFO.sub(f"{MASK}@", value))
    if isinstance(value, Mapping) and name == _FREE_NAMES:
        return {key: MASK if _SECRET_OPTION.search(str(key)) else mask(str(key), item) for key, item in value.items()}
    if isinstance(value, Mapping):
        return {key: mask(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mask("", item) for item in value)
    return value


# ---------------------------------------------------------------- the file


class _Loader(yaml.SafeLoader):
    """YAML's safe types, and a key given twice is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or "it cannot be read"
        raise ConfigError(f"{source} is not valid YAML{where}: {what}.") from None


def read_file(file: Path, must_exist: bool) -> dict[str, Any]:
    """The file's sections; {} for one that need not exist. Raises ConfigError."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        if must_exist:
            raise ConfigError(f"The configuration file {file} does not exist.") from None
        return {}
    except UnicodeDecodeError:
        raise ConfigError(f"The configuration file {file} is not UTF-8 text.") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from None
    data = _parse(text, str(file))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{file} must hold sections such as 'server:' and 'upstream:'.")
    # `prefetch:` with nothing behind it means its defaults.
    return {str(name): {} if section is None else section for name, section in data.items()}


# ---------------------------------------------------------------- the keys


class Place(NamedTuple):
    """Where a key leads: the deepest known field, or the section that does not know it."""

    name: str
    field: FieldInfo | None
    section: type[BaseModel] | None  # that the field is, or that has no such key

    @property
    def options(self) -> list[Any]:
        """The types that its value may have."""
        annotation = self.field.annotation if self.field is not None else None
        is_union = get_origin(annotation) in (Union, types.UnionType)
        return list(get_args(annotation)) if is_union else [annotation]

    def typed(self, text: str, source: str) -> Any:
        """`text` as the type that the key has: text keys take it as it is, others as YAML."""
        options = self.options
        rest = [option for option in options if option is not type(None)]
        if self.field is not None and not all(o in (str, Path) or get_origin(o) is Literal for o in rest):
            return _parse(text, source)
        return None if type(None) in options and text in ("", "~", "null") else text

    def allowed(self) -> str:
        """The end of the sentence "it must be ..."."""
        if self.field is not None and self.field.description:
            return self.field.description
        if self.section is not None:
            return "a mapping with the keys " + ", ".join(self.section.model_fields)
        options = self.options
        choices = next((get_args(o) for o in options if get_origin(o) is Literal), None)
        if choices:
            return "one of " + ", ".join(choices)
        if bool in options:
            return "true or false"
        if options == [str]:
            return "a text"
        limits = self.field.metadata if self.field is not None else []
        least = next((limit.ge for limit in limits if hasattr(limit, "ge")), None)
        return "something else" if least is None else f"a whole number of at least {least}"


def _section_of(annotation: object) -> type[BaseModel] | None:
    is_one = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation if is_one else None  # type: ignore[return-value]


def _leaves(section: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        yield from _leaves(inner, (*above, name)) if inner is not None else [(*above, name)]


def _nearest(name: str, known: list[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.6)), None)


# ---------------------------------------------------------------- the sentences


class Sentences:
    """The problems of one loading, collected. `root`: the model; `file`: as it is called in them."""

    def __init__(self, root: type[BaseModel], prefix: str, file: str) -> None:
        self.problems: list[str] = []
        self.origins: dict[Key, str] = {}  # of what the file does not say
        self._root = root
        self._prefix = prefix
        self._file = file

    def _place(self, key: Key) -> Place:
        """Follows `key` from the root as far as the model knows it."""
        section: type[BaseModel] | None = self._root
        field: FieldInfo | None = None
        name = ""
        steps = iter(key)
        for step in steps:
            if section is None:  # inside a value: a list's item, or a union's branch
                if isinstance(step, int):
                    name += f"[{step}]"
                break
            field = section.model_fields.get(str(step))
            name = f"{name}.{step}" if name else str(step)
            if field is None:
                return Place(name, None, section)
            section = _section_of(field.annotation)
            if get_origin(field.annotation) is dict and (item := next(steps, None)) is not None:
                kind = get_args(field.annotation)[1]
                name, field, section = f'{name}["{item}"]', FieldInfo(annotation=kind), _section_of(kind)
        return Place(name, field, section)

    def filled(self, value: Any, environ: Mapping[str, str], key: Key = ()) -> Any:
        """`value` with `${VAR}` and `${VAR:-default}` filled in; `$${` stands for a plain `${`."""
        if isinstance(value, dict):
            return {k: self.filled(v, environ, (*key, k)) for k, v in value.items()}
        if isinstance(value, list):
            return [self.filled(v, environ, (*key, i)) for i, v in enumerate(value)]
        if not isinstance(value, str) or ("${" not in value and not _MASKED.search(value)):
            return value
        broken: list[str] = []
        if _MASKED.search(value):
            broken.append(f"{MASK} stands where `llm-pager check` showed no secret; write what stood there, or a ${{VAR}}")

        def fill(match: re.Match[str]) -> str:
            if match[0] == "$${":
                return "${"
            name, default = match[1], match[2]
            if name is None:
                broken.append("'${' must begin a ${VAR} or ${VAR:-default}; write $${ for the text '${'")
                return ""
            found = environ.get(name)
            if default is not None:
                return found or default
            if found is None:
                broken.append(f"the variable {name} is not set; set it, or write ${{{name}:-default}}")
            return found or ""

        text = _REFERENCE.sub(fill, value)
        place = self._place(key)
        if not broken:
            return place.typed(text, place.name)
        self.problems += [f"{place.name}: {sentence}." for sentence in broken]
        # Stands in for a value that is already reported, so that it is not reported twice.
        known = place.field is not None and not place.field.is_required()
        return place.field.get_default(call_default_factory=True) if known else None  # type: ignore[union-attr]

    def variable(self, name: str, text: str) -> dict[str, Any]:
        """What the variable sets, by its key's steps joined by `__`; {} where there is a problem."""
        key: Key = tuple(name.removeprefix(self._prefix).lower().split("__"))
        place = self._place(key)
        if place.field is None or "[" in place.name:
            self.problems.append(self._unknown_variable(name, key))
            return {}
        try:
            value = place.typed(text, name)
        except ConfigError as error:
            self.problems += error.problems
            return {}
        self.origins[key] = name
        return {"__".join(map(str, key)): value}

    def _unknown_variable(self, name: str, key: Key) -> str:
        if key[0] == "models" and len(key) > 1:
            return f"{name}: set {self._prefix}MODELS to a mapping such as '{{gpt-4o: {{tools: false}}}}'."
        known = [self._prefix + "__".join(leaf).upper() for leaf in _leaves(self._root)]
        near = _nearest(name, known)
        hint = f"did you mean {near}?" if near else f"the names look like {known[0]}."
        return f"{name}: there is no such setting; {hint}"

    def invalid(self, error: ValidationError) -> None:
        """Tell all that the model does not accept."""
        sentences: dict[str, None] = {}  # ordered, and once where a union has two complaints
        for item in error.errors():
            place = self._place(item["loc"])
            origin = self._origin(item["loc"])
            if item["type"] == "extra_forbidden":
                keys = list(place.section.model_fields) if place.section is not None else []
                near = _nearest(str(item["loc"][-1]), keys)
                hint = f"did you mean {near}? The" if near else "the"
                keys_here = f"{hint} keys here are {', '.join(keys)}"
                said = f"{place.name}: there is no such key; {keys_here} ({origin})."
            elif item["type"] == "value_error" and (place.field is None or place.section is not None):
                said = f"{place.name}: {item['ctx']['error']}."
            else:
                value = mask(place.name.rpartition(".")[2].partition("[")[0], item["input"])
                said = f"{place.name}: {value!r} is not allowed; it must be {place.allowed()} ({origin})."
            sentences[said] = None
        self.problems += sentences

    def _origin(self, loc: Key) -> str:
        for length in range(len(loc), 0, -1):
            if loc[:length] in self.origins:
                return f"set by {self.origins[loc[:length]]}"
        return f"set in {self._file}"
