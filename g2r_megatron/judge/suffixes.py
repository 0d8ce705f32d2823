"""Inputs run as suffixes over prefixes whose keys and values are kept: how rows are planned, and how a row is run.

A ``SuffixUnit`` is one prefix, run once without gradient, and the suffixes of inputs that begin with it. A suffix may see less
than the whole prefix and begin anywhere: its tokens have the positions that they have in their input. A micro-batch is a row
of prefixes and a row of their suffixes (model/suffix_rows.py). One call of the pipeline's forward runs both rows
through a stage, one after the other, and passes on both results as one tensor. Each row is padded and divided over
ranks separately.

Each of the two rows has at most ``judge.micro_batch_tokens`` tokens: they run one after the other. A unit with more tokens behind
its prefix has its suffixes in several micro-batches over the same kept keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from g2r_megatron.device import local_device
from g2r_megatron.judge.packing import Tree
from g2r_megatron.judge.types import JudgeInput
from g2r_megatron.model.build import MegatronModel
from g2r_megatron.model.gpt import keys_and_values_only
from g2r_megatron.model.schedule import TokenBatch
from g2r_megatron.model.suffix_rows import KeptKeys, Part, SuffixRow, SuffixTree
from g2r_megatron.model.tree_attention import row_structure
from g2r_megatron.parallel.microbatches import balanced_shards, pack_rows, padded


@dataclass(frozen=True)
class Suffix:
    """Tokens ``first`` to the verdict position of input ``item``, over the first ``visible`` tokens of the unit's prefix.

    ``number``: the caller's name for it. ``level`` (m), ``share`` and ``slot`` belong to gates: see
    ``model.suffix_rows.Part``.
    """

    number: int
    item: int
    first: int
    visible: int
    level: float = 1.0
    share: float = 0.0
    slot: int = 0


@dataclass(frozen=True)
class SuffixUnit:
    """The first ``prefix`` tokens of its inputs, the ``trunk`` tokens behind them, and suffixes.

    The trunk has gradients like the suffixes, and all of them see it. ``groups``: suffixes that stay in one micro-batch.
    ``response``: positions of the gated tokens; ``table`` fp32 [slots, T] gets dF/dm, None without gates. ``of_attention``: see
    ``model.suffix_rows.SuffixTree``.
    """

    prefix: int
    groups: list[list[Suffix]]
    trunk: int = 0
    response: tuple[int, int] = (0, 0)
    table: torch.Tensor | None = None
    of_attention: bool = False

    @property
    def suffixes(self) -> list[Suffix]:
        return [suffix for group in self.groups for suffix in group]


@dataclass(frozen=True)
class Segment:
    """Tokens ``low`` to ``high`` of input ``item``."""

    item: int
    low: int
    high: int

    @property
    def length(self) -> int:
        return self.high - self.low


@dataclass(kw_only=True)
class SegmentBatch(TokenBatch):
    """A packed row of ``segments``; the positions after them are padding."""

    segments: list[Segment]


@dataclass(kw_only=True)
class SuffixBatch(SegmentBatch):
    """A row of suffixes; ``items`` are the numbers of those whose verdict is at this rank's positions.

    ``prefix``: the row of prefixes to run before it, None where an earlier micro-batch did. ``suffixes``: of the whole row.
    """

    prefix: SegmentBatch | None
    kept: KeptKeys
    row: SuffixRow
    suffixes: list[Suffix]

    @property
    def has_targets(self) -> bool:
        return bool(self.suffixes)


@dataclass(frozen=True)
class SuffixPlan:
    """One micro-batch: units whose prefixes are run, units (with some of their groups) whose suffixes are.

    ``users``: micro-batches that run over these prefixes, this one the first; 0: it runs over those of the one before it.
    """

    users: int
    units: list[SuffixUnit]


def plan_suffixes(
    model: MegatronModel, units: Sequence[SuffixUnit], inputs: Sequence[JudgeInput], budget: int
) -> list[SuffixPlan]:
    """This data-parallel replica's micro-batches. All replicas have as many: they may share experts (``replica_plan``)."""
    plans = []
    for share in balanced_shards([unit.prefix + _own_tokens(unit, inputs) for unit in units], model.groups.dp_size):
        mine = [units[i] for i in share]
        plan = []
        longer = [max(unit.prefix, _own_tokens(unit, inputs)) for unit in mine]
        for row in pack_rows(longer, budget, model.length_multiple):
            plan += _cut([mine[i] for i in row], inputs, budget)
        plans.append(plan)
    multiple = model.groups.pgs.pp.size() if len(model.chunks) > 1 else 1
    micro_batches = padded(max(len(plan) for plan in plans), multiple)
    own = plans[model.groups.dp_rank]
    return own + [SuffixPlan(1, [])] * (micro_batches - len(own))


def planned_tokens(plan: SuffixPlan, inputs: Sequence[JudgeInput]) -> tuple[int, int]:
    """(of the prefixes that a micro-batch runs over, of its trunks and suffixes) without padding."""
    return sum(unit.prefix for unit in plan.units), sum(_own_tokens(unit, inputs) for unit in plan.units)


def _own_tokens(unit: SuffixUnit, inputs: Sequence[JudgeInput]) -> int:
    """Of its trunk and suffixes."""
    return unit.trunk + sum(_length(suffix, inputs) for suffix in unit.suffixes)


def _length(suffix: Suffix, inputs: Sequence[JudgeInput]) -> int:
    return inputs[suffix.item].verdict_position + 1 - suffix.first


def _cut(units: list[SuffixUnit], inputs: Sequence[JudgeInput], budget: int) -> list[SuffixPlan]:
    """A row as one micro-batch; a unit that is too long alone in several, each with whole groups."""
    if len(units) > 1 or units[0].trunk or _own_tokens(units[0], inputs) <= budget:
        return [SuffixPlan(1, units)]
    parts: list[list[list[Suffix]]] = []
    tokens = 0
    for group in units[0].groups:
        length = sum(_length(suffix, inputs) for suffix in group)
        if not parts or tokens + length > budget:
            parts.append([])
            tokens = 0
        parts[-1].append(group)
        tokens += length
    return [SuffixPlan(0 if n else len(parts), [replace(units[0], groups=part)]) for n, part in enumerate(parts)]


def suffix_batches(
    model: MegatronModel, plans: Sequence[SuffixPlan], inputs: Sequence[JudgeInput], again: bool
) -> list[SuffixBatch]:
    """The micro-batches on the model's device. ``again``: attention will run twice (``KeptKeys``)."""
    batches: list[SuffixBatch] = []
    for plan in plans:
        if plan.users:
            kept = KeptKeys(plan.users, again, model.config.num_layers)
            prefix = _prefix_batch(model, plan.units, inputs, kept)
            starts = [sum(unit.prefix for unit in plan.units[:i]) for i in range(len(plan.units))]
        else:
            kept, starts = batches[-1].kept, [0]
            # all ranks that share experts must run every layer together: if one runs prefixes, all do
            prefix = _prefix_batch(model, [], inputs, None) if model.geometry.experts else None
        batches.append(_suffix_batch(model, plan.units, starts, inputs, prefix, kept))
    return batches


def _prefix_batch(
    model: MegatronModel, units: Sequence[SuffixUnit], inputs: Sequence[JudgeInput], kept: KeptKeys | None
) -> SegmentBatch:
    segments = [Segment(unit.suffixes[0].item, 0, unit.prefix) for unit in units if unit.prefix]
    trees = [Tree(list(range(s.length)), s.length, [], [], [], 0, 0) for s in segments]
    length = padded(max(1, sum(s.length for s in segments)), model.length_multiple)
    structure = row_structure([tree.shape for tree in trees], length)
    positions = structure[2].tolist()
    if kept is not None:
        structure = torch.cat([structure, torch.full((1, length), kept.number, dtype=torch.int32)])
    return SegmentBatch(**_row(model, segments, inputs, positions), items=[], structure=structure, segments=segments)


def _suffix_batch(model, units, starts, inputs, prefix, kept) -> SuffixBatch:
    segments, verdicts, trees, suffixes, end = [], [], [], [], 0
    for unit, start in zip(units, starts, strict=True):
        if unit.trunk:
            segments.append(Segment(unit.suffixes[0].item, unit.prefix, unit.prefix + unit.trunk))
            end += unit.trunk
        for suffix in unit.suffixes:
            segments.append(Segment(suffix.item, suffix.first, inputs[suffix.item].verdict_position + 1))
            end += segments[-1].length
            verdicts.append((end - 1, suffix.number))
        suffixes += unit.suffixes
        trees.append(_tree(unit, start, inputs))
    length = padded(max(1, end), model.length_multiple)
    row = SuffixRow(trees, kept)
    rank, ranks = model.groups.pgs.cp.rank(), model.groups.pgs.cp.size()
    mine = [(at, number) for at, number in verdicts if at % ranks == rank]
    fields = _row(model, segments, inputs, row.positions + [0] * (length - end))
    fields["logit_rows"] = torch.tensor([at // ranks for at, _ in mine], dtype=torch.int64, device=local_device())
    return SuffixBatch(
        **fields,
        items=[number for _, number in mine],
        structure=torch.full((1, length), row.number, dtype=torch.int32),
        segments=segments,
        prefix=prefix,
        kept=kept,
        row=row,
        suffixes=suffixes,
    )


def _tree(unit: SuffixUnit, start: int, inputs: Sequence[JudgeInput]) -> SuffixTree:
    branches = [
        Part(_length(s, inputs), s.first, s.visible, s.level, s.share, s.slot) for s in unit.suffixes
    ]  # a trunk has the level that all its branches have
    trunk = replace(branches[0], length=unit.trunk, first=unit.prefix, visible=unit.prefix) if unit.trunk else None
    return SuffixTree(start, trunk, branches, unit.response, unit.table, unit.of_attention)


def _row(model: MegatronModel, segments: list[Segment], inputs: Sequence[JudgeInput], positions: list[int]) -> dict:
    """This context parallel rank's ids and positions of a row, and no logits."""
    rank, ranks = model.groups.pgs.cp.rank(), model.groups.pgs.cp.size()
    ids = [token for s in segments for token in inputs[s.item].input_ids[s.low : s.high]]
    ids += [0] * (len(positions) - len(ids))
    device = local_device()
    return dict(
        input_ids=torch.tensor([ids[rank::ranks]], device=device),
        position_ids=torch.tensor(positions[rank::ranks], device=device),
        last_position=max(positions),
        logit_rows=torch.empty(0, dtype=torch.int64, device=device),
    )


def run_suffixes(
    model: MegatronModel,
    module: torch.nn.Module,
    batch: SuffixBatch,
    forward: Callable,
    decoder_input: torch.Tensor | None = None,
) -> torch.Tensor:
    """A micro-batch through one chunk: its prefixes, without gradient, and its suffixes.

    ``forward``: as ``schedule.forward_tokens``; ``decoder_input``: of the suffixes, on the first stage. Between stages the two
    results travel as one tensor [prefixes, suffixes] over the sequence.
    """
    chunk = model.chunks[model.modules.index(module)]
    received, prefix = chunk.decoder.input_tensor, None
    if batch.prefix is not None:
        cut = model.groups.pgs.tp.size() if model.config.sequence_parallel else 1
        tokens = batch.prefix.input_ids.size(1) // cut
        with torch.no_grad(), keys_and_values_only(chunk):
            if received is not None:
                chunk.set_input_tensor([received[:tokens].clone()])
            prefix = forward(module, batch.prefix)
    if received is not None:
        chunk.set_input_tensor([received if prefix is None else received[tokens:]])
    output = forward(module, batch, decoder_input)
    return output if prefix is None or chunk.post_process else torch.cat([prefix, output])
