"""RUN/heartbeat.json: what a run is doing and when it last said so, for launchers, reports and people."""

import json
import os
import socket
import time
from pathlib import Path

from g2r_megatron.errors import UserError
from g2r_megatron.records.files import make_directory, replace_text
from g2r_megatron.records.progress_bar import format_seconds

HEARTBEAT_FILE = "heartbeat.json"
STATES = ("starting", "running", "preempted", "finished", "failed")


class Heartbeat:
    """The first rank replaces the whole file at every change. A reader sees its age by ``time``.

    {"state": one of STATES, "time": unix seconds, "step": last finished step, "saved_step": newest complete checkpoint
    (0: none), "phase", "steps": in all, "attempt": 1 for the first start, "job": Slurm's id or null, "host", "pid",
    "error": why it failed, or null}
    """

    def __init__(self, output_dir: Path, steps: int):
        self.path = output_dir / HEARTBEAT_FILE
        self._rank = int(os.environ.get("RANK", 0))
        self._content = {
            "state": "starting",
            "time": 0.0,
            "step": 0,
            "saved_step": 0,
            "phase": "start",
            "steps": steps,
            "attempt": attempt(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "error": None,
        }

    def beat(self, **changes) -> None:
        """Note ``changes``; the first rank writes them, with the time. Raises ``UserError`` when the disk refuses."""
        unknown = changes.keys() - self._content.keys()
        if unknown or changes.get("state", STATES[0]) not in STATES:
            raise ValueError(f"not a heartbeat: {changes}")
        self._content |= changes
        if self._rank == 0:
            self._write()

    def fail(self, error: str, write: bool) -> None:
        """The run has failed. ``write``: for a rank that speaks for the run, which need not be the first."""
        self._content |= {"state": "failed", "error": error}
        if write:
            self._write()

    def place(self) -> str:
        """``rank 3, phase judge, step 12``: where this rank is, in the step that is being made."""
        step = self._content["step"] + 1 if self._content["state"] == "running" else self._content["step"]
        return f"rank {self._rank}, phase {self._content['phase']}, step {step}"

    def _write(self) -> None:
        self._content["time"] = time.time()
        make_directory(self.path.parent)
        replace_text(self.path, json.dumps(self._content) + "\n")


def attempt() -> int:
    """Which start of the run this is: G2R_ATTEMPT, else what Slurm has requeued, else 1."""
    if "G2R_ATTEMPT" in os.environ:
        text = os.environ["G2R_ATTEMPT"]
        if not text.isdigit():
            raise UserError("G2R_ATTEMPT", repr(text), "must be a whole number")
        return int(text)
    return int(os.environ.get("SLURM_RESTART_COUNT", 0)) + 1


def read_heartbeat(run_dir: Path) -> dict | None:
    """The heartbeat of a run directory; None of a run that has none."""
    path = run_dir / HEARTBEAT_FILE
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(str(path), f"broken JSON ({error})", "delete it") from error


def described(said: dict, now: float) -> str:
    """``running, phase judge, step 12 of 100, checkpoint of step 10, heard of 0:03 ago``; ``now``: unix seconds."""
    phase = f", phase {said['phase']}" if said["state"] in ("starting", "running") else ""
    saved = f"checkpoint of step {said['saved_step']}" if said["saved_step"] else "no checkpoint yet"
    again = f", start {said['attempt']}" if said["attempt"] > 1 else ""
    error = f": {said['error']}" if said["error"] else ""
    age = format_seconds(max(0.0, now - said["time"]))
    return f"{said['state']}{phase}, step {said['step']} of {said['steps']}, {saved}{again}, heard of {age} ago{error}"
