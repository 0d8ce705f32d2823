"""A bf16 judge's margin is the fp32 product of its last hidden state with the verdicts' rows, not a difference of bf16 logits.

Against the same products in fp64, with the gradient that enters the hidden state, on one rank and over tensor parallel
ranks. An fp32 model is left as it is. Leaves out what rounding did to the hidden state itself.
"""

import pytest
import torch

from distributed import groups_of
from g2r_megatron.config.options import Layout, Precision

TRUE, FALSE = [7, 200, 301], [5, 382]  # on either rank's half of the vocabulary
POSITIONS = [3, 8, 11, 12]


def verdicts(layout: Layout, path: str, dtype: str) -> dict:
    """Margins at ``POSITIONS`` in ``exact()`` and outside, and by the hidden states in fp64; the gradient's error."""
    from g2r_megatron.judge.targets import VerdictTarget
    from g2r_megatron.model.build import build_model
    from g2r_megatron.model.hf import open_hf_model
    from g2r_megatron.model.schedule import forward_tokens, row_batch, run_schedule

    hf = open_hf_model(path, "judge.model")
    model = build_model("judge", hf, groups_of(layout), Precision(dtype))
    target, chunk, hidden = VerdictTarget(model, "logit_margin", TRUE, FALSE), model.chunks[-1], []
    select = chunk._selected

    def selected(*args):
        found = select(*args)
        found.retain_grad()
        hidden.append(found)
        return found

    chunk._selected = selected
    batch = row_batch(model, [list(range(20, 33))], [POSITIONS], [0], 32)

    def margin(_batch, logits):
        found = target.of(target.read(logits), [None] * len(POSITIONS))
        return found.sum(), found.detach()

    (plain,) = run_schedule(model, [batch], forward_tokens, margin, backward=True)
    with target.exact():
        (exact,) = run_schedule(model, [batch], forward_tokens, margin, backward=True)
    weight = chunk.output_layer.weight.detach()
    rows = [torch.empty_like(weight) for _ in range(layout.tp)]
    torch.distributed.all_gather(rows, weight, group=model.groups.pgs.tp)
    rows = torch.cat(rows).double()
    states = hidden[-1].detach().double().requires_grad_()
    expected = (states @ rows[TRUE].T).logsumexp(1) - (states @ rows[FALSE].T).logsumexp(1)
    expected.sum().backward()
    error = (hidden[-1].grad.double() - states.grad).norm() / states.grad.norm()
    return {"plain": plain.tolist(), "exact": exact.tolist(), "expected": expected.tolist(), "gradient": error.item()}


def worst(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("layout", ["tp1pp1", "tp2pp1", "tp2pp1sp"])
def test_margins_do_not_have_the_grain_of_bf16(worlds, tiny_hf, layout):
    for found in worlds.on(layout, verdicts, str(tiny_hf("qwen3")), "bf16"):
        assert worst(found["exact"], found["expected"]) < 1e-5
        assert worst(found["plain"], found["expected"]) > 1e-3  # what bf16 logits make of it
        assert found["gradient"] < 5e-3  # it enters a bf16 tensor


def test_fp32_models_are_left_as_they_are(worlds, tiny_hf):
    (found,) = worlds.on("tp1pp1", verdicts, str(tiny_hf("qwen3")), "fp32")
    assert found["exact"] == found["plain"] and found["gradient"] < 1e-5
