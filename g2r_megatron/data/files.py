"""Files of rows on disk to plain dicts, each with the place it comes from.

JSON lines, JSON lists, Parquet, CSV, Arrow files; each also compressed with gzip or Zstandard; directories of them,
directories that Hugging Face ``datasets`` has saved, and glob patterns. Compression, Parquet and Arrow are known by a
file's first bytes.
"""

import csv
import glob
import gzip
import io
import itertools
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from g2r_megatron.data.stand_ins import refuse_stand_in, unfinished_download
from g2r_megatron.errors import UserError, warn

# A row, or the reason why there is none at its place.
Place = str
RowOrError = dict | UserError

KINDS = ".jsonl, .json, .parquet, .csv, .tsv or .arrow, also with .gz or .zst"
COMPRESSIONS = (".gz", ".zst")
SAVED_DATASET, SAVED_SPLITS = "state.json", "dataset_dict.json"
NOT_ROWS = {SAVED_DATASET, SAVED_SPLITS, "dataset_info.json", "dataset_infos.json"}
SPLIT = re.compile(r"(?:^|[-_. ])(train|test|validation|valid|val|dev|eval)(?=[-_. ])", re.IGNORECASE)
# First bytes of files that we read, whatever they are called, and of files that we do not read.
SIGNATURES = {b"PAR1": ".parquet", b"ARROW1": ".arrow"}
OTHER_FILES = {
    b"PK\x03\x04": "a zip archive or a workbook",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"7z\xbc\xaf": "a 7z archive",
    b"SQLite format 3": "an SQLite database",
    b"\x80\x04\x95": "a pickle file",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}
HEAD_BYTES = 64  # enough for all of them
URL = re.compile(r"^(https?|ftp|hf|s3|gs|gcs|az|abfss?|hdfs)://", re.IGNORECASE)
HUB_FILE = re.compile(
    r"^(?:hf://|https?://huggingface\.co/)(?:datasets/)([\w.-]+/[\w.-]+)(?:/(?:resolve|blob)/[^/]+)?(?:/(.+))?$"
)
HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
ROWS_AT_ONCE = 1000
SHOWN_VALUE = 60
BLANKS = re.compile(r"\s*")


def shown(value) -> str:
    """``value`` in an error message, shortened."""
    text = repr(value)
    return text if len(text) <= SHOWN_VALUE else text[: SHOWN_VALUE - 3] + "..."


def find_files(pattern: str) -> list[Path]:
    """The files that a path, directory or glob pattern stands for, in the order of their names.

    "~" is the home directory, and file:// may stand before a path. Raises ``UserError`` where there is none, or where a
    directory holds several splits.
    """
    given, pattern = pattern, os.path.expanduser(pattern.removeprefix("file://"))
    if not pattern:
        raise UserError(repr(given), "no path", f"give files of {KINDS}")
    path = Path(pattern)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _files_of_directory(path)
    _check_link(path)
    if URL.match(given) or not glob.has_magic(pattern):
        raise UserError(given, "no such file or directory", _how_to_get(given))
    found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    files = [file for file in found if file.is_file()]
    if not files:
        raise UserError(given, "no such file: the pattern matches none", f"give files of {KINDS}")
    return files


def _check_link(file: Path) -> None:
    if file.is_symlink() and not file.exists():
        raise UserError(str(file), f"a link to {os.readlink(file)}, which is not there", "restore or download the file")


def _how_to_get(given: str) -> str:
    """What to do about a path that is not on this machine."""
    if hub := HUB_FILE.match(given):
        return f"download it first: hf download --repo-type dataset {hub[1]}{' ' + hub[2] if hub[2] else ''} --local-dir DIR"
    if URL.match(given):
        return "it is an address: copy the file to this machine first, and give its path"
    if HUB_NAME.match(given) and not Path(given).parent.exists():
        remedy = f"if it is a data set of the Hugging Face Hub, download it: hf download --repo-type dataset {given} --local-dir DIR"
        return f"give a path on this machine ({KINDS}); {remedy}"
    return f"give a path on this machine ({KINDS}); a data set of the Hugging Face hub has to be downloaded first"


def _files_of_directory(directory: Path) -> list[Path]:
    if (directory / SAVED_SPLITS).is_file():
        splits = _json_file(directory / SAVED_SPLITS).get("splits") or []
        if len(splits) != 1:
            raise UserError(
                str(directory), f"a saved data set of splits {splits}", f"give one of them, such as {directory}/train"
            )
        return _files_of_directory(directory / splits[0])
    if (directory / SAVED_DATASET).is_file() and "_data_files" in (state := _json_file(directory / SAVED_DATASET)):
        return _saved_dataset(directory, state)
    files = _row_files(directory)
    if not files and (directory / "data").is_dir():  # as the hub lays data sets out
        return _files_of_directory(directory / "data")
    folders = _folders_of_rows(directory)
    if not files and folders:
        found = f"its files are in folders: {', '.join(folders)}"
        raise UserError(str(directory), found, f"give those that you mean, such as {directory}/{folders[-1]}")
    if not files:
        raise UserError(str(directory), "no such file in it", f"the directory must hold {KINDS} files")
    splits = sorted({match[1].lower() for file in files if (match := SPLIT.search(file.name))})
    if len(splits) > 1:
        remedy = f"give those that you mean, such as {directory}/*{splits[-1]}*"
        raise UserError(str(directory), f"it holds several splits: {', '.join(splits)}", remedy)
    if folders:
        warn(f"{directory}: files in its folders are not read ({', '.join(folders)})")
    if part := unfinished_download(directory):
        warn(f"{directory}: {part.name} is an unfinished download: rows may be missing")
    return files


def _row_files(directory: Path) -> list[Path]:
    """Files of rows right in ``directory``, in the order of their names."""
    files = sorted(file for file in directory.iterdir() if _kind(file) and file.name not in NOT_ROWS)
    files = [file for file in files if not file.name.startswith(".")]
    for file in files:
        _check_link(file)
    return [file for file in files if file.is_file()]


def _folders_of_rows(directory: Path) -> list[str]:
    """Names of the folders in ``directory`` that hold files of rows, at any depth."""
    folders = sorted(folder for folder in directory.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    return [
        folder.name
        for folder in folders
        if any(_kind(file) and file.name not in NOT_ROWS and file.is_file() for file in folder.rglob("*.*"))
    ]


def _saved_dataset(directory: Path, state: dict) -> list[Path]:
    """The Arrow files of a directory that ``datasets`` has saved, with the content of its state.json."""
    if state.get("_indices_files") or state.get("_indices_data_files"):
        remedy = "save it again after flatten_indices()"
        raise UserError(str(directory), "a saved data set with an index of chosen rows", remedy)
    return [directory / file["filename"] for file in state["_data_files"] or []]


def _json_file(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(str(path), f"not readable as JSON ({error})", "save the data set again") from error


def _kind(path: Path) -> str:
    """The extension that says what a file holds; "" if we do not read such files."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in (*JSON, *READERS) else ""


def read_rows(path: Path, is_row: Callable[[dict], bool]) -> Iterator[tuple[Place, RowOrError]]:
    """``(place, row)`` pairs; the place is "file:line" or "file:row n", counted from 1.

    ``is_row`` says of the only object in a file whether it is a row itself; else it may hold the list of the rows.
    A line that is no row comes as the ``UserError`` that says why. Raises ``UserError`` for a file that cannot be read.
    """
    if not path.is_file():
        raise UserError(str(path), "no such file", f"give existing {KINDS} files")
    kind = _kind(path)
    if not kind:
        raise UserError(str(path), f"unknown extension {path.suffix!r}", f"files must be {KINDS}")
    try:
        with path.open("rb") as raw:
            file = _decompressed(path, raw)
            kind = _kind_by_content(path, file) or kind
            yield from _json_rows(path, file, is_row) if kind in JSON else READERS[kind](path, file)
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, EOFError, zlib.error) as error:
        problem = getattr(error, "strerror", None) or error
        raise UserError(
            str(path), f"not a readable {kind[1:]} file ({problem})", "check that it is whole, and its permissions"
        ) from error


def _decompressed(path: Path, raw: io.BufferedReader) -> io.BufferedReader:
    head = raw.peek(HEAD_BYTES)[:HEAD_BYTES]
    if head[:2] == b"\x1f\x8b":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if head[:4] == b"\x28\xb5\x2f\xfd":
        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
        return io.BufferedReader(_Readable(stream))
    return raw


def _kind_by_content(path: Path, file: io.BufferedReader) -> str | None:
    """The kind that a file's first bytes tell, if they do. Raises ``UserError`` for files that hold no rows."""
    head = file.peek(HEAD_BYTES)[:HEAD_BYTES]
    refuse_stand_in(path, head)
    for beginning, what in OTHER_FILES.items():
        if head.startswith(beginning):
            raise UserError(str(path), f"is {what}", f"save the rows as {KINDS}, in UTF-8")
    return next((kind for beginning, kind in SIGNATURES.items() if head.startswith(beginning)), None)


class _Readable(io.RawIOBase):
    """A pyarrow stream as a raw Python file: pyarrow's own has no ``readline``."""

    def __init__(self, stream):
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


# ---- formats --------------------------------------------------------------------------------------------------------


def _json_rows(path: Path, file: BinaryIO, is_row: Callable[[dict], bool]) -> Iterator[tuple[Place, RowOrError]]:
    """JSON lines, or one JSON text: a list of objects, an object that holds one list of objects, or a single row.

    The content decides, not the extension: both kinds are published with both extensions. Objects of several lines each may follow one
    another, as jq prints them.
    """
    head, second = _first_lines(file)
    if not _opens_one_text(head) and (second or not _holds_rows(head, is_row)):
        yield from _json_lines(path, itertools.chain(head, second, file))
        return
    for number, row in enumerate(_objects_of_text(path, b"".join([*head, *second]) + file.read(), is_row), 1):
        where = f"{path}:row {number}"
        yield where, row if isinstance(row, dict) else _not_an_object(where, row, "each element")


def _first_lines(file: BinaryIO) -> tuple[list[bytes], list[bytes]]:
    """The lines up to the first that is not blank, and then up to the second (none if there is no second)."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for part in parts:
        for line in file:
            part.append(line)
            if line.strip():
                break
        else:
            part.clear()
    return parts


def _opens_one_text(head: list[bytes]) -> bool:
    """Whether a file's first line begins a list, or an object that later lines go on with."""
    line = head[-1] if head else b""
    first, last = line.lstrip(b"\xef\xbb\xbf \t")[:1], line.rstrip()[-1:]
    return first == b"[" or (first == b"{" and last in (b"{", b",", b"[") and _json(line.rstrip()[:-1]) is None)


def _holds_rows(head: list[bytes], is_row: Callable[[dict], bool]) -> bool:
    """Whether a file's only line is an object that holds the rows."""
    data = _json(head[-1]) if head else None
    return isinstance(data, dict) and (_is_columns(data) or (not is_row(data) and bool(_lists_of_objects(data))))


def _json(text: bytes):
    """What ``text`` spells; None if it is not JSON."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _objects_of_text(path: Path, content: bytes, is_row: Callable[[dict], bool]) -> list:
    """The rows of a text of JSON."""
    try:
        values = _values_of(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(str(path), f"not UTF-8 (byte {error.start})", "save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        remedy = "it must be JSON lines (one object a line) or a JSON list of objects"
        raise UserError(str(path), f"not JSON ({error})", remedy) from error
    if len(values) > 1:
        return values
    (data,) = values
    if not isinstance(data, dict):
        return data if isinstance(data, list) else values
    if _is_columns(data):
        found = f"an object of columns ({shown(sorted(data))}), as pandas writes by default"
        raise UserError(str(path), found, "write it with to_json(..., orient='records', lines=True)")
    if is_row(data):
        return values
    lists = _lists_of_objects(data)
    if len(lists) != 1:
        found = f"an object with {len(lists)} lists of objects (fields {shown(sorted(data))})"
        raise UserError(str(path), found, "it must hold one list of rows")
    return lists[0]


def _values_of(text: str) -> list:
    """The JSON values of a text that follow one another, at least one. Raises ``ValueError``."""
    decoder, values, end = json.JSONDecoder(object_pairs_hook=_object), [], BLANKS.match(text).end()
    while end < len(text) or not values:
        value, end = decoder.raw_decode(text, end)
        end = BLANKS.match(text, end).end()
        values.append(value)
        if end < len(text) and not isinstance(value, dict):
            raise json.JSONDecodeError("Extra data", text, end)
    return values


def _lists_of_objects(data: dict) -> list[list]:
    return [value for value in data.values() if isinstance(value, list) and value and isinstance(value[0], dict)]


def _is_columns(data: dict) -> bool:
    """Whether ``data`` is a table by columns, {column: {row number: value}}."""
    columns = list(data.values())
    if not columns or not all(isinstance(column, dict) and column for column in columns):
        return False
    return all(column.keys() == columns[0].keys() for column in columns) and all(key.isdecimal() for key in columns[0])


def _json_lines(path: Path, file: Iterable[bytes]) -> Iterator[tuple[Place, RowOrError]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, _json_line(where, line)


def _json_line(where: Place, line: bytes) -> RowOrError:
    try:
        data = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        return UserError(where, f"not UTF-8 (byte {error.start})", "save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        if line.rstrip().endswith(b",") and _json(line.rstrip()[:-1]) is not None:
            return UserError(where, "ends with a comma after its object", "each line must be one JSON object alone")
        return UserError(where, f"not JSON ({error})", "each line must be one JSON object")
    return data if isinstance(data, dict) else _not_an_object(where, data, "each line")


def _object(pairs: list[tuple]) -> dict:
    """A JSON object. Raises ``ValueError`` for a field that is there twice: readers differ in which one counts."""
    data = dict(pairs)
    if len(data) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return data


def _not_an_object(where: Place, data, what: str) -> UserError:
    return UserError(where, f"{shown(data)} is not an object", f"{what} must be one JSON object")


def _parquet_rows(path: Path, file: BinaryIO) -> Iterator[tuple[Place, RowOrError]]:
    if isinstance(file, gzip.GzipFile | io.BufferedReader) and not file.seekable():
        file = io.BytesIO(file.read())
    return _numbered(path, pyarrow.parquet.ParquetFile(file).iter_batches(ROWS_AT_ONCE))


def _arrow_rows(path: Path, file: BinaryIO) -> Iterator[tuple[Place, RowOrError]]:
    """The stream format, in which ``datasets`` saves, or the file format."""
    content = file.read()
    if content.startswith(b"ARROW1"):
        reader = pyarrow.ipc.open_file(content)
        return _numbered(path, (reader.get_batch(i) for i in range(reader.num_record_batches)))
    return _numbered(path, pyarrow.ipc.open_stream(content))


def _numbered(path: Path, batches) -> Iterator[tuple[Place, dict]]:
    rows = itertools.chain.from_iterable(_dicts(batch) for batch in batches)
    return ((f"{path}:row {number}", row) for number, row in enumerate(rows, 1))


def _dicts(batch: pyarrow.RecordBatch) -> list[dict]:
    """The rows of a batch; maps are objects, decimals are numbers."""
    try:
        rows = batch.to_pylist(maps_as_pydicts="strict")
    except KeyError as error:
        raise pyarrow.ArrowInvalid("a map has a key twice") from error
    return _without_decimals(rows) if "decimal" in str(batch.schema) else rows


def _without_decimals(value: Any) -> Any:
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, dict):
        return {key: _without_decimals(inner) for key, inner in value.items()}
    return [_without_decimals(inner) for inner in value] if isinstance(value, list) else value


def _csv_rows(path: Path, file: BinaryIO, delimiter: str = ",") -> Iterator[tuple[Place, RowOrError]]:
    """A header line, then rows of texts; an empty cell is a missing value."""
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    reader = csv.DictReader(text, delimiter=delimiter, strict=True)
    number = 0
    try:
        if len(reader.fieldnames or []) == 1 and re.search(r"[;\t|]", reader.fieldnames[0]):
            problem = f"its header {shown(reader.fieldnames[0])} is one column"
            raise UserError(str(path), problem, "separate columns with commas in .csv, with tabs in .tsv")
        names = list(reader.fieldnames or [])
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(
                str(path), f"its header has {', '.join(map(repr, twice))} twice", "give every column its own name"
            )
        for number, row in enumerate(reader, 1):
            where = f"{path}:row {number}"
            if None in row or None in row.values():
                yield where, UserError(where, "more or fewer cells than the header", "quote cells that hold commas")
            else:
                yield where, {name: value if value != "" else None for name, value in row.items()}
    except UnicodeDecodeError as error:
        raise UserError(str(path), f"not UTF-8 (byte {error.start})", "save the file as UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{path}:row {number + 1}", f"not CSV ({error})", "write it with a CSV library") from error


def _tsv_rows(path: Path, file: BinaryIO) -> Iterator[tuple[Place, RowOrError]]:
    return _csv_rows(path, file, "\t")


JSON = (".jsonl", ".ndjson", ".json")
READERS: dict[str, Callable[[Path, BinaryIO], Iterator[tuple[Place, RowOrError]]]] = {
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
}
