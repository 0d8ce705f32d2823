"""Token weights and token rewards: sums, limits and the equations of docs/method.md, against plain loops.

Leaves out where b comes from (the judge's gradient).
"""

import itertools
import math

import pytest
import torch

from g2r_megatron.credit.alignment import align
from g2r_megatron.credit.attribution import (
    Weighting,
    alpha_from_attribution,
    average_sentences,
    effective_sample_share,
    response_reward,
    shuffled,
    smear,
    token_rewards,
)


def random_b(length: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(seed)) * scale


def alpha(b, tau=1.0, standardize=False, smoothing="none", gamma=0.7, ids=None, normalize="softmax", alignment=None):
    return alpha_from_attribution(b, Weighting(normalize, smoothing, tau, standardize, gamma), ids, alignment)


@pytest.mark.parametrize("smoothing", ["none", "smear", "sentence"])
@pytest.mark.parametrize(("normalize", "standardize"), [("softmax", False), ("softmax", True), ("positive", False)])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e4])
@pytest.mark.parametrize("length", [1, 2, 7, 300])
def test_alpha_is_a_distribution(smoothing, normalize, standardize, scale, length):
    """alpha is finite, not negative, sums to 1 for any scale of b, normalization, smoothing and length."""
    ids = torch.arange(length) // 4
    b = random_b(length, scale=scale)
    weights = alpha(b, standardize=standardize, smoothing=smoothing, ids=ids, normalize=normalize)
    assert weights.shape == (length,) and weights.dtype == torch.float32
    assert bool((weights >= 0).all())
    assert float(weights.double().sum()) == pytest.approx(1.0, abs=1e-6)


def test_plain_alpha_is_softmax_of_b_over_tau():
    """Without standardising and smoothing alpha is softmax(b / tau), the published formula, and does not see a shift of b."""
    b = random_b(9)
    torch.testing.assert_close(alpha(b, tau=0.3), torch.softmax(b / 0.3, 0), rtol=1e-6, atol=0)
    torch.testing.assert_close(alpha(b + 3.0), alpha(b), rtol=1e-5, atol=0)


def test_a_factor_on_b_is_a_temperature_unless_standardised():
    """c b at tau c equals b at tau 1; after standardising a factor and an offset of b change nothing."""
    b = random_b(11)
    torch.testing.assert_close(alpha(8 * b, tau=8.0), alpha(b))
    assert not torch.allclose(alpha(8 * b), alpha(b), atol=1e-2)
    torch.testing.assert_close(alpha(1e-6 * b + 2e-6, standardize=True), alpha(b, standardize=True), rtol=1e-4, atol=0)


def test_standardised_scores_have_mean_0_and_std_1():
    """log alpha of the standardised form is z_t minus a constant, z with population std 1."""
    logs = alpha(random_b(50, scale=1e-3), standardize=True).double().log()
    assert float(logs.std(unbiased=False)) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(
    "b",
    [[0.1] * 7, [0.1, 0.1 + 8e-9, 0.1], [0.0] * 7, [1e-30] * 7, [1.0, math.nan, 2.0], [1.0, math.inf, 2.0], [5.0]],
)
@pytest.mark.parametrize("smoothing", ["none", "smear", "sentence"])
@pytest.mark.parametrize("standardize", [False, True])
def test_uninformative_b_is_exactly_uniform(b, smoothing, standardize):
    """std 0 up to fp32 rounding, NaN and infinity give 1/T exactly, also where smearing would tilt it."""
    b = torch.tensor(b)
    weights = alpha(
        b, tau=0.01, standardize=standardize, smoothing=smoothing, ids=torch.zeros(len(b), dtype=torch.int64)
    )
    assert torch.equal(weights, torch.full((len(b),), 1.0 / len(b)))


def positive_reference(b: list[float], ids: list[int]) -> list[float]:
    """The formula, in plain Python; ``ids``: each token's sentence."""
    sums = [sum(x for x, i in zip(b, ids) if i == s) for s in range(max(ids) + 1)]
    total = sum(max(x, 0.0) for x in sums)
    return [max(sums[i], 0.0) / (ids.count(i) * total) for i in ids]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e5])
def test_positive_is_the_share_of_positive_credit(scale):
    """alpha_t = max(b_S, 0) / (|S| sum_S max(b_S, 0)) over sentences, or over tokens; the scale of b has no say."""
    b, ids = random_b(23, seed=3), torch.tensor([0] * 3 + [1] * 7 + [2] + [3] * 12)
    by_sentence = alpha(scale * b, smoothing="sentence", ids=ids, normalize="positive")
    torch.testing.assert_close(by_sentence, torch.tensor(positive_reference(b.double().tolist(), ids.tolist())))
    assert 0 < int((by_sentence > 0).sum()) < 23
    by_token = alpha(scale * b, normalize="positive")
    torch.testing.assert_close(by_token, torch.tensor(positive_reference(b.double().tolist(), list(range(23)))))
    torch.testing.assert_close(alpha(scale * b, smoothing="smear", normalize="positive"), smear(by_token, 0.7))


def test_positive_gives_a_sentence_what_its_tokens_add_up_to():
    """A hot token among negative ones earns its sentence nothing, and no alpha is narrower than its sentence: ESS/T of the
    worst case, one sentence with everything, is that sentence's share of the tokens."""
    b, ids = torch.tensor([9.0, -8.0, -2.0, 0.5, 0.25, 0.25]), torch.tensor([0, 0, 0, 1, 1, 1])
    weights = alpha(b, smoothing="sentence", ids=ids, normalize="positive")
    torch.testing.assert_close(weights, torch.tensor([0.0, 0, 0, 1, 1, 1]) / 3)
    assert effective_sample_share(weights) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("b", "smoothings"),
    [
        *((b, ["none", "smear", "sentence"]) for b in ([-1.0, -2.0, 0.0], [0.0] * 3, [1.0, math.nan, 2.0])),
        ([math.inf, 1.0, 1.0], ["none", "smear", "sentence"]),
        ([2.0, -3.0, -1.0], ["sentence"]),
    ],
)
def test_positive_is_exactly_uniform_where_nothing_is_positive(b, smoothings):
    """Also where one token is above 0 and its sentence is not, and where smearing would tilt 1/T."""
    for smoothing in smoothings:
        check_uniform(b, smoothing)


def check_uniform(b: list[float], smoothing: str) -> None:
    weights = alpha(torch.tensor(b), smoothing=smoothing, ids=torch.zeros(3, dtype=torch.int64), normalize="positive")
    assert torch.equal(weights, torch.full((3,), 1 / 3))


def test_additive_b_moves_between_tokenizers_before_it_is_cut_off_at_0():
    """Judge tokens of 2 and 4 bytes onto policy tokens of 3, 1 and 2: b by bytes, then ``positive``. Moving alpha would
    give the first token less."""
    alignment = align(torch.tensor([0.0, 2, 6]), torch.tensor([0.0, 3, 4, 6]))
    b = torch.tensor([4.0, -2.0])
    weights = alpha(b, normalize="positive", alignment=alignment)
    torch.testing.assert_close(weights, torch.tensor([1.0, 0, 0]))  # 4 - 2/4, -2/4, -2/2
    weights = alpha(b, normalize="positive", smoothing="sentence", ids=torch.tensor([0, 0, 1]), alignment=alignment)
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.5, 0]))


@pytest.mark.parametrize("units", [[0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 4, 5], [0] * 6])
def test_shuffling_permutes_whole_units(units):
    """The pieces of alpha are those of its units in another order, by the seed alone; every order comes up."""
    weights, units = torch.arange(1.0, 7.0), torch.tensor(units)
    pieces = [tuple(weights[units == unit].tolist()) for unit in units.unique().tolist()]
    orders = {tuple(order) for order in itertools.permutations(pieces)}
    found = set()
    for seed in range(40 if len(pieces) < 4 else 3):
        values = shuffled(weights, units, str(seed))
        assert torch.equal(values, shuffled(weights, units, str(seed)))
        rest, order = values.tolist(), []
        while rest:
            order.append(next(piece for piece in pieces if piece[0] == rest[0]))
            assert tuple(rest[: len(order[-1])]) == order[-1]
            rest = rest[len(order[-1]) :]
        found.add(tuple(order))
    assert found == orders if len(pieces) < 4 else len(found) > 1


@pytest.mark.parametrize("gamma", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("length", [1, 2, 3, 8, 33])
def test_smear_follows_its_recursion(gamma, length):
    """The doubling scan equals o_t = alpha_t + gamma o_{t+1} written as a loop, then divided by its sum."""
    weights = torch.softmax(random_b(length), 0).double()
    expected = weights.tolist()
    for t in range(length - 2, -1, -1):
        expected[t] += gamma * expected[t + 1]
    expected = torch.tensor(expected, dtype=torch.float64)
    before = weights.clone()
    torch.testing.assert_close(smear(weights, gamma), expected / expected.sum(), rtol=1e-12, atol=0)
    assert torch.equal(weights, before)


def test_smear_only_moves_credit_backwards():
    """One hot token gives decaying weight to itself and the tokens before, none to those after."""
    out = smear(torch.tensor([0.0, 0.0, 1.0, 0.0]), 0.5)
    torch.testing.assert_close(out, torch.tensor([0.25, 0.5, 1.0, 0.0]) / 1.75)


def test_sentence_pooling_is_the_mean_over_the_sentence():
    """Every token of a sentence gets the mean of its alpha; a sentence's mass and the total are kept."""
    weights = torch.tensor([0.5, 0.1, 0.0, 0.3, 0.1])
    pooled = average_sentences(weights, torch.tensor([0, 0, 0, 1, 1]))
    torch.testing.assert_close(pooled, torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2]))
    pooled = average_sentences(weights, torch.tensor([0, 1, 1, 1, 2]))
    torch.testing.assert_close(pooled, torch.tensor([0.5, 0.4 / 3, 0.4 / 3, 0.4 / 3, 0.1]))


@pytest.mark.parametrize("smoothing", ["none", "smear", "sentence"])
def test_empty_body_gives_empty_tensors(smoothing):
    """T = 0 is not an error anywhere."""
    empty = torch.zeros(0)
    ids = torch.zeros(0, dtype=torch.int64)
    for normalize in ("softmax", "positive"):
        assert alpha(empty, standardize=True, smoothing=smoothing, ids=ids, normalize=normalize).shape == (0,)
    assert shuffled(empty, ids, "seed").shape == (0,)
    assert smear(empty, 0.7).shape == (0,)
    assert average_sentences(empty, ids).shape == (0,)
    assert token_rewards([True], [1.0], [None], 1.0, 0).shape == (0,)
    assert math.isnan(effective_sample_share(empty))


def test_token_rewards_are_algorithm_1():
    """r_t = sum over True items of w_k alpha_kt / positive weight, False items add 0, no alpha means 1/T."""
    a, b = torch.softmax(random_b(4, 1), 0), torch.softmax(random_b(4, 2), 0)
    verdicts, weights = [True, True, False, True], [3.0, -2.0, 5.0, 1.0]
    rewards = token_rewards(verdicts, weights, [a, b, a, None], 9.0, 4)
    expected = [(3.0 * float(a[t]) - 2.0 * float(b[t]) + 1.0 / 4) / 9.0 for t in range(4)]
    torch.testing.assert_close(rewards, torch.tensor(expected))
    assert float(rewards.sum()) == pytest.approx(response_reward(verdicts, weights), abs=1e-6)


def test_response_reward_is_not_clipped():
    """The score is 1 when all good and no bad items are met, negative when only pitfalls are, 0 when none are."""
    weights = [3.0, 1.0, -6.0]
    assert response_reward([True, True, False], weights) == 1.0
    assert response_reward([False, False, True], weights) == -1.5
    assert response_reward([False, False, False], weights) == 0.0


def test_wrong_shapes_are_errors():
    """An alpha of one token would broadcast over the response: refused, as are missing entries and unknown pools."""
    with pytest.raises(ValueError, match="alpha has shape"):
        token_rewards([True], [1.0], [torch.ones(1)], 1.0, 5)
    with pytest.raises(ValueError):
        token_rewards([True, True], [1.0], [None, None], 1.0, 5)
    with pytest.raises(ValueError, match="sentence ids"):
        average_sentences(torch.ones(3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="smoothing"):
        alpha(random_b(3), smoothing="median")


def test_effective_sample_share_limits():
    """ESS/T is 1 for uniform alpha and 1/T for one hot token."""
    assert effective_sample_share(torch.full((8,), 0.125)) == pytest.approx(1.0)
    assert effective_sample_share(torch.eye(8)[3]) == pytest.approx(1 / 8)
