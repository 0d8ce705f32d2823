"""What is read off a judge's output, and what of it is differentiated: a verdict's log-probabilities, or a score.

``read`` turns the last stage's output for n sequences into fp32 numbers [n, columns]; ``of`` picks the target of each
sequence from them: [n].
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from g2r_megatron.model.build import MegatronModel
from g2r_megatron.parallel.vocab import log_probs_at


class Target(Protocol):
    """``columns``: numbers read of a sequence; ``noun`` names them in errors."""

    columns: int
    noun: str

    def read(self, output: torch.Tensor) -> torch.Tensor: ...

    def of(self, values: torch.Tensor, verdicts: Sequence[bool | None]) -> torch.Tensor: ...


class VerdictTarget:
    """(log p(True), log p(False)) of a language model, each summed over the spellings of the verdict.

    ``kind`` "log_prob": the target is that of the verdict given; "logit_margin": logit(True) - logit(False) =
    log p(True) - log p(False), which does not saturate (docs/method.md steps 2 and 3).
    """

    columns, noun = 2, "verdict log-probs"

    def __init__(self, model: MegatronModel, kind: str, true_ids: list[int], false_ids: list[int]):
        self.model, self.kind, self.true_ids, self.false_ids = model, kind, true_ids, false_ids

    def read(self, output: torch.Tensor) -> torch.Tensor:
        """``output``: logits [n, v/tp] at the verdict positions."""
        ids = torch.tensor(self.true_ids + self.false_ids, device=output.device).expand(output.size(0), -1)
        log_probs = log_probs_at(output, ids, self.model.geometry.vocab, self.model.groups.pgs.tp)
        split = len(self.true_ids)
        return torch.stack([log_probs[:, :split].logsumexp(1), log_probs[:, split:].logsumexp(1)], dim=1)

    def of(self, values: torch.Tensor, verdicts: Sequence[bool | None]) -> torch.Tensor:
        if self.kind == "logit_margin":
            return values[:, 0] - values[:, 1]
        chosen = torch.tensor([0 if verdict else 1 for verdict in verdicts], device=values.device)
        return values.gather(1, chosen.unsqueeze(1)).squeeze(1)


class ScoreTarget:
    """V of a reward model, which is its output, and its own target (docs/method.md step 8)."""

    columns, noun = 1, "scores"

    def read(self, output: torch.Tensor) -> torch.Tensor:
        """``output``: fp32 [n, 1]."""
        return output

    def of(self, values: torch.Tensor, verdicts: Sequence[bool | None]) -> torch.Tensor:
        return values[:, 0]
