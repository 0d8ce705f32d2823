"""Routing of a mixture-of-experts judge: the attribution pass uses the experts that the verdict pass chose.

The choice of experts is not a smooth function. Where two experts are nearly equal, another row or another kernel size
can change the choice, and the ``contracted`` embedding does change it. The gradient would then belong to another
function than the one that gave the verdict. So the verdict pass records the chosen experts of every token and layer,
and the attribution pass replays them (Megatron-Core's ``RouterReplay``, also in recomputed layers); the routers'
weights over the chosen experts are computed and differentiated as usual. If a shorter tree shares tokens that the
verdict's tree did not share, they use the routing of the first of their items.

An attribution pass has other rows than the verdict pass, on other ranks. All ranks of a pipeline stage therefore get the
routing of all trees, for their own layers, in host memory: tokens of the verdict pass x expert layers on the stage x experts
a token, in bytes (Qwen3-30B-A3B on pp 4: 96 bytes a token, so 57 MB a rank for 256 responses of 2300 judge tokens).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router_replay import RouterReplayAction

from g2r_megatron.device import local_device
from g2r_megatron.judge.packing import Tree
from g2r_megatron.judge.suffixes import SegmentBatch
from g2r_megatron.judge.types import JudgeInput
from g2r_megatron.model.build import MegatronModel
from g2r_megatron.model.schedule import forward_tokens

if TYPE_CHECKING:
    from g2r_megatron.judge.frozen import TreeBatch

EXCHANGED_BYTES = 2**26  # of the table, on the device at a time


@dataclass(frozen=True)
class Place:
    """Where an input's tokens are in the table: its prefix from ``start`` on, what follows from ``branch`` on."""

    start: int
    prefix: int
    branch: int

    def rows(self, low: int, high: int) -> torch.Tensor:
        """Table rows of the input's tokens ``low`` to ``high``: int64 [high - low]."""
        at = torch.arange(low, high)
        return torch.where(at < self.prefix, self.start + at, self.branch + at - self.prefix)


def _key(item: JudgeInput) -> bytes:
    """An input by what it reads."""
    return blake2b(np.array(item.input_ids, dtype=np.int64).tobytes(), digest_size=16).digest()


def tree_places(tree: Tree, inputs: Sequence[JudgeInput], start: int) -> dict[bytes, Place]:
    """Of each of the tree's inputs, where its tokens are, if the tree's are the table's rows from ``start`` on."""
    places, branch = {}, start + tree.prefix
    for item, length in zip(tree.items, tree.branches or [0], strict=True):
        places[_key(inputs[item])] = Place(start, tree.prefix, branch)
        branch += length
    return places


def tree_rows(tree: Tree, places: Sequence[Place]) -> torch.Tensor:
    """Table rows of the tree's tokens, in the order of its ids; ``places`` of its items."""
    branches = [place.rows(tree.prefix, tree.prefix + n) for place, n in zip(places, tree.branches)]
    return torch.cat([places[0].rows(0, tree.prefix), *branches])


class Routing:
    """Records and replays the routing of one judge; for a judge without experts, runs it as it is."""

    def __init__(self, model: MegatronModel):
        self.model = model
        self.routers = [
            [layer.mlp.router for layer in chunk.decoder.layers if isinstance(layer.mlp, MoELayer)]
            for chunk in model.chunks
        ]
        self._starts = [sum(map(len, self.routers[:i])) for i in range(len(self.routers))]
        experts = model.geometry.experts
        self._dtype = torch.uint8 if experts <= 256 else torch.int32  # NCCL has no int16
        self._recompute = model.config.recompute_granularity == "full"
        self._table = self._empty(0)  # [tokens, this rank's routers, k]
        self._places: dict[bytes, Place] = {}
        self._replayed = False

    def _empty(self, tokens: int) -> torch.Tensor:
        k = self.model.config.moe_router_topk
        return torch.zeros(tokens, sum(map(len, self.routers)), k, dtype=self._dtype)

    @contextmanager
    def recording(self, trees: Sequence[Tree], inputs: Sequence[JudgeInput]) -> Iterator[Callable]:
        """Yields ``forward_tokens`` for a verdict pass over ``trees`` of ``inputs`` (collective, at the end too).

        The choices are kept until the first verdict pass after an attribution.
        """
        if not self.model.geometry.experts:
            yield forward_tokens
            return
        if self._replayed:
            self._table, self._places, self._replayed = self._empty(0), {}, False
        starts, tokens = {}, 0  # of each tree, by its first item
        for tree in trees:
            starts[tree.items[0]] = tokens
            self._places |= tree_places(tree, inputs, len(self._table) + tokens)
            tokens += len(tree.ids)
        chosen: list[tuple[torch.Tensor, int, torch.Tensor]] = []  # table rows, first router, experts

        def forward(module: torch.nn.Module, batch: "TreeBatch") -> torch.Tensor:
            output = forward_tokens(module, batch)
            chunk = self.model.modules.index(module)
            if self.routers[chunk]:
                rows = [torch.arange(len(tree.ids)) + starts[tree.items[0]] for tree in batch.trees]
                found = [router.router_replay.get_recorded_indices() for router in self.routers[chunk]]
                compact = torch.stack(found, dim=1).to(self._dtype)  # [s, routers, k]
                chosen.append((self._here(rows, batch), self._starts[chunk], compact))
            return output

        with self._acting(RouterReplayAction.RECORD):
            yield forward
        table = self._empty(tokens)
        for rows, first, experts in chosen:
            real = rows >= 0
            table[rows[real], first : first + experts.size(1)] = experts.cpu()[real]
        self._exchange(table)
        self._table = torch.cat([self._table, table])

    @contextmanager
    def replaying(self, inputs: Sequence[JudgeInput]) -> Iterator[Callable]:
        """Yields ``forward_tokens`` (with ``decoder_input``) for a pass over trees of ``inputs`` with gradients.

        Raises ``ValueError`` for inputs that no verdict pass has seen.
        """
        if not self.model.geometry.experts:
            yield forward_tokens
            return
        self._replayed = True
        keys = [_key(item) for item in inputs]
        if unknown := [i for i, key in enumerate(keys) if key not in self._places]:
            raise ValueError(f"inputs {unknown} were not in the verdict passes before this attribution")

        def forward(module: torch.nn.Module, batch: "TreeBatch", decoder_input=None) -> torch.Tensor:
            chunk = self.model.modules.index(module)
            rows = self._table_rows(batch, keys)
            experts = self._experts(self._here(rows, batch), chunk)
            for router, indices in zip(self.routers[chunk], experts, strict=True):
                if torch.is_grad_enabled():
                    router.router_replay.set_target_indices(indices)
                else:  # a row of prefixes (judge/suffixes.py), which no backward runs again
                    router.router_replay.target_topk_idx = indices
            output = forward_tokens(module, batch, decoder_input)
            if not self._recompute:  # they are not needed again
                for router in self.routers[chunk]:
                    router.router_replay.clear_indices()
            return output

        with self._acting(RouterReplayAction.REPLAY_FORWARD):
            yield forward

    @contextmanager
    def choosing(self) -> Iterator[Callable]:
        """Yields ``forward_tokens`` for a pass that gives verdicts and gradients at once. It makes its own choices.

        Recomputed layers use the choices of their forward. The records of verdict passes are dropped.
        """
        if not self.model.geometry.experts:
            yield forward_tokens
            return
        self._table, self._places, self._replayed = self._empty(0), {}, False

        def forward(module: torch.nn.Module, batch: "TreeBatch", decoder_input=None) -> torch.Tensor:
            output = forward_tokens(module, batch, decoder_input)
            if self._recompute and torch.is_grad_enabled():
                for router in self.routers[self.model.modules.index(module)]:
                    router.router_replay.replay_backward_list.append(router.router_replay.get_recorded_indices())
            return output

        with self._acting(RouterReplayAction.RECORD):
            yield forward

    def _table_rows(self, batch: "TreeBatch", keys: list[bytes]) -> list[torch.Tensor]:
        """Table rows of the tokens of each tree or segment of ``batch``; ``keys`` of the inputs."""
        if isinstance(batch, SegmentBatch):
            return [self._places[keys[s.item]].rows(s.low, s.high) for s in batch.segments]
        return [tree_rows(tree, [self._places[keys[item]] for item in tree.items]) for tree in batch.trees]

    def _here(self, rows: list[torch.Tensor], batch: "TreeBatch") -> torch.Tensor:
        """Table rows of this rank's positions of a packed row; -1 for padding."""
        length = batch.structure.size(1)
        row = torch.cat([*rows, torch.full((length - sum(map(len, rows)),), -1)])
        return row[self.model.row_positions(length)]

    def _experts(self, rows: torch.Tensor, chunk: int) -> tuple[torch.Tensor, ...]:
        """Experts int64 [n, k] of ``rows`` at each router of a chunk; padding is spread over all experts."""
        first, number = self._starts[chunk], len(self.routers[chunk])
        turns = torch.arange(len(rows))[:, None, None] + torch.arange(self._table.size(2))
        experts = (turns % self.model.geometry.experts).to(self._dtype).repeat(1, number, 1)
        real = rows >= 0
        experts[real] = self._table[rows[real], first : first + number]
        return experts.to(local_device()).long().unbind(1)

    def _exchange(self, table: torch.Tensor) -> None:
        """Fill ``table`` from all ranks of the stage: one rank has the values of a token, all others have zeros."""
        group = self.model.groups.pgs.tp_dp_cp
        if group.size() == 1 or not table.numel():
            return
        tokens = max(1, EXCHANGED_BYTES // (table[0].numel() * table.element_size()))
        for part in table.split(tokens):
            total = part.to(local_device())
            dist.all_reduce(total, group=group)
            part.copy_(total)

    @contextmanager
    def _acting(self, action: RouterReplayAction) -> Iterator[None]:
        """Only the judge's routers do ``action``; recomputed layers replay the choices of their forward."""

        def before(router: torch.nn.Module, _inputs) -> None:
            # a layer that will be recomputed runs without gradients first
            again = self._recompute and torch.is_grad_enabled()
            router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD if again else action)

        routers = [router for chunk in self.routers for router in chunk]
        hooks = [router.register_forward_pre_hook(before) for router in routers]
        try:
            yield
        finally:
            for router, hook in zip(routers, hooks, strict=True):
                hook.remove()
                router.router_replay.clear_indices()
                router.router_replay.clear_router_replay_action()
