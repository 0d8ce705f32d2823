"""The health of a judge over the rows of a file, as the numbers that training logs (credit/hazards.py)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from torch import Tensor

from g2r_megatron.credit.hazards import answer_mass_warning, attribution_metrics
from g2r_megatron.credit.judgements import ItemJudgement, JudgementRow, backward_passes, kind_of

SHOWN_ROWS = 20


@dataclass
class JudgeHealth:
    """Verdicts, their probabilities and attributions, counted row by row.

    ``bad``: backward passes whose gradient was zero or not finite (such an item's alpha is uniform).
    """

    flat_threshold: float
    passes: int = 0
    bad: list[str] = field(default_factory=list)
    verdicts: list[bool] = field(default_factory=list)
    answer_masses: list[float] = field(default_factory=list)
    shapes: list[dict[str, float]] = field(default_factory=list)  # of each alpha of two tokens or more

    def count(self, id: str, row: JudgementRow, alphas: Sequence[Tensor | None]) -> None:
        """Add the judgements of one response and the ``alphas`` [T] made of them."""
        items = [item for item in row if isinstance(item, ItemJudgement)]
        self.verdicts += [item.verdict for item in items]
        self.answer_masses += [item.answer_mass for item in items]
        for number in backward_passes(row):
            judgement = row[number]
            self.passes += 1
            finite = math.isfinite(judgement.grad_norm) and bool(judgement.attribution.isfinite().all())
            if not finite or judgement.grad_norm == 0:
                self.bad.append(f"{id}{kind_of(row).name(number)} ({'zero' if finite else 'not finite'})")
            shape = attribution_metrics([judgement.attribution], [alphas[number]], [], self.flat_threshold)
            if "attribution/ess_share" in shape:
                self.shapes.append(shape)

    def summary(self) -> str | None:
        """One line; None if nothing was judged."""
        parts = []
        if self.verdicts:
            parts.append(f"{fmean(self.verdicts):.1%} of {len(self.verdicts)} items True")
            parts.append(f"answer mass {fmean(self.answer_masses):.3f}")
        if self.shapes:
            ess, flat, one = (
                fmean(shape[f"attribution/{name}"] for shape in self.shapes)
                for name in ("ess_share", "flat_share", "one_token_share")
            )
            parts.append(f"ESS/T {ess:.2f}, {flat:.1%} flat, {one:.1%} on one token")
        return "; ".join(parts) or None

    def warnings(self) -> list[str]:
        """What is wrong, one line each."""
        found = []
        if self.answer_masses and (warning := answer_mass_warning(fmean(self.answer_masses))):
            found.append(warning)
        if self.bad:
            more = f" and {len(self.bad) - SHOWN_ROWS} more" if len(self.bad) > SHOWN_ROWS else ""
            found.append(
                f"the judge's gradient was zero or not finite in {len(self.bad)} of {self.passes} backward passes, whose "
                f"tokens share the credit evenly: {', '.join(self.bad[:SHOWN_ROWS])}{more}"
            )
        return found
