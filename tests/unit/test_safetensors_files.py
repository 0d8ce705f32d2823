"""Safetensors files: what we read and write is byte for byte what the safetensors library reads and writes.

Every directory that cannot be right is refused when it is opened, with one line that names file and tensor; a writer
never calls a directory complete that has rows missing. Leaves out memory and speed, which need files of gigabytes, and
file systems that cannot reserve space.
"""

import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from g2r_megatron.errors import UserError
from g2r_megatron.model import safetensors_files
from g2r_megatron.model.safetensors_files import DTYPES, SafetensorsReader

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
VIEWS = {  # name: (shape, its 2-D view)
    "table": ((12, 7), (12, 7)),
    "experts": ((3, 4, 6), (12, 6)),
    "bias": ((5,), (5, 1)),
    "scalar": ((), (1, 1)),
    "no_rows": ((0, 4), (0, 4)),
    "no_columns": ((4, 0), (4, 0)),
    "row": ((1, 9), (1, 9)),
}


def random_tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape).to(dtype) for name, (shape, _) in VIEWS.items()}


def declared(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


# ---- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("block_bytes", [1, 64, 4 * 2**20])
def test_reads_any_rectangle_of_what_the_library_saved(tmp_path, monkeypatch, dtype, block_bytes):
    monkeypatch.setattr(safetensors_files, "BLOCK_BYTES", block_bytes)  # rows one by one, a few at a time, at once
    tensors = random_tensors(dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    reader = SafetensorsReader(tmp_path)

    assert reader.names == set(VIEWS)
    assert reader.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert all(reader.shape(name) == shape and reader.dtype(name) == dtype for name, (shape, _) in VIEWS.items())
    assert_same({name: reader.read(name) for name in reader.names}, tensors)
    rng = random.Random(0)
    for name, (shape, (rows, columns)) in VIEWS.items():
        view = tensors[name].reshape(rows, columns)
        for _ in range(20):
            top, bottom = sorted(rng.randint(0, rows) for _ in range(2))
            left, right = sorted(rng.randint(0, columns) for _ in range(2))
            out = torch.empty(bottom - top, columns, dtype=dtype)
            reader.read_into(name, (top, bottom), out)
            assert torch.equal(out, view[top:bottom])
            if len(shape) > 1:
                assert torch.equal(reader.read(name, (top, bottom), (left, right)), view[top:bottom, left:right])
                assert torch.equal(reader.read(name, columns=(left, right)), view[:, left:right])
                assert torch.equal(reader.read(name, (top, bottom)), view[top:bottom])
            else:
                assert torch.equal(reader.read(name, (top, bottom)), view[top:bottom, 0])


@pytest.mark.parametrize(
    "read",
    [
        lambda reader: reader.read("table", (3, 13)),
        lambda reader: reader.read("table", (-1, 3)),
        lambda reader: reader.read("table", (3, 2)),
        lambda reader: reader.read("table", None, (0, 8)),
        lambda reader: reader.read("bias", (0, 5), (0, 1)),
        lambda reader: reader.read_into("bias", (0, 5), torch.empty(4)),
        lambda reader: reader.read_into("bias", (0, 5), torch.empty(5, dtype=torch.float16)),
        lambda reader: reader.read_into("bias", (0, 5), torch.empty(10)[::2]),
    ],
)
def test_a_range_or_buffer_that_does_not_fit_is_our_error(tmp_path, read):
    save_file(random_tensors(torch.float32), tmp_path / "model.safetensors")
    with pytest.raises(ValueError):
        read(SafetensorsReader(tmp_path))


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    save_file({"a": torch.ones(100)}, tmp_path / "model.safetensors")
    reader = SafetensorsReader(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 200)
    with pytest.raises(UserError, match="model.safetensors: ends at byte 200, shorter than when it was opened"):
        reader.read("a")


# ---- directories that are refused -----------------------------------------------------------------------------------


def write_raw(file: Path, header: dict | bytes, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(dtype: str = "F32", shape: tuple = (2,), offsets: tuple = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def header_of(*entries: dict, data: int = 8) -> Callable[[Path], None]:
    """Shard two becomes a file of these entries, named "b", "c", ..., with ``data`` bytes after its header."""
    return lambda d: write_raw(d / TWO, dict(zip("bcd", entries)), b"\0" * data)


def index_of(text: str) -> Callable[[Path], None]:
    return lambda d: (d / INDEX).write_text(text)


def index_of_tensors(**files: str) -> Callable[[Path], None]:
    return index_of(json.dumps({"weight_map": files}))


def change(file: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda d: (d / file).write_bytes(edit((d / file).read_bytes()))


def only(name: str) -> Callable[[Path], None]:
    """No weights but one file of this name."""

    def edit(d: Path) -> None:
        for file in d.iterdir():
            file.unlink()
        if name:
            (d / name).touch()

    return edit


def as_directory(name: str) -> Callable[[Path], None]:
    def edit(d: Path) -> None:
        (d / name).unlink()
        (d / name).mkdir()

    return edit


def symlink_loop(d: Path) -> None:
    (d / TWO).unlink()
    (d / TWO).symlink_to(TWO)


def link_to_nothing(d: Path) -> None:
    (d / TWO).unlink()
    (d / TWO).symlink_to("../../blobs/0")


B = f"{TWO} b: "
HALF = ".cache/huggingface/download/x.incomplete"
DAMAGE = [
    # (what is done to a good directory of two shards {a, b}, what the line must say)
    ("pickles", only("pytorch_model.bin"), ["only pickle files (pytorch_model.bin)", "must be safetensors files"]),
    ("pt pickle", only("model.pt"), ["model.pt", "must be safetensors files"]),
    ("pth pickle", only("consolidated.00.pth"), ["consolidated.00.pth", "must be safetensors files"]),
    ("a gguf file", only("m.Q4_K_M.gguf"), ["has m.Q4_K_M.gguf, but neither", "Hugging Face's format"]),
    ("DeepSpeed's checkpoint", only("zero_to_fp32.py"), ["has zero_to_fp32.py, but neither"]),
    (
        "a variant",
        only("model.fp16.safetensors"),
        ["has model.fp16.safetensors", "or call an only file model.safetensors"],
    ),
    ("nothing", only(""), ["has neither model.safetensors nor model.safetensors.index.json"]),
    ("adapter", only("adapter_model.safetensors"), ["adapter_model.safetensors", "adapter must be merged"]),
    ("no index", lambda d: (d / INDEX).unlink(), [ONE, "but neither", f"restore {INDEX}"]),
    ("index not JSON", index_of("{"), [INDEX, "the index is not JSON"]),
    ("index not text", lambda d: (d / INDEX).write_bytes(b"\xff{}"), [INDEX, "the index is not JSON"]),
    ("index too deep", index_of("[" * 100_000), [INDEX, "the index is not JSON"]),
    ("index a list", index_of("[]"), [INDEX, "not a JSON object"]),
    ("index without map", index_of("{}"), [INDEX, "weight_map is not"]),
    ("index of numbers", index_of('{"weight_map": {"a": 1}}'), [INDEX, "weight_map is not"]),
    ("index with a key twice", index_of('{"weight_map": {"a": "x", "a": "y"}}'), [INDEX, "key 'a' more than once"]),
    ("shard elsewhere", index_of('{"weight_map": {"a": "../x.safetensors"}}'), ["'../x.s", "the same directory"]),
    ("shard absolute", index_of('{"weight_map": {"a": "/x.safetensors"}}'), ["'/x.s", "the same directory"]),
    ("shard of pickles", index_of('{"weight_map": {"a": "x.bin"}}'), ["'x.bin'", "must be a *.safetensors file"]),
    ("index a directory", as_directory(INDEX), [INDEX, "cannot be read (Is a directory)"]),
    ("missing shard", lambda d: (d / TWO).unlink(), [TWO, f"is missing ({INDEX} names it)"]),
    (
        "shard that is on its way",
        lambda d: (d / TWO).rename(d / f"{TWO}.incomplete"),
        [TWO, f"{TWO}.incomplete is an unfinished download", "finish the download"],
    ),
    (
        "shard that hf download left behind",
        lambda d: ((d / ".cache/huggingface/download").mkdir(parents=True), (d / TWO).rename(d / HALF)),
        [TWO, "x.incomplete is an unfinished download"],
    ),
    ("link to a blob that is gone", link_to_nothing, [TWO, "is missing (it is a link to ../../blobs/0)"]),
    ("nothing but an unfinished file", only("model.safetensors.part"), ["model.safetensors.part, an unfinished"]),
    ("pickle with another suffix", lambda d: torch.save({}, d / TWO), [TWO, "is a pickle file", "can run code"]),
    ("web page", lambda d: (d / TWO).write_text("<!DOCTYPE html><html>"), [TWO, "is a web page", "login"]),
    ("room but no content", lambda d: (d / TWO).write_bytes(bytes(99)), [TWO, "begins with zeros, an unfinished"]),
    ("index an LFS pointer", index_of("version https://git-lfs.github.com/spec/v1"), [INDEX, "Git LFS pointer"]),
    (
        "tensor in two shards",
        lambda d: (save_file({"a": torch.ones(1), "b": torch.ones(2)}, d / TWO), index_of_tensors(b=TWO, c=ONE)(d)),
        [ONE, "holds a, and so does model-00002", f"{INDEX} must name one of them"],
    ),
    ("tensor in no shard", index_of_tensors(a=ONE, b=TWO, c=TWO), [TWO, "does not hold c, which"]),
    ("shard a directory", as_directory(TWO), [TWO, "is not a regular file"]),
    ("shard not to be opened", symlink_loop, [TWO, "cannot be opened (Too many levels of symbolic links)"]),
    ("empty file", lambda d: (d / TWO).write_bytes(b""), [TWO, "has only 0 bytes"]),
    ("LFS pointer", lambda d: (d / TWO).write_text("version https://x"), [TWO, "Git LFS pointer", "git lfs pull"]),
    ("header too long", lambda d: (d / TWO).write_bytes(b"\xff" * 99), [TWO, "at most 100000000"]),
    ("header truncated", lambda d: os.truncate(d / TWO, 30), [TWO, "is truncated: header of", "in a file of 30"]),
    ("data truncated", change(TWO, lambda t: t[:-1]), [TWO, "is truncated: ", "its header describes"]),
    ("bytes after the data", change(TWO, lambda t: t + b"\0"), [TWO, "is too long: ", "its header describes"]),
    ("header not JSON", lambda d: write_raw(d / TWO, b"{'b'}"), [TWO, "header is not JSON"]),
    ("header a list", lambda d: write_raw(d / TWO, b"[]"), [TWO, "header is not a JSON object"]),
    ("header without text", lambda d: write_raw(d / TWO, b""), [TWO, "begins with zeros"]),
    ("tensor twice", lambda d: write_raw(d / TWO, b'{"b": {}, "b": {}}'), [TWO, "has the key 'b' more than once"]),
    ("entry a list", lambda d: write_raw(d / TWO, {"b": []}), [B, "not {dtype, shape, data_offsets}"]),
    ("entry incomplete", lambda d: write_raw(d / TWO, {"b": {"dtype": "F32"}}), [B, "entry is not {dtype, shape,"]),
    ("unknown dtype", header_of(entry("F4", (16,))), [B, "dtype F4", "quantized", "dequantize it first"]),
    ("dtype a list", header_of(entry(["F32"])), [B, "dtype ['F32']"]),
    ("negative shape", header_of(entry(shape=(-1, -2))), [B, "shape [-1, -2]"]),
    ("fractional shape", header_of(entry(shape=(2.0,))), [B, "shape [2.0]"]),
    ("boolean offsets", header_of(entry(offsets=(False, 8))), [B, "data_offsets [False, 8]"]),
    ("one offset", header_of(entry(offsets=(8,))), [B, "data_offsets [8] are not the 8 bytes"]),
    ("offsets of another size", header_of(entry(offsets=(0, 4)), data=4), [B, "[0, 4] are not the 8 bytes of F32 [2]"]),
    ("offsets backwards", header_of(entry(offsets=(8, 0))), [B, "[8, 0] are not the 8 bytes"]),
    ("offsets beyond the file", header_of(entry(shape=(4,), offsets=(0, 16))), [TWO, "is truncated"]),
    ("overlap", header_of(entry(), entry(offsets=(4, 12)), data=12), [f"{TWO} c", "overlaps the tensor before it"]),
    ("gap", header_of(entry(), entry(offsets=(9, 17)), data=17), [f"{TWO} c", "leaves a gap before it"]),
]


def good_directory(directory: Path) -> None:
    save_file({"a": torch.ones(2, 3)}, directory / ONE)
    save_file({"b": torch.ones(2)}, directory / TWO)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": ONE, "b": TWO}}))


def assert_one_line(error: UserError, *said: str) -> None:
    line = str(error)
    assert "\n" not in line and len(line.rpartition("; ")[2]) > 8, line
    for text in said:
        assert text in line


@pytest.mark.parametrize("damage, said", [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_a_damaged_directory_is_refused_when_it_is_opened(tmp_path, damage, said):
    good_directory(tmp_path)
    assert SafetensorsReader(tmp_path).names == {"a", "b"}
    damage(tmp_path)
    with pytest.raises(UserError) as error:
        SafetensorsReader(tmp_path)
    assert_one_line(error.value, str(tmp_path), *said)


def add(name: str) -> Callable[[Path], None]:
    return lambda d: save_file({"other": torch.zeros(1)}, d / name)


def as_links(d: Path) -> None:
    for name in (ONE, TWO):
        (d / name).rename(d / f"blob_{name}")
        (d / name).symlink_to(f"blob_{name}")


HARMLESS = [
    # (what is done to the good directory, what the warning says)
    ("a file that no index names", add("consolidated.safetensors"), "left aside: consolidated.safetensors"),
    ("an index that names another shard", index_of_tensors(a=TWO, b=ONE), "names another file for b (of 2) than"),
    ("a wrong total_size", change(INDEX, lambda t: t.replace(b"{}", b'{"total_size": 1}')), ""),
    ("a snapshot of links", as_links, ""),
]


@pytest.mark.parametrize("damage, said", [case[1:] for case in HARMLESS], ids=[case[0] for case in HARMLESS])
def test_harmless_differences_are_read(tmp_path, capsys, damage, said):
    """As transformers reads them: the same tensors, and a warning where something was left aside."""
    good_directory(tmp_path)
    damage(tmp_path)
    reader = SafetensorsReader(tmp_path)
    assert torch.equal(reader.read("a"), torch.ones(2, 3)) and torch.equal(reader.read("b"), torch.ones(2))
    assert reader.names == {"a", "b"}
    assert said in capsys.readouterr().err


def test_a_whole_file_beside_shards_is_the_model(tmp_path, capsys):
    """transformers prefers model.safetensors; the warning names what is left aside."""
    good_directory(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert SafetensorsReader(tmp_path).names == {"a"}
    assert f"left aside: {ONE}, {TWO}, {INDEX}" in capsys.readouterr().err


@pytest.mark.parametrize("path, said", [("none", "No such file"), ("file", "Not a directory")])
def test_no_directory_is_refused(tmp_path, path, said):
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as error:
        SafetensorsReader(tmp_path / path)
    assert_one_line(error.value, str(tmp_path / path), f"cannot be read ({said}")


@pytest.fixture
def shared_directory() -> Iterator[Path]:
    """A directory that other users can enter and read, unlike ``tmp_path``."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Root may do anything: the permissions of somebody else."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("file", [INDEX, ONE])
def test_a_file_without_read_permission_is_refused(shared_directory, file):
    good_directory(shared_directory)
    (shared_directory / INDEX).chmod(0o644)
    (shared_directory / file).chmod(0)
    with ordinary_user(), pytest.raises(UserError) as error:
        SafetensorsReader(shared_directory)
    assert_one_line(error.value, str(shared_directory / file), "(Permission denied)")
