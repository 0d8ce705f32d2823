"""Scores of judged responses, by the published definitions of their data sets. Plain numbers, no model.

HealthBench (arXiv 2505.08775, openai/simple-evals): a response scores its points met over the points possible, unclipped;
the overall score is the mean over responses, clipped to [0, 1]; its standard error is the standard deviation of that number
over 1,000 bootstrap samples of the responses. A tag of a row takes the scores of the rows that have it. A tag of criteria
takes of each response the score over the criteria that have it, where these have positive points. RaR, ResearchQA and other
rubrics: the mean of the responses' rubric scores, not clipped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from g2r_megatron.credit.attribution import response_reward

RESAMPLES = 1000
CLIPPED = ("healthbench",)  # data sets whose mean is clipped to [0, 1]


@dataclass(frozen=True)
class Estimate:
    """A mean over ``count`` responses and its bootstrap standard error."""

    mean: float
    error: float
    count: int


def tag_scores(verdicts: Sequence[bool], weights: Sequence[float], tags: Sequence[Sequence[str]]) -> dict[str, float]:
    """Tag -> the score over the criteria that have it; tags without a positive weight are left out.

    Lists run over the criteria of one response; ``tags``: of each.
    """
    scores = {}
    for tag in dict.fromkeys(tag for own in tags for tag in own):
        places = [k for k, own in enumerate(tags) if tag in own]
        if any(weights[k] > 0 for k in places):
            scores[tag] = response_reward([verdicts[k] for k in places], [weights[k] for k in places])
    return scores


def estimate(values: Sequence[float], clipped: bool, seed: int) -> Estimate:
    """Mean and standard error of ``values`` (at least one), with the published code's own draws for numpy seed ``seed``."""
    x = np.asarray(values, dtype=np.float64)
    places = np.random.RandomState(seed).randint(0, len(x), size=(RESAMPLES, len(x)))  # as its choice() takes them
    mean, means = x.mean(), x[places].mean(axis=1)
    if clipped:
        mean, means = np.clip(mean, 0, 1), np.clip(means, 0, 1)
    return Estimate(float(mean), float(means.std()), len(x))


def summary(records: Sequence[dict], seed: int) -> dict:
    """What eval.json says of the records (eval/records.py) of all responses; each data set apart from the others."""
    found = {}
    for dataset in dict.fromkeys(record["dataset"] for record in records):
        own = [record for record in records if record["dataset"] == dataset]
        clipped = dataset in CLIPPED
        by_tag: dict[str, list[float]] = {}
        for record in own:
            items = record["items"]
            of_items = tag_scores(*([item[name] for item in items] for name in ("verdict", "weight", "tags")))
            for tag, score in (dict.fromkeys(record["tags"], record["score"]) | of_items).items():
                by_tag.setdefault(tag, []).append(score)
        gold = [record["gold_score"] for record in own if "gold_score" in record]
        found[dataset] = {
            "rows": len({record["id"] for record in own}),
            "score": vars(estimate([record["score"] for record in own], clipped, seed)),
            "gold": vars(estimate(gold, clipped, seed)) if gold else None,
            "tags": {tag: vars(estimate(values, clipped, seed)) for tag, values in sorted(by_tag.items())},
        }
    finished = [record["finished"] for record in records if record["finished"] is not None]
    lengths = [record["length"] for record in records if record["length"] is not None]
    items = [item for record in records for item in record["items"]]
    return {
        "datasets": found,
        "length_mean": fmean(lengths) if lengths else None,
        "finished_share": fmean(finished) if finished else None,
        "items": len(items),
        "true_share": fmean(item["verdict"] for item in items) if items else None,
        "answer_mass": fmean(item["p_true"] + item["p_false"] for item in items) if items else None,
    }
