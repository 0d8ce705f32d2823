"""The clipped policy loss with its KL penalty, as sums that add up over micro-batches and ranks (docs/method.md step 7)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from g2r_megatron.config.options import GrpoConfig


@dataclass
class LossOutput:
    """``loss`` carries the gradient; ``sums`` and ``maxima`` are detached fp32 scalars on the same device.

    ``sums`` add up over micro-batches and ranks, ``maxima`` are reduced by max; ``loss_metrics`` reads the totals.
    """

    loss: Tensor  # []
    sums: dict[str, Tensor]
    maxima: dict[str, Tensor]


def aggregation_weights(lengths: list[int], kind: str, max_response_tokens: int) -> list[float]:
    """Weight u_i of every token of response i, so that sum_i sum_t u_i loss_it is the aggregated loss.

    ``lengths``: tokens with the stop token, of **all** responses of the mini-batch over all ranks and micro-batches (N).
    ``seq_mean``: 1 / (N |o_i|); ``token_mean``: 1 / sum_j |o_j|; ``dr_grpo``: 1 / (N max_response_tokens).
    An empty response has no token to weigh (0) but counts in N.
    """
    count, total = len(lengths), sum(lengths)
    if kind == "seq_mean":
        return [1.0 / (count * length) if length else 0.0 for length in lengths]
    if kind == "token_mean":
        return [1.0 / total if length else 0.0 for length in lengths]
    if kind == "dr_grpo":
        return [1.0 / (count * max_response_tokens) if length else 0.0 for length in lengths]
    raise ValueError(f"unknown loss aggregation {kind!r}")


def kl_estimates(logprobs: Tensor, ref_logprobs: Tensor) -> dict[str, Tensor]:
    """Per-token estimates of KL(policy || reference), d = log p - log p_ref: k1 = d, k2 = d^2 / 2, k3 = e^-d + d - 1.

    Both [n]; returns three [n] tensors. As a penalty, k1's gradient has expectation zero, so k1 is only a metric.
    """
    difference = logprobs - ref_logprobs
    return {"k1": difference, "k2": difference.square() / 2, "k3": torch.expm1(-difference) + difference}


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    token_weights: Tensor,
    options: GrpoConfig,
    ref_logprobs: Tensor | None = None,
) -> LossOutput:
    """sum_t u_t ( -min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t) + kl_coef KL_t ).

    rho_t = exp(log p_t - log p_old_t), per token. All inputs [n] over the response tokens of a micro-batch, any
    order; ``token_weights`` u from ``aggregation_weights`` (0 on padding, which then counts nowhere but must be
    finite). ``logprobs`` carries the gradient, the others are constants; arithmetic is fp32. ``ref_logprobs`` is needed when
    ``options.kl_coef`` > 0; without it the KL metrics are absent. n = 0 gives loss 0.
    """
    if options.kl_coef and ref_logprobs is None:
        raise ValueError("kl_coef > 0 needs the reference log-probs")
    logprobs, old_logprobs, advantages = logprobs.float(), old_logprobs.detach().float(), advantages.float()
    ratio = torch.exp(logprobs - old_logprobs)
    low, high = 1.0 - options.clip_low, 1.0 + options.clip_high
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    loss = -(token_weights * surrogate).sum()
    real = (token_weights != 0).float()
    clipped = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
    sums = {
        "tokens": real.sum(),
        "policy": loss,
        "ratio": (real * ratio).sum(),
        "clipped": (real * clipped).sum(),
    }
    if ref_logprobs is not None:
        estimates = kl_estimates(logprobs, ref_logprobs.detach().float())
        penalty = options.kl_coef * (token_weights * estimates[options.kl_estimator]).sum()
        loss = loss + penalty
        sums |= {"kl": penalty} | {name: (real * value).sum() for name, value in estimates.items()}
    largest = (real * ratio).max() if ratio.numel() else real.new_zeros(())
    return LossOutput(loss, {k: v.detach() for k, v in sums.items()}, {"ratio": largest.detach()})


def loss_metrics(sums: dict[str, float], maxima: dict[str, float]) -> dict[str, float]:
    """Metrics of a mini-batch from its ``LossOutput`` totals (summed, or maximised, over micro-batches and ranks).

    ``loss/policy`` and ``loss/kl`` (with its coefficient) add up to the loss; ``ratio/*`` and ``kl/*`` are means
    over tokens, ``ratio/clip_share`` the share of tokens whose gradient the clip stopped.
    """
    tokens = max(sums["tokens"], 1.0)
    metrics = {
        "loss/policy": sums["policy"],
        "ratio/mean": sums["ratio"] / tokens,
        "ratio/clip_share": sums["clipped"] / tokens,
        "ratio/max": maxima["ratio"],
    }
    if "kl" in sums:
        metrics["loss/kl"] = sums["kl"]
        metrics |= {f"kl/{name}": sums[name] / tokens for name in ("k1", "k2", "k3")}
    return metrics
