"""Files of rows to ``Query`` objects; every row is read and checked, bad ones are counted, named, and refused or skipped.

What files there can be is in files.py, what rows in rows.py (and conversations.py, rubrics.py, responses.py).
"""

import os
from collections.abc import Callable, Iterator

from g2r_megatron.data.fields import Fields
from g2r_megatron.data.files import find_files, read_rows
from g2r_megatron.data.rows import FORMATS, RowReader
from g2r_megatron.data.types import Query
from g2r_megatron.data.weights import WrongPolarity
from g2r_megatron.errors import UserError, warn

MAX_SKIPPED = 0.05  # of the rows: more are a mistake in the options or the files, not in single rows
NAMED = 50  # bad rows that a warning names


def read_queries(
    paths: list[str],
    format: str,
    polarity: str | None,
    require_response: bool = False,
    require_rubric: bool = True,
    fields: dict[str, str] | None = None,
    on_bad_row: str = "refuse",
    check: Callable[[Query], None] | None = None,
    queries: dict[str, Query] | None = None,
    criterion: str | None = None,
    may_lack_response: bool = False,
) -> list[Query]:
    """All queries of the files, in order.

    ``paths``: files, directories or glob patterns.
    ``format``: ``auto`` (every name of ``rows.NAMES``) or one of ``rows.FORMATS``; ``fields`` maps other names.
    ``polarity``: ``raw`` keeps weights as they are. ``flip_negated`` makes the weights of pitfalls phrased "does not ..."
    positive, for data where meeting such an item is good (RaR-Science). It looks at the phrase alone. In HealthBench "does
    not mention ..." is a fault when met, so there the option is refused. None is ``raw``, but refuses items that are called
    pitfalls and have no number.
    ``require_response``: the rows are to be judged, and each response gives one query. Ids and responses may recur, and a
    row may name one of ``queries`` (by id) instead of holding a conversation. With ``may_lack_response``, a row without a
    response gives a query without one, whose id may be there once. Without ``require_response`` every id may be there once.
    ``require_rubric``: if false, rows may lack a rubric (``Query.rubric`` is then empty).
    ``check`` may raise ``UserError`` for a query. ``criterion``: rows with an answer and no rubric are taken, with this as
    their rubric's only item. An id is the row's own, else a hash of its conversation.

    Raises ``UserError`` naming the first bad row and the number of bad rows; with ``on_bad_row`` "skip" up to 5% of the
    rows are left out with a warning instead.
    """
    reader = RowReader(
        *(format, polarity, fields or {}, require_rubric, require_response, criterion),
        may_lack_response=may_lack_response,
    )
    bad = BadRows(paths, on_bad_row)
    seen: dict[str, str] = {}
    result: list[Query] = []
    for where, data in _all_rows(paths, reader):
        bad.total += 1
        try:
            if isinstance(data, UserError):
                raise data
            row = Fields(where, "", data)
            _check_format(row, format, reader, queries is None)
            found = reader.judged(row, queries) if require_response else [reader.query(row)]
            for query in found:
                if query.response is None:
                    _check_new(row, reader, query, seen)
                if check is not None:
                    check(query)
            result += found
        except WrongPolarity:
            raise
        except UserError as error:
            bad.add(where, data, reader, error)
    bad.settle()
    reader.settle(joined=queries is not None)
    if reader.answers:
        warn(
            f"{reader.answers} conversations end with the assistant's answer: it is no part of the prompt, but its reference"
        )
    return result


def _all_rows(paths: list[str], reader: RowReader) -> Iterator[tuple[str, dict | UserError]]:
    for path in paths:
        rows = 0
        for file in find_files(path):
            for row in read_rows(file, reader.is_row):
                rows += 1
                yield row
        if not rows:
            raise UserError(path, "no rows", "give a file with at least one query")


def _check_format(row: Fields, format: str, reader: RowReader, has_prompt: bool) -> None:
    """Raise ``UserError`` if a row has the fields of another format than the one that was named."""
    if format in ("auto", "verifiable") or not has_prompt:
        return
    wanted = ["prompt", "rubric"] if reader.require_rubric else ["prompt"]
    if all(row.first(reader.names[role]) for role in wanted):
        return
    other = next((name for name, f in FORMATS.items() if all(row.first(f.get(role, ())) for role in wanted)), None)
    if other not in (None, format):
        raise UserError(
            row.where, f"data.format is {format}, but the fields are {other}'s", f"set it to auto or {other}"
        )


def _check_new(row: Fields, reader: RowReader, query: Query, seen: dict[str, str]) -> None:
    if query.id in seen:
        own = row.first(reader.names["id"])
        what = f"id {query.id!r}" if own else "the same conversation without an id"
        remedy = "ids must be unique" if own else "give rows of one conversation ids of their own, or remove the second"
        raise UserError(row.where, f"{what} is also at {seen[query.id]}", remedy)
    seen[query.id] = row.where


class BadRows:
    """The rows that cannot be used, and why."""

    def __init__(self, paths: list[str], on_bad_row: str):
        self.paths, self.on_bad_row = paths, on_bad_row
        self.total = 0
        self.first: UserError | None = None
        self.places: list[str] = []

    def add(self, where: str, data: dict | UserError, reader: RowReader, error: UserError) -> None:
        """``error`` says what is wrong with the row ``data`` at ``where``."""
        self.first = self.first or error
        id = ""
        if isinstance(data, dict):
            row = Fields(where, "", data)
            name = row.first(reader.names["id"])
            id = f"id {row.get(name)!r} at " if name else ""
        self.places.append(id + os.path.basename(where))

    def settle(self) -> None:
        """Raise ``UserError`` for the first bad row, or warn of those that are left out (rank 0)."""
        count = len(self.places)
        if not count:
            return
        names = ", ".join(self.places[:NAMED]) + (f" and {count - NAMED} more" if count > NAMED else "")
        of = f"{count} of {self.total} rows {'is' if count == 1 else 'are'} bad"
        if self.on_bad_row == "skip" and count <= MAX_SKIPPED * self.total:
            warn(f"{of} and left out: {names} (the first: {self.first})")
            return
        found, remedy = self.first.found, self.first.remedy
        if self.on_bad_row == "skip":
            found += f" ({of}, more than {MAX_SKIPPED:.0%}, which is the most that on_bad_row=skip leaves out: {names})"
        elif self.total > 1:
            found += f" ({of}: {names})" if count > 1 else f" ({of})"
            remedy += f", or leave up to {MAX_SKIPPED:.0%} of the rows out with on_bad_row=skip"
        raise UserError(self.first.where, found, remedy)
