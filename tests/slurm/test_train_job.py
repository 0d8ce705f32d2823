"""``sbatch slurm/train_30b.sh`` survives what a cluster does: the weights are those of an uninterrupted run, bit for bit.

The script as it is, with the quickstart's model, on two virtual nodes of a real Slurm over gloo. Leaves out NCCL, a
network that fails, and a node whose processes live on after Slurm has given it up.
"""

from pathlib import Path

import pytest
from cluster import ask
from jobs import PATIENCE, Job

from real_runs import TASK, checkpoints, heartbeat, last_recorded, quickstart_options, records
from test_train_resume import train_here

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]
STEPS = 24
CONFIG = {"CONFIG": str(TASK / "config.yaml")}  # of its paths, only the model's is not replaced: relative to the root


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    changes = ["--steps", str(STEPS), "--eval.every", "12", "--checkpoint.save_every", "2"]
    return [*quickstart_options(tmp_path_factory.mktemp("data"))[4:], *changes]


def trained_in(job: Job, run: Path, attempt: int) -> int:
    """Wait until this attempt has trained a step and there is a checkpoint; the last step that it has trained."""
    job.wait(lambda: last_recorded(run) >= 0 and heartbeat(run)["attempt"] == attempt)
    reached = last_recorded(run)
    job.wait(lambda: last_recorded(run) > reached and heartbeat(run)["saved_step"] > 0)
    return last_recorded(run)


def test_time_limit_dead_rank_dead_node_and_cancelled(options, worlds, tmp_path):
    reference, run = tmp_path / "reference", tmp_path / "run"
    arguments = ["--config", CONFIG["CONFIG"], *options, "--output_dir", str(reference)]
    assert worlds[2].run(train_here, arguments, timeout=PATIENCE) == ["", ""]
    worlds.close()  # its processes poll

    # --signal of the script is 10 minutes before the limit: at once, or when Slurm looks, every half a minute
    job = Job("train_30b", options, tmp_path, "--time=10", RUN=str(run), MAX_STALLED="6", **CONFIG)
    job.wait(lambda: job.attempt() == 2 or last_recorded(run) >= 6)
    if job.attempt() == 1:
        ask("scancel", "--batch", "--signal=USR1", job.id)
    job.wait(lambda: job.attempt() == 2)
    ask("scontrol", "update", f"jobid={job.id}", "timelimit=60")
    assert "asked to leave" in job.text() and "coming back" in job.text()
    second = trained_in(job, run, attempt=2)

    job.kill_rank(1)
    job.wait(lambda: job.attempt() == 3)
    assert "failed with code" in job.text()
    trained_in(job, run, attempt=3)

    job.lose_node(job.nodes()[1])
    assert job.attempt() == 4 and "NODE FAILURE" in job.text()
    job.wait(lambda: heartbeat(run)["state"] == "running" and heartbeat(run)["attempt"] == 4)

    ask("scancel", job.id)
    assert job.end().startswith("CANCELLED")
    assert heartbeat(run)["state"] == "preempted"  # saved in the 30 s (KillWait) that Slurm gives
    saved = heartbeat(run)["saved_step"]
    assert saved and not (run / "hf").exists()

    again = Job("train_30b", options, tmp_path, RUN=str(run), **CONFIG)
    assert again.end() == "COMPLETED 0:0"
    assert f"resuming after step {saved}" in again.text() and "finished in attempt 1" in again.text()

    assert (run / "hf" / "model.safetensors").read_bytes() == (reference / "hf" / "model.safetensors").read_bytes()
    assert records(run, "metrics.jsonl") == records(reference, "metrics.jsonl")
    assert checkpoints(run)[-1] == f"step_{STEPS:08d}" and heartbeat(run)["state"] == "finished"
    logs = tmp_path / "logs" / f"judge_30b-{job.id}"
    assert sorted(path.name for path in logs.iterdir()) == [
        *(f"attempt_{n}" for n in range(1, 5)),
        "latest",
        "progress",
    ]
    assert (logs / "latest").resolve() == logs / "attempt_4"
    assert f"step {second}/{STEPS}" in (logs / "attempt_2" / "all.log").read_text()


def test_a_plan_that_cannot_work_is_refused(options, tmp_path):
    job = Job("train_30b", [*options, "--policy.layout.tp=3"], tmp_path, RUN=str(tmp_path / "run"), **CONFIG)
    assert job.end() == "FAILED 2:0"
    assert job.attempt() == 1 and not (tmp_path / "run").exists()
    assert "policy.layout" in job.text() and "g2r plan refuses this job" in job.text()


def test_bad_input_that_only_the_ranks_find_is_not_tried_again(options, tmp_path):
    """The run directory is looked at when the job is running; torchrun says 1 whatever its ranks end with."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 99\n")  # of another run
    job = Job("train_30b", options, tmp_path, RUN=str(tmp_path / "run"), POLICY=str(TASK / "model"), **CONFIG)
    assert job.end() == "FAILED 2:0"
    assert job.attempt() == 1
    assert "choose another output_dir" in job.text() and "bad input" in job.text()


def test_a_crash_loop_ends(options, tmp_path):
    """Every attempt crashes at its start (the network interface does not exist); the second one is the last."""
    settings = dict(RUN=str(tmp_path / "run"), MAX_STALLED="2", GLOO_SOCKET_IFNAME="none0", **CONFIG)
    job = Job("train_30b", options, tmp_path, **settings)
    assert job.end() == "FAILED 1:0"
    assert job.attempt() == 2
    assert "stopped: 2 attempts without progress (all began at 0)" in job.text()
