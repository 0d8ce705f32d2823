"""Twenty kills at random moments in one run: nothing is lost, nothing hangs, the weights are right bit for bit.

python tests/slurm/cluster.py start && python tests/slurm/soak.py [--kills 20] [--seed 1]

A job of slurm/train_30b.sh on two virtual nodes, with the quickstart's model, is hurt again and again: kill -9 of a
rank, USR1 to the batch shell (as before a time limit), a node set down; three quarters of the time while it trains, else
while it starts. Printed is how long it takes until the next attempt has finished a step. Not part of CI.
"""

import argparse
import os
import random
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE.parent / "runs")]
from cluster import ask, is_up  # noqa: E402
from jobs import Job  # noqa: E402

from distributed import Worlds  # noqa: E402
from real_runs import TASK, checkpoints, heartbeat, quickstart_options, records  # noqa: E402
from test_train_resume import train_here  # noqa: E402

RANK, SIGNAL, NODE = "kill -9 of a rank", "scancel --signal=USR1", "node down"
STEPS_A_KILL = 5  # an attempt is left in peace for 1 to 3, and may make some more while it is being hurt


def stepped(job: Job, attempt: int) -> bool:
    """The attempt has finished a step of its own."""
    log = job.home / "logs" / f"judge_30b-{job.id}" / f"attempt_{attempt}" / "all.log"
    return log.exists() and re.search(r"^\d: step [1-9]", log.read_text(), re.M) is not None


def newest_checkpoint(run: Path) -> int:
    return max((int(name[5:]) for name in checkpoints(run) if not name.endswith(".incomplete")), default=0)


def hurt(job: Job, kind: str, rng: random.Random) -> None:
    if kind == RANK:
        job.kill_rank(rng.randrange(2))
    elif kind == SIGNAL:
        ask("scancel", "--batch", "--signal=USR1", job.id)
    else:
        job.lose_node(rng.choice(job.nodes()))


def soak(job: Job, run: Path, kinds: list[str], rng: random.Random) -> list[tuple[str, float]]:
    """Hurt the job once for each of ``kinds``; the kind, and seconds from then to the next attempt's first step."""
    measured = []
    for number, kind in enumerate(kinds, 1):
        attempt = job.attempt()
        job.wait(lambda: bool(job.ranks(0) and job.ranks(1)))
        starting = rng.random() < 0.25
        if not starting:
            job.wait(lambda attempt=attempt: stepped(job, attempt))
            reached = heartbeat(run)["step"] + rng.randrange(3)
            job.wait(lambda reached=reached: heartbeat(run)["step"] >= reached)
        time.sleep(rng.uniform(0.0, 6.0 if starting else 1.5))
        saved, since = newest_checkpoint(run), time.monotonic()
        said = heartbeat(run) if (run / "heartbeat.json").exists() else {"phase": "start", "step": 0}
        hurt(job, kind, rng)
        job.wait(lambda attempt=attempt: job.attempt() > attempt)
        job.wait(lambda attempt=attempt: stepped(job, attempt + 1))
        measured.append((kind, time.monotonic() - since))
        assert newest_checkpoint(run) >= saved, f"the checkpoint of step {saved} is lost"
        when = "starting" if starting else f"{said['phase']} after step {said['step']}"
        print(f"{number:2} {kind:22} {when:22} saved {saved:3}  {measured[-1][1]:6.1f} s", flush=True)
    return measured


def summary(measured: list[tuple[str, float]]) -> None:
    print("\n| hurt by | times | min s | median s | max s |\n|---|---|---|---|---|")
    for kind in (RANK, SIGNAL, NODE, "all"):
        seconds = [taken for other, taken in measured if kind in (other, "all")]
        if seconds:
            middle = statistics.median(seconds)
            print(f"| {kind} | {len(seconds)} | {min(seconds):.1f} | {middle:.1f} | {max(seconds):.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if not is_up():
        raise SystemExit("start the cluster first: python tests/slurm/cluster.py start")
    rng = random.Random(arguments.seed)
    kinds = [(RANK, SIGNAL, NODE)[i % 3] for i in range(arguments.kills)]
    rng.shuffle(kinds)
    with tempfile.TemporaryDirectory(prefix="g2r-soak-") as name:
        home = Path(name)
        steps = str(STEPS_A_KILL * arguments.kills)
        options = [*quickstart_options(home)[4:], "--steps", steps, "--eval.every", "0", "--checkpoint.save_every", "2"]
        run, reference, config = home / "run", home / "reference", str(TASK / "config.yaml")
        job = Job("train_30b", options, home, "--time=600", RUN=str(run), CONFIG=config, MAX_STALLED="6")
        try:
            measured = soak(job, run, kinds, rng)
            state = job.end()
        finally:
            ask("scancel", "--quiet", job.id)
        assert state == "COMPLETED 0:0", job.text()
        worlds = Worlds()
        assert worlds[2].run(
            train_here, ["--config", config, *options, "--output_dir", str(reference)], timeout=1800.0
        ) == ["", ""]
        worlds.close()
        weights = [(path / "hf" / "model.safetensors").read_bytes() for path in (run, reference)]
        assert weights[0] == weights[1], "the weights are not those of the uninterrupted run"
        assert records(run, "metrics.jsonl") == records(reference, "metrics.jsonl")
        summary(measured)
        print(f"{steps} steps in {job.attempt()} attempts; weights and metrics are those of the uninterrupted run")


if __name__ == "__main__":
    main()
