"""Correction of a sampler that is not the trainer: factors and masks against plain loops, and what the update makes of them.

Leaves out the sampler itself (tests/parity/test_vllm.py).
"""

import math

import pytest
import torch

from g2r_megatron.config.options import GrpoConfig, RolloutConfig
from g2r_megatron.errors import RunError, warn
from g2r_megatron.policy.correction import BOUNDS, check_sampler, correct
from g2r_megatron.policy.losses import policy_loss

LENGTHS = [7, 0, 4, 20]


def log_probs(spread: float, seed: int = 3) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(trainer's, sampler's), [T] of ``LENGTHS`` each."""
    g = torch.Generator().manual_seed(seed)
    trainer = [-2 * torch.rand(n, generator=g) - 0.1 for n in LENGTHS]
    return trainer, [part + spread * torch.randn(len(part), generator=g) for part in trainer]


@pytest.mark.parametrize("kind", ["none", "tis", "icepop", "sequence"])
@pytest.mark.parametrize("bounds", [None, [0.0, 1.5], [0.8, 1.2]])
def test_factors_and_masks(kind, bounds):
    """Token by token, from the definitions."""
    trainer, sampler = log_probs(0.5 if kind != "sequence" else 0.1)
    found = correct(trainer, sampler, RolloutConfig(engine="vllm", correction=kind, correction_bounds=bounds))
    low, high = bounds or BOUNDS.get(kind, (0.0, math.inf))
    touched = 0
    for ours, theirs, factor, kept in zip(trainer, sampler, found.factors, found.kept, strict=True):
        ratios = [math.exp(a - b) for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 1.0
        for rho, f, k in zip(ratios, factor.tolist(), kept.tolist(), strict=True):
            expected = {"none": 1.0, "tis": min(rho, high), "icepop": rho, "sequence": 1.0}[kind]
            assert f == pytest.approx(expected, rel=1e-5)
            assert k == {"icepop": low <= rho <= high, "sequence": low <= mean <= high}.get(kind, True)
            touched += not k or (kind == "tis" and rho > high)
    assert found.metrics["rollout/corrected_share"] == pytest.approx(touched / sum(LENGTHS))
    assert touched > 0 or kind == "none" or (kind == "sequence" and bounds)


def test_metrics_are_of_the_difference():
    trainer, sampler = log_probs(0.3)
    metrics = correct(trainer, sampler, RolloutConfig()).metrics
    d = torch.cat(trainer) - torch.cat(sampler)
    assert metrics["rollout/sync_error"] == pytest.approx(d.abs().mean().item())
    assert metrics["rollout/kl"] == pytest.approx((d.exp() - 1 - d).mean().item(), rel=1e-4)
    assert metrics["rollout/ratio_max"] == pytest.approx(d.exp().max().item())
    assert metrics["rollout/ratio_p99"] == pytest.approx(d.exp().sort().values[math.ceil(0.99 * len(d)) - 1].item())
    assert {f"rollout/error_position_{i}" for i in range(10)} <= metrics.keys()


def test_the_same_sampler_changes_nothing():
    trainer, _ = log_probs(0.0)
    for kind in ("tis", "icepop", "sequence"):
        found = correct(trainer, trainer, RolloutConfig(correction=kind))
        assert all((factor == 1).all() for factor in found.factors) and all(kept.all() for kept in found.kept)
        assert found.metrics["rollout/sync_error"] == found.metrics["rollout/corrected_share"] == 0


def test_scaled_advantages_scale_every_tokens_clipped_loss():
    """min(r f A, clip(r) f A) = f min(r A, clip(r) A): in value and gradient, on both sides of the clip."""
    g = torch.Generator().manual_seed(1)
    old, advantages, weights = (
        torch.randn(50, generator=g) - 2,
        torch.randn(50, generator=g),
        torch.rand(50, generator=g),
    )
    new = (old + 0.5 * torch.randn(50, generator=g)).requires_grad_()
    factor, gradients = 2 * torch.rand(50, generator=g), []
    for a, u in ((advantages * factor, weights), (advantages, weights * factor)):
        output = policy_loss(new, old, a, u, GrpoConfig())
        gradients.append((output.loss.detach(), *torch.autograd.grad(output.loss, new)))
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(("shift", "dtype"), [(2e-3, torch.float32), (0.2, torch.bfloat16), (math.nan, torch.float32)])
def test_a_sampler_with_other_weights_ends_the_run(shift, dtype):
    trainer, _ = log_probs(0.0)
    check_sampler(trainer, [part + 1e-4 for part in trainer], dtype)
    with pytest.raises(RunError, match="rollout/sync_error is .* the sampler gives its tokens a mean log-prob"):
        check_sampler(trainer, [part + shift for part in trainer], dtype)


@pytest.mark.parametrize(("shift", "dtype"), [(5e-4, torch.float32), (0.05, torch.bfloat16)])
def test_a_sampler_near_the_bound_is_named_in_a_warning(shift, dtype, capsys):
    trainer, _ = log_probs(0.0)
    warn.cache_clear()
    check_sampler(trainer, [part + shift / 10 for part in trainer], dtype)
    assert not capsys.readouterr().err
    check_sampler(trainer, [part + shift for part in trainer], dtype)
    assert "warning: rollout/sync_error is above" in capsys.readouterr().err
