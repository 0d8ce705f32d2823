"""Files of rows on disk to plain dicts, each with the place it comes from.

JSON lines, JSON lists, Parquet, CSV, Arrow files; each also compressed with gzip or Zstandard; directories of them,
directories that Hugging Face ``datasets`` has saved, and glob patterns. Compression is known by a file's first bytes.
"""

import csv
import glob
import gzip
import io
import itertools
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from g2r_megatron.errors import UserError

# A row, or the reason why there is none at its place.
Place = str
RowOrError = dict | UserError

KINDS = ".jsonl, .json, .parquet, .csv, .tsv or .arrow, also with .gz or .zst"
COMPRESSIONS = (".gz", ".zst")
SAVED_DATASET, SAVED_SPLITS = "state.json", "dataset_dict.json"
NOT_ROWS = {SAVED_DATASET, SAVED_SPLITS, "dataset_info.json", "dataset_infos.json"}
SPLIT = re.compile(r"(?:^|[-_. ])(train|test|validation|valid|val|dev|eval)(?=[-_. ])", re.IGNORECASE)
LFS_POINTER = b"version https://git-lfs"
ROWS_AT_ONCE = 1000
SHOWN_VALUE = 60


def shown(value) -> str:
    """``value`` in an error message, shortened."""
    text = repr(value)
    return text if len(text) <= SHOWN_VALUE else text[: SHOWN_VALUE - 3] + "..."


def find_files(pattern: str) -> list[Path]:
    """The files that a path, directory or glob pattern stands for, in the order of their names.

    Raises ``UserError`` where there is none, or where a directory holds several splits.
    """
    path = Path(pattern)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _files_of_directory(path)
    if glob.has_magic(pattern):
        found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
        files = [file for file in found if file.is_file()]
        if not files:
            raise UserError(pattern, "no such file: the pattern matches none", f"give files of {KINDS}")
        return files
    raise UserError(
        pattern,
        "no such file or directory",
        f"give a path on this machine ({KINDS}); a data set of the Hugging Face hub has to be downloaded first",
    )


def _files_of_directory(directory: Path) -> list[Path]:
    if (directory / SAVED_SPLITS).is_file():
        splits = _json_file(directory / SAVED_SPLITS).get("splits") or []
        if len(splits) != 1:
            raise UserError(
                str(directory), f"a saved data set of splits {splits}", f"give one of them, such as {directory}/train"
            )
        return _files_of_directory(directory / splits[0])
    if (directory / SAVED_DATASET).is_file():
        return _saved_dataset(directory)
    files = sorted(file for file in directory.iterdir() if _kind(file) and file.name not in NOT_ROWS and file.is_file())
    files = [file for file in files if not file.name.startswith(".")]
    if not files and (directory / "data").is_dir():  # as the hub lays data sets out
        return _files_of_directory(directory / "data")
    if not files:
        raise UserError(str(directory), "no such file in it", f"the directory must hold {KINDS} files")
    splits = sorted({match[1].lower() for file in files if (match := SPLIT.search(file.name))})
    if len(splits) > 1:
        remedy = f"give those that you mean, such as {directory}/*{splits[-1]}*"
        raise UserError(str(directory), f"it holds several splits: {', '.join(splits)}", remedy)
    return files


def _saved_dataset(directory: Path) -> list[Path]:
    """The Arrow files of a directory that ``datasets`` has saved."""
    state = _json_file(directory / SAVED_DATASET)
    if state.get("_indices_files") or state.get("_indices_data_files"):
        remedy = "save it again after flatten_indices()"
        raise UserError(str(directory), "a saved data set with an index of chosen rows", remedy)
    return [directory / file["filename"] for file in state.get("_data_files") or []]


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
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else ""


def read_rows(path: Path) -> Iterator[tuple[Place, RowOrError]]:
    """``(place, row)`` pairs; the place is "file:line" or "file:row n", counted from 1.

    A line that is no row comes as the ``UserError`` that says why. Raises ``UserError`` for a file that cannot be read.
    """
    if not path.is_file():
        raise UserError(str(path), "no such file", f"give existing {KINDS} files")
    kind = _kind(path)
    if not kind:
        raise UserError(str(path), f"unknown extension {path.suffix!r}", f"files must be {KINDS}")
    try:
        with path.open("rb") as raw:
            yield from READERS[kind](path, _decompressed(path, raw))
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, EOFError, zlib.error) as error:
        problem = getattr(error, "strerror", None) or error
        raise UserError(
            str(path), f"not a readable {kind[1:]} file ({problem})", "check that it is whole, and its permissions"
        ) from error


def _decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    head = raw.read(len(LFS_POINTER))
    raw.seek(0)
    if head == LFS_POINTER:
        raise UserError(str(path), "a Git LFS pointer, not the file itself", "run `git lfs pull` where it comes from")
    if head[:2] == b"\x1f\x8b":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if head[:4] == b"\x28\xb5\x2f\xfd":
        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
        return io.BufferedReader(_Readable(stream))
    return raw


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


def _json_rows(path: Path, file: BinaryIO) -> Iterator[tuple[Place, RowOrError]]:
    """JSON lines, or one JSON text: a list of objects, or an object with one list of objects in it.

    The content decides, not the extension: both are published under both.
    """
    head = []
    for line in file:
        head.append(line)
        if line.strip():
            break
    if not head or not _opens_one_text(head[-1]):
        yield from _json_lines(path, itertools.chain(head, file))
        return
    for number, row in enumerate(_objects_of_one_text(path, b"".join(head) + file.read()), 1):
        where = f"{path}:row {number}"
        yield where, row if isinstance(row, dict) else _not_an_object(where, row, "each element")


def _opens_one_text(line: bytes) -> bool:
    """Whether a first line begins a list, or an object that later lines go on with."""
    first, last = line.lstrip(b"\xef\xbb\xbf \t")[:1], line.rstrip()[-1:]
    return first == b"[" or (first == b"{" and last in (b"{", b",", b"["))


def _objects_of_one_text(path: Path, content: bytes) -> list:
    try:
        data = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(str(path), f"not UTF-8 (byte {error.start})", "save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        remedy = "it must be JSON lines (one object a line) or a JSON list of objects"
        raise UserError(str(path), f"not JSON ({error})", remedy) from error
    if isinstance(data, dict):
        lists = [value for value in data.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        if len(lists) != 1:
            found = f"an object with {len(lists)} lists of objects (fields {shown(sorted(data))})"
            raise UserError(str(path), found, "it must hold one list of rows")
        return lists[0]
    return data


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
    rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
    return ((f"{path}:row {number}", row) for number, row in enumerate(rows, 1))


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


READERS: dict[str, Callable[[Path, BinaryIO], Iterator[tuple[Place, RowOrError]]]] = {
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
}
