"""The weights of a running model under Hugging Face names, one tensor at a time, and a directory written from them.

The export at the end of a run uses it, and anything else that needs the current weights (a rollout server).
"""

import json
import math
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from g2r_megatron.model.build import MegatronModel
from g2r_megatron.model.config_file import language_model_fields, read_json
from g2r_megatron.model.hf import HFModel
from g2r_megatron.model.safetensors_files import SafetensorsWriter
from g2r_megatron.model.torch_dist import carried_files
from g2r_megatron.model.weights import EXPERT, hf_shapes, is_expert, mapping_of, pieces


class _Assembly:
    """Hugging Face tensors put together from the pieces that TP and expert ranks hold; each is returned when whole."""

    def __init__(self, hf: HFModel):
        self._hf, self._shapes = hf, hf_shapes(hf)
        self._open: dict[str, tuple[torch.Tensor, int]] = {}  # name -> (tensor, elements still missing)

    def add(self, name: str, tp: int, rank: int, shard: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Put in the shard of parameter ``name`` that TP rank ``rank`` holds; yields (HF name, tensor) now whole.

        A tensor that lies in the shard as it is, is a part of its memory and not copied.
        """
        offset = 0
        for piece in pieces(self._hf, name, tp, rank, shard.size(0)):
            rows = piece.rows[1] - piece.rows[0]
            part = shard.narrow(0, offset, rows)
            offset += rows
            if piece.columns is None and part.numel() == math.prod(self._shapes[piece.hf]):
                yield piece.hf, part.view(self._shapes[piece.hf])
                continue
            if piece.hf not in self._open:
                tensor = torch.empty(self._shapes[piece.hf], dtype=shard.dtype, device=shard.device)
                self._open[piece.hf] = (tensor, tensor.numel())
            tensor, missing = self._open[piece.hf]
            matrix = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor
            target = matrix[slice(*piece.rows)]
            (target if piece.columns is None else target[:, slice(*piece.columns)]).copy_(part)
            self._open[piece.hf] = (tensor, missing - part.numel())
            if missing == part.numel():
                del self._open[piece.hf]
                yield piece.hf, tensor


def _shards(model: MegatronModel, name: str, parameter: torch.Tensor) -> list[tuple[str, int, int, torch.Tensor]]:
    """(canonical name, tp, rank, shard) of one parameter on all ranks that share it out (collective over them).

    Experts are gathered over expert tensor and expert parallel ranks together: one expert of each of the latter.
    """
    pgs, local = model.groups.pgs, parameter.detach().contiguous()
    if mapping_of(model.hf, name).rule == "replicated":
        return [(name, 1, 0, local)]
    group = pgs.tp_ep if is_expert(name) else pgs.tp
    shards = [local]
    if group.size() > 1:
        shards = [torch.empty_like(local) for _ in range(group.size())]
        dist.all_gather(shards, local, group=group)
    if not is_expert(name):
        return [(name, group.size(), rank, shard) for rank, shard in enumerate(shards)]
    tp, local_experts = pgs.expt_tp.size(), model.geometry.experts // pgs.ep.size()
    local_expert = int(EXPERT.search(name)[1]) % local_experts
    names = [EXPERT.sub(f".experts.{ep * local_experts + local_expert}.", name) for ep in range(pgs.ep.size())]
    return [(names[i // tp], tp, i % tp, shard) for i, shard in enumerate(shards)]


def stage_tensors(model: MegatronModel) -> Iterator[tuple[str, torch.Tensor]]:
    """(HF name, tensor) of this pipeline stage, one at a time (collective over its TP and expert ranks).

    A tensor can be a part of the model's own memory, and changes with it.

    The tied output copy of a last stage is left out: it is the embedding.
    """
    assembly = _Assembly(model.hf)
    for name, parameter in model.named_parameters():
        if name == "output_layer.weight" and model.geometry.tied:
            continue
        for shard in _shards(model, name, parameter):
            yield from assembly.add(*shard)


def iterate_hf_tensors(model: MegatronModel) -> Iterator[tuple[str, torch.Tensor]]:
    """(HF name, CPU tensor) of the whole model on global rank 0, one at a time; other ranks yield nothing.

    On a CPU a tensor can be a part of the model's own memory, and changes with it.

    Collective: every rank must exhaust it. Stages send to the first stage over the pipeline group of replica 0.
    """
    mine, groups = stage_tensors(model), model.groups
    pp = groups.pgs.pp
    if groups.dp_rank > 0 or groups.pgs.tp.rank() > 0:
        for _ in mine:
            pass
        return
    if pp.rank() == 0:
        for name, tensor in mine:
            yield name, tensor.cpu()
        for stage in range(1, pp.size()):
            source = dist.get_global_rank(pp, stage)
            while (header := _receive_object(source, pp)) is not None:
                name, shape, dtype = header
                tensor = torch.empty(shape, dtype=dtype, device=next(model.chunks[0].parameters()).device)
                dist.recv(tensor, source, group=pp)
                yield name, tensor.cpu()
        return
    destination = dist.get_global_rank(pp, 0)
    for name, tensor in mine:
        _send_object((name, tuple(tensor.shape), tensor.dtype), destination, pp)
        dist.send(tensor.contiguous(), destination, group=pp)
    _send_object(None, destination, pp)


def _send_object(value, destination: int, group) -> None:
    dist.send_object_list([value], dst=destination, group=group)


def _receive_object(source: int, group):
    box = [None]
    dist.recv_object_list(box, src=source, group=group)
    return box[0]


def save_hf(tensors: Iterable[tuple[str, torch.Tensor]], hf: HFModel, output: Path, dtype: torch.dtype) -> None:
    """Write a Hugging Face directory that transformers loads: sharded safetensors, config, tokenizer, templates.

    Runs on rank 0 (where ``tensors`` yields). The directory appears under its name only when complete.
    """
    temporary = output.with_name(output.name + ".incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    writer = SafetensorsWriter(temporary, {name: (dtype, shape) for name, shape in hf_shapes(hf).items()})
    for name, tensor in tensors:
        writer.write(name, tensor)
    writer.finish()
    copy_other_files(hf, temporary, dtype)
    temporary.rename(output)


def copy_other_files(hf: HFModel, directory: Path, dtype: torch.dtype | None) -> None:
    """Everything but weights is copied byte for byte; config.json changes only where the weights differ.

    That is: they have another ``dtype`` than it names (None: leave it), the language model was part of a larger model,
    or it was saved without its output layer.
    """
    for file in carried_files(hf.path):
        shutil.copyfile(file, directory / file.name)
    raw = read_json(hf.path / "config.json")
    config = language_model_fields(raw)
    changed = config is not raw
    if config.get("architectures") not in (None, [], [hf.architecture]):
        config["architectures"], changed = [hf.architecture], True
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    if dtype is not None and str(config.get(key)) != (name := str(dtype).removeprefix("torch.")):
        config[key], changed = name, True
    if changed:
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
