"""The policy loss: its value and gradient against the equation, and that it adds up over micro-batches.

Leaves out how log-probs are computed (vocabulary-parallel, elsewhere) and the optimizer.
"""

import math
from dataclasses import replace

import pytest
import torch

from g2r_megatron.config.options import GrpoConfig
from g2r_megatron.policy.losses import aggregation_weights, kl_estimates, loss_metrics, policy_loss

OPTIONS = GrpoConfig(clip_low=0.2, clip_high=0.3)


def random_tokens(n: int, seed: int = 0):
    """Log-probs (leaf with gradient), old and reference log-probs near them, advantages: each [n] fp32."""
    g = torch.Generator().manual_seed(seed)
    logprobs = -2 * torch.rand(n, generator=g) - 0.1
    old = logprobs + 0.4 * torch.randn(n, generator=g)
    ref = logprobs + 0.4 * torch.randn(n, generator=g)
    return logprobs.requires_grad_(), old, ref, torch.randn(n, generator=g)


def uniform(n: int) -> torch.Tensor:
    return torch.full((n,), 1.0 / n)


def test_loss_is_the_clipped_surrogate_plus_kl():
    """The sum over tokens of u (-min(rho A, clip(rho) A) + beta k3), in plain floats."""
    logprobs, old, ref, advantages = random_tokens(200)
    weights = torch.rand(200, generator=torch.Generator().manual_seed(9))
    options = replace(OPTIONS, kl_coef=0.05)
    expected = 0.0
    for lp, o, r, a, u in zip(*(x.tolist() for x in (logprobs.detach(), old, ref, advantages, weights))):
        rho = math.exp(lp - o)
        clipped = min(max(rho, 0.8), 1.3)
        expected += u * (-min(rho * a, clipped * a) + 0.05 * (math.exp(r - lp) - (r - lp) - 1))
    output = policy_loss(logprobs, old, advantages, weights, options, ref)
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    assert float(output.sums["policy"] + output.sums["kl"]) == pytest.approx(output.loss.item(), rel=1e-6)


def test_first_update_has_ratio_one_and_the_policy_gradient():
    """With old = current log-probs: ratio exactly 1, nothing clipped, k1 = k2 = k3 = 0 exactly, d loss / d logp = -u A."""
    logprobs, _, _, advantages = random_tokens(50)
    weights = uniform(50)
    same = logprobs.detach().clone()
    output = policy_loss(logprobs, same, advantages, weights, replace(OPTIONS, kl_coef=0.1), same)
    output.loss.backward()
    assert torch.equal(logprobs.grad, -weights * advantages)
    metrics = loss_metrics(*({k: float(v) for k, v in d.items()} for d in (output.sums, output.maxima)))
    assert metrics["ratio/mean"] == metrics["ratio/max"] == 1.0
    assert metrics["ratio/clip_share"] == metrics["kl/k1"] == metrics["kl/k2"] == metrics["kl/k3"] == 0.0
    assert metrics["loss/kl"] == 0.0


@pytest.mark.parametrize(
    ("ratio", "advantage", "stopped"),
    [
        (1.5, 1.0, True),  # above 1 + clip_high, pushed further up: stopped
        (1.25, 1.0, False),  # between the low and the high width: the high one counts upward
        (1.5, -1.0, False),  # a bad token that became likelier must come back
        (0.7, -1.0, True),
        (0.7, 1.0, False),
        (1.5, 0.0, True),
    ],
)
def test_clip_stops_the_gradient_only_when_it_pushes_outward(ratio, advantage, stopped):
    """Gradient is -rho A, or 0 beyond the clip on the side where the advantage pushes outward."""
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    output = policy_loss(logprobs, torch.zeros(1), torch.tensor([advantage]), torch.ones(1), OPTIONS)
    output.loss.backward()
    expected = 0.0 if stopped else -ratio * advantage
    assert float(logprobs.grad) == pytest.approx(expected, abs=1e-6)
    assert float(output.sums["clipped"]) == float(stopped and advantage != 0.0)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimators(kind):
    """k1 = d, k2 = d^2/2, k3 = e^-d + d - 1 with the gradients 1, d, 1 - e^-d; k2 and k3 are never negative."""
    d = torch.linspace(-2, 2, 9, dtype=torch.float64)
    logprobs = d.clone().requires_grad_()
    value = kl_estimates(logprobs, torch.zeros(9, dtype=torch.float64))[kind]
    value.sum().backward()
    expected = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) + d - 1}[kind]
    gradient = {"k1": torch.ones_like(d), "k2": d, "k3": 1 - torch.exp(-d)}[kind]
    torch.testing.assert_close(value.detach(), expected)
    torch.testing.assert_close(logprobs.grad, gradient)
    assert kind == "k1" or bool((value >= 0).all())


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_chosen_kl_estimator_is_the_penalty(kind):
    """options.kl_estimator picks what kl_coef multiplies."""
    logprobs, old, ref, advantages = random_tokens(20)
    output = policy_loss(logprobs, old, advantages, uniform(20), replace(OPTIONS, kl_coef=0.3, kl_estimator=kind), ref)
    expected = 0.3 * kl_estimates(logprobs, ref)[kind].mean().item()
    assert float(output.sums["kl"]) == pytest.approx(expected, rel=1e-5)


def test_aggregation_weights_are_the_three_means():
    """u_i l_i summed: mean over tokens then responses; mean over tokens; sum over (responses x cap)."""
    losses, lengths = [1.0, 2.0, 4.0], [2, 1, 5]
    sums = [loss * length for loss, length in zip(losses, lengths)]

    def aggregate(kind):
        return sum(u * s for u, s in zip(aggregation_weights(lengths, kind, 10), sums))

    assert aggregate("seq_mean") == pytest.approx(sum(losses) / 3)
    assert aggregate("token_mean") == pytest.approx(sum(sums) / 8)
    assert aggregate("dr_grpo") == pytest.approx(sum(sums) / 30)
    with pytest.raises(ValueError, match="aggregation"):
        aggregate("median")


@pytest.mark.parametrize("kind", ["seq_mean", "token_mean", "dr_grpo"])
def test_empty_response_weighs_nothing_but_counts(kind):
    """A response of 0 tokens gives no division by zero; N of the sequence means includes it."""
    weights = aggregation_weights([4, 0], kind, 8)
    assert weights == [{"seq_mean": 1 / 8, "token_mean": 1 / 4, "dr_grpo": 1 / 16}[kind], 0.0]
    assert aggregation_weights([0, 0], kind, 8) == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["seq_mean", "token_mean", "dr_grpo"])
@pytest.mark.parametrize("parts", [2, 5])
def test_micro_batches_add_up(kind, parts):
    """Loss, gradient and metrics of any split of the responses sum to those of the whole mini-batch."""
    lengths = [3, 1, 7, 4, 5]
    logprobs, old, ref, advantages = random_tokens(sum(lengths))
    weights = torch.tensor(aggregation_weights(lengths, kind, 9)).repeat_interleave(torch.tensor(lengths))
    options = replace(OPTIONS, kl_coef=0.05)
    whole = policy_loss(logprobs, old, advantages, weights, options, ref)
    whole.loss.backward()
    gradient, logprobs.grad = logprobs.grad, None

    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)) % parts
    pieces = []
    for part in range(parts):
        chosen = owner == part
        inputs = [x[chosen] for x in (logprobs, old, advantages, weights)]
        pieces.append(policy_loss(*inputs, options, ref[chosen]))
        pieces[-1].loss.backward()
    torch.testing.assert_close(logprobs.grad, gradient, rtol=1e-6, atol=1e-8)
    for name, total in whole.sums.items():
        torch.testing.assert_close(sum(p.sums[name] for p in pieces), total, rtol=1e-5, atol=1e-6)
    assert max(p.maxima["ratio"] for p in pieces) == whole.maxima["ratio"]


def test_padding_counts_nowhere():
    """Tokens of weight 0 change neither loss, gradient nor metrics."""
    logprobs, old, ref, advantages = random_tokens(10)
    weights = torch.cat([uniform(8), torch.zeros(2)])
    options = replace(OPTIONS, kl_coef=0.05)
    padded = policy_loss(logprobs, old - 3 * (weights == 0), advantages, weights, options, ref)
    bare = policy_loss(logprobs[:8], old[:8], advantages[:8], weights[:8], options, ref[:8])
    torch.testing.assert_close(padded.loss, bare.loss)
    for name in bare.sums:
        torch.testing.assert_close(padded.sums[name], bare.sums[name])
    assert padded.maxima == bare.maxima
    padded.loss.backward()
    assert torch.equal(logprobs.grad[8:], torch.zeros(2))


def test_only_current_logprobs_get_a_gradient():
    """Old and reference log-probs are constants even when they carry a graph."""
    logprobs, old, ref, advantages = random_tokens(5)
    old.requires_grad_(), ref.requires_grad_()
    policy_loss(logprobs, old, advantages, uniform(5), replace(OPTIONS, kl_coef=0.1), ref).loss.backward()
    assert logprobs.grad is not None and old.grad is None and ref.grad is None


def test_micro_batch_without_tokens_and_missing_reference():
    """n = 0 gives loss 0 that still has a graph; a penalty without reference log-probs is an error, not silently 0."""
    empty = torch.zeros(0, requires_grad=True)
    output = policy_loss(empty, torch.zeros(0), torch.zeros(0), torch.zeros(0), OPTIONS)
    output.loss.backward()
    assert output.loss.item() == 0.0
    metrics = loss_metrics(*({k: float(v) for k, v in d.items()} for d in (output.sums, output.maxima)))
    assert metrics["ratio/mean"] == 0.0 and "loss/kl" not in metrics
    logprobs, old, _, advantages = random_tokens(3)
    with pytest.raises(ValueError, match="reference"):
        policy_loss(logprobs, old, advantages, uniform(3), replace(OPTIONS, kl_coef=0.1))
