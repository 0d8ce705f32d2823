"""The known hazards of docs/method.md as numbers of one training step.

Each function takes plain lists over the step's whole batch (all ranks gathered) and returns metric names with
values. A metric that has nothing to measure is left out, so a mean never hides an empty list.
"""

import math
from collections.abc import Sequence
from statistics import fmean, median, pstdev

import torch
from torch import Tensor

from g2r_megatron.credit.advantages import has_spread
from g2r_megatron.credit.attribution import effective_sample_share, response_reward

POSITION_BINS = 10
ONE_TOKEN = 0.9  # an attribution with a larger alpha is on one token
LOW_ANSWER_MASS = 0.5


def reward_metrics(rewards: list[list[float]]) -> dict[str, float]:
    """Rewards r_i of each group (query): mean and std over all responses, share of groups that teach nothing."""
    flat = [reward for group in rewards for reward in group]
    zero = [not has_spread(torch.tensor(group, dtype=torch.float64)) for group in rewards]
    return {"reward/mean": fmean(flat), "reward/std": pstdev(flat), "group/zero_variance_share": fmean(zero)}


def judge_metrics(
    verdicts: list[list[bool]], truths: Sequence[list[bool] | None], weights: list[list[float]]
) -> dict[str, float]:
    """The judge against the truth; one entry per response, each over its rubric items (``truths``: None if unknown).

    ``judge/true_share``: share of items judged True. Over the responses with a truth: ``judge/agreement``: share of items
    judged right; ``reward/true_mean``: mean true score; ``judge/gap``: mean of judged minus true score.
    """
    metrics = {"judge/true_share": fmean(v for row in verdicts for v in row)}
    known = [(v, t, w) for v, t, w in zip(verdicts, truths, weights, strict=True) if t is not None]
    if known:
        true_scores = [response_reward(t, w) for _, t, w in known]
        gaps = [response_reward(v, w) - score for (v, _, w), score in zip(known, true_scores, strict=True)]
        metrics["judge/agreement"] = fmean(a == b for v, t, _ in known for a, b in zip(v, t, strict=True))
        metrics["judge/gap"] = fmean(gaps)
        metrics["reward/true_mean"] = fmean(true_scores)
    return metrics


def answer_mass_warning(mass: float) -> str | None:
    """What to look at when ``mass``, the mean p(True) + p(False), is low: the judge wants to say something else."""
    if mass >= LOW_ANSWER_MASS:
        return None
    return (
        f"the judge gives only {mass:.3f} of its probability to True or False, so its verdicts mean little; look at "
        "judge.template (does it ask for these words, and end where they come?), judge.think and judge.template_options "
        "(does the judge think first?), judge.true_words and judge.false_words (are they its words?), and the language "
        "of the prompts"
    )


def response_metrics(lengths: list[int], finished: list[bool]) -> dict[str, float]:
    """Mean length in tokens (with the stop token) and share of responses that ended with a stop token."""
    return {"response/length_mean": fmean(lengths), "response/finished_share": fmean(finished)}


def attribution_metrics(
    raw: list[Tensor], alphas: list[Tensor], cosines: list[float], flat_threshold: float
) -> dict[str, float]:
    """Health of the step's attributions: ``raw`` b [T] and the ``alphas`` [T] made of them, one per backward pass.

    ``attribution/passes``; ``zero_or_nonfinite``: number of b that are all zero or hold a NaN or infinity
    (always present: 0 says that all was well); ``cos_median``: median over the finite ``cosines``, each the median
    |cos(g_t, e_t)| of a pass. Over responses of at least two tokens: mean ``ess_share`` = 1 / (T sum alpha^2),
    ``flat_share`` of passes with ESS/T above ``flat_threshold``, mean ``max_alpha``, ``one_token_share`` of passes with a
    token whose alpha is above 0.9.
    """
    bad = sum(1 for b in raw if b.numel() and not (bool(torch.isfinite(b).all()) and bool((b != 0).any())))
    finite = [cos for cos in cosines if math.isfinite(cos)]
    metrics = {"passes": float(len(raw)), "zero_or_nonfinite": float(bad)}
    if finite:
        metrics["cos_median"] = median(finite)
    alphas = [alpha for alpha in alphas if alpha.numel() >= 2]
    if alphas:
        shares = [effective_sample_share(alpha) for alpha in alphas]
        metrics["ess_share"] = fmean(shares)
        metrics["flat_share"] = fmean(share > flat_threshold for share in shares)
        largest = [float(alpha.max()) for alpha in alphas]
        metrics["max_alpha"] = fmean(largest)
        metrics["one_token_share"] = fmean(alpha > ONE_TOKEN for alpha in largest)
    return {f"attribution/{name}": value for name, value in metrics.items()}


def key_token_metrics(alphas: list[Tensor], masks: list[Tensor]) -> dict[str, float]:
    """``attribution/key_token_mass``: mean of sum_t alpha_t over key tokens; ``key_token_chance``: the same for uniform alpha.

    One pair per attributed item that is truly met: alpha [T] and ``truth.key_token_mask`` [T] bool. Pairs
    without a key token are left out.
    """
    pairs = [(alpha, mask) for alpha, mask in zip(alphas, masks, strict=True) if bool(mask.any())]
    if not pairs:
        return {}
    return {
        "attribution/key_token_mass": fmean(float(alpha[mask].sum()) for alpha, mask in pairs),
        "attribution/key_token_chance": fmean(float(mask.double().mean()) for _, mask in pairs),
    }


def advantage_metrics(advantages: list[Tensor], finished: list[bool]) -> dict[str, float]:
    """Mean advantage by place in the response: a slope over the positions pushes length, not content.

    ``advantages``: [T_i + finished_i] per response. ``advantage/position_d``: mean over the body tokens t
    (from 0) with floor(10 t / T_i) = d; ``advantage/stop_token``: mean over the stop tokens.
    """
    sums, counts = torch.zeros(POSITION_BINS, dtype=torch.float64), torch.zeros(POSITION_BINS, dtype=torch.float64)
    stops = []
    for advantage, done in zip(advantages, finished, strict=True):
        body = advantage[:-1] if done else advantage
        bins = torch.arange(body.numel()) * POSITION_BINS // max(body.numel(), 1)
        sums.index_add_(0, bins, body.double())
        counts.index_add_(0, bins, torch.ones(body.numel(), dtype=torch.float64))
        if done:
            stops.append(float(advantage[-1]))
    metrics = {f"advantage/position_{d}": float(sums[d] / counts[d]) for d in range(POSITION_BINS) if counts[d]}
    if stops:
        metrics["advantage/stop_token"] = fmean(stops)
    return metrics
