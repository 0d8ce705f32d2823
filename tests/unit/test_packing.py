"""Trees, rows and their attention: what a token of a packed row sees is what it sees in its own sequence.

Random trees against the definition: every sequence on its own. FlexAttention is held to the same in its plain form on
the CPU. Leaves out the model around it (test_shared_prefix.py), and FlexAttention compiled and backward, which need a GPU
(tests/gpu).
"""

import random

import pytest
import torch
import torch.nn.functional as F

from g2r_megatron.config.checks import check_judge_config
from g2r_megatron.config.command_options import OfflineJudgeConfig
from g2r_megatron.config.options import JudgeConfig
from g2r_megatron.credit.attribution import pooled_weights
from g2r_megatron.credit.judgements import ItemJudgement, backward_passes
from g2r_megatron.errors import UserError
from g2r_megatron.judge.packing import build_trees, shared_length, tree_tokens
from g2r_megatron.judge.routing import tree_places, tree_rows
from g2r_megatron.judge.types import JudgeInput
from g2r_megatron.model.tree_attention import _flex, row_structure, sees, tree_attention
from g2r_megatron.parallel.microbatches import pack_rows, padded

HEADS, GROUPS, DIM = 4, 2, 16
LONG = 1000


def judge_input(ids: list[int], start: int, end: int) -> JudgeInput:
    return JudgeInput(ids, start, end, len(ids) - 1)


def criteria_last(numbers: random.Random, items: int) -> list[JudgeInput]:
    """Inputs that share a random beginning with the response in it."""
    prefix = [numbers.randrange(50) for _ in range(numbers.randrange(4, 40))]
    start = numbers.randrange(len(prefix) - 2)
    end = numbers.randrange(start, len(prefix))
    return [
        judge_input(prefix + [100 + k] + [numbers.randrange(50) for _ in range(numbers.randrange(12))], start, end)
        for k in range(items)
    ]


def sequences_of(tree) -> list[list[int]]:
    """Row offsets (from the tree's start) of the tokens of each of the tree's sequences."""
    if not tree.branches:
        return [list(range(len(tree.ids)))]
    starts = [tree.prefix + sum(tree.branches[:k]) for k in range(len(tree.branches))]
    return [
        [*range(tree.prefix), *range(start, start + length)]
        for start, length in zip(starts, tree.branches, strict=True)
    ]


def random_row(seed: int):
    """(trees, structure of a padded row, row offset of each tree); some trees are single sequences, also of one length."""
    numbers = random.Random(seed)
    trees, items = [], 0
    for _ in range(numbers.randrange(1, 5)):
        inputs = criteria_last(numbers, numbers.choice([1, 1, 2, 5]))
        for _ in range(numbers.choice([1, 3]) if len(inputs) == 1 else 1):
            trees += build_trees(inputs, LONG, items)
            items += len(inputs)
    tokens = sum(len(tree.ids) for tree in trees)
    offsets = [sum(len(tree.ids) for tree in trees[:k]) for k in range(len(trees))]
    return trees, row_structure([tree.shape for tree in trees], tokens + numbers.randrange(4)), offsets


@pytest.mark.parametrize("seed", range(20))
def test_tree_holds_each_sequence(seed):
    """Prefix and branch read in order are the input; verdicts and the response stand where they stood."""
    numbers = random.Random(seed)
    inputs = criteria_last(numbers, numbers.randrange(1, 9))
    (tree,) = build_trees(inputs, LONG, 7)
    assert tree.items == list(range(7, 7 + len(inputs)))
    assert len(tree.ids) == tree_tokens(inputs) <= sum(len(item.input_ids) for item in inputs)
    for item, offsets, verdict in zip(inputs, sequences_of(tree), tree.verdicts, strict=True):
        assert [tree.ids[i] for i in offsets] == item.input_ids
        assert verdict == offsets[item.verdict_position]
        assert (
            (tree.response_start, tree.response_end) == (item.response_start, item.response_end) <= (tree.prefix,) * 2
        )


def test_nothing_is_shared_unless_the_response_is():
    """A criterion before the response, or responses at other places: one tree a sequence."""
    before = [judge_input([1, 2, criterion, 4, 5, 6], 3, 5) for criterion in (7, 8)]
    assert shared_length(before) == 0 and [len(tree.ids) for tree in build_trees(before, LONG)] == [6, 6]
    moved = [judge_input([1, 2, 3, 4, 7], 1, 3), judge_input([1, 2, 3, 4, 8], 2, 4)]
    assert shared_length(moved) == 0 and tree_tokens(moved) == 5


def test_equal_inputs_and_one_that_begins_another_keep_their_verdicts():
    """Each sequence has a branch of at least the token whose logits give its verdict."""
    same = [judge_input([1, 2, 3, 4], 1, 2)] * 2 + [judge_input([1, 2, 3, 4, 5], 1, 2)]
    (tree,) = build_trees(same, LONG)
    assert tree.prefix == 3 and tree.branches == [1, 1, 2] and tree.verdicts == [3, 4, 6]


def test_a_tree_that_would_be_too_long_is_several():
    """Each within the limit as long as its own longest sequence is; all items once, in order."""
    numbers = random.Random(3)
    for _ in range(50):
        inputs, limit = criteria_last(numbers, numbers.randrange(2, 9)), numbers.randrange(5, 80)
        trees = build_trees(inputs, limit, 4)
        assert [i for tree in trees for i in tree.items] == list(range(4, 4 + len(inputs)))
        assert all(len(tree.ids) <= limit or len(tree.items) == 1 for tree in trees)
        found = [[tree.ids[i] for i in offsets] for tree in trees for offsets in sequences_of(tree)]
        assert found == [item.input_ids for item in inputs]


def test_a_single_sequence_is_a_tree_without_branches():
    (tree,) = build_trees([judge_input([1, 2, 3], 0, 2)], LONG)
    assert (tree.ids, tree.prefix, tree.branches, tree.verdicts) == ([1, 2, 3], 3, [], [2])


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("seed", range(10))
def test_a_token_sees_its_own_sequence_causally(seed, window):
    """By the definition, pair by pair: both in one sequence of one tree, key not after query, within the window."""
    trees, structure, offsets = random_row(seed)
    expected = torch.zeros(structure.size(1), structure.size(1), dtype=torch.bool)
    for tree, offset in zip(trees, offsets, strict=True):
        for sequence in sequences_of(tree):
            for i, query in enumerate(sequence):
                assert structure[2, offset + query] == i  # positions restart behind the prefix
                for j, key in enumerate(sequence[: i + 1]):
                    expected[offset + query, offset + key] |= window is None or i - j <= window
    tokens = sum(len(tree.ids) for tree in trees)
    at = torch.arange(structure.size(1))
    seen = sees(structure, at[:, None], at[None, :], window)
    assert torch.equal(seen[:tokens, :tokens], expected[:tokens, :tokens])
    assert not seen[:tokens, tokens:].any() and seen.diagonal().all()  # padding: unseen, and sees itself


def random_heads(seed: int, length: int):
    """Leaves: query [1, HEADS, s, DIM], key and value [1, GROUPS, s, DIM]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, n, length, DIM, generator=generator).requires_grad_() for n in (HEADS, GROUPS, GROUPS)]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("seed", range(5))
def test_attention_and_its_gradient_are_those_of_separate_sequences(seed, window):
    """Output (also FlexAttention's, which has no backward here) and gradients of query, key and value, to 1e-5."""
    trees, structure, offsets = random_row(seed)
    query, key, value = heads = random_heads(seed, structure.size(1))
    pull = torch.randn(1, HEADS, structure.size(1), DIM)
    pull[:, :, sum(len(tree.ids) for tree in trees) :] = 0  # nobody reads padding
    expected = torch.zeros_like(pull)
    for tree, offset in zip(trees, offsets, strict=True):
        for sequence in sequences_of(tree):
            at = offset + torch.tensor(sequence)
            distance = torch.arange(len(at))[:, None] - torch.arange(len(at))[None, :]
            mask = (distance >= 0) & (distance <= (len(at) if window is None else window))
            expected[:, :, at] = F.scaled_dot_product_attention(
                query[:, :, at], key[:, :, at], value[:, :, at], attn_mask=mask, enable_gqa=True
            ).detach()
    tokens = sum(len(tree.ids) for tree in trees)
    found = tree_attention(*heads, structure, window, None)
    flex = _flex(*(t.detach() for t in heads), structure, window, None)
    for out in (found, flex):
        assert relative(out[:, :, :tokens], expected[:, :, :tokens]) <= 1e-5
    # gradients: those of dense attention under the mask, which the test above holds to the definition
    at = torch.arange(structure.size(1))
    dense = F.scaled_dot_product_attention(
        *heads, attn_mask=sees(structure, at[:, None], at[None, :], window), enable_gqa=True
    )
    wanted = torch.autograd.grad((dense * pull).sum(), heads)
    for gradient, want in zip(torch.autograd.grad((found * pull).sum(), heads), wanted, strict=True):
        assert relative(gradient, want) <= 1e-5


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_shares_of_a_row_together_are_the_row(seed, ranks, window):
    """Context parallel ranks' outputs (FlexAttention's too) are those of their positions, and the gradients of key and

    value sum to the row's, without a factor. The collective that gathers and sums them: test_parity_judge_layouts.py.
    """
    trees, structure, _ = random_row(seed)
    structure = row_structure([tree.shape for tree in trees], padded(structure.size(1), ranks))
    query, key, value = heads = random_heads(seed, structure.size(1))
    pull = torch.randn(query.shape, generator=torch.Generator().manual_seed(seed))
    whole = tree_attention(*heads, structure, window, None)
    wanted = torch.autograd.grad((whole * pull).sum(), heads)
    total = 0
    for rank in range(ranks):
        mine, share = (slice(None), slice(None), slice(rank, None, ranks)), (rank, ranks)
        found = tree_attention(query[mine], key, value, structure, window, None, share)
        assert relative(found, whole[mine]) <= 1e-6
        flex = _flex(query[mine].detach(), key.detach(), value.detach(), structure, window, None, share)
        real = structure[0, rank::ranks] >= 0
        assert relative(flex[:, :, real], whole[mine][:, :, real]) <= 1e-5
        assert not whole[mine][:, :, ~real].any()  # padding
        total = total + (found * pull[mine]).sum()
    for gradient, want in zip(torch.autograd.grad(total, heads), wanted, strict=True):
        assert relative(gradient, want) <= 1e-6


@pytest.mark.parametrize("seed", range(20))
def test_routing_of_a_verdicts_tree_is_found_in_other_trees(seed):
    """Rows of the table (here: the tokens themselves) for trees of some of the inputs, alone and together."""
    numbers = random.Random(seed)
    inputs = criteria_last(numbers, numbers.randrange(1, 7))
    places, table = {}, list(range(1000, 1003))  # of a response judged before
    for tree in build_trees(inputs, numbers.choice([30, LONG])):
        places |= tree_places(tree, inputs, len(table))
        table += tree.ids
    places = list(places.values())
    some = sorted(numbers.sample(range(len(inputs)), numbers.randrange(1, len(inputs) + 1)))
    for tree in build_trees([inputs[k] for k in some], LONG):
        rows = tree_rows(tree, [places[some[item]] for item in tree.items])
        assert [table[row] for row in rows] == tree.ids


def test_rows_hold_everything_once_within_the_budget():
    """Every index once; padded rows within the budget, but for a tree that is longer by itself, which is alone."""
    numbers = random.Random(1)
    for _ in range(50):
        lengths = [numbers.randrange(1, 60) for _ in range(numbers.randrange(40))]
        budget, multiple = numbers.randrange(1, 100), numbers.choice([1, 2, 16])
        rows = pack_rows(lengths, budget, multiple)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        for row in rows:
            tokens = sum(lengths[i] for i in row)
            assert len(row) == 1 or -(-tokens // multiple) * multiple <= budget


def test_pooled_weights_keep_the_temperature_and_follow_the_sign_of_the_reward():
    """Sizes sum to 1; an item alone has 1 whatever its weight; pitfalls that outweigh the rest turn all signs."""
    assert pooled_weights([5.0]) == pooled_weights([-3.0]) == [1.0]
    assert pooled_weights([6.0, 2.0]) == [0.75, 0.25]
    assert pooled_weights([6.0, -2.0]) == [0.75, -0.25]
    assert pooled_weights([2.0, -6.0]) == [-0.25, 0.75]


def test_items_pooled_into_one_backward_count_once():
    b = torch.ones(3)
    items = [ItemJudgement(1.0, 0.0, True, a) for a in (None, b, b, torch.ones(3))]
    assert backward_passes(items) == [1, 3]
    assert backward_passes(items[:1]) == []


def test_pooling_by_response_needs_the_criterion_last(tmp_path):
    """Refused by the options alone, naming what to change; item pooling takes any order."""
    (tmp_path / "rows.jsonl").touch()

    def options(credit: str) -> OfflineJudgeConfig:
        judge = JudgeConfig(model="m", template="{criterion} {conversation} {response}", credit=credit)
        return OfflineJudgeConfig(input=str(tmp_path / "rows.jsonl"), output=str(tmp_path / "out.jsonl"), judge=judge)

    check_judge_config(options("per_item"), 1)
    with pytest.raises(UserError, match=r"judge\.credit: per_response with \{criterion\} before \{response\}"):
        check_judge_config(options("per_response"), 1)
