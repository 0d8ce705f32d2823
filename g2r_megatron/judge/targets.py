"""What is read from a judge's output, and what is differentiated: a verdict's log-probabilities, or a score.

``read`` turns the last stage's output for n sequences into fp32 numbers [n, columns]; ``of`` picks the target of each
sequence from them: [n].
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from g2r_megatron.errors import UserError
from g2r_megatron.model.build import MegatronModel
from g2r_megatron.parallel.vocab import log_probs_at


def require_finite(table: torch.Tensor, noun: str) -> None:
    """Raise ``UserError`` if a row of ``table`` [inputs, columns] is not finite."""
    if not torch.isfinite(table).all():
        bad = int((~torch.isfinite(table).all(1)).nonzero()[0])
        raise UserError(
            "judge.model",
            f"the {noun} of input {bad} are not finite: {table[bad].tolist()}",
            "check the judge's weights and judge.precision",
        )


class VerdictTarget:
    """(log p(True), log p(False)) of a language model, each summed over the spellings of the verdict.

    ``kind`` "log_prob": the target is that of the verdict given; "logit_margin": logit(True) - logit(False) =
    log p(True) - log p(False), which does not saturate (docs/method.md steps 2 and 3).
    """

    columns, noun = 2, "verdict log-probs"

    def __init__(self, model: MegatronModel, kind: str, true_ids: Sequence[int], false_ids: Sequence[int]):
        self.model, self.kind, self.true_ids, self.false_ids = model, kind, true_ids, false_ids

    def exact(self) -> AbstractContextManager[None]:
        """Logits of the verdicts in fp32, from the last hidden state."""
        return self.model.chunks[-1].logits_in_fp32(self.true_ids + self.false_ids)

    def read(self, output: torch.Tensor) -> torch.Tensor:
        """``output``: logits [n, v/tp] at the verdict positions."""
        ids = torch.tensor(self.true_ids + self.false_ids, device=output.device).expand(output.size(0), -1)
        log_probs = log_probs_at(output, ids, self.model.geometry.vocab, self.model.groups.pgs.tp)
        split = len(self.true_ids)
        return torch.stack([log_probs[:, :split].logsumexp(1), log_probs[:, split:].logsumexp(1)], dim=1)

    def of(self, values: torch.Tensor, verdicts: Sequence[bool | None] | torch.Tensor) -> torch.Tensor:
        if self.kind == "logit_margin":
            return values[:, 0] - values[:, 1]
        chosen = 1 - torch.as_tensor(verdicts, device=values.device).long()
        return values.gather(1, chosen.unsqueeze(1)).squeeze(1)

    def decide(self, values: torch.Tensor, draws: torch.Tensor | None) -> torch.Tensor:
        """The verdicts, bool [n], on ``values``' device: the likelier ones, or by ``draws`` fp64 [n] in [0, 1)."""
        true, false = values.exp().double().unbind(1)
        return true > false if draws is None else draws * (true + false) < true


class ScoreTarget:
    """V of a reward model: it is both the output and the target (docs/method.md step 8)."""

    columns, noun = 1, "scores"

    def exact(self) -> AbstractContextManager[None]:
        """A score is fp32 as it is (model/reward_model.py)."""
        return nullcontext()

    def read(self, output: torch.Tensor) -> torch.Tensor:
        """``output``: fp32 [n, 1]."""
        return output

    def of(self, values: torch.Tensor, verdicts: Sequence[bool | None] | torch.Tensor) -> torch.Tensor:
        return values[:, 0]

    def decide(self, values: torch.Tensor, draws: torch.Tensor | None) -> torch.Tensor:
        """A score has no verdict: bool [n], all False."""
        return torch.zeros(values.size(0), dtype=torch.bool, device=values.device)


Target = VerdictTarget | ScoreTarget  # passes to be read run in its ``exact()``
