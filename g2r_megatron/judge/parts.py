"""One part of a batch at the judge: whole groups of responses in, their judgements out, on any ranks.

``SharedRanks`` is the judge on the policy's ranks, ``own_ranks.OwnRanks`` the one on ranks of its own. Both do the same work
on the same parts, so that their results have the same bits.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from g2r_megatron.config.options import GrpoConfig
from g2r_megatron.credit.faithfulness import Faithful, faithfulness_metrics
from g2r_megatron.credit.judgements import JudgementRow, backward_passes, from_values, kind_of
from g2r_megatron.data.types import Query, RubricItem
from g2r_megatron.judge.faithfulness import measure_faithfulness
from g2r_megatron.judge.stage import JudgeStage


@dataclass(frozen=True)
class Part:
    """Responses to judge: ``group_size`` of each query, one group after the other.

    ``bodies``: token ids without the stop token; ``keys`` seed sampled verdicts. ``mix``: weight of the attribution in this
    step (credit/advantages.py); None asks for verdicts only. ``verified``: of each response the verifier's verdict, None for
    a query without an answer; it takes the place of the judge's, whose credit counts where both agree. ``measured``: of
    so many responses the faithfulness of their credit is measured (judge/faithfulness.py).
    """

    queries: list[Query]
    group_size: int
    bodies: list[list[int]]
    keys: list[str]
    mix: float | None
    verified: list[bool | None] | None = None
    measured: int = 0

    def plain(self) -> dict:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: dict) -> "Part":
        """The inverse of ``plain``."""
        return cls(**plain | {"queries": [_query(query) for query in plain["queries"]]})


def _query(plain: dict) -> Query:
    rubric = tuple(RubricItem(**item | {"tags": tuple(item["tags"])}) for item in plain["rubric"])
    lists = {"messages": tuple(plain["messages"]), "tags": tuple(plain["tags"]), "rubric": rubric}
    return Query(**plain | lists)


@dataclass
class Judged:
    """The judge's result for one part: the judgements of each response, how long each pass took, and what was measured."""

    judgements: Sequence[JudgementRow]
    verdict_seconds: float
    attribution_seconds: float
    faithful: Sequence[Faithful] = ()
    faithful_seconds: float = 0.0

    def plain(self) -> tuple[dict, torch.Tensor]:
        """As JSON and fp32 numbers [n], the attributions of all backward passes one after the other. No bit is lost."""
        passes, attributions, rows = [], [], []
        for row in self.judgements:
            number = {}  # of the backward pass, by its tensor: pooled items share one
            for k in backward_passes(row):
                number[id(row[k].attribution)] = len(passes)
                passes.append([row[k].attribution.numel(), row[k].grad_norm, row[k].cos])
                attributions.append(row[k].attribution)
            rows.append([[*j.values(), number.get(id(j.attribution))] for j in row])
        seconds = [self.verdict_seconds, self.attribution_seconds, self.faithful_seconds]
        numbers = torch.cat(attributions) if attributions else torch.empty(0)
        faithful = [[pair.credit, pair.shuffled] for pair in self.faithful]
        return {"judgements": rows, "passes": passes, "seconds": seconds, "faithful": faithful}, numbers

    @classmethod
    def from_plain(cls, plain: dict, numbers: torch.Tensor) -> "Judged":
        """The inverse of ``plain``."""
        attributions = numbers.split([length for length, _, _ in plain["passes"]])
        found = [
            {"attribution": attribution, "grad_norm": grad_norm, "cos": cos}
            for attribution, (_, grad_norm, cos) in zip(attributions, plain["passes"], strict=True)
        ]
        rows: list[JudgementRow] = [
            [from_values(values, **{} if number is None else found[number]) for *values, number in row]
            for row in plain["judgements"]
        ]
        faithful = [Faithful(*pair) for pair in plain["faithful"]]
        verdict, attribution, measured = plain["seconds"]
        return cls(rows, verdict, attribution, faithful, measured)


def judge_part(stage: JudgeStage, part: Part, grpo: GrpoConfig) -> Judged:
    """Verdicts of all items (or scores), and backward passes for those that can change an advantage (collective)."""
    start = time.perf_counter()
    queries = [query for query in part.queries for _ in range(part.group_size)]
    inputs = stage.inputs(queries, part.bodies)
    attributed = bool(part.mix) and grpo.advantage != "sequence"
    judgements = stage.verdicts(inputs, part.keys, attributed)
    verified, agreed = part.verified or [None] * len(judgements), list[bool]()
    for first in range(0, len(judgements), part.group_size):
        its_own = slice(first, first + part.group_size)
        agreed += kind_of(judgements[first]).take_verified(judgements[its_own], verified[its_own])
    judged = attributed_at = time.perf_counter()
    faithful: list[Faithful] = []
    if part.mix is not None:
        needed: list[list[bool]] = []
        for number, query in enumerate(part.queries):
            group = judgements[number * part.group_size : (number + 1) * part.group_size]
            needed += kind_of(group[0]).needing_attribution(query, group, grpo, part.mix)
        needed = [[mark and same for mark in marks] for marks, same in zip(needed, agreed, strict=True)]
        weights = [kind_of(row).weights(query) for query, row in zip(queries, judgements, strict=True)]
        stage.attribute(inputs, judgements, needed, weights)
        attributed_at = time.perf_counter()
        if part.measured:
            faithful = measure_faithfulness(stage, inputs, judgements, weights, part.keys, part.measured)
    measured = time.perf_counter() - attributed_at
    return Judged(judgements, judged - start, attributed_at - judged, faithful, measured)


def metrics_of(judged: Sequence[Judged]) -> dict[str, float]:
    """What the parts of a batch report beside their judgements."""
    metrics = {"time/attribution": sum(part.attribution_seconds for part in judged)}
    pairs = [pair for part in judged for pair in part.faithful]
    if pairs:
        metrics["time/faithfulness"] = sum(part.faithful_seconds for part in judged)
    return metrics | faithfulness_metrics(pairs)


class SharedRanks:
    """The judge on the policy's own ranks: it works when the policy asks for its judgements."""

    def __init__(self, stage: JudgeStage, grpo: GrpoConfig):
        self.stage, self.grpo = stage, grpo
        self._parts: list[Part] = []

    def submit(self, part: Part) -> None:
        """Put ``part`` in the queue."""
        self._parts.append(part)

    def judge_submitted(self) -> tuple[list[JudgementRow], dict[str, float]]:
        """Judge all parts submitted: their judgements, in order, and ``metrics_of`` them (collective)."""
        parts, self._parts = self._parts, []
        judged = [judge_part(self.stage, part, self.grpo) for part in parts]
        return [row for part in judged for row in part.judgements], metrics_of(judged)
