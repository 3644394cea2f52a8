"""The command line: what `llm-pager` and each of its commands take, and how they end.

Promises: what is wrong is said in one sentence on standard error, without a traceback; exit status 0 for success, 1 when the
machine refuses, or nothing was found, 2 for wrong configuration or arguments, 3 where `check --storage` found damage and repaired
it, or something could not be moved. Nothing heavy is imported before a command needs it.
"""

import gc
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer.main
from typer import Argument, Option

from proxy import __version__
from proxy.errors import ApiError, ConfigError, StartError, StorageError
from proxy.whose import Whose

if TYPE_CHECKING:
    from proxy.config import Config
    from proxy.forget import Kind


def _ended(status: int, **options: bool) -> None:
    raise typer.Exit(status)


_HELP: dict[str, Any] = {"help_option_names": ["-h", "--help"]}
_PLAIN: dict[str, Any] = {"rich_markup_mode": None, "no_args_is_help": True}  # help with boxes and colours takes half a second more
app = typer.Typer(
    name="llm-pager", result_callback=_ended, context_settings=_HELP,
    help="An OpenAI-compatible proxy that gives any chat application virtual memory.",
    epilog="Exit status: 0 done; 1 the machine refuses, or nothing was found; 2 wrong arguments or configuration; 3 damage was repaired,"
    " or something was left out.", **_PLAIN,
)  # fmt: skip
_forget = typer.Typer(help="Erase a conversation, a message, a user, a credential.", **_PLAIN)
_keys = typer.Typer(help="The keys of an encrypted storage: count, rotate, rewrite.", **_PLAIN)

ConfigFile = Annotated[Path | None, Option("--config", metavar="FILE", help="Instead of ./config.yaml, which may be absent.")]
AsJson = Annotated[bool, Option("--json", help="Tell the result as JSON, and show no progress.")]
Branch = Annotated[str, Option("--branch", metavar="NAME", help="The branch that is meant, as show names it. Default: the last used.")]
Conversation = Annotated[str, Argument(metavar="CONVERSATION", help="Its id, as sessions, the log and x-llm-pager-conversation have it.")]
Header = Annotated[list[str], Option(
    "--header", metavar="'NAME: VALUE'",
    help="Whose: a header that the client sends ('': it sends no key); @FILE: one a line. It is not stored.",
)]  # fmt: skip
Field = Annotated[list[str], Option(
    "--field", metavar="NAME=VALUE", help="Likewise a query parameter, or of the body user, safety_identifier, metadata.NAME."
)]  # fmt: skip
User = Annotated[str | None, Option("--user", metavar="NAME", help="The same as --field user=...")]
Key = Annotated[str | None, Option("--key", metavar="NAME", help="In place of a header with it: a key of server.keys, by its name.")]
Yes = Annotated[bool, Option("--yes", help="Do not ask.")]


@cache
def _command() -> Any:
    made = typer.main.get_command(app)
    for option in made.get_params(typer.Context(made, **_HELP)):
        option.default = False  # where it is None typer loads pydantic to see that nothing was given: 0.2 s before any help
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; `argv` without the program's name. Returns the exit status."""
    try:
        _command()(argv, prog_name="llm-pager")
    except SystemExit as end:
        return _flushed(end.code if isinstance(end.code, int) else 1)
    except ConfigError as error:
        for problem in error.problems:
            print(f"llm-pager: {problem}", file=sys.stderr)
        return 2
    except (StartError, StorageError) as error:
        print(f"llm-pager: {error}", file=sys.stderr)
        return 1
    except ApiError as error:  # of the views, which servers show, too
        print(f"llm-pager: {error.message}", file=sys.stderr)
        return 2 if error.status == 400 else 1
    return 0


def _flushed(status: int) -> int:
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # `llm-pager check | head`: the interpreter's own flush at its end would say so
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _config(file: Path | None) -> "Config":
    from proxy.config import load_config

    return load_config(file, os.environ, {})


def _of_somebody(command: Callable[..., int]) -> Callable[..., int]:
    """The same with the options that make its first parameter, a `Whose`."""

    def taking(header: Header = [], field: Field = [], user: User = None, key: Key = None, **others: Any) -> int:  # noqa: B006
        return command(Whose(header, field, user, key), **others)

    own = [p for p in signature(taking).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    theirs = [*signature(command).parameters.values()][1:]
    made = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in (*theirs, *own)]
    taking.__signature__ = Signature(made)  # type: ignore[attr-defined]
    taking.__annotations__ = {p.name: p.annotation for p in made}
    taking.__name__, taking.__doc__ = command.__name__, command.__doc__
    return taking


def _version(asked: bool) -> None:
    if asked:
        print(f"llm-pager {__version__}")
        raise typer.Exit


@app.callback()
def _program(version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")] = False) -> None:
    pass


# ---------------------------------------------------------------- run it


@app.command()
def serve(
    config: ConfigFile = None,
    host: Annotated[str | None, Option(metavar="HOST", help="Address to listen on (server.host).")] = None,
    port: Annotated[int | None, Option(metavar="PORT", help="TCP port, 0 for any free one (server.port).")] = None,
    upstream: Annotated[str | None, Option(metavar="URL", help="Where to send (upstream.base_url).")] = None,
    workers: Annotated[int, Option(metavar="N", min=1, help="Processes.")] = 1,
    as_json: Annotated[bool, Option("--json", help="Tell where it listens as JSON.")] = False,
) -> int:
    """Start the proxy."""
    gc.disable()  # until `process.tune`: what is imported and made until then stays
    from proxy import serve

    flags = {"server.host": host, "server.port": port, "upstream.base_url": upstream}
    return serve.serve(config, flags, workers, as_json)


@app.command()
def demo(
    fast: Annotated[bool, Option("--fast", help="Do not wait between turns.")] = False,
    window: Annotated[int | None, Option(metavar="TOKENS", min=1, help="The window's size.")] = None,
    ui: Annotated[bool, Option("--ui", help="Open the dashboard in a browser, and serve it until Ctrl-C.")] = False,
    as_json: Annotated[bool, Option("--json", help="Tell the result as JSON, and show nothing else.")] = False,
) -> int:
    """Watch a long conversation being paged; no key needed."""
    from proxy.demo import play

    return play.main(fast, window, ui, as_json)


@app.command()
def check(
    config: ConfigFile = None,
    storage: Annotated[bool, Option("--storage", help="Read all that is stored instead: find damage, and repair it (status 3).")] = False,
    as_json: AsJson = False,
) -> int:
    """Validate and print the effective configuration."""
    if storage:
        from proxy.check import check_storage

        return check_storage(_config(config), as_json)
    from proxy import serve

    return serve.check(_config(config), as_json)


@app.command()
def top(
    url: Annotated[str | None, Option(metavar="URL", help="The server. Default: where the configuration says that it listens.")] = None,
    once: Annotated[bool, Option("--once", help="Tell it once, and end.")] = False,
    every: Annotated[float, Option(metavar="SECONDS", min=0.1, help="Between two looks.")] = 2.0,
    config: ConfigFile = None,
    as_json: Annotated[bool, Option("--json", help="Tell it once, as JSON.")] = False,
) -> int:
    """Watch a running server: traffic, faults, cache, bill."""
    from proxy import top
    from proxy.readable import url_of

    if url is None:
        server = _config(config).server
        url = url_of(server.host, server.port)
    return top.run(url, every, once, as_json)


@app.command()
def bench(
    requests: Annotated[int, Option(metavar="N", min=1, help="Of each kind, measured five times.")] = 100,
    as_json: AsJson = False,
) -> int:
    """Measure what a request costs on this machine.

    Sent straight to an upstream, through a server without memory, with it. No network; nothing is left behind."""
    from proxy import bench

    return bench.run(requests, as_json)


# ---------------------------------------------------------------- look inside


@app.command()
@_of_somebody
def sessions(
    whose: Whose,
    words: Annotated[list[str], Argument(metavar="WORDS", help="That it begins with.", show_default=False)] = [],  # noqa: B006
    sort: Annotated[str, Option(metavar="ORDER", help="used, began or title.")] = "used",
    limit: Annotated[int, Option(metavar="N", min=1, help="Rows, at most 200.")] = 50,
    cursor: Annotated[str, Option(metavar="TEXT", help="Where the rows before ended.")] = "",
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> int:
    """List conversations, the last used first.

    Everybody's, unless --header, --key, --user say whose."""
    from proxy import show

    return show.sessions(_config(config), whose, " ".join(words), sort, cursor, limit, as_json)


@app.command()
@_of_somebody
def show(
    whose: Whose,
    conversation: Conversation,
    turn: Annotated[int | None, Option(metavar="N", help="The exact upstream request of this turn; on a terminal, made readable.")] = None,
    diff: Annotated[int | None, Option(metavar="M", help="What the turn (the last one) was sent that turn M was not.")] = None,
    why: Annotated[str, Option(metavar="PAGE", help="Why the page was in the window of the turn (the last one), or was not.")] = "",
    branch: Branch = "",
    before: Annotated[int, Option(metavar="N", min=0, help="List the turns before this one; 0: the newest.")] = 0,
    limit: Annotated[int, Option(metavar="N", min=1, help="Turns of the list, at most 200.")] = 50,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> int:
    """Show a conversation, what the model saw in a turn, and why."""
    from proxy import show

    return show.show(_config(config), whose, conversation, turn, diff, why, branch, before, limit, as_json)


@app.command()
@_of_somebody
def search(
    whose: Whose,
    conversation: Conversation,
    words: Annotated[list[str], Argument(metavar="WORDS", help="What the pages are to be about.")],
    branch: Branch = "",
    limit: Annotated[int, Option(metavar="N", min=1, help="Pages, at most 50.")] = 20,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> int:
    """Search the pages of a conversation, as the model does."""
    from proxy import show

    return show.search(_config(config), whose, conversation, " ".join(words), branch, limit, as_json)


# ---------------------------------------------------------------- move it


@app.command()
@_of_somebody
def export(
    whose: Whose,
    out: Annotated[str, Option(metavar="FILE", help="JSON Lines; .zst: compressed; -: standard output.")],
    conversation: Annotated[str, Argument(metavar="CONVERSATION", help="Its id. Default: all.", show_default=False)] = "",
    tenant: Annotated[str, Option(metavar="HEX", help="One tenant's, by the name that an export gives it.")] = "",
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> int:
    """Write conversations to a file."""
    from proxy.transfer import exports

    return exports.run(_config(config), whose, conversation, tenant, out, as_json)


@app.command("import")
@_of_somebody
def import_(
    whose: Whose,
    file: Annotated[Path, Argument(metavar="FILE", help="Known by what is in it.")],
    tenant: Annotated[str, Option(metavar="HEX", help="Of a file with several tenants' conversations, this one's.")] = "",
    session_prefix: Annotated[str | None, Option(metavar="TEXT", help="Begins the session names by which new messages go on.")] = None,
    to: Annotated[str, Option(metavar="FILE", help="Write what would be stored to a file, and store nothing.")] = "",
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> int:
    """Read an export of ours, of ChatGPT or of Claude.

    The options --header, --key, --user say whose it becomes: that client goes on with it."""
    from proxy.transfer import imports

    return imports.run(_config(config), imports.What(file, tenant, session_prefix, to), whose, as_json)


@app.command()
def migrate(
    source: Annotated[str, Argument(metavar="FROM", help="A directory (tiers.l2.path) or postgresql://...")],
    target: Annotated[str, Argument(metavar="TO", help="An empty one of either, or one that this has begun to fill.")],
    header: Annotated[list[str], Option(metavar="...", help="Of an older version's store: a client's, as for import.")] = [],  # noqa: B006
    user: Annotated[list[str], Option(metavar="...", help="Likewise.")] = [],  # noqa: B006
    as_json: AsJson = False,
) -> int:
    """Move a whole store; no server may run on either."""
    from proxy.transfer import migrate

    return migrate.run(source, target, header, user, as_json)


@app.command()
def backup(
    directory: Annotated[Path, Argument(metavar="DIR", help="Where to; an older copy there is replaced.")],
    keys: Annotated[bool, Option("--keys", help="The key store of an encrypted storage instead.")] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> int:
    """Copy the storage to a directory, while servers run."""
    from proxy import backup

    return backup.run(_config(config), directory, keys, as_json)


# ---------------------------------------------------------------- lose it


def _erased(kind: "Kind", whose: Whose, config: Path | None, yes: bool, as_json: bool, name: str = "", page: str = "") -> int:
    from proxy import forget

    return forget.run(forget.What(kind, name, page), whose, _config(config), yes, as_json)


@_forget.command("conversation")
@_of_somebody
def _forget_conversation(whose: Whose, id: Conversation, config: ConfigFile = None, yes: Yes = False, as_json: AsJson = False) -> int:
    """All of a conversation, with its branches."""
    return _erased("conversation", whose, config, yes, as_json, id)


@_forget.command("message")
@_of_somebody
def _forget_message(
    whose: Whose,
    id: Conversation,
    page: Annotated[str, Argument(metavar="PAGE", help="As show, search and the model have it, such as msg_0042.")],
    config: ConfigFile = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> int:
    """One message, wherever its conversation says the same."""
    return _erased("message", whose, config, yes, as_json, id, page)


@_forget.command("user")
@_of_somebody
def _forget_user(whose: Whose, config: ConfigFile = None, yes: Yes = False, as_json: AsJson = False) -> int:
    """All conversations of a user of a credential."""
    return _erased("user", whose, config, yes, as_json)


@_forget.command("key")
@_of_somebody
def _forget_key(whose: Whose, config: ConfigFile = None, yes: Yes = False, as_json: AsJson = False) -> int:
    """All that is stored of a credential, and of all of its users."""
    return _erased("key", whose, config, yes, as_json)


app.add_typer(_forget, name="forget")


# ---------------------------------------------------------------- keys


@app.command("api-key")
def api_key(as_json: AsJson = False) -> int:
    """Make a key for server.keys or server.admin_key, and its hash."""
    from proxy.api_key import key_hash, new_key

    key = new_key()
    if as_json:
        from proxy.terminal import tell_json

        tell_json({"key": key, "hash": key_hash(key)})
    else:
        print(f"key   {key}\nhash  {key_hash(key)}")
    return 0


@_keys.command("list")
def _keys_list(
    values: Annotated[bool, Option("--values", help="Count the stored values, too; reads all of them.")] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> int:
    """Count them."""
    from proxy import keyring

    return keyring.list_(_config(config), values, as_json)


@_keys.command("rotate")
def _keys_rotate(
    rewrite: Annotated[bool, Option("--rewrite", help="And rewrite.")] = False, config: ConfigFile = None, as_json: AsJson = False
) -> int:
    """Wrap all with the first master key; new keys from now on.

    The first of storage.encryption.keys; each tenant has a new key for what is stored from now on."""
    from proxy import keyring

    return keyring.rotate(_config(config), rewrite, as_json)


@_keys.command("rewrite")
def _keys_rewrite(config: ConfigFile = None, as_json: AsJson = False) -> int:
    """Encrypt again what is stored under older keys or not at all."""
    from proxy import keyring

    return keyring.rewrite(_config(config), as_json)


app.add_typer(_keys, name="keys")

if __name__ == "__main__":
    sys.exit(main())
