"""Attention over a packed row of trees: a prefix seen by several branches that do not see each other.

A row is described by its *structure*, int32 [3, S] on the CPU: for every position the number of its tree, its branch
(0: the tree's prefix, 1..: the branches that follow it) and its position within the sequence prefix + branch, as rotary
embedding counts it. It travels as the ``attention_mask`` of a model because a tensor passes through activation
recompute; it stays on the CPU so that every layer can look up what was made of it once, without waiting for a GPU.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from g2r_megatron.model.branch_attention import Branches, TreeAttention

KEPT_ROWS = 4  # micro-batches whose masks are kept: those that a pipeline stage has in flight


def sees(structure: torch.Tensor, query: torch.Tensor, key: torch.Tensor, window: int | None) -> torch.Tensor:
    """Whether row position ``query`` attends to row position ``key`` (integer tensors that broadcast): bool.

    A prefix sees itself causally, a branch its prefix and itself causally; ``window``: at most so many positions back.
    """
    tree, branch, position = structure[0], structure[1], structure[2]
    seen = (
        (tree[query] == tree[key])
        & ((branch[key] == 0) | (branch[key] == branch[query]))
        & (position[key] <= position[query])
    )
    if window is not None:
        seen = seen & (position[query] - position[key] <= window)
    return seen


def tree_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    structure: torch.Tensor,
    window: int | None,
    scale: float | None,
) -> torch.Tensor:
    """Attention of a row by ``sees``: ``query`` [1, heads, S, d], ``key``/``value`` [1, groups, S, d] -> [1, heads, S, d].

    Equals attention over each (prefix + branch) on its own. Differentiable.
    """
    if query.size(0) != 1 or structure.shape != (3, query.size(2)):
        raise ValueError(f"structure {tuple(structure.shape)} does not describe a row of shape {tuple(query.shape)}")
    if query.is_cuda:
        return _flex(query, key, value, structure, window, scale)
    rows = structure.numpy().tobytes()
    return _tree_by_tree(query, key, value, _tree_masks(rows, window, query.dtype), scale)


# CPU: each tree on its own, so that a row of many trees does not pay for S x S scores.


@dataclass(frozen=True)
class TreeMask:
    """Of one tree: tokens of its prefix and of all its branches, and what each of them may see.

    The masks are added to the scores: ``prefix_mask`` [prefix, prefix], None for a causal one; ``branch_mask``
    [branches, prefix + branches]. Where no window is narrower than the tree there are no masks, but ``apart``.
    """

    prefix: int
    branches: int
    prefix_mask: torch.Tensor | None
    branch_mask: torch.Tensor | None
    apart: Branches | None = None


@lru_cache(maxsize=KEPT_ROWS)
def _tree_masks(structure: bytes, window: int | None, dtype: torch.dtype) -> tuple[TreeMask, ...]:
    """The row's trees in order. Made once a row, not once a layer: autograd would keep each layer's copy."""
    rows = torch.frombuffer(bytearray(structure), dtype=torch.int32).view(3, -1)
    masks, start = [], 0
    for length in torch.unique_consecutive(rows[0], return_counts=True)[1].tolist():
        tree = rows[:, start : start + length]
        prefix = int((tree[1] == 0).sum())
        at = torch.arange(length)
        start += length
        if prefix < length and (window is None or int(tree[2].max()) <= window):
            lengths = torch.unique_consecutive(tree[1, prefix:], return_counts=True)[1].tolist()
            masks.append(TreeMask(prefix, length - prefix, None, None, Branches.of(prefix, lengths)))
            continue

        def added(queries: torch.Tensor, keys: torch.Tensor, tree: torch.Tensor = tree) -> torch.Tensor:
            seen = sees(tree, queries[:, None], keys[None, :], window)
            return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))

        narrow = window is not None and prefix > window + 1
        masks.append(
            TreeMask(
                prefix,
                length - prefix,
                added(at[:prefix], at[:prefix]) if narrow else None,
                added(at[prefix:], at) if length > prefix else None,
            )
        )
    return tuple(masks)


def _tree_by_tree(query, key, value, trees: tuple[TreeMask, ...], scale: float | None) -> torch.Tensor:
    gqa = query.size(1) != key.size(1)
    lengths = [tree.prefix + tree.branches for tree in trees]
    out = []
    for tree, q, k, v in zip(trees, *(x.split(lengths, dim=2) for x in (query, key, value)), strict=True):
        if tree.apart is not None:
            out.append(TreeAttention.apply(q, k, v, tree.apart, scale))
            continue
        q_prefix, q_branches = q.split([tree.prefix, tree.branches], dim=2)
        k_prefix, v_prefix = (k, v) if not tree.branches else (k[:, :, : tree.prefix], v[:, :, : tree.prefix])
        mask = tree.prefix_mask
        out.append(
            F.scaled_dot_product_attention(
                q_prefix, k_prefix, v_prefix, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa
            )
        )
        if tree.branches:
            out.append(
                F.scaled_dot_product_attention(
                    q_branches, k, v, attn_mask=tree.branch_mask, scale=scale, enable_gqa=gqa
                )
            )
    return torch.cat(out, dim=2)


# GPU: one FlexAttention call a row, which skips the blocks that nobody sees.


@lru_cache(maxsize=KEPT_ROWS)
def _block_mask(structure: bytes, window: int | None, device: torch.device) -> BlockMask:
    rows = torch.frombuffer(bytearray(structure), dtype=torch.int32).view(3, -1).to(device)
    length = rows.size(1)
    return create_block_mask(lambda b, h, q, k: sees(rows, q, k, window), None, None, length, length, device=device)


@lru_cache(maxsize=1)
def _compiled_flex():
    return torch.compile(flex_attention, dynamic=True)


def _flex(query, key, value, structure: torch.Tensor, window: int | None, scale: float | None) -> torch.Tensor:
    """The same by FlexAttention; on the CPU (tests) its plain form, which builds all scores."""
    mask = _block_mask(structure.numpy().tobytes(), window, query.device)
    attend = _compiled_flex() if query.is_cuda else flex_attention
    return attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=query.size(1) != key.size(1))
