"""Training on rows with an answer: examples/arithmetic with a model of a few optimizer steps, by verifier and judge.

Leaves out whether it learns (docs/verifiable.md has numbers of the whole example), and the verifier itself (unit/test_verifier.py).
"""

import json
import shutil
from pathlib import Path

import pytest

from scripts import run_main
from test_bad_input import assert_refused, run

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "arithmetic"


@pytest.fixture(scope="module")
def model(worlds, tmp_path_factory) -> str:
    directory = str(tmp_path_factory.mktemp("arithmetic") / "model")
    worlds[1].run(run_main, "examples/arithmetic/make_model.py", ["--output", directory, "--steps", "60"])
    return directory


def test_the_example_as_a_command(model, tmp_path):
    """run.py finds the model that is there, trains, and writes its report (one step here); make_data.py makes its rows again."""
    shutil.copytree(model, tmp_path / "run" / "model")
    few = [
        "--steps",
        "1",
        "--rollout.prompts_per_step",
        "2",
        "--rollout.responses_per_prompt",
        "2",
        "--eval.data",
        "[]",
    ]
    arguments = ["--output", str(tmp_path / "run"), "--presets", "grpo", *few, "--eval.every", "0"]
    run_main("examples/arithmetic/run.py", arguments)
    assert (tmp_path / "run" / "report.html").stat().st_size > 0
    run_main("examples/arithmetic/make_data.py", ["--output", str(tmp_path / "data")])
    for name in ("train", "eval"):
        file = f"{name}.jsonl"
        assert (tmp_path / "data" / file).read_text() == (EXAMPLE / "data" / file).read_text()


def test_rows_of_the_example():
    """Prompts are task.py's; answers are the sums that the prompts ask for, and no prompt is in both files."""
    rows = {
        name: [json.loads(line) for line in (EXAMPLE / "data" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "eval")
    }
    for row in rows["train"] + rows["eval"]:
        words = row["prompt"].split()
        assert words[0] == "add" and sum(map(int, words[1:])) == int(row["answer"])
    prompts = {name: {row["prompt"] for row in own} for name, own in rows.items()}
    assert len(prompts["train"]) == 300 and len(prompts["eval"]) == 64 and not prompts["train"] & prompts["eval"]


def train(model: str, output: Path, *options: str) -> list[str]:
    small = [
        "--steps",
        "1",
        "--rollout.prompts_per_step",
        "4",
        "--rollout.responses_per_prompt",
        "4",
        "--eval.samples",
        "1",
    ]
    paths = {name: f'["{EXAMPLE / "data" / f"{name}.jsonl"}"]' for name in ("train", "eval")}
    data = ["--data.train", paths["train"], "--eval.data", paths["eval"]]
    config = ["--config", str(EXAMPLE / "config.yaml"), "--policy.model", model, "--output_dir", str(output)]
    return ["train", *config, *data, *small, *options]


def test_reward_is_the_verifiers_and_credit_the_judges(worlds, model, tmp_path):
    """The score of every kept response is what its text says, and both presets report how often the judge agrees."""
    for preset in ("robust", "grpo"):
        output = tmp_path / preset
        [(code, out, err)] = worlds[1].run(run, train(model, output, "--grpo.preset", preset))
        assert code == 0, out + err
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        last = lines[-1]
        assert 0 <= last["judge/verifier_agreement"] <= 1 and 0 <= last["eval/verifier_agreement"] <= 1
        kept = [
            json.loads(line)
            for line in (output / "eval" / "step_00000001" / "responses.jsonl").read_text().splitlines()
        ]
        assert len(kept) == 64
        for record in kept:
            answer = str(sum(map(int, record["id"].split("-"))))
            assert record["score"] == float(record["response"].partition("####")[2].strip() == answer)
            assert record["dataset"] == "verifiable" and record["items"][0]["verdict"] == bool(record["score"])
        mean = sum(record["score"] for record in kept) / 64
        assert last["eval/judge_score"] == pytest.approx(mean)
        assert (last["attribution/passes"] > 0) is (preset == "robust")


def test_g2r_eval_needs_no_judge_for_answers(worlds, model, tmp_path):
    argv = [
        "eval",
        "--policy.model",
        model,
        "--data",
        str(EXAMPLE / "data" / "eval.jsonl"),
        "--output",
        str(tmp_path / "out"),
    ]
    argv += ["--rollout.chat_template", "false", "--rollout.max_response_tokens", "24", "--verifier.kind", "exact"]
    [(code, out, err)] = worlds[1].run(run, argv)
    assert code == 0 and "verifiable, 64 rows" in out and "verified 64/64" in err, err
    [(code, again, err)] = worlds[1].run(run, argv)
    assert code == 0 and again == out and err == ""


def test_bad_input(model, tmp_path):
    """One line each, before anything is sampled or written."""
    out = tmp_path / "out"
    refused = {
        ("--verifier.kind", "command"): ["verifier.command", "missing"],
        ("--verifier.kind", "command", "--verifier.command", '["no-such-program"]'): ["verifier.command", "no program"],
        ("--verifier.command", '["true"]'): ["verifier.command", "verifier.kind exact"],
        ("--verifier.kind", "choice"): ["answer", "verifier.kind choice", "one letter"],
        ("--verifier.timeout_seconds", "0"): ["verifier.timeout_seconds", "more than 0"],
    }
    for options, said in refused.items():
        assert_refused(run(train(model, out, *options)), *said)
    assert not out.exists()
