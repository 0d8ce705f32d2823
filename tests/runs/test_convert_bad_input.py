"""A conversion that cannot be right is refused in one line, before anything is written.

Every mistake in the input once, either direction; the message names the file or tensor. Leaves out what the safetensors
reader (test_safetensors_files.py) and the config (test_parity_weights.py) refuse in more ways than these.
"""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert_models import copy_of, tensors_of, to_hf, to_megatron, write_directory


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Three shards with an index, bf16, untied."""
    return write_directory("qwen2_untied", tmp_path_factory.mktemp("bad") / "hf")


@pytest.fixture(scope="module")
def checkpoint(worlds, source, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("bad") / "megatron"
    assert worlds[1].run(to_megatron, str(source), str(output)) == [None]
    return output


def shard_of(directory: Path, name: str) -> Path:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory / index["weight_map"][name]


def edit_tensors(directory: Path, name: str, change: Callable[[dict], None]) -> None:
    """Rewrite the shard that holds ``name``."""
    file = shard_of(directory, name)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_json(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def one_file(directory: Path, change: Callable[[dict], None]) -> None:
    """All tensors in model.safetensors, changed."""
    tensors = tensors_of(directory)
    for file in directory.glob("model*.safetensors*"):
        file.unlink()
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"


def missing_shard(d: Path) -> None:
    shard_of(d, NORM).unlink()


def truncated(d: Path) -> None:
    file = shard_of(d, NORM)
    file.write_bytes(file.read_bytes()[:-10])


def integers(d: Path) -> None:
    edit_tensors(d, DOWN, lambda t: t.update({DOWN: t[DOWN].int()}))


def missing_tensor(d: Path) -> None:
    one_file(d, lambda t: t.pop(DOWN))


def extra_tensor(d: Path) -> None:
    one_file(d, lambda t: t.update({"model.layers.4.mlp.down_proj.weight": t[DOWN].clone()}))


def other_config(d: Path) -> None:
    edit_json(d / "config.json", intermediate_size=128)


def too_few_layers(d: Path) -> None:
    edit_json(d / "config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3)


def tied_by_mistake(d: Path) -> None:
    edit_json(d / "config.json", tie_word_embeddings=True)


def unreadable_tokenizer(d: Path) -> None:
    (d / "tokenizer.json").write_text('{"version": "1.0", "model"')


def pickles(d: Path) -> None:
    tensors = tensors_of(d)
    for file in d.glob("model*.safetensors*"):
        file.unlink()
    torch.save(tensors, d / "pytorch_model.bin")


def no_config(d: Path) -> None:
    (d / "config.json").unlink()


def other_architecture(d: Path) -> None:
    edit_json(d / "config.json", model_type="gpt2")


def quantized(d: Path) -> None:
    edit_json(d / "config.json", quantization_config={"quant_method": "fp8"})


SOURCES = [
    (missing_shard, "missing"),
    (truncated, "safetensors"),
    (integers, "I32|int32"),
    (missing_tensor, f"{DOWN} is missing"),
    (extra_tensor, "unknown tensor model.layers.4.mlp.down_proj.weight"),
    (other_config, "shape .*config.json asks for"),
    (too_few_layers, "unknown tensor model.layers.3"),
    (tied_by_mistake, "lm_head.weight"),
    (unreadable_tokenizer, "token"),
    (pickles, "safetensors"),
    (no_config, "config.json"),
    (other_architecture, "model_type.*gpt2"),
    (quantized, "quantization_config"),
]


def refused(answer: str | None, pattern: str, folder: Path, left: set[str]) -> None:
    """``answer`` is one line about ``pattern``, and ``folder`` holds no more than before."""
    assert answer is not None and "\n" not in answer
    assert re.search(pattern, answer), answer
    assert {p.name for p in folder.iterdir()} == left


@pytest.mark.parametrize(("spoil", "pattern"), SOURCES, ids=[spoil.__name__ for spoil, _ in SOURCES])
def test_a_bad_hugging_face_directory_is_refused(worlds, source, tmp_path, spoil, pattern):
    """Found in the headers, the index, the config or the tokenizer."""
    bad = copy_of(source, tmp_path / "bad")
    spoil(bad)
    refused(worlds[1].run(to_megatron, str(bad), str(tmp_path / "out"))[0], pattern, tmp_path, {"bad"})


def test_other_things_than_a_hugging_face_directory_are_refused(worlds, source, checkpoint, tmp_path):
    """A Megatron checkpoint, a path that does not exist."""
    for bad, pattern in ((checkpoint, "is a Megatron checkpoint"), (tmp_path / "nowhere", "nowhere")):
        refused(worlds[1].run(to_megatron, str(bad), str(tmp_path / "out"))[0], pattern, tmp_path, set())


def damaged_metadata(d: Path) -> None:
    (d / ".metadata").write_bytes((d / ".metadata").read_bytes()[:-100])


def no_metadata(d: Path) -> None:
    (d / ".metadata").unlink()


class _Malicious:
    def __reduce__(self):
        return eval, ("1/0",)


def malicious_metadata(d: Path) -> None:
    (d / ".metadata").write_bytes(pickle.dumps(_Malicious()))


def other_pickle(d: Path) -> None:
    (d / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": {}}))


def missing_chunks(d: Path) -> None:
    (d / "__0_0.distcp").unlink()


def truncated_chunks(d: Path) -> None:
    file = d / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-2000])


def other_format(d: Path) -> None:
    edit_json(d / "metadata.json", sharded_backend="zarr")


def no_format(d: Path) -> None:
    (d / "metadata.json").write_text("")


def no_hf(d: Path) -> None:
    for file in (d / "hf").iterdir():
        file.unlink()


def wider_config(d: Path) -> None:
    edit_json(d / "hf" / "config.json", intermediate_size=128)


def fewer_layers(d: Path) -> None:
    edit_json(d / "hf" / "config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3)


def tied_config(d: Path) -> None:
    edit_json(d / "hf" / "config.json", tie_word_embeddings=True)


def a_place_elsewhere(d: Path) -> None:
    content = pickle.loads((d / ".metadata").read_bytes())
    for info in content.storage_data.values():
        info.relative_path = "../outside.distcp"
    (d.parent / "outside.distcp").write_bytes((d / "__0_0.distcp").read_bytes())
    (d / ".metadata").write_bytes(pickle.dumps(content))


def a_part_is_missing(d: Path) -> None:
    content = pickle.loads((d / ".metadata").read_bytes())
    del content.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks[2]
    (d / ".metadata").write_bytes(pickle.dumps(content))


CHECKPOINTS = [
    (damaged_metadata, r"\.metadata"),
    (no_metadata, r"\.metadata"),
    (malicious_metadata, r"\.metadata: cannot be read.*builtins\.eval"),
    (other_pickle, "does not describe a checkpoint"),
    (missing_chunks, "__0_0.distcp is missing"),
    (truncated_chunks, "__0_0.distcp is truncated"),
    (other_format, "zarr"),
    (no_format, "metadata.json"),
    (no_hf, "config.json"),
    (wider_config, "shape .* config.json asks for"),
    (fewer_layers, "shape .* config.json asks for"),
    (tied_config, "unknown tensor output_layer.weight"),
    (a_place_elsewhere, "outside.distcp is missing"),
    (a_part_is_missing, "parts of decoder.layers.2.mlp.linear_fc2.weight are missing"),
]


@pytest.mark.parametrize(("spoil", "pattern"), CHECKPOINTS, ids=[spoil.__name__ for spoil, _ in CHECKPOINTS])
def test_a_bad_checkpoint_is_refused(worlds, checkpoint, tmp_path, spoil, pattern):
    """Found in .metadata, metadata.json, the sizes of the files or the config; no code in a pickle is run."""
    bad = copy_of(checkpoint, tmp_path / "bad")
    spoil(bad)
    left = {p.name for p in tmp_path.iterdir()}
    refused(worlds[1].run(to_hf, str(bad), str(tmp_path / "out"))[0], pattern, tmp_path, left)


def test_damaged_chunks_are_found_while_they_are_read(worlds, checkpoint, tmp_path):
    """A file of the right size whose zip archives are broken: one line, and the half-made output is gone."""
    bad = copy_of(checkpoint, tmp_path / "bad")
    file = bad / "__0_0.distcp"
    file.write_bytes(file.read_bytes().replace(b"PK\x05\x06", b"XX\x05\x06"))
    refused(worlds[1].run(to_hf, str(bad), str(tmp_path / "out"))[0], "__0_0.distcp at byte", tmp_path, {"bad"})


def test_the_parent_of_checkpoints_names_the_newest(worlds, checkpoint, tmp_path):
    """RUN/checkpoints instead of a step in it."""
    for step in (1, 12):
        copy_of(checkpoint, tmp_path / "checkpoints" / f"step_{step:08d}")
    message = worlds[1].run(to_hf, str(tmp_path / "checkpoints"), str(tmp_path / "out"))[0]
    refused(message, "did you mean .*step_00000012", tmp_path, {"checkpoints"})


@pytest.mark.parametrize("direction", ["to_megatron", "to_hf"])
def test_what_exists_is_never_touched(worlds, source, checkpoint, tmp_path, direction):
    """An output, a file, a link or a NAME.incomplete that is not ours: refused; our own leftover is replaced."""
    convert, start = (to_megatron, source) if direction == "to_megatron" else (to_hf, checkpoint)
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "begun.incomplete").mkdir()
    (tmp_path / "begun.incomplete" / "notes.txt").write_text("mine")
    left = {p.name for p in tmp_path.iterdir()}
    for name in ("directory", "file", "link", "begun"):
        refused(worlds[1].run(convert, str(start), str(tmp_path / name))[0], "^--output: .* exists", tmp_path, left)
    refused(worlds[1].run(convert, str(start), str(tmp_path / "file" / "out"))[0], "^--output", tmp_path, left)
    assert (tmp_path / "begun.incomplete" / "notes.txt").read_text() == "mine"
    (tmp_path / "begun.incomplete" / ".g2r_conversion").touch()
    assert worlds[1].run(convert, str(start), str(tmp_path / "begun")) == [None]
    assert not (tmp_path / "begun.incomplete").exists() and not (tmp_path / "begun" / "notes.txt").exists()


def test_every_process_refuses_alike(worlds, source, checkpoint, tmp_path):
    """No process waits for another that has given up."""
    bad = copy_of(checkpoint, tmp_path / "bad")
    missing_chunks(bad)
    messages = worlds[2].run(to_hf, str(bad), str(tmp_path / "out"))
    assert messages[0] == messages[1] is not None
    assert {p.name for p in tmp_path.iterdir()} == {"bad"}
