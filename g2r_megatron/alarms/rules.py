"""What each alarm looks at in the metrics of a run, and what it tells a person. No model, no files.

A history is the run's metrics records, oldest first, each with its ``step``. A rule gives one number of a history, or None
as long as there is nothing to judge; an alarm is on while the number is past its threshold (config/alarm_options.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean

from g2r_megatron.credit.faithfulness import CREDIT, FEWEST_PAIRS, PAIRS, PLACEBO

Record = dict[str, float]
MASTER_KEYS = "alarms/master_keys"
INTERNALIZATION = "alarms/internalization_gap"
CHECKS = 3


@dataclass(frozen=True)
class Rule:
    """``value(history, window)``; past the threshold when above it, or below if ``is_floor``. ``curve``: the metric it is on."""

    name: str
    value: Callable[[Sequence[Record], int], float | None]
    curve: str
    meaning: str
    remedy: str
    is_floor: bool = False

    def is_past(self, value: float, threshold: float) -> bool:
        return value < threshold if self.is_floor else value > threshold


def gold_of(record: Record) -> float | None:
    """The score that training does not see: of eval.judge, else the known truth."""
    return record.get("eval/gold_score", record.get("eval/true_score"))


def _recent(key: str, at_once: bool = False) -> Callable[[Sequence[Record], int], float | None]:
    """Mean of ``key`` over the last ``window`` records that have it; ``at_once``: also while there are fewer.

    What is wrong with the judge from the start is to be said at once.
    """

    def value(history: Sequence[Record], window: int) -> float | None:
        found = list(islice((record[key] for record in reversed(history) if key in record), window))
        return fmean(found) if len(found) == window or (at_once and found) else None

    return value


def _last(key: str) -> Callable[[Sequence[Record], int], float | None]:
    def value(history: Sequence[Record], window: int) -> float | None:
        return next((record[key] for record in reversed(history) if key in record), None)

    return value


def _alike(history: Sequence[Record], window: int) -> float | None:
    share = _recent("judge/true_share")(history, window)
    return None if share is None else max(share, 1 - share)


def _length_factor(history: Sequence[Record], window: int) -> float | None:
    lengths = [record["response/length_mean"] for record in history if "response/length_mean" in record]
    if len(lengths) < 2 * window:
        return None
    first, last = fmean(lengths[:window]), fmean(lengths[-window:])
    return max(first, last) / max(1e-9, min(first, last))


def _gold_fall(history: Sequence[Record], window: int) -> float | None:
    """How far the gold score is below its best evaluation; None while the judge's own score has fallen with it."""
    scores = [(gold, record["eval/judge_score"]) for record in history if (gold := gold_of(record)) is not None]
    if len(scores) < 2:
        return None
    best, of_judge = max(scores)
    gold, judged = scores[-1]
    return best - gold if judged >= of_judge else None


def _margin_over_shuffled(history: Sequence[Record], window: int) -> float | None:
    """Of running means over enough pairs."""
    found = next((record for record in reversed(history) if PAIRS in record), None)
    return None if found is None or found[PAIRS] < FEWEST_PAIRS else found[CREDIT] - found[PLACEBO]


def _fall_from_peak(history: Sequence[Record], window: int) -> float | None:
    """Of means of ``CHECKS`` neighbouring measurements, which are of different queries."""
    gaps = [record[INTERNALIZATION] for record in history if INTERNALIZATION in record]
    means = [fmean(gaps[i : i + CHECKS]) for i in range(len(gaps) - CHECKS + 1)]
    return max(means) - means[-1] if means else None


RULES = (
    Rule(
        "answer_mass",
        _recent("judge/answer_mass", at_once=True),
        "judge/answer_mass",
        "the judge gives little of its probability to True or False, so its verdicts mean little",
        "look at judge.template, judge.think, judge.true_words and judge.false_words",
        is_floor=True,
    ),
    Rule(
        "one_sided",
        _alike,
        "judge/true_share",
        "nearly all verdicts are the same, so there is nothing to learn from them",
        "look at judged responses in the report; take harder criteria or another judge",
    ),
    Rule(
        "flat",
        _recent("attribution/ess_share"),
        "attribution/ess_share",
        "credit is nearly the same for all tokens: the attribution says nothing",
        "use judge.attribution gate with judge.normalize positive, and see g2r probe",
    ),
    Rule(
        "one_token",
        _recent("attribution/one_token_share"),
        "attribution/one_token_share",
        "most credit lies on one token a response, by accident of a heavy tail",
        "use judge.smoothing sentence, or set grpo.weight_clip",
    ),
    Rule(
        "faithless",
        _margin_over_shuffled,
        CREDIT,
        "credit follows what the verdict loses without a sentence no better than shuffled credit does",
        "run g2r probe on this judge, take the attribution that it names, or set alarms.on_faithless grpo",
        is_floor=True,
    ),
    Rule(
        "master_keys",
        _last(MASTER_KEYS),
        MASTER_KEYS,
        "the judge finds criteria met by responses that say nothing",
        "look at judge.template, or take a stronger judge: the policy will learn to say nothing",
    ),
    Rule(
        "gold_agreement",
        _last("eval/gold_agreement"),
        "eval/gold_agreement",
        "the judge and the gold judge disagree on many held-out items",
        "read items on which they differ in the report; one of the two does not understand the criteria",
        is_floor=True,
    ),
    Rule(
        "exploitation",
        _last("eval/exploitation_rate"),
        "eval/exploitation_rate",
        "many of the items won since the start are rejected by the gold judge",
        "look at what the responses learned to say; stop at the best checkpoint by eval/gold_score, or take a stronger judge",
    ),
    Rule(
        "gold_down",
        _gold_fall,
        "eval/gold_score",
        "the judge is as pleased as before, but the score that training does not see has fallen",
        "go back to the best checkpoint (checkpoint.keep_best), lower optimizer.lr or raise grpo.kl_coef",
    ),
    Rule(
        "length",
        _length_factor,
        "response/length_mean",
        "responses have become much longer or shorter",
        "see whether the rubric rewards length; grpo.loss_aggregation dr_grpo removes the bias of the loss",
    ),
    Rule(
        "internalization",
        _fall_from_peak,
        INTERNALIZATION,
        "the policy writes less of what it would write if it were shown the rubric",
        "compare eval/gold_score; the gap's peak is a good place to stop",
    ),
)
