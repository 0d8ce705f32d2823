"""Transformer Engine's building blocks in plain torch, under Transformer Engine's parameter names.

Used on CPU (and on GPU with ``spec: torch``), so that checkpoints, weight tables and tests are the same with and
without Transformer Engine. Shapes follow Megatron-Core: activations are ``[s, b, h]``.
"""

import torch
import torch.nn.functional as F
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint

from g2r_megatron.device import local_device
from g2r_megatron.model.decode_attention import decode_attention, is_cache
from g2r_megatron.model.elementwise import rms_norm, swiglu
from g2r_megatron.model.tree_attention import row_attention


def layer_window(config, layer_number: int) -> int | None:
    """How many positions before itself a position of this layer sees; None: all of them."""
    windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
    return config.window_size[0] if windowed else None


def _norm_weight(size: int, config) -> torch.nn.Parameter:
    """A replicated norm weight; under sequence parallelism its gradient is summed over the TP ranks."""
    weight = torch.nn.Parameter(torch.ones(size, dtype=config.params_dtype, device=local_device()))
    weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return weight


class RMSNorm(torch.nn.Module):
    """Counterpart of ``TENorm`` with ``normalization="RMSNorm"``; accepts sequence parallelism."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = _norm_weight(hidden_size, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # of keys, x is a view of the whole QKV projection, which the backward would keep for it
        return rms_norm(x.contiguous(), self.weight, self.eps)


class ColumnLinear(ColumnParallelLinear):
    """Megatron-Core's column-parallel product; a weight that is whole on this rank is multiplied by torch directly."""

    def forward(self, x: torch.Tensor, weight=None, runtime_gather_output=None):
        if self.tp_group.size() > 1:
            return super().forward(x, weight, runtime_gather_output)
        return whole_product(self, x, self.weight if weight is None else weight)


class RowLinear(RowParallelLinear):
    """Megatron-Core's row-parallel product; a weight that is whole on this rank is multiplied by torch directly."""

    def forward(self, x: torch.Tensor):
        return whole_product(self, x, self.weight) if self.tp_group.size() == 1 else super().forward(x)


def whole_product(module: ColumnParallelLinear | RowParallelLinear, x: torch.Tensor, weight: torch.Tensor):
    """(x times ``weight``, None), or without the bias, and the bias where ``module`` leaves its addition to others.

    On one rank this is all that Megatron-Core's autograd function does, at a fraction of its cost a call.
    """
    if module.skip_bias_add:
        return F.linear(x, weight), module.bias
    return F.linear(x, weight, module.bias), None


class LayerNormColumnParallelLinear(ColumnLinear):
    """Counterpart of ``TELayerNormColumnParallelLinear``: RMSNorm, then the column-parallel product."""

    def __init__(self, input_size: int, output_size: int, *, config, **kwargs):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = _norm_weight(input_size, config)

    def forward(self, x: torch.Tensor, weight=None, runtime_gather_output=None):
        # Under sequence parallelism x is this rank's slice: the norm comes before the gather.
        return super().forward(rms_norm(x, self.layer_norm_weight, self.eps), weight, runtime_gather_output)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """weight and bias sharded over axis 0, the norm weight replicated."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0, "bias": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class SwiGLU:
    """Counterpart of Transformer Engine's activation modules: [..., 2 f] -> [..., f]. Has no weights."""

    def __init__(self, config):
        pass

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return swiglu(x)


class SDPACoreAttention(torch.nn.Module):
    """Counterpart of ``TEDotProductAttention``: causal over a batch, over a KV cache, or over a packed row.

    In layers with a sliding window a position sees itself and the ``window_size[0]`` positions before it. Under context
    parallelism it takes packed rows only.
    """

    def __init__(
        self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, *, pg_collection, **kwargs
    ):
        super().__init__()
        self.cp_group = pg_collection.cp
        self.softmax_scale = softmax_scale
        self.window, self.layer_number = layer_window(config, layer_number), layer_number

    def forward(
        self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None, packed_seq_params=None
    ):
        """``query`` [sq, b, np, hn], ``key``/``value`` [sk, b, ng, hn] or caches of them -> [sq, b, np * hn].

        ``attention_mask``: None, the structure of a packed row, or distances in a cache (model/decode_attention.py). With
        None attention is causal over whole sequences; a bias or Megatron's packing is refused rather than ignored.
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError("SDPACoreAttention takes no attention_bias or packed_seq_params")
        if attention_mask is not None and is_cache(attention_mask):
            return decode_attention(query, key, value, attention_mask, self.window, self.softmax_scale)
        value = value.contiguous()  # a view of the whole QKV projection, which the backward would keep for it
        if attention_mask is not None:
            options = self.window, self.softmax_scale, self.cp_group, self.layer_number
            return row_attention(query, key, value, attention_mask, *options)
        if self.cp_group.size() > 1:
            raise ValueError("under context parallelism only packed rows can be run")
        if attn_mask_type != AttnMaskType.causal or query.size(0) != key.size(0):
            raise ValueError(
                f"{attn_mask_type} over {query.size(0)} queries and {key.size(0)} keys, not causal over a batch"
            )
        mask = self._window_mask(query.size(0), query.device)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # [b, heads, s, hn]
        context = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=q.size(1) != k.size(1),
        )
        return context.permute(2, 0, 1, 3).flatten(2)

    def _window_mask(self, length: int, device: torch.device) -> torch.Tensor | None:
        """bool [length, length], True where seen; None where the window hides nothing."""
        if self.window is None or length <= self.window + 1:
            return None
        at = torch.arange(length, device=device)
        distance = at.unsqueeze(1) - at
        return (distance >= 0) & (distance <= self.window)


class TorchSpecProvider(BackendSpecProvider):
    """The plain torch backend; mirrors Megatron-Core's ``TESpecProvider``."""

    def column_parallel_linear(self) -> type:
        return ColumnLinear

    def row_parallel_linear(self) -> type:
        return RowLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return LayerNormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return SDPACoreAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool):
        return SequentialMLP, MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)

    def activation_func(self) -> type:
        return SwiGLU
