"""Attention of one new position a sequence over a cache of keys and values, as plain products.

Fused attention kernels of cuDNN make a plan for each new number of keys. A plan takes .05 to .4 s, and every decoding
step has a new number. Products and a softmax need no plan, and most of their time is reading the cache. The cache is
read in blocks (``CacheContext``), so that a run has few shapes.
"""

import torch
from megatron.core.inference.contexts import StaticInferenceContext

from g2r_megatron.model.suffix_attention import fp32_product
from g2r_megatron.parallel.microbatches import padded


class CacheContext(StaticInferenceContext):
    """Megatron-Core's static KV cache, read in whole blocks of ``block`` positions."""

    def __init__(self, sequences: int, length: int, block: int):
        super().__init__(sequences, padded(length, block))
        self.block = block

    def read_length(self, end: int) -> int:
        """Positions that a step reads when ``end`` positions are stored."""
        return padded(end, self.block)

    def distances(self, position: int, device: torch.device) -> torch.Tensor:
        """What a step's ``attention_mask`` is: int64 [positions read], how far each one is behind ``position``.

        Those below 0 hold nothing yet.
        """
        return position - torch.arange(self.read_length(position + 1), device=device)


def is_cache(attention_mask: torch.Tensor) -> bool:
    """Whether it is ``distances`` of a cache; structures of rows have two dimensions (model/tree_attention.py)."""
    return attention_mask.dim() == 1


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    distances: torch.Tensor,
    window: int | None,
    scale: float | None,
) -> torch.Tensor:
    """``query`` [1, b, np, hn], ``key``/``value`` [keys, b, ng, hn], ``distances`` [keys] -> [1, b, np * hn].

    ``window``: at most so many positions back are seen. Scores and their softmax are fp32.
    """
    if query.size(0) != 1 or distances.size(0) != key.size(0):
        raise ValueError(f"{tuple(query.shape)} over {tuple(key.shape)} is not one position over {len(distances)} keys")
    groups = key.size(1) * key.size(2)
    q = query.reshape(groups, -1, query.size(3))  # heads of a group together
    k, v = (x.flatten(1, 2).transpose(0, 1) for x in (key, value))  # [b * ng, keys, hn], not copied
    hidden = distances < 0
    if window is not None:
        hidden = hidden | (distances > window)
    scores = fp32_product(q, k.mT).mul_(query.size(3) ** -0.5 if scale is None else scale)
    found = fp32_product(scores.masked_fill_(hidden, float("-inf")).softmax(-1).to(v.dtype), v)
    return found.to(query.dtype).view(1, query.size(1), -1)
