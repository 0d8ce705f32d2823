"""Attention of a suffix row (model/suffix_rows.py), with a backward that also sums the scores' gradients by key.

On the CPU the forward of a block without a mask of its own is torch's fused kernel. All else is plain matrix products over
chunks of queries, with scores and sums in fp32. The results of a tree's blocks are merged by their log-sum-exps. In the
backward, with P = exp(score - merged log-sum-exp), the gradient of the scores is dS = P (dO V^T - delta), delta = the sum of
dO O: dQ, dK, dV follow from it as usual, and its column sums over the gated queries are the gates' gradients: the same
code, and the same bits every time, on CPU and GPU. Kept keys and values get no gradient.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, compress, pairwise

import torch

from g2r_megatron.model.branch_attention import attend, attend_backward
from g2r_megatron.model.short_trees import ShortTrees, is_short, short_trees
from g2r_megatron.model.suffix_rows import Block, SuffixRow, tree_blocks

KEPT_PLANS = 8  # rows (of each window) whose masks are kept: those that a pipeline stage has in flight
LOWEST = torch.finfo(torch.float32).min  # log of a sum over nothing
CPU_SCORES, GPU_SCORES = 2**19, 2**24  # of a chunk: as many as the CPU's cache holds; enough to fill a GPU


def scores_at_once(on_cpu: bool) -> int:
    """Scores, in fp32, of a chunk; a few tensors of so many are alive at a time."""
    return CPU_SCORES if on_cpu else GPU_SCORES


def suffix_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    row: SuffixRow,
    layer: int,
    window: int | None,
    scale: float | None,
    share: tuple[int, int],
) -> torch.Tensor:
    """``query`` [1, heads, q, d], ``key``/``value`` [1, groups, S, d] of the whole suffix row -> [1, heads, q, d].

    ``share`` (r, C): the queries are the row's positions r, r + C, .... Padding comes out as 0.
    """
    kept = row.kept.take(layer) if row.kept is not None else (key[0, :, :0], value[0, :, :0])
    short, blocks = _planned(row, window, share, query.size(1), query.device)
    scale = query.size(-1) ** -0.5 if scale is None else scale
    return SuffixAttention.apply(query, key, value, *kept, short, blocks, scale)


@lru_cache(maxsize=KEPT_PLANS)
def _planned(
    row: SuffixRow, window: int | None, share: tuple[int, int], heads: int, device: torch.device
) -> tuple[list[ShortTrees], list[Block]]:
    """The row's short trees, if its attention is whole and on a CPU, and the blocks of the others."""
    whole, trees = share[1] == 1 and device.type == "cpu", row.placed_trees
    short = [whole and is_short(tree, heads, window) for _, tree in trees]
    others = [placed for placed, is_one in zip(trees, short, strict=True) if not is_one]
    return short_trees(list(compress(trees, short))), tree_blocks(others, window, share, device)


class Scratch:
    """fp32 memory that chunks use one after the other: on a CPU new memory for each costs as much as the arithmetic on it."""

    def __init__(self, device: torch.device):
        self._memory = torch.empty(0, device=device)

    def take(self, *shape: int) -> torch.Tensor:
        """Uninitialised, [*shape]; what was taken before is overwritten."""
        size = math.prod(shape)
        if self._memory.numel() < size:
            self._memory = torch.empty(size, device=self._memory.device)
        return self._memory[:size].view(shape)


class SuffixAttention(torch.autograd.Function):
    """``apply(query, key, value, kept keys [groups, P, d], kept values, short trees, blocks, scale)`` -> like query."""

    @staticmethod
    def forward(ctx, query, key, value, kept_key, kept_value, short: list[ShortTrees], blocks: list[Block], scale):
        out = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
        sums = torch.full(query.shape[:3], LOWEST, device=query.device)
        rows = query, key, value, kept_key, kept_value
        for trees in short:
            here = trees.tokens.span
            out[:, :, here], sums[:, :, here] = trees.attend(*rows, scale)
        if blocks:
            _attend_by_blocks(blocks, *rows, out, sums, scale)
        out = out.to(query.dtype)
        ctx.save_for_backward(*rows, out, sums)
        ctx.short, ctx.blocks, ctx.scale = short, blocks, scale
        return out

    @staticmethod
    def backward(ctx, gradient):
        rows = ctx.saved_tensors
        gradients = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in rows[:3]]
        for trees in ctx.short:
            for whole, found in zip(gradients, trees.attend_backward(gradient, *rows, ctx.scale), strict=True):
                whole[:, :, trees.tokens.span] = found
        if ctx.blocks:
            _look_back_by_blocks(ctx.blocks, gradient, rows, gradients, ctx.scale)
        return *(x.to(gradient.dtype) for x in gradients), *[None] * 5


def _attend_by_blocks(blocks: list[Block], query, key, value, kept_key, kept_value, out, sums, scale: float) -> None:
    """Write the result and the log-sum-exps of the blocks' queries to ``out`` (0 before) and ``sums`` (``LOWEST`` before)."""
    q, own, kept = _grouped(query, key), (key[0], value[0]), (kept_key, kept_value)
    out, sums = (x[0].unflatten(0, q.shape[:2]) for x in (out, sums))
    scratch = Scratch(q.device)
    for block in blocks:
        found, found_sums = _look(block, q, *(kept if block.kept else own), scale, scratch)
        here, here_sums = out[:, :, block.queries], sums[:, :, block.queries]
        merged = torch.logaddexp(here_sums, found_sums)
        here.mul_((here_sums - merged).exp().unsqueeze(-1))
        here.add_(found.mul_((found_sums - merged).exp().unsqueeze(-1)))
        here_sums.copy_(merged)
    for block in (block for block in blocks if block.of_attention):
        _add_attention(block, q, kept_key, sums, scale, scratch)


def _look_back_by_blocks(blocks: list[Block], gradient, rows: Sequence, gradients, scale: float) -> None:
    """Add the blocks' parts to ``gradients`` (fp32, like query, key and value), and to the gates' tables.

    ``rows``: what the forward saved.
    """
    query, key, value, kept_key, kept_value, out, sums = rows
    q, g, o = (_grouped(x, key) for x in (query, gradient, out))
    sums, dq = (x[0].unflatten(0, q.shape[:2]) for x in (sums, gradients[0]))
    dk, dv = (x[0] for x in gradients[1:])
    delta = (g.float() * o).sum(-1)
    scratch = Scratch(q.device), Scratch(q.device)
    for block in blocks:
        if block.plain and not block.kept and block.table is None and not q.is_cuda:
            _look_back_at_once(block, q, key[0], value[0], g, o, sums, (dq, dk, dv), scale)
        elif block.kept:
            _look_back(block, q, kept_key, kept_value, g, sums, delta, dq, None, scale, scratch)
        else:
            _look_back(block, q, key[0], value[0], g, sums, delta, dq, (dk, dv), scale, scratch)


def _grouped(x: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """[1, heads, n, d] -> [groups, heads of a group, n, d], contiguous."""
    return x[0].unflatten(0, (key.size(1), -1)).contiguous()


def _look(block: Block, q, key, value, scale: float, scratch: Scratch) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 (result [groups, r, n, d], log-sum-exp [groups, r, n]) of the block's n queries over its keys alone."""
    if block.plain and not q.is_cuda:
        pieces = [
            attend(q[:, :, queries], key[:, None, keys], value[:, None, keys], 0.0, block.causal, scale=scale)
            for queries, keys in _pieces(block)
        ]
        out, sums = (torch.cat(found, dim=2) for found in zip(*pieces, strict=True))
        return out.float(), sums
    q, k, v = _batched(block, q[:, :, block.queries]), _keys(block, key), _keys(block, value)
    out, sums = (torch.empty(shape, dtype=torch.float32, device=q.device) for shape in (q.shape, q.shape[:3]))
    for batch, rows, keys in _chunks(block, q, k):
        scores = _scores(block, q, k, batch, rows, keys, scale, scratch)
        # nothing but -inf where a query sees none of these keys: its result is 0
        highest = scores.amax(-1, keepdim=True).clamp_(min=LOWEST)
        scores.sub_(highest).exp_()
        total = scores.sum(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
        found = fp32_product(scores.flatten(1, 2).to(v.dtype), v[batch, keys]).view(*scores.shape[:3], -1)
        out[batch, :, rows] = found.div_(total)
        sums[batch, :, rows] = total.log_().add_(highest).clamp_(min=LOWEST).squeeze(-1)
    return _unbatched(block, out), _unbatched(block, sums)


def _add_attention(block: Block, q, key, sums, scale: float, scratch: Scratch) -> None:
    """Add to the table the probabilities that the block's queries, by their shares, give its columns, summed over heads."""
    q, sums, k = q[:, :, block.queries], sums[:, :, block.queries], _keys(block, key)
    for batch, rows, keys in _chunks(block, q, k):
        p = _scores(block, q, k, batch, rows, keys, scale, scratch).sub_(sums[batch, :, rows].unsqueeze(-1)).exp_()
        block.table.add_(block.shares[:, rows] @ p[..., block.columns].sum((0, 1)))


def _look_back(block: Block, q, key, value, g, sums, delta, dq, of_keys, scale: float, scratch) -> None:
    """Add the block's part to ``dq`` (fp32, like ``q``), to ``of_keys`` (dk, dv) unless None, and to the gates' table."""
    queries = block.queries
    q, g, sums, delta = (_batched(block, x[:, :, queries]) for x in (q, g, sums, delta))
    k, v = _keys(block, key), _keys(block, value)
    if block.branches is not None:
        real = block.branches.real.repeat_interleave(key.size(0), 0)[:, None]
        g, delta = g * real.unsqueeze(-1), delta * real  # padding is no query
    block_dq = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    if of_keys is not None:
        block_dk, block_dv = (torch.zeros(k.shape, dtype=torch.float32, device=k.device) for _ in range(2))
    gates = _GateSums(block, q)
    for batch, rows, keys in _chunks(block, q, k):
        scores = _scores(block, q, k, batch, rows, keys, scale, scratch[0])
        p = scores.sub_(sums[batch, :, rows].unsqueeze(-1)).exp_()
        g_rows = g[batch, :, rows].flatten(1, 2)
        ds = fp32_product(g_rows, v[batch, keys].mT, scratch[1]).view_as(p)
        ds.sub_(delta[batch, :, rows].unsqueeze(-1)).mul_(p)
        flat = ds.flatten(1, 2).to(k.dtype)
        block_dq[batch, :, rows] = fp32_product(flat, k[batch, keys]).mul_(scale).view(*ds.shape[:3], -1)
        if of_keys is not None:
            block_dk[batch, keys] += fp32_product(flat.mT, q[batch, :, rows].flatten(1, 2)).mul_(scale)
            block_dv[batch, keys] += fp32_product(p.flatten(1, 2).to(g.dtype).mT, g_rows)
        gates.add(ds, batch, rows)
    dq[:, :, queries] += _unbatched(block, block_dq)
    if of_keys is not None:
        for whole, part in zip(of_keys, (block_dk, block_dv), strict=True):
            whole[:, block.keys] += _unbatched(block, part.unsqueeze(1)).squeeze(1)
    gates.finish()


def _look_back_at_once(block: Block, q, key, value, g, out, sums, gradients, scale: float) -> None:
    """``_look_back`` of branches over themselves without gates, by torch's fused kernel for the CPU."""
    dq, dk, dv = gradients
    for at, _ in _pieces(block):
        tensors = g[:, :, at], q[:, :, at], key[:, None, at], value[:, None, at], out[:, :, at], sums[:, :, at]
        found_q, found_k, found_v = attend_backward(*tensors, 0.0, block.causal, scale=scale)
        dq[:, :, at] += found_q
        dk[:, at] += found_k.squeeze(1)
        dv[:, at] += found_v.squeeze(1)


def _pieces(block: Block) -> list[tuple[slice, slice]]:
    """(queries, keys) in their rows, of each branch over itself or of the whole block."""
    if block.branches is None:
        return [(block.queries, block.keys)]
    ends = [block.queries.start, *(block.queries.start + end for end in accumulate(block.branches.lengths))]
    return [(slice(low, high), slice(low, high)) for low, high in pairwise(ends)]


class _GateSums:
    """The column sums of a block's dS over its gated queries, added to the table when the block is done."""

    def __init__(self, block: Block, q: torch.Tensor):
        self.block, (batch, _, n) = block, q.shape[:3]
        if block.table is not None:
            rows = n if block.branches is None else batch
            self._sums = torch.zeros(rows, block.table.size(1), dtype=torch.float32, device=q.device)

    def add(self, ds: torch.Tensor, batch: slice, rows: slice) -> None:
        """``ds`` fp32 [batch, r, rows, keys]; keys after the last of the chunk have no part in it."""
        block = self.block
        if block.table is None:
            return
        ds = ds[..., block.columns]
        columns = slice(0, ds.size(-1))
        if block.gated is not None:
            ds = ds * block.gated[rows, columns]
        if block.branches is None:
            self._sums[rows, columns] += ds.sum((0, 1))
        else:
            self._sums[batch, columns] += ds.sum((1, 2))

    def finish(self) -> None:
        block = self.block
        if block.table is None:
            return
        sums = self._sums
        if block.branches is not None:
            sums = sums.unflatten(0, (block.shares.size(1), -1)).sum(1)
        block.table.add_(block.shares @ sums)


def _chunks(block: Block, q: torch.Tensor, k: torch.Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """(rows of the batch, queries, keys) of a bounded number of scores each; ``q`` [batch, r, n, d], ``k`` [batch, keys, d]."""
    batch, r, n = q.shape[:3]
    limit = scores_at_once(on_cpu=not q.is_cuda)
    rows = max(1, min(n, limit // max(1, r * k.size(1))))
    rows = -(-n // -(-n // rows))  # as even as can be
    together = max(1, limit // max(1, r * n * k.size(1))) if rows == n else 1
    for first in range(0, batch, together):
        for low in range(0, n, rows):
            high = min(low + rows, n)
            seen = min(high, k.size(1)) if block.causal else k.size(1)
            yield slice(first, first + together), slice(low, high), slice(0, seen)


def _scores(block: Block, q, k, batch: slice, rows: slice, keys: slice, scale: float, scratch: Scratch) -> torch.Tensor:
    """fp32 [batch, r, rows, keys], in ``scratch``: scaled, masked, gated."""
    some = q[batch, :, rows]
    scores = fp32_product(some.flatten(1, 2), k[batch, keys].mT, scratch).view(*some.shape[:3], -1).mul_(scale)
    if block.mask is not None:
        scores.add_(block.mask[rows, keys])
    if block.log_level is not None:
        columns = scores[..., block.columns]
        if block.branches is None:
            level = block.log_level[:, :, rows]
        else:
            level = block.log_level.repeat_interleave(q.size(0) // block.log_level.size(0), 0)[batch]
        columns.add_(level if block.gated is None else level * block.gated[rows, : columns.size(-1)])
    return scores


def fp32_product(a: torch.Tensor, b: torch.Tensor, scratch: Scratch | None = None) -> torch.Tensor:
    """a @ b [batch, n, m], summed up and returned in fp32 whatever the factors are, in the memory of ``scratch`` if given."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    out = None if scratch is None else scratch.take(a.size(0), a.size(1), b.size(2))
    return torch.bmm(a.float(), b.float(), out=out)


def _keys(block: Block, x: torch.Tensor) -> torch.Tensor:
    """The block's keys (or values) of [groups, S, d]: [batch, n, d]."""
    return _batched(block, x[:, None, block.keys]).squeeze(1)


def _batched(block: Block, x: torch.Tensor) -> torch.Tensor:
    """[groups, r, n, ...] as it is, or taken apart into [branches * groups, r, longest, ...]."""
    if block.branches is None:
        return x
    return block.branches.batch(x.flatten(0, 1).unsqueeze(0)).unflatten(1, x.shape[:2]).flatten(0, 1)


def _unbatched(block: Block, x: torch.Tensor) -> torch.Tensor:
    """The inverse of ``_batched``."""
    if block.branches is None:
        return x
    apart = x.unflatten(0, (block.branches.rows.size(0), -1))  # [branches, groups, r, longest, ...]
    return block.branches.flat(apart.flatten(1, 2))[0].unflatten(0, apart.shape[1:3])
