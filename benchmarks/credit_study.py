"""Which way of giving credit trains best on the quickstart's task: each variant from the same start, several seeds.

    python benchmarks/credit_study.py                              # 50 steps, seeds 1 2 3; an hour on 2 cores
    python benchmarks/credit_study.py --steps 150 --seeds 1 --variants grpo "gate branch" "gate branch, shuffled"

A variant is the preset `grpo`, `paper` or `robust` with some options of its own. Two runs at a time, one rank each. Runs
that have finished are kept under --output, and one that was interrupted is resumed, by repeating the same command; the
table is printed at the end and written to OUTPUT/table.md. True scores are those of examples/quickstart/task.py on the
held-out prompts.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

from machine import machine

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "examples/quickstart/config.yaml"
TARGET = 0.65


def gates(queries: str, *options: str) -> list[str]:
    return [
        *("--grpo.preset", "robust", "--judge.attribution", "gate", "--judge.gate_queries", queries),
        *("--judge.normalize", "positive", "--judge.standardize", "false", "--judge.smoothing", "sentence"),
        *("--grpo.mix", "0.5", "--grpo.mix_anneal", "0", *options),
    ]


CONTRACTED = [
    *("--grpo.preset", "robust", "--judge.attribution", "contracted", "--judge.normalize", "softmax"),
    *("--judge.standardize", "true", "--grpo.mix", "0.5"),
]
VARIANTS = {  # name -> options
    "grpo": ["--grpo.preset", "grpo"],
    "paper": ["--grpo.preset", "paper"],
    "contracted, smear, anneal": [*CONTRACTED, "--judge.smoothing", "smear", "--grpo.mix_anneal", "0.6"],
    "contracted, sentence": [*CONTRACTED, "--judge.smoothing", "sentence", "--grpo.mix_anneal", "0"],
    "gate branch": gates("branch"),
    "gate branch, mix 1": gates("branch", "--grpo.mix", "1"),
    "gate branch, no smoothing": gates("branch", "--judge.smoothing", "none"),
    "gate all": gates("all"),
    "gate all, levels": gates("all", "--judge.gate_levels", "[1.0, 0.5, 0.1]"),
    "gate branch, shuffled": gates("branch", "--judge.shuffle", "true"),
}


def run(directory: Path, options: list[str], seed: int, steps: int) -> None:
    """Train one variant, unless it is finished already; raises with the end of its output if it fails."""
    heartbeat = directory / "heartbeat.json"
    if heartbeat.is_file() and json.loads(heartbeat.read_text())["state"] == "finished":
        return
    command = [
        *(sys.executable, "-m", "g2r_megatron.cli", "train", "--config", CONFIG, *options),
        *("--seed", str(seed), "--steps", str(steps), "--output_dir", str(directory)),
        *("--checkpoint.export_hf", "false", "--log.tensorboard", "false", "--log.samples_every", "25"),
    ]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{directory.name}: {done.stderr[-2000:]}")
    print(f"{directory.name}: {last(directory)['eval/true_score']:.3f}", flush=True)


def evaluations(directory: Path) -> list[dict]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval/true_score" in line]


def last(directory: Path) -> dict:
    return evaluations(directory)[-1]


def steps_to_target(directory: Path) -> float | None:
    """The step at which the true score reaches TARGET, between evaluations by a straight line."""
    before = None
    for line in evaluations(directory):
        step, score = line["step"], line["eval/true_score"]
        if score >= TARGET:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (TARGET - before[1]) / (score - before[1])
        before = (step, score)
    return None


def spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def table(output: Path, variants: list[str], seeds: list[int], steps: int) -> str:
    lines = [
        f"True score after {steps} steps, seeds {', '.join(map(str, seeds))}: mean (lowest to highest).",
        "",
        f"| variant | true score | judge - true | steps to {TARGET} | response tokens |",
        "|---|---|---|---|---|",
    ]
    for name in variants:
        runs = [directory_of(output, name, seed, steps) for seed in seeds]
        ends = [last(run) for run in runs]
        reached = [steps_to_target(run) for run in runs]
        known = [step for step in reached if step is not None]
        lines.append(
            f"| {name} | {spread([end['eval/true_score'] for end in ends])} | "
            f"{fmean(end['eval/judge_score'] - end['eval/true_score'] for end in ends):+.3f} | "
            f"{f'{fmean(known):.0f}' if known else 'never'}"
            f"{f', in {len(known)} of {len(runs)}' if 0 < len(known) < len(runs) else ''} | "
            f"{fmean(end['eval/length_mean'] for end in ends):.0f} |"
        )
    return "\n".join([*lines, "", machine()])


def directory_of(output: Path, name: str, seed: int, steps: int) -> Path:
    return output / f"{name.replace(', ', '-').replace(' ', '_')}-{steps}-seed{seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "credit_study")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--at_once", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time")
    args = parser.parse_args()
    jobs = [(name, seed) for seed in args.seeds for name in args.variants]
    args.output.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.at_once) as pool:
        results = [
            pool.submit(run, directory_of(args.output, name, seed, args.steps), VARIANTS[name], seed, args.steps)
            for name, seed in jobs
        ]
        for result in results:
            result.result()
    text = table(args.output, args.variants, args.seeds, args.steps)
    (args.output / f"table-{args.steps}.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
