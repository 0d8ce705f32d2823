"""What the judge reads and returns for one (response, criterion) pair, or a reward model for one response."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class JudgeInput:
    """One judge sequence. The response is ``input_ids[response_start:response_end]``; the logits at
    ``verdict_position`` (the last position) predict the verdict token. A reward model's score is read there."""

    input_ids: list[int]
    response_start: int
    response_end: int
    verdict_position: int


@dataclass
class ItemJudgement:
    """Verdict of one rubric item on one response, and what its gradient says of the response tokens.

    ``attribution`` is b_t [T], fp32 on the CPU, over the response body; ``None`` where no backward ran. Items that were
    pooled into one backward (``judge.credit=per_response``) have the same tensor.
    ``cos`` is the median over tokens of |cos(g_t, e_t)|, ``grad_norm`` the L2 norm of g over the response.
    """

    p_true: float
    p_false: float
    verdict: bool
    attribution: torch.Tensor | None = None  # over the tokens of the judge's own tokenizer
    grad_norm: float | None = None
    cos: float | None = None


@dataclass
class ScoreJudgement:
    """V(x, o) of a reward model, the one judgement of a response, and what its gradient says; see ``ItemJudgement``."""

    score: float
    attribution: torch.Tensor | None = None
    grad_norm: float | None = None
    cos: float | None = None
    verdict: ClassVar[None] = None


Judgement = ItemJudgement | ScoreJudgement


def backward_passes(judgements: Sequence[Judgement]) -> list[int]:
    """Of one response's items, the first of each backward that ran."""
    first = {
        id(item.attribution): k for k, item in reversed(list(enumerate(judgements))) if item.attribution is not None
    }
    return sorted(first.values())
