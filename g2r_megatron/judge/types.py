"""What the judge returns for one (response, criterion) pair."""

from dataclasses import dataclass

import torch


@dataclass
class ItemJudgement:
    """Verdict of one rubric item on one response, and what its gradient says of the response tokens.

    ``attribution`` is b_t [T], fp32 on the CPU, over the response body; ``None`` where no backward ran.
    ``cos`` is the median over tokens of |cos(g_t, e_t)|, ``grad_norm`` the L2 norm of g over the response.
    """

    p_true: float
    p_false: float
    verdict: bool
    attribution: torch.Tensor | None = None  # over the tokens of the judge's own tokenizer
    grad_norm: float | None = None
    cos: float | None = None
