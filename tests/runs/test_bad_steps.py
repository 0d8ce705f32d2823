"""A loss or gradient that is not finite changes nothing on any rank, is counted, and ends the run after some in a row.

Skipped alike by all ranks though one alone has the bad responses; weights, moments and the next good step are those of
a run without the bad one, the schedule goes on. Leaves out judges that are not finite, which is an error of its own.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distributed import groups_of
from g2r_megatron.config.options import Layout, OptimizerConfig, PolicyConfig, Precision, TrainConfig
from g2r_megatron.errors import RunError
from real_runs import checkpoints, heartbeat, quickstart_options, records

PLACES = {
    "one rank": (1, Layout()),
    "dp2": (2, Layout()),
    "tp2 sp": (2, Layout(tp=2, sp=True)),
    "pp2": (2, Layout(pp=2)),
    "ep2": (2, Layout(ep=2)),
}


# In the ranks.


def updates(
    layout: Layout, path: str, steps: list[list[float]], distributed: bool = True, dtype: str = "fp32", decay="constant"
) -> dict:
    """Training steps of two mini-batches; a step is what one token's advantage is in the first and in the second.

    Metrics of the steps, the weights before and after each, and how many bad ones had come in a row.
    """
    from g2r_megatron.model.build import build_model
    from g2r_megatron.model.hf import open_hf_model
    from g2r_megatron.policy.log_probs import TokenSequence
    from g2r_megatron.policy.trainer import PolicyTrainer

    model = build_model("policy", open_hf_model(path, "policy.model"), groups_of(layout), Precision(dtype=dtype))
    optimizer = OptimizerConfig(lr=1e-3, decay=decay, eps=1e-4, distributed=distributed)
    config = TrainConfig(policy=PolicyConfig(micro_batch_tokens=60), optimizer=optimizer, steps=8)
    trainer = PolicyTrainer(model, config)
    g = torch.Generator().manual_seed(5)
    sequences = [TokenSequence(torch.randint(0, 383, (6,), generator=g).tolist(), [7, 8, 9, 10]) for _ in range(8)]
    mini_batches = [[0, 1, 2, 3], [4, 5, 6, 7]]

    def weights() -> list:
        return [p.detach().float().numpy().copy() for chunk in model.chunks for p in chunk.parameters()]

    found = {"metrics": [], "weights": [weights()], "in a row": []}
    for values in steps:
        advantages = [torch.linspace(-1.0, 1.0, 4) * (i + 1) for i in range(8)]
        advantages[1][2], advantages[5][2] = values
        old = trainer.log_probs(sequences, mini_batches)
        found["metrics"].append(trainer.update(sequences, mini_batches, advantages, old, None).metrics)
        found["weights"].append(weights())
        found["in a row"].append(trainer.bad_in_a_row)
    return found


def equal(one: list, other: list) -> bool:
    return all((a == b).all() for a, b in zip(one, other, strict=True))


# The tests.


@pytest.mark.parametrize(
    ("place", "family", "distributed", "dtype"),
    [
        ("one rank", "qwen2", False, "fp32"),
        ("dp2", "qwen2", True, "fp32"),
        ("dp2", "qwen2", False, "bf16"),
        ("tp2 sp", "qwen2", True, "bf16"),
        ("pp2", "qwen2", True, "fp32"),
        ("ep2", "qwen3_moe", True, "fp32"),
    ],
)
def test_bad_mini_batches_are_skipped_on_every_rank(worlds, tiny_hf, place, family, distributed, dtype):
    """One token is bad, so on two replicas one rank has it. 3e38 is finite, its gradient's norm is not."""
    size, layout = PLACES[place]
    nan, infinite, large = float("nan"), float("inf"), 3e38
    steps = [[1.0, nan], [infinite, large], [1.0, 1.0]]
    for rank in worlds[size].run(updates, layout, str(tiny_hf(family)), steps, distributed, dtype, "linear"):
        first, second, third = rank["metrics"]
        assert rank["in a row"] == [1, 3, 0]
        assert [m["optimizer/skipped_steps"] for m in rank["metrics"]] == [1.0, 2.0, 0.0]
        assert first["optimizer/lr"] > second["optimizer/lr"] > third["optimizer/lr"]  # the schedule goes on
        start, after_first, after_second, after_third = rank["weights"]
        assert not equal(start, after_first)  # its first mini-batch was good
        assert equal(after_first, after_second) and not equal(after_second, after_third)
        assert all(np.isfinite(w).all() for w in after_third)


def test_nothing_of_a_bad_step_stays(worlds, tiny_hf):
    """After a bad step, the good ones are what they are without it: moments, their count and gradients are clean."""
    nan, path = float("nan"), str(tiny_hf("qwen2"))
    clean = worlds[2].run(updates, Layout(), path, [[1.0, 1.0], [1.0, 1.0]])
    bad = worlds[2].run(updates, Layout(), path, [[1.0, 1.0], [nan, nan], [1.0, 1.0]])
    for one, other in zip(clean, bad, strict=True):
        assert equal(other["weights"][1], other["weights"][2])
        assert equal(one["weights"][1], other["weights"][1]) and equal(one["weights"][2], other["weights"][3])


def train_here(arguments: list[str]) -> str:
    """``g2r train`` in this process; the error, or an empty string."""
    from g2r_megatron.cli import train_command

    try:
        train_command(arguments)
    except RunError as error:
        return str(error)
    return ""


def test_the_run_stops_with_one_line_and_keeps_the_batches(worlds, tmp_path):
    """Advantages that overflow, made by an option: every step is bad, also after a resume in between."""
    run = tmp_path / "run"
    options = [*quickstart_options(tmp_path), "--grpo.preset", "robust", "--output_dir", str(run)]
    options += [
        "--grpo.mini_batches",
        "1",
        "--eval.every",
        "0",
        "--checkpoint.save_every",
        "1",
        "--optimizer.max_bad_steps",
        "3",
        "--steps",
    ]
    assert worlds[2].run(train_here, [*options, "1"]) == [""] * 2
    before = weights_of(run)
    assert worlds[2].run(train_here, [*options, "3", "--grpo.false_scale", "1e300"]) == [""] * 2
    for error in worlds[2].run(train_here, [*options, "9", "--grpo.false_scale", "1e300"]):
        assert "3 optimizer steps in a row were skipped, up to step 4" in error and "\n" not in error
        assert f"{run}/bad_steps" in error and "the last checkpoint is of step 3" in error
    said, lines = heartbeat(run), records(run, "metrics.jsonl")
    assert said["state"] == "failed" and said["step"] == 4 and "3 optimizer steps in a row" in said["error"]
    assert [line["optimizer/skipped_steps"] for line in lines[1:]] == [0.0, 1.0, 1.0, 1.0]
    assert lines[4]["optimizer/grad_norm"] is None
    assert checkpoints(run) == ["step_00000002", "step_00000003"] and weights_of(run) == before
    names = [f"step_0000000{step}.{kind}" for step in (2, 3, 4) for kind in ("json", "safetensors")]
    assert sorted(path.name for path in (run / "bad_steps").iterdir()) == names
    tensors = load_file(run / "bad_steps" / names[-1])
    responses = json.loads((run / "bad_steps" / names[-2]).read_text())["responses"]
    assert len(responses) == len(tensors["response_lengths"]) == len(tensors["prompt_lengths"]) == 8
    tokens = int(tensors["response_lengths"].sum())
    assert len(tensors["response_ids"]) == len(tensors["advantages"]) == len(tensors["old_log_probs"]) == tokens
    assert len(tensors["prompt_ids"]) == tensors["prompt_lengths"].sum()
    assert torch.isfinite(tensors["old_log_probs"]).all() and not torch.isfinite(tensors["advantages"]).all()
    assert {"query_id", "key", "response", "reward", "verdicts"} == responses[0].keys()


def weights_of(run: Path) -> bytes:
    """Exported: of the last time that the run was finished."""
    return (run / "hf" / "model.safetensors").read_bytes()
