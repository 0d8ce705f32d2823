"""Convert a Megatron checkpoint (trained or converted) to a Hugging Face directory, without holding the whole model.

Every process copies its share of the rows: out of the .distcp files, into safetensors files that the first one makes.
"""

import dataclasses
from pathlib import Path

import torch
import torch.distributed as dist

from g2r_megatron.convert.byte_progress import CopyProgress
from g2r_megatron.convert.chunks import METADATA, CheckpointReader
from g2r_megatron.convert.output_directory import check_output, new_directory
from g2r_megatron.convert.tensor_table import NamedTensors, model_parameters, read_ahead, row_blocks, share
from g2r_megatron.errors import UserError, unwritable
from g2r_megatron.model.hf import CHECKPOINT_FACTS, HFModel, open_hf_model, read_json
from g2r_megatron.model.safetensors_files import SafetensorsWriter
from g2r_megatron.model.write_hf import copy_other_files
from g2r_megatron.parallel.agreement import raised_by_all
from g2r_megatron.parallel.groups import initialize


def convert_to_hf(checkpoint: Path, output: Path, hf_files: Path | None = None) -> None:
    """Write Hugging Face directory ``output`` of the model in ``checkpoint`` (collective over the world).

    Tensors keep the stored dtype. ``hf_files``: a directory with config and tokenizer for a checkpoint that has none.
    Raises ``UserError`` on every process, before anything is written, for a checkpoint that is damaged or of another
    model than its config says, and for an ``output`` that exists; afterwards when the disk is full.
    """
    initialize(seed=0)
    with raised_by_all():
        hf = open_checkpoint(checkpoint, hf_files)
        reader = CheckpointReader(checkpoint)
        check_output(output)
    parameters = model_parameters(hf)
    with raised_by_all():
        reader.check(parameters)
    tensors = NamedTensors(hf, parameters, reader)
    first = dist.get_rank() == 0
    layout = {name: (tensors.dtype(name), shape) for name, shape in tensors.shapes.items()}
    with new_directory(output) as directory:
        writer = None
        with raised_by_all():
            if first:
                writer = SafetensorsWriter(directory, layout)
        writer = writer or SafetensorsWriter(directory, layout, create=False)
        with raised_by_all():
            _copy(tensors, writer)
            if not first:
                writer.sync()
        written: list = [None] * dist.get_world_size()
        dist.all_gather_object(written, writer.written)
        with raised_by_all():
            if first:
                writer.finish(written[1:])
                _copy_files(hf, directory, reader.dtype(parameters[0]))


def open_checkpoint(checkpoint: Path, hf_files: Path | None = None) -> HFModel:
    """The model of a checkpoint directory. Raises ``UserError`` for one without config, and for anything else."""
    if not (checkpoint / METADATA).is_file():
        found = f"{checkpoint} has no {METADATA}" if checkpoint.is_dir() else f"{checkpoint} is not a directory"
        inside = sorted(path.parent for path in checkpoint.glob(f"*/{METADATA}"))
        remedy = f"did you mean {inside[-1]}?" if inside else "must be a Megatron checkpoint of format torch_dist"
        raise UserError("--checkpoint", found, remedy)
    if hf_files is None:
        return open_hf_model(str(checkpoint), "--checkpoint")
    return dataclasses.replace(open_hf_model(str(hf_files), "--hf"), checkpoint=checkpoint)


def _copy(tensors: NamedTensors, writer: SafetensorsWriter) -> None:
    """Copy this process's share of the rows."""
    names = list(tensors.shapes)
    blocks = row_blocks([(tensors.shape(name), tensors.dtype(name)) for name in names])
    mine = list(share(blocks, dist.get_rank(), dist.get_world_size()))
    total, part = (sum(block.nbytes for block in some) for some in (blocks, mine))
    with CopyProgress("to Hugging Face", len(names), total, part, enabled=dist.get_rank() == 0) as progress:
        for block, rows in read_ahead(mine, lambda b: tensors.read(names[b.item], (b.start, b.stop)).contiguous()):
            writer.write(names[block.item], rows, block.start)
            progress.add(block.nbytes)


def _copy_files(hf: HFModel, directory: Path, dtype: torch.dtype) -> None:
    """Config and tokenizer, byte for byte if the weights still have the dtype of their conversion."""
    facts = read_json(hf.checkpoint / CHECKPOINT_FACTS) if (hf.checkpoint / CHECKPOINT_FACTS).is_file() else {}
    try:
        same = facts.get("dtype") == str(dtype).removeprefix("torch.")
        copy_other_files(hf, directory, None if same else dtype)
    except OSError as error:
        raise unwritable(directory, error) from error
