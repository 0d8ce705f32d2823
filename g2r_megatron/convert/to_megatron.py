"""Convert a Hugging Face directory to a Megatron checkpoint (torch_dist), without holding the whole model.

Every process copies its share of the rows: out of the safetensors files, into .distcp files of its own.
"""

from pathlib import Path

import torch
import torch.distributed as dist

from g2r_megatron.convert.byte_progress import CopyProgress
from g2r_megatron.convert.chunks import ChunkWriter, Stored, write_metadata
from g2r_megatron.convert.output_directory import (
    MARKER,
    check_free_space,
    check_output,
    new_directory,
    write_json,
)
from g2r_megatron.convert.tensor_table import (
    Parameter,
    SafetensorsParameters,
    model_parameters,
    read_ahead,
    row_blocks,
    share,
)
from g2r_megatron.errors import UserError, unwritable
from g2r_megatron.model.hf import CHECKPOINT_FACTS, HFModel, load_model_tokenizer, open_hf_model
from g2r_megatron.model.safetensors_files import SafetensorsReader
from g2r_megatron.model.torch_dist import copy_model_files
from g2r_megatron.model.weights import check_tensors
from g2r_megatron.parallel.agreement import raised_by_all
from g2r_megatron.parallel.groups import initialize


def convert_to_megatron(source: str, output: Path) -> None:
    """Write checkpoint ``output`` of the model in Hugging Face directory ``source`` (collective over the world).

    Tensors keep the files' dtype. Raises ``UserError`` on every process, before anything is written, for a model that
    cannot be converted exactly and for an ``output`` that exists; afterwards when the disk is full.
    """
    initialize(seed=0)
    with raised_by_all():
        hf, reader = _open(source)
        check_output(output)
        if dist.get_rank() == 0:
            check_free_space(output, reader.total_bytes)
    parameters = model_parameters(hf)
    values = SafetensorsParameters(hf, reader, parameters)
    parameters.sort(key=values.position)
    with new_directory(output) as directory:
        with raised_by_all():
            mine = _copy(parameters, values, directory)
        stored: list[list[Stored]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(stored, mine)
        with raised_by_all():
            if dist.get_rank() == 0:
                tensors = {p.key: (values.dtype(p), p.stacked + p.shape) for p in parameters}
                write_metadata(directory, tensors, [chunk for part in stored for chunk in part])
                _write_facts(hf, values.dtype(parameters[0]), directory)


def _open(source: str) -> tuple[HFModel, SafetensorsReader]:
    """Everything that can be wrong with the input, found before the output exists."""
    hf = open_hf_model(source, "--hf")
    if hf.checkpoint is not None:
        raise UserError("--hf", f"{source} is a Megatron checkpoint", "give a Hugging Face directory")
    reader = SafetensorsReader(hf.path)
    check_tensors(hf, reader)
    if hf.has_tokenizer or (hf.path / "tokenizer_config.json").is_file():  # weights alone may be converted too
        load_model_tokenizer(hf)
    return hf, reader


def _copy(parameters: list[Parameter], values: SafetensorsParameters, directory: Path) -> list[Stored]:
    """Copy this process's share of the rows."""
    blocks = row_blocks([(p.shape, values.dtype(p)) for p in parameters])
    rank, processes = dist.get_rank(), dist.get_world_size()
    mine = list(share(blocks, rank, processes))
    total, part = (sum(block.nbytes for block in some) for some in (blocks, mine))
    writer = ChunkWriter(directory, rank)
    with CopyProgress("to Megatron", len(parameters), total, part, enabled=rank == 0) as progress:
        for block, rows in read_ahead(mine, lambda b: values.read(parameters[b.item], b.start, b.stop)):
            parameter = parameters[block.item]
            offsets = (*parameter.index, block.start, *[0] * (len(parameter.shape) - 1))
            writer.write(parameter.key, offsets, rows.view(*[1] * len(parameter.index), *rows.shape))
            progress.add(block.nbytes)
        writer.close()
    return writer.stored


def _write_facts(hf: HFModel, dtype: torch.dtype, directory: Path) -> None:
    """Config and tokenizer byte for byte under ``hf/``, and ``g2r.json``, which says what the files do not."""
    try:
        copy_model_files(hf, directory)
        sizes = {p.name: p.stat().st_size for p in sorted(directory.iterdir()) if p.is_file() and p.name != MARKER}
    except OSError as error:
        raise unwritable(directory, error) from error
    facts = {"dtype": str(dtype).removeprefix("torch."), "fused_experts": hf.fused_experts, "files": sizes}
    write_json(directory / CHECKPOINT_FACTS, facts)
