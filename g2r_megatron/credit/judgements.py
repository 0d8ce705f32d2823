"""What a judge says of a response, and what that is worth: verdicts on rubric items, or a reward model's score.

The judgements of one response are a row: an ``ItemJudgement`` for each rubric item, or one ``ScoreJudgement``. Both
classes answer the same questions about rows of their kind (``Judgement``); ``kind_of`` gives the class of a row, so that
the rest of the program does not ask which kind of judge there is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor

from g2r_megatron.config.options import GrpoConfig
from g2r_megatron.credit.advantages import (
    GroupScores,
    RewardModelScores,
    Scores,
    items_needing_attribution,
    rewards_needing_attribution,
)
from g2r_megatron.credit.attribution import response_reward, score_token_rewards, token_rewards
from g2r_megatron.credit.hazards import judge_metrics
from g2r_megatron.credit.truth import true_verdicts
from g2r_megatron.data.types import Query

Alphas = Sequence[Tensor | None]


class Judgement(Protocol):
    """One judgement of a response, and what its gradient says of the response's tokens.

    ``verdict`` is None for a score. ``attribution`` is b_t [T], fp32 on the CPU, over the response body in the judge's
    own tokens; None where no backward ran. Items that share one backward (``judge.credit=per_response``) have the same
    tensor. ``cos`` is the median over tokens of |cos(g_t, e_t)|, ``grad_norm`` the L2 norm of g over the response.
    """

    @property
    def verdict(self) -> bool | None: ...

    attribution: Tensor | None
    grad_norm: float | None
    cos: float | None

    def values(self) -> list[Any]:
        """What the judge said, as plain data for JSON."""
        ...

    @staticmethod
    def from_output(values: Tensor, verdicts: Sequence[bool]) -> "JudgementRow":
        """One judgement an input. ``values``: fp32 [inputs, columns] as judge/targets.py reads them; ``verdicts``: [inputs]."""
        ...

    @staticmethod
    def name(k: int) -> str:
        """How messages call judgement ``k`` (from 0) of a row, with a leading space."""
        ...

    @staticmethod
    def reward(query: Query, row: "JudgementRow") -> float:
        """r(x, o)."""
        ...

    @staticmethod
    def weights(query: Query) -> list[float]:
        """w_k of each judgement of a row."""
        ...

    @staticmethod
    def checks(query: Query) -> list[str | None]:
        """The programmatic truth of each judgement of a row (data/types.py)."""
        ...

    @staticmethod
    def take_verified(group: Sequence["JudgementRow"], verified: Sequence[bool | None]) -> list[bool]:
        """Put a verifier's verdicts on the responses to one query in the place of the judge's (None: there is none).

        Returns whether both agree on each response, True without a verdict: elsewhere the judge's credit is of something else.
        """
        ...

    @staticmethod
    def needing_attribution(
        query: Query, rows: Sequence["JudgementRow"], options: GrpoConfig, mix: float
    ) -> list[list[bool]]:
        """Which judgements of a group can change an advantage by their attribution."""
        ...

    @staticmethod
    def group_scores(
        query: Query,
        rows: Sequence["JudgementRow"],
        alphas: list[list[Tensor | None]],
        lengths: list[int],
        finished: list[bool],
    ) -> Scores:
        """One group as the estimators of advantages take it."""
        ...

    @staticmethod
    def token_rewards(query: Query, row: "JudgementRow", alphas: Alphas, length: int, finished: bool = False) -> Tensor:
        """r_t fp32 over the T = ``length`` tokens of the body and, of a score, the stop token of a ``finished`` response."""
        ...

    @staticmethod
    def metrics(
        queries: Sequence[Query], truths: Sequence[list[bool] | None], rows: Sequence["JudgementRow"]
    ) -> dict[str, float]:
        """How the judge judges, and against the truth (``true_verdicts`` of each response), where that is known."""
        ...

    @staticmethod
    def sample_items(query: Query, text: str, row: "JudgementRow", alphas: Alphas) -> list[dict[str, Any]]:
        """The judgements of a response as the report draws them."""
        ...

    @staticmethod
    def output_record(query: Query, row: "JudgementRow", alphas: Alphas) -> dict[str, Any]:
        """``reward`` and the judgements of a response in an output file: plain data."""
        ...


JudgementRow = Sequence[Judgement]


def kind_of(row: JudgementRow) -> type[Judgement]:
    """The class of a row's judgements. ``row`` is not empty."""
    return type(row[0])


def backward_passes(row: JudgementRow) -> list[int]:
    """Of one response's judgements, the first of each backward that ran."""
    first = {id(item.attribution): k for k, item in reversed(list(enumerate(row))) if item.attribution is not None}
    return sorted(first.values())


@dataclass
class ItemJudgement:
    """Verdict on one rubric item: see ``Judgement``. ``p_true``, ``p_false``: probability of each verdict's words."""

    p_true: float
    p_false: float
    verdict: bool
    attribution: Tensor | None = None
    grad_norm: float | None = None
    cos: float | None = None

    @property
    def answer_mass(self) -> float:
        """p(True) + p(False): what the judge gives to verdicts at all."""
        return self.p_true + self.p_false

    def values(self) -> list[Any]:
        return [self.p_true, self.p_false, self.verdict]

    @staticmethod
    def from_output(values: Tensor, verdicts: Sequence[bool]) -> list["ItemJudgement"]:
        """``values``: (log p(True), log p(False)) of each input."""
        probabilities = values.exp().tolist()
        return [
            ItemJudgement(true, false, verdict) for (true, false), verdict in zip(probabilities, verdicts, strict=True)
        ]

    @staticmethod
    def name(k: int) -> str:
        return f" item {k + 1}"

    @staticmethod
    def reward(query: Query, row: JudgementRow) -> float:
        """The rubric score: sum_k w_k 1[z_k = True] / sum_k max(w_k, 0)."""
        return response_reward([item.verdict for item in _items(row)], ItemJudgement.weights(query))

    @staticmethod
    def weights(query: Query) -> list[float]:
        return [item.weight for item in query.rubric]

    @staticmethod
    def checks(query: Query) -> list[str | None]:
        return [item.check for item in query.rubric]

    @staticmethod
    def take_verified(group: Sequence[JudgementRow], verified: Sequence[bool | None]) -> list[bool]:
        agreed = []
        for row, verdict in zip(group, verified, strict=True):
            item = _items(row)[0]
            agreed.append(verdict is None or item.verdict == verdict)
            if verdict is not None:
                item.verdict = verdict
        return agreed

    @staticmethod
    def needing_attribution(
        query: Query, rows: Sequence[JudgementRow], options: GrpoConfig, mix: float
    ) -> list[list[bool]]:
        marks: list[list[bool]] = items_needing_attribution(*_verdict_table(query, rows), options, mix).tolist()
        return marks

    @staticmethod
    def group_scores(
        query: Query,
        rows: Sequence[JudgementRow],
        alphas: list[list[Tensor | None]],
        lengths: list[int],
        finished: list[bool],
    ) -> GroupScores:
        return GroupScores(*_verdict_table(query, rows), alphas, lengths, finished)

    @staticmethod
    def token_rewards(query: Query, row: JudgementRow, alphas: Alphas, length: int, finished: bool = False) -> Tensor:
        verdicts = [item.verdict for item in _items(row)]
        return token_rewards(verdicts, ItemJudgement.weights(query), alphas, query.positive_weight, length)

    @staticmethod
    def metrics(
        queries: Sequence[Query], truths: Sequence[list[bool] | None], rows: Sequence[JudgementRow]
    ) -> dict[str, float]:
        verdicts = [[item.verdict for item in _items(row)] for row in rows]
        mass = fmean(item.answer_mass for row in rows for item in _items(row))
        metrics = judge_metrics(verdicts, truths, [ItemJudgement.weights(query) for query in queries])
        answered = [_items(row)[0] for query, row in zip(queries, rows, strict=True) if query.answer is not None]
        if answered:  # their verdict is the verifier's, their probabilities are the judge's
            same = fmean((item.p_true > item.p_false) == item.verdict for item in answered)
            metrics["judge/verifier_agreement"] = same
        return metrics | {"judge/answer_mass": mass}

    @staticmethod
    def sample_items(query: Query, text: str, row: JudgementRow, alphas: Alphas) -> list[dict[str, Any]]:
        truths: Sequence[bool | None] = true_verdicts(query, text) or [None] * len(query.rubric)
        return [
            {
                "criterion": item.criterion,
                "weight": item.weight,
                "verdict": found.verdict,
                "p_true": found.p_true,
                "truth": truth,
                "alpha": _plain(alpha),
            }
            for item, found, truth, alpha in zip(query.rubric, _items(row), truths, alphas, strict=True)
        ]

    @staticmethod
    def output_record(query: Query, row: JudgementRow, alphas: Alphas) -> dict[str, Any]:
        """``items``: one entry a rubric item."""
        return {
            "reward": ItemJudgement.reward(query, row),
            "items": [
                {
                    "criterion": item.criterion,
                    "weight": item.weight,
                    "p_true": plain_number(found.p_true),
                    "p_false": plain_number(found.p_false),
                    "verdict": found.verdict,
                }
                | _attribution_record(found, alpha)
                for item, found, alpha in zip(query.rubric, _items(row), alphas, strict=True)
            ],
        }


def _items(row: JudgementRow) -> Sequence[ItemJudgement]:
    """The row of a judge with verdicts, for the type checker."""
    return cast(Sequence[ItemJudgement], row)


def _verdict_table(query: Query, rows: Sequence[JudgementRow]) -> tuple[Tensor, Tensor]:
    """Verdicts [G, K] bool and weights [K] fp64 of one group."""
    verdicts = torch.tensor([[item.verdict for item in _items(row)] for row in rows])
    return verdicts, torch.tensor(ItemJudgement.weights(query), dtype=torch.float64)


@dataclass
class ScoreJudgement:
    """V(x, o) of a reward model, the one judgement of a response: see ``Judgement``. A score is its own measure.

    ``right``: a verifier's verdict, which is the reward then; the score has only its credit (paper, equations 14 and 15).
    """

    score: float
    attribution: Tensor | None = None
    grad_norm: float | None = None
    cos: float | None = None
    right: bool | None = None
    verdict: ClassVar[None] = None

    def values(self) -> list[Any]:
        return [self.score, self.right]

    @staticmethod
    def from_output(values: Tensor, verdicts: Sequence[bool]) -> list["ScoreJudgement"]:
        """``values``: the score of each input. The verdicts mean nothing."""
        return [ScoreJudgement(score) for (score,) in values.tolist()]

    @staticmethod
    def name(k: int) -> str:
        return ""

    @staticmethod
    def reward(query: Query, row: JudgementRow) -> float:
        return _reward(row)

    @staticmethod
    def weights(query: Query) -> list[float]:
        return [1.0]

    @staticmethod
    def checks(query: Query) -> list[str | None]:
        """None: the score is of the response as a whole, not of an item with a check."""
        return [None]

    @staticmethod
    def take_verified(group: Sequence[JudgementRow], verified: Sequence[bool | None]) -> list[bool]:
        judgements = [cast(ScoreJudgement, row[0]) for row in group]
        for judgement, verdict in zip(judgements, verified, strict=True):
            judgement.right = verdict
        agreed = zip(verified, scores_agree(judgements), strict=True)
        return [verdict is None or same for verdict, same in agreed]

    @staticmethod
    def needing_attribution(
        query: Query, rows: Sequence[JudgementRow], options: GrpoConfig, mix: float
    ) -> list[list[bool]]:
        marks: list[list[bool]] = rewards_needing_attribution(_rewards(rows), options, mix).tolist()
        return marks

    @staticmethod
    def group_scores(
        query: Query,
        rows: Sequence[JudgementRow],
        alphas: list[list[Tensor | None]],
        lengths: list[int],
        finished: list[bool],
    ) -> RewardModelScores:
        return RewardModelScores(_rewards(rows), alphas, lengths, finished)

    @staticmethod
    def token_rewards(query: Query, row: JudgementRow, alphas: Alphas, length: int, finished: bool = False) -> Tensor:
        return score_token_rewards(_reward(row), alphas[0], length, finished).float()

    @staticmethod
    def metrics(
        queries: Sequence[Query], truths: Sequence[list[bool] | None], rows: Sequence[JudgementRow]
    ) -> dict[str, float]:
        """A score is on a scale of its own: only the truth's mean is left, and how often it is right about answers."""
        pairs = zip(queries, truths, strict=True)
        known = [
            response_reward(truth, [i.weight for i in query.rubric]) for query, truth in pairs if truth is not None
        ]
        metrics = {"reward/true_mean": fmean(known)} if known else {}
        groups: dict[str, list[ScoreJudgement]] = {}
        for query, row in zip(queries, rows, strict=True):
            if (judgement := cast(ScoreJudgement, row[0])).right is not None:
                groups.setdefault(query.id, []).append(judgement)
        if same := [agrees for group in groups.values() for agrees in scores_agree(group)]:
            metrics["judge/verifier_agreement"] = fmean(same)
        return metrics

    @staticmethod
    def sample_items(query: Query, text: str, row: JudgementRow, alphas: Alphas) -> list[dict[str, Any]]:
        return [
            {
                "criterion": "score of the reward model",
                "weight": 1.0,
                "verdict": None,
                "p_true": None,
                "truth": None,
                "score": _score(row),
                "alpha": _plain(alphas[0]),
            }
        ]

    @staticmethod
    def output_record(query: Query, row: JudgementRow, alphas: Alphas) -> dict[str, Any]:
        return {"reward": plain_number(_reward(row))} | _attribution_record(row[0], alphas[0])


def scores_agree(group: Sequence[ScoreJudgement]) -> list[bool]:
    """Of the responses to one query: whether a right one scores above the group's mean, and a wrong one does not."""
    mean = fmean(judgement.score for judgement in group)
    return [(judgement.score > mean) == judgement.right for judgement in group]


def _score(row: JudgementRow) -> float:
    return cast(ScoreJudgement, row[0]).score


def _reward(row: JudgementRow) -> float:
    right = cast(ScoreJudgement, row[0]).right
    return _score(row) if right is None else float(right)


def _rewards(rows: Sequence[JudgementRow]) -> Tensor:
    return torch.tensor([_reward(row) for row in rows], dtype=torch.float64)


def _plain(alpha: Tensor | None) -> list[float] | None:
    return None if alpha is None else alpha.tolist()


def from_values(values: list[Any], **gradient: Any) -> Judgement:
    """The judgement whose ``values()`` are ``values``; ``gradient``: its attribution, grad_norm and cos."""
    if len(values) == 3:
        return ItemJudgement(*values, **gradient)
    score, right = values
    return ScoreJudgement(score, right=right, **gradient)


def _attribution_record(judgement: Judgement, alpha: Tensor | None) -> dict[str, Any]:
    """Both null where no backward ran."""
    if alpha is None or judgement.attribution is None:
        return {"attribution": None, "alpha": None}
    return {"attribution": plain_numbers(judgement.attribution), "alpha": plain_numbers(alpha)}


def plain_number(value: float) -> float | None:
    """With the 9 significant digits that identify an fp32 number; None where it is not finite, which JSON cannot say."""
    return float(f"{value:.9g}") if math.isfinite(value) else None


def plain_numbers(values: Tensor) -> list[float | None]:
    """``plain_number`` of every entry of ``values`` [T]."""
    return [plain_number(value) for value in values.tolist()]
