"""The training loop gives the same numbers on any layout, reports every hazard, and says when the judge's gradient fails.

Runs of two or three steps on the quickstart's task, and on tiny random models where the judge is a bad one. Leaves out
checkpoints and resuming (test_train_resume.py), judges with another tokenizer (test_other_tokenizer.py) and the
exactness of each part (test_parity_*.py).
"""

import contextlib
import io
import json
import os
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from g2r_megatron.cli import main
from g2r_megatron.config import parsing
from g2r_megatron.config.options import Layout, TrainConfig
from g2r_megatron.config.presets import resolve_preset
from real_runs import records

ROOT = Path(__file__).parents[2]
TASK = ROOT / "examples" / "quickstart"
STEPS = 2

# docs/method.md, "known hazards", and what a person looks at first; gates have no cos_median
HAZARDS = {
    *("attribution/ess_share", "attribution/flat_share", "attribution/max_alpha"),
    *("attribution/zero_or_nonfinite", "attribution/passes", "attribution/key_token_mass", "attribution/mix"),
    *(f"advantage/position_{d}" for d in range(10)),
    *("advantage/stop_token", "advantage/max_abs", "response/length_mean", "response/finished_share"),
    *("group/zero_variance_share", "reward/mean", "reward/std", "reward/true_mean"),
    *("judge/answer_mass", "attribution/one_token_share"),
    *("judge/true_share", "judge/agreement", "judge/gap", "ratio/first", "ratio/mean", "ratio/max", "ratio/clip_share"),
    *("loss/policy", "loss/kl", "kl/k1", "kl/k2", "kl/k3", "optimizer/grad_norm", "optimizer/lr"),
    *(f"time/{phase}" for phase in ("sample", "judge", "attribution", "update", "step")),
}
EVALUATION = {
    "eval/judge_score",
    "eval/true_score",
    "eval/gold_score",  # the truth, which is known here
    "eval/gold_agreement",
    "eval/agreement",
    "eval/length_mean",
    "eval/finished_share",
    "eval/answer_mass",
}


# In the ranks.


def train_here(arguments: list[str]) -> str:
    """``g2r train`` in this process; what it printed."""
    from g2r_megatron.cli import train_command

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        train_command(arguments)
    return printed.getvalue()


def train_deterministically(arguments: list[str]) -> bool:
    """``g2r train --deterministic true``; whether the switches were on. They are off again afterwards."""
    with patch.dict(os.environ):
        try:
            train_here([*arguments, "--deterministic", "true"])
            allowed = os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"]
            return torch.are_deterministic_algorithms_enabled() and allowed == "0"
        finally:
            torch.use_deterministic_algorithms(False)


def models_of(arguments: list[str]) -> dict:
    """What ``build_workers`` made: which of the models are one, and whether the reference is frozen and stays so."""
    from g2r_megatron.workers import build_workers, read_inputs

    config = resolve_preset(parsing.parse(TrainConfig, "g2r train", arguments))
    workers = build_workers(config, read_inputs(config))
    judge, policy, reference = workers.judge.stage.judge.model, workers.trainer.model, workers.reference
    found = {"reference": None if reference is None else "judge" if reference is judge else "own"}
    if reference is not None:
        mine = {p.data_ptr() for p in policy.chunks[0].parameters()}
        found["shared with the policy"] = sum(p.data_ptr() in mine for p in reference.chunks[0].parameters())
        found["trainable"] = sum(p.requires_grad for p in reference.chunks[0].parameters())
        pairs = zip(policy.chunks[0].parameters(), reference.chunks[0].parameters(), strict=True)
        found["equal to the policy"] = all(torch.equal(p.cpu(), r.cpu()) for p, r in pairs)
    return found


# The quickstart's task.


def rows(name: str, count: int, directory: Path) -> str:
    lines = (TASK / "data" / f"{name}.jsonl").read_text().splitlines(keepends=True)
    file = directory / f"{name}.jsonl"
    file.write_text("".join(lines[:count]))
    return f'["{file}"]'


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> list[str]:
    data = tmp_path_factory.mktemp("data")
    return [
        *("--config", str(TASK / "config.yaml"), "--policy.model", str(TASK / "model")),
        *("--data.train", rows("train", 8, data), "--eval.data", rows("eval", 3, data)),
        *("--steps", str(STEPS), "--eval.every", "0", "--checkpoint.save_every", "0", "--log.tensorboard", "false"),
        *("--rollout.prompts_per_step", "3", "--rollout.responses_per_prompt", "4", "--grpo.mix_anneal", "0"),
    ]


def layout_options(policy: Layout, judge: Layout) -> list[str]:
    return [
        f"--{name}.layout.{option}={str(getattr(layout, option)).lower()}"
        for name, layout in (("policy", policy), ("judge", judge))
        for option in ("tp", "pp", "cp", "sp")
    ]


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def samples_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_process(worlds, task, tmp_path_factory):
    """``one_process("robust")`` -> the run directory of that preset in a single process."""
    directory, runs = tmp_path_factory.mktemp("one_process"), {}

    def get(preset: str) -> Path:
        if preset not in runs:
            runs[preset] = directory / preset
            worlds[1].run(train_here, [*task, "--grpo.preset", preset, "--output_dir", str(runs[preset])])
        return runs[preset]

    return get


def test_every_hazard_is_a_metric_of_every_step(one_process):
    before, *steps = metrics_of(one_process("robust"))
    assert before.keys() == EVALUATION | {"step", "time/eval"}
    for line in steps:
        assert not HAZARDS - line.keys(), line["step"]
        assert all(line[name] is not None for name in HAZARDS)
        assert line["ratio/first"] == 1.0 and line["attribution/zero_or_nonfinite"] == 0.0
    assert steps[-1].keys() >= EVALUATION and not EVALUATION & steps[0].keys()
    assert steps[0]["judge/agreement"] > 0.9  # what the committed model was made for


def test_uniform_attribution_is_grpo_bit_for_bit(worlds, task, one_process, tmp_path):
    """`robust` with judge.attribution=uniform runs no backward pass and trains the same weights as `grpo` does."""
    run = tmp_path / "run"
    worlds[1].run(
        train_here,
        [*task, "--grpo.preset", "robust", "--judge.attribution", "uniform", "--output_dir", str(run)],
    )
    expected = one_process("grpo")
    for now, then in zip(records(run, "metrics.jsonl"), records(expected, "metrics.jsonl"), strict=True):
        assert now.get("attribution/passes", 0) == 0
        assert {name: now[name] for name in now.keys() - {"attribution/mix"}} == {
            name: then[name] for name in then.keys() - {"attribution/mix"}
        }
    for now, then in zip(samples_of(run), samples_of(expected), strict=True):
        assert (now["response"], now["advantages"]) == (then["response"], then["advantages"])
    weights, others = (load_file(path / "hf" / "model.safetensors") for path in (run, expected))
    assert all(torch.equal(weights[name], others[name]) for name in others)


def test_shuffled_alpha_is_a_placebo(worlds, task, one_process, tmp_path):
    """Same responses, and in each item the same values of alpha in another order; where they go is the seed's choice."""
    runs = [tmp_path / "one", tmp_path / "two"]
    for run in runs:
        placebo = ["--grpo.preset", "robust", "--judge.shuffle", "--output_dir", str(run), "--steps", "1"]
        worlds[1].run(train_here, [*task, *placebo, "--checkpoint.export_hf", "false"])
    assert samples_of(runs[0]) == samples_of(runs[1])
    moved = 0
    for now, then in zip(samples_of(runs[0]), samples_of(one_process("robust")), strict=False):
        for ours, theirs in zip(now["items"], then["items"], strict=True):
            if theirs["alpha"]:
                assert now["response"] == then["response"] and sorted(ours["alpha"]) == sorted(theirs["alpha"])
                moved += ours["alpha"] != theirs["alpha"]
    assert moved


def test_deterministic_algorithms_change_nothing_on_the_cpu(worlds, task, one_process, tmp_path):
    """All that a step does has a deterministic form, and the run is the same; what it is for takes a GPU."""
    run = tmp_path / "run"
    assert worlds[1].run(train_deterministically, [*task, "--grpo.preset", "robust", "--output_dir", str(run)]) == [
        True
    ]
    expected = records(one_process("robust"), "metrics.jsonl")
    for now, then in zip(records(run, "metrics.jsonl"), expected, strict=True):
        assert now == pytest.approx(then, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("preset", "policy", "judge"),
    [("robust", Layout(), Layout(tp=2, pp=2, sp=True)), ("paper", Layout(tp=2, pp=2), Layout(pp=2))],
    ids=["robust, policy dp4, judge tp2 pp2 sp", "paper, policy tp2 pp2, judge pp2 dp2"],
)
def test_four_ranks_train_as_one_does(worlds, task, one_process, tmp_path, preset, policy, judge):
    """Same responses, verdicts and credit; what comes of sums of floats, to rounding."""
    run = tmp_path / "run"
    arguments = [*task, "--grpo.preset", preset, *layout_options(policy, judge), "--output_dir", str(run)]
    printed = worlds[4].run(train_here, arguments)
    assert "step 2/2" in printed[0] and not any(printed[1:])  # rank 0 speaks for all
    found, expected = metrics_of(run), metrics_of(one_process(preset))
    assert len(found) == len(expected) == STEPS + 1
    worst = {}
    for now, then in zip(found, expected, strict=True):
        assert now.keys() == then.keys()
        for name in (name for name in then if not name.startswith("time/")):
            scale = max(abs(then[name]), 1e-3)
            worst[name] = max(worst.get(name, 0.0), abs(now[name] - then[name]) / scale)
    print(preset, sorted(((round(error, 9), name) for name, error in worst.items() if error), reverse=True)[:5])
    for name, error in worst.items():
        exact = name.startswith(("reward/", "eval/", "response/", "group/", "judge/")) or name == "ratio/first"
        exact = exact and not name.endswith("answer_mass")  # of probabilities
        assert error == 0.0 if exact else error < 1e-3, name
    weights, others = (load_file(path / "hf" / "model.safetensors") for path in (run, one_process(preset)))
    start = load_file(TASK / "model" / "model.safetensors")
    moved = sum(float((others[n] - start[n]).square().sum()) for n in start) ** 0.5
    apart = sum(float((weights[n] - others[n]).square().sum()) for n in start) ** 0.5
    print(f"weights moved {moved:.3g}, runs apart {apart / moved:.1e} of that")
    assert apart < 0.01 * moved
    for now, then in zip(samples_of(run), samples_of(one_process(preset)), strict=True):
        assert (now["response"], now["reward"]) == (then["response"], then["reward"])
        for ours, theirs in zip(now["items"], then["items"], strict=True):
            assert ours["verdict"] == theirs["verdict"] and (ours["alpha"] is None) == (theirs["alpha"] is None)
            if ours["alpha"] is not None:
                assert ours["alpha"] == pytest.approx(theirs["alpha"], rel=1e-2, abs=1e-4)


@pytest.mark.parametrize(
    ("ranks", "policy", "judge", "limit"),
    [
        (1, Layout(), Layout(), 0.0),
        (2, Layout(tp=2), Layout(tp=2), 0.0),
        (2, Layout(), Layout(tp=2, sp=True), 1e-9),
        (2, Layout(), Layout(cp=2), 0.0),  # the reference is then a copy of its own, laid out as the policy
    ],
    ids=["one rank", "tp2 both", "policy dp2, judge tp2", "policy dp2, judge cp2"],
)
def test_the_first_kl_is_zero(worlds, task, tmp_path, ranks, policy, judge, limit):
    """Before the first update the policy is the reference: exactly where both are laid out alike, else to rounding."""
    arguments = [*task, "--steps", "1", "--grpo.mini_batches", "1", *layout_options(policy, judge)]
    worlds[ranks].run(train_here, [*arguments, "--output_dir", str(tmp_path / "run")])
    _, step = metrics_of(tmp_path / "run")
    assert step["ratio/first"] == step["ratio/mean"] == step["ratio/max"] == 1.0
    assert step["ratio/clip_share"] == 0.0 and step["optimizer/grad_norm"] > 0
    assert abs(step["loss/kl"]) <= limit and step["kl/k2"] <= limit and step["kl/k3"] <= limit
    assert abs(step["kl/k1"]) <= limit**0.5


@pytest.mark.parametrize(
    ("arguments", "reference"),
    [
        (["--grpo.kl_coef", "0.05"], "judge"),
        (["--grpo.kl_coef", "0"], None),
        (["--grpo.kl_coef", "0.05", "--judge.model", str(TASK / "model")], "own"),
        (["--grpo.kl_coef", "0", "--judge.model", str(TASK / "model")], None),
    ],
    ids=["self-judging", "self-judging without KL", "external judge", "external judge without KL"],
)
def test_the_reference_is_held_once(worlds, task, tmp_path, arguments, reference):
    (found,) = worlds[1].run(models_of, [*task, *arguments, "--output_dir", str(tmp_path / "run")])
    assert found["reference"] == reference
    if reference is not None:
        assert found["shared with the policy"] == found["trainable"] == 0 and found["equal to the policy"]


# Bad judges, and inputs that contradict each other.


@pytest.fixture(scope="module")
def tiny_task(tiny_hf, tmp_path_factory) -> list[str]:
    """A random policy on two made-up prompts."""
    data = tmp_path_factory.mktemp("tiny_task") / "train.jsonl"
    rubric = [{"criterion": "mentions water", "weight": 2}, {"criterion": "is kind", "weight": 1}]
    prompts = ["What helps against fever?", "What helps against a rash?"]
    data.write_text("".join(json.dumps({"id": p, "prompt": p, "rubric": rubric}) + "\n" for p in prompts))
    return [
        *("--policy.model", str(tiny_hf("llama3")), "--data.train", f'["{data}"]', "--steps", "2"),
        *("--rollout.prompts_per_step", "2", "--rollout.responses_per_prompt", "4"),
        *("--rollout.max_response_tokens", "8", "--judge.template", "{conversation} {response} {criterion}"),
        *("--log.tensorboard", "false", "--checkpoint.save_every", "0", "--optimizer.lr", "1e-4"),
        *("--grpo.mix_anneal", "0"),
    ]


def certain_judge(source: Path, directory: Path, scale: float) -> Path:
    """The model with logits of 0 but for the verdict words, whose own are ``scale`` times as large."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    words = [start + word for word in ("True", "true", "TRUE", "False", "false", "FALSE") for start in ("", " ")]
    ids = [tokenizer.encode(word, add_special_tokens=False) for word in words]
    keep = [sequence[0] for sequence in ids if len(sequence) == 1]
    assert len(keep) >= 2
    directory.mkdir()
    for file in source.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    tensors = load_file(directory / "model.safetensors")
    output = torch.zeros_like(tensors["lm_head.weight"])
    output[keep] = tensors["lm_head.weight"][keep] * scale
    save_file(tensors | {"lm_head.weight": output}, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize(("preset", "scale"), [("paper", 1e4), ("robust", 1e38)], ids=["zero", "not finite"])
def test_a_judge_gradient_that_vanishes_or_overflows_is_said_and_counted(
    worlds, tiny_task, tiny_hf, tmp_path, preset, scale
):
    """p(True) = 1 in fp32 has the gradient 0 (`paper`); logits of 1e38 overflow on the way back (`contracted`)."""
    judge, run = certain_judge(tiny_hf("llama3"), tmp_path / "judge", scale), tmp_path / "run"
    arguments = [*tiny_task, "--judge.model", str(judge), "--grpo.preset", preset, "--judge.verdict", "sample"]
    if preset == "robust":
        arguments += ["--judge.attribution", "contracted"]
    (printed,) = worlds[1].run(train_here, [*arguments, "--output_dir", str(run)])
    steps = metrics_of(run)
    assert len(steps) == 2
    assert sum(step["attribution/zero_or_nonfinite"] for step in steps) > 0
    for step in steps:
        bad, passes = (f"{step[f'attribution/{name}']:.0f}" for name in ("zero_or_nonfinite", "passes"))
        warning = f"warning: step {step['step']}: {bad} of {passes} judge gradients were zero or not finite"
        assert (warning in printed) == (bad != "0")
        assert step["loss/policy"] is not None and step["optimizer/grad_norm"] > 0
    for name, tensor in load_file(run / "hf" / "model.safetensors").items():
        assert torch.isfinite(tensor).all(), name


def test_one_id_for_two_prompts_is_refused(tiny_task, tmp_path, capsys):
    """The responses of the one would be scored as the other's."""
    held_out = tmp_path / "eval.jsonl"
    row = {"id": "What helps against fever?", "prompt": "Another", "rubric": [{"criterion": "is kind", "weight": 1}]}
    held_out.write_text(json.dumps(row) + "\n")
    arguments = [*tiny_task, "--eval.data", f'["{held_out}"]', "--output_dir", str(tmp_path / "run")]
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("g2r: error: eval.data: id 'What helps") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
