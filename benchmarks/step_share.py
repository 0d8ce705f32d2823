"""What attribution adds to a whole training step on the quickstart's task: `robust` and `paper` against `grpo`.

    python benchmarks/step_share.py [--steps 20]

The presets train side by side in one process, from the same start, with the same seed and queries, and take turns step by
step. Medians of the process's CPU seconds a step: what else runs on the machine disturbs them least. With
`grpo.mix_anneal` a preset attributes in its first steps only, so those and all steps are reported. What `grpo` takes to
judge are the verdicts, what the others take longer is the attribution. Steps without evaluations, records and checkpoints.
"""

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

import torch
from machine import machine

from g2r_megatron.config import parsing
from g2r_megatron.config.options import TrainConfig
from g2r_megatron.config.presets import resolve_preset
from g2r_megatron.credit.advantages import mix_at
from g2r_megatron.credit.judgements import backward_passes
from g2r_megatron.data.order import epoch_batch
from g2r_megatron.experience import assign_credit, sample_and_submit
from g2r_megatron.parallel.groups import initialize
from g2r_megatron.rollout.recording import step_name
from g2r_megatron.workers import Inputs, Workers, build_workers, read_inputs

ROOT = Path(__file__).resolve().parents[1]
RUNS = {  # name -> options
    "grpo": ["--grpo.preset", "grpo"],
    "robust": ["--grpo.preset", "robust"],
    "robust, credit per_response": ["--grpo.preset", "robust", "--judge.credit", "per_response"],
    "paper": ["--grpo.preset", "paper"],
    "paper, credit per_response": ["--grpo.preset", "paper", "--judge.credit", "per_response"],
}
PHASES = ("sample", "judge", "update")
TARGET = 1.15


@dataclass
class Step:
    """CPU seconds of each phase of one step, wall seconds of all, and what it did."""

    seconds: dict[str, float]
    wall: float
    passes: int
    tokens: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


@contextmanager
def counted(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.process_time()
    yield
    torch.cuda.synchronize()
    seconds[name] = seconds.get(name, 0.0) + time.process_time() - start


def train_step(config: TrainConfig, inputs: Inputs, workers: Workers, number: int) -> Step:
    """train.train_step, without records."""
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    mix = mix_at(config.grpo.mix, config.grpo.mix_anneal, (number - 1) / config.steps)
    order = (config.rollout.prompts_per_step, number - 1, config.seed, config.data.shuffle)
    with counted(seconds, "sample"):
        rollouts = sample_and_submit(
            workers,
            inputs,
            queries=[inputs.train[i] for i in epoch_batch(len(inputs.train), *order)],
            group_size=config.rollout.responses_per_prompt,
            key=f"{config.seed}/{number}",
            batch=step_name(number),
            parts=config.judge.parts,
            mix=mix,
        )
    with counted(seconds, "update"):
        log_probs = workers.trainer.update_log_probs(rollouts.sequences, workers.reference, config.needs_old_pass)
    with counted(seconds, "judge"):
        judgements, _ = workers.judge.judge_submitted()
        batch = assign_credit(rollouts, judgements, prompt=inputs.prompt, config=config, mix=mix)
    with counted(seconds, "update"):
        workers.trainer.update(
            batch.sequences,
            log_probs.mini_batches,
            advantages=batch.advantages,
            old=log_probs.old,
            reference=log_probs.reference,
        )
    passes = sum(len(backward_passes(row)) for row in batch.judgements)
    tokens = fmean(len(r.token_ids) for r in batch.responses)
    return Step(seconds, time.perf_counter() - start, passes, tokens)


def table(found: dict[str, list[Step]], attributing: int) -> str:
    lines = [
        "| | " + " | ".join(f"{phase}, CPU s" for phase in PHASES) + " | step, CPU s | of grpo's | step, s | "
        "all steps, of grpo's | backward passes a step | response tokens |",
        "|---" * (len(PHASES) + 7) + "|",
    ]
    for name, steps in found.items():
        first, base = steps[:attributing], found["grpo"][:attributing]
        cells = [f"{median(step.seconds[phase] for step in first):.2f}" for phase in PHASES]
        ratio = median(a.total / b.total for a, b in zip(first, base))
        whole = sum(step.total for step in steps) / sum(step.total for step in found["grpo"])
        cells += [f"{median(step.total for step in first):.2f}", f"{ratio:.2f}"]
        cells += [f"{median(step.wall for step in first):.2f}", f"{whole:.2f}"]
        cells += [f"{fmean(step.passes for step in first):.0f}", f"{fmean(step.tokens for step in steps):.1f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    args, options = parser.parse_known_args()  # the rest is for g2r train, e.g. --rollout.prompts_per_step 2
    os.chdir(ROOT)  # the quickstart's paths are relative to it
    runs = {}
    for name, given in RUNS.items():
        common = ["--config", "examples/quickstart/config.yaml", "--output_dir", "unused", "--seed", str(args.seed)]
        config = parsing.parse(TrainConfig, "step_share", [*common, *given, *options])
        config = replace(resolve_preset(config), steps=args.steps)
        inputs = read_inputs(config)
        initialize(config.seed)
        runs[name] = config, inputs, build_workers(config, inputs)
    found: dict[str, list[Step]] = {name: [] for name in RUNS}
    for number in range(1, args.steps + 1):
        for name, run in runs.items():
            found[name].append(train_step(*run, number))
        print(number, {name: round(steps[-1].total, 2) for name, steps in found.items()}, flush=True)
    anneal = runs["robust"][0].grpo.mix_anneal  # 0: it attributes in all steps
    attributing = round(args.steps * (anneal or 1))
    report = [
        "# Share of a training step spent in attribution",
        "",
        f"`{' '.join(['python benchmarks/step_share.py --steps', str(args.steps), '--seed', str(args.seed), *options])}`",
        "",
        " ".join((__doc__ or "").split("\n\n")[2].split()),
        "",
        machine(),
        "",
        table(found, attributing),
        "",
        f"Steps 1 to {attributing} of {args.steps}, in which `robust` attributes; where it says so, all steps. The target is "
        f"at most {TARGET:.2f} of grpo's step.",
        "",
    ]
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "step_share.md").write_text("\n".join(report))
    print("\n".join(report))


if __name__ == "__main__":
    main()
