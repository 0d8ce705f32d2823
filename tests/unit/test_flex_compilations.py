"""FlexAttention is compiled once for each head size, kind of window, and pass (with gradients or without).

Rows of any trees and lengths then run the same code. torch's tracer is the real one, on the CPU, with a back end that
only counts; leaves out the kernels that a GPU's back end makes, and rows of a single block.
"""

import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import flex_attention

import test_packing as packing
from g2r_megatron.model import tree_attention


def long_row(seed: int) -> torch.Tensor:
    """The structure of a row of more than a block of 128 positions; another one for each seed."""
    trees, _, _ = packing.random_row(seed)
    several = [*trees] * (1 + 200 // sum(len(tree.ids) for tree in trees))
    shapes, tokens = [tree.shape for tree in several], sum(len(tree.ids) for tree in several)
    return tree_attention.row_structure(shapes, tokens + seed)


def run(seed: int, window: int | None, head: int) -> None:
    structure = long_row(seed)
    length = structure.size(1)
    query, key, value = (torch.randn(1, heads, length, head) for heads in (4, 2, 2))
    tree_attention._flex(query, key, value, structure, window, None)


def test_one_compilation_for_each_kind_of_pass(monkeypatch):
    counter = CompileCounter()
    torch._dynamo.reset()
    tree_attention._compiled_flex()  # sets what the compiler goes by
    compiled = torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=counter)
    monkeypatch.setattr(tree_attention, "flex_attention", compiled)
    kinds = [(None, 16), (40, 16), (None, 32)]
    for number, (window, head) in enumerate(kinds):
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                for seed in range(3):
                    run(seed, window, head)
            done = counter.frame_count
            assert done <= 2 * number + (1 if gradients else 2), (window, head, gradients)
    assert counter.frame_count >= 4  # gradients or not, window or none, are compiled apart


def test_the_limit_is_beyond_what_a_run_needs_and_no_silent_fallback():
    """policy, judge and reference x two kinds of window x two passes x rows of one block or more."""
    tree_attention._compiled_flex()
    assert torch._dynamo.config.recompile_limit >= 3 * 2 * 2 * 2
