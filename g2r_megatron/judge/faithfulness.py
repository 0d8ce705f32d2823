"""Faithfulness of credit in training: sentences of a few responses are hidden from the judge (judge/hiding.py), and what its

target loses is compared with the credit that they got (credit/faithfulness.py). Without gradients.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from g2r_megatron.credit.attribution import pooled_weights
from g2r_megatron.credit.faithfulness import FEWEST_SENTENCES, Faithful
from g2r_megatron.credit.judgements import JudgementRow, backward_passes
from g2r_megatron.judge.hiding import read_hidden
from g2r_megatron.judge.stage import JudgeStage
from g2r_megatron.judge.types import JudgeInput

MOST_SENTENCES = 16  # hidden of one response, so that a long one costs no more
NOT_MEASURED = ("occlusion", "uniform")  # the first is the truth itself, the second gives no credit


@dataclass(frozen=True)
class _Pair:
    """The items that one attribution b [T] is of, with their factors (one item: 1), and the sentences to hide."""

    key: str
    items: list[JudgeInput]
    verdicts: list[bool | None]
    factors: list[float]
    b: torch.Tensor
    spans: list[tuple[int, int]]


def measure_faithfulness(
    stage: JudgeStage,
    inputs: Sequence[Sequence[JudgeInput]],
    judgements: Sequence[JudgementRow],
    weights: Sequence[Sequence[float]],
    keys: Sequence[str],
    count: int,
) -> list[Faithful]:
    """Of up to ``count`` different responses, one attribution each (collective). Arguments as of ``JudgeStage.attribute``.

    ``keys``: a string a response; they alone decide which are measured. Left out are responses without attribution, with fewer
    than 3 sentences in the judge's tokens, or with nothing behind them in what the judge reads.
    """
    if stage.config.attribution in NOT_MEASURED:
        return []
    places = [i for i, row in enumerate(judgements) if backward_passes(row)]
    random.Random(f"faithfulness/{'/'.join(keys)}").shuffle(places)
    pairs: list[_Pair] = []
    for i in places:
        if len(pairs) == count:
            break
        pair = _pair(stage, inputs[i], judgements[i], weights[i], keys[i])
        pairs += [pair] if pair else []
    items = [item for pair in pairs for item in pair.items]
    spans = [pair.spans for pair in pairs for _ in pair.items]
    values = iter(read_hidden(stage.judge, items, spans))
    return [_compared(stage, pair, values) for pair in pairs]


def _pair(
    stage: JudgeStage, inputs: Sequence[JudgeInput], row: JudgementRow, weights: Sequence[float], key: str
) -> _Pair | None:
    """One of the response's attributions, chosen by ``key``; None where it cannot be measured."""
    choice = random.Random(f"pair/{key}")
    b = row[choice.choice(backward_passes(row))].attribution
    assert b is not None  # a backward ran
    same = [k for k, judgement in enumerate(row) if judgement.attribution is b]
    spans = stage.sentences(inputs[same[0]])
    if len(spans) < FEWEST_SENTENCES or any(inputs[k].verdict_position < inputs[k].response_end for k in same):
        return None
    if len(spans) > MOST_SENTENCES:
        spans = sorted(choice.sample(spans, MOST_SENTENCES))
    factors = pooled_weights([weights[k] for k in same]) if len(same) > 1 else [1.0]
    return _Pair(key, [inputs[k] for k in same], [row[k].verdict for k in same], factors, b, spans)


def _compared(stage: JudgeStage, pair: _Pair, values: Iterator[torch.Tensor]) -> Faithful:
    """``values``: of each item, as ``read_hidden`` gives them."""
    lost = torch.zeros(len(pair.spans), dtype=torch.float64)
    for factor, verdict in zip(pair.factors, pair.verdicts, strict=True):
        read = next(values).double()
        target = stage.judge.target.of(read, [verdict] * len(read))
        lost += factor * (target[0] - target[1:])
    credit = [float(pair.b[low:high].double().sum()) for low, high in pair.spans]
    return Faithful.of(credit, lost.tolist(), pair.key)
