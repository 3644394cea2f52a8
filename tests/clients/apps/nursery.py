"""Runs a Python program again and again, each time in a fork of one process that has imported what it imports.

    python nursery.py PROGRAM MODULE..., then a line of JSON for each run: {"dir", "env", "arguments", "in", "out", "err"}

The modules are those that it imports later. The last three of a run are files; what is printed after it is its exit code.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import importlib
import json
import os
import runpy
import sys
import threading
from pathlib import Path

program = sys.argv[1]
for statement in ast.parse(Path(program).read_text()).body:
    module = statement.module if isinstance(statement, ast.ImportFrom) else None
    for name in [module] if module else [one.name for one in getattr(statement, "names", ())]:
        if name not in ("common", "__future__"):  # the first reads the run's own input
            importlib.import_module(name)
for name in sys.argv[2:]:
    importlib.import_module(name)


def run(asked: dict[str, object]) -> int:
    """The exit code, as the interpreter has it."""
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["dir"])
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for at, (file, how) in enumerate(((asked["in"], os.O_RDONLY), (asked["out"], flags), (asked["err"], flags))):
        os.dup2(os.open(file, how, 0o600), at)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - for the whole run
    sys.argv = [program, *asked["arguments"]]
    code: object = 0
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 - as the interpreter does
        sys.excepthook(*sys.exc_info())
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return code if isinstance(code, int) else int(code is not None)


for line in sys.stdin:
    if (pid := os.fork()) == 0:
        os._exit(run(json.loads(line)))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
