"""Runs of ``g2r train`` in processes of their own, which can be signalled, stopped and killed. Not a test."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from distributed import PROCESSES, free_port, start_server
from g2r_megatron.records.heartbeat import HEARTBEAT_FILE

ROOT = Path(__file__).parents[1]
TASK = ROOT / "examples" / "quickstart"
STEPS, SAVE_EVERY = 6, 2
PATIENCE = 600.0  # seconds for anything to happen on a busy machine
MARK = "G2R_TEST_RUN"  # in the environment of what ``start`` starts, and of all that this starts


def quickstart_options(data: Path) -> list[str]:
    """The quickstart's task and model with a few prompts, kept in ``data``: a step takes half a second."""
    for name, rows in (("train", 8), ("eval", 2)):
        lines = (TASK / "data" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (data / f"{name}.jsonl").write_text("".join(lines[:rows]))
    return [
        *("--config", str(TASK / "config.yaml"), "--policy.model", str(TASK / "model")),
        *("--data.train", f'["{data}/train.jsonl"]', "--eval.data", f'["{data}/eval.jsonl"]'),
        *("--steps", str(STEPS), "--eval.every", "3", "--checkpoint.save_every", str(SAVE_EVERY)),
        *("--checkpoint.keep_last", "2", "--log.samples_every", "1", "--log.tensorboard", "false"),
        *("--rollout.prompts_per_step", "2", "--rollout.responses_per_prompt", "4"),
        *("--rollout.max_response_tokens", "20", "--grpo.preset", "paper"),
    ]


def train_command(arguments: Sequence[str], ranks: int = 1) -> subprocess.CompletedProcess:
    """``g2r train`` on ``ranks`` ranks to its end."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *torchrun, "-m", "g2r_megatron.cli", "train", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)


def processes_of(run: Path, rank: int | None = None) -> list[int]:
    """Living processes of the runs in ``run``: launcher, ranks and all they started; or those of one rank."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
                writes_log = (entry / "fd" / "1").readlink() == Path(f"{run}.log")
            except OSError:  # ended meanwhile
                continue
            of_rank = rank is None or f"RANK={rank}".encode() in environment
            if (writes_log or f"{MARK}={run}".encode() in environment) and of_rank:
                found.append(int(entry.name))
    return found


def send(run: Path, number: signal.Signals) -> None:
    """To all processes of the run, until no new one is found."""
    reached: set[int] = set()
    while new := set(processes_of(run)) - reached:
        for pid in new:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        reached |= new


def start(
    run: Path, options: list[str], ranks: int, launcher: Sequence[str] = (), command: Sequence[str] | None = None
) -> subprocess.Popen:
    """``g2r train`` on ``ranks`` ranks. ``launcher``: options of torchrun; ``command``: another launcher in its place."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *launcher]
    python = [sys.executable, *(torchrun if ranks > 1 and command is None else [])]
    command = [*(command or ()), *python, "-m", "g2r_megatron.cli", "train", *options, "--output_dir", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", MARK: str(run)}
    with open(f"{run}.log", "ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


class Forked:
    """A ``g2r`` command in processes of its own, without their imports: forked from distributed.py's server, which has them.

    The ranks have no launcher, as under srun. What they print is appended to ``log``. Methods as of ``subprocess.Popen``,
    for all ranks together.
    """

    def __init__(self, arguments: Sequence[str], log: Path, ranks: int = 1, cwd: Path = ROOT):
        start_server()
        place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self._ranks = []
        for rank in range(ranks):
            environment = {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            given = (list(arguments), log, cwd, environment)
            self._ranks.append(PROCESSES.Process(target=_command, args=given, daemon=True))
            self._ranks[-1].start()

    @property
    def pids(self) -> list[int]:
        """By rank."""
        return [rank.pid for rank in self._ranks]

    def poll(self) -> int | None:
        """Exit code of a rank that has ended, minus the signal that ended it; None while all live."""
        return next((rank.exitcode for rank in self._ranks if rank.exitcode is not None), None)

    def wait(self, timeout: float | None = None) -> int | None:
        for rank in self._ranks:
            rank.join(timeout)
        return self.poll()


def _command(arguments: list[str], log: Path, cwd: Path, environment: dict[str, str]) -> None:
    """In the new process."""
    from g2r_megatron.cli import main

    os.environ.update(environment)
    os.chdir(cwd)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(main(arguments))


def forked(arguments: Sequence[str], log: Path) -> tuple[int | None, str]:
    """A ``g2r`` command of one process, forked, to its end: exit code, and all that it printed."""
    log.unlink(missing_ok=True)
    code = Forked(arguments, log).wait(PATIENCE)
    return code, log.read_text()


def start_forked(run: Path, options: list[str], ranks: int = 1) -> Forked:
    """As ``start``, where no launcher is tested."""
    return Forked(["train", *options, "--output_dir", str(run)], Path(f"{run}.log"), ranks)


def log_of(run: Path) -> str:
    return Path(f"{run}.log").read_text()


def wait_for(happened: Callable[[], bool], process: subprocess.Popen | Forked, run: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert process.poll() is None, f"ended before it could be killed:\n{log_of(run)}"
        assert time.monotonic() < deadline, f"nothing happened:\n{log_of(run)}"
        time.sleep(0.002)


def finish(run: Path, options: list[str]) -> None:
    process = start_forked(run, options)
    try:
        assert process.wait(PATIENCE) == 0, log_of(run)
    finally:
        send(run, signal.SIGKILL)


def nothing_is_left_of(run: Path) -> bool:
    deadline = time.monotonic() + 10.0
    while processes_of(run) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not processes_of(run)


def last_recorded(run: Path) -> int:
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else -1


def checkpoints(run: Path) -> list[str]:
    directory = run / "checkpoints"
    return sorted(p.name for p in directory.iterdir()) if directory.exists() else []


def heartbeat(run: Path) -> dict:
    return json.loads((run / HEARTBEAT_FILE).read_text())


def records(run: Path, name: str) -> list[dict]:
    """The lines of a file of the run without the times."""
    lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


def assert_same_run(run: Path, reference: Path) -> None:
    assert (run / "hf" / "model.safetensors").read_bytes() == (reference / "hf" / "model.safetensors").read_bytes()
    assert records(run, "metrics.jsonl") == records(reference, "metrics.jsonl")
    assert records(run, "samples.jsonl") == records(reference, "samples.jsonl")
    assert len(checkpoints(run)) == 2 and checkpoints(run)[-1] == checkpoints(reference)[-1] == "step_00000006"
