"""Scripts of examples/, benchmarks/ and tools/ as modules. Their names repeat (``run``, ``task``), so none stays imported."""

import contextlib
import importlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def imported(script: str) -> Iterator[ModuleType]:
    """The module of a script (a path from the repository's root). Meanwhile its folder can be imported from, as when it is
    run, and processes that it starts find its functions under its name. Afterwards ``sys.modules`` is as before."""
    path = ROOT / script
    names = {file.stem for file in path.parent.glob("*.py")}
    before = {name: sys.modules.pop(name) for name in names & sys.modules.keys()}
    sys.path.insert(0, str(path.parent))
    try:
        yield importlib.import_module(path.stem)
    finally:
        sys.path.remove(str(path.parent))
        for name in names & sys.modules.keys():
            del sys.modules[name]
        sys.modules.update(before)


def load(script: str) -> ModuleType:
    """The module of a script that imports and starts nothing later."""
    with imported(script) as module:
        return module


def run_main(script: str, arguments: list[str]) -> str:
    """``main()`` of a script with these arguments; what it prints."""
    before, sys.argv = sys.argv, [script, *arguments]
    try:
        with imported(script) as module, contextlib.redirect_stdout(io.StringIO()) as printed:
            module.main()
    finally:
        sys.argv = before
    return printed.getvalue()
