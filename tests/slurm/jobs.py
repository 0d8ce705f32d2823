"""Jobs of the scripts in slurm/ on the test cluster: submitted, watched, hurt. Not a test."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from pathlib import Path

from cluster import DIRECTORY, ENVIRONMENT, ask, restart_node

ROOT = Path(__file__).parents[2]
PATIENCE = 900.0  # seconds for anything to happen on a busy machine
# A rank a node, of a CPU; --exclusive gives a job all GPUs of its nodes, so the number of ranks is told by itself.
SMALL = {
    "G2R_VENV": sys.prefix,
    "GPUS_PER_NODE": "1",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONPATH": str(ROOT),
}

SUBMITTED: list[str] = []  # ids of all jobs


def kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):  # ended meanwhile
            os.kill(pid, signal.SIGKILL)


class Job:
    """A submitted job; its Slurm log is ``DIRECTORY/NAME-ID.log``, its attempts' logs are under logs/ of its home."""

    def __init__(self, script: str, options: list[str], home: Path, *sbatch: str, **environment: str):
        """``home`` stands for the repository's root: what the job writes goes there, what it reads is linked."""
        for name in ("slurm", "examples", "tools", "g2r_megatron"):
            if not (home / name).exists():
                (home / name).symlink_to(ROOT / name)
        self.home, self.log = home, home / f"{script}.log"
        command = ["sbatch", "--parsable", f"--output={self.log}", *sbatch, f"slurm/{script}.sh", *options]
        settings = {**ENVIRONMENT, **SMALL, **environment}
        done = subprocess.run(command, cwd=home, env=settings, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        self.id = done.stdout.strip()
        SUBMITTED.append(self.id)

    def task(self, number: int) -> "Job":
        """A task of an array; its log is ``NAME-NUMBER.log``."""
        task = copy(self)
        task.id, task.log = f"{self.id}_{number}", self.log.with_name(f"{self.log.stem}-{number}.log")
        return task

    def field(self, name: str) -> str:
        """A field of ``scontrol show job``, e.g. JobState."""
        shown = ask("scontrol", "show", "job", "-o", self.id)
        return next(word.partition("=")[2] for word in shown.split() if word.startswith(f"{name}="))

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def ended(self) -> bool:
        """It waits, runs and completes no more. (On its way back into the queue JobState may tell of an end.)"""
        return not ask("squeue", "-h", "-j", self.id)

    def wait(self, happened: Callable[[], bool], may_end: bool = False) -> None:
        """Until ``happened()``; fails when the job ends before, unless that ``may_end`` it."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            assert may_end or not self.ended(), f"ended before:\n{self.text()}"
            assert time.monotonic() < deadline, f"nothing happened:\n{self.text()}"
            time.sleep(0.3)  # each look is a process

    def end(self) -> str:
        """Wait until the job is over; its state and exit code, e.g. ``COMPLETED 0:0``."""
        self.wait(self.ended, may_end=True)
        return f"{self.field('JobState')} {self.field('ExitCode')}"

    def attempt(self) -> int:
        return int(self.field("Restarts")) + 1

    def nodes(self) -> list[str]:
        """Those it runs on, the batch shell's first."""
        return ask("scontrol", "show", "hostnames", self.field("NodeList")).split()

    def lose_node(self, node: str) -> None:
        """The node goes down with all that runs on it, and starts anew when the job is back in the queue.

        Slurm is told that the node is down instead of finding out after SlurmdTimeout. Its slurmd starts anew, as after a
        reboot: the old one would refuse the job it still knows, and the node be drained.
        """
        attempt = self.attempt()
        ask("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        kill(self.processes(f"SLURMD_NODENAME={node}"))
        steps = DIRECTORY / f"spool.{node}"  # slurmd's sockets to the job's steps that live
        self.wait(lambda: self.attempt() > attempt and not list(steps.glob(f"{node}_{self.id}.*")))
        restart_node(node)
        ask("scontrol", "update", f"nodename={node}", "state=resume")

    def processes(self, *settings: str) -> list[int]:
        """Pids of the job's processes, on any node, with these settings (``NAME=value``) in their environment."""
        wanted = {setting.encode() for setting in (f"SLURM_JOB_ID={self.field('JobId')}", *settings)}
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if wanted <= set((entry / "environ").read_bytes().split(b"\0")):
                        found.append(int(entry.name))
                except OSError:  # ended meanwhile
                    continue
        return found

    def ranks(self, number: int) -> list[int]:
        """Pids of the rank with that number, on whichever node."""
        return self.processes(f"RANK={number}")

    def kill_rank(self, number: int) -> None:
        pids = self.ranks(number)
        assert pids
        kill(pids)
