"""Typed access to the fields of one row: every mistake is a ``UserError`` that names the place, the field and its value."""

import ast
import json
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from g2r_megatron.data.files import shown
from g2r_megatron.errors import UserError

# What a conversation or a rubric looks like when it was written into a text (JSON, Python, numpy); also one cut short.
STRUCTURE_IN_TEXT = re.compile(
    r"""\s*(?:array\(|\[|\(|\s)*\{\s*(?=['"])(?=.*['"](?:role|from|content|value|messages|criterion|description)['"]\s*:)"""
    r"""|\s*\[?\s*[A-Z]\w*\((?:role|content)=""",
    re.DOTALL,
)
# How pandas and numpy spell a missing value
MISSING = ("nan", "NaN", "<NA>", "NaT")


def decoded(value):
    """A text that spells a list or an object (JSON, or Python as pandas writes it into CSV) as that; else ``value``."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if (text[:1], text[-1:]) not in (("[", "]"), ("{", "}")):
        return value
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if not STRUCTURE_IN_TEXT.match(text):
        return value
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def lookup(data: dict, path: str):
    """The value at a dotted path, None if it is not there; texts on the way that spell an object are read as one."""
    if path in data or "." not in path:
        return data.get(path)
    value: Any = data
    for name in path.split("."):
        value = decoded(value)
        if isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        elif isinstance(value, dict):
            value = value.get(name)
        else:
            return None
    return value


@lru_cache(maxsize=4096)
def _candidates(keys: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``names`` that an object with ``keys`` can have: the objects of a file have few sets of keys."""
    return tuple(name for name in names if name in keys or name.partition(".")[0] in keys)


@dataclass(frozen=True, slots=True)
class Fields:
    """One JSON object of a row; ``where`` is its file and row, ``path`` its place in the row. Names may be dotted paths."""

    where: str
    path: str
    data: dict

    def get(self, name: str):
        return lookup(self.data, name)

    def has(self, name: str) -> bool:
        """The field is there and not null (parquet writes null for a missing field)."""
        return lookup(self.data, name) is not None

    def first(self, names: tuple[str, ...]) -> str | None:
        """The first of ``names`` that is there."""
        return next(iter(self.there(names)), None)

    def there(self, names: tuple[str, ...]) -> list[str]:
        """Those of ``names`` that are there, in their order."""
        data = self.data
        found = _candidates(tuple(data), names)
        return [name for name in found if (data[name] if name in data else lookup(data, name)) is not None]

    def fail(self, name: str, remedy: str) -> UserError:
        value = self.get(name)
        found = f"{self.path}{name} is {shown(value)}" if value is not None else f"{self.path}{name} is missing"
        return UserError(self.where, found, remedy)

    def nothing(self, what: str, names: tuple[str, ...]) -> UserError:
        """The error for an object in which none of ``names`` is there."""
        place = self.path.removesuffix(".") + ": " if self.path else ""
        found = f"{place}fields {shown(list(self.data))} hold no {what}"
        return UserError(self.where, found, f"give one of {', '.join(names)}, or map another name with data.fields")

    def text(self, name: str, may_be_blank: bool = False) -> str:
        value = self.data[name] if name in self.data else lookup(self.data, name)
        if not isinstance(value, str) or not (may_be_blank or value.strip()):
            raise self.fail(name, "it must be a text" if may_be_blank else "it must be a text that is not empty")
        if value in MISSING and not may_be_blank:
            raise self.fail(name, "it is how pandas writes a missing value: leave it empty or null")
        return self.valid(name, value)

    def valid(self, name: str, text: str) -> str:
        """``text`` itself. Raises ``UserError`` for half a surrogate pair, which no file can hold."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self.fail(name, f"it must be valid Unicode ({error.reason})") from error
        return text

    def optional_text(self, name: str) -> str | None:
        return self.text(name) if self.get(name) not in (None, "") else None

    def number(self, name: str) -> float:
        """A number, also one written as a text."""
        value = self.get(name)
        if isinstance(value, str):
            try:
                value = float(value.replace("_", " "))  # Python reads "1_0" as 10
            except ValueError:
                raise self.fail(name, "it must be a finite number") from None
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:  # NaN compares false
            raise self.fail(name, "it must be a finite number")
        return float(value)

    def objects(self, name: str) -> list["Fields"]:
        """A list of objects that is not empty; each may be spelled as a text."""
        values = decoded(self.get(name))
        if not isinstance(values, list) or not values:
            raise self.fail(name, "it must be a list of objects that is not empty")
        return [self.element(name, i, value) for i, value in enumerate(values)]

    def element(self, name: str, i: int, value) -> "Fields":
        """``value``, the element ``i`` of the list ``name``."""
        value = decoded(value)
        if not isinstance(value, dict):
            raise UserError(self.where, f"{self.path}{name}[{i}] is {shown(value)}", "it must be an object")
        return Fields(self.where, f"{self.path}{name}[{i}].", value)
