"""Safetensors files that we write: the library and transformers load them, and no half-written directory is called whole.

Reading: test_safetensors_files.py. Leaves out memory and speed, and file systems that cannot reserve space.
"""

import json
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from g2r_megatron.errors import UserError
from g2r_megatron.model.safetensors_files import DTYPES, SafetensorsReader, SafetensorsWriter
from test_safetensors_files import (
    INDEX,
    TWO,
    VIEWS,
    assert_one_line,
    assert_same,
    declared,
    ordinary_user,
    random_tensors,
    shared_directory,  # noqa: F401  (a fixture)
)

# ---- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_library_loads_what_we_wrote_in_any_order(tmp_path, dtype):
    tensors = random_tensors(dtype)
    writer = SafetensorsWriter(tmp_path, declared(tensors))
    views = {name: tensors[name].reshape(view if len(shape) > 1 else -1) for name, (shape, view) in VIEWS.items()}
    pieces = [(name, view[i : i + 2], i) for name, view in views.items() for i in range(0, len(view), 2)]
    random.Random(0).shuffle(pieces)
    for piece in pieces:
        writer.write(*piece)
    writer.finish()

    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.safetensors"]
    assert_same(load_file(tmp_path / "model.safetensors"), tensors)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    reader = SafetensorsReader(tmp_path)
    assert_same({name: reader.read(name) for name in reader.names}, tensors)
    assert reader.total_bytes == writer.total_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_the_same_arguments_give_the_same_bytes_and_every_tensor_is_aligned(tmp_path):
    tensors = {
        "odd": torch.randn(3).half(),
        "wide": torch.randn(2, 3),
        "name\n\u00e9": torch.randn(5).bfloat16(),
        "w": torch.randn(1),
    }
    for directory in (tmp_path / "x", tmp_path / "y"):
        directory.mkdir()
        writer = SafetensorsWriter(directory, declared(tensors))
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish()
        assert all(info.offset % info.dtype.itemsize == 0 for info in writer.tensors.values())
    assert (tmp_path / "x/model.safetensors").read_bytes() == (tmp_path / "y/model.safetensors").read_bytes()
    assert_same(load_file(tmp_path / "x/model.safetensors"), tensors)


def test_transformers_loads_a_sharded_model(tmp_path):
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        dtype="bfloat16",
    )
    weights = LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
    config.save_pretrained(tmp_path)
    writer = SafetensorsWriter(tmp_path, declared(weights), max_shard_bytes=700)
    for name, tensor in weights.items():
        writer.write(name, tensor)
    writer.finish()

    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype="auto").state_dict()
    assert_same(loaded, weights)


def test_split_into_shards(tmp_path):
    sizes = {"a": 10, "b": 10, "huge": 40, "c": 5, "d": 20, "e": 1}
    tensors = {name: torch.full((n,), float(n)) for name, n in sizes.items()}
    writer = SafetensorsWriter(tmp_path, declared(tensors), max_shard_bytes=100)
    for name in tensors:
        writer.write(name, tensors[name])
    writer.finish()

    shards = [["a", "b"], ["huge"], ["c", "d"], ["e"]]
    files = {n: f"model-{i:05d}-of-00004.safetensors" for i, names in enumerate(shards, 1) for n in names}
    index = json.loads((tmp_path / INDEX).read_text())
    assert index == {"metadata": {"total_size": 344}, "weight_map": files}
    assert sorted(tmp_path.iterdir()) == sorted({tmp_path / INDEX, *(tmp_path / file for file in files.values())})
    assert_same({n: t for file in set(files.values()) for n, t in load_file(tmp_path / file).items()}, tensors)
    assert list(SafetensorsReader(tmp_path).tensors) == list(tensors)


def test_several_writers_share_the_files(tmp_path):
    tensors = {"a": torch.randn(6, 4), "b": torch.randn(4), "c": torch.randn(2, 3, 2)}
    first = SafetensorsWriter(tmp_path, declared(tensors), max_shard_bytes=100)
    second = SafetensorsWriter(tmp_path, declared(tensors), max_shard_bytes=100, create=False)
    second.write("a", tensors["a"][4:], 4)
    first.write("c", tensors["c"][1:], 3)
    second.write("b", tensors["b"])
    first.write("a", tensors["a"][:4])
    second.write("c", tensors["c"][0])
    second.sync()
    with pytest.raises(RuntimeError, match="a: rows 4:6 of 6 were not written"):
        first.finish()
    assert not (tmp_path / INDEX).exists()
    first.finish([second.written])
    reader = SafetensorsReader(tmp_path)
    assert_same({name: reader.read(name) for name in reader.names}, tensors)


@pytest.mark.parametrize(
    "rows, said",
    [
        ([], "rows 0:6 of 6 were not written"),
        ([(1, 6)], "rows 0:1 of 6 were not written"),
        ([(4, 6), (0, 2)], "rows 2:4 of 6 were not written"),
        ([(0, 5)], "rows 5:6 of 6 were not written"),
        ([(0, 6), (2, 4)], "rows 2:4 of 6 were written twice"),
        ([(0, 6), (0, 6)], "rows 0:6 of 6 were written twice"),
    ],
)
def test_holes_and_repeated_rows_are_found(tmp_path, rows, said):
    writer = SafetensorsWriter(tmp_path, {"a": (torch.float32, (6, 2)), "b": (torch.float32, (3,))}, max_shard_bytes=1)
    writer.write("b", torch.ones(3))
    for start, stop in rows:
        writer.write("a", torch.ones(stop - start, 2), start)
    with pytest.raises(RuntimeError, match=f"model-00001-of-00002.safetensors a: {said}"):
        writer.finish()
    assert not (tmp_path / INDEX).exists()


@pytest.mark.parametrize(
    "name, tensor, first_row",
    [
        ("other", torch.ones(6, 2), 0),
        ("a", torch.ones(6, 2).half(), 0),
        ("a", torch.ones(3, 4), 0),
        ("a", torch.ones(2, 6), 0),
        ("a", torch.ones(12), 0),
        ("a", torch.tensor(1.0), 0),
        ("a", torch.ones(6, 2), 1),
        ("a", torch.ones(1, 2), -1),
        ("a", torch.ones(2, 6).T, 0),
        ("a", torch.ones(6, 2, device="meta"), 0),
        ("b", torch.ones(1, 3), 0),
        ("b", torch.ones(4), 0),
    ],
)
def test_a_tensor_that_does_not_fit_is_our_error(tmp_path, name, tensor, first_row):
    writer = SafetensorsWriter(tmp_path, {"a": (torch.float32, (6, 2)), "b": (torch.float32, (3,))})
    with pytest.raises(ValueError):
        writer.write(name, tensor, first_row)


def test_what_cannot_be_declared_is_our_error(tmp_path):
    for tensors in ({"a": (torch.int32, (2,))}, {"__metadata__": (torch.float32, (2,))}):
        with pytest.raises(ValueError):
            SafetensorsWriter(tmp_path, tensors)
    assert not list(tmp_path.iterdir())


def test_attaching_to_other_files_is_our_error(tmp_path):
    SafetensorsWriter(tmp_path, {"a": (torch.float32, (2, 3))})
    for other in ({"a": (torch.float32, (3, 2))}, {"a": (torch.float32, (2, 4))}):
        with pytest.raises(RuntimeError, match="was created for other tensors"):
            SafetensorsWriter(tmp_path, other, create=False)


# ---- disks and directories that refuse ------------------------------------------------------------------------------


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """No file of this process can grow beyond this: EFBIG, which a full disk's ENOSPC takes the same way."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_no_room_for_the_files_is_found_before_any_work(tmp_path):
    tensors = {"a": (torch.float32, (10,)), "b": (torch.float32, (5000,))}
    with largest_file(10_000), pytest.raises(UserError) as error:
        SafetensorsWriter(tmp_path, tensors, max_shard_bytes=1000)
    needed = (
        20_000 + 8 + len('{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[5000],"data_offsets":[0,20000]}}')
    )
    assert_one_line(
        error.value, str(tmp_path / TWO), f"needs {-(-needed // 8) * 8} bytes", "(File too large)", "free disk"
    )
    assert not list(tmp_path.iterdir()), "the space must be given back"


def test_a_disk_that_refuses_a_write(tmp_path):
    writer = SafetensorsWriter(tmp_path, {"a": (torch.float32, (5000,))})
    with largest_file(10_000), pytest.raises(UserError) as error:
        writer.write("a", torch.ones(5000))
    assert_one_line(error.value, str(tmp_path / "model.safetensors"), "bytes cannot be written (File too large)")
    with pytest.raises(RuntimeError, match="rows 0:5000 of 5000 were not written"):
        writer.finish()


def test_a_disk_that_refuses_the_index(tmp_path):
    writer = SafetensorsWriter(tmp_path, {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}, max_shard_bytes=1)
    writer.write("a", torch.ones(2))
    writer.write("b", torch.ones(2))
    with largest_file(10), pytest.raises(UserError) as error:
        writer.finish()
    assert_one_line(error.value, str(tmp_path / INDEX), "cannot be written (File too large)")


def test_files_are_never_overwritten(tmp_path):
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(UserError) as error:
        SafetensorsWriter(tmp_path, {"a": (torch.float32, (2,))})
    assert_one_line(error.value, "cannot be created (File exists)", "new directory")
    assert (tmp_path / "model.safetensors").read_text() == "mine"


def test_a_directory_that_cannot_be_written(shared_directory):  # noqa: F811
    shared_directory.chmod(0o555)
    with ordinary_user(), pytest.raises(UserError) as error:
        SafetensorsWriter(shared_directory, {"a": (torch.float32, (2,))})
    assert_one_line(error.value, str(shared_directory / "model.safetensors"), "cannot be created (Permission denied)")
