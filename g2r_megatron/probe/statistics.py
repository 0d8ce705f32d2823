"""Agreement of credit with the truth over pairs, and what it says to a person. Plain numbers, no model.

A pair counts by the rank correlation of its sentences (Spearman) and by whether the sentence with most credit is the one whose
loss costs the verdict most. Intervals: 95%, bootstrap over responses, because pairs of one response are not independent.
"""

from collections.abc import Sequence
from statistics import fmean, median

import torch

from g2r_megatron.credit.faithfulness import spearman
from g2r_megatron.probe.pairs import Pair, RowVerdicts, verdict

RESAMPLES = 2000
PLACEBO = "shuffled"
# how many sequences the judge runs for one pair: forward + backward, the verdict included
PASSES = {"gate_branch": "1 + 1*", "gate_all": "2 + 1*", "attention": "2", "occlusion": "1 + sentences"}
GRADIENT_PASSES = "2 + 1"


def same_top(first: Sequence[float], second: Sequence[float]) -> float:
    """1 if the largest entry is the same one, else 0."""
    return float(first.index(max(first)) == second.index(max(second)))


def interval(values: Sequence[float], owners: Sequence[int], seed: int) -> list[float]:
    """[mean, low, high] of ``values``; ``owners``: the response of each."""
    numbers = {owner: n for n, owner in enumerate(dict.fromkeys(owners))}
    groups = torch.tensor([numbers[owner] for owner in owners])
    x = torch.tensor(values, dtype=torch.float64)
    sums = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, groups, x)
    counts = torch.bincount(groups, minlength=len(numbers)).double()
    draws = torch.randint(len(numbers), (RESAMPLES, len(numbers)), generator=torch.Generator().manual_seed(seed))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return [fmean(values), low, high]


def agreement(pairs: Sequence[Pair], credits: Sequence[Sequence[float]], truth: str, seed: int) -> dict:
    """``spearman`` and ``top`` of the pairs' ``credits`` with their ``masked`` or ``deleted``."""
    owners, truths = [pair.row for pair in pairs], [getattr(pair, truth) for pair in pairs]
    both = list(zip(credits, truths, strict=True))
    return {
        "spearman": interval([spearman(*one) for one in both], owners, seed),
        "top": interval([same_top(*one) for one in both], owners, seed),
    }


def method_summary(pairs: Sequence[Pair], method: str, seed: int) -> dict:
    """The results of one attribution: agreement, ESS, seconds and passes."""
    credits, shares = [pair.credit[method] for pair in pairs], [pair.ess[method] for pair in pairs]
    seconds = [pair.seconds[method] for pair in pairs if method in pair.seconds]
    return {
        "masked": agreement(pairs, credits, "masked", seed),
        "deleted": agreement(pairs, credits, "deleted", seed),
        "ess_median": median(shares),
        "ess_lowest": min(shares),
        "seconds": fmean(seconds) if seconds else None,
        "passes": None if method == PLACEBO else PASSES.get(method, GRADIENT_PASSES),
    }


def judge_summary(rows: Sequence[RowVerdicts]) -> dict:
    """Whether the judge answers at all, and whether changes of the wording change its answers, over all items judged."""
    plain = [item for row in rows for item in row.plain]
    negated = [item for row in rows for item in row.negated]
    swapped = [item for row in rows if row.swapped is not None for item in row.swapped]
    return {
        "items": len(plain),
        "answer_mass": fmean(map(sum, plain)),
        "true_rate": fmean(map(verdict, plain)),
        "swapped_true_rate": fmean(map(verdict, swapped)) if swapped else None,
        "swapped_same": _share_same(plain, swapped, True) if swapped else None,
        "negated_true_rate": fmean(map(verdict, negated)),
        "negated_opposite": _share_same(plain, negated, False),
    }


def _share_same(first: list[list[float]], second: list[list[float]], same: bool) -> float:
    return fmean((verdict(a) == verdict(b)) == same for a, b in zip(first, second, strict=True))


def summary(pairs: Sequence[Pair], rows: Sequence[RowVerdicts], methods: Sequence[str], seed: int) -> dict:
    """Everything that probe.json says but the pairs themselves. ``rows``: none of a reward model, which has no verdicts."""
    scored, true, false = ([pair for pair in pairs if pair.verdict is wanted] for wanted in (None, True, False))
    main = scored or true
    found = _of_verdict(main, methods, seed)
    result = {
        "line": verdict_line(found["attributions"], "reward model" if scored else "judge"),
        "responses": len({pair.row for pair in pairs}),
        "sentences_mean": fmean(len(pair.masked) for pair in pairs),
        "top_by_chance": fmean(1 / len(pair.masked) for pair in main),
    }
    if scored:
        return result | {"score": found}
    result |= {"pairs_true": len(true), "pairs_false": len(false), "judge": judge_summary(rows), "true": found}
    return result | ({"false": _of_verdict(false, methods, seed)} if false else {})


def _of_verdict(pairs: Sequence[Pair], methods: Sequence[str], seed: int) -> dict:
    return {
        "attributions": {method: method_summary(pairs, method, seed) for method in [*methods, PLACEBO]},
        "masked_with_deleted": agreement(pairs, [pair.masked for pair in pairs], "deleted", seed),
        "seconds": {name: fmean(pair.seconds[name] for pair in pairs) for name in ("masked", "deleted")},
    }


def verdict_line(attributions: dict[str, dict], judge: str = "judge") -> str:
    """What to use. An attribution follows the judge if its interval is above 0 and above the placebo's.

    Of those that follow, the cheapest whose mean is within the interval of the best.
    """
    scores = {name: found["masked"]["spearman"] for name, found in attributions.items()}
    scores.pop("occlusion", None)  # it is the truth
    placebo, *_, ceiling = scores.pop(PLACEBO)
    if not scores:
        return "`occlusion` is masking itself, so there is nothing to compare: measure another attribution beside it"
    named = {name: f"`{name}` ({_short(score[0])})" for name, score in scores.items()}
    follow = sorted((n for n in scores if scores[n][1] > max(ceiling, 0)), key=lambda n: -scores[n][0])
    rest = [named[name] for name in scores if name not in follow]
    of_placebo = f"shuffled {_short(placebo)}"
    if not follow and any(score[1] > 0 for score in scores.values()):
        return f"too few pairs to tell {', '.join(rest)} from {of_placebo} (up to {_short(ceiling)}): raise --sample"
    if not follow:
        return f"no credit follows what this {judge} uses: {', '.join(rest)}, {of_placebo}: train without (grpo.preset=grpo)"
    close = [name for name in follow if scores[name][0] >= scores[follow[0]][1]]
    best = min(close, key=lambda name: attributions[name]["seconds"])
    line = f"credit from {', '.join(named[name] for name in follow)} follows what this {judge} uses ({of_placebo}); "
    line += f"{', '.join(rest)} {'do' if len(rest) > 1 else 'does'} not: " if rest else ""
    return f"{line}use `{best}`"


def _short(value: float) -> str:
    """.57, -.08"""
    text = f"{value:.2f}".replace("0.", ".", 1)
    return ".00" if float(text) == 0 else text
