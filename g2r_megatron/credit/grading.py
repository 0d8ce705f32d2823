"""What judgements are worth: rubric verdicts make a score by their weights, a reward model's score is one.

One function each, with the two kinds side by side; the rest of the program does not ask which kind of judge there is.
Judgements come as rows, one a response: its rubric items, or its single ``ScoreJudgement``.
"""

from collections.abc import Sequence
from statistics import fmean

import torch

from g2r_megatron.config.options import GrpoConfig
from g2r_megatron.credit.advantages import (
    GroupScores,
    RewardModelScores,
    items_needing_attribution,
    rewards_needing_attribution,
)
from g2r_megatron.credit.attribution import response_reward, score_token_rewards, token_rewards
from g2r_megatron.credit.hazards import judge_metrics
from g2r_megatron.credit.truth import true_reward, true_verdicts
from g2r_megatron.data.types import Query
from g2r_megatron.judge.types import Judgement, ScoreJudgement

Row = Sequence[Judgement]
Alphas = Sequence[torch.Tensor | None]


def is_score(row: Row) -> bool:
    """Whether a reward model judged the response."""
    return bool(row) and isinstance(row[0], ScoreJudgement)


def reward(query: Query, row: Row) -> float:
    """r(x, o): the rubric score, or V."""
    if is_score(row):
        return row[0].score
    return response_reward([item.verdict for item in row], weights(query, row))


def weights(query: Query, row: Row) -> list[float]:
    """w_k of each judgement of the row; a score is its own measure."""
    return [1.0] if is_score(row) else [item.weight for item in query.rubric]


def needing_attribution(query: Query, rows: Sequence[Row], options: GrpoConfig, mix: float) -> list[list[bool]]:
    """Which judgements of a group can change an advantage by their attribution."""
    if is_score(rows[0]):
        return rewards_needing_attribution(_scores(rows), options, mix).tolist()
    return items_needing_attribution(*_verdict_table(query, rows), options, mix).tolist()


def group_scores(
    query: Query, rows: Sequence[Row], alphas: list[list[torch.Tensor | None]], lengths: list[int], finished: list[bool]
) -> GroupScores | RewardModelScores:
    """One group as the estimators of advantages take it."""
    if is_score(rows[0]):
        return RewardModelScores(_scores(rows), alphas, lengths, finished)
    return GroupScores(*_verdict_table(query, rows), alphas, lengths, finished)


def _scores(rows: Sequence[Row]) -> torch.Tensor:
    return torch.tensor([row[0].score for row in rows], dtype=torch.float64)


def _verdict_table(query: Query, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Verdicts [G, K] bool and weights [K] of one group."""
    verdicts = torch.tensor([[item.verdict for item in row] for row in rows])
    return verdicts, torch.tensor(weights(query, rows[0]), dtype=torch.float64)


def row_token_rewards(query: Query, row: Row, alphas: Alphas, length: int, finished: bool = False) -> torch.Tensor:
    """r_t over the T tokens of the body and, of a score, the stop token of a ``finished`` response (METHOD.md step 8)."""
    if is_score(row):
        return score_token_rewards(row[0].score, alphas[0], length, finished).float()
    verdicts = [item.verdict for item in row]
    return token_rewards(verdicts, weights(query, row), alphas, query.positive_weight, length)


def metrics(queries: Sequence[Query], texts: Sequence[str], rows: Sequence[Row]) -> dict[str, float]:
    """The judge against the truth, where that is known. A score is on a scale of its own: only the truth's mean is left."""
    if is_score(rows[0]):
        truths = [true_reward(q, text) for q, text in zip(queries, texts, strict=True)]
        known = [truth for truth in truths if truth is not None]
        return {"reward/true_mean": fmean(known)} if known else {}
    verdicts = [[item.verdict for item in row] for row in rows]
    truths = [true_verdicts(q, text) for q, text in zip(queries, texts, strict=True)]
    return judge_metrics(verdicts, truths, [weights(q, row) for q, row in zip(queries, rows, strict=True)])


def sample_items(query: Query, text: str, row: Row, alphas: Alphas) -> list[dict]:
    """The judgements of a response as the report draws them; a score is one item without a verdict."""
    if is_score(row):
        strip = {
            "criterion": "score of the reward model",
            "weight": 1.0,
            "verdict": None,
            "p_true": None,
            "truth": None,
        }
        return [strip | {"score": row[0].score, "alpha": _plain(alphas[0])}]
    truths = true_verdicts(query, text) or [None] * len(query.rubric)
    return [
        {
            "criterion": item.criterion,
            "weight": item.weight,
            "verdict": found.verdict,
            "p_true": found.p_true,
            "truth": truth,
            "alpha": _plain(alpha),
        }
        for item, found, truth, alpha in zip(query.rubric, row, truths, alphas, strict=True)
    ]


def _plain(alpha: torch.Tensor | None) -> list[float] | None:
    return None if alpha is None else alpha.tolist()
