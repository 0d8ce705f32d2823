"""Advantages of one group: the G responses sampled for one query (docs/method.md step 6).

Notation: response i = 1..G, rubric item k = 1..K, token t = 1..T_i of the body; a finished response has one
more token, the stop token, which the judge does not read. s_ik = w_k 1[z_ik] / sum_k max(w_k, 0) is the
item's part of the reward r_i = sum_k s_ik. A reward model's score V_i is the one part (K = 1) of r_i = V_i.
Standard deviations are population ones (divided by the count).
Arithmetic is fp64, results are fp32 on the CPU.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from g2r_megatron.config.options import GrpoConfig
from g2r_megatron.credit.attribution import score_token_rewards, token_rewards
from g2r_megatron.errors import UserError

# A spread below this share of the largest value is rounding: std 0, advantage 0.
ZERO_SPREAD = 1e-6


@dataclass(frozen=True)
class GroupScores:
    """What the judge found for the G responses of one query."""

    verdicts: Tensor  # [G, K] bool
    weights: Tensor  # [K] float; the positive ones sum to more than 0
    alphas: list[list[Tensor | None]]  # G x K; each [T_i], sums to 1, or None: not computed, taken as uniform
    lengths: list[int]  # [G] T_i, tokens of the body
    finished: list[bool]  # [G] whether a stop token follows the body

    def __post_init__(self) -> None:
        groups, items = self.verdicts.shape
        if self.weights.shape != (items,) or any(len(row) != items for row in self.alphas):
            raise ValueError(f"verdicts are [{groups}, {items}] but weights or alphas do not have {items} items")
        _check_responses(groups, self.alphas, self.lengths, self.finished)

    @property
    def parts(self) -> Tensor:
        """s_ik [G, K] fp64."""
        return item_scores(self.verdicts, self.weights)

    @property
    def met(self) -> Tensor:
        """[G, K] bool: where ``itemwise`` spreads the term s_ik - mean_i s_ik by alpha; elsewhere evenly."""
        return self.verdicts

    @property
    def sizes(self) -> Tensor:
        """[G, K] fp64: what ``sequence_weighted`` averages a response's alphas by."""
        return self.verdicts.double() * self.weights.double().abs()

    def needing_attribution(self, options: GrpoConfig, mix: float) -> Tensor:
        """See ``items_needing_attribution``."""
        return items_needing_attribution(self.verdicts, self.weights, options, mix)

    def token_rewards(self, i: int, alphas: list[Tensor | None]) -> Tensor:
        """r_it of Algorithm 1 with these ``alphas``: [T_i + finished_i] fp64, sums to r_i.

        0 on the stop token, except that an empty body has its whole reward there.
        """
        verdicts, length = self.verdicts[i].tolist(), self.lengths[i]
        positive = float(self.weights.double().clamp(min=0).sum())
        body = token_rewards(verdicts, self.weights.tolist(), alphas, positive, length).double()
        stop = torch.zeros(int(self.finished[i]), dtype=torch.float64)
        return torch.cat([body, stop if length else stop + float(self.parts[i].sum())])


@dataclass(frozen=True)
class RewardModelScores:
    """What a reward model found for the G responses of one query; to the estimators below the same as ``GroupScores``."""

    rewards: Tensor  # [G] float: V_i
    alphas: list[list[Tensor | None]]  # G x 1, as in GroupScores
    lengths: list[int]
    finished: list[bool]

    def __post_init__(self) -> None:
        if self.rewards.dim() != 1 or any(len(row) != 1 for row in self.alphas):
            raise ValueError(f"rewards are {tuple(self.rewards.shape)}, with one alpha each")
        _check_responses(len(self.rewards), self.alphas, self.lengths, self.finished)

    @property
    def parts(self) -> Tensor:
        """V_i: [G, 1] fp64."""
        return self.rewards.double()[:, None]

    @property
    def met(self) -> Tensor:
        """Responses better than the group's mean: alpha says which tokens raise V, so it can give credit, not blame."""
        return self.parts > self.parts.mean()

    @property
    def sizes(self) -> Tensor:
        return torch.ones_like(self.parts)

    def needing_attribution(self, options: GrpoConfig, mix: float) -> Tensor:
        """See ``rewards_needing_attribution``."""
        return rewards_needing_attribution(self.rewards, options, mix)

    def token_rewards(self, i: int, alphas: list[Tensor | None]) -> Tensor:
        """[T_i + finished_i] fp64, sums to 2 V_i (docs/method.md step 8)."""
        return score_token_rewards(float(self.rewards[i]), alphas[0], self.lengths[i], self.finished[i])


Scores = GroupScores | RewardModelScores


def _check_responses(
    groups: int, alphas: Sequence[Sequence[Tensor | None]], lengths: list[int], finished: list[bool]
) -> None:
    if not groups == len(alphas) == len(lengths) == len(finished):
        raise ValueError(f"{groups} responses judged, but alphas, lengths or finished have another number")
    for length, done, row in zip(lengths, finished, alphas, strict=True):
        if length + done < 1:
            raise ValueError("a response without any token")
        if any(alpha is not None and alpha.shape != (length,) for alpha in row):
            raise ValueError(f"an alpha does not have the {length} tokens of its response")


def has_spread(values: Tensor) -> bool:
    """Whether ``values`` (any shape) differ by more than rounding."""
    return bool(values.std(unbiased=False) > ZERO_SPREAD * values.abs().max())


def item_scores(verdicts: Tensor, weights: Tensor) -> Tensor:
    """s_ik = w_k 1[z_ik] / sum_k max(w_k, 0): [G, K] fp64 from [G, K] bool and [K]."""
    weights = weights.double()
    return verdicts.double() * weights / weights.clamp(min=0).sum()


def _centred(values: Tensor, baseline: str) -> Tensor:
    """values minus the group mean, or minus the mean of the other responses: [G, ...] fp64 over dimension 0."""
    centred = values - values.mean(dim=0, keepdim=True)
    if baseline == "group":
        return centred
    count = values.shape[0]
    _require_others(count)
    return centred * (count / (count - 1))  # x_i - mean_{j != i} x_j


def _require_others(count: int) -> None:
    """Leave-one-out has no baseline in a group of one."""
    if count < 2:
        raise UserError("rollout.responses_per_prompt", str(count), "grpo.baseline=rloo needs at least 2")


def _divisor(values: Tensor, options: GrpoConfig) -> float:
    """std of all ``values``; infinity where they do not spread, so that the advantage is 0; 1 if not normalised."""
    if not options.normalize_std:
        return 1.0
    return float(values.std(unbiased=False)) if has_spread(values) else math.inf


def mix_at(mix: float, mix_anneal: float, progress: float) -> float:
    """m at ``progress`` (share of training done, 0..1): m max(0, 1 - progress / mix_anneal); constant if anneal is 0."""
    return mix if mix_anneal == 0 else mix * max(0.0, 1.0 - progress / mix_anneal)


def items_needing_attribution(verdicts: Tensor, weights: Tensor, options: GrpoConfig, mix: float) -> Tensor:
    """Which (response, item) pairs need a judge backward pass: [G, K] bool from verdicts [G, K] bool, weights [K].

    Without loss (skipping them does not change the advantage, docs/method.md, `robust`): nothing for
    ``sequence`` or once ``mix`` is 0; items judged False or of weight 0; for ``itemwise`` items whose s_ik does
    not vary in the group, and whole groups whose rewards have std 0; for ``sequence_weighted`` responses of
    advantage 0. ``token_return`` needs every True item: even equal rewards are spread differently.

    With loss: ``top_items`` < 1 keeps, of the remaining items of each response, that fraction (rounded up) with
    the largest centred term |s_ik - mean_i s_ik|; the earlier item wins a tie.
    """
    needed = verdicts.bool() & (weights != 0)
    if options.advantage == "sequence" or mix == 0:
        return torch.zeros_like(needed)
    scores = item_scores(verdicts, weights)
    terms = scores - scores.mean(dim=0, keepdim=True)
    if options.advantage == "itemwise":
        varies = (verdicts != verdicts[:1]).any(dim=0)  # [K]
        needed &= varies & math.isfinite(_divisor(scores.sum(dim=1), options))
    elif options.advantage == "sequence_weighted":
        needed &= (_sequence(scores, options) != 0)[:, None]
    return _keep_top(needed, terms.abs(), options.top_items)


def rewards_needing_attribution(rewards: Tensor, options: GrpoConfig, mix: float) -> Tensor:
    """Which responses need a reward model's backward pass: [G, 1] bool from V_i [G].

    As ``items_needing_attribution``, without loss: nothing for ``sequence`` or once ``mix`` is 0; for ``itemwise`` the
    responses better than the group's mean, for ``sequence_weighted`` those of an advantage other than 0, and neither in
    a group of std 0; ``token_return`` needs all of them.
    """
    parts = rewards.double()[:, None]
    if options.advantage == "sequence" or mix == 0:
        return torch.zeros_like(parts, dtype=torch.bool)
    if options.advantage == "token_return":
        return torch.ones_like(parts, dtype=torch.bool)
    if options.advantage == "itemwise":
        return (parts > parts.mean()) & math.isfinite(_divisor(parts, options))
    return (_sequence(parts, options) != 0)[:, None]


def _keep_top(needed: Tensor, sizes: Tensor, fraction: float) -> Tensor:
    """Of each row of ``needed`` [G, K] keep the ceil(fraction x count) entries with the largest ``sizes`` [G, K]."""
    if fraction >= 1:
        return needed
    ranks = sizes.masked_fill(~needed, -1.0).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    # 1e-9: 0.28 x 25 is 7.000000000000001 in floating point and means 7
    keep = torch.ceil(fraction * needed.sum(dim=1).double() - 1e-9).clamp(min=1)
    return needed & (ranks < keep[:, None])


def group_advantages(scores: Scores, options: GrpoConfig, mix: float) -> list[Tensor]:
    """Advantage of every token of every response of the group, by ``options.advantage``.

    ``options``: resolved (no None among the options that follow the preset); ``mix``: m of this step, from
    ``mix_at``. Returns G tensors [T_i + finished_i] fp32. Raises UserError for an rloo baseline with G = 1.
    """
    if options.top_items < 1:
        keep = scores.needing_attribution(options, mix).tolist()
        alphas = [[a if k else None for a, k in zip(*rows, strict=True)] for rows in zip(scores.alphas, keep)]
        scores = replace(scores, alphas=alphas)
    kinds: dict[str | None, Callable[[Scores, GrpoConfig, float], list[Tensor]]] = {
        "sequence": _sequence_advantages,
        "token_return": _token_return_advantages,
        "itemwise": _itemwise_advantages,
        "sequence_weighted": _sequence_weighted_advantages,
    }
    return [advantage.float() for advantage in kinds[options.advantage](scores, options, mix)]


def token_weights(alpha: Tensor | None, length: int, mix: float, weight_clip: list[float] | None) -> Tensor:
    """v_t = 1 + m (T alpha_t - 1), that is T times the mixture m alpha + (1 - m)/T: [T] fp64, mean 1.

    ``alpha``: [T] that sums to 1, or None for uniform, which gives exactly 1. ``weight_clip`` = [low, high]
    bounds v, which is then divided by its mean again: keeping the sequence's advantage comes before the bounds,
    which the division may pass slightly.
    """
    if alpha is None:
        return torch.ones(length, dtype=torch.float64)
    weights = 1.0 + mix * (length * alpha.double() - 1.0)
    if weight_clip is not None and length:
        weights = weights.clamp(weight_clip[0], weight_clip[1])
        weights = weights / weights.mean()
    return weights


def _sequence(item_scores_: Tensor, options: GrpoConfig) -> Tensor:
    """A_i = (r_i - baseline_i) / std_i(r_i): [G] fp64 from s_ik [G, K]."""
    rewards = item_scores_.sum(dim=1)
    return _centred(rewards, options.baseline) / _divisor(rewards, options)


def _sequence_advantages(scores: Scores, options: GrpoConfig, mix: float) -> list[Tensor]:
    """A_it = A_i for every token: sequence-level GRPO (or RLOO)."""
    advantages = _sequence(scores.parts, options)
    return [a.repeat(length + done) for a, length, done in zip(advantages, scores.lengths, scores.finished)]


def _itemwise_advantages(scores: Scores, options: GrpoConfig, mix: float) -> list[Tensor]:
    """A_it = sum_k f_ik (s_ik - baseline_ik) v_ikt / std_i(r_i) on the body (docs/method.md); A_i on the stop token.

    v_ikt is ``token_weights`` for items judged True and 1 for items judged False; f_ik is ``false_scale`` for
    False items and 1 for True ones. A reward model's score counts as True above the group's mean. Written as A_i plus
    the deviations from it, so that flat alpha (v = 1) and false_scale 1 give exactly the ``sequence`` advantage.
    """
    parts = scores.parts
    base = _sequence(parts, options)
    terms = _centred(parts, options.baseline) / _divisor(parts.sum(dim=1), options)  # [G, K]
    result = []
    for i, (length, done) in enumerate(zip(scores.lengths, scores.finished)):
        advantage = base[i].repeat(length + done)
        body = advantage[:length]
        for term, met, alpha in zip(terms[i], scores.met[i].tolist(), scores.alphas[i]):
            if not met:
                body += (options.false_scale - 1.0) * term
            elif alpha is not None:
                body += term * (token_weights(alpha, length, mix, options.weight_clip) - 1.0)
        result.append(advantage)
    return result


def _sequence_weighted_advantages(scores: Scores, options: GrpoConfig, mix: float) -> list[Tensor]:
    """A_it = A_i v_it on the body, v_i = ``token_weights`` of alpha_i; A_i on the stop token.

    alpha_i = sum_{k True} |w_k| alpha_ik / sum_{k True} |w_k| (uniform where no item of weight is True), or the alpha of
    a reward model's score.
    """
    base = _sequence(scores.parts, options)
    sizes = scores.sizes
    result = []
    for i, (length, done) in enumerate(zip(scores.lengths, scores.finished)):
        total = float(sizes[i].sum())
        advantage = base[i].repeat(length + done)
        if total > 0 and length > 0:
            alpha = torch.zeros(length, dtype=torch.float64)
            for size, item_alpha in zip(sizes[i].tolist(), scores.alphas[i]):
                alpha += size / total * (1.0 / length if item_alpha is None else item_alpha.double())
            advantage[:length] *= token_weights(alpha, length, mix, options.weight_clip)
        result.append(advantage)
    return result


def _token_return_advantages(scores: Scores, options: GrpoConfig, mix: float) -> list[Tensor]:
    """A_it = (R_it - baseline_i) / std(R), R_it = sum_{s >= t} r_is with ``return_to_go``, else r_it.

    r_it: ``scores.token_rewards`` with alpha = v / T, v from ``token_weights``. Mean and std are over all tokens of
    all responses of the group; with the rloo baseline the mean is over all tokens of the other responses.
    """
    returns = []
    for i, length in enumerate(scores.lengths):
        mixed = [
            None if a is None or not length else token_weights(a, length, mix, options.weight_clip) / length
            for a in scores.alphas[i]
        ]
        tokens = scores.token_rewards(i, mixed)
        returns.append(tokens.flip(0).cumsum(0).flip(0) if options.return_to_go else tokens)
    everything = torch.cat(returns)
    divisor = _divisor(everything, options)
    if options.baseline == "group":
        return [(r - everything.mean()) / divisor for r in returns]
    _require_others(len(returns))
    return [(r - (everything.sum() - r.sum()) / (everything.numel() - r.numel())) / divisor for r in returns]
