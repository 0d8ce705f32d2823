"""Attention of suffix rows equals attention under a float mask that autograd differentiates, gates included.

The reference builds all scores of a tree with log m as a leaf for every (branch, response token). Leaves out the model around
it (tests/parity/test_parity_gates.py) and GPU types but bf16's products, which have a case of their own.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from g2r_megatron.model import short_trees
from g2r_megatron.model import suffix_attention as attention_module
from g2r_megatron.model.suffix_attention import suffix_attention
from g2r_megatron.model.suffix_rows import KeptKeys, Part, SuffixRow, SuffixTree

HEADS, GROUPS, DIM = 4, 2, 8
PADDING = 3


@dataclass(frozen=True)
class Case:
    """One tree over a prefix of ``prefix`` tokens; ``response``: the positions of the gated tokens."""

    prefix: int
    branches: list[Part]
    response: tuple[int, int]
    trunk: Part | None = None
    window: int | None = None


def branch(length: int, first: int, slot: int = 0, visible: int | None = None, level: float = 1.0) -> Part:
    return Part(length, first, first if visible is None else visible, level, 1 / level, slot)


CASES = {
    "branches": Case(9, [branch(3, 9, 0), branch(5, 9, 1), branch(1, 9, 2)], (4, 9)),
    "one branch": Case(9, [branch(3, 9)], (4, 9)),
    "levels": Case(9, [branch(3, 9, 0), branch(3, 9, 0, level=0.5), branch(4, 9, 1, level=0.1)], (4, 9)),
    "window": Case(9, [branch(3, 9, 0), branch(7, 9, 1)], (4, 9), window=4),
    "window that hides the prefix": Case(9, [branch(30, 9, 0)], (4, 9), window=4),
    "response in the branches": Case(4, [branch(8, 4, 0, level=0.5), branch(9, 4, 1)], (4, 9)),
    "response in a window": Case(4, [branch(8, 4, 0), branch(9, 4, 1)], (4, 9), window=3),
    "trunk": Case(4, [branch(3, 9, visible=4), branch(2, 9, visible=4)], (4, 9), trunk=branch(5, 4)),
    "trunk at a level": Case(
        4,
        [branch(3, 9, visible=4, level=0.3), branch(2, 9, visible=4, level=0.3)],
        (4, 9),
        trunk=branch(5, 4, level=0.3),
    ),
    "suffixes that see less": Case(9, [branch(3, 9, 0, visible=5), branch(6, 7, 1, visible=3)], (2, 5)),
    "no prefix": Case(0, [branch(3, 0, 0), branch(5, 0, 1)], (0, 2)),
}


def reference(case: Case, q, k, v, kept_k, kept_v, gates):
    """[heads, n, d] of one tree; ``gates`` [slots, T] of m, which autograd may differentiate."""
    parts = ([case.trunk] if case.trunk else []) + case.branches
    of = torch.cat([torch.full((part.length,), i) for i, part in enumerate(parts)])
    at = torch.cat([torch.arange(part.first, part.first + part.length) for part in parts])
    visible = torch.tensor([part.visible for part in parts])[of]
    key_at = torch.cat([torch.arange(case.prefix), at])
    key_of = torch.cat([torch.full((case.prefix,), -1), of])
    trunk = 0 if case.trunk else -2
    seen = torch.where(
        key_of == -1, key_at < visible[:, None], ((key_of == of[:, None]) | (key_of == trunk)) & (key_at <= at[:, None])
    )
    if case.window is not None:
        seen = seen & (at[:, None] - key_at <= case.window)
    first, last = case.response
    response = (key_at >= first) & (key_at < last)
    own = (key_of == of[:, None]) & (key_at == at[:, None])
    rows = torch.arange(len(parts))[of]
    logs = gates.log()[rows][:, (key_at - first).clamp(0, last - first - 1)]
    bias = torch.where(response & ~own, logs, 0.0).masked_fill(~seen, float("-inf"))
    keys, values = (
        torch.cat([kept, x], 1).repeat_interleave(HEADS // GROUPS, 0) for kept, x in ((kept_k, k), (kept_v, v))
    )
    return (q @ keys.mT * DIM**-0.5 + bias).softmax(-1) @ values


def numbers(case: Case, dtype=torch.float64):
    tokens = sum(part.length for part in case.branches) + (case.trunk.length if case.trunk else 0)
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    q, g = random(HEADS, tokens, DIM), random(HEADS, tokens, DIM)
    return q, *(random(GROUPS, tokens, DIM) for _ in range(2)), *(random(GROUPS, case.prefix, DIM) for _ in range(2)), g


def expected(case: Case):
    """(result, gradients of q, k, v, the table [slots, T]) in fp64."""
    q, k, v, kept_k, kept_v, g = numbers(case)
    parts = ([case.trunk] if case.trunk else []) + case.branches
    leaves = [x.requires_grad_() for x in (q, k, v)]
    length = case.response[1] - case.response[0]
    gates = (
        torch.tensor([part.level for part in parts], dtype=torch.float64)[:, None].repeat(1, length).requires_grad_()
    )
    out = reference(case, *leaves, kept_k, kept_v, gates)
    (out * g).sum().backward()
    slots = max(part.slot for part in parts) + 1
    # share 1 / m of dF / d log m is dF / dm
    table = torch.zeros(slots, length, dtype=torch.float64)
    for i, part in enumerate(parts):
        table[part.slot] += gates.grad[i]
    return out.detach(), *(x.grad for x in leaves), table


def found(case: Case, ranks: int = 1, dtype=torch.float32):
    """The same by ``suffix_attention``, two trees in a row with padding; context parallel ranks one after the other."""
    q, k, v, kept_k, kept_v, g = numbers(case, dtype)
    parts = ([case.trunk] if case.trunk else []) + case.branches
    tokens = q.size(1)
    length = -(-(2 * tokens + PADDING) // ranks) * ranks
    slots, columns = max(part.slot for part in parts) + 1, case.response[1] - case.response[0]
    tables = torch.zeros(2, slots, columns)
    kept = KeptKeys(users=ranks, again=False)
    kept.put(1, *(torch.cat([x, x], 1)[None] for x in (kept_k, kept_v)))
    trees = [
        SuffixTree(number * case.prefix, case.trunk, case.branches, case.response, tables[number]) for number in (0, 1)
    ]
    row = SuffixRow(trees, kept)

    def whole(x):
        return torch.cat([x, x, torch.ones(x.size(0), length - 2 * tokens, DIM, dtype=dtype)], 1)[None]

    query, key, value = (whole(x).requires_grad_() for x in (q, k, v))
    gradient = whole(g)
    out = torch.empty_like(query)
    for rank in range(ranks):
        part = suffix_attention(query[:, :, rank::ranks], key, value, row, 1, case.window, None, (rank, ranks))
        (part * gradient[:, :, rank::ranks]).sum().backward()
        out.data[:, :, rank::ranks] = part.data
    results = [x[0, :, :tokens] for x in (out.detach(), query.grad, key.grad, value.grad)]
    again = [x[0, :, tokens : 2 * tokens] for x in (out.detach(), query.grad, key.grad, value.grad)]
    for a, b in zip([*results, tables[0]], [*again, tables[1]]):
        torch.testing.assert_close(a, b)
    assert not kept._layers  # nobody will ask for them again
    return *results, tables[0]


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_suffix_attention_equals_a_float_mask_under_autograd(monkeypatch, name, ranks, short):
    """Results, gradients and the gates' table; alone and as two context parallel ranks; short trees together or by blocks."""
    if not short:
        monkeypatch.setattr(short_trees, "SHORT_SCORES", 0)
    for a, b in zip(found(CASES[name], ranks), expected(CASES[name]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["branches", "levels", "response in the branches", "trunk", "window"])
def test_chunks_change_nothing_and_repeat_their_bits(monkeypatch, name):
    """One query at a time gives what all at once give; the same call gives the same bits."""
    whole = found(CASES[name])
    for a, b in zip(whole, found(CASES[name]), strict=True):
        assert torch.equal(a, b)
    monkeypatch.setattr(attention_module, "CPU_SCORES", 1)
    monkeypatch.setattr(short_trees, "SHORT_SCORES", 0)
    for a, b in zip(whole, found(CASES[name]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def tree_of(case: Case, prefix: int) -> SuffixTree:
    return SuffixTree(prefix, case.trunk, case.branches, case.response)


def test_which_trees_are_short():
    """Neighbours of nearly the same lengths are one batch. Trees with levels, a trunk, narrow windows or many scores are none."""
    short = [name for name, case in CASES.items() if short_trees.is_short(tree_of(case, 0), HEADS, case.window)]
    assert short == ["branches", "one branch"]
    assert not short_trees.is_short(tree_of(Case(400, [branch(300, 400)], (0, 400)), 0), HEADS, None)
    small, larger = CASES["branches"], Case(40, [branch(9, 40)], (30, 40))
    row = [(0, tree_of(small, 0)), (9, tree_of(small, 9)), (18, tree_of(larger, 18)), (27, tree_of(larger, 58))]
    row.append((40, tree_of(larger, 98)))  # something else is between it and the one before
    batches = short_trees.short_trees(row)
    assert [batch.tokens.lengths for batch in batches] == [[9, 9], [9, 9], [9]]
    assert [batch.prefixes.lengths for batch in batches] == [[9, 9], [40, 40], [40]]


def test_bf16_sums_are_taken_in_fp32():
    """The gates' table in bf16 is off by the rounding of its factors, not by that of a long sum."""
    case = Case(400, [branch(300, 400)], (0, 400))
    table, wanted = found(case, dtype=torch.bfloat16)[-1].double(), expected(case)[-1]
    assert (table - wanted).norm() <= 0.01 * wanted.norm()


def test_a_token_that_nothing_sees_has_no_gradient():
    """Response tokens behind the window of all that reads them: exactly 0."""
    table = found(replace(CASES["window"], window=2))[-1]
    assert (table[:, :2] == 0).all() and (table[:, -1] != 0).all()


def test_completeness_of_the_levels():
    """The mean of dF/dm over the levels (i + 1/2) / n sums up to F(response) - F(response hidden)."""
    case, n = CASES["branches"], 64
    q, k, v, kept_k, kept_v, g = numbers(case)

    def value(level: float) -> float:
        gates = torch.full((3, 5), level, dtype=torch.float64)
        return float((reference(case, q, k, v, kept_k, kept_v, gates) * g).sum())

    sums = 0.0
    for i in range(n):
        level = (i + 0.5) / n
        parts = [replace(part, level=level, share=1 / (n * level)) for part in case.branches]
        sums += float(found(replace(case, branches=parts))[-1].sum())
    assert sums == pytest.approx(value(1.0) - value(0.0), rel=0.01)
    assert math.isfinite(sums)
