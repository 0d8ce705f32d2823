"""The choice of the next token: pure tensor functions. A seed string alone decides the random numbers."""

import hashlib

import torch
import torch.nn.functional as F

BLOCK = 256  # tokens of the vocabulary


def uniforms(key: str, count: int) -> torch.Tensor:
    """``count`` numbers in [0, 1), fp64 on the CPU, that depend on ``key`` only (not on ranks or batches)."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filter_probabilities(probabilities: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Zero what top-k (0: off) and then top-p (1: off) exclude. [b, v] -> [b, v], not renormalised.

    top-p keeps the smallest set of most likely tokens whose mass reaches ``top_p`` of what top-k left.
    """
    if top_k <= 0 and top_p >= 1:
        return probabilities
    ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
    if top_k > 0:
        ordered[:, top_k:] = 0
    if top_p < 1:
        ordered = ordered / ordered.sum(-1, keepdim=True)
        before = running_sum(ordered) - ordered
        ordered = ordered.masked_fill(before >= top_p, 0)
    return torch.zeros_like(probabilities).scatter_(1, index, ordered)


def running_sum(x: torch.Tensor) -> torch.Tensor:
    """``x.cumsum(-1)``, on the CPU under --deterministic: on CUDA torch has no form of it that repeats its bits."""
    if torch.are_deterministic_algorithms_enabled():
        return x.cpu().cumsum(-1).to(x.device)
    return x.cumsum(-1)


def next_tokens(logits: torch.Tensor, u: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Greedy choice (temperature 0), or the inverse of the cumulative distribution at ``u``.

    ``logits`` [b, v] over the real vocabulary, ``u`` [b] fp64 in [0, 1). Returns int64 [b].
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    probabilities = torch.softmax(logits, dim=-1)
    if top_k > 0 or top_p < 1:
        probabilities = filter_probabilities(probabilities.double(), top_k, top_p)
    return inverse_cumulative(probabilities, u)


def inverse_cumulative(probabilities: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The first token at which the running sum of ``probabilities`` [b, v] exceeds ``u`` [b] times their sum. int64 [b].

    Sums are fp64: of blocks of tokens first, then of the tokens of the block that is found, because a running sum over a
    whole vocabulary is slow.
    """
    blocks = F.pad(probabilities, (0, -probabilities.size(1) % BLOCK)).unflatten(1, (-1, BLOCK))
    sums = running_sum(blocks.sum(-1, dtype=torch.float64))  # [b, blocks]
    wanted = u * sums[:, -1]
    block = _first_above(sums, wanted)
    before = F.pad(sums, (1, 0)).gather(1, block.unsqueeze(1)).squeeze(1)
    inside = running_sum(blocks[torch.arange(len(u), device=u.device), block].double())  # [b, BLOCK]
    return block * BLOCK + _first_above(inside, wanted - before)


def _first_above(sums: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Index [b] of the first of the running ``sums`` [b, n] above ``wanted``. If there is none (rounding): of the largest."""
    found = torch.searchsorted(sums, wanted.unsqueeze(1), right=True).squeeze(1)
    return torch.minimum(found, (sums < sums[:, -1:]).sum(-1))
