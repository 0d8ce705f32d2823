"""Rows of suffixes: tokens that run over kept keys and values of prefixes that were run before them, without gradient.

A row of *prefixes* (model/tree_attention.py) leaves the keys and values of every layer in a ``KeptKeys``. A *suffix row*
holds, one after the other, trees of suffixes: an optional trunk that the tree's branches share, then the branches, which do
not see each other. All of them see the first ``visible`` tokens of one kept prefix. The number of a layer's row is
passed in the ``attention_mask``: a tensor passes through activation recompute, when another row may be the current one.

Gates. The attention weight of query q for response token t is multiplied by m before normalising: log m is added to the
score. dF/dm_t is 1/m times the sum of the scores' gradients over the gated queries, heads and layers; each layer's backward
adds its part to the tree's ``table`` (model/suffix_attention.py). A token's attention to itself is not gated.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, count
from weakref import WeakValueDictionary

import torch

from g2r_megatron.model.branch_attention import Runs

_numbers = count(1)
_rows: WeakValueDictionary = WeakValueDictionary()  # number -> KeptKeys or SuffixRow


def find_row(number: int):
    """The ``KeptKeys`` or ``SuffixRow`` of that number. Its maker must still hold it."""
    return _rows[number]


class KeptKeys:
    """Keys and values [groups, S, d] of a row of prefixes in each of this rank's layers, until they were used.

    ``users``: suffix rows that run over them. ``again``: those rows' attention runs twice, first without gradients
    (activation recompute); only the run with gradients counts. ``last_layer``: the number of the model's last, whose attention
    for the prefixes nobody uses; None: all are used.
    """

    def __init__(self, users: int, again: bool, last_layer: int | None = None):
        self.number, self._users, self._again, self.last_layer = next(_numbers), users, again, last_layer
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._used: dict[int, int] = {}
        _rows[self.number] = self

    def put(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """``key``, ``value`` [1, groups, S, d] of the whole row."""
        self._layers[layer] = key[0].detach().contiguous(), value[0].detach().contiguous()
        self._used[layer] = 0

    def take(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(keys, values) of ``layer``; they are freed after their last user."""
        if self._again and not torch.is_grad_enabled():
            return self._layers[layer]
        self._used[layer] += 1
        return self._layers[layer] if self._used[layer] < self._users else self._layers.pop(layer)


@dataclass(frozen=True)
class Part:
    """A trunk or a branch: ``length`` tokens at the positions from ``first`` on, which see ``visible`` prefix tokens.

    ``level``: the gates' m for its queries; ``share``: factor of dF / d log m in row ``slot`` of the table.
    """

    length: int
    first: int
    visible: int
    level: float = 1.0
    share: float = 0.0
    slot: int = 0


@dataclass(frozen=True)
class SuffixTree:
    """``prefix``: where in the kept row its prefix (positions from 0 on) begins; its suffixes follow in the suffix row.

    ``response``: positions of the gated tokens, in the prefix or in trunk and branches; ``table``: fp32 [slots, T], None
    without gates. ``of_attention``: no gradients are asked for, and the forward adds to the table the attention that the last
    token of each branch pays the response, which is in the prefix, summed over heads and layers.
    """

    prefix: int
    trunk: Part | None
    branches: list[Part]
    response: tuple[int, int] = (0, 0)
    table: torch.Tensor | None = None
    of_attention: bool = False

    @property
    def parts(self) -> list[Part]:
        return ([self.trunk] if self.trunk else []) + self.branches

    @property
    def tokens(self) -> int:
        return sum(part.length for part in self.parts)


@dataclass(frozen=True, eq=False)
class SuffixRow:
    """The trees of one row, followed by padding; ``kept``: the keys and values that they run over."""

    trees: list[SuffixTree]
    kept: KeptKeys | None
    number: int = field(default_factory=lambda: next(_numbers))

    def __post_init__(self):
        _rows[self.number] = self

    @property
    def positions(self) -> list[int]:
        """Of every token, as rotary embedding counts them."""
        return [at for tree in self.trees for part in tree.parts for at in range(part.first, part.first + part.length)]

    @property
    def placed_trees(self) -> list[tuple[int, SuffixTree]]:
        """The trees, each with where it begins."""
        return list(zip(accumulate((tree.tokens for tree in self.trees), initial=0), self.trees))


@dataclass(frozen=True)
class Block:
    """Queries of a tree and keys that they look at: one matrix of scores a head.

    ``queries``: local positions of the suffix row; ``keys``: positions of the kept row (``kept``) or of the suffix row. With
    ``branches`` both are the same run of tokens, taken apart into a batch of branches. ``mask`` fp32 [queries, keys] is
    added to the scores; ``causal``: query i sees no key after the i-th; ``plain``: nothing but that changes the scores.

    Gates: keys ``columns`` (None: none) are the response tokens of ``table`` [slots, columns]; ``gated`` fp32 [queries, columns] is 0
    where a token is its own key, None: nowhere; ``log_level`` fp32 [1, 1, queries, 1], or [branches, 1, 1, 1], None where
    all are 0; ``shares`` fp32 [slots, queries], or [slots, branches]. ``of_attention``: as of ``SuffixTree``.
    """

    kept: bool
    queries: slice
    keys: slice
    mask: torch.Tensor | None
    causal: bool = False
    plain: bool = False
    branches: Runs | None = None
    columns: slice | None = None
    gated: torch.Tensor | None = None
    log_level: torch.Tensor | None = None
    shares: torch.Tensor | None = None
    table: torch.Tensor | None = None
    of_attention: bool = False


def tree_blocks(
    trees: Sequence[tuple[int, SuffixTree]], window: int | None, share: tuple[int, int], device: torch.device
) -> list[Block]:
    """The blocks of ``trees``, each with where it begins. ``share`` (r, C): the queries here are the row's positions r, r + C, ..."""
    return [block for start, tree in trees for block in _Planner(tree, start, window, share, device).blocks()]


class _Planner:
    """Makes the blocks of one tree that begins at position ``start`` of the row."""

    def __init__(self, tree: SuffixTree, start: int, window: int | None, share: tuple[int, int], device: torch.device):
        self.tree, self.start, self.window, self.share, self.device = tree, start, window, share, device
        self.offsets = [0]
        for part in tree.parts:
            self.offsets.append(self.offsets[-1] + part.length)

    def blocks(self) -> list[Block]:
        tree, found = self.tree, []
        if (everything := self._local(0, self.offsets[-1])) is None:
            return []
        if any(part.visible for part in tree.parts):
            found += self._over_prefix(*everything)
        first = 1 if tree.trunk else 0
        if tree.trunk:
            found += self._over_own(*everything, 0)
        if self.share[1] == 1 and len(tree.branches) > 1:
            return [*found, self._apart(first)]
        for number in range(first, len(tree.parts)):
            if (mine := self._local(*self.offsets[number : number + 2])) is not None:
                found += self._over_own(*mine, number)
        return found

    def _local(self, low: int, high: int) -> tuple[slice, torch.Tensor] | None:
        """(local positions, offsets in the tree) of the queries here that are tokens ``low`` to ``high`` of the tree."""
        rank, ranks = self.share
        a, b = (-(-(self.start + at - rank) // ranks) for at in (low, high))
        return (slice(a, b), torch.arange(a, b) * ranks + rank - self.start) if a < b else None

    def _of_queries(self, offsets: torch.Tensor, values: list) -> torch.Tensor:
        """The part's value for every query."""
        lengths = torch.tensor([part.length for part in self.tree.parts])
        return torch.repeat_interleave(torch.tensor(values), lengths)[offsets]

    def _positions(self, offsets: torch.Tensor) -> torch.Tensor:
        starts = [part.first - at for part, at in zip(self.tree.parts, self.offsets)]
        return self._of_queries(offsets, starts) + offsets

    def _over_prefix(self, queries: slice, offsets: torch.Tensor) -> list[Block]:
        """All queries look at the kept prefix, as far as it is visible and in the window."""
        at, parts = self._positions(offsets), self.tree.parts
        visible = self._of_queries(offsets, [part.visible for part in parts])
        low = 0 if self.window is None else max(0, int(at.min()) - self.window)
        high = int(visible.max())
        if low >= high:
            return []
        keys = torch.arange(low, high)
        seen = keys < visible[:, None]
        if self.window is not None:
            seen &= at[:, None] - keys <= self.window
        begin, end = (min(max(edge, low), high) for edge in self.tree.response)
        mask = self._added(seen)
        block = Block(
            kept=True,
            queries=queries,
            keys=slice(self.tree.prefix + low, self.tree.prefix + high),
            mask=mask,
            plain=mask is None,
            columns=slice(begin - low, end - low),
        )
        return [self._with_gates(block, begin, offsets, None)]

    def _over_own(self, queries: slice, offsets: torch.Tensor, number: int) -> list[Block]:
        """Queries look at the tokens of part ``number`` that are not after them."""
        part, at = self.tree.parts[number], self._positions(offsets)
        keys = torch.arange(part.first, part.first + part.length)
        own = (offsets >= self.offsets[number]) & (offsets < self.offsets[number + 1])
        seen = ~own[:, None] | (keys <= at[:, None])
        if self.window is not None:
            seen &= at[:, None] - keys <= self.window
        begin, end = self._columns(part)
        block = Block(
            kept=False,
            queries=queries,
            keys=slice(self.start + self.offsets[number], self.start + self.offsets[number + 1]),
            mask=self._added(seen),
            causal=self.share[1] == 1 and queries.start == self.start + self.offsets[number],
            columns=slice(begin - part.first, end - part.first),
        )
        own_key = own[:, None] & (keys == at[:, None])
        return [self._with_gates(block, begin, offsets, ~own_key)]

    def _columns(self, part: Part) -> tuple[int, int]:
        """Positions of the response tokens among a part's."""
        begin, end = (min(max(edge, part.first), part.first + part.length) for edge in self.tree.response)
        return begin, end

    def _apart(self, first: int) -> Block:
        """Each branch looks at itself, as a row of a batch. All of them have the response at the same offset, or none has."""
        parts = self.tree.branches
        behind = self.start + self.offsets[first]
        batch = Runs.of(0, [part.length for part in parts], self.device)
        longest = torch.arange(batch.rows.size(1))
        distance = longest[:, None] - longest
        seen = (distance >= 0) if self.window is None else (distance >= 0) & (distance <= self.window)
        begin, end = self._columns(parts[0])
        block = Block(
            kept=False,
            queries=slice(behind, self.start + self.offsets[-1]),
            keys=slice(behind, self.start + self.offsets[-1]),
            mask=self._added(seen),
            causal=True,
            plain=self.window is None or self.window >= batch.rows.size(1) - 1,
            branches=batch,
            columns=slice(begin - parts[0].first, end - parts[0].first),
        )
        if self.tree.table is None or begin == end:
            return replace(block, columns=None)
        log_level = self._log_levels([part.level for part in parts], (-1, 1, 1, 1))
        return replace(
            block,
            plain=block.plain and log_level is None,
            gated=(distance != 0).float().to(self.device)[:, block.columns],
            log_level=log_level,
            shares=self._shares(torch.arange(len(parts)), parts),
            table=self.tree.table[:, begin - self.tree.response[0] : end - self.tree.response[0]],
        )

    def _with_gates(self, block: Block, begin: int, offsets: torch.Tensor, gated: torch.Tensor | None) -> Block:
        """``begin``: the response position of the block's first column; ``gated`` bool [queries, keys], None: all."""
        columns, parts = block.columns, self.tree.parts
        if self.tree.table is None or columns.start == columns.stop:
            return replace(block, columns=None)
        if gated is not None:
            gated = gated[:, columns]
            gated = None if bool(gated.all()) else gated.float().to(self.device)
        numbers = self._of_queries(offsets, list(range(len(parts))))
        first, shares = begin - self.tree.response[0], self._shares(numbers, parts)
        if self.tree.of_attention:  # of the queries only each part's last counts
            shares *= torch.isin(offsets + 1, torch.tensor(self.offsets[1:])).to(shares)
        log_level = self._log_levels([parts[k].level for k in numbers.tolist()], (1, 1, -1, 1))
        return replace(
            block,
            plain=block.plain and log_level is None,
            of_attention=self.tree.of_attention,
            gated=gated,
            log_level=log_level,
            shares=shares,
            table=self.tree.table[:, first : first + columns.stop - columns.start],
        )

    def _log_levels(self, levels: list[float], shape: tuple[int, ...]) -> torch.Tensor | None:
        if all(level == 1 for level in levels):
            return None
        return torch.tensor([math.log(level) for level in levels], device=self.device).view(shape)

    def _shares(self, numbers: torch.Tensor, parts: list[Part]) -> torch.Tensor:
        """fp32 [slots, n]: the share of ``parts[numbers[i]]`` in its slot, 0 in the others."""
        slots, shares = (torch.tensor([getattr(part, name) for part in parts]) for name in ("slot", "share"))
        table = torch.zeros(self.tree.table.size(0), len(numbers))
        table[slots[numbers], torch.arange(len(numbers))] = shares[numbers].float()
        return table.to(self.device)

    def _added(self, seen: torch.Tensor) -> torch.Tensor | None:
        """What is added to the scores so that only ``seen`` is; None where all is."""
        if bool(seen.all()):
            return None
        return torch.zeros(seen.shape).masked_fill_(~seen, float("-inf")).to(self.device)
