"""Attention over a packed row of trees: a prefix seen by several branches that do not see each other.

A row is described by its *structure*, int32 [3, S] on the CPU: for every position the number of its tree (-1: padding, at
the row's end: its result is of no use, and 0 on a CPU), its branch
(0: the tree's prefix, 1..: the branches that follow it) and its position within the sequence prefix + branch, as rotary
embedding counts it. It is passed as the ``attention_mask`` of a model because a tensor passes through activation
recompute. It stays on the CPU so that every layer can look up what was made from it once, without waiting for a GPU.

Context parallelism: of C ranks, rank r has the row's positions r, r + C, r + 2 C, ... For any trees in a row, each rank
then computes nearly the same number of scores. Queries stay where they are, keys and values are gathered.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from g2r_megatron.model.branch_attention import Runs, TreeAttention
from g2r_megatron.model.suffix_attention import suffix_attention
from g2r_megatron.model.suffix_rows import find_row

FLEX_COMPILATIONS = 64  # of FlexAttention in one process: policy, judge and reference together
PADDING = -1
KEPT_ROWS = 4  # micro-batches whose masks are kept: those that a pipeline stage has in flight


def row_structure(trees: Sequence[tuple[int, Sequence[int]]], length: int) -> torch.Tensor:
    """The structure, int32 [3, length] on the CPU, of a row of trees, each (tokens of its prefix, tokens of each branch).

    A sequence on its own is a prefix without branches. The rest of the row after the trees is padding, which sees itself
    causally where leaving it out would be no faster.
    """
    numbers, branches, positions = [], [], []
    for number, (prefix, its_branches) in enumerate(trees):
        numbers += [number] * (prefix + sum(its_branches))
        branches += [0] * prefix
        positions += range(prefix)
        for branch, tokens in enumerate(its_branches, 1):
            branches += [branch] * tokens
            positions += range(prefix, prefix + tokens)
    rest = length - len(numbers)
    rows = [numbers + [PADDING] * rest, branches + [0] * rest, positions + list(range(rest))]
    return torch.tensor(rows, dtype=torch.int32)


def sequence_lengths(structure: torch.Tensor) -> tuple[int, ...] | None:
    """Tokens of each sequence, padding included, of a row whose trees have no branches; None of another one."""
    return _sequence_lengths(structure.numpy().tobytes()) if structure.size(0) == 3 else None


@lru_cache(maxsize=KEPT_ROWS)
def _sequence_lengths(structure: bytes) -> tuple[int, ...] | None:
    trees, branches, _ = torch.frombuffer(bytearray(structure), dtype=torch.int32).view(3, -1)
    return None if branches.any() else tuple(torch.unique_consecutive(trees, return_counts=True)[1].tolist())


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


def row_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    structure: torch.Tensor,
    window: int | None,
    scale: float | None,
    cp_group: torch.distributed.ProcessGroup,
    layer: int,
) -> torch.Tensor:
    """Core attention of ``layer`` over this context parallel rank's positions of a row (collective over ``cp_group``).

    ``query`` [S/C, 1, np, d], ``key``/``value`` [S/C, 1, ng, d] -> [S/C, 1, np * d]; ``structure`` is the row's: [3, S]; with
    a fourth line, whose first number is that of the ``KeptKeys`` that keep keys and values; or [1, S], the number of a
    ``SuffixRow``.
    """
    if cp_group.size() > 1:
        both = gather_positions(torch.cat([key, value], dim=-1), cp_group)
        key, value = both.split([key.size(-1), value.size(-1)], dim=-1)
    q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    share = cp_group.rank(), cp_group.size()
    if structure.size(0) == 1:
        row = find_row(int(structure[0, 0]))
        context = suffix_attention(q, k, v, row, layer, window, scale, share)
    else:
        if structure.size(0) > 3:
            kept = find_row(int(structure[3, 0]))
            kept.put(layer, k, v)
            if layer == kept.last_layer:
                return torch.zeros_like(query).flatten(2)
        context = tree_attention(q, k, v, structure[:3], window, scale, share)
    return context.permute(2, 0, 1, 3).flatten(2)


def gather_positions(x: torch.Tensor, cp_group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """[S/C, ...] of every context parallel rank -> [S, ...] in the order of the row.

    Backward: every rank's gradients of a position are summed on the rank that has it.
    """
    by_rank = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=cp_group)
    return by_rank.unflatten(0, (cp_group.size(), x.size(0))).transpose(0, 1).flatten(0, 1)


def tree_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    structure: torch.Tensor,
    window: int | None,
    scale: float | None,
    share: tuple[int, int] = (0, 1),
) -> torch.Tensor:
    """Attention of a row by ``sees``: ``query`` [1, heads, q, d], ``key``/``value`` [1, groups, S, d] -> [1, heads, q, d].

    ``share`` (r, C): the queries are the row's positions r, r + C, ...; by default all of them. Equals attention over
    each (prefix + branch) on its own. Differentiable.
    """
    queries = (query.size(0), query.size(2) * share[1])
    if queries != (1, key.size(2)) or structure.shape != (3, key.size(2)):
        raise ValueError(
            f"structure {tuple(structure.shape)} does not describe queries {tuple(query.shape)} of {share}"
        )
    if query.is_cuda:
        return _flex(query, key, value, structure, window, scale, share)
    rows = structure.numpy().tobytes()
    return _tree_by_tree(query, key, value, _tree_masks(rows, window, query.dtype, share), scale)


# CPU: each tree on its own, so that a row of many trees does not pay for S x S scores.


@dataclass(frozen=True)
class TreeMask:
    """Of one tree: tokens of its prefix and of all its branches, how many are queries here, and what those may see.

    The masks are added to the scores: ``prefix_mask`` [prefix queries, prefix], None for a causal one; ``branch_mask``
    [branch queries, prefix + branches]. If all positions are queries and no window is narrower than the tree, the only
    mask is ``apart``. ``count``: so many trees without branches, each like this one, follow one another.
    """

    prefix: int
    branches: int
    queries: tuple[int, int]  # in the prefix, in the branches
    prefix_mask: torch.Tensor | None
    branch_mask: torch.Tensor | None
    apart: Runs | None = None
    count: int = 1


@lru_cache(maxsize=KEPT_ROWS)
def _tree_masks(
    structure: bytes, window: int | None, dtype: torch.dtype, share: tuple[int, int]
) -> tuple[TreeMask, ...]:
    """The row's trees in order, without the padding. Made once a row, not once a layer: autograd would keep each layer's copy."""
    first, step = share
    rows = torch.frombuffer(bytearray(structure), dtype=torch.int32).view(3, -1)
    masks: list[TreeMask] = []
    start = 0
    for number, length in zip(
        *(x.tolist() for x in torch.unique_consecutive(rows[0], return_counts=True)), strict=True
    ):
        if number == PADDING:
            break
        tree = rows[:, start : start + length]
        prefix = int((tree[1] == 0).sum())
        at = torch.arange(length)
        asking = at[(start + at) % step == first]
        in_prefix, in_branches = asking[asking < prefix], asking[asking >= prefix]
        start += length
        if step == 1 and masks and prefix == length == masks[-1].prefix and not masks[-1].branches:
            masks[-1] = replace(masks[-1], count=masks[-1].count + 1)
            continue
        if step == 1 and prefix < length and (window is None or int(tree[2].max()) <= window):
            lengths = torch.unique_consecutive(tree[1, prefix:], return_counts=True)[1].tolist()
            sizes = prefix, length - prefix
            masks.append(TreeMask(*sizes, sizes, None, None, Runs.of(prefix, lengths)))
            continue

        def added(queries: torch.Tensor, keys: torch.Tensor, tree: torch.Tensor = tree) -> torch.Tensor:
            seen = sees(tree, queries[:, None], keys[None, :], window)
            return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))

        causal = step == 1 and (window is None or prefix <= window + 1)
        masks.append(
            TreeMask(
                prefix,
                length - prefix,
                (len(in_prefix), len(in_branches)),
                None if causal else added(in_prefix, at[:prefix]),
                added(in_branches, at) if len(in_branches) else None,
            )
        )
    return tuple(masks)


def _tree_by_tree(query, key, value, trees: tuple[TreeMask, ...], scale: float | None) -> torch.Tensor:
    gqa = query.size(1) != key.size(1)
    asking = [tree.count * sum(tree.queries) for tree in trees]
    lengths = [tree.count * (tree.prefix + tree.branches) for tree in trees]
    out, padding = [], query.size(2) - sum(asking)
    some, seen = query[:, :, : sum(asking)], slice(0, sum(lengths))
    split = some.split(asking, dim=2), key[:, :, seen].split(lengths, dim=2), value[:, :, seen].split(lengths, dim=2)
    for tree, q, k, v in zip(trees, *split, strict=True):
        if tree.apart is not None:
            out.append(TreeAttention.apply(q, k, v, tree.apart, scale))
            continue
        if tree.count > 1:
            out.append(_as_batch(q, k, v, tree, scale))
            continue
        q_prefix, q_branches = q.split(tree.queries, dim=2)
        k_prefix, v_prefix = (k, v) if not tree.branches else (k[:, :, : tree.prefix], v[:, :, : tree.prefix])
        mask = tree.prefix_mask
        if q_prefix.size(2):
            out.append(
                F.scaled_dot_product_attention(
                    q_prefix, k_prefix, v_prefix, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa
                )
            )
        if q_branches.size(2):
            out.append(
                F.scaled_dot_product_attention(
                    q_branches, k, v, attn_mask=tree.branch_mask, scale=scale, enable_gqa=gqa
                )
            )
    if not trees:
        return query * 0.0  # padding alone; recompute needs a result that has a gradient
    return torch.cat([*out, torch.zeros_like(query[:, :, :padding])], dim=2)


def _as_batch(query, key, value, tree: TreeMask, scale: float | None) -> torch.Tensor:
    """Attention of ``tree.count`` sequences of one length in one call, [1, heads, count * length, d]."""
    q, k, v = (x.unflatten(2, (tree.count, -1)).squeeze(0).transpose(0, 1) for x in (query, key, value))
    mask, gqa = tree.prefix_mask, q.size(1) != k.size(1)
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa)
    return found.transpose(0, 1).flatten(1, 2).unsqueeze(0)


# GPU: one FlexAttention call a row, which skips the blocks that no query sees. Always by its general kernel: the one for
# decoding, which torch takes for rows of fewer than 128 positions, refuses 65 of them with grouped queries.
KERNEL = {"BACKEND": "TRITON"}


@lru_cache(maxsize=KEPT_ROWS)
def _block_mask(structure: bytes, window: int | None, device: torch.device, share: tuple[int, int]) -> BlockMask:
    rows = torch.frombuffer(bytearray(structure), dtype=torch.int32).view(3, -1).to(device)
    (first, step), length = share, rows.size(1)

    def mask(b, h, q, k):
        return sees(rows, q * step + first, k, window)

    return create_block_mask(mask, None, None, length // step, length, device=device)


@lru_cache(maxsize=1)
def _compiled_flex():
    """Compiled once for each head size and kind of window, with and without gradients, for all rows.

    (A row of a single block of 128 is one more.) Beyond its limit of compilations torch would run the plain form, which
    builds all scores: with ``fullgraph`` that is an error. Without duck shapes sizes that happen to be equal, such as 32
    heads and 32 blocks, are not taken to be equal always.
    """
    torch.fx.experimental._config.use_duck_shape = False
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, FLEX_COMPILATIONS)
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _flex(query, key, value, structure: torch.Tensor, window: int | None, scale: float | None, share=(0, 1)):
    """The same by FlexAttention; on the CPU (tests) its plain form, which builds all scores."""
    mask = _block_mask(structure.numpy().tobytes(), window, query.device, share)
    attend = _compiled_flex() if query.is_cuda else flex_attention
    gqa = query.size(1) != key.size(1)
    return attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=gqa, kernel_options=KERNEL)
