"""A decoding step of a dense layer as a dozen calls of torch, for weights that are whole on this rank.

A step of one position a sequence has so little arithmetic that calling Megatron-Core's modules takes as long as a small
model's products. This is what those modules compute (parity tests hold it to transformers); where weights are spread
over tensor parallel ranks, in layers of experts and in Transformer Engine's layers, the modules are called.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer

from g2r_megatron.model.decode_attention import CacheContext
from g2r_megatron.model.elementwise import rotate_by, swiglu
from g2r_megatron.model.torch_layers import LayerNormColumnParallelLinear


class DenseStep:
    """The step of one layer. Looks the layer's weights up once: an update changes them in place."""

    def __init__(self, layer: TransformerLayer):
        attention, mlp = layer.self_attention, layer.mlp
        self.attention, self.core = attention, attention.core_attention
        self.qkv, self.fc1 = attention.linear_qkv, mlp.linear_fc1
        self.norms = self.qkv.layer_norm_weight, self.fc1.layer_norm_weight
        self.weights = self.qkv.weight, attention.linear_proj.weight, self.fc1.weight, mlp.linear_fc2.weight
        norms = attention.q_layernorm, attention.k_layernorm
        self.head_norms = None if isinstance(norms[0], IdentityOp | None) else [norm.weight for norm in norms]
        self.bias, self.eps = self.qkv.bias, self.qkv.eps
        self.groups, self.head = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        self.parts = [attention.num_attention_heads_per_partition // self.groups * self.head, self.head, self.head]

    @staticmethod
    def takes(layer: TransformerLayer) -> bool:
        """Whether it computes what ``layer`` computes in a step over a cache."""
        qkv, mlp = layer.self_attention.linear_qkv, layer.mlp
        return isinstance(qkv, LayerNormColumnParallelLinear) and qkv.tp_group.size() == 1 and isinstance(mlp, MLP)

    def __call__(self, x: torch.Tensor, distances: torch.Tensor, rotary: torch.Tensor, cache: CacheContext):
        """x [1, b, h] -> the layer's output, in new memory. ``distances``, ``rotary``: as ``CacheContext`` has them."""
        qkv, projection, up, down = self.weights
        mixed = F.linear(self._norm(x, self.norms[0]), qkv, self.bias)
        query, key, value = mixed.view(1, x.size(1), self.groups, -1).split(self.parts, dim=3)
        query = query.reshape(1, x.size(1), -1, self.head)
        if self.head_norms is not None:
            query, key = (self._norm(x, weight) for x, weight in zip((query, key), self.head_norms, strict=True))
        turn = cache.turn(rotary, 1, x.dtype)
        keys, values = cache.update(self.attention.layer_number, rotate_by(key, *turn), value)
        found = self.core(rotate_by(query, *turn), keys, values, distances)
        x = F.linear(found, projection).add_(x)
        return F.linear(swiglu(F.linear(self._norm(x, self.norms[1]), up)), down).add_(x)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)
