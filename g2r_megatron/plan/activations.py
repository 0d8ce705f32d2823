"""Bytes of activations: tensors kept for the backward, tensors of the layer that is running, logits, the KV cache.

Kept tensors of plain torch layers are measured in the tests (test_plan_memory.py); those of Transformer Engine's layers
follow from what these save. Numbers are of one rank and one token unless said otherwise. h, q, k, f: hidden size, all
query heads, all key (or value) heads, feed-forward size; t: tensor parallel size; a: bytes of a number.
"""

from dataclasses import dataclass, replace

from g2r_megatron.config.options import Layout
from g2r_megatron.model.hf import Geometry
from g2r_megatron.plan.stages import Stage

BYTES = {"fp32": 4, "bf16": 2}
FP32 = 4
LOGITS_FORWARD = 12  # bytes a logit at the most: the fp32 copy, the shifted one and its exponential
LOGITS_BACKWARD = 16  # in the backward: the exponential, its gradient, the gradient of the chosen one, their sum
SAMPLING = 28  # bytes a logit while a token is drawn: fp32 copies, fp64 probabilities and their sums


@dataclass(frozen=True)
class Kind:
    """How a model computes: ``te``: Transformer Engine's layers; ``trains``: its weights get gradients."""

    dtype: str
    te: bool
    trains: bool
    recompute: str = "none"

    @property
    def a(self) -> int:
        return BYTES[self.dtype]


def kept_by_layer(g: Geometry, topk: int, layout: Layout, kind: Kind, moe: bool) -> float:
    """Bytes a token that one layer keeps from its forward to its backward, without recompute."""
    return _attention_keeps(g, layout, kind) + (
        _experts_keep(g, topk, layout, kind) if moe else mlp_keeps(g, layout, kind)
    )


def _shard(layout: Layout) -> float:
    """Share of the residual stream that a rank has."""
    return 1 / layout.tp if layout.sp else 1.0


def _norm_keeps(width: float, kind: Kind) -> float:
    """RMSNorm and the product after it: the norm's input and its scale, and what weight gradients need."""
    return kind.a * width * (2 if kind.trains else 1) + FP32


def _attention_keeps(g: Geometry, layout: Layout, kind: Kind) -> float:
    a, q, k = kind.a, g.heads * g.head_dim / layout.tp, g.kv_heads * g.head_dim / layout.tp
    # Transformer Engine: the QKV product, of which the values are a part; plain torch: a copy of the values alone
    values = q + 2 * k if kind.te else k
    # rotated queries and keys, the result, and its log-sum-exp
    kept = _norm_keeps(g.hidden * _shard(layout), kind) + a * (values + (q + k) + q) + FP32 * q / g.head_dim
    return kept + 2 * a * g.head_dim  # cosines and sines of half as many angles, for queries and keys


def qk_norm_keeps(g: Geometry, layout: Layout, kind: Kind) -> float:
    """What a layer keeps for RMSNorms of queries and keys, if it has them."""
    q, k = g.heads * g.head_dim / layout.tp, g.kv_heads * g.head_dim / layout.tp
    if kind.te:
        return kind.a * q  # keys are a part of the QKV product
    return kind.a * (q + k) + FP32 * (q + k) / g.head_dim


def mlp_keeps(g: Geometry, layout: Layout, kind: Kind) -> float:
    """Of a dense layer's feed-forward part, with its norm."""
    f = g.ffn / layout.tp
    # gate and up; with Transformer Engine also silu(gate); the input of the second product if it trains
    width = 2 * f + (f if kind.te else 0) + (f if kind.trains else 0)
    return _norm_keeps(g.hidden * _shard(layout), kind) + kind.a * width


def _experts_keep(g: Geometry, topk: int, layout: Layout, kind: Kind) -> float:
    """With evenly used experts: each of the ``topk`` copies of a token is on one of the stage's ranks."""
    a, share = kind.a, _shard(layout)
    routed = topk * share  # token copies on a rank; expert tensor parallel ranks slice all copies of their group
    f = g.expert_ffn
    # gate and up; silu(gate) with Transformer Engine; the product before it is weighted, and after it if it trains
    width = 2 * f + (f if kind.te else 0) + f + (f if kind.trains else 0)
    inputs = g.hidden * layout.etp if kind.trains else 0
    router = share * 5 * g.experts + routed * 24  # probabilities fp32 and their mask; indices of the copies
    norm = _norm_keeps(g.hidden * share, kind)
    if not kind.trains:
        norm += a * g.hidden * share  # the router keeps its input in any case
    return norm + a * routed * (inputs + width) + router


def layer_work(g: Geometry, topk: int, layout: Layout, kind: Kind, moe: bool, backward: bool) -> float:
    """Bytes a token that a running layer needs besides what is kept: inputs, widest products (and gradients)."""
    a, share = kind.a, _shard(layout)
    q, k = g.heads * g.head_dim / layout.tp, g.kv_heads * g.head_dim / layout.tp
    f = topk * share * (g.hidden + g.expert_ffn) if moe else g.ffn / layout.tp
    stream = 4 * g.hidden * share + (g.hidden if layout.sp else 0)  # residual, norm (and gathered)
    products = (4 if moe else 3) * f  # gate, up and their product; copies of tokens for experts
    return a * (stream + max(products, 3 * q + 3 * k)) + (a * f if backward else 0)


def stage_keeps(g: Geometry, topk: int, qk_norm: bool, stage: Stage, layout: Layout, kind: Kind) -> float:
    """Bytes a token that the layers of one stage keep for one micro-batch, all its virtual stages together."""
    if kind.recompute == "full":
        return kind.a * g.hidden * _shard(layout) * stage.layer_count
    extra = qk_norm_keeps(g, layout, kind) if qk_norm else 0.0
    dense = stage.layer_count - stage.moe_layers
    if kind.recompute == "selective":  # a dense feed-forward part keeps its input; attention is counted as without
        extra_dense = kind.a * g.hidden * _shard(layout) - mlp_keeps(g, layout, kind)
        return stage_keeps(g, topk, qk_norm, stage, layout, replace(kind, recompute="none")) + dense * extra_dense
    kept = stage.moe_layers * kept_by_layer(g, topk, layout, kind, True) if stage.moe_layers else 0.0
    return kept + (dense * kept_by_layer(g, topk, layout, kind, False) if dense else 0.0) + stage.layer_count * extra


def in_flight(layout: Layout, stage: int, micro_batches: int) -> float:
    """Micro-batches whose activations pipeline rank ``stage`` holds at once (of all its layers; 1F1B, interleaved)."""
    if layout.vpp is None:
        return min(micro_batches, layout.pp - stage)
    chunks = 2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1
    return min(micro_batches * layout.vpp, chunks) / layout.vpp


def kv_cache_bytes(g: Geometry, stage: Stage, layout: Layout, kind: Kind, sequences: int, length: int) -> int:
    """Keys and values of ``sequences`` sequences of ``length`` tokens in the layers of one stage."""
    groups = max(1, g.kv_heads // layout.tp)  # more ranks than key-value heads: copies
    return 2 * kind.a * stage.layer_count * sequences * length * groups * g.head_dim
