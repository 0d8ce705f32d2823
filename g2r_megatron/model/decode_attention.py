"""Attention of one new position a sequence over a cache of keys and values, as plain products.

Fused attention kernels of cuDNN make a plan for each new number of keys. A plan takes .05 to .4 s, and every decoding
step has a new number. Products and a softmax need no plan, and most of their time is reading the cache. The cache is
read in blocks (``CacheContext``), so that a run has few shapes.
"""

from collections.abc import Sequence

import torch
from megatron.core.inference.contexts import StaticInferenceContext

from g2r_megatron.model.suffix_attention import fp32_product
from g2r_megatron.parallel.microbatches import padded


class CacheContext(StaticInferenceContext):
    """Megatron-Core's static KV cache whose sequences are each at a position of their own.

    A pass is over whole prompts, which go into given rows of the cache (``begin_prompts``), or over one position of every
    row (``begin_step``). The cache is read in whole blocks of ``block`` positions. (Megatron-Core 0.16's dynamic context
    has positions of their own too, but only on GPUs with FlashAttention's paged kernels, and no virtual stages.)
    """

    def __init__(self, sequences: int, length: int, block: int):
        super().__init__(sequences, padded(length, block))
        self.block = block
        self._rows = self._sources = self._positions = torch.empty(0, dtype=torch.int64)
        self._turn: tuple[torch.Tensor, torch.Tensor] | None = None

    def begin_prompts(self, rows: Sequence[int], sources: Sequence[int], device: torch.device) -> None:
        """The next pass is over prompts from position 0; its prompt ``sources[i]`` is stored in ``rows[i]``."""
        self.enable_prefill_mode()
        self._turn = None
        self._rows = torch.tensor(rows, dtype=torch.int64, device=device)
        self._sources = torch.tensor(sources, dtype=torch.int64, device=device)

    def begin_step(self, positions: Sequence[int], device: torch.device) -> torch.Tensor:
        """The next pass is over one token a row, at ``positions``. Returns its ``attention_mask``.

        This is int64 [rows, 1, positions read]: how far each is behind the row's own. Those below 0 hold nothing yet.
        """
        self.enable_decode_mode()
        self._turn = None
        self._positions = torch.tensor(positions, device=device)
        self._rows = torch.arange(len(positions), device=device)
        read = padded(max(positions) + 1, self.block)
        return (self._positions.unsqueeze(1) - torch.arange(read, device=device)).unsqueeze(1)

    def turn(self, rotary: torch.Tensor, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of this pass's angles: [length, 1, 1, d / 2], or [1, rows, 1, d / 2] in a step.

        ``rotary``: the angles of all positions, fp32 [n, 1, 1, d].
        """
        if self._turn is None:  # the same in every layer
            half = rotary[..., : rotary.size(-1) // 2]
            angles = half[self._positions].transpose(0, 1) if self.is_decode_only() else half[:length]
            self._turn = angles.cos().to(dtype), angles.sin().to(dtype)
        return self._turn

    def update(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a pass's rotated keys and its values [s, b, ng, hn]; what its queries look at.

        This is what was given, or in a step the caches [rows, ng, length, hn].
        """
        if layer not in self.key_value_memory_dict:
            # A block can end after the stored positions. The values there are multiplied by 0, so they must be finite.
            shape = self.max_batch_size, key.size(2), self.max_sequence_length, key.size(3)
            self.key_value_memory_dict[layer] = [key.new_zeros(shape) for _ in range(2)]
        caches = self.key_value_memory_dict[layer]
        for cache, new in zip(caches, (key, value), strict=True):
            if self.is_decode_only():
                cache[self._rows, :, self._positions] = new[0]
            else:
                cache[:, :, : new.size(0)].index_copy_(0, self._rows, new.permute(1, 2, 0, 3)[self._sources])
        return (caches[0], caches[1]) if self.is_decode_only() else (key, value)

    def keep(self, rows: Sequence[int], device: torch.device) -> None:
        """Go on with these rows alone."""
        chosen = torch.tensor(rows, device=device)
        for layer, caches in self.key_value_memory_dict.items():
            self.key_value_memory_dict[layer] = [cache.index_select(0, chosen) for cache in caches]
        self.max_batch_size = len(rows)


def is_cache(attention_mask: torch.Tensor) -> bool:
    """Whether it is of a step over a cache; structures of rows have two dimensions (model/tree_attention.py)."""
    return attention_mask.dim() == 3


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    distances: torch.Tensor,
    window: int | None,
    scale: float | None,
) -> torch.Tensor:
    """``query`` [1, b, np, hn], caches ``key``/``value`` [b, ng, >= keys, hn] -> [1, b, np * hn].

    ``distances`` [b, 1, keys]: of ``CacheContext.begin_step``; as many keys are read. ``window``: at most so many positions
    back are seen. Scores and their softmax are fp32.
    """
    keys, (b, ng, length, hn) = distances.size(2), key.shape
    if query.size(0) != 1 or query.size(1) != b or distances.size(0) != b or keys > length:
        shapes = f"{tuple(query.shape)} over {tuple(key.shape)}"
        raise ValueError(f"{shapes} is not one position a sequence over {tuple(distances.shape)} keys")
    q = query.reshape(b * ng, -1, hn)  # heads of a group together
    k, v = (x.flatten(0, 1)[:, :keys] for x in (key, value))  # [b * ng, keys, hn], not copied
    hidden = distances < 0
    if window is not None:
        hidden = hidden | (distances > window)
    scores = fp32_product(q, k.mT).mul_(hn**-0.5 if scale is None else scale)
    scores.view(b, -1, keys).masked_fill_(hidden, float("-inf"))
    found = fp32_product(scores.softmax(-1).to(v.dtype), v)
    return found.to(query.dtype).view(1, b, -1)
