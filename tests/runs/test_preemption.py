"""A signal ends a run at the next place where no rank has begun to change the weights; started again, nothing shows.

SIGUSR1 or SIGTERM to one rank, in every phase of a step and before the first one: the run saves what is finished, says
"preempted", exits with 75, and the resumed run is the uninterrupted one, bit for bit. Also the heartbeat and the exit
codes. The signals are real; in the worlds of ``distributed.py`` a rank sends itself one when its heartbeat tells the
wanted phase. Leaves out kills (test_train_resume.py) and what Slurm makes of it (tests/slurm).
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from distributed import free_port
from g2r_megatron.cli import main
from g2r_megatron.errors import UserError
from g2r_megatron.records.heartbeat import Heartbeat, read_heartbeat
from real_runs import (
    PATIENCE,
    assert_same_run,
    checkpoints,
    heartbeat,
    last_recorded,
    log_of,
    processes_of,
    quickstart_options,
    send,
    start,
    start_forked,
)
from real_runs import wait_for as wait_for_run


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    return [*quickstart_options(tmp_path_factory.mktemp("data")), "--rollout.batch_size", "3"]


# In the ranks.


def train_signalled(arguments: list[str], run: str, rank: int, phase: str, step: int) -> str:
    """``g2r train`` in this process; ``rank`` is signalled in ``phase`` after ``step`` finished ones. How it ended."""
    import torch.distributed as dist

    from g2r_megatron.cli import train_command
    from g2r_megatron.errors import Preempted

    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            said = read_heartbeat(Path(run))
            if said and (said["state"], said["phase"], said["step"]) == ("running", phase, step):
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    if dist.get_rank() == rank:
        watcher.start()
    try:
        train_command([*arguments, "--output_dir", run])
    except Preempted:
        return "preempted"
    except UserError as error:
        return str(error)
    finally:
        ended.set()
        if watcher.is_alive():
            watcher.join()
    return "finished"


# The tests.


@pytest.fixture(scope="module")
def uninterrupted(worlds, options, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert worlds[2].run(train_signalled, options, str(run), -1, "", 0) == ["finished"] * 2
    return run


def test_one_rank_of_two_is_signalled_in_every_phase(worlds, options, uninterrupted, tmp_path):
    """The other rank, which knows nothing of it, leaves at the same place."""
    run, left_after = tmp_path / "run", []
    for rank, phase, step in ((1, "eval", 0), (0, "sample", 0), (1, "judge", 1), (1, "update", 2), (1, "save", 4)):
        ends = worlds[2].run(train_signalled, options, str(run), rank, phase, step)
        assert ends == ["preempted"] * 2, phase
        said = heartbeat(run)
        assert said["state"] == "preempted" and said["step"] == said["saved_step"] and said["error"] is None
        left_after.append(said["step"])
        expected = [f"step_{said['step']:08d}"] if said["step"] else []
        assert checkpoints(run)[-1:] == expected
    # before the first step, in it, before or (if the judge was faster than the signal) after an update, after a save
    assert left_after[:2] == [0, 0] and left_after[2] in (1, 2) and left_after[3] in (2, 3) and left_after[4] == 4
    assert worlds[2].run(train_signalled, options, str(run), -1, "", 0) == ["finished"] * 2
    assert_same_run(run, uninterrupted)
    said = heartbeat(run)
    assert said["state"] == "finished" and said["step"] == said["saved_step"] == said["steps"] == 6


def test_the_command_exits_with_75(options, tmp_path):
    run = tmp_path / "run"
    process = start_forked(run, options)
    try:
        wait_for_run(lambda: last_recorded(run) >= 1, process, run)
        os.kill(process.pids[0], signal.SIGUSR1)
        assert process.wait(PATIENCE) == 75
    finally:
        send(run, signal.SIGKILL)
    said = heartbeat(run)
    assert said["state"] == "preempted" and said["pid"] == process.pids[0] and said["saved_step"] >= 1
    assert checkpoints(run)[-1] == f"step_{said['saved_step']:08d}"  # though save_every is 2


# Starts two ranks and waits; a signal ends it as any program that does not care, and the ranks are told nothing.
LAUNCHER = """
import os, subprocess, sys
port, *command = sys.argv[1:]
place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
ranks = [subprocess.Popen(command, env={**os.environ, **place, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in (0, 1)]
sys.exit(max(rank.wait() for rank in ranks))
"""


@pytest.mark.parametrize(
    ("launcher", "number", "changes"),
    [("silent", signal.SIGTERM, []), ("torchrun", signal.SIGUSR1, ["--judge.ranks", "1"])],
    ids=["a launcher that forwards nothing", "torchrun with its store, judge on its own rank"],
)
def test_a_signal_that_only_the_launcher_gets(options, tmp_path, monkeypatch, launcher, number, changes):
    """It ends the launcher; every rank then leaves at the same place, saves and says 75."""
    run, codes = tmp_path / "run", tmp_path / "codes"
    codes.mkdir()
    monkeypatch.setenv("G2R_EXIT_CODES", str(codes))
    launch = [sys.executable, "-c", LAUNCHER, str(free_port())] if launcher == "silent" else None
    process = start(run, [*options, *changes], 2, command=launch)
    try:
        wait_for_run(lambda: last_recorded(run) >= 1, process, run)
        os.kill(process.pid, number)
        assert process.wait(PATIENCE) == -number
        deadline = time.monotonic() + PATIENCE
        while processes_of(run) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not processes_of(run), log_of(run)
    finally:
        send(run, signal.SIGKILL)
    said = heartbeat(run)
    assert said["state"] == "preempted" and said["saved_step"] == said["step"] >= 1, log_of(run)
    assert checkpoints(run)[-1] == f"step_{said['saved_step']:08d}"
    left = {file.name: file.read_text() for file in codes.iterdir()}
    assert left["rank_0"] == "75\n" and left["rank_1"] == ("0\n" if changes else "75\n")  # a judge rank just ends


def test_heartbeat(tmp_path, monkeypatch):
    """What it holds, which start of the run it counts, and that only known fields and states are written."""
    monkeypatch.delenv("G2R_ATTEMPT", raising=False)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert read_heartbeat(tmp_path) is None
    beat = Heartbeat(tmp_path, steps=5)
    beat.beat(state="running", phase="judge", step=2, saved_step=1)
    said = json.loads((tmp_path / "heartbeat.json").read_text())
    assert abs(said.pop("time") - time.time()) < 60 and said.pop("host") and said.pop("pid") == os.getpid()
    assert said == {
        "state": "running",
        "step": 2,
        "saved_step": 1,
        "phase": "judge",
        "steps": 5,
        "attempt": 3,
        "job": "77",
        "error": None,
    }
    assert beat.place() == "rank 0, phase judge, step 3"
    for wrong in ({"state": "asleep"}, {"stepp": 3}):
        with pytest.raises(ValueError, match="not a heartbeat"):
            beat.beat(**wrong)
    monkeypatch.setenv("RANK", "3")
    other = Heartbeat(tmp_path, steps=5)
    other.beat(state="running")
    assert read_heartbeat(tmp_path)["step"] == 2  # the first rank alone writes,
    other.fail("rank 3, phase judge, step 3: gone", write=True)  # unless another one speaks for a run that has failed
    assert read_heartbeat(tmp_path)["state"] == "failed"
    monkeypatch.setenv("G2R_ATTEMPT", "9")
    assert Heartbeat(tmp_path, steps=5)._content["attempt"] == 9
    monkeypatch.setenv("G2R_ATTEMPT", "x")
    with pytest.raises(UserError, match="G2R_ATTEMPT.*'x'"):
        Heartbeat(tmp_path, steps=5)


def test_a_heartbeat_that_cannot_be_written_is_named(options, tmp_path, capsys):
    """Exit code 2, before any work."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "heartbeat.json").mkdir()  # cannot be replaced
    assert main(["train", *options, "--output_dir", str(run)]) == 2
    assert f"{run}/heartbeat.json: cannot be written" in capsys.readouterr().err
    assert sorted(path.name for path in run.iterdir()) == ["heartbeat.json"]
