"""Advantages of one group: each estimator against its equation in plain loops, their limits, and the exact savings.

Leaves out the judge and the loss. The equations are those of docs/method.md (step 6).
"""

import math
import statistics
from dataclasses import replace

import pytest
import torch

from g2r_megatron.config.options import GrpoConfig
from g2r_megatron.config.presets import PRESETS
from g2r_megatron.credit.advantages import (
    GroupScores,
    RewardModelScores,
    group_advantages,
    item_scores,
    items_needing_attribution,
    mix_at,
    rewards_needing_attribution,
    token_weights,
)
from g2r_megatron.errors import UserError

KINDS = ["sequence", "token_return", "itemwise", "sequence_weighted"]
PAPER = GrpoConfig(preset="paper", **PRESETS["paper"]["grpo"])
ROBUST = GrpoConfig(preset="robust", **PRESETS["robust"]["grpo"])
SEEDS = range(6)


def random_group(seed: int, group: int = 5, items: int = 6, flat: bool = False) -> GroupScores:
    """Random verdicts, weights of both signs, lengths 0..12, half of the responses finished; alpha for every item."""
    g = torch.Generator().manual_seed(seed)
    verdicts = torch.rand(group, items, generator=g) < 0.5
    weights = torch.randint(-5, 6, (items,), generator=g).float()
    weights[0] = 3.0
    lengths = torch.randint(0, 13, (group,), generator=g).tolist()
    finished = [length == 0 or i % 2 == 0 for i, length in enumerate(lengths)]
    scale = 0.0 if flat else 2.0
    alphas = [[torch.softmax(scale * torch.randn(length, generator=g), 0) for _ in range(items)] for length in lengths]
    return GroupScores(verdicts, weights, alphas, lengths, finished)


def without(scores: GroupScores, keep: torch.Tensor) -> GroupScores:
    """The same group as it looks when only the pairs in ``keep`` [G, K] had a backward pass."""
    alphas = [[a if k else None for a, k in zip(*rows)] for rows in zip(scores.alphas, keep.tolist())]
    return replace(scores, alphas=alphas)


def parts_of(scores: GroupScores) -> tuple[list[list[float]], list[float]]:
    """s_ik and r_i in plain floats."""
    weights = scores.weights.tolist()
    positive = sum(w for w in weights if w > 0)
    parts = [[w * v / positive for w, v in zip(weights, row)] for row in scores.verdicts.tolist()]
    return parts, [sum(row) for row in parts]


def assert_same(actual, expected, tolerance=1e-6):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, torch.as_tensor(e, dtype=torch.float32), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("baseline", ["group", "rloo"])
@pytest.mark.parametrize("normalize", [True, False])
def test_sequence_is_the_z_score_or_rloo(seed, baseline, normalize):
    """A_it = (r_i - baseline) / std on every token, stop token included."""
    scores = random_group(seed)
    _, rewards = parts_of(scores)
    std = statistics.pstdev(rewards) if normalize else 1.0
    expected = []
    for i, reward in enumerate(rewards):
        others = rewards if baseline == "group" else rewards[:i] + rewards[i + 1 :]
        tokens = scores.lengths[i] + scores.finished[i]
        expected.append([(reward - statistics.fmean(others)) / std] * tokens)
    options = replace(ROBUST, advantage="sequence", baseline=baseline, normalize_std=normalize)
    assert_same(group_advantages(scores, options, 0.0), expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mix", [1.0, 0.5])
def test_itemwise_is_the_equation_of_the_study(seed, mix):
    """A_it = sum_k (s_ik - mean_i s_ik) T v / std, v from m alpha + (1-m)/T for True items and 1 for False; A_i at the stop."""
    scores = random_group(seed)
    parts, rewards = parts_of(scores)
    std, mean = statistics.pstdev(rewards), statistics.fmean(rewards)
    means = [statistics.fmean(column) for column in zip(*parts)]
    expected = []
    for i, length in enumerate(scores.lengths):
        body = []
        for t in range(length):
            total = 0.0
            for k, part in enumerate(parts[i]):
                uniform = 1.0 / length
                alpha = float(scores.alphas[i][k][t]) if scores.verdicts[i, k] else uniform
                total += (part - means[k]) * length * (mix * alpha + (1 - mix) * uniform)
            body.append(total / std)
        expected.append(body + [(rewards[i] - mean) / std] * scores.finished[i])
    assert_same(group_advantages(scores, ROBUST, mix), expected, 2e-6)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("baseline", ["group", "rloo"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ["itemwise", "sequence_weighted"])
def test_flat_alpha_is_sequence_level_grpo(seed, baseline, normalize, kind):
    """Uniform alpha gives the `sequence` advantage: to 1e-6 as fp32 tensors, bit for bit when no alpha was computed or m = 0."""
    options = replace(ROBUST, advantage=kind, baseline=baseline, normalize_std=normalize)
    flat, sharp = random_group(seed, flat=True), random_group(seed)
    expected = group_advantages(flat, replace(options, advantage="sequence"), 1.0)
    assert_same(group_advantages(flat, options, 1.0), expected)
    nothing = torch.zeros_like(flat.verdicts)
    for group, mix in ((without(flat, nothing), 1.0), (sharp, 0.0)):
        for actual, wanted in zip(group_advantages(group, options, mix), expected):
            if kind == "itemwise":
                assert torch.equal(actual, wanted)
            else:
                torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["itemwise", "sequence_weighted"])
@pytest.mark.parametrize("clip", [None, [0.5, 2.0]])
def test_weighting_keeps_the_mean_of_the_sequence_advantage(seed, kind, clip):
    """The mean over the body is A_i: attribution moves credit inside a response and adds none (no drift of length)."""
    scores = random_group(seed)
    options = replace(ROBUST, advantage=kind, weight_clip=clip)
    plain = group_advantages(scores, replace(options, advantage="sequence"), 0.0)
    for advantage, base, length in zip(group_advantages(scores, options, 1.0), plain, scores.lengths):
        if length:
            torch.testing.assert_close(advantage[:length].mean(), base[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(advantage[length:], base[length:])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("to_go", [True, False])
@pytest.mark.parametrize("baseline", ["group", "rloo"])
def test_token_return_is_the_published_estimator(seed, to_go, baseline):
    """R_it = sum_{s>=t} r_is (or r_it), minus the mean over all tokens of the group (the others), over their std."""
    scores = random_group(seed)
    parts, rewards = parts_of(scores)
    returns = []
    for i, length in enumerate(scores.lengths):
        row = [
            sum(part * float(a[t]) for part, a in zip(parts[i], scores.alphas[i], strict=True)) for t in range(length)
        ] or [rewards[i]]
        row += [0.0] * (scores.lengths[i] + scores.finished[i] - len(row))
        returns.append([sum(row[t:]) for t in range(len(row))] if to_go else row)
    everything = [value for row in returns for value in row]
    std = statistics.pstdev(everything)
    expected = []
    for i, row in enumerate(returns):
        others = everything if baseline == "group" else [v for j, r in enumerate(returns) if j != i for v in r]
        expected.append([(value - statistics.fmean(others)) / std for value in row])
    options = replace(PAPER, return_to_go=to_go, baseline=baseline)
    assert_same(group_advantages(scores, options, 1.0), expected, 5e-6)


def test_token_return_with_flat_alpha_is_a_position_ramp():
    """The published estimator with flat alpha and equal rewards: +sqrt(3) at the first token, -sqrt(3) at the last (a hazard)."""
    length = 2000
    scores = GroupScores(torch.tensor([[True]] * 3), torch.tensor([2.0]), [[None]] * 3, [length] * 3, [True] * 3)
    for advantage in group_advantages(scores, PAPER, 1.0):
        assert float(advantage[0]) == pytest.approx(math.sqrt(3), rel=1e-3)
        assert float(advantage[-1]) == pytest.approx(-math.sqrt(3), rel=1e-3)
    for advantage in group_advantages(scores, replace(ROBUST, advantage="itemwise"), 1.0):
        assert torch.equal(advantage, torch.zeros(length + 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("verdict", [True, False])
def test_group_without_variance_has_advantage_zero(kind, normalize, verdict):
    """Equal verdicts and equal token rewards give exactly 0, not rounding noise divided by a tiny std."""
    verdicts = torch.full((7, 3), verdict)
    scores = GroupScores(verdicts, torch.tensor([0.1, 0.7, 0.3]), [[None] * 3] * 7, [5] * 7, [False] * 7)
    options = replace(ROBUST, advantage=kind, normalize_std=normalize)
    for advantage in group_advantages(scores, options, 1.0):
        torch.testing.assert_close(advantage, torch.zeros(5), rtol=0, atol=0 if normalize else 1e-12)


def test_equal_rewards_from_different_items_give_zero():
    """std_i(r_i) = 0 up to rounding (0.1 + 0.2 against 0.3) gives 0 also where the items differ: no division by 1e-17."""
    verdicts = torch.tensor([[True, True, False], [False, False, True]])
    alpha, weights = torch.tensor([0.9, 0.1]), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    scores = GroupScores(verdicts, weights, [[alpha] * 3] * 2, [2, 2], [True, True])
    for advantage in group_advantages(scores, ROBUST, 1.0):
        assert torch.equal(advantage, torch.zeros(3))
    assert not items_needing_attribution(verdicts, scores.weights, ROBUST, 1.0).any()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mix", [1.0, 0.5, 0.0])
def test_skipped_passes_do_not_change_the_advantage(seed, kind, normalize, mix):
    """Dropping every alpha that `items_needing_attribution` declares useless leaves the advantage as it was."""
    scores = random_group(seed, group=3)
    options = replace(ROBUST, advantage=kind, normalize_std=normalize)
    needed = items_needing_attribution(scores.verdicts, scores.weights, options, mix)
    assert not (needed & ~scores.verdicts).any()
    full, saved = group_advantages(scores, options, mix), group_advantages(without(scores, needed), options, mix)
    assert_same(saved, full)


def test_what_is_skipped():
    """Which passes are saved: none for `sequence` or m = 0; False, weightless and unanimous items for `itemwise`."""
    verdicts = torch.tensor([[True, True, True, False], [True, False, True, True], [True, False, True, False]])
    weights = torch.tensor([3.0, 2.0, 0.0, -1.0])

    def needed(kind, mix=1.0):
        return items_needing_attribution(verdicts, weights, replace(ROBUST, advantage=kind), mix).int().tolist()

    assert needed("itemwise") == [[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert needed("token_return") == [[1, 1, 0, 0], [1, 0, 0, 1], [1, 0, 0, 0]]
    assert needed("sequence_weighted") == [[1, 1, 0, 0], [1, 0, 0, 1], [1, 0, 0, 0]]
    assert needed("sequence") == [[0] * 4] * 3
    for kind in KINDS:
        assert needed(kind, mix=0.0) == [[0] * 4] * 3


def test_top_items_keeps_the_largest_centred_terms():
    """top_items keeps ceil(fraction x count) of a response's items by |s_ik - mean|, and given alphas beyond it are not used."""
    verdicts = torch.tensor([[True] * 4, [False] * 4])
    weights = torch.tensor([1.0, 4.0, -3.0, 2.0])

    def needed(fraction):
        options = replace(ROBUST, top_items=fraction)
        return items_needing_attribution(verdicts, weights, options, 1.0)[0].int().tolist()

    assert needed(0.25) == [0, 1, 0, 0]
    assert needed(0.5) == [0, 1, 1, 0]
    assert needed(0.51) == [0, 1, 1, 1]
    assert needed(1.0) == [1, 1, 1, 1]
    many = torch.cat([torch.ones(1, 25), torch.zeros(1, 25)]).bool()
    kept = items_needing_attribution(many, torch.ones(25), replace(ROBUST, top_items=0.28), 1.0)
    assert kept[0].int().tolist() == [1] * 7 + [0] * 18  # 0.28 x 25 rounds above 7; ties go to the earlier item
    alphas = [[torch.softmax(torch.arange(3.0) * k, 0) for k in range(4)], [None] * 4]
    scores = GroupScores(verdicts, weights, alphas, [3, 3], [True, True])
    options = replace(ROBUST, top_items=0.5)
    keep = items_needing_attribution(verdicts, weights, options, 1.0)
    assert_same(group_advantages(scores, options, 1.0), group_advantages(without(scores, keep), ROBUST, 1.0))
    assert not torch.allclose(
        group_advantages(scores, options, 1.0)[0], group_advantages(scores, ROBUST, 1.0)[0], atol=1e-3
    )


def test_false_scale_scales_only_the_terms_of_false_items():
    """A_it = sum_{True} c + false_scale sum_{False} c over the body; the stop token keeps the plain advantage."""
    scores = random_group(3)
    parts, rewards = parts_of(scores)
    std = statistics.pstdev(rewards)
    means = [statistics.fmean(column) for column in zip(*parts)]
    options = replace(ROBUST, false_scale=0.3)
    advantages = group_advantages(without(scores, torch.zeros_like(scores.verdicts)), options, 1.0)
    for i, length in enumerate(scores.lengths):
        terms = [(p - m) / std * (1.0 if v else 0.3) for p, m, v in zip(parts[i], means, scores.verdicts[i])]
        plain = (rewards[i] - statistics.fmean(rewards)) / std
        expected = torch.tensor([sum(terms)] * length + [plain] * scores.finished[i])
        torch.testing.assert_close(advantages[i], expected, rtol=1e-5, atol=1e-6)


def test_sequence_weighted_averages_alphas_by_absolute_weight():
    """A_it = A_i T sum |w_k| alpha_k / sum |w_k| over the True items; pitfalls count by size."""
    a, b = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.0, 0.5, 0.5])
    verdicts = torch.tensor([[True, True, False], [False, False, False]])
    scores = GroupScores(verdicts, torch.tensor([3.0, -1.0, 4.0]), [[a, b, a], [None] * 3], [3, 2], [True, False])
    first, second = group_advantages(scores, replace(ROBUST, advantage="sequence_weighted"), 1.0)
    torch.testing.assert_close(first, torch.cat([3 * (3 * a + b) / 4, torch.ones(1)]))
    torch.testing.assert_close(second, torch.tensor([-1.0, -1.0]))


def test_weight_clip_bounds_then_restores_the_mean():
    """T alpha is bounded by weight_clip and divided by its mean; without a clip it is T (m alpha + (1-m)/T)."""
    alpha = torch.tensor([0.97, 0.01, 0.01, 0.01])
    free = token_weights(alpha, 4, 0.5, None)
    torch.testing.assert_close(free, 4 * (0.5 * alpha.double() + 0.5 / 4))
    bounded = torch.tensor([2.0, 0.52, 0.52, 0.52], dtype=torch.float64)
    clipped = token_weights(alpha, 4, 0.5, [0.5, 2.0])
    torch.testing.assert_close(clipped, bounded / bounded.mean(), rtol=1e-6, atol=0)
    assert token_weights(None, 3, 1.0, [0.5, 2.0]).tolist() == [1.0] * 3


def test_mix_anneals_linearly_to_zero():
    """m(p) = m max(0, 1 - p / anneal): full at the start, half way down at half of the anneal, 0 after; 0 is constant."""
    assert mix_at(0.5, 0.6, 0.0) == 0.5
    assert mix_at(0.5, 0.6, 0.3) == pytest.approx(0.25)
    assert mix_at(0.5, 0.6, 0.6) == 0.0 and mix_at(0.5, 0.6, 1.0) == 0.0
    assert mix_at(0.5, 0.0, 0.9) == 0.5


def test_paper_mix_spreads_token_rewards():
    """token_return with m = 0 equals uniform token rewards, whatever alpha was."""
    scores = random_group(2)
    uniform = without(scores, torch.zeros_like(scores.verdicts))
    assert_same(group_advantages(scores, PAPER, 0.0), group_advantages(uniform, PAPER, 1.0))


@pytest.mark.parametrize("kind", KINDS)
def test_group_of_one(kind):
    """One response alone: the group baseline gives 0 for sequence-level kinds, leave-one-out is a UserError."""
    alpha = torch.tensor([0.8, 0.2])
    scores = GroupScores(torch.tensor([[True]]), torch.tensor([1.0]), [[alpha]], [2], [True])
    options = replace(ROBUST, advantage=kind)
    (advantage,) = group_advantages(scores, options, 1.0)
    assert advantage.shape == (3,) and bool(torch.isfinite(advantage).all())
    if kind != "token_return":
        assert torch.equal(advantage, torch.zeros(3))
    with pytest.raises(UserError, match="rollout.responses_per_prompt: 1; grpo.baseline=rloo needs at least 2"):
        group_advantages(scores, replace(options, baseline="rloo"), 1.0)


def test_item_scores_sum_to_the_reward():
    """s_ik divides by the positive weights only."""
    scores = item_scores(torch.tensor([[True, True, False]]), torch.tensor([4.0, -1.0, 1.0]))
    torch.testing.assert_close(scores, torch.tensor([[0.8, -0.2, 0.0]], dtype=torch.float64))


def test_inconsistent_scores_are_errors():
    """A span of the wrong length, a missing item or a response without tokens is refused at construction."""
    verdicts, weights = torch.tensor([[True]]), torch.tensor([1.0])
    with pytest.raises(ValueError, match="alpha"):
        GroupScores(verdicts, weights, [[torch.ones(1)]], [3], [True])
    with pytest.raises(ValueError, match="items"):
        GroupScores(verdicts, weights, [[None, None]], [3], [True])
    with pytest.raises(ValueError, match="responses"):
        GroupScores(verdicts, weights, [[None]], [3, 4], [True])
    with pytest.raises(ValueError, match="without any token"):
        GroupScores(verdicts, weights, [[None]], [0], [False])


# ---- scores of a reward model ---------------------------------------------------------------------------------------


def random_scores(seed: int, group: int = 5) -> RewardModelScores:
    """Scores of both signs on another scale than rubrics', alphas, lengths 0..12, half of the responses finished."""
    g = torch.Generator().manual_seed(seed)
    rewards = 4 * torch.randn(group, generator=g)
    lengths = torch.randint(0, 13, (group,), generator=g).tolist()
    finished = [length == 0 or i % 2 == 0 for i, length in enumerate(lengths)]
    alphas = [[torch.softmax(2 * torch.randn(length, generator=g), 0)] for length in lengths]
    return RewardModelScores(rewards, alphas, lengths, finished)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("to_go", [True, False])
def test_token_return_of_scores_is_the_published_estimator(seed, to_go):
    """r_t = alpha_t V and +V on the last token, the stop token where there is one; an empty body has 2 V there."""
    scores = random_scores(seed)
    returns = []
    for reward, (alpha,), length, done in zip(scores.rewards.tolist(), scores.alphas, scores.lengths, scores.finished):
        row = [reward * float(a) for a in alpha] + [0.0] * done
        row[-1] += reward if length else 2 * reward
        assert sum(row) == pytest.approx(2 * reward)
        returns.append([sum(row[t:]) for t in range(len(row))] if to_go else row)
    everything = [value for row in returns for value in row]
    mean, std = statistics.fmean(everything), statistics.pstdev(everything)
    expected = [[(value - mean) / std for value in row] for row in returns]
    assert_same(group_advantages(scores, replace(PAPER, return_to_go=to_go), 1.0), expected, 5e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["sequence", "itemwise", "sequence_weighted"])
@pytest.mark.parametrize("baseline", ["group", "rloo"])
def test_other_estimators_of_scores(seed, kind, baseline):
    """The centred V over std: alike for all tokens, or by m T alpha + (1 - m); `itemwise` spreads blame evenly."""
    scores, m = random_scores(seed), 0.5
    rewards, count = scores.rewards.tolist(), len(scores.lengths)
    factor = count / (count - 1) if baseline == "rloo" else 1.0
    expected = []
    for reward, (alpha,), length, done in zip(rewards, scores.alphas, scores.lengths, scores.finished):
        level = factor * (reward - statistics.fmean(rewards)) / statistics.pstdev(rewards)
        uneven = kind == "sequence_weighted" or (kind == "itemwise" and level > 0)
        body = [level * (m * length * float(a) + 1 - m) if uneven else level for a in alpha]
        expected.append(body + [level] * done)
    options = replace(ROBUST, advantage=kind, baseline=baseline)
    assert_same(group_advantages(scores, options, m), expected, 2e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mix", [1.0, 0.0])
def test_skipped_passes_of_scores_do_not_change_the_advantage(seed, kind, mix):
    """Also which are skipped: all at m = 0 and in a group of one score, blame for `itemwise`, none for the paper's."""
    scores, options = random_scores(seed), replace(ROBUST, advantage=kind)
    needed = rewards_needing_attribution(scores.rewards, options, mix)
    alphas = [[a if k else None for a, k in zip(*rows)] for rows in zip(scores.alphas, needed.tolist())]
    assert_same(group_advantages(replace(scores, alphas=alphas), options, mix), group_advantages(scores, options, mix))
    above = int((scores.rewards > scores.rewards.mean()).sum())
    counts = {"sequence": 0, "token_return": 5, "itemwise": above, "sequence_weighted": 5}
    assert int(needed.sum()) == (counts[kind] if mix else 0)
    same = rewards_needing_attribution(torch.full((5,), -2.0), options, mix)
    assert int(same.sum()) == (5 if kind == "token_return" and mix else 0)


def test_scores_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="one alpha each"):
        RewardModelScores(torch.zeros(1), [[None, None]], [3], [True])
    with pytest.raises(ValueError, match="another number"):
        RewardModelScores(torch.zeros(2), [[None]], [3], [True])
