"""Attention of short trees of a suffix row on a CPU: neighbours as one batch, in torch's fused kernel.

The calls for the blocks of a short tree (model/suffix_rows.py) cost more than their arithmetic. In a batch, each tree's queries
look at its own tokens and at its prefix under one mask; trees are padded to the longest. The kernel's backward gives the gates'
gradients too. Its gradient of the keys is dS^T Q. The queries get further dimensions, one for each row of the table, that hold
their shares; keys have zeros there, which changes no score. In these dimensions the keys' gradient is the column sum of dS over
the gated queries, by their shares.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from g2r_megatron.model.branch_attention import Runs, attend, attend_backward
from g2r_megatron.model.suffix_rows import SuffixTree
from g2r_megatron.parallel.microbatches import padded

SHORT_SCORES = 2**16  # of a short tree: computing as many takes as long as the calls for its blocks
VECTOR = 4  # numbers of a row that the kernel reads at once


@dataclass(frozen=True, eq=False)
class ShortTrees:
    """Neighbouring trees: their ``tokens`` in the suffix row, which are queries and keys, and their ``prefixes`` in the kept row.

    ``mask`` fp32 [trees, 1, n, n + P] is added to the scores. Gates: ``shares`` fp32 [trees, 1, n, slots] of each query, and of
    each tree (table [slots, T], which of its prefix's tokens are the table's columns); None and [] without.
    """

    tokens: Runs
    prefixes: Runs
    mask: torch.Tensor
    shares: torch.Tensor | None
    tables: list[tuple[torch.Tensor, slice]]

    def attend(self, query, key, value, kept_key, kept_value, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(result [1, heads, tokens, d], log-sum-exp [1, heads, tokens]), both fp32.

        ``query`` [1, heads, S, d], ``key``, ``value`` [1, groups, S, d] of the suffix row, kept ones of the kept row.
        """
        q = self.tokens.batch(query).float()
        k, v = self._keys(key, kept_key), self._keys(value, kept_value)
        out, sums = attend(q, k, v, 0.0, False, attn_mask=self.mask, scale=scale)
        return self.tokens.flat(out), self.tokens.flat(sums)

    def attend_backward(
        self, gradient, query, key, value, kept_key, kept_value, out, sums, scale: float
    ) -> list[torch.Tensor]:
        """Gradients of ``query``, ``key`` and ``value`` at the trees' tokens, fp32; the gates' are added to the tables."""
        q, g, o = (self.tokens.batch(x).float() for x in (query, gradient, out))
        g = g * self.tokens.real[:, None, :, None]  # padding is no query
        k, v = self._keys(key, kept_key), self._keys(value, kept_value)
        own, size = q.size(2), q.size(3)
        if self.shares is not None:
            slots = self.shares.size(-1)
            q = torch.cat([q, (self.shares / scale).expand(-1, q.size(1), -1, -1)], dim=-1)
            g, k, v, o = (F.pad(x, (0, slots)) for x in (g, k, v, o))
        sums = self.tokens.batch(sums)
        dq, dk, dv = attend_backward(g, q, k, v, o, sums, 0.0, False, attn_mask=self.mask, scale=scale)
        of_gates = dk[:, :, own:, size:].sum(1)  # [trees, P, slots]
        for (table, columns), found in zip(self.tables, of_gates, strict=self.shares is not None):
            table += found[columns, : len(table)].T
        return [self.tokens.flat(x[:, :, :own, :size]) for x in (dq, dk, dv)]

    def _keys(self, own: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """fp32 [trees, groups, n + P, d]."""
        return torch.cat([self.tokens.batch(own), self.prefixes.batch(kept[None])], dim=2).float()


def short_trees(trees: Sequence[tuple[int, SuffixTree]]) -> list[ShortTrees]:
    """``trees``, each with where it begins in its row, as batches of which little is padding. All are short (``is_short``)."""
    groups: list[list[tuple[int, SuffixTree]]] = []
    for start, tree in trees:
        if groups and _fits(*groups[-1][-1], start, tree):
            groups[-1].append((start, tree))
        else:
            groups.append([(start, tree)])
    return [_batch(group[0][0], [tree for _, tree in group]) for group in groups]


def is_short(tree: SuffixTree, heads: int, window: int | None) -> bool:
    """Whether a tree has few scores, and no more to it than branches that see a whole prefix, in which the response is."""
    prefix, tokens = tree.branches[0].visible, tree.tokens
    return (
        heads * tokens * (tokens + prefix) <= SHORT_SCORES
        and tree.trunk is None
        and not tree.of_attention
        and (tree.table is None or tree.response[1] <= prefix)
        and all(part.visible == prefix > 0 and part.level == 1 for part in tree.branches)
        and (window is None or max(part.first + part.length for part in tree.branches) <= window + 1)
    )


def _fits(start: int, tree: SuffixTree, next_start: int, following: SuffixTree) -> bool:
    """Whether ``following`` comes next in both rows and has nearly the same lengths."""
    tokens, prefix = tree.tokens, tree.branches[0].visible
    return (start + tokens, tree.prefix + prefix) == (next_start, following.prefix) and all(
        _size(a) == _size(b) for a, b in ((tokens, following.tokens), (prefix, following.branches[0].visible))
    )


def _size(length: int) -> int:
    """The same for lengths of up to 32, and for larger ones that differ by less than a factor of 2."""
    return max(31, length - 1).bit_length()


def _batch(start: int, trees: list[SuffixTree]) -> ShortTrees:
    """Trees that follow one another from position ``start`` of the suffix row on."""
    tokens = Runs.of(start, [tree.tokens for tree in trees])
    prefixes = Runs.of(trees[0].prefix, [tree.branches[0].visible for tree in trees])
    parts = [part for tree in trees for part in tree.branches]
    numbers = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([part.length for part in parts]))
    branch, at = numbers[tokens.rows - start], tokens.rows  # [trees, n]
    own = (branch[:, :, None] == branch[:, None]) & (at[:, :, None] >= at[:, None]) & tokens.real[:, None]
    seen = torch.cat([own, prefixes.real[:, None].expand(-1, at.size(1), -1)], dim=2)
    mask = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf")).unsqueeze(1)
    tables = [(tree.table, slice(*tree.response)) for tree in trees if tree.table is not None]
    if not tables:
        return ShortTrees(tokens, prefixes, mask, None, [])
    slots = torch.arange(padded(max(len(table) for table, _ in tables), VECTOR))
    share = torch.tensor([part.share for part in parts])[branch] * tokens.real
    slot = torch.tensor([part.slot for part in parts])[branch]
    shares = torch.where(slot.unsqueeze(-1) == slots, share.unsqueeze(-1), 0.0).unsqueeze(1)
    return ShortTrees(tokens, prefixes, mask, shares, tables)
