"""Which way of giving credit trains best: each variant from the same start, several seeds.

    python benchmarks/credit_study.py                              # 50 steps, seeds 1 2 3; an hour on 2 cores
    python benchmarks/credit_study.py --steps 150 --seeds 1 --variants grpo "gate branch" "gate branch, shuffled"
    python benchmarks/credit_study.py --task smollm2 --steps 12                          # half an hour; goes on where it stopped

A variant is the preset `grpo`, `paper` or `robust` with some options of its own. The task is that of examples/quickstart, or
of examples/smollm2 with a pretrained model. With --every N all runs take N steps before any takes more, so that an unfinished
study compares runs of the same length.

Runs that have finished are kept under --output, and one that was interrupted is resumed, by repeating the same command; the
table is printed at the end and written to OUTPUT/table-STEPS.md. --table prints it of what there is, without training. True
scores are those of the task's checks on the held-out prompts.
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
TARGET = 0.65  # of the quickstart's task
OF_ALL = ["--checkpoint.export_hf", "false", "--log.tensorboard", "false"]


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

STUDIES = {  # task -> (directory under runs/, variants, seeds)
    "quickstart": ("credit_study", list(VARIANTS), [1, 2, 3]),
    "smollm2": ("credit_study_smollm2", ["grpo", "gate branch", "gate branch, shuffled"], [1, 2]),
}


def task_options(task: str) -> list[str]:
    """The task's config, and its model; makes the model of smollm2 if it is not there."""
    options = ["--config", f"examples/{task}/config.yaml", *OF_ALL]
    if task == "quickstart":
        return [*options, "--log.samples_every", "25"]
    sys.path.append(str(ROOT / "examples" / task))
    from make_judge import make_judge
    from make_model import make

    # a saved state of this model is 1.6 GB: one at the end of each start, without a copy in memory
    options += ["--policy.model", str(make()), "--judge.model", str(make_judge(make()))]
    options += ["--policy.precision.dtype", "bf16", "--judge.precision.dtype", "bf16"]  # AMX, where a CPU has it
    return [*options, "--checkpoint.save_every", "0", "--checkpoint.asynchronous", "false"]


def steps_done(directory: Path) -> int:
    """Of a run that has finished as many steps as it was asked for; 0 of one that has not, or is not there."""
    heartbeat = directory / "heartbeat.json"
    said = json.loads(heartbeat.read_text()) if heartbeat.is_file() else {"state": ""}
    return int(said["step"]) if said["state"] == "finished" else 0


def run(directory: Path, options: list[str], seed: int, steps: int) -> None:
    """Train one variant to ``steps``, unless it has got there; raises with the end of its output if it fails."""
    if steps_done(directory) >= steps:
        return
    command = [sys.executable, "-m", "g2r_megatron.cli", "train", *options]
    command += ["--seed", str(seed), "--steps", str(steps), "--output_dir", str(directory)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{directory.name}: {done.stderr[-2000:]}")
    print(f"{directory.name}: {last(directory)['eval/true_score']:.3f} after {steps} steps", flush=True)


def evaluations(directory: Path) -> list[dict]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval/true_score" in line]


def last(directory: Path) -> dict:
    return evaluations(directory)[-1]


def trained_score(directory: Path) -> float:
    """Mean true score of the responses of the last half of the steps: more responses than an evaluation has."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    scores = [line["reward/true_mean"] for line in lines if "reward/true_mean" in line]
    return fmean(scores[len(scores) // 2 :])


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
    """Of the runs that there are; ``steps`` names their directories."""
    lines = [
        f"True score after up to {steps} steps, seeds {', '.join(map(str, seeds))}: mean (lowest to highest).",
        "",
        f"| variant | steps | true score | judge - true | training batches, last half | steps to {TARGET} | response tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in variants:
        places = [directory_of(output, name, seed, steps) for seed in seeds]
        runs = [place for place in places if (place / "metrics.jsonl").is_file() and last(place)["step"]]
        if not runs:
            lines.append(f"| {name} | 0 | | | | | |")
            continue
        ends = [last(run) for run in runs]
        reached = [steps_to_target(run) for run in runs]
        known = [step for step in reached if step is not None]
        lines.append(
            f"| {name} | {', '.join(str(end['step']) for end in ends)} | "
            f"{spread([end['eval/true_score'] for end in ends])} | "
            f"{fmean(end['eval/judge_score'] - end['eval/true_score'] for end in ends):+.3f} | "
            f"{spread([trained_score(run) for run in runs])} | "
            f"{f'{fmean(known):.0f}' if known else 'never'}"
            f"{f', in {len(known)} of {len(runs)}' if 0 < len(known) < len(runs) else ''} | "
            f"{fmean(end['eval/length_mean'] for end in ends):.0f} |"
        )
    return "\n".join([*lines, "", machine()])


def directory_of(output: Path, name: str, seed: int, steps: int) -> Path:
    return output / f"{name.replace(', ', '-').replace(' ', '_')}-{steps}-seed{seed}"


def train_all(args: argparse.Namespace) -> None:
    """All variants and seeds up to every multiple of ``--every``, one after the other."""
    options = task_options(args.task)
    for until in [*range(args.every, args.steps, args.every), args.steps] if args.every else [args.steps]:
        with ThreadPoolExecutor(args.at_once) as pool:
            results = [
                pool.submit(
                    run, directory_of(args.output, name, seed, args.steps), [*options, *VARIANTS[name]], seed, until
                )
                for seed in args.seeds
                for name in args.variants
            ]
            for result in results:
                result.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=STUDIES, default="quickstart")
    parser.add_argument("--output", type=Path, help="default: runs/credit_study, of smollm2 runs/credit_study_smollm2")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: those of the task")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the task")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--every", type=int, default=0, help="steps that all runs take before any takes more; 0: all")
    parser.add_argument("--at_once", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time")
    parser.add_argument("--table", action="store_true", help="print the table of what there is; train nothing")
    args = parser.parse_args()
    args.output = (args.output or ROOT / "runs" / STUDIES[args.task][0]).resolve()
    args.variants = args.variants or STUDIES[args.task][1]
    args.seeds = args.seeds or STUDIES[args.task][2]
    args.output.mkdir(parents=True, exist_ok=True)
    if not args.table:
        train_all(args)
    text = table(args.output, args.variants, args.seeds, args.steps)
    (args.output / f"table-{args.steps}.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
