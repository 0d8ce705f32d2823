"""Options that had other names, or are gone: accepted on the command line and in config files, with one warning each."""

import os
import sys
from pathlib import Path
from typing import Any

import yaml

# old option -> (new option, {old value: new value})
RENAMED: dict[str, tuple[str, dict[str, str]]] = {
    "judge.pool": ("judge.smoothing", {}),
    "data.eval": ("eval.data", {}),
    "eval_every": ("eval.every", {}),
    "eval_responses": ("eval.samples", {}),
    "eval_greedy": ("eval.greedy", {}),
    "judge.pooling": ("judge.credit", {"item": "per_item", "response": "per_response"}),
}
# options without a successor -> what holds now
REMOVED = {"judge.sentence_delimiters": "sentences of any language are found by rules (docs/credit.md)"}


def with_new_names(argv: list[str]) -> list[str]:
    """``argv`` (options as ``--name VALUE`` or ``--name=VALUE``) with new names for old ones and without removed ones.

    Also in its ``--config`` files: one with old names is replaced by its content. Prints one warning for each old name.
    """
    found: dict[str, str] = {}
    result: list[str] = []
    previous = ""
    for argument in argv:
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and name in RENAMED:
            new, values = RENAMED[name]
            found[name] = new
            argument = f"--{new}{equals}{values.get(value, value)}"
        elif argument.startswith("--") and name in REMOVED:
            found[name] = ""
            previous = "" if equals else name
            continue
        elif previous in REMOVED and not argument.startswith("--"):
            previous = ""
            continue
        elif previous in RENAMED:
            argument = RENAMED[previous][1].get(argument, argument)
        elif previous == "config" and not argument.startswith("--"):
            argument = _file_with_new_names(argument, found)
        elif argument.startswith("--config="):
            argument = "--config=" + _file_with_new_names(value, found)
        previous = name if argument.startswith("--") and not equals else ""
        result.append(argument)
    for old, new in found.items() if os.environ.get("RANK", "0") == "0" else ():
        change = f"is called {new} now" if new else f"has no effect any more: {REMOVED[old]}"
        print(f"warning: {old} {change}", file=sys.stderr)
    return result


def _file_with_new_names(path: str, found: dict[str, str]) -> str:
    """``path``, or the file's content as YAML on one line if it has old names, which are added to ``found``."""
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    old = [name for name in [*RENAMED, *REMOVED] if _section(content, name) is not None]
    for name in old:
        value = (_section(content, name) or {}).pop(name.rpartition(".")[2])
        new, values = RENAMED.get(name, ("", {}))
        if not new:
            found[name] = ""
            continue
        if (section := _section(content, new, make=True)) is not None:
            section[new.rpartition(".")[2]] = values.get(value, value) if isinstance(value, str) else value
        found[name] = new
    return yaml.safe_dump(content, default_flow_style=True, width=sys.maxsize) if old else path


def _section(content: Any, option: str, make: bool = False) -> dict[str, Any] | None:
    """The mapping in ``content`` that holds ``option``; None if there is none, unless it is to be made."""
    *sections, last = option.split(".")
    for section in sections:
        content = content.setdefault(section, {}) if make else content.get(section)
        if not isinstance(content, dict):
            return None
    return content if make or last in content else None
