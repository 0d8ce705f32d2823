"""Sampler and trainer differ: how much they differ, and how the loss is corrected for it (docs/rollouts.md)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from g2r_megatron.config.options import RolloutConfig
from g2r_megatron.errors import RunError, warn

# Bounds of rho where rollout.correction_bounds is not given. Sources: docs/rollouts.md.
BOUNDS = {"tis": (0.0, 2.0), "icepop": (0.5, 5.0), "sequence": (0.99, 1.01)}
# Mean |log p sampler - log p trainer| above this means other weights, or log-probs of something else.
LARGEST_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.1}
WARNED_SHARE = 0.3  # of that bound: from here on a warning says so
TENTHS = 10


@dataclass(frozen=True)
class Correction:
    """What the update does with each token, [T_i] a response: ``factors`` fp32 times its loss, ``kept`` bool; and metrics."""

    factors: list[Tensor]
    kept: list[Tensor]
    metrics: dict[str, float]

    def scaled(self, advantages: list[Tensor]) -> list[Tensor]:
        """The advantages times the factors. No factor is negative, so each token's clipped loss is multiplied by its
        factor."""
        return [part * factor for part, factor in zip(advantages, self.factors, strict=True)]


def correct(trainer: list[Tensor], sampler: list[Tensor], options: RolloutConfig) -> Correction:
    """Factors and masks from rho_t = p trainer / p sampler, both before the update, at the sampling temperature.

    ``trainer``, ``sampler``: log-probs of the sampled tokens, fp32 [T_i] a response. A response without tokens is kept.
    tis: factor min(rho_t, high). icepop: factor rho_t where low <= rho_t <= high, else the token is masked. sequence: factor
    1, and the response is masked unless its geometric mean of rho is within [low, high].
    """
    differences = [ours.float() - theirs for ours, theirs in zip(trainer, sampler, strict=True)]
    ratios = [difference.exp() for difference in differences]
    factors = [torch.ones_like(rho) for rho in ratios]
    kept = [torch.ones_like(rho, dtype=torch.bool) for rho in ratios]
    touched = [torch.zeros_like(mask) for mask in kept]
    if options.correction != "none":
        low, high = options.correction_bounds or BOUNDS[options.correction]
        if options.correction == "tis":
            factors, touched = [rho.clamp(max=high) for rho in ratios], [rho > high for rho in ratios]
        elif options.correction == "icepop":
            factors, kept = ratios, [(rho >= low) & (rho <= high) for rho in ratios]
        else:
            means = [float(difference.mean().exp()) if len(difference) else 1.0 for difference in differences]
            kept = [torch.full_like(mask, low <= mean <= high) for mask, mean in zip(kept, means, strict=True)]
        touched = [clipped | ~mask for clipped, mask in zip(touched, kept, strict=True)]
    return Correction(factors, kept, _metrics(differences, touched))


def _metrics(differences: list[Tensor], touched: list[Tensor]) -> dict[str, float]:
    """Of d = log p trainer - log p sampler a token. ``rollout/kl`` estimates KL(sampler || trainer) by e^d - 1 - d."""
    d = torch.cat(differences)
    if not len(d):
        return {}
    tenth = torch.cat([torch.arange(len(part)) * TENTHS // max(len(part), 1) for part in differences])
    metrics = {
        "rollout/sync_error": d.abs().mean().item(),
        "rollout/kl": (torch.expm1(d) - d).mean().item(),
        "rollout/ratio_p99": d.kthvalue(math.ceil(0.99 * len(d))).values.exp().item(),
        "rollout/ratio_max": d.max().exp().item(),
        "rollout/corrected_share": torch.cat(touched).float().mean().item(),
    }
    for i in range(TENTHS):
        if (chosen := tenth == i).any():
            metrics[f"rollout/error_position_{i}"] = d[chosen].abs().mean().item()
    return metrics


def check_sampler(trainer: list[Tensor], sampler: list[Tensor], dtype: torch.dtype) -> None:
    """Raise ``RunError`` when the sampler's log-probs are not the trainer's, to the dtype's bound (NaN counts too).

    A warning, once a process, says that they are nearer to the bound than ``WARNED_SHARE``.
    """
    ours, theirs = torch.cat(trainer).float(), torch.cat(sampler)
    if not len(ours):
        return
    error = (ours - theirs).abs().mean().item()
    if not error <= LARGEST_ERROR[dtype]:
        raise RunError(
            f"rollout/sync_error is {error:.3g} (at most {LARGEST_ERROR[dtype]:g} in {str(dtype).removeprefix('torch.')}): the "
            f"sampler gives its tokens a mean log-prob of {theirs.mean().item():.4g}, the trainer {ours.mean().item():.4g}; "
            "the engine has other weights (is its version a tested one?), or rollout.vllm.options change what it computes"
        )
    if error > WARNED_SHARE * LARGEST_ERROR[dtype]:
        warn(
            f"rollout/sync_error is above {WARNED_SHARE * LARGEST_ERROR[dtype]:g}; the run ends above "
            f"{LARGEST_ERROR[dtype]:g}: set rollout.correction, or look for what the engine computes in another precision"
        )
