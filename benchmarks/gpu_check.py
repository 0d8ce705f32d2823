"""The stages of tools/gpu_check.sh, each a process with a time limit of its own, and the report that grows with them.

What a stage measures, it writes to its file figure by figure; what it has written before it failed, or ran out of time, is
in the report. A figure with a bound is held to it. The stages' work: gpu_check_stages.py.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from machine import machine

ROOT = Path(__file__).parents[1]
STAGES_FILE = Path(__file__).with_name("gpu_check_stages.py")
DRY_RUN_SECONDS = 600  # of a stage, on whatever machine
KEPT_LINES = 80  # of what a stage printed, when it failed


@dataclass(frozen=True)
class Stage:
    """``command`` of its own, or the stage of that name in gpu_check_stages.py. ``seconds``: its limit."""

    name: str
    seconds: float
    what: str
    command: tuple[str, ...] = ()


STAGES = (
    Stage("doctor", 65, "what is installed; FlexAttention compiles", ("-m", "g2r_megatron.cli", "doctor")),
    Stage("parity", 110, "fp32 on this device against the CPU: logits, credit, one update"),
    Stage("formats", 90, "bf16 against fp32, in plain torch layers and in Transformer Engine's"),
    Stage("compilations", 60, "FlexAttention is compiled once for each kind of pass"),
    Stage("speed", 80, "a random model of Qwen3's shape: judge, decoding, update, peak memory"),
    Stage("vllm", 75, "vLLM, where it is installed: weights that arrive, log-probs, tokens a second"),
    Stage("tests", 240, "tests/gpu", ("-m", "pytest", "-q", "-x", "--no-header", "tests/gpu")),
)  # 720 seconds in all


@dataclass
class Figure:
    """One number; ``bound`` with "at most" or "at least" is what it is held to."""

    name: str
    value: float
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None

    @property
    def is_good(self) -> bool:
        low = self.at_least is None or self.value >= self.at_least
        return low and (self.at_most is None or self.value <= self.at_most)


@dataclass
class Result:
    """How a stage ended: passed, failed (an error, or a figure beyond its bound), timed out."""

    stage: str
    what: str
    state: str
    seconds: float
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    output: list[str] = field(default_factory=list)


def run_stage(stage: Stage, directory: Path, dry_run: bool, seconds: float) -> Result:
    """Run a stage for at most ``seconds``; what it left is in the result."""
    file = directory / f"{stage.name}.jsonl"
    own = (str(STAGES_FILE), stage.name, "--output", str(file), *(("--dry-run",) if dry_run else ()))
    log, start = directory / f"{stage.name}.log", time.monotonic()
    with log.open("wb") as out:
        # a session of its own: what it started ends with it
        process = subprocess.Popen(
            [sys.executable, *(stage.command or own)], cwd=ROOT, stdout=out, stderr=out, start_new_session=True
        )
        try:
            state = "passed" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "timed out"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    result = Result(stage.name, stage.what, state, time.monotonic() - start)
    for line in file.read_text().splitlines() if file.exists() else []:
        found = json.loads(line)
        if "note" in found:
            result.notes.append(found["note"])
        else:
            result.figures.append(Figure(**found))
    if state == "passed" and not all(figure.is_good for figure in result.figures):
        result.state = "failed"
    if result.state != "passed" or stage.command:
        result.output = log.read_text(errors="replace").splitlines()[-KEPT_LINES:]
    return result


def bound(figure: Figure) -> str:
    if figure.at_most is not None:
        return f"at most {figure.at_most:g}"
    return "" if figure.at_least is None else f"at least {figure.at_least:g}"


def markdown(facts: dict, results: list[Result]) -> str:
    lines = ["# GPU check", "", *(f"{name}: {value}  " for name, value in facts.items()), ""]
    lines += ["| stage | | seconds | what |", "| --- | --- | --- | --- |"]
    lines += [f"| {r.stage} | {r.state} | {r.seconds:.0f} | {r.what} |" for r in results]
    for result in results:
        lines += ["", f"## {result.stage}: {result.state}", ""]
        if result.figures:
            lines += ["| figure | value | bound | |", "| --- | --- | --- | --- |"]
            lines += [
                f"| {f.name} | {f.value:.4g} {f.unit} | {bound(f)} | {'' if f.is_good else '**not kept**'} |"
                for f in result.figures
            ]
        lines += ["", *(f"- {note}" for note in result.notes)] if result.notes else []
        lines += ["", "```", *result.output, "```"] if result.output else []
    return "\n".join(lines) + "\n"


def write_report(directory: Path, facts: dict, results: list[Result]) -> None:
    content = {"machine": facts, "stages": [asdict(result) for result in results]}
    (directory / "gpu_check.json").write_text(json.dumps(content, indent=1) + "\n")
    (directory / "gpu_check.md").write_text(markdown(facts, results))


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description="Checks a machine with one GPU.")
    parser.add_argument("--output", type=Path, default=Path("gpu_check"), help="directory of the report (%(default)s)")
    parser.add_argument(
        "--only", default="", help="stages to run, separated by commas: " + ", ".join(s.name for s in STAGES)
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, also without a GPU")
    arguments = parser.parse_args()
    wanted = [name for name in arguments.only.split(",") if name] or [stage.name for stage in STAGES]
    if unknown := set(wanted) - {stage.name for stage in STAGES}:
        parser.error(f"--only: no stage {', '.join(sorted(unknown))}; see --help")
    import torch

    if not torch.cuda.is_available() and not arguments.dry_run:
        parser.error("no CUDA device here; --dry-run tries the script without one")
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output: {arguments.output} cannot be a directory ({error.strerror})")
    facts = {"machine": machine(), "sizes": "dry run: tiny" if arguments.dry_run else "1B"}
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as directory:
        for stage in STAGES:
            if stage.name in wanted:
                print(f"{stage.name}: {stage.what} (at most {stage.seconds:.0f} s)", flush=True)
                limit = DRY_RUN_SECONDS if arguments.dry_run else stage.seconds
                results.append(run_stage(stage, Path(directory), arguments.dry_run, limit))
                print(f"{stage.name}: {results[-1].state} in {results[-1].seconds:.0f} s", flush=True)
                write_report(arguments.output, facts, results)
    print(f"report: {arguments.output / 'gpu_check.md'}")
    return 0 if all(result.state == "passed" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
