"""Hugging Face <-> Megatron-Core weights: which rectangle of which file tensor is which part of which parameter.

A Megatron-Core shard is a list of *pieces*: runs of rows (or columns) of Hugging Face tensors, one below the other.
Reading copies a rank's own pieces out of the files, writing puts the same pieces back. Only ``pieces`` contains the
algebra of QKV, gate-up, experts and vocabulary. Parameters go by their *canonical* name: layers and experts are counted
over the whole model.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from g2r_megatron.errors import UserError, warn
from g2r_megatron.model.families import EMBEDDING, GLOBALS, HEAD, Mapping
from g2r_megatron.model.hf import Geometry, HFModel
from g2r_megatron.model.safetensors_files import SafetensorsReader
from g2r_megatron.model.safetensors_format import DTYPES, NAME_OF, NO_QUANTIZED
from g2r_megatron.parallel.groups import ModelGroups

LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
LOCAL_EXPERT = re.compile(r"\.experts\.local_experts\.(\d+)\.")  # of SequentialMLP
GROUPED_EXPERT = re.compile(r"\.experts\.(linear_fc[12]\.weight)(\d+)$")  # of TEGroupedMLP
EXPERT = re.compile(r"\.experts\.(\d+)\.")
COMPARED_ROWS = 4096
# Prefixes that training frameworks and larger models put before a language model's names.
LEADING_WRAPPERS = re.compile(r"^(?:(?:model|language_model|text_model|module|base_model|_forward_module)\.)+")
INNER_WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
BUFFERS = ("rotary_emb.inv_freq", ".position_ids", "rotary_emb.cos_cached", "rotary_emb.sin_cached", ".masked_bias")
SAID_NOTHING = BUFFERS[:1]  # every early Llama checkpoint has them
QUANTIZED = (".qweight", ".weight_packed", ".absmax", ".weight_scale")  # of GPTQ, AWQ, compressed tensors, bitsandbytes
OTHER_HEADS = {"lm_head", "score", "v_head", "value_head", "classifier", "reward_head"}
OTHER_SENSES = {
    *("vision_tower", "vision_model", "visual", "vision_embed_tokens", "image_newline", "multi_modal_projector"),
    *("mm_projector", "audio_tower", "audio_model", "audio_projector", "connector", "perceiver", "embed_vision"),
}


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
    """Raise ``UserError`` naming the first tensor that is missing, unknown, misshapen or of a dtype that is no weight's.

    Afterwards ``reader`` has the model's tensors alone, under the names of the tables. A warning names the tensors that
    the model does not use.
    """
    expected = hf_shapes(hf)
    names = tensor_names(hf, reader.names)
    if missing := [name for name in expected if name not in names]:
        raise UserError(str(hf.path), f"tensor {missing[0]} is missing (of {len(missing)})", _remedy(missing, reader))
    if hf.geometry.tied and HEAD in names and names[HEAD] != names[EMBEDDING]:
        _check_tied_copy(hf, reader, names)
    tied_copy = {names.get(HEAD)} if hf.geometry.tied else set()
    aside = reader.names - {names[name] for name in expected} - tied_copy
    if extra := sorted(name for name in aside if not _is_of_no_use(hf, name)):
        remedy = f"not part of this {hf.architecture} by its config.json"
        if any("lora_" in name or ".base_layer." in name for name in extra):
            remedy = "it is of an adapter: merge it into its model first (merge_and_unload of peft)"
        raise UserError(str(hf.path), f"unknown tensor {extra[0]} (of {len(extra)})", remedy)
    if noted := sorted(name for name in aside if not name.endswith(SAID_NOTHING)):
        warn(f"{hf.path}: tensors that the model has no use for are left aside: {noted[0]} (of {len(noted)})")
    for name, shape in expected.items():
        if reader.shape(names[name]) != shape:
            raise UserError(
                f"{hf.path} {names[name]}", f"shape {reader.shape(names[name])}", f"config.json asks for {shape}"
            )
        if (dtype := reader.dtype(names[name])) not in DTYPES.values():
            remedy = "save the model again as float32" if dtype is torch.float64 else NO_QUANTIZED
            raise UserError(f"{hf.path} {names[name]}", f"dtype {NAME_OF[dtype]}", remedy)
    reader.keep({name: names[name] for name in sorted(expected, key=lambda name: reader.place(names[name]))})


def check_weight_files(hf: HFModel) -> None:
    """``check_tensors`` of the model's safetensors files; a Megatron checkpoint is checked when it is read."""
    if hf.checkpoint is None:
        check_tensors(hf, SafetensorsReader(hf.path))


def tensor_names(hf: HFModel, present: set[str]) -> dict[str, str]:
    """Name in the tables -> name in the files: the same, or with the prefixes that wrappers of a model put or cut off.

    A language model inside a larger one is ``language_model.model.x`` or ``model.language_model.x``; a model saved
    without its output layer has ``x`` for ``model.x``.
    """
    wanted = {_bare(name): name for name in [*hf_shapes(hf), HEAD]}
    names = {wanted[_bare(name)]: name for name in sorted(present) if _bare(name) in wanted}
    names |= {name: name for name in wanted.values() if name in present}
    if hf.geometry.tied and EMBEDDING not in names and HEAD in names:
        names[EMBEDDING] = names[HEAD]
    return names


def _bare(name: str) -> str:
    return LEADING_WRAPPERS.sub("", INNER_WRAPPERS.sub("", name))


def _is_of_no_use(hf: HFModel, name: str) -> bool:
    """Buffers of older versions, heads of another task, and what belongs to images or sounds."""
    if name.endswith(BUFFERS):
        return True
    first = _bare(name).partition(".")[0]
    return first in OTHER_HEADS or first in OTHER_SENSES


def _remedy(missing: list[str], reader: SafetensorsReader) -> str:
    if missing == [HEAD]:
        return (
            "the weights must match config.json; if the output layer is the embedding, set tie_word_embeddings to true"
        )
    if any(name.endswith(QUANTIZED) for name in reader.names):
        return "the files hold a quantized model, which cannot be loaded: dequantize it first"
    if any("lora_" in name or ".base_layer." in name for name in reader.names):
        return "the files are an adapter's: merge it into its model first (merge_and_unload of peft)"
    return "the weights must match config.json"


def _check_tied_copy(hf: HFModel, reader: SafetensorsReader, names: dict[str, str]) -> None:
    """Some files repeat the tied embedding as lm_head; a copy that differs means that the model is not tied."""
    embedding, head = names[EMBEDDING], names[HEAD]
    same = reader.shape(head) == reader.shape(embedding)
    for first in range(0, hf.geometry.vocab if same else 0, COMPARED_ROWS):
        rows = (first, min(first + COMPARED_ROWS, hf.geometry.vocab))
        same = same and torch.equal(reader.read(head, rows).float(), reader.read(embedding, rows).float())
    if not same:
        raise UserError(
            f"{hf.path} {head}",
            f"differs from {embedding}, but config.json says tie_word_embeddings",
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
