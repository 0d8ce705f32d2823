"""``g2r plan``'s memory against what CUDA's allocator says on one GPU, in bf16, in plain torch and Transformer Engine layers.

Old log-probs and the gradients of an update. Leaves out several ranks
(shares are divisions), optimizer states on the host and NCCL's buffers.
"""

import pytest
import torch

from g2r_megatron.config.options import Layout, Precision, TrainConfig
from g2r_megatron.plan.activations import Kind
from g2r_megatron.plan.models import PlannedModel
from g2r_megatron.plan.rank_memory import forward_bytes, training_state, update_bytes
from g2r_megatron.plan.stages import expected_stages
from g2r_megatron.plan.workload import Passes
from tiny_models import build_tiny_hf

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

WITHIN = 0.10
ROWS, PROMPT, RESPONSE = 8, 256, 256
SIZES = dict(hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8, head_dim=64)


def peak_of(work) -> int:
    """The most bytes allocated during ``work()``."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("spec", ["torch", "te"])
def test_training_holds_what_was_planned(tmp_path, spec):
    """Weights, gradients and optimizer, and with them the peaks of old log-probs and of an update, within 10%."""
    if spec == "te":
        pytest.importorskip("transformer_engine")
    from g2r_megatron.model.build import build_model
    from g2r_megatron.model.hf import open_hf_model
    from g2r_megatron.parallel.groups import build_groups
    from g2r_megatron.policy.log_probs import TokenSequence
    from g2r_megatron.policy.trainer import PolicyTrainer

    hf = open_hf_model(str(build_tiny_hf("qwen3", tmp_path / "model", **SIZES)), "policy.model")
    before = torch.cuda.memory_allocated()
    model = build_model("policy", hf, build_groups("policy", Layout()), Precision("bf16"), "none", spec)
    config = TrainConfig()
    config.policy.micro_batch_tokens = ROWS * (PROMPT + RESPONSE)
    trainer = PolicyTrainer(model, config)
    rows, passes = list(range(ROWS)), Passes(1, ROWS * (PROMPT + RESPONSE), PROMPT, ROWS * RESPONSE)

    def old_log_probs(response: int):
        """Runs their pass; returns the update that comes after it."""
        sequences = [TokenSequence(list(range(PROMPT)), list(range(response))) for _ in rows]
        old = trainer.log_probs(sequences, [rows])
        return lambda: trainer.gradients(sequences, rows, [torch.randn(response)] * ROWS, old, None)

    trainer.step(old_log_probs(RESPONSE // 2)()["loss/policy"])
    static = torch.cuda.memory_allocated() - before  # a fused Adam makes its states in its first step
    plan = PlannedModel(
        "policy",
        hf,
        Layout(),
        Kind("bf16", te=spec == "te", trains=True),
        False,
        0,
        1,
        expected_stages(hf, Layout(), 1),
    )
    state = sum(training_state(plan, 0, True).values()) + plan.weight_bytes(0)
    assert static == pytest.approx(state, rel=WITHIN)
    updates = []
    forward = peak_of(lambda: updates.append(old_log_probs(RESPONSE))) - before
    update = peak_of(updates[0]) - before
    assert forward == pytest.approx(state + sum(forward_bytes(plan, 0, passes).values()), rel=WITHIN)
    assert update == pytest.approx(state + update_bytes(plan, 0, passes)["activations"], rel=WITHIN)
