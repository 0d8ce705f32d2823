"""Log-probabilities from vocabulary-parallel logits, without ever building the full logits of all ranks."""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region


def mask_padded_vocabulary(logits: torch.Tensor, vocab_start: int, vocab_size: int) -> torch.Tensor:
    """fp32 copy of ``logits`` [n, v_local] with columns beyond the real vocabulary at -inf."""
    logits = logits.float()
    real = max(0, min(logits.size(1), vocab_size - vocab_start))
    if real < logits.size(1):
        padding = torch.arange(logits.size(1), device=logits.device) >= real
        logits = logits.masked_fill(padding, float("-inf"))
    return logits


def log_probs_at(logits: torch.Tensor, ids: torch.Tensor, vocab_size: int, group) -> torch.Tensor:
    """log softmax(logits)[row, ids[row]] over the whole vocabulary.

    ``logits``: [n, v_local], this TP rank's columns; ``ids``: int64 [n, k], global token ids. Returns fp32 [n, k], the
    same on every rank of ``group``; differentiable in ``logits``. The reductions of the backward are identities:
    every rank computes the same loss from the reduced values.
    """
    start = group.rank() * logits.size(1)
    logits = mask_padded_vocabulary(logits, start, vocab_size)
    top = logits.detach().amax(dim=-1)  # [n]
    if group.size() > 1:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    total = reduce_from_tensor_model_parallel_region((logits - top.unsqueeze(1)).exp().sum(-1), group=group)  # [n]
    local = ids - start
    here = (local >= 0) & (local < logits.size(1))
    picked = logits.gather(1, local.clamp(0, logits.size(1) - 1))
    picked = reduce_from_tensor_model_parallel_region(torch.where(here, picked, torch.zeros_like(picked)), group=group)
    return picked - top.unsqueeze(1) - total.log().unsqueeze(1)
