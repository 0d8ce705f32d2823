"""Hugging Face <-> Megatron-Core weights: which rectangle of which file tensor is which part of which parameter.

A Megatron-Core shard is a list of *pieces*: runs of rows (or columns) of Hugging Face tensors, one below the other.
Reading copies a rank's own pieces out of the files, writing puts the same pieces back; the QKV, gate-up, expert and
vocabulary algebra lives in ``pieces`` alone. Parameters go by their *canonical* name: layers and experts are counted
over the whole model.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from g2r_megatron.errors import UserError
from g2r_megatron.model.families import EMBEDDING, GLOBALS, HEAD, Mapping
from g2r_megatron.model.hf import Geometry, HFModel
from g2r_megatron.model.safetensors_files import SafetensorsReader
from g2r_megatron.parallel.groups import ModelGroups

LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
LOCAL_EXPERT = re.compile(r"\.experts\.local_experts\.(\d+)\.")  # of SequentialMLP
GROUPED_EXPERT = re.compile(r"\.experts\.(linear_fc[12]\.weight)(\d+)$")  # of TEGroupedMLP
EXPERT = re.compile(r"\.experts\.(\d+)\.")
COMPARED_ROWS = 4096


@dataclass(frozen=True)
class Piece:
    """Rows (and columns, all if None) of Hugging Face tensor ``hf``, seen as a matrix: [..., n] is [rows, n]."""

    hf: str
    rows: tuple[int, int]
    columns: tuple[int, int] | None = None


# ---- names ----------------------------------------------------------------------------------------------------------


def canonical_name(name: str, layer_offset: int, first_expert: int) -> str:
    """A module's own parameter name with its layer and its expert counted over the whole model."""
    name = LAYER.sub(lambda m: f"decoder.layers.{int(m[1]) + layer_offset}.", name)
    name = LOCAL_EXPERT.sub(lambda m: f".experts.{int(m[1]) + first_expert}.", name)
    return GROUPED_EXPERT.sub(lambda m: f".experts.{int(m[2]) + first_expert}.{m[1]}", name)


def is_expert(name: str) -> bool:
    """Whether a canonical name is of an expert: those are spread over the expert parallel groups."""
    return EXPERT.search(name) is not None


def layer_table(hf: HFModel, layer: int) -> dict[str, Mapping]:
    """The family's table of one layer, canonical names after "decoder.layers.{i}."."""
    if not hf.geometry.is_moe(layer):
        return {**hf.family.attention, **hf.family.dense}
    return {**hf.family.attention, **(hf.family.fused_experts if hf.fused_experts else hf.family.experts)}


def parameter_names(hf: HFModel) -> Iterator[str]:
    """Every parameter of the model, in the order of its layers; a tied output layer is the embedding."""
    yield "embedding.word_embeddings.weight"
    for layer in range(hf.geometry.layers):
        for rest in layer_table(hf, layer):
            if "{e}" in rest:
                yield from (f"decoder.layers.{layer}.{rest.format(e=e)}" for e in range(hf.geometry.experts))
            else:
                yield f"decoder.layers.{layer}.{rest}"
    yield "decoder.final_layernorm.weight"
    if hf.geometry.is_reward_model:
        yield "score.weight"
    elif not hf.geometry.tied:
        yield "output_layer.weight"


def mapping_of(hf: HFModel, name: str) -> Mapping:
    """The mapping of a canonical name, layer and expert filled in. ``KeyError`` for one that the tables do not know."""
    if not (match := LAYER.match(name)):
        if name == "output_layer.weight" and hf.geometry.tied:  # the copy on the last pipeline stage
            name = "embedding.word_embeddings.weight"
        return GLOBALS[name]
    rest, expert = name[match.end() :], None
    if found := EXPERT.search(name):
        rest, expert = EXPERT.sub(".experts.{e}.", rest), found[1]
    mapping = layer_table(hf, int(match[1]))[rest]
    return Mapping(mapping.rule, tuple(t.format(i=match[1], e=expert) for t in mapping.hf), mapping.fused)


# ---- shapes ---------------------------------------------------------------------------------------------------------


def unsharded_shape(g: Geometry, name: str) -> tuple[int, ...]:
    """Shape of a whole parameter (TP 1, no vocabulary padding) by its canonical name."""
    qkv, ffn = (g.heads + 2 * g.kv_heads) * g.head_dim, g.expert_ffn if is_expert(name) else g.ffn
    shapes = {
        "word_embeddings.weight": (g.vocab, g.hidden),
        "output_layer.weight": (g.vocab, g.hidden),
        "score.weight": (1, g.hidden),
        "linear_qkv.weight": (qkv, g.hidden),
        "linear_qkv.bias": (qkv,),
        "linear_proj.weight": (g.hidden, g.heads * g.head_dim),
        "linear_fc1.weight": (2 * ffn, g.hidden),
        "linear_fc2.weight": (g.hidden, ffn),
        "router.weight": (g.experts, g.hidden),
        "q_layernorm.weight": (g.head_dim,),
        "k_layernorm.weight": (g.head_dim,),
    }
    return next((shape for suffix, shape in shapes.items() if name.endswith(suffix)), (g.hidden,))


def _block_rows(mapping: Mapping, g: Geometry, shape: tuple[int, ...]) -> list[int]:
    """Rows that each of ``mapping.hf`` gives to the whole parameter."""
    if mapping.rule == "qkv":
        return [g.heads * g.head_dim, g.kv_heads * g.head_dim, g.kv_heads * g.head_dim]
    return [shape[0] // len(mapping.hf)] * len(mapping.hf)


def hf_shapes(hf: HFModel) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of the model and its shape, in the order of the layers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in parameter_names(hf):
        mapping, whole = mapping_of(hf, name), unsharded_shape(hf.geometry, name)
        rows = _block_rows(mapping, hf.geometry, whole)
        if mapping.fused:
            shapes[mapping.hf[0]] = (hf.geometry.experts, sum(rows), *whole[1:])
        else:
            shapes |= {tensor: (n, *whole[1:]) for tensor, n in zip(mapping.hf, rows, strict=True)}
    return shapes


# ---- the algebra ----------------------------------------------------------------------------------------------------


def _blocks(mapping: Mapping, g: Geometry, name: str) -> list[tuple[str, int, int]]:
    """(tensor, first row, end row) of each of ``mapping.hf``; experts in one tensor lie one below the other."""
    rows = _block_rows(mapping, g, unsharded_shape(g, name))
    base = int(EXPERT.search(name)[1]) * sum(rows) if mapping.fused else 0
    blocks = []
    for tensor, n in zip(mapping.hf, rows, strict=True):
        blocks.append((tensor, base, base + n))
        base += n if mapping.fused else 0
    return blocks


def _runs(mapping: Mapping, g: Geometry, name: str) -> list[tuple[str, int, int]]:
    """The rows of the whole parameter, in order, as runs of rows of Hugging Face tensors."""
    blocks = _blocks(mapping, g, name)
    if mapping.rule != "qkv":
        return blocks
    q, runs = g.heads // g.kv_heads * g.head_dim, []
    for group in range(g.kv_heads):
        runs.append((mapping.hf[0], group * q, (group + 1) * q))
        runs += [(tensor, group * g.head_dim, (group + 1) * g.head_dim) for tensor in mapping.hf[1:]]
    return runs


def _window(runs: list[tuple[str, int, int]], start: int, stop: int) -> list[Piece]:
    """The pieces covering rows ``start:stop`` of the concatenation of ``runs``."""
    result, offset = [], 0
    for tensor, first, last in runs:
        low, high = max(start, offset), min(stop, offset + last - first)
        if low < high:
            result.append(Piece(tensor, (first + low - offset, first + high - offset)))
        offset += last - first
    return result


def parameter_pieces(hf: HFModel, name: str, start: int, stop: int) -> list[Piece]:
    """Rows ``start:stop`` of the whole parameter ``name``; rows beyond the real vocabulary are left out."""
    return _window(_runs(mapping_of(hf, name), hf.geometry, name), start, stop)


def pieces(hf: HFModel, name: str, tp: int, rank: int, shard_rows: int) -> list[Piece]:
    """What tensor parallel rank ``rank`` of ``tp`` holds of parameter ``name``, one piece below the other.

    ``shard_rows``: rows of one vocabulary shard (padded, so not to be computed here); other rules do not look at it.
    """
    mapping, whole = mapping_of(hf, name), unsharded_shape(hf.geometry, name)
    if mapping.rule == "replicated":
        return parameter_pieces(hf, name, 0, whole[0])
    if mapping.rule == "row":
        columns = whole[1] // tp
        ((tensor, first, last),) = _blocks(mapping, hf.geometry, name)
        return [Piece(tensor, (first, last), (rank * columns, (rank + 1) * columns) if tp > 1 else None)]
    if mapping.rule == "gate_up":
        rows = whole[0] // 2 // tp
        return [
            Piece(tensor, (first + rank * rows, first + (rank + 1) * rows))
            for tensor, first, _ in _blocks(mapping, hf.geometry, name)
        ]
    rows = shard_rows if mapping.rule == "vocab" else whole[0] // tp
    return parameter_pieces(hf, name, rank * rows, (rank + 1) * rows)


# ---- reading --------------------------------------------------------------------------------------------------------


def check_tensors(hf: HFModel, reader: SafetensorsReader) -> None:
    """Raise ``UserError`` naming the first tensor that is missing, unknown, misshapen or of another dtype."""
    expected = hf_shapes(hf)
    if missing := [name for name in expected if name not in reader.names]:
        raise UserError(
            str(hf.path), f"tensor {missing[0]} is missing (of {len(missing)})", "the weights must match config.json"
        )
    ignorable = {name for name in reader.names if name.endswith("rotary_emb.inv_freq")}
    if hf.geometry.tied and HEAD in reader.names:
        _check_tied_copy(hf, reader)
        ignorable.add(HEAD)
    if extra := sorted(reader.names - expected.keys() - ignorable):
        raise UserError(
            str(hf.path),
            f"unknown tensor {extra[0]} (of {len(extra)})",
            f"not part of this {hf.architecture} by its config.json",
        )
    first = next(iter(expected))
    for name, shape in expected.items():
        if reader.shape(name) != shape:
            raise UserError(f"{hf.path} {name}", f"shape {reader.shape(name)}", f"config.json asks for {shape}")
        if reader.dtype(name) != reader.dtype(first):
            raise UserError(
                f"{hf.path} {name}",
                f"dtype {reader.dtype(name)}, while {first} has {reader.dtype(first)}",
                "all weights must be of one dtype",
            )


def _check_tied_copy(hf: HFModel, reader: SafetensorsReader) -> None:
    """Some files repeat the tied embedding as lm_head; a copy that differs means that the model is not tied."""
    same = reader.shape(HEAD) == reader.shape(EMBEDDING)
    for first in range(0, hf.geometry.vocab if same else 0, COMPARED_ROWS):
        rows = (first, min(first + COMPARED_ROWS, hf.geometry.vocab))
        same = same and torch.equal(reader.read(HEAD, rows), reader.read(EMBEDDING, rows))
    if not same:
        raise UserError(
            f"{hf.path} {HEAD}",
            f"differs from {EMBEDDING}, but config.json says tie_word_embeddings",
            "set it to false, or remove the tensor",
        )


def read_hf_weights(parameters: Iterable[tuple[str, torch.nn.Parameter]], hf: HFModel, groups: ModelGroups) -> None:
    """Fill (canonical name, parameter) in place from the safetensors files, reading only this rank's slices.

    Values are converted to each parameter's dtype; padded vocabulary rows are zero. Raises ``UserError`` for weights
    that do not match the config.
    """
    reader = SafetensorsReader(hf.path)
    check_tensors(hf, reader)
    with torch.no_grad():
        for name, parameter in parameters:
            tp = groups.pgs.expt_tp if is_expert(name) else groups.pgs.tp
            offset = 0
            for piece in pieces(hf, name, tp.size(), tp.rank(), parameter.size(0)):
                part = reader.read(piece.hf, piece.rows, piece.columns)
                parameter.narrow(0, offset, part.size(0)).copy_(part)
                offset += part.size(0)
            parameter[offset:].zero_()  # rows beyond the real vocabulary


def first_expert(hf: HFModel, groups: ModelGroups) -> int:
    """The first expert of every layer that this rank holds."""
    return groups.pgs.ep.rank() * (hf.geometry.experts // groups.pgs.ep.size())
