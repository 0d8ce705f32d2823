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


class _RMSNorm(torch.autograd.Function):
    """See ``rms_norm``. The backward in closed form takes a third of the time that autograd takes for the single operations."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (x32 * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        x, weight, scale = ctx.saved_tensors
        normed = x.float() * scale
        of_weight = (gradient * normed.to(x.dtype)).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        of_x = (gradient * weight).float()
        mean = (of_x * normed).mean(-1, keepdim=True)
        of_x = of_x.addcmul_(normed, mean, value=-1).mul_(scale)
        return of_x.to(x.dtype), of_weight, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 inside, returned in x's dtype."""
    return _RMSNorm.apply(x, weight, eps)


class RMSNorm(torch.nn.Module):
    """Counterpart of ``TENorm`` with ``normalization="RMSNorm"``; accepts sequence parallelism."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = _norm_weight(hidden_size, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # of keys, x is a view of the whole QKV projection, which the backward would keep for it
        return rms_norm(x.contiguous(), self.weight, self.eps)


class LayerNormColumnParallelLinear(ColumnParallelLinear):
    """Counterpart of ``TELayerNormColumnParallelLinear``: RMSNorm, then the column-parallel product."""

    def __init__(self, input_size: int, output_size: int, *, config, **kwargs):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = _norm_weight(input_size, config)

    def forward(self, x: torch.Tensor):
        # Under sequence parallelism x is this rank's slice: the norm comes before the gather.
        return super().forward(rms_norm(x, self.layer_norm_weight, self.eps))

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


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up of x = [gate, up]. Keeps x alone for the backward, half of what autograd would keep."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        x = ctx.saved_tensors[0]
        out = torch.empty_like(x)
        (gate, up), (d_gate, d_up) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
        torch.mul(gradient, F.silu(gate), out=d_up)
        torch.ops.aten.silu_backward(gradient * up, gate, grad_input=d_gate)
        return out


class SwiGLU:
    """Counterpart of Transformer Engine's activation modules: [..., 2 f] -> [..., f]. Has no weights."""

    def __init__(self, config):
        pass

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _SwiGLU.apply(x)


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
        """``query`` [sq, b, np, hn], ``key``/``value`` [sk, b, ng, hn] -> [sq, b, np * hn].

        ``attention_mask``: None, the structure of a packed row, or distances in a cache (model/decode_attention.py). With
        None attention is causal over whole sequences; a bias or Megatron's packing is refused rather than ignored.
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError("SDPACoreAttention takes no attention_bias or packed_seq_params")
        value = value.contiguous()  # a view of the whole QKV projection, which the backward would keep for it
        if attention_mask is not None and is_cache(attention_mask):
            return decode_attention(query, key, value, attention_mask, self.window, self.softmax_scale)
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
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return RowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return LayerNormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return SDPACoreAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool):
        return SequentialMLP, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)

    def activation_func(self) -> type:
        return SwiGLU
