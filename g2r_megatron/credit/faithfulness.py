"""Does credit follow what the judge uses? Rank correlation of sentences' credit with what hiding each of them costs.

Plain numbers, no model. judge/faithfulness.py measures pairs in training, probe/ on a user's rows.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

FEWEST_SENTENCES = 3  # two can be ranked by chance alone
SHUFFLES = 16  # orders of one pair's sentences, so that the placebo adds little noise
WINDOW = 40  # pairs of the running mean
FEWEST_PAIRS = 12  # before the running mean says anything
CREDIT, PLACEBO, PAIRS = (f"attribution/faithfulness{end}" for end in ("", "_shuffled", "_pairs"))


def ranks(values: Sequence[float]) -> torch.Tensor:
    """Places in order, fp64; equal values share the mean of theirs."""
    x = torch.tensor(values, dtype=torch.float64)
    return ((x[:, None] > x).sum(1) + (x[:, None] >= x).sum(1)).double() / 2


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """In [-1, 1]; 0 where either has no order at all."""
    a, b = (r - r.mean() for r in (ranks(first), ranks(second)))
    scale = a.norm() * b.norm()
    return float(a @ b / scale) if scale > 0 else 0.0


@dataclass(frozen=True)
class Faithful:
    """Of one pair of a response and a criterion: Spearman of its credit, and mean Spearman of the credit shuffled."""

    credit: float
    shuffled: float

    @classmethod
    def of(cls, credit: Sequence[float], lost: Sequence[float], key: str) -> "Faithful":
        """``credit``, ``lost``: of each sentence; ``key`` seeds the shuffles. Credit that is not finite has no order."""
        if not all(map(math.isfinite, credit)):
            return cls(0.0, 0.0)
        order, orders = random.Random(f"shuffle/{key}"), list(credit)
        shuffled = []
        for _ in range(SHUFFLES):
            order.shuffle(orders)
            shuffled.append(spearman(orders, lost))
        return cls(spearman(credit, lost), fmean(shuffled))


def faithfulness_metrics(pairs: Sequence[Faithful]) -> dict[str, float]:
    """Means over ``pairs``, and how many they are; {} of none."""
    if not pairs:
        return {}
    means = {CREDIT: fmean(pair.credit for pair in pairs), PLACEBO: fmean(pair.shuffled for pair in pairs)}
    return means | {PAIRS: float(len(pairs))}


class RunningFaithfulness:
    """Running means over the last ``WINDOW`` pairs or so. All that it knows is in the metrics that it gives."""

    def __init__(self, metrics: dict[str, float]):
        """``metrics``: those that it gave last, to go on from; {} to begin."""
        self.means = {name: metrics[name] for name in (CREDIT, PLACEBO) if name in metrics}
        self.pairs = metrics.get(PAIRS, 0.0)

    def add(self, metrics: dict[str, float]) -> dict[str, float]:
        """``metrics`` of a step, with the running means in the place of its ``faithfulness_metrics``, if it has some.

        The mean moves by the new pairs' share of all pairs, or of ``WINDOW`` when there are more. ``PAIRS`` counts all.
        """
        if PAIRS not in metrics:
            return metrics
        self.pairs += metrics[PAIRS]
        share = min(1.0, metrics[PAIRS] / min(self.pairs, WINDOW))
        for name in (CREDIT, PLACEBO):
            before = self.means.get(name, 0.0)
            self.means[name] = before + share * (metrics[name] - before)
        return metrics | self.means | {PAIRS: self.pairs}
