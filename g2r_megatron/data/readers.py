"""Files of every supported rubric format to ``Query`` objects; each row is validated, each mistake names its place.

Formats (field names verbatim from the public data sets; * marks what may be missing):

- ``g2r``: ``{"id"*, "prompt": str | [{role, content}], "rubric": [{"criterion", "weight", "tags"*, "check"*}],
  "reference"*}``
- ``healthbench``: ``{"prompt", "prompt_id"*, "rubrics": [{"criterion", "points", "tags"*}],
  "ideal_completions_data"*}``, or as in verl-based projects ``"reward_model": {"ground_truth"*, "rubrics"}`` instead of
  ``"rubrics"``
- ``rar`` (RaR-Medicine and -Science): ``{"question", "rubric": [{"description", "title"*, "weight"}],
  "reference_answer"*}``
- ``researchqa``: ``{"id"*, "query", "rubric": [{"rubric_item", "type"*}]}``, every item with weight 1

The rubric may be missing where a reward model judges. Rows to be judged also have ``"response"``. Files are .jsonl or .parquet.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow
import pyarrow.parquet

from g2r_megatron.data.types import Query, RubricItem
from g2r_megatron.errors import UserError

ROLES = ("system", "user", "assistant")
# "does not ..." opening a criterion, after a title such as RaR's "Pitfall Criteria:"
NEGATED = re.compile(
    r"^\s*(\w+ criteria:\s*)?(does\s+not|doesn['’]t|do\s+not|don['’]t|never|avoids?|refrains?)\b", re.IGNORECASE
)
SHOWN_VALUE = 60


def read_queries(
    paths: list[str], format: str, polarity: str, require_response: bool = False, require_rubric: bool = True
) -> list[Query]:
    """All queries of the files, in order.

    ``format``: ``auto`` (by the field names of each file's first row) or a format of the module docstring.
    ``polarity``: ``raw`` keeps weights as they are; ``flip_negated`` makes those of pitfalls phrased "does not ..."
    positive. It is for data where meeting such an item is good (RaR-Science), and goes by the phrase alone, so look at
    the items: in HealthBench "does not mention ..." is a fault when met, so there the option is refused.
    ``require_response``: rows must have a ``"response"``, ignored otherwise; one query may then come with several.
    ``require_rubric``: else rows may lack it (``Query.rubric`` is then empty).
    An id is the row's own, else a hash of its prompt. Raises ``UserError`` for any mistake, naming file and row.
    """
    queries: list[Query] = []
    seen: dict[tuple, str] = {}
    for path in paths:
        read = None
        for where, data in _rows(Path(path)):
            row = Fields(where, "", data)
            if read is None:
                read = FORMATS[_file_format(row, format, polarity, require_rubric)]
            query = read(row, require_rubric)
            if polarity == "flip_negated":
                query = replace(query, rubric=tuple(_flip_negated(item) for item in query.rubric))
            if query.rubric and query.positive_weight <= 0:
                raise UserError(
                    where, "no rubric item has a positive weight", "the score divides by their sum: give at least one"
                )
            if require_response:
                query = replace(query, response=row.text("response"))
            key = (query.id, query.response)
            if key in seen:
                raise UserError(where, f"id {query.id!r} is also at {seen[key]}", "ids must be unique")
            seen[key] = where
            queries.append(query)
        if read is None:
            raise UserError(path, "no rows", "give a file with at least one query")
    return queries


def _flip_negated(item: RubricItem) -> RubricItem:
    return replace(item, weight=-item.weight) if item.weight < 0 and NEGATED.match(item.criterion) else item


# ---- files to rows --------------------------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    """``(place, row)`` pairs; the place is "file:line" or "file:row n", counted from 1."""
    if not path.is_file():
        raise UserError(str(path), "no such file", "give existing .jsonl or .parquet files")
    if path.suffix == ".jsonl":
        return _jsonl_rows(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    raise UserError(str(path), f"unknown extension {path.suffix!r}", "files must be .jsonl or .parquet")


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, _json_object(where, line)
    except OSError as error:
        raise UserError(
            str(path), f"cannot be read ({error.strerror})", "check the file and its permissions"
        ) from error


def _json_object(where: str, line: bytes) -> dict:
    try:
        data = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(where, f"not UTF-8 (byte {error.start})", "save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(where, f"not JSON ({error})", "each line must be one JSON object") from error
    if not isinstance(data, dict):
        raise UserError(where, f"{_shown(data)} is not an object", "each line must be one JSON object")
    return data


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            str(path), f"not a readable parquet file ({error})", "write it again with pyarrow or pandas"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{path}:row {number}", row


# ---- rows to queries ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fields:
    """One JSON object of a row with typed access; ``where`` is its file and row, ``path`` its place in the row."""

    where: str
    path: str
    data: dict

    def has(self, name: str) -> bool:
        """The field is there and not null (parquet writes null for a missing field)."""
        return self.data.get(name) is not None

    def fail(self, name: str, remedy: str) -> UserError:
        found = f"{self.path}{name} is {_shown(self.data[name])}" if self.has(name) else f"{self.path}{name} is missing"
        return UserError(self.where, found, remedy)

    def text(self, name: str) -> str:
        value = self.data.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self.fail(name, "it must be a text that is not empty")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.fail(name, f"it must be valid Unicode ({error.reason})") from error
        return value

    def optional_text(self, name: str) -> str | None:
        return self.text(name) if self.data.get(name) not in (None, "") else None

    def identifier(self, name: str) -> str | None:
        """An optional id; whole numbers count."""
        return str(self.data[name]) if type(self.data.get(name)) is int else self.optional_text(name)

    def number(self, name: str) -> float:
        value = self.data.get(name)
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:  # NaN compares false
            raise self.fail(name, "it must be a finite number")
        return float(value)

    def object(self, name: str) -> "Fields":
        if not isinstance(self.data.get(name), dict):
            raise self.fail(name, "it must be an object")
        return Fields(self.where, f"{self.path}{name}.", self.data[name])

    def objects(self, name: str) -> list["Fields"]:
        values = self.data.get(name)
        if not isinstance(values, list) or not values:
            raise self.fail(name, "it must be a list of objects that is not empty")
        for i, value in enumerate(values):
            if not isinstance(value, dict):
                raise UserError(self.where, f"{self.path}{name}[{i}] is {_shown(value)}", "it must be an object")
        return [Fields(self.where, f"{self.path}{name}[{i}].", value) for i, value in enumerate(values)]

    def rubric(self, name: str, required: bool) -> list["Fields"]:
        """The items of a rubric; none where there may be none."""
        return self.objects(name) if required or self.has(name) else []

    def tags(self, name: str) -> tuple[str, ...]:
        """An optional list of texts, or one text."""
        value = self.data.get(name)
        values = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(tag, str) for tag in values):
            raise self.fail(name, "it must be a list of texts")
        return tuple(values)


def _file_format(row: Fields, wanted: str, polarity: str, require_rubric: bool) -> str:
    """The format of the file that begins with ``row``; it must be the wanted one, and go with the polarity."""
    # without a rubric a row says less: only where nobody has named the format
    signatures = SIGNATURES if require_rubric or wanted != "auto" else SIGNATURES + WITHOUT_RUBRIC
    found = next((name for name, fields in signatures if all(row.has(field) for field in fields)), None)
    if wanted == "auto" and found is None:
        raise UserError(
            row.where, f"fields {sorted(row.data)} fit no format", f"set data.format to one of {', '.join(FORMATS)}"
        )
    if wanted != "auto" and found not in (None, wanted):
        raise UserError(
            row.where, f"data.format is {wanted}, but the fields are {found}'s", f"set it to auto or {found}"
        )
    name = found if wanted == "auto" else wanted
    if name == "healthbench" and polarity == "flip_negated":
        raise UserError(
            "data.polarity",
            f"flip_negated, but {row.where} is HealthBench",
            "set it to raw: a met item with negative points is a fault",
        )
    return name


def _query(
    row: Fields, id: str | None, messages: tuple[dict, ...], rubric: list[RubricItem], reference: str | None
) -> Query:
    if id is None:
        id = hashlib.sha1(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:16]
    return Query(id, messages, tuple(rubric), reference)


def _messages(row: Fields, name: str) -> tuple[dict, ...]:
    """A conversation given as one text (a single user message) or as ``[{role, content}]`` that ends with the user."""
    if isinstance(row.data.get(name), str):
        return ({"role": "user", "content": row.text(name)},)
    messages = row.objects(name)
    for message in messages:
        if message.text("role") not in ROLES:
            raise message.fail("role", f"it must be one of {', '.join(ROLES)}")
    if messages[-1].data["role"] != "user":
        raise messages[-1].fail("role", "the last message must be the user's: the response comes after it")
    return tuple({"role": message.data["role"], "content": message.text("content")} for message in messages)


def _read_g2r(row: Fields, require_rubric: bool) -> Query:
    rubric = [
        RubricItem(item.text("criterion"), item.number("weight"), item.tags("tags"), _check(item))
        for item in row.rubric("rubric", require_rubric)
    ]
    return _query(row, row.identifier("id"), _messages(row, "prompt"), rubric, row.optional_text("reference"))


def _check(item: Fields) -> str | None:
    pattern = item.optional_text("check")
    if pattern is not None:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise item.fail("check", f"it must be a regular expression ({error})") from error
    return pattern


def _read_healthbench(row: Fields, require_rubric: bool) -> Query:
    if row.has("rubrics") or not row.has("reward_model"):
        source, reference = row, None
        if row.has("ideal_completions_data"):
            reference = row.object("ideal_completions_data").optional_text("ideal_completion")
    else:
        source = row.object("reward_model")
        reference = source.optional_text("ground_truth")
    items = source.rubric("rubrics", require_rubric)
    rubric = [RubricItem(i.text("criterion"), i.number("points"), i.tags("tags")) for i in items]
    return _query(row, row.identifier("prompt_id"), _messages(row, "prompt"), rubric, reference)


def _read_rar(row: Fields, require_rubric: bool) -> Query:
    items = row.rubric("rubric", require_rubric)
    rubric = [RubricItem(i.text("description"), i.number("weight"), i.tags("title")) for i in items]
    messages = ({"role": "user", "content": row.text("question")},)
    return _query(row, None, messages, rubric, row.optional_text("reference_answer"))


def _read_researchqa(row: Fields, require_rubric: bool) -> Query:
    items = row.rubric("rubric", require_rubric)
    rubric = [RubricItem(i.text("rubric_item"), 1.0, i.tags("type")) for i in items]
    messages = ({"role": "user", "content": row.text("query")},)
    return _query(row, row.identifier("id"), messages, rubric, None)


FORMATS = {"g2r": _read_g2r, "healthbench": _read_healthbench, "rar": _read_rar, "researchqa": _read_researchqa}
# the fields by which a first row is recognised
SIGNATURES = [
    ("healthbench", ("prompt", "rubrics")),
    ("healthbench", ("prompt", "reward_model")),
    ("rar", ("question", "rubric")),
    ("researchqa", ("query", "rubric")),
    ("g2r", ("prompt", "rubric")),
]
WITHOUT_RUBRIC = [("rar", ("question",)), ("researchqa", ("query",)), ("g2r", ("prompt",))]


def _shown(value) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_VALUE else text[: SHOWN_VALUE - 3] + "..."
