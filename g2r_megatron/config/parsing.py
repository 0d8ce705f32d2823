"""A config dataclass from the command line and a YAML file; every mistake is one ``UserError`` naming the option."""

import argparse
import difflib
import json
import os
import re
import types
from collections.abc import Hashable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from g2r_megatron.config.help import GUIDES, apply_guide
from g2r_megatron.config.renamed import with_new_names
from g2r_megatron.errors import UserError

Config = TypeVar("Config")

WRONG_VALUE = re.compile(
    r'Parser key "(?P<key>[\w.]+)":.*?(?:Got value:|Given value:|Unable to load config)\s*(?P<value>.*)', re.S
)
UNKNOWN_ARGUMENT = re.compile(r"unrecognized arguments: (?P<key>\S+)", re.S)
UNKNOWN_KEY = re.compile(r"(?:Group '(?P<group>[\w.]+)' does not accept option|Option) '(?P<key>[^']+)'")
NO_VALUE = re.compile(r"argument (?P<key>\S+): (?P<problem>expected .*)", re.S)
SHOWN_VALUE = 60
WRITTEN = {"output_dir", "output"}  # paths of ours; "~" is the home directory in those that are read, too


def build_parser(config_class: type, prog: str) -> ArgumentParser:
    """Options of every field, nested ones as ``--section.name``; help is the text under each field."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of options; later options override it")
    parser.add_class_arguments(config_class)
    for action in parser._actions:  # a switch given without a value is turned on
        if type_of(config_class, action.dest) is bool:
            action.nargs, action.const = "?", True
    if prog in GUIDES:
        apply_guide(parser, GUIDES[prog])
    return parser


def parse(config_class: type[Config], prog: str, argv: list[str]) -> Config:
    """The config that ``argv`` asks for. ``-`` in option names counts as ``_``.

    Raises ``UserError`` for unknown options, wrong values and files that are not YAML; ``SystemExit`` (0) after
    ``--help`` and ``--print_config``.
    """
    argv = [_with_underscores(argument) for argument in argv]
    parser = build_parser(config_class, prog)
    for path in _config_files(argv):
        check_config_file(config_class, path)
    argv = with_new_names(argv)
    try:
        values = vars(parser.instantiate(parser.parse_args(argv)))
    except argparse.ArgumentError as error:
        raise explained(config_class, prog, str(error)) from error
    for name in WRITTEN & values.keys():  # a YAML file knows no shell that would do it
        values[name] = os.path.expanduser(values[name])
    return config_class(**{name: value for name, value in values.items() if name != "config"})


def with_lists(argv: list[str], options: tuple[str, ...]) -> list[str]:
    """``argv`` in which several plain values after one of ``options`` are one list, as the shell expands a pattern."""
    result: list[str] = []
    values: list[str] = []

    def close() -> None:
        if values:
            whole = len(values) == 1 and values[0].startswith("[")
            result.append(values[0] if whole else json.dumps(values))
            values.clear()

    collecting = False
    for argument in argv:
        if argument.startswith("--"):
            close()
            name, equals, value = argument[2:].partition("=")
            collecting = name in options and not equals
            if name in options and equals and not value.startswith("["):
                argument = f"--{name}={json.dumps([value])}"
            result.append(argument)
        else:
            (values if collecting else result).append(argument)
    close()
    return result


def _with_underscores(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _config_files(argv: list[str]) -> list[str]:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", action="append", nargs="?", default=[])
    return [path for path in finder.parse_known_args(argv)[0].config if path is not None]


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a repeated key is an error: the last one would win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.MarkedYAMLError(problem=f"{key!r} is there twice", problem_mark=node.value[i][0].start_mark)
        return super().construct_mapping(node, deep)


def check_config_file(config_class: type, path: str) -> None:
    """Raise ``UserError`` unless ``path`` is a readable YAML file of sections and options."""
    if not Path(path).is_file():
        raise UserError("--config", f"{path} is not a file", "give an existing YAML file")
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeyLoader)
    except UnicodeDecodeError as error:
        raise UserError(path, f"not UTF-8 (byte {error.start})", "save the file as UTF-8") from error
    except OSError as error:
        raise UserError(path, f"cannot be read ({error.strerror})", "check its permissions") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}", f"not YAML ({error.problem})", "correct the line") from error
    except yaml.YAMLError as error:
        raise UserError(path, f"not YAML ({error})", "correct the file") from error
    if not isinstance(content, dict):
        raise UserError(path, f"holds {_shown(content)}", "a config file is a list of `option: value` lines")
    for name, value in content.items():
        kind = type_of(config_class, name)
        if value is None and types.NoneType not in get_args(kind):
            raise UserError(f"{path} {name}", "has no value", "give it one, or remove the line")


# ---- jsonargparse's messages, in one line of ours ------------------------------------------------------------------


def explained(config_class: type, prog: str, message: str) -> UserError:
    """The ``UserError`` that says what jsonargparse's ``message`` says, with the valid values of the option."""
    if match := WRONG_VALUE.search(message):
        kind = type_of(config_class, match["key"])
        value = match["value"].split("\n")[0].strip("'\"")
        return UserError(match["key"], _shown(value) if value else "no value", f"must be {described(kind)}")
    if match := UNKNOWN_ARGUMENT.search(message):
        if not match["key"].startswith("-"):
            return UserError(prog, f"unexpected argument {match['key']!r}", "options are given as --name value")
        return unknown_option(config_class, prog, match["key"].partition("=")[0].lstrip("-"))
    if match := UNKNOWN_KEY.search(message):
        return unknown_option(config_class, prog, ".".join(filter(None, [match["group"], match["key"]])))
    if match := NO_VALUE.search(message):
        kind = type_of(config_class, match["key"].lstrip("-"))
        return UserError(match["key"], "no value given", f"must be {described(kind)}")
    return UserError(prog, " ".join(message.split()), f"see {prog} --help")


def unknown_option(config_class: type, prog: str, name: str) -> UserError:
    """The error for an option that does not exist, with the nearest ones that do."""
    names = list(option_names(config_class))
    last = name.rpartition(".")[2]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    near = near or [option for option in names if option.rpartition(".")[2] == last]
    remedy = f"did you mean {' or '.join(near)}?" if near else f"{prog} --help lists every option"
    return UserError(name, "no such option", remedy)


def option_names(config_class: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all options, sections left out."""
    for name, kind in get_type_hints(config_class).items():
        if is_dataclass(kind):
            yield from option_names(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def type_of(config_class: type, option: str) -> Any:
    """The type of a dotted option, or None if there is no such option."""
    kind: Any = config_class
    for name in option.split("."):
        kind = get_type_hints(kind).get(name) if is_dataclass(kind) else None
    return kind


def described(kind: Any) -> str:
    """What values of a type look like, for a reader who does not know Python."""
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(described(part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is list:
        (part,) = get_args(kind)
        if get_origin(part) is Literal:
            choices = [str(choice) for choice in get_args(part)]
            return f"a list, such as [{', '.join(choices[:2])}], of {', '.join(choices)}"
        return (
            """a list of quoted texts, such as '["a", "b"]'""" if part is str else "a list of numbers, such as [0.5, 1]"
        )
    if get_origin(kind) is dict:
        return "a mapping, such as {enable_thinking: false}"
    if is_dataclass(kind):
        return "a section of options, or a YAML file of them"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}
    return names.get(kind, "a file")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_VALUE else text[: SHOWN_VALUE - 3] + "..."
