"""Files of rows: every format and packing holds the same rows; what is no such file is refused by name.

Leaves out what the rows hold (test_rows.py) and files larger than memory.
"""

import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from g2r_megatron.data.files import find_files, read_rows
from g2r_megatron.errors import UserError

ROWS = [
    {"id": f"r{i}", "prompt": f"Was ist {i}? “ja”\n", "rubric": [{"criterion": "a", "weight": i}]} for i in range(3)
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
TABLE = pyarrow.Table.from_pylist(ROWS)


def rows_of(pattern) -> list[dict]:
    return [row for file in find_files(str(pattern)) for _, row in read_rows(file)]


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(TABLE, sink)
    return sink.getvalue().to_pybytes()


def arrow(stream: bool) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)
    return sink.getvalue().to_pybytes()


FILES = {
    "x.jsonl": LINES,
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "windows.jsonl": LINES.replace(b"\n", b"\r\n"),
    "x.ndjson": LINES,
    "lines.json": LINES,
    "x.json": json.dumps(ROWS).encode(),
    "pretty.json": json.dumps(ROWS, indent=2).encode(),
    "list.jsonl": json.dumps(ROWS).encode(),
    "object.json": json.dumps({"version": 1, "data": ROWS}, indent=2).encode(),
    "x.jsonl.gz": gzip.compress(LINES),
    "two.jsonl.gz": gzip.compress(LINES[:50]) + gzip.compress(LINES[50:]),
    "x.jsonl.zst": zstd(LINES),
    "x.json.zst": zstd(json.dumps(ROWS).encode()),
    "gzip_without_its_extension.jsonl": gzip.compress(LINES),
    "x.parquet": parquet(),
    "x.parquet.gz": gzip.compress(parquet()),
    "stream.arrow": arrow(stream=True),
    "file.arrow": arrow(stream=False),
}


@pytest.mark.parametrize("name", FILES)
def test_every_file_holds_the_same_rows(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    assert rows_of(tmp_path / name) == ROWS


@pytest.mark.parametrize("name, delimiter", [("x.csv", ","), ("x.tsv", "\t"), ("x.csv.gz", ",")])
def test_tables_of_text(tmp_path, name, delimiter):
    """Cells are texts ("007" keeps its zeros), empty ones are missing; line breaks and quotes in cells are kept."""
    rows = [{"id": "007", "prompt": 'a "b",\nc;\td', "system": None}, {"id": "8", "prompt": "Ü", "system": "s"}]
    with (gzip.open if name.endswith(".gz") else open)(tmp_path / name, "wt", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    assert rows_of(tmp_path / name) == rows


def test_directories_and_patterns(tmp_path):
    """The files of a directory in the order of their names; patterns; a hub snapshot's data folder; a saved data set."""
    halves = tmp_path / "set" / "data"
    halves.mkdir(parents=True)
    (tmp_path / "set" / "README.md").write_text("read me")
    for i in (0, 1):
        pyarrow.parquet.write_table(TABLE[i : i + 2 - i], halves / f"train-0000{i}-of-00002.parquet")
    expected = [ROWS[0], ROWS[1], ROWS[1]]
    assert rows_of(tmp_path / "set") == rows_of(halves) == rows_of(halves / "train-*") == expected
    assert rows_of(tmp_path / "**" / "*.parquet") == expected
    saved = tmp_path / "saved" / "train"
    saved.mkdir(parents=True)
    (saved.parent / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (saved / "state.json").write_text('{"_data_files": [{"filename": "b.arrow"}, {"filename": "a.arrow"}]}')
    (saved / "dataset_info.json").write_text("{}")
    for name in ("a.arrow", "b.arrow"):
        (saved / name).write_bytes(arrow(stream=True))
    assert rows_of(saved) == rows_of(saved.parent) == [*ROWS, *ROWS]


def test_splits_are_not_mixed(tmp_path):
    """A directory that holds training and test rows is refused: nobody means to train on both."""
    for name in ("train-0.jsonl", "test-0.jsonl"):
        (tmp_path / name).write_bytes(LINES)
    with pytest.raises(UserError, match=r"several splits: test, train; .*train\*"):
        find_files(str(tmp_path))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match="splits .*train"):
        find_files(str(tmp_path / "saved"))


BAD = {
    "a.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer.*git lfs pull"),
    "b.jsonl.gz": (gzip.compress(LINES)[:-20], "not a readable jsonl file"),
    "c.jsonl.zst": (zstd(LINES)[:-20], "not a readable jsonl file"),
    "d.parquet": (parquet()[:-20], "not a readable parquet file"),
    "e.arrow": (b"x" * 50, "not a readable arrow file"),
    "f.json": (b'[{"a": 1}', "not JSON.*list of objects"),
    "g.json": (b'{\n"a": [{"x": 1}], "b": [{"x": 1}]}', "2 lists of objects"),
    "h.csv": (b"id;prompt\n1;a\n", "one column.*commas"),
    "i.csv": (b'id,prompt\n1,"a\n', "row 1: not CSV"),
    "j.csv": (b"id,prompt\n\xff,a\n", "not UTF-8"),
    "k.xlsx": (b"x", "unknown extension '.xlsx'.*jsonl"),
    "l.zip": (b"x", "unknown extension '.zip'"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_cannot_be_read(tmp_path, name):
    content, said = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        rows_of(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)


def test_paths_that_lead_nowhere(tmp_path):
    for pattern in ("openai/healthbench", f"{tmp_path}/*.jsonl", f"{tmp_path}"):
        with pytest.raises(UserError, match="no such file"):
            find_files(pattern)


def test_cells_and_lines_that_are_no_rows(tmp_path):
    """A bad line or a ragged row is its own error, the others are read."""
    (tmp_path / "x.csv").write_bytes(b"id,prompt\n1,a,b\n2\n3,c\n")
    found = list(read_rows(tmp_path / "x.csv"))
    assert [isinstance(row, UserError) for _, row in found] == [True, True, False]
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n{oops\n[1]\n')
    assert [str(row).partition(": ")[2][:8] for _, row in read_rows(tmp_path / "x.jsonl")][1:] == [
        "not JSON",
        "[1] is n",
    ]
