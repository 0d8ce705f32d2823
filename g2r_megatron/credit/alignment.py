"""From the tokens of a judge that tokenizes in its own way to the tokens of the policy, by their places in the text.

What is moved is what adds up over the text of the response: alpha with ``judge.normalize=softmax``, b with ``positive``. A
judge token's value is shared among the policy's tokens in proportion to the bytes of text they have in common, so nothing
is lost and sum_t r_t = r still holds. Before a softmax b is not moved: there it is a score of one token, and half a token
has no half score.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Alignment:
    """A sparse matrix of judge tokens by policy tokens, whose rows sum to 1. n entries, in the order of the text."""

    judge_tokens: Tensor  # [n] int64
    policy_tokens: Tensor  # [n] int64
    shares: Tensor  # [n] fp64 in (0, 1]
    length: int  # policy tokens

    def move(self, values: Tensor) -> Tensor:
        """``values`` [judge tokens] -> [length] fp64 with the same sum; a policy token without text gets 0."""
        moved = values.double()[self.judge_tokens] * self.shares
        return torch.zeros(self.length, dtype=torch.float64).index_add_(0, self.policy_tokens, moved)


def align(judge: Tensor, policy: Tensor) -> Alignment:
    """The alignment of two tokenizations of one text, given as bounds (data/token_spans.py).

    A judge token without text of its own goes to the policy token that follows, at the end to the last one with text.
    Equal bounds give the identity. Raises ``ValueError`` for bounds of different texts.
    """
    if judge.numel() > 1 and judge[-1] != policy[-1]:
        raise ValueError(f"texts of {judge[-1]:g} and {policy[-1]:g} bytes")
    if judge.numel() == 1 or policy[-1] == 0:
        nothing = torch.zeros(0, dtype=torch.int64)
        return Alignment(nothing, nothing, nothing.double(), policy.numel() - 1)
    edges = torch.cat([judge, policy]).unique()  # between two of them there is one token on either side
    starts, widths = edges[:-1], edges.diff()
    rows = torch.searchsorted(judge, starts, right=True) - 1
    columns = torch.searchsorted(policy, starts, right=True) - 1
    shares = widths / judge.diff()[rows]
    empty = (judge.diff() == 0).nonzero()[:, 0]
    last = torch.searchsorted(policy, policy[-1]) - 1
    places = (torch.searchsorted(policy, judge[empty], right=True) - 1).clamp(max=last)
    rows, order = torch.cat([rows, empty]).sort(stable=True)
    columns, shares = torch.cat([columns, places])[order], torch.cat([shares, torch.ones(len(empty)).double()])[order]
    return Alignment(rows, columns, shares, policy.numel() - 1)
