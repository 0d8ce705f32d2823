"""Attention over one tree on the CPU. Only scores that count are computed: no masks, no scores between branches.

Branches attend to the prefix without a mask and to themselves causally, as rows of a batch; the two results are merged by
their log-sum-exps. The backward of each part, given the merged result, is its part of the whole backward: the
probabilities are exp(score - merged log-sum-exp) in either.
"""

from dataclasses import dataclass

import torch

attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True)
class Runs:
    """Runs of tokens, such as branches, that follow one another from position ``start`` on, as a batch padded to the longest.

    ``lengths``: tokens of each. ``rows`` int64 [runs, longest]: position of each token, padding repeating its run's last
    token; ``real`` bool of the same shape. ``back`` int64 [tokens]: from token to place in the flattened batch.
    """

    start: int
    lengths: list[int]
    rows: torch.Tensor
    real: torch.Tensor
    back: torch.Tensor

    @staticmethod
    def of(start: int, lengths: list[int], device: torch.device | None = None) -> "Runs":
        """Runs of these lengths."""
        sizes = torch.tensor(lengths)
        starts = start + sizes.cumsum(0) - sizes
        at = torch.arange(max(lengths))
        real = at < sizes[:, None]
        rows = starts[:, None] + torch.minimum(at, sizes[:, None] - 1)
        back = real.flatten().nonzero().squeeze(1)
        return Runs(start, lengths, rows.to(device), real.to(device), back.to(device))

    @property
    def span(self) -> slice:
        """Where they are in the row."""
        return slice(self.start, self.start + sum(self.lengths))

    def batch(self, x: torch.Tensor) -> torch.Tensor:
        """[1, heads, S, ...] of the whole row -> [runs, heads, longest, ...], one copy of whole rows."""
        heads, tokens = x.shape[1:3]
        at = self.rows[:, None] + torch.arange(heads, device=x.device)[:, None] * tokens
        return x.flatten(0, 2).index_select(0, at.flatten()).unflatten(0, at.shape)

    def flat(self, x: torch.Tensor) -> torch.Tensor:
        """[runs, heads, longest, ...] -> the runs' tokens [1, heads, tokens, ...]."""
        heads, longest = x.shape[1:3]
        run, offset = self.back // longest, self.back % longest
        at = run * heads * longest + torch.arange(heads, device=x.device)[:, None] * longest + offset
        return x.flatten(0, 2).index_select(0, at.flatten()).unflatten(0, at.shape).unsqueeze(0)


class TreeAttention(torch.autograd.Function):
    """``apply(query, key, value, branches, scale)``: [1, heads, S, d], twice [1, groups, S, d] -> [1, heads, S, d]."""

    @staticmethod
    def forward(ctx, query, key, value, branches: Runs, scale: float | None):
        p = branches.start
        q0, k0, v0 = (x[:, :, :p] for x in (query, key, value))
        out, sums = attend(q0, k0, v0, 0.0, True, scale=scale)
        to_prefix, prefix_sums = attend(query[:, :, p:], k0, v0, 0.0, False, scale=scale)
        own = [branches.batch(x) for x in (query, key, value)]
        to_self, self_sums = (branches.flat(x) for x in attend(*own, 0.0, True, scale=scale))
        merged = torch.logaddexp(prefix_sums, self_sums)
        to_prefix = to_prefix * (prefix_sums - merged).exp().unsqueeze(-1).to(query.dtype)
        to_self = to_self * (self_sums - merged).exp().unsqueeze(-1).to(query.dtype)
        out = torch.cat([out, to_prefix.add_(to_self)], dim=2)
        ctx.save_for_backward(query, key, value, out, torch.cat([sums, merged], dim=2))
        ctx.branches, ctx.scale = branches, scale
        return out

    @staticmethod
    def backward(ctx, gradient):
        branches, scale = ctx.branches, ctx.scale
        tensors = (gradient, *ctx.saved_tensors)
        before, behind = ([x[:, :, half] for x in tensors] for half in _halves(branches.start))
        _, _, k0, v0, _, _ = before
        g1, q1, _, _, o1, merged = behind
        dq0, dk0, dv0 = attend_backward(*before, 0.0, True, scale=scale)
        dq1, dk, dv = attend_backward(g1, q1, k0, v0, o1, merged, 0.0, False, scale=scale)
        dk0, dv0 = dk0.add_(dk), dv0.add_(dv)
        g, *others = (branches.batch(x) for x in tensors)
        g = g * branches.real[:, None, :, None]  # padding is no query
        own = attend_backward(g, *others, 0.0, True, scale=scale)
        dq, dk1, dv1 = (branches.flat(x) for x in own)
        halves = (dq0, dq1.add_(dq)), (dk0, dk1), (dv0, dv1)
        return *(torch.cat(pair, dim=2) for pair in halves), None, None


def _halves(prefix: int) -> tuple[slice, slice]:
    return slice(None, prefix), slice(prefix, None)
