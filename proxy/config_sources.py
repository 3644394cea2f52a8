"""Reads the four sources of the configuration and merges them, telling every problem at once.

Promises: reads one file and nothing else; a later source replaces single keys of an earlier one;
text from variables becomes the type its key has (so a numeric API key stays text); no problem
sentence contains a secret.
"""

import difflib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from proxy.config import EFFECTIVE_CONFIG_VARIABLE, Config, ModelOverride, Section, mask
from proxy.errors import ConfigError

PREFIX = "LLM_PAGER_"
DEFAULT_FILE = Path("config.yaml")
_NOT_SETTINGS = frozenset({EFFECTIVE_CONFIG_VARIABLE, "LLM_PAGER_DATA"})
# Kubernetes describes a service named llm-pager to every pod in variables of these shapes.
_SERVICE_LINK = re.compile(r"LLM_PAGER_(SERVICE_(HOST|PORT)(_\w+)?|PORT_\d+_(TCP|UDP)(_\w+)?)")
_SERVICE_ADDRESS = re.compile(r"(tcp|udp)://")
_REFERENCE = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}|\$\{")

Key = tuple[str | int, ...]


class Place(NamedTuple):
    """Where a key leads: the deepest known field, or the section that does not know it."""

    name: str
    field: FieldInfo | None
    section: type[Section] | None


def merge_sources(
    path: Path | None, environ: Mapping[str, str], flags: Mapping[str, object]
) -> Config:
    """See `config.load_config`."""
    problems: list[str] = []
    file = path if path is not None else DEFAULT_FILE
    data = _read_file(file, must_exist=path is not None)
    data = _interpolated(data, (), environ, problems)
    origins: dict[Key, str] = {}
    for variable, key, value in _from_environ(environ, problems):
        _put(data, key, value)
        origins[key] = variable
    for flag, setting in flags.items():
        if setting is None:
            continue
        flag_key: Key = tuple(flag.split("."))
        _put(data, flag_key, setting)
        origins[flag_key] = "the command line"
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        problems += _problems(error, origins, str(file))
        raise ConfigError(*problems) from None
    if problems:
        raise ConfigError(*problems)
    return config


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


def _read_file(file: Path, must_exist: bool) -> dict[str, Any]:
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
    return {name: {} if section is None else section for name, section in data.items()}


def _interpolated(value: Any, key: Key, environ: Mapping[str, str], problems: list[str]) -> Any:
    """`value` with `${VAR}` and `${VAR:-default}` filled in; `$${` stands for a plain `${`."""
    if isinstance(value, dict):
        return {k: _interpolated(v, (*key, k), environ, problems) for k, v in value.items()}
    if isinstance(value, list):
        return [_interpolated(v, (*key, i), environ, problems) for i, v in enumerate(value)]
    if not isinstance(value, str) or "${" not in value:
        return value
    place = _place(key)
    broken: list[str] = []

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
    if broken:
        problems += [f"{place.name}: {sentence}." for sentence in broken]
        return _default(place)
    return _typed(place, text, place.name)


def _default(place: Place) -> Any:
    """Stands in for a value that is already reported, so that it is not reported twice."""
    if place.field is None or place.field.is_required():
        return None
    return place.field.get_default(call_default_factory=True)


# ---------------------------------------------------------------- the environment


def _from_environ(
    environ: Mapping[str, str], problems: list[str]
) -> Iterator[tuple[str, Key, Any]]:
    for variable in sorted(environ):
        text = environ[variable]
        if not variable.startswith(PREFIX) or variable in _NOT_SETTINGS:
            continue
        if _SERVICE_LINK.fullmatch(variable):
            continue
        if variable == "LLM_PAGER_PORT" and _SERVICE_ADDRESS.match(text):
            continue
        key: Key = tuple(variable.removeprefix(PREFIX).lower().split("__"))
        place = _place(key)
        if place.field is None or (key[0] == "models" and len(key) > 1):
            problems.append(_unknown_variable(variable))
            continue
        try:
            yield variable, key, _typed(place, text, variable)
        except ConfigError as error:
            problems += error.problems


def _unknown_variable(variable: str) -> str:
    if variable.startswith(PREFIX + "MODELS__"):
        return f"{variable}: set {PREFIX}MODELS to a mapping such as '{{gpt-4o: {{tools: false}}}}'."
    known = [PREFIX + "__".join(key).upper() for key in _leaves(Config)]
    near = difflib.get_close_matches(variable, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else "the names look like " + known[0] + "."
    return f"{variable}: there is no such setting; {hint}"


def _leaves(section: type[Section], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in section.model_fields.items():
        inner = _section_of(field)
        if inner is None:
            yield (*above, name)
        else:
            yield from _leaves(inner, (*above, name))


def _typed(place: Place, text: str, source: str) -> Any:
    """`text` as the type that the key has: text keys take it as it is, others as YAML."""
    annotation = place.field.annotation if place.field is not None else None
    options = get_args(annotation) if get_origin(annotation) is types.UnionType else (annotation,)
    if place.field is not None and not _is_text(options):
        return _parse(text, source)
    if type(None) in options and text in ("", "~", "null"):
        return None
    return text


def _is_text(options: Sequence[Any]) -> bool:
    rest = [option for option in options if option is not type(None)]
    return all(o in (str, Path) or get_origin(o) is Literal for o in rest)


def _put(data: dict[Any, Any], key: Key, value: Any) -> None:
    *above, last = key
    for step in above:
        data = data.setdefault(step, {})
        if not isinstance(data, dict):
            return  # a section that is no mapping: validation reports it
    old = data.get(last)
    if isinstance(old, dict) and isinstance(value, dict):
        for name, item in value.items():
            _put(old, (name,), item)
    else:
        data[last] = value


# ---------------------------------------------------------------- the sentences


def _section_of(field: FieldInfo) -> type[Section] | None:
    annotation = field.annotation
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return None


def _place(key: Key) -> Place:
    """Follows `key` from the root as far as the schema knows it."""
    section: type[Section] | None = Config
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
        section = _section_of(field)
        if name == "models":
            model = next(steps, None)
            if model is not None:
                name, section, field = f'models["{model}"]', ModelOverride, None
    if section is ModelOverride and field is None:
        field = FieldInfo(annotation=ModelOverride)
    return Place(name, field, section)


def _problems(error: ValidationError, origins: Mapping[Key, str], file: str) -> list[str]:
    sentences: dict[str, None] = {}  # ordered, and once where a union has two complaints
    for item in error.errors():
        place = _place(item["loc"])
        origin = _origin(item["loc"], origins, file)
        if item["type"] == "extra_forbidden":
            sentences[_unknown_key(place, item["loc"][-1], origin)] = None
        elif item["type"] == "value_error" and (place.field is None or place.section is not None):
            above = f"{place.name}: " if place.name else ""
            sentences[f"{above}{item['ctx']['error']}."] = None
        else:
            value = mask(place.name.rpartition(".")[2], item["input"])
            allowed = _allowed(place)
            sentences[f"{place.name}: {value!r} is not allowed; it must be {allowed} ({origin})."] = (
                None
            )
    return list(sentences)


def _allowed(place: Place) -> str:
    if place.field is not None and place.field.description:
        return place.field.description
    if place.section is not None:
        return "a mapping with the keys " + ", ".join(place.section.model_fields)
    return "something else"


def _unknown_key(place: Place, key: str | int, origin: str) -> str:
    keys = list(place.section.model_fields) if place.section is not None else []
    near = difflib.get_close_matches(str(key), keys, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}? The" if near else "the"
    return f"{place.name}: there is no such key; {hint} keys here are {', '.join(keys)} ({origin})."


def _origin(loc: Key, origins: Mapping[Key, str], file: str) -> str:
    for length in range(len(loc), 0, -1):
        if loc[:length] in origins:
            return f"set by {origins[loc[:length]]}"
    return f"set in {file}"
