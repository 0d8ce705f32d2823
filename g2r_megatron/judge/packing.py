"""Judge inputs as trees: the common beginning of one response's items is run once, and trees share rows.

All K judge inputs of a response hold the same conversation and response; where the template puts the criterion after
them, a *tree* is that prefix once and K branches of the criterion and what follows it. Trees are packed one after the
other into rows of ``judge.micro_batch_tokens`` real tokens; attention (model/tree_attention.py) and rotary positions
keep trees and branches apart, so verdicts and gradients are those of K separate sequences.

Memory of a micro-batch. A row has S <= max(``judge.micro_batch_tokens``, longest tree) tokens, a tree of P prefix and
B branch tokens P + B of them, at most ``judge.max_length``: a response with more is split into several trees, or refused
with the numbers where it must be one (``judge.credit=per_response``). judge/activation_memory.py has the formula, and refuses a row
that does not fit into what is free before it runs. With hidden size h, q query and k key-value numbers a token (q = h and
k = h / 2 or less in most models), feed-forward size f, L layers on the stage, V vocabulary rows, n verdicts and a bytes a
number, on one rank, above the weights:

    verdict pass       ~ a S (4 h + 2 (q + k) + 2 f)            one layer at work, nothing kept
    attribution        ~ that + a S (4 h + L (2 h + 3 (q + k) + 2 f))    kept until the row's backward
      recompute full   ~ that + a S (6 h + L h + 3 (q + k) + 2 f)
    both               + 12 n V                                 logits and their softmax, fp32
                       + 4 S^2 on GPU, a S^2 on CPU where a window is narrower than the row, or under CP: masks

TP divides all but the h, sequence parallelism these as well; with c context parallel ranks a rank has S / c positions, and
the keys and values of all S in each layer; pipeline stages keep as many rows as there are stages. The recorded routing of
a mixture of experts comes on top, in host memory (judge/routing.py). The largest real HealthBench rubric, 33 items of 110
tokens, on a response of 4096 tokens after a conversation of 400 is a row of S = 8126 tokens; in a Qwen2.5-7B judge (h 3584,
f 18944, L 28, bf16) that is 26 GiB without recompute and 3.8 GiB with it on one GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from g2r_megatron.judge.types import JudgeInput


@dataclass(frozen=True)
class Tree:
    """Sequences with a common prefix, as one: ``ids`` are the prefix and then the branches.

    A sequence on its own is a prefix without branches. ``items``: the caller's number of each sequence;
    ``verdicts``: where, in ``ids``, the logits of its verdict are. The response is
    ``ids[response_start:response_end]``, within the prefix.
    """

    ids: list[int]
    prefix: int
    branches: list[int]  # lengths
    items: list[int]
    verdicts: list[int]
    response_start: int
    response_end: int

    @property
    def shape(self) -> tuple[int, list[int]]:
        """What ``row_structure`` needs (model/tree_attention.py)."""
        return self.prefix, self.branches


def shared_length(inputs: Sequence[JudgeInput]) -> int:
    """Tokens that all ``inputs`` begin with, short of every verdict position; 0 if the response is not among them."""
    spans = {(item.response_start, item.response_end) for item in inputs}
    # what the smallest and the largest list have in common, all lists have in common
    first, last = min(item.input_ids for item in inputs), max(item.input_ids for item in inputs)
    common = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    length = min(common, *(item.verdict_position for item in inputs))
    return length if len(spans) == 1 and length >= inputs[0].response_end else 0


def tree_tokens(inputs: Sequence[JudgeInput]) -> int:
    """Tokens of one response's ``inputs`` as one tree; if they share too little, tokens of the longest input."""
    lengths, shared = [len(item.input_ids) for item in inputs], shared_length(inputs)
    return shared + sum(length - shared for length in lengths) if shared else max(lengths)


def build_trees(inputs: Sequence[JudgeInput], longest: int, first_item: int = 0) -> list[Tree]:
    """The inputs of one response as one tree; as several trees if one would have more than ``longest`` tokens.

    Inputs that share too little get one tree each; so does a single input. ``first_item``: the caller's number of
    ``inputs[0]``; the others follow.
    """
    shared = shared_length(inputs) if len(inputs) > 1 else 0
    if not shared:
        return [_alone(item, first_item + k) for k, item in enumerate(inputs)]
    parts: list[list[int]] = []
    tokens = 0
    for k, item in enumerate(inputs):
        branch = len(item.input_ids) - shared
        if not parts or tokens + branch > longest:
            parts.append([])
            tokens = shared
        parts[-1].append(k)
        tokens += branch
    return [_tree([inputs[k] for k in part], shared, [first_item + k for k in part]) for part in parts]


def _tree(inputs: Sequence[JudgeInput], shared: int, numbers: list[int]) -> Tree:
    ids, branches, verdicts = list(inputs[0].input_ids[:shared]), [], []
    for item in inputs:
        verdicts.append(len(ids) + item.verdict_position - shared)
        branches.append(len(item.input_ids) - shared)
        ids += item.input_ids[shared:]
    return Tree(ids, shared, branches, numbers, verdicts, inputs[0].response_start, inputs[0].response_end)


def _alone(item: JudgeInput, number: int) -> Tree:
    ids = list(item.input_ids)
    return Tree(ids, len(ids), [], [number], [item.verdict_position], item.response_start, item.response_end)
