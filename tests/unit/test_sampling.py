"""Temperature, top-k and top-p against transformers' own filters, and draws against the distribution they come from.

Leaves out the models that the logits come from.
"""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from g2r_megatron.rollout import sampling
from g2r_megatron.rollout.sampling import filter_probabilities, next_tokens, uniforms

SETTINGS = [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.8), (0.8, 20, 0.9), (1.3, 1, 1.0), (1.0, 0, 1e-9)]


def random_logits(rows: int, vocab: int) -> torch.Tensor:
    return 2 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(4))


def transformers_probabilities(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """[b, v] fp64 that sum to 1."""
    logits = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        logits = TopKLogitsWarper(top_k)(None, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(None, logits)
    return logits.double().softmax(-1)


@pytest.mark.parametrize("temperature, top_k, top_p", SETTINGS)
def test_filters_equal_transformers(temperature, top_k, top_p):
    """The same tokens stay, with the same probabilities."""
    logits = random_logits(50, 97)
    ours = filter_probabilities((logits / temperature).double().softmax(-1), top_k, top_p)
    expected = transformers_probabilities(logits, temperature, top_k, top_p)
    assert torch.equal(ours > 0, expected > 0)
    torch.testing.assert_close(ours / ours.sum(-1, keepdim=True), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("block", [7, 256])  # the vocabulary is several blocks, the last one not whole, or one
@pytest.mark.parametrize("temperature, top_k, top_p", SETTINGS)
def test_draws_follow_the_distribution(monkeypatch, temperature, top_k, top_p, block):
    """Of n evenly spaced u, each token takes its share n p: within one draw at either end, not statistically."""
    monkeypatch.setattr(sampling, "BLOCK", block)
    n, logits = 20_000, random_logits(1, 31)
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn = next_tokens(logits.expand(n, -1), u, temperature, top_k, top_p)
    counts = torch.bincount(drawn, minlength=31).double()
    expected = n * transformers_probabilities(logits, temperature, top_k, top_p)[0]
    assert (counts - expected).abs().max() <= 1.1  # 0.1: fp32 probabilities
    assert (counts[expected == 0] == 0).all()


@pytest.mark.parametrize("block", [1, 2, 256])
def test_extreme_draws_never_leave_the_allowed_tokens(monkeypatch, block):
    """u = 0 and the last number below 1 choose the first and the last token of any probability."""
    monkeypatch.setattr(sampling, "BLOCK", block)
    logits = torch.tensor([[float("-inf"), 1.0, 0.0, -3.0, float("-inf")]]).expand(2, -1)
    u = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert next_tokens(logits, u, 1.0, 0, 1.0).tolist() == [1, 3]
    assert next_tokens(logits, u, 1.0, 2, 1.0).tolist() == [1, 2]


def test_ties_at_the_edge_of_top_k_keep_k_tokens():
    """Equal logits: exactly k stay, the lowest ids, so that every rank and run keeps the same ones."""
    kept = filter_probabilities(torch.full((1, 6), 1 / 6, dtype=torch.float64), 2, 1.0)
    assert (kept > 0).tolist() == [[True, True, False, False, False, False]]


def test_temperature_zero_is_greedy():
    """Whatever u, top-k and top-p are."""
    logits = random_logits(20, 50)
    u = uniforms("any", 20)
    assert torch.equal(next_tokens(logits, u, 0.0, 7, 0.3), logits.argmax(-1))


def test_uniforms_depend_on_the_key_alone():
    """Same key, same numbers, whatever the global generator did; other keys give unrelated numbers in [0, 1)."""
    torch.manual_seed(1)
    first = uniforms("3/17/2", 1000)
    torch.manual_seed(2)
    torch.rand(5)
    assert torch.equal(uniforms("3/17/2", 1000), first)
    other = uniforms("3/17/3", 1000)
    assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1]) < 0.1
    everything = torch.cat([first, other])
    assert everything.dtype == torch.float64 and everything.min() >= 0 and everything.max() < 1
    assert abs(everything.mean() - 0.5) < 0.03
