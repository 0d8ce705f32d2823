"""Weights in Megatron-Core's torch_dist checkpoints, and what makes a directory of them complete.

The format does not know layouts: what was saved on one is read on any other.
"""

import json
import os
import pickle
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from g2r_megatron.errors import UserError
from g2r_megatron.model.hf import CHECKPOINT_FACTS, HF_FILES, HFModel
from g2r_megatron.parallel.groups import ModelGroups

EXTRA_STATE = "_extra_state"
OWN_CRC32 = "crc32_of_this"  # of g2r.json itself
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    KeyError,
    pickle.UnpicklingError,
)  # of json, pickle, torch's zip


def sharded_metadata(groups: ModelGroups) -> dict:
    """What ``sharded_state_dict`` wants to know: the replicas, and optimizer state readable on another TP, PP and DP."""
    return {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": groups.pgs.dp_cp}


def sharded_weights(chunks: Sequence[torch.nn.Module], groups: ModelGroups) -> dict:
    """The chunks' weights as Megatron-Core's sharded state: {"model": ...}, or "model0", "model1", ... of virtual stages."""
    names = [f"model{i}" for i in range(len(chunks))] if len(chunks) > 1 else ["model"]
    states = {}
    for name, chunk in zip(names, chunks, strict=True):
        state = chunk.sharded_state_dict(metadata=sharded_metadata(groups))
        # Layers' extra state is empty in plain torch. Transformer Engine's is for delayed FP8 scaling, which we do not
        # use.
        states[name] = {key: shard for key, shard in state.items() if not is_extra_state(key)}
    return states


def is_extra_state(key: str) -> bool:
    """``..._extra_state``, and of the experts in one grouped product ``..._extra_state1`` and so on for all but the first."""
    return key.rpartition(".")[2].startswith(EXTRA_STATE)


def load_chunks(chunks: Sequence[torch.nn.Module], states: dict) -> None:
    """Put loaded ``sharded_weights`` into the chunks."""
    for chunk, state in zip(chunks, states.values(), strict=True):
        extra = {name: None for name in chunk.state_dict() if is_extra_state(name)}
        chunk.load_state_dict(state | extra)


def read_checkpoint_weights(chunks: Sequence[torch.nn.Module], hf: HFModel, groups: ModelGroups) -> None:
    """Fill the model with the weights of ``hf.checkpoint`` (collective). ``UserError`` when it cannot be read."""
    checked_facts(hf.checkpoint)
    states = sharded_weights(chunks, groups)
    loaded = load_sharded(hf.checkpoint, states)
    load_chunks(chunks, {name: loaded[name] for name in states})
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if name in VOCABULARY:  # padded otherwise than in the checkpoint, and never initialised
                    parameter[max(0, hf.geometry.vocab - groups.pgs.tp.rank() * parameter.size(0)) :].zero_()


def load_sharded(path: Path, sharded_state: dict) -> dict:
    """The checkpoint's content in the shards of this rank (collective). ``UserError`` when it cannot be read."""
    try:
        return dist_checkpointing.load(sharded_state, str(path))
    except torch.OutOfMemoryError:  # a RuntimeError, but nothing is wrong with the checkpoint
        raise
    except (CheckpointingException, CheckpointException, *UNREADABLE) as error:
        raise damaged(path, reason_of(error)) from error


# ---- complete or absent ---------------------------------------------------------------------------------------------


def write_facts(directory: Path, facts: dict, crc32: dict[str, int] | None = None) -> None:
    """Note ``facts`` and the size of every other file in the checkpoint, and the check sums that are known.

    ``crc32``: by the file's name. Names are relative to ``directory``, with those in its folders.
    """
    content = {**facts, "files": _sizes(directory)}
    if crc32 is not None:
        content["crc32"] = crc32
    content[OWN_CRC32] = _crc32_of(content)
    (directory / CHECKPOINT_FACTS).write_text(json.dumps(content))


def checked_facts(path: Path) -> dict:
    """What ``write_facts`` noted of a checkpoint. Raises ``UserError`` unless every file is there in its full size."""
    try:
        facts = json.loads((path / CHECKPOINT_FACTS).read_text())
        sizes = facts["files"]
        if facts.pop(OWN_CRC32, None) not in (None, _crc32_of(facts)):
            raise ValueError("has changed since it was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, f"{CHECKPOINT_FACTS}: {reason_of(error)}") from error
    found = _sizes(path)
    for name, size in sizes.items():
        if name not in found:
            raise damaged(path, f"{name} is missing")
        if found[name] != size:
            raise damaged(path, f"{name} has {found[name]} bytes instead of {size}")
    return facts


def check_contents(path: Path, facts: dict, part: int, parts: int) -> None:
    """Read every ``parts``-th file of the checkpoint, largest first; ``UserError`` when its check sum is another one.

    A checkpoint without check sums (a conversion's) passes.
    """
    known = facts.get("crc32", {})
    names = sorted(known, key=lambda name: (-facts["files"][name], name))
    for name in names[part::parts]:
        try:
            found = crc32(path / name)
        except OSError as error:
            raise damaged(path, f"{name}: {reason_of(error)}") from error
        if found != known[name]:
            raise damaged(path, f"the content of {name} has changed since it was written")


def crc32(file: Path) -> int:
    """The check sum of a file. It finds damage and mistakes, not deliberate changes."""
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(2**22):
            value = zlib.crc32(block, value)
    return value


def _crc32_of(facts: dict) -> int:
    return zlib.crc32(json.dumps(facts, sort_keys=True).encode())


def _sizes(directory: Path) -> dict[str, int]:
    """Bytes of every file of a checkpoint but our own."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    sizes = {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}
    return {name: size for name, size in sizes.items() if name != CHECKPOINT_FACTS}


def damaged(path: Path, problem: str) -> UserError:
    return UserError(f"checkpoint {path}", f"cannot be loaded ({problem})", "delete it to resume from an earlier one")


def reason_of(error: BaseException) -> str:
    """The first sentence of the error; of the first failed rank's error, when torch has gathered those of all."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    lines = str(error).splitlines()
    return lines[0].split(". ")[0] if lines else type(error).__name__


def sync_to_disk(directory: Path) -> None:
    """fsync every file and directory under ``directory``, and itself."""
    for path in [*directory.rglob("*"), directory]:
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            sync_directory(path)


def sync_directory(directory: Path) -> None:
    """fsync the names in ``directory``: after a rename, so that the rename is not lost."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_model_files(hf: HFModel, directory: Path) -> None:
    """Put config, tokenizer and templates of ``hf`` into the checkpoint's ``hf/``, byte for byte."""
    (directory / HF_FILES).mkdir()
    for file in carried_files(hf.path):
        shutil.copyfile(file, directory / HF_FILES / file.name)


def carried_files(directory: Path) -> list[Path]:
    """The files copied with weights: config, tokenizer, templates; never code, never weights or their index."""
    suffixes = (".json", ".txt", ".model", ".jinja")
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.suffix in suffixes)
    return [path for path in files if "safetensors" not in path.name]
