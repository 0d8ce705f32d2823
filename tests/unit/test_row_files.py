"""Files of rows: every format and packing holds the same rows; what is no such file is refused by name.

Leaves out what the rows hold (test_rows.py) and files larger than memory.
"""

import csv
import gzip
import json
from decimal import Decimal

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


def is_row(data: dict) -> bool:
    return "prompt" in data


def rows_of(pattern) -> list[dict]:
    return [row for file in find_files(str(pattern)) for _, row in read_rows(file, is_row)]


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
    "object_of_one_line.json": json.dumps({"version": 1, "data": ROWS}).encode() + b"\n\n",
    "as_jq_prints.jsonl": "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "a_table.jsonl": parquet(),
    "an_arrow_file.parquet": arrow(stream=False),
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


@pytest.mark.parametrize("indent", [None, 1])
def test_an_only_object_that_is_a_row(tmp_path, indent):
    """Its rubric, a list of objects too, is not taken for the rows; other objects need a list of rows."""
    for name in ("x.json", "x.jsonl"):
        (tmp_path / name).write_text(json.dumps(ROWS[0], indent=indent))
        assert rows_of(tmp_path / name) == [ROWS[0]]


def test_decimals_and_maps_of_tables(tmp_path):
    """Decimals are numbers (whole ones stay whole), maps are objects, at any depth; a key that is there twice is refused."""
    rows = [{"id": Decimal(7), "rubric": [{"criterion": "c", "weight": Decimal("1.5")}], "weights": [("c", 1.0)]}]
    kind = pyarrow.struct([("criterion", pyarrow.string()), ("weight", pyarrow.decimal128(9, 2))])
    weights = pyarrow.map_(pyarrow.string(), pyarrow.float64())
    schema = pyarrow.schema(dict(id=pyarrow.decimal128(9), rubric=pyarrow.list_(kind), weights=weights).items())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), tmp_path / "x.parquet")
    assert rows_of(tmp_path / "x.parquet") == [
        {"id": 7, "rubric": [{"criterion": "c", "weight": 1.5}], "weights": {"c": 1.0}}
    ]
    rows[0]["weights"] *= 2
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="x.parquet: not a readable parquet file .a map has a key twice"):
        rows_of(tmp_path / "x.parquet")


def test_paths_as_people_give_them(tmp_path, monkeypatch):
    """The home directory, an address of this machine, a folder with a slash; not the Internet, but the way from there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.jsonl").write_bytes(LINES)
    for given in ("~/x.jsonl", f"file://{tmp_path}/x.jsonl", "~/", "~/*.jsonl"):
        assert rows_of(given) == ROWS
    hub = "huggingface.co/datasets/openai/healthbench"
    for given, said in {
        f"https://{hub}/resolve/main/a.jsonl": "hf download --repo-type dataset openai/healthbench a.jsonl",
        "hf://datasets/openai/healthbench": "hf download --repo-type dataset openai/healthbench --local-dir",
        "openai/healthbench": "hf download --repo-type dataset openai/healthbench --local-dir",
        "https://example.org/a.jsonl?x=1": "copy the file to this machine first",
        "s3://bucket/a.jsonl": "copy the file to this machine first",
    }.items():
        with pytest.raises(UserError, match=said) as error:
            find_files(given)
        assert str(error.value).startswith(f"{given}: no such file")


def test_folders_in_a_directory(tmp_path, capsys):
    """Folders are never left aside in silence; those without files of rows are not worth a word."""
    for name in ("train", "test", ".cache"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_bytes(LINES)
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="its files are in folders: test, train; .*/train"):
        find_files(str(tmp_path))
    (tmp_path / "b.jsonl").write_bytes(LINES)
    (tmp_path / "state.json").write_text('{"epoch": 3}')  # a trainer's, not a saved data set's
    (tmp_path / "state.json").rename(tmp_path / "train" / "state.json")
    assert find_files(str(tmp_path)) == [tmp_path / "b.jsonl"]
    assert "its folders are not read (test, train)" in capsys.readouterr().err
    assert find_files(str(tmp_path / "train")) == [tmp_path / "train" / "a.jsonl"]


def test_parts_of_a_directory_that_are_not_there(tmp_path, capsys):
    """A link to nothing is refused, an unfinished download is warned of: a part of the rows is not taken for all."""
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl.incomplete").write_bytes(LINES[:9])
    assert find_files(str(tmp_path)) == [tmp_path / "a.jsonl"]
    assert "b.jsonl.incomplete is an unfinished download" in capsys.readouterr().err
    (tmp_path / "b.jsonl").symlink_to("blobs/b")
    for path in (tmp_path, tmp_path / "b.jsonl"):
        with pytest.raises(UserError, match="b.jsonl: a link to blobs/b, which is not there"):
            find_files(str(path))
    with pytest.raises(UserError, match="no path"):  # not the working directory
        find_files("")


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
    "m.jsonl": (b"<!DOCTYPE html><html>", "is a web page"),
    "n.jsonl": (b"\xfd7zXZ\x00", "compressed with xz"),
    "o.json": (json.dumps(ROWS).encode("utf-16"), "UTF-16.*in UTF-8"),
    "p.json": (b'{"prompt": {"0": "a", "1": "b"}, "rubric": {"0": [], "1": []}}', "columns.*orient='records'"),
    "q.json": (b'{"a": 1,\n"b": 2}', "0 lists of objects"),
    "r.json": (json.dumps(ROWS, indent=1).encode() + b"[]", "not JSON .Extra data: line 32"),
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
    found = list(read_rows(tmp_path / "x.csv", is_row))
    assert [isinstance(row, UserError) for _, row in found] == [True, True, False]
    (tmp_path / "y.jsonl").write_bytes(b'{"a": 1},\n\n{"b": 2},\n{"c": 3}\n')
    found = list(read_rows(tmp_path / "y.jsonl", is_row))
    assert [where[-2:] for where, row in found if "ends with a comma" in str(row)] == [":1", ":3"]
    assert found[2][1] == {"c": 3}
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n{oops\n[1]\n')
    assert [str(row).partition(": ")[2][:8] for _, row in read_rows(tmp_path / "x.jsonl", is_row)][1:] == [
        "not JSON",
        "[1] is n",
    ]
