"""Choosing the next token: pure tensor functions, reproducible from a seed string alone."""

import hashlib

import torch


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
    probabilities = torch.softmax(logits.float() / temperature, dim=-1).double()
    cumulative = running_sum(filter_probabilities(probabilities, top_k, top_p))
    chosen = torch.searchsorted(cumulative, (u * cumulative[:, -1]).unsqueeze(1), right=True).squeeze(1)
    # rounding can leave u at the very end: take the last token with any probability
    last = (cumulative < cumulative[:, -1:]).sum(-1)
    return torch.minimum(chosen, last)
