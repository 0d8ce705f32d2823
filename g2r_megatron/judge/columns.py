"""The output of ``g2r judge`` as a Parquet file, whose columns ``datasets.load_dataset("parquet", data_files=...)`` loads.

Every column has one type, which the first row does not decide but for ``id`` (text or number, as the rows have it). What
a row had of its own can be anything: it is JSON in the column ``given``. Columns: docs/judges.md.
"""

import json
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import BinaryIO

import pyarrow as pa
from pyarrow import parquet

from g2r_megatron.config.command_options import OutputFormat
from g2r_megatron.data.types import Query
from g2r_megatron.errors import UserError

ROWS_AT_ONCE = 1000
ID_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64()}
NUMBERS, TEXT, NUMBER = pa.list_(pa.float64()), pa.string(), pa.float64()
MESSAGES = pa.list_(pa.struct({"role": TEXT, "content": TEXT}))
OF_TOKENS = {"attribution": NUMBERS, "alpha": NUMBERS}
VERDICT = {"criterion": TEXT, "weight": NUMBER, "p_true": NUMBER, "p_false": NUMBER, "verdict": pa.bool_()}
ITEM = VERDICT | OF_TOKENS
FOR_TRL = {
    "prompt": MESSAGES,
    "completion": MESSAGES,
    "completion_ids": pa.list_(pa.int64()),
    "rubric": pa.list_(pa.struct({"criterion": TEXT, "weight": NUMBER})),
}


def check_ids(ids: Sequence[str | int | float]) -> None:
    """Raise ``UserError`` for ids that no one column can hold as they are."""
    kinds = {type(id) for id in ids}
    if len(kinds) > 1 or any(isinstance(id, int) and abs(id) >= 2**63 for id in ids):
        found = f"{' and '.join(sorted(kind.__name__ for kind in kinds))} as ids"
        raise UserError("format_out", found, "a column has one type: use texts, or format_out jsonl")


def fields_for_trl(query: Query, body: Sequence[int]) -> dict:
    """What TRL's trainers read of a row, beside the credit. ``body``: ids of the response, in the judge's tokens."""
    return {
        "prompt": [*query.messages],
        "completion": [{"role": "assistant", "content": query.response}],
        "completion_ids": [*body],
        "rubric": [{"criterion": item.criterion, "weight": item.weight} for item in query.rubric],
    }


def write_parquet(lines: Iterable[bytes], target: BinaryIO, format_out: OutputFormat) -> None:
    """Write output lines of ``g2r judge``, at least one, as the columns of ``format_out``."""
    records = map(json.loads, lines)
    first = next(records)
    columns = columns_of(first, format_out)
    schema, rest = pa.schema(columns), chain([first], records)
    with parquet.ParquetWriter(target, schema, compression="zstd") as writer:
        while rows := [in_columns(record, columns) for record in islice(rest, ROWS_AT_ONCE)]:
            writer.write_table(pa.Table.from_pylist(rows, schema))


def columns_of(record: dict, format_out: OutputFormat) -> dict[str, pa.DataType]:
    """Name -> type of each column of a file whose rows are like ``record``."""
    credit = {"items": pa.list_(pa.struct(ITEM | {"given": TEXT}))} if "items" in record else OF_TOKENS
    return {
        "id": ID_TYPES[type(record["id"])],
        "choice": pa.int64(),
        **(FOR_TRL if format_out == "trl" else {}),
        "reward": NUMBER,
        "tokens": pa.list_(TEXT),
        "token_rewards": NUMBERS,
        **credit,
        "given": TEXT,
    }


def in_columns(record: dict, columns: dict[str, pa.DataType]) -> dict:
    """An output line with what it has beside ``columns`` as JSON in ``given``."""
    row = _with_given(record, columns)
    if "items" in record:
        row["items"] = [_with_given(item, ITEM) for item in record["items"]]
    return row


def _with_given(record: dict, names: Iterable[str]) -> dict:
    ours = {name: record.get(name) for name in names if name != "given"}
    rest = {name: value for name, value in record.items() if name not in ours}
    return ours | {"given": json.dumps(rest) if rest else None}
