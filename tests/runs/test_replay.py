"""A run that replays what another one has dumped takes the same steps, bit for bit.

Three steps with evaluation: exported weights, metrics.jsonl (times left out) and samples.jsonl are compared. Replayed whole,
and in two parts with a restart between them. Leaves out what vLLM has sampled (test_vllm_training.py), and files that do not
fit (tests/unit/test_recording.py).
"""

import json
from pathlib import Path

import pytest

from g2r_megatron.rollout.recording import recorded_files
from real_runs import quickstart_options, records
from test_bad_input import assert_refused, run

BATCHES = ["eval_00000000", "step_00000001", "step_00000002", "eval_00000003", "step_00000003"]


def train_here(arguments: list[str]) -> None:
    """``g2r train`` in this process."""
    from g2r_megatron.cli import train_command

    train_command(arguments)


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    return [*quickstart_options(tmp_path_factory.mktemp("data")), "--steps", "3", "--optimizer.lr", "1e-3"]


@pytest.fixture(scope="module")
def dumped(worlds, options, tmp_path_factory) -> Path:
    """A directory with ``run`` and its ``dump``."""
    directory = tmp_path_factory.mktemp("dumped")
    more = ["--output_dir", str(directory / "run"), "--rollout.dump", str(directory / "dump")]
    worlds[1].run(train_here, [*options, *more])
    return directory


def assert_same_steps(run: Path, reference: Path) -> None:
    assert [line["step"] for line in records(run, "metrics.jsonl")] == [0, 1, 2, 3]
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert records(run, name) == records(reference, name)
    weights = [(path / "hf" / "model.safetensors").read_bytes() for path in (run, reference)]
    assert weights[0] == weights[1]


def test_the_same_steps_whole_and_in_parts(worlds, options, dumped, tmp_path):
    """The second run is stopped after two steps and started again; it dumps what it replays, which is the same."""
    replay = ["--rollout.replay", str(dumped / "dump")]
    worlds[1].run(train_here, [*options, *replay, "--output_dir", str(tmp_path / "whole")])
    assert_same_steps(tmp_path / "whole", dumped / "run")
    again = [*options, *replay, "--output_dir", str(tmp_path / "parts"), "--rollout.dump", str(tmp_path / "dump")]
    worlds[1].run(train_here, [*again, "--steps", "2", "--eval.data", "[]", "--eval.every", "0"])
    worlds[1].run(train_here, again)
    assert (tmp_path / "parts" / "hf" / "model.safetensors").read_bytes() == (
        dumped / "run" / "hf" / "model.safetensors"
    ).read_bytes()
    for name in ("step_00000001", "step_00000003"):
        of_replay, of_run = (path / f"{name}.jsonl" for path in (tmp_path / "dump", dumped / "dump"))
        assert of_replay.read_text() == of_run.read_text()


def test_what_a_dump_holds(dumped):
    """A file a batch; for people a line a response with its score, as the metrics say it."""
    assert sorted(path.stem for _, path in recorded_files(dumped / "dump")) == sorted(BATCHES)
    rows = [json.loads(line) for line in (dumped / "dump" / "step_00000002.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and all(row["step"] == 2 and row["response"] and row["verdicts"] for row in rows)
    line = records(dumped / "run", "metrics.jsonl")[2]
    assert sum(row["reward"] for row in rows) / 8 == pytest.approx(line["reward/mean"])


def test_what_does_not_fit_is_refused_before_any_work(options, dumped, tmp_path):
    """By the command: exit code 2, one line, and no run directory."""
    replay, output = ["--rollout.replay", str(dumped / "dump")], ["--output_dir", str(tmp_path / "run")]
    refused = [
        ([*replay, "--seed", "7"], ["rollout.replay", "seed 1234, here 7"]),
        ([*replay, "--steps", "4"], ["3 steps", "step 4 of 4", "set steps to 3"]),
        ([*replay, "--rollout.correction", "tis"], ["rollout.correction", "no log-probs"]),
        ([*replay, "--rollout.dump", str(dumped / "dump")], ["rollout.dump", "is rollout.replay too"]),
        (["--rollout.dump", str(dumped / "dump")], ["rollout.dump", "another run"]),
        (["--rollout.replay", str(tmp_path)], ["rollout.replay", "no recorded steps"]),
    ]
    for more, said in refused:
        assert_refused(run(["train", *options, *output, *more]), *said)
    assert not (tmp_path / "run").exists()
