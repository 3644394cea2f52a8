"""Configuration: where values come from, what is refused and how it is said, what stays secret."""

import ast
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from proxy.config import (
    Config,
    ModelOverride,
    effective_config,
    effective_reserve,
    load_config,
)
from proxy.errors import ApiError, ConfigError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(
    text: str | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> Config:
    if text is not None:
        Path("config.yaml").write_text(text, encoding="utf-8")
    return load_config(None, environ or {}, flags or {})


def problems(
    text: str | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(text, environ, flags)
    return caught.value.problems


# ---------------------------------------------------------------- where values come from


def test_the_documented_file_is_the_built_in_defaults() -> None:
    documented = load_config(ROOT / "config.yaml", {}, {})
    assert documented == Config() == load()


def test_the_documented_file_names_every_key() -> None:
    import yaml

    def keys(data: object, above: str = "") -> set[str]:
        if not isinstance(data, dict) or not data:
            return {above}
        return {key for name, item in data.items() for key in keys(item, f"{above}.{name}")}

    documented = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    assert keys(documented) == keys(Config().model_dump(mode="json"))


def test_every_documented_key_is_read_somewhere() -> None:
    """By its name behind its section's, or behind a name that the section was given."""
    import yaml

    def leaves(data: object, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        if not isinstance(data, dict) or not data:
            return [above]
        return [leaf for name, item in data.items() for leaf in leaves(item, (*above, name))]

    read: set[tuple[str, str]] = set()
    for path in (ROOT / "proxy").rglob("*.py"):
        if not path.name.startswith("config"):
            read |= _attributes(ast.parse(path.read_text(encoding="utf-8")))
    documented = leaves(yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8")))
    settings = [leaf for leaf in documented if leaf != ("models",)]
    assert [".".join(leaf) for leaf in settings if leaf[-2:] not in read] == []
    names = {name for _, name in read}
    assert [name for name in ModelOverride.model_fields if name not in names] == []


def _attributes(tree: ast.Module) -> set[tuple[str, str]]:
    """Each `section.key` that is read, also where `name = ....section` stands before `name.key`."""

    def last(node: ast.expr) -> str:
        return getattr(node, "attr", getattr(node, "id", ""))

    given: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=True))
                for name, value in pairs:
                    given.setdefault(last(name), set()).add(last(value))
    return {
        (section, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        for section in {last(node.value), *given.get(last(node.value), ())}
    }


def test_a_later_source_wins_key_by_key() -> None:
    text = "server: {host: h1, port: 1}\nfaults: {max_rounds: 2}\n"
    environ = {"LLM_PAGER_SERVER__PORT": "2", "LLM_PAGER_FAULTS__MAX_ROUNDS": "3"}
    config = load(text, environ, {"server.port": 3, "server.host": None})
    assert (config.server.host, config.server.port) == ("h1", 3)
    assert config.faults.max_rounds == 3
    assert (config.prefetch.tokens, config.prefetch.max_pages) == ("auto", 64)


def test_the_given_file_replaces_the_one_in_the_working_directory(tmp_path: Path) -> None:
    Path("config.yaml").write_text("server: {port: 1}")
    other = tmp_path / "other.yaml"
    other.write_text("faults: {max_rounds: 2}")
    config = load_config(other, {}, {})
    assert (config.server.port, config.faults.max_rounds) == (8080, 2)


def test_a_given_file_must_exist() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        load_config(Path("nowhere.yaml"), {}, {})


@pytest.mark.parametrize(("text", "port"), [("", 8080), ("server:\n", 8080), ("server: {}", 8080)])
def test_an_empty_file_or_section_means_the_defaults(text: str, port: int) -> None:
    assert load(text).server.port == port


def test_variables_take_the_type_of_their_key() -> None:
    config = load(
        environ={
            "LLM_PAGER_UPSTREAM__API_KEY": "12345",
            "LLM_PAGER_UPSTREAM__TIMEOUT_S": "30",
            "LLM_PAGER_TIERS__L0__TOKENS": "4000",
            "LLM_PAGER_TIERS__L2__PATH": "/data",
            "LLM_PAGER_TIERS__L3__URL": "null",
            "LLM_PAGER_SESSIONS__HEADERS": "[X-Chat, x-session-id]",
            "LLM_PAGER_SESSIONS__REATTACH": "false",
            "LLM_PAGER_PREFETCH": "{max_pages: 2}",
            "LLM_PAGER_MODELS": "{'gpt-4o*': {window_tokens: 64000, tools: false}}",
        }
    )
    assert config.upstream.api_key == "12345"
    assert config.upstream.timeout_s == 30.0
    assert config.tiers.l0.tokens == 4000
    assert config.tiers.l2.path == Path("/data")
    assert config.tiers.l3.url is None
    assert config.sessions.headers == ("x-chat", "x-session-id")
    assert config.sessions.reattach is False
    assert (config.prefetch.max_pages, config.prefetch.tokens) == (2, "auto")
    assert config.models == {"gpt-4o*": ModelOverride(window_tokens=64000, tools=False)}


def test_variables_that_are_not_settings_are_left_alone() -> None:
    environ = {
        "LLM_PAGER_DATA": "../shared/data",
        "LLM_PAGER_EFFECTIVE_CONFIG": "{}",
        "LLM_PAGER_SERVICE_HOST": "10.0.0.1",
        "LLM_PAGER_SERVICE_PORT_HTTP": "8080",
        "LLM_PAGER_PORT": "tcp://10.0.0.1:8080",
        "LLM_PAGER_PORT_8080_TCP_ADDR": "10.0.0.1",
        "PATH": "/bin",
    }
    assert load(environ=environ) == Config()


def test_references_are_filled_in_with_the_type_of_their_key() -> None:
    text = """
upstream: {api_key: "${KEY}", base_url: "http://${HOST:-127.0.0.1}:${PORT}/v1"}
server: {port: "${PORT}", host: "${HOST:-}0.0.0.0"}
models: {m: {tokenizer: "$${KEY}"}}
"""
    config = load(text, {"KEY": "777", "PORT": "9000", "HOST": ""})
    assert config.upstream.api_key == "777"
    assert config.upstream.base_url == "http://127.0.0.1:9000/v1"
    assert config.server.port == 9000
    assert config.models["m"].tokenizer == "${KEY}"


def test_an_empty_reference_is_null_where_null_is_allowed() -> None:
    assert load("upstream: {api_key: '${KEY:-}'}").upstream.api_key is None


def test_a_reference_cannot_bring_in_structure() -> None:
    (problem,) = problems("server: {host: '${H}', port: '${P}'}", {"H": "x", "P": "{a: 1}"})
    assert problem.startswith("server.port: {'a': 1} is not allowed")


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tiers: {l0: {tokens: 100}}", "tiers.l0.tokens: 100 is not allowed; it must be auto or"),
        ("tiers: {l0: {tokens: lots}}", "tiers.l0.tokens: 'lots' is not allowed; it must be auto"),
        ("tiers: {l0: {tokens: true}}", "tiers.l0.tokens: True is not allowed"),
        ("tiers: {l0: {tokens: null}}", "tiers.l0.tokens: None is not allowed"),
        ("tiers: {l0: {reserve_tokens: 0}}", "tiers.l0.reserve_tokens: 0 is not allowed"),
        ("tiers: {l0: {eviction_threshold: 1.5}}", "must be a number above 0 and up to 1"),
        ("tiers: {l0: {eviction_threshold: .nan}}", "must be a number above 0 and up to 1"),
        ("tiers: {l2: {path: ''}}", "tiers.l2.path: '' is not allowed; it must be a directory"),
        ("tiers: 5", "tiers: 5 is not allowed; it must be a mapping with the keys l0, l1"),
        ("server: {port: '8080'}", "server.port: '8080' is not allowed; it must be a port"),
        ("server: {port: 70000}", "it must be a port from 0 (any free one) to 65535"),
        ("server: {port: true}", "server.port: True is not allowed"),
        ("server: {body_limit_bytes: 10}", "it must be a whole number of at least 1024"),
        ("upstream: {provider: azure}", "it must be one of openai, litellm, demo"),
        ("upstream: {base_url: localhost:8080}", "it must be an http:// or https:// URL"),
        ("upstream: {base_url: 'http://'}", "it must be an http:// or https:// URL"),
        ("upstream: {base_url: 'http://h:port/v1'}", "it must be an http:// or https:// URL"),
        ("upstream: {base_url: 'http://h/v1?a=1'}", "it must be an http:// or https:// URL"),
        ("upstream: {timeout_s: 0}", "a number of seconds above 0"),
        ("upstream: {timeout_s: .inf}", "a number of seconds above 0"),
        ("memory: {mode: off}", "memory.mode: False is not allowed; it must be one of strict,"),
        ("stream: {hold_ms: 1.5}", "milliseconds"),
        ("sessions: {headers: x-chat}", "sessions.headers: 'x-chat' is not allowed; it must be a"),
        ("sessions: {headers: ['a b']}", "a list of different header names"),
        ("sessions: {headers: [a, A]}", "a list of different header names"),
        ("sessions: {headers: [Authorization]}", "that do not carry credentials"),
        ("sessions: {headers: [5]}", "sessions.headers[0]: 5 is not allowed"),
        ("models: {gpt-4.1: {tools: maybe}}", "models[\"gpt-4.1\"].tools: 'maybe' is not allowed"),
        ("models: {m: 5}", 'models["m"]: 5 is not allowed; it must be a mapping with the keys win'),
        ("models: {m: {window: 5}}", 'models["m"].window: there is no such key; did you mean wind'),
        ("models: [a]", "models: ['a'] is not allowed; it must be a mapping of model names"),
        ("tiers: {l2: {token: 5}}", "tiers.l2.token: there is no such key; did you mean tokens?"),
        ("tiers: {l4: {url: 'ftp://b'}}", "tiers.l4.url: 'ftp://b' is not allowed; it must be null, a directory, or a URL of file,"),
        ("tiers: {l3: {options: {region: [a]}}}", "tiers.l3.options[\"region\"]: ['a'] is not allowed; it must be a text"),
        ("1: {}", "1: there is no such key; the keys here are server, upstream"),
        ("models: {m: {bridge: x}}", "models[\"m\"].bridge: 'x' is not allowed; it must be one of responses"),
        ("compression: {max_jobs: 0}", "it must be a whole number of at least 1 "),
        ("upstream: {drop_params: 1}", "it must be true or false "),
        ("server: {prot: 1}", "server.prot: there is no such key; did you mean port? The keys"),
        ("servers: {}", "servers: there is no such key; did you mean server?"),
        ("zzz: 1", "zzz: there is no such key; the keys here are server, upstream"),
    ],
)
def test_one_bad_value_is_one_sentence(text: str, expected: str) -> None:
    (problem,) = problems(text)
    assert expected in problem
    assert problem.endswith("(set in config.yaml).") and "\n" not in problem


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "tiers: {l0: {target_utilization: 0.95}}",
            "tiers.l0: target_utilization 0.95 must be lower than eviction_threshold 0.9.",
        ),
        (
            "upstream: {timeout_s: 5}",
            "upstream: connect_timeout_s 10 must not be above timeout_s 5.",
        ),
        ("tiers: {l2: {tokens: 2000}}", "tiers: l2.tokens 2000 needs l4.url: what leaves L2 has to go somewhere."),
    ],
)
def test_values_that_contradict_each_other(text: str, expected: str) -> None:
    assert problems(text) == (expected,)


def test_all_problems_are_told_at_once_with_their_source() -> None:
    found = problems(
        "server: {port: 0x}\nfaults: {rounds: 1}\nupstream: {api_key: '${NO_SUCH}'}",
        {"LLM_PAGER_STREAM__HOLD_MS": "-1", "LLM_PAGER_UPSTREAM__BASEURL": "x"},
        {"upstream.base_url": "nonsense"},
    )
    text = "\n".join(found)
    assert len(found) == 6
    assert "server.port: '0x' is not allowed" in text and "(set in config.yaml)" in text
    assert "faults.rounds: there is no such key" in text
    assert "the variable NO_SUCH is not set; set it, or write ${NO_SUCH:-default}." in text
    assert "stream.hold_ms: -1 is not allowed" in text
    assert "(set by LLM_PAGER_STREAM__HOLD_MS)" in text
    assert "LLM_PAGER_UPSTREAM__BASEURL: there is no such setting; " in text
    assert "did you mean LLM_PAGER_UPSTREAM__BASE_URL?" in text
    assert "(set by the command line)" in text


def test_a_section_that_is_none_is_told_although_a_variable_sets_one_of_its_keys() -> None:
    (problem,) = problems("upstream: 5", {"LLM_PAGER_UPSTREAM__API_KEY": "k"})
    assert problem.startswith("upstream: 5 is not allowed; it must be a mapping with the keys provider")


def test_a_port_variable_that_is_no_service_link_is_refused() -> None:
    (problem,) = problems(environ={"LLM_PAGER_PORT": "9000"})
    assert "did you mean LLM_PAGER_SERVER__PORT?" in problem


def test_model_overrides_have_no_variables_of_their_own() -> None:
    (problem,) = problems(environ={"LLM_PAGER_MODELS__X__TOOLS": "false"})
    assert "set LLM_PAGER_MODELS to a mapping" in problem


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [", "config.yaml is not valid YAML at line 1"),
        ("server: {port: 1, port: 2}", "the key 'port' is given twice"),
        ("- a", "config.yaml must hold sections"),
        ("server: !!python/object/apply:os.getcwd []", "config.yaml is not valid YAML"),
        ("server: {host: '${1X}'}", "server.host: '${' must begin a ${VAR}"),
    ],
)
def test_files_that_cannot_be_read(text: str, expected: str) -> None:
    (problem,) = problems(text)
    assert expected in problem


def test_a_variable_that_is_not_yaml() -> None:
    (problem,) = problems(environ={"LLM_PAGER_SESSIONS__HEADERS": "[a"})
    assert problem.startswith("LLM_PAGER_SESSIONS__HEADERS is not valid YAML")


# ---------------------------------------------------------------- what stays secret

SECRETS = """
upstream: {api_key: SECRET1, base_url: "https://user:SECRET2@host/v1"}
storage: {encryption: {keys: ["SECRET6SECRET6SECRET6SECRET6SECRET6SECRET61="], key_store: "postgresql://u:SECRET7@h/d"}}
tiers: {l3: {url: "s3://key:SECRET3@bucket?secret_key=SECRET4&region=eu", options: {secret_access_key: SECRET5, region: eu}}}
"""


def test_secrets_are_masked_wherever_a_config_is_shown() -> None:
    config = load(SECRETS)
    assert config.upstream.api_key == "SECRET1"
    sections = (config.upstream, config.storage)
    for shown in (json.dumps(config.masked()), repr(config), str(config), *map(repr, sections)):
        assert "SECRET" not in shown
        assert "https://***@host/v1" in shown or "upstream" not in shown
    assert config.masked()["tiers"]["l3"]["options"] == {"secret_access_key": "***", "region": "eu"}
    assert config.masked()["tiers"]["l3"]["url"] == "s3://***@bucket?secret_key=***&region=eu"
    assert Config().masked()["upstream"]["api_key"] is None


@pytest.mark.parametrize(
    "text",
    [
        "upstream: {api_key: {a: SECRET}}",
        "upstream: {base_url: 'ftp://u:SECRET@h'}",
        "upstream: SECRET\nupstreams: SECRET",
        "upstream: [{api_key: SECRET}]",
        "models: {m: {api_key: SECRET}}",
        "upstream: {base_url: ['http://u:SECRET@h']}",
        "storage: {encryption: {keys: [SECRET]}}",
        "storage: {encryption: {keys: {a: SECRET}}}",
        "storage: {encryption: {keys: [[SECRET]]}}",
    ],
)
def test_problems_do_not_show_secrets(text: str) -> None:
    if "upstream: SECRET" in text:
        assert problems(text)  # a bare word where a section belongs is shown: it is no key's value
    else:
        assert "SECRET" not in "\n".join(problems(text))


def test_one_master_key_may_come_from_a_variable() -> None:
    key = "c" * 43 + "="
    both = {"LLM_PAGER_STORAGE__ENCRYPTION__KEYS": key, "MASTER": key}
    assert load(None, both).storage.encryption.keys == (key,)
    assert load("storage: {encryption: {keys: ['${MASTER}', 'file:/run/key']}}", {"MASTER": key}).storage.encryption.keys == (key, "file:/run/key")
    assert "the variable NO_SUCH is not set" in problems("storage: {encryption: {keys: ['${NO_SUCH}']}}")[0]


# ---------------------------------------------------------------- handing it on


def test_the_effective_config_survives_the_way_to_a_worker() -> None:
    config = load(SECRETS + "\nmodels: {'gpt-*': {tools: false}}\nsessions: {headers: [a, b]}")
    assert effective_config({"LLM_PAGER_EFFECTIVE_CONFIG": config.model_dump_json()}) == config


def test_a_worker_without_a_handed_config_loads_its_own() -> None:
    assert effective_config({"LLM_PAGER_SERVER__PORT": "1"}).server.port == 1


def test_a_broken_handed_config_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="LLM_PAGER_EFFECTIVE_CONFIG is set by llm-pager"):
        effective_config({"LLM_PAGER_EFFECTIVE_CONFIG": '{"server": 5}'})


def test_a_config_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().server.port = 1  # type: ignore[misc]


# ---------------------------------------------------------------- what is derived


def test_model_overrides_exact_name_first_then_the_longest_glob() -> None:
    overrides = {
        "gpt-*": {"window_tokens": 1000},
        "gpt-4*": {"window_tokens": 2000},
        "gpt-4o": {"window_tokens": 3000},
        "*-4o-mini-2024-07-18": {"window_tokens": 4000},
    }
    config = Config.model_validate({"models": overrides})
    windows = {
        name: config.model_override(name).window_tokens
        for name in ("gpt-4o", "gpt-4o-mini", "gpt-3.5", "gpt-4o-mini-2024-07-18", "claude")
    }
    assert windows == {
        "gpt-4o": 3000,
        "gpt-4o-mini": 2000,
        "gpt-3.5": 1000,
        "gpt-4o-mini-2024-07-18": 4000,
        "claude": None,
    }


@pytest.mark.parametrize(
    ("l0", "configured", "reserve"), [(128_000, 4096, 4096), (4000, 4096, 1000), (4000, 500, 500), (128_000, "auto", 4096), (4000, "auto", 1000)]
)
def test_effective_reserve(l0: int, configured: int | str, reserve: int) -> None:
    assert effective_reserve(l0, configured) == reserve


def test_notes_tell_what_is_capped_or_unused() -> None:
    text = """
tiers: {l0: {tokens: 1000, reserve_tokens: 4096}}
upstream: {provider: demo, base_url: http://h/v1}
"""
    notes = "\n".join(load(text).notes())
    assert "so 250 tokens are reserved" in notes
    assert "pages.max_tokens: a page of 1024 tokens takes more than half" in notes
    assert "upstream.base_url: not used with provider demo" in notes
    vectors = "search: {embeddings: upstream, embeddings_model: m}\nupstream: {provider: litellm}"
    assert load(vectors).notes() == ["search.embeddings: upstream is used with provider openai only."]
    assert "needs embeddings_model" in problems("search: {embeddings: upstream}")[0]
    (note,) = load(f"storage: {{encryption: {{keys: ['{'c' * 43}=']}}}}").notes()
    assert note.startswith("storage.encryption.key_store: the tenants' keys stand beside the data")


@pytest.mark.parametrize("text", ["", "tiers: {l0: {tokens: auto}}", "tiers: {l0: {tokens: 3000}}"])
def test_what_nobody_set_needs_no_note(text: str) -> None:
    assert load(text).notes() == []


# ---------------------------------------------------------------- errors


def test_an_api_error_is_openais_shape() -> None:
    error = ApiError(429, "slow down", type="rate_limit", code="c", headers={"retry-after": "2"})
    assert json.loads(error.body()) == {
        "error": {"message": "slow down", "type": "rate_limit", "param": None, "code": "c"}
    }
    assert (error.status, error.headers, str(error)) == (429, {"retry-after": "2"}, "slow down")
    assert json.loads(ApiError(400, "bad \ud800").body())["error"]["param"] is None
