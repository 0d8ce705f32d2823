"""How much a verdict loses when a part of the response is taken away, and what the judge attends to. Without gradients.

*Hidden*: no token after the part may attend to it, in any layer. The part itself and the positions of all tokens do not
change. The tokens after the part are run once, over kept keys of the tokens before them (judge/suffixes.py).
Attributions are measured against this (probe/), and ``judge.attribution=occlusion`` uses it. *Deleted*: the part's
tokens are left out. Source: occlusion of Zeiler and Fergus (2014), arXiv 1311.2901; leave-one-out of Li, Monroe and
Jurafsky (2016), arXiv 1612.08220.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.distributed as dist

from g2r_megatron.device import local_device
from g2r_megatron.judge.frozen import FrozenJudge
from g2r_megatron.judge.suffixes import Suffix, SuffixUnit
from g2r_megatron.judge.types import JudgeInput, Pass

Spans = Sequence[tuple[int, int]]  # [start, end) of parts of a response, counted in its tokens


def unit_spans(units: torch.Tensor) -> list[tuple[int, int]]:
    """Where each unit begins and ends. ``units``: [T] int64, the number of each token's unit, which never falls."""
    _, sizes = units.unique_consecutive(return_counts=True)
    ends = sizes.cumsum(0).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True)) if ends else []


def read_hidden(judge: FrozenJudge, inputs: Sequence[JudgeInput], spans: Sequence[Spans]) -> list[torch.Tensor]:
    """What the judge's target reads: fp32 [1 + parts, columns] an input, first of the whole response, then without each part.

    Collective. ``spans``: those of each input, in order and not empty. Each input has tokens after the response.
    Neighbouring inputs with the same response and spans share their prefix.
    """
    units, counts, number = [], [1 + len(parts) for parts in spans], 0

    def shared(k: int):
        item = inputs[k]
        return item.response_start, item.input_ids[: item.response_end], list(spans[k])

    for (start, _, parts), same in groupby(range(len(inputs)), shared):
        seen = [start + begin for begin, _ in parts]
        prefix, groups = seen[-1] if seen else start, []
        for k in same:
            cuts = [(prefix, prefix), *((start + end, start + begin) for begin, end in parts)]
            groups += [[Suffix(number + n, k, first, visible)] for n, (first, visible) in enumerate(cuts)]
            number += len(cuts)
        units.append(SuffixUnit(prefix, groups))
    return list(judge.read_suffixes(units, inputs).split(counts)) if units else []


def read_deleted(judge: FrozenJudge, inputs: Sequence[JudgeInput], spans: Sequence[Spans]) -> list[torch.Tensor]:
    """As ``read_hidden``, with the tokens of each part left out of the response."""
    rows = [
        [item, *(_without(item, begin, end) for begin, end in parts)] for item, parts in zip(inputs, spans, strict=True)
    ]
    return list(judge.read(rows).split([len(row) for row in rows])) if rows else []


def _without(item: JudgeInput, begin: int, end: int) -> JudgeInput:
    """``item`` without the response's tokens ``begin`` to ``end``."""
    low, high, cut = item.response_start + begin, item.response_start + end, end - begin
    ids = item.input_ids[:low] + item.input_ids[high:]
    return JudgeInput(ids, item.response_start, item.response_end - cut, item.verdict_position - cut)


def occlusion(judge: FrozenJudge, passes: Sequence[Pass], spans: Sequence[Spans]) -> list[torch.Tensor]:
    """b [T] of each pass's one input: what the target loses without a part, divided over its tokens (collective)."""
    inputs = [one.inputs[0] for one in passes]
    found = []
    for one, parts, values in zip(passes, spans, read_hidden(judge, inputs, spans), strict=True):
        target = judge.target.of(values, [one.verdicts[0]] * len(values))
        sizes = torch.tensor([end - begin for begin, end in parts])
        found.append(((target[0] - target[1:]) / sizes).repeat_interleave(sizes))
    return found


def attention_mass(judge: FrozenJudge, passes: Sequence[Pass]) -> list[torch.Tensor]:
    """b [T] of each pass: the verdict position's attention to each token, mean of layers and heads (collective).

    A pass of several inputs gets their sum by its weights. Inputs that share a response share its prefix.
    """
    inputs = [item for one in passes for item in one.inputs]
    lengths = [item.response_end - item.response_start for item in inputs]
    table = torch.zeros(sum(lengths), device=local_device())
    begins, units = [0, *torch.tensor(lengths).cumsum(0).tolist()], []

    def shared(k: int):
        return inputs[k].response_start, inputs[k].input_ids[: inputs[k].response_end]

    for (start, ids), same in groupby(range(len(inputs)), shared):
        group, end = list(same), len(ids)
        groups = [[Suffix(k, k, end, end, share=1.0, slot=slot)] for slot, k in enumerate(group)]
        rows = table[begins[group[0]] : begins[group[-1] + 1]].view(len(group), -1)
        units.append(SuffixUnit(end, groups, response=(start, end), table=rows, of_attention=True))
    if units:
        judge.read_suffixes(units, inputs)
    dist.all_reduce(table)  # each rank had its own heads, layers and queries
    geometry = judge.model.geometry
    masses = iter((table / (geometry.layers * geometry.heads)).cpu().split(lengths))
    return [sum((c * next(masses) for c in one.weights), torch.zeros(())) for one in passes]
