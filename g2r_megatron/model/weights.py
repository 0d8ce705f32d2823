"""Hugging Face <-> Megatron-Core weights, both ways, one tensor at a time.

A Megatron-Core shard is a list of *pieces*: runs of rows (or columns) of Hugging Face tensors, one after the other.
Reading copies a rank's own pieces out of the files; writing gathers the TP shards of one parameter and copies the
same pieces back. The QKV, gate-up and vocabulary algebra lives in ``pieces`` alone.
"""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from g2r_megatron.errors import UserError
from g2r_megatron.model.families import Mapping, mapping_of
from g2r_megatron.model.hf import Geometry, HFModel, SafetensorsReader
from g2r_megatron.parallel.groups import ModelGroups

MAX_SHARD_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Piece:
    """Rows (``dim`` 0) or columns (``dim`` 1) ``start:stop`` of Hugging Face tensor ``hf``."""

    hf: str
    dim: int
    start: int
    stop: int


def hf_shape(mapping: Mapping, index: int, g: Geometry, bias: bool) -> tuple[int, ...]:
    """Full shape of ``mapping.hf[index]``; ``bias`` for one-dimensional tensors of a sharded rule."""
    rows = {
        "qkv": (g.heads * g.head_dim, g.kv_heads * g.head_dim, g.kv_heads * g.head_dim),
        "gate_up": (g.ffn, g.ffn),
        "vocab": (g.vocab,),
        "row": (g.hidden,),
    }[mapping.rule][index]
    columns = g.hidden
    if mapping.rule == "row":
        columns = g.heads * g.head_dim if "o_proj" in mapping.hf[index] else g.ffn
    return (rows,) if bias else (rows, columns)


def _window(runs: list[tuple[str, int, int]], start: int, stop: int) -> list[Piece]:
    """The pieces covering rows ``start:stop`` of the concatenation of ``runs``."""
    result, offset = [], 0
    for hf, first, last in runs:
        low, high = max(start, offset), min(stop, offset + last - first)
        if low < high:
            result.append(Piece(hf, 0, first + low - offset, first + high - offset))
        offset += last - first
    return result


def pieces(mapping: Mapping, g: Geometry, tp: int, rank: int, vocab_rows: int) -> list[Piece]:
    """What TP rank ``rank`` of ``tp`` holds of one parameter, in order. Empty for ``replicated`` (all of it).

    ``vocab_rows``: rows of one (padded) vocabulary shard; other rules do not look at it.
    """
    rule, hf = mapping.rule, mapping.hf
    if rule == "replicated":
        return []
    if rule == "row":
        columns = hf_shape(mapping, 0, g, bias=False)[1] // tp
        return [Piece(hf[0], 1, rank * columns, (rank + 1) * columns)]
    if rule == "gate_up":
        rows = g.ffn // tp
        return [Piece(name, 0, rank * rows, (rank + 1) * rows) for name in hf]
    if rule == "vocab":
        return _window([(hf[0], 0, g.vocab)], rank * vocab_rows, (rank + 1) * vocab_rows)
    if rule == "qkv":
        q, runs = g.heads // g.kv_heads * g.head_dim, []
        for group in range(g.kv_heads):
            runs.append((hf[0], group * q, (group + 1) * q))
            runs += [(name, group * g.head_dim, (group + 1) * g.head_dim) for name in hf[1:]]
        rows = (g.heads + 2 * g.kv_heads) * g.head_dim // tp
        return _window(runs, rank * rows, (rank + 1) * rows)
    raise ValueError(f"unknown rule {rule}")


def global_name(name: str, layer_offset: int) -> str:
    """A stage-local parameter name with the layer number counted over the whole model."""
    return re.sub(r"^decoder\.layers\.(\d+)\.", lambda m: f"decoder.layers.{int(m[1]) + layer_offset}.", name)


def _source(mapping: Mapping, hf: HFModel) -> Mapping:
    """Tied output layers (the copy on the last pipeline stage) are read from the embedding."""
    if hf.geometry.tied and mapping.hf == ("lm_head.weight",):
        return Mapping("vocab", ("model.embed_tokens.weight",))
    return mapping


def expected_hf_names(hf: HFModel) -> set[str]:
    """Every tensor that the family's tables read."""
    names = {name for _, mapping in hf.family.globals for name in _source(mapping, hf).hf}
    for layer in range(hf.geometry.layers):
        names |= {name.format(i=layer) for mapping in hf.family.layer.values() for name in mapping.hf}
    return names


def check_tensor_names(hf: HFModel, reader: SafetensorsReader) -> None:
    """Raise ``UserError`` naming the first missing or unknown tensor."""
    expected = expected_hf_names(hf)
    missing = sorted(expected - reader.names)
    if missing:
        raise UserError(
            str(hf.path), f"tensor {missing[0]} is missing (of {len(missing)})", "the weights must match config.json"
        )
    ignorable = {name for name in reader.names if name.endswith("rotary_emb.inv_freq")}
    if hf.geometry.tied:
        ignorable.add("lm_head.weight")  # some files repeat the tied embedding
    extra = sorted(reader.names - expected - ignorable)
    if extra:
        raise UserError(
            str(hf.path), f"unknown tensor {extra[0]} (of {len(extra)})", f"not part of {hf.family.architecture}"
        )


def load_hf_weights(model: torch.nn.Module, hf: HFModel, groups: ModelGroups, layer_offset: int) -> None:
    """Fill ``model``'s parameters in place from the directory, reading only this rank's slices.

    Values are converted to each parameter's dtype; padded vocabulary rows are zero. Raises ``UserError`` for missing,
    unknown or misshapen tensors.
    """
    reader = SafetensorsReader(hf.path)
    check_tensor_names(hf, reader)
    tp, rank = groups.pgs.tp.size(), groups.pgs.tp.rank()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mapping = _source(mapping_of(hf.family, global_name(name, layer_offset)), hf)
            _check_shapes(mapping, hf, reader, parameter)
            if mapping.rule == "replicated":
                parameter.copy_(reader.read(mapping.hf[0], 0, 0, parameter.size(0)))
                continue
            parameter.zero_()
            offset = 0
            for piece in pieces(mapping, hf.geometry, tp, rank, parameter.size(0)):
                part = reader.read(piece.hf, piece.dim, piece.start, piece.stop)
                parameter.narrow(piece.dim, offset, piece.stop - piece.start).copy_(part)
                offset += piece.stop - piece.start


def _check_shapes(mapping: Mapping, hf: HFModel, reader: SafetensorsReader, parameter) -> None:
    for index, name in enumerate(mapping.hf):
        if mapping.rule == "replicated":
            expected = tuple(parameter.shape)
        else:
            expected = hf_shape(mapping, index, hf.geometry, bias=parameter.dim() == 1)
        if reader.shape(name) != expected:
            raise UserError(f"{hf.path} {name}", f"shape {reader.shape(name)}", f"config.json asks for {expected}")
        reader.dtype(name)


def _gather_shards(parameter: torch.Tensor, rule: str, groups: ModelGroups) -> list[torch.Tensor]:
    """All TP shards of a parameter (every TP rank gets them); one for replicated parameters."""
    local = parameter.detach().contiguous()
    if rule == "replicated" or groups.pgs.tp.size() == 1:
        return [local]
    shards = [torch.empty_like(local) for _ in range(groups.pgs.tp.size())]
    dist.all_gather(shards, local, group=groups.pgs.tp)
    return shards


def _assemble(mapping: Mapping, shards: list[torch.Tensor], g: Geometry) -> dict[str, torch.Tensor]:
    """The Hugging Face tensors of one parameter from all its TP shards; padding is dropped."""
    if mapping.rule == "replicated":
        return {mapping.hf[0]: shards[0]}
    bias = shards[0].dim() == 1
    result = {
        name: torch.empty(hf_shape(mapping, i, g, bias), dtype=shards[0].dtype, device=shards[0].device)
        for i, name in enumerate(mapping.hf)
    }
    for rank, shard in enumerate(shards):
        offset = 0
        for piece in pieces(mapping, g, len(shards), rank, shard.size(0)):
            length = piece.stop - piece.start
            result[piece.hf].narrow(piece.dim, piece.start, length).copy_(shard.narrow(piece.dim, offset, length))
            offset += length
    return result


def stage_tensors(model: torch.nn.Module, hf: HFModel, groups: ModelGroups, layer_offset: int) -> Iterator:
    """(HF name, tensor) of this pipeline stage, gathered over TP, one parameter at a time (collective over TP).

    The tied output copy of a last stage is left out: it is the embedding.
    """
    for name, parameter in model.named_parameters():
        if name == "output_layer.weight" and hf.geometry.tied:
            continue
        mapping = mapping_of(hf.family, global_name(name, layer_offset))
        yield from _assemble(mapping, _gather_shards(parameter, mapping.rule, groups), hf.geometry).items()


def iterate_hf_tensors(model: torch.nn.Module, hf: HFModel, groups: ModelGroups, layer_offset: int) -> Iterator:
    """(HF name, CPU tensor) of the whole model on global rank 0, one at a time; other ranks yield nothing.

    Collective: every rank must exhaust it. Stages send to the first stage over the pipeline group of replica 0.
    """
    mine = stage_tensors(model, hf, groups, layer_offset)
    pp = groups.pgs.pp
    sender = groups.dp_rank == 0 and groups.pgs.tp.rank() == 0
    if not sender:
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
                tensor = torch.empty(shape, dtype=dtype, device=next(model.parameters()).device)
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


def save_hf(tensors: Iterator, hf: HFModel, output: Path, dtype: torch.dtype) -> None:
    """Write a Hugging Face directory that transformers loads: sharded safetensors, config, tokenizer, templates.

    Runs on rank 0 (where ``tensors`` yields). The directory appears under its name only when complete.
    """
    temporary = output.with_name(output.name + ".incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    shard, size, weight_map, files = {}, 0, {}, []
    total = 0

    def flush():
        file = f"shard-{len(files)}.safetensors"
        save_file(shard, temporary / file, metadata={"format": "pt"})
        files.append(file)
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > MAX_SHARD_BYTES:
            flush()
            size = 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(files) == 1:
        (temporary / files[0]).rename(temporary / "model.safetensors")
    else:
        final = {f: f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i, f in enumerate(files)}
        for old, new in final.items():
            (temporary / old).rename(temporary / new)
        index = {"metadata": {"total_size": total}, "weight_map": {n: final[f] for n, f in sorted(weight_map.items())}}
        (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    _copy_other_files(hf, temporary, dtype)
    temporary.rename(output)


def _copy_other_files(hf: HFModel, directory: Path, dtype: torch.dtype) -> None:
    """Everything but weights comes along byte for byte; config.json gets the dtype that was written."""
    for file in sorted(hf.path.iterdir()):
        if file.is_file() and file.suffix in (".json", ".txt", ".model", ".jinja") and "safetensors" not in file.name:
            shutil.copyfile(file, directory / file.name)
    config = json.loads((hf.path / "config.json").read_text())
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    if str(config.get(key)) != (name := str(dtype).removeprefix("torch.")):
        config[key] = name
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
