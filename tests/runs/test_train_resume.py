"""Killed with SIGKILL anywhere and started again, ``g2r train`` ends with the run that was never interrupted, bit for bit.

Runs of the command in processes of their own, killed in the middle of a step and in the middle of a save, alone and on two
ranks. Those whose launcher matters are under torchrun; others are forked from the server of ``distributed.py``, which is
faster. Equal are the exported weights, metrics.jsonl (times left out) and samples.jsonl. Leaves out losing what the kernel
had not yet written (power loss), and the checkpoint itself (test_checkpoint.py).
"""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from g2r_megatron.cli import main
from g2r_megatron.errors import UserError
from g2r_megatron.launch import FIXED
from g2r_megatron.records.heartbeat import HEARTBEAT_FILE
from real_runs import (
    PATIENCE,
    STEPS,
    TASK,
    assert_same_run,
    checkpoints,
    finish,
    heartbeat,
    last_recorded,
    log_of,
    nothing_is_left_of,
    processes_of,
    quickstart_options,
    records,
    send,
    start,
    start_forked,
    wait_for,
)

STUCK_MINUTES = 0.2  # a rank waits for another one


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    return quickstart_options(tmp_path_factory.mktemp("data"))


# A run of the command that can be killed.


def is_saving(run: Path, since: float) -> bool:
    """A checkpoint newer than all complete ones has files written after ``since``, not those of an earlier save."""
    names = checkpoints(run)
    if not names or not names[-1].endswith(".incomplete"):
        return False
    try:
        return any(file.stat().st_mtime > since for file in (run / "checkpoints" / names[-1]).glob("*.distcp"))
    except FileNotFoundError:  # it is complete now
        return False


def all_stopped(run: Path) -> bool:
    states = [Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] for pid in processes_of(run)]
    return all(state == "T" for state in states)


def kill_in_training(run: Path, options: list[str], after_step: int, saved: int = 0) -> None:
    process = start_forked(run, options)
    wait_for(lambda: last_recorded(run) >= after_step and heartbeat(run)["saved_step"] >= saved, process, run)
    send(run, signal.SIGKILL)
    process.wait()
    assert not (run / "hf").exists() and nothing_is_left_of(run)


def kill_one_rank(run: Path, options: list[str], ranks: int, after_step: int) -> None:
    """The last rank is gone, as after the kernel ran out of memory: the launcher ends the others."""
    process = start(run, options, ranks)
    wait_for(lambda: last_recorded(run) >= after_step, process, run)
    for pid in processes_of(run, rank=ranks - 1):
        os.kill(pid, signal.SIGKILL)
    assert process.wait(PATIENCE) != 0
    assert not (run / "hf").exists() and nothing_is_left_of(run)
    errors = [line for line in log_of(run).splitlines() if "rror" in line]
    assert errors[0].startswith("g2r: error: rank 0, phase "), errors[0]
    said = heartbeat(run)
    assert said["state"] == "failed" and said["error"].endswith("no word from rank 1: killed, or stuck"), said


def stop_one_rank(run: Path, options: list[str], ranks: int, after_step: int) -> tuple[subprocess.Popen, float]:
    """The last rank hangs, as on a dead disk. The launcher, and when this was (seconds since 1970)."""
    process = start(run, [*options, "--timeout_minutes", str(STUCK_MINUTES)], ranks)
    wait_for(lambda: last_recorded(run) >= after_step, process, run)
    for pid in processes_of(run, rank=ranks - 1):
        os.kill(pid, signal.SIGSTOP)
    return process, time.time()


def wait_for_the_others(run: Path, process: subprocess.Popen, since: float) -> None:
    """The other ranks of a run with a stuck one give up after the timeout."""
    wait_for(lambda: heartbeat(run)["state"] == "failed", process, run)
    said = heartbeat(run)
    # a few seconds more on a quiet machine
    assert 60 * STUCK_MINUTES - 5 < said["time"] - since < 60 * STUCK_MINUTES + 60, said
    assert said["error"].startswith("rank 0, phase "), said
    assert said["error"].endswith("no word from rank 1: killed, or stuck"), said


def kill_in_save(run: Path, options: list[str], ranks: int) -> None:
    """All are stopped first, so that it is certain what they were doing when they are killed."""
    since = time.time()
    process = start_forked(run, [*options, "--checkpoint.save_every", "1"], ranks)  # more occasions
    while True:
        wait_for(lambda: is_saving(run, since), process, run)
        send(run, signal.SIGSTOP)
        wait_for(lambda: all_stopped(run), process, run)  # each ends the system call that it is in
        if is_saving(run, since):
            break
        send(run, signal.SIGCONT)  # too late for this one
    send(run, signal.SIGKILL)
    process.wait()
    assert is_saving(run, since) and not (run / "hf").exists() and nothing_is_left_of(run)


# In the ranks.


def train_here(arguments: list[str]) -> str:
    """``g2r train`` in this process; the error, or an empty string."""
    from g2r_megatron.cli import train_command

    try:
        train_command(arguments)
    except UserError as error:
        return str(error)
    return ""


# The tests.


def content(run: Path) -> dict[str, bytes]:
    """Every file but the one that says how it went."""
    files = (path for path in sorted(run.rglob("*")) if path.is_file() and path.name != HEARTBEAT_FILE)
    return {str(path): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def uninterrupted(worlds, options, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert worlds[1].run(train_here, [*options, "--output_dir", str(run)]) == [""]
    assert [line["step"] for line in records(run, "metrics.jsonl")] == list(range(STEPS + 1))
    assert (run / "hf" / "model.safetensors").read_bytes() != (TASK / "model" / "model.safetensors").read_bytes()
    return run


@pytest.fixture(scope="module")
def stuck(options, tmp_path_factory) -> Iterator[tuple[Path, subprocess.Popen, float]]:
    """A run on two ranks under torchrun: one rank was killed, then the run was started again and one was stopped."""
    options, run = [*options, "--grpo.preset", "robust"], tmp_path_factory.mktemp("stuck") / "run"
    try:
        kill_one_rank(run, options, 2, after_step=1)
        yield run, *stop_one_rank(run, options, 2, after_step=3)
    finally:
        send(run, signal.SIGKILL)


@pytest.fixture(scope="module")
def killed(options, tmp_path_factory) -> Path:
    """A run of one process, killed in a step after its first checkpoint."""
    run = tmp_path_factory.mktemp("killed") / "run"
    kill_in_training(run, options, after_step=3, saved=2)
    assert checkpoints(run)[0] == "step_00000002"
    return run


def test_two_ranks_one_killed_then_one_stuck(stuck):
    """The first test, because the stuck run takes most of a minute to end. The last test says how; those between compute."""
    run, launcher, _ = stuck
    assert launcher.poll() is None and last_recorded(run) >= 3


def test_killed_in_training_then_in_a_save(options, uninterrupted, killed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    kill_in_save(run, options, 1)
    finish(run, options)
    assert log_of(run).count("resuming after step ") == 2
    assert_same_run(run, uninterrupted)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_at_any_moment(options, uninterrupted, tmp_path):
    """Five kills, the first ones before anything is saved, spread over start, steps, saves and export."""
    run, rng = tmp_path / "run", random.Random(1)
    kill_in_training(run, options, after_step=1)
    assert not checkpoints(run)
    for _ in range(5):
        process, since = start_forked(run, options), time.monotonic()
        begun = len(log_of(run))
        wait_for(lambda at=begun: len(log_of(run)) > at, process, run)  # the resumed training has begun
        time.sleep(rng.uniform(0.0, 1.5) * (time.monotonic() - since) / 8)  # on a busy machine everything is slower
        send(run, signal.SIGKILL)
        process.wait()
        assert nothing_is_left_of(run)
    finish(run, options)
    assert_same_run(run, uninterrupted)


def test_resumed_on_another_layout(worlds, options, uninterrupted, killed, tmp_path):
    """From one rank to two with tensor and sequence parallel models: goes on, to rounding."""
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    resumed_after = int(checkpoints(run)[-1].removesuffix(".incomplete")[-8:])
    layouts = [f"--{model}.layout.{option}" for model in ("policy", "judge") for option in ("tp=2", "sp=true")]
    assert worlds[2].run(train_here, [*options, *layouts, "--output_dir", str(run)]) == ["", ""]
    lines, expected = records(run, "metrics.jsonl"), records(uninterrupted, "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert lines[: resumed_after + 1] == expected[: resumed_after + 1]
    first, same = lines[resumed_after + 1], expected[resumed_after + 1]
    for name in ("reward/mean", "response/length_mean", "optimizer/grad_norm", "advantage/max_abs"):
        assert first[name] == pytest.approx(same[name], rel=1e-3), name
    weights, others = (load_file(path / "hf" / "model.safetensors") for path in (run, uninterrupted))
    assert all(torch.isfinite(weights[name]).all() for name in others)


def test_a_finished_run_started_again_does_nothing(worlds, options, uninterrupted):
    before = content(uninterrupted)
    assert worlds[1].run(train_here, [*options, "--output_dir", str(uninterrupted)]) == [""]
    assert content(uninterrupted) == before


def test_more_steps_continue_a_finished_run(worlds, options, uninterrupted, tmp_path):
    """With a constant learning rate and mix: as if it had been asked for them at once, but for one evaluation."""
    run, longer = tmp_path / "run", tmp_path / "longer"
    shutil.copytree(uninterrupted, run)
    options = [*options, "--steps", str(STEPS + 1)]
    for directory in (run, longer):
        assert worlds[1].run(train_here, [*options, "--output_dir", str(directory)]) == [""]
    assert records(run, "metrics.jsonl") == records(longer, "metrics.jsonl")
    assert len(records(run, "metrics.jsonl")) == STEPS + 2
    assert (run / "hf" / "model.safetensors").read_bytes() == (longer / "hf" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("distributed", ["true", "false"])
def test_other_optimizer_options_hold_from_the_resumed_step_on(worlds, options, tmp_path, distributed):
    """Not the ones in the checkpoint: the config that is saved with the run must be true."""
    options = [*options, "--output_dir", str(tmp_path / "run"), "--eval.every", "0", "--eval.data", "[]"]
    options += ["--optimizer.distributed", distributed, "--optimizer.lr", "1e-4", "--steps"]
    assert worlds[1].run(train_here, [*options, "1"]) == [""]
    others = ["--optimizer.lr", "1e-5", "--optimizer.min_lr", "4e-6", "--optimizer.decay", "linear"]
    assert worlds[1].run(train_here, [*options, "3", *others]) == [""]
    rates = [line["optimizer/lr"] for line in records(tmp_path / "run", "metrics.jsonl")]
    assert rates == pytest.approx([1e-4, 8e-6, 6e-6])  # a straight line to min_lr after 3 steps


def test_a_damaged_checkpoint_ends_the_run_with_one_line(worlds, options, killed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    (run / "checkpoints" / "step_00000002" / "common.pt").write_bytes(b"")
    for later in checkpoints(run)[1:]:
        shutil.rmtree(run / "checkpoints" / later)
    before = content(run)
    (error,) = worlds[1].run(train_here, [*options, "--output_dir", str(run)])
    assert f"{run}/checkpoints/step_00000002: cannot be loaded (common.pt has 0 bytes" in error
    assert content(run) == before
    assert heartbeat(run)["state"] == "failed" and heartbeat(run)["error"] == error


def test_a_damaged_checkpoint_does_not_change_the_run(worlds, options, uninterrupted, tmp_path):
    """The one before it is used; the steps between are made again, bit for bit, and what was damaged is kept."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    file = run / "checkpoints" / "step_00000006" / "__0_0.distcp"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 3] ^= 16
    file.write_bytes(damaged)
    assert worlds[1].run(train_here, [*options, "--output_dir", str(run)]) == [""]
    assert (run / "checkpoints" / "step_00000006.damaged" / file.name).read_bytes() == damaged
    shutil.rmtree(run / "checkpoints" / "step_00000006.damaged")
    assert_same_run(run, uninterrupted)


CHANGED = {
    "seed": "7",
    "policy.model": str(TASK / "data"),
    "policy.precision.dtype": "bf16",
    "judge.model": str(TASK / "model"),
    "data.train": f'["{TASK}/data/train.jsonl"]',
    "grpo.preset": "grpo",
    "rollout.prompts_per_step": "3",
    "optimizer.distributed": "false",
}


def test_every_fixed_option_is_tried():
    assert set(CHANGED) == set(FIXED)


@pytest.mark.parametrize("option", CHANGED)
def test_another_trajectory_in_the_same_directory_is_refused(options, uninterrupted, capsys, option):
    before = content(uninterrupted)
    assert main(["train", *options, "--output_dir", str(uninterrupted), f"--{option}", CHANGED[option]]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"g2r: error: {option}: ") and error.count("\n") == 1 and str(uninterrupted) in error
    assert content(uninterrupted) == before


@pytest.mark.timeout(600)
def test_two_ranks_one_stuck_then_all_killed_in_a_save(worlds, options, stuck, tmp_path):
    """torchrun kills a rank that ignores SIGTERM, 30 s after the others have given up."""
    run, launcher, since = stuck
    wait_for_the_others(run, launcher, since)
    assert launcher.wait(PATIENCE) != 0
    assert nothing_is_left_of(run)
    options, reference = [*options, "--grpo.preset", "robust"], tmp_path / "reference"
    kill_in_save(run, options, 2)
    assert worlds[2].run(train_here, [*options, "--output_dir", str(run)]) == ["", ""]
    assert worlds[2].run(train_here, [*options, "--output_dir", str(reference)]) == ["", ""]
    assert_same_run(run, reference)
