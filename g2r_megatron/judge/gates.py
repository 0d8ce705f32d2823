"""Gradients of verdicts (or scores) at attention gates: how much a verdict loses, to first order, if a token is hidden.

Every response token t has a gate m_t that multiplies the attention weight of later queries for t, in every layer and
head, before the weights are normalised; t's attention to itself is not gated. b_t = dF/dm_t at m = 1, or the mean over
``judge.gate_levels``. Source and measurements: docs/gates.md.

``judge.gate_queries=branch``: only the queries after the response are gated. Then nothing before the branches depends
on a gate. One backward over the branches of a response gives b of all its items, in the pass that gives their verdicts
(``Gates.verdicts``). ``all``: the queries of later response tokens are gated too. Response and branch have gradients,
the conversation has none (``Gates.gradients``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.distributed as dist

from g2r_megatron.config.options import JudgeConfig, gated_queries
from g2r_megatron.device import local_device
from g2r_megatron.judge.activation_memory import check_suffix_memory
from g2r_megatron.judge.routing import Routing
from g2r_megatron.judge.suffixes import Suffix, SuffixBatch, SuffixUnit, plan_suffixes, run_suffixes, suffix_batches
from g2r_megatron.judge.targets import Target, require_finite
from g2r_megatron.judge.types import JudgeInput, Pass
from g2r_megatron.model.build import MegatronModel
from g2r_megatron.model.schedule import run_schedule


@dataclass
class _Work:
    """What one pass runs: units, their suffixes by number, and the table that all of them fill."""

    lengths: list[int]  # of the result's rows, T each
    units: list[SuffixUnit] = field(default_factory=list)
    suffixes: list[Suffix] = field(default_factory=list)

    def __post_init__(self):
        self.table = torch.zeros(sum(self.lengths), device=local_device())
        self._rows = self.table.split(self.lengths)
        self._begins = torch.tensor([0, *self.lengths]).cumsum(0).tolist()

    def rows(self, first: int, count: int) -> torch.Tensor:
        """Rows ``first`` to ``first + count`` of one length T, as [count, T]."""
        return self.table[self._begins[first] : self._begins[first + count]].view(
            count, -1 if self.lengths[first] else 0
        )

    def suffix(self, item: int, first: int, visible: int, level: float, share: float, slot: int) -> Suffix:
        self.suffixes.append(Suffix(len(self.suffixes), item, first, visible, level, share, slot))
        return self.suffixes[-1]

    def gathered(self) -> list[torch.Tensor]:
        """The rows, fp32 on the CPU of every rank (collective), summed over queries, heads, layers and ranks."""
        dist.all_reduce(self.table)
        return list(self.table.cpu().split(self.lengths))


class Gates:
    """Runs the gates of one frozen judge. Every rank passes the same inputs and gets all results."""

    def __init__(self, model: MegatronModel, config: JudgeConfig, target: Target, routing: Routing):
        self.model, self.config, self.target, self.routing = model, config, target, routing
        self.queries = gated_queries(config, model.geometry.is_reward_model)

    def verdicts(
        self, responses: Sequence[Sequence[JudgeInput]], draws: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[bool], list[torch.Tensor]]:
        """(fp32 [inputs, columns] of ``target.read``, verdicts, b [T]) of every input, in one pass (collective).

        ``draws``: fp64 [inputs] in [0, 1), which decide the verdicts, or None: the likelier ones. The verdicts of a reward
        model mean nothing.
        """
        inputs = [item for row in responses for item in row]
        work = self._branch_work(responses, inputs)
        drawn = None if draws is None else draws.to(local_device())

        def target(batch: SuffixBatch, logits: torch.Tensor):
            values = self.target.read(logits)
            verdicts = self._decided(batch, values.detach(), drawn)  # [items of the row]
            plain, place = _at_level_one(batch)
            of_items = verdicts[[place[work.suffixes[i].item] for i in batch.items]]
            here = [row for row, i in enumerate(batch.items) if i in plain]
            items = [work.suffixes[batch.items[row]].item for row in here]
            found = torch.cat([values.detach()[here], of_items[here].to(values.dtype)[:, None]], dim=1)
            return self.target.of(values, of_items).sum(), (items, found)

        results = self._run(work, inputs, self.routing.choosing(), target)
        table = torch.zeros(len(inputs), self.target.columns + 1, device=local_device())
        if self.model.groups.is_replica_writer:
            for items, found in results:
                table[items] = found
        dist.all_reduce(table)
        table = table.cpu()
        require_finite(table, self.target.noun)
        return table[:, :-1], table[:, -1].bool().tolist(), work.gathered()

    def _branch_work(self, responses: Sequence[Sequence[JudgeInput]], inputs: list[JudgeInput]) -> _Work:
        """One unit for all items of a response. The items keep the order of the inputs."""
        work = _Work([item.response_end - item.response_start for item in inputs])
        levels, number = self.config.gate_levels, 0
        for row in responses:
            for _, same in groupby(row, lambda item: (item.response_start, item.input_ids[: item.response_end])):
                items, groups = list(same), []
                end = items[0].response_end
                for slot in range(len(items)):
                    # the verdict is read where m = 1, whether or not that is one of the levels
                    shares = {1.0: 0.0} | {level: 1 / (level * len(levels)) for level in levels}
                    groups.append([work.suffix(number + slot, end, end, m, c, slot) for m, c in shares.items()])
                table = work.rows(number, len(items))
                work.units.append(SuffixUnit(end, groups, 0, (items[0].response_start, end), table))
                number += len(items)
        return work

    def _decided(self, batch: SuffixBatch, values: torch.Tensor, draws: torch.Tensor | None) -> torch.Tensor:
        """Verdicts, bool, of the items of a row in the order of ``_at_level_one``; ``values`` of this rank's suffixes."""
        plain, place = _at_level_one(batch)
        here = [row for row, i in enumerate(batch.items) if i in plain]
        table = values.new_zeros(len(plain), values.size(1))
        table[[plain[batch.items[row]] for row in here]] = values[here]
        cp = self.model.groups.pgs.cp
        if cp.size() > 1:  # a verdict and the levels of its item may be on different ranks
            dist.all_reduce(table, group=cp)
        return self.target.decide(table, None if draws is None else draws[list(place)])

    def gradients(self, passes: Sequence[Pass]) -> list[torch.Tensor]:
        """b [T] of every pass where all later queries are gated (collective). Verdict passes must have seen the inputs."""
        inputs = [item for one in passes for item in one.inputs]
        verdicts = [verdict for one in passes for verdict in one.verdicts]
        weights = torch.tensor([weight for one in passes for weight in one.weights], device=local_device())
        work = self._all_work(passes)

        def target(batch: SuffixBatch, logits: torch.Tensor):
            items = [work.suffixes[i].item for i in batch.items]
            targets = self.target.of(self.target.read(logits), [verdicts[item] for item in items])
            return (targets * weights[items]).sum(), None

        self._run(work, inputs, self.routing.replaying(inputs), target)
        return work.gathered()

    def _all_work(self, passes: Sequence[Pass]) -> _Work:
        """Passes of one input each that share a response share its conversation; a pass of several shares the response too."""
        work = _Work([one.inputs[0].response_end - one.inputs[0].response_start for one in passes])
        levels, item, number = self.config.gate_levels, 0, 0

        def shared(one: Pass):
            first = one.inputs[0]
            return len(one.inputs) > 1, first.response_start, first.response_end, first.input_ids[: first.response_end]

        for (several, start, end, _), same in groupby(passes, shared):
            group = list(same)
            if not several:
                groups = [
                    [work.suffix(item + slot, start, start, m, 1 / (m * len(levels)), slot) for m in levels]
                    for slot in range(len(group))
                ]
                table = work.rows(number, len(group))
                work.units.append(SuffixUnit(start, groups, 0, (start, end), table))
                item, number = item + len(group), number + len(group)
                continue
            for one in group:
                members = range(item, item + len(one.inputs))
                for m in levels:
                    suffixes = [work.suffix(k, end, start, m, 1 / (m * len(levels)), 0) for k in members]
                    unit = SuffixUnit(start, [suffixes], end - start, (start, end), work.rows(number, 1))
                    work.units.append(unit)
                item, number = members.stop, number + 1
        return work

    def _run(self, work: _Work, inputs: Sequence[JudgeInput], routing, target: Callable) -> list:
        """Forward and backward of all units; the tables are filled (collective over the model's ranks)."""
        model = self.model
        plans = plan_suffixes(model, work.units, inputs, self.config.micro_batch_tokens)
        check_suffix_memory(model, plans, inputs, self.config)
        batches = suffix_batches(model, plans, inputs, again=self.config.recompute != "none")
        done: list[SuffixBatch] = []

        def run(module: torch.nn.Module, batch: SuffixBatch) -> torch.Tensor:
            leaf = None
            if model.groups.is_first_stage and module is model.modules[0]:
                with torch.no_grad():
                    embedding = model.chunks[0].embedding(batch.input_ids, position_ids=None)
                leaf = embedding.clone().requires_grad_()  # recompute makes a graph only if an input needs a gradient

                def release(leaf: torch.Tensor) -> None:
                    leaf.grad = None
                    done.append(batch)

                leaf.register_post_accumulate_grad_hook(release)
            return run_suffixes(model, module, batch, forward, leaf)

        model.train()  # as FrozenJudge.token_gradients
        with self.target.exact(), routing as forward:
            results = run_schedule(model, batches, run, target, backward=True)
        model.train(False)
        if model.groups.is_first_stage and len(done) != len(batches):
            raise RuntimeError(f"{len(batches)} backward passes of gates reached the embeddings {len(done)} times")
        return results


def _at_level_one(batch: SuffixBatch) -> tuple[dict[int, int], dict[int, int]]:
    """(suffix number -> n, item -> n) of the suffixes of a row whose gates are open: one an item, counted by n."""
    plain = [suffix for suffix in batch.suffixes if suffix.level == 1]
    return {s.number: n for n, s in enumerate(plain)}, {s.item: n for n, s in enumerate(plain)}
