"""The training loop: sample -> judge -> attribute -> update -> log -> save.

Algorithm 1 of Grad2Reward (arXiv 2602.01791) with the options of config.py. Every rank runs this same code; what is
sharded, and over which ranks, is the business of the objects in ``Workers``.
"""

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

from g2r_megatron import experience, preemption
from g2r_megatron.config import TrainConfig, resolve_preset
from g2r_megatron.data.order import epoch_batch
from g2r_megatron.errors import UserError
from g2r_megatron.experience import Experience
from g2r_megatron.failures import reported
from g2r_megatron.grpo.advantages import mix_at
from g2r_megatron.policy.checkpoint import Checkpointer
from g2r_megatron.policy.export import export_policy
from g2r_megatron.policy.log_probs import plan_micro_batches, response_log_probs
from g2r_megatron.records.files import replace_text
from g2r_megatron.records.heartbeat import Heartbeat
from g2r_megatron.records.metrics import MetricsLog
from g2r_megatron.records.progress import Progress
from g2r_megatron.workers import Inputs, Workers, build_workers, read_inputs

CONFIG_FILE = "config.yaml"
# A run directory belongs to one trajectory: these may not change when it is resumed (layouts may).
FIXED = (
    "seed",
    "policy.model",
    "policy.precision.dtype",
    "judge.model",
    "data.train",
    "grpo.preset",
    "rollout.prompts_per_step",
    "optimizer.distributed",  # its checkpoints have another form
)


def train(config: TrainConfig) -> None:
    """Train to ``config.steps``, resuming from the newest checkpoint under ``config.output_dir`` if there is one.

    Raises ``Preempted`` when a signal has asked to leave and all is saved (preemption.py).
    """
    config = resolve_preset(config)
    output = Path(config.output_dir)
    check_same_run(config, output)
    inputs = read_inputs(config)
    heartbeat = Heartbeat(output, config.steps)
    with reported(heartbeat):
        heartbeat.beat(state="starting")
        workers = build_workers(config, inputs)
        checkpointer = Checkpointer(workers.trainer, output / "checkpoints", config.checkpoint.keep_last)
        done = checkpointer.load_latest()
        with Run(config, output, done, heartbeat) as run:
            try:
                take_steps(config, inputs, workers, run, checkpointer)
            except preemption.Preempted:
                if run.done > run.saved:
                    run.save(checkpointer)
                run.progress.message(f"asked to leave: saved after step {run.done}")
                heartbeat.beat(state="preempted")
                raise
            if config.checkpoint.export_hf:
                run.phase("save")
                export_policy(workers.trainer.model, output / "hf")
            heartbeat.beat(state="finished")


def take_steps(config: TrainConfig, inputs: Inputs, workers: Workers, run: "Run", checkpointer: Checkpointer) -> None:
    """The steps that are left, and their checkpoints."""
    preemption.leave_if_asked()
    if run.done == 0:
        run.log(0, evaluate(config, inputs, workers, run, preemption.leave_if_asked))
    for step in range(run.done + 1, config.steps + 1):
        preemption.leave_if_asked()
        run.log(step, train_step(config, inputs, workers, run, step))
        if step == config.steps or (config.checkpoint.save_every and step % config.checkpoint.save_every == 0):
            run.save(checkpointer)


def train_step(config: TrainConfig, inputs: Inputs, workers: Workers, run: "Run", step: int) -> dict[str, float]:
    """One step; returns its metrics (the same on every rank)."""
    metrics: dict[str, float] = {}
    rollout = config.rollout
    chosen = epoch_batch(len(inputs.train), rollout.prompts_per_step, step - 1, config.seed, config.data.shuffle)
    mix = mix_at(config.grpo.mix, config.grpo.mix_anneal, (step - 1) / config.steps)
    with timed(metrics, "time/step"):
        with timed(metrics, "time/sample", run):
            queries = [inputs.train[i] for i in chosen]
            key, leave = f"{config.seed}/{step}", preemption.leave_if_asked
            batch = experience.sample(
                workers.engine, inputs, queries, rollout.responses_per_prompt, key, between_batches=leave
            )
        preemption.leave_if_asked()
        with timed(metrics, "time/judge", run):
            judge_inputs = experience.judge(workers.judge, batch)
            with timed(metrics, "time/attribution"):
                experience.attribute(workers.judge, batch, judge_inputs, config, mix)
        preemption.leave_if_asked()
        with timed(metrics, "time/update", run):
            metrics |= update(config, workers, batch)
        metrics |= experience.score_metrics(batch)
        metrics |= experience.credit_metrics(batch, inputs, config.judge.flat_threshold)
        metrics["attribution/mix"] = mix
    warn_about_gradients(run.progress, step, metrics)
    run.sample(step, batch, inputs)
    if step == config.steps or (config.eval_every and step % config.eval_every == 0):
        metrics |= evaluate(config, inputs, workers, run)
    return metrics


def update(config: TrainConfig, workers: Workers, batch: Experience) -> dict[str, float]:
    """Old (and reference) log-probs from the models themselves, then one optimizer step a mini-batch."""
    sequences = batch.sequences
    chunks = torch.arange(len(sequences)).chunk(config.grpo.mini_batches)
    mini_batches = [chunk.tolist() for chunk in chunks]
    old = workers.trainer.log_probs(sequences, mini_batches)
    reference = None
    if workers.reference is not None:
        budget = config.policy.micro_batch_tokens
        plans = [plan_micro_batches(workers.reference, sequences, m, budget) for m in mini_batches]
        plan = [items for rows in plans for items in rows]
        reference = response_log_probs(workers.reference, sequences, plan, config.rollout.temperature)
    return workers.trainer.update(sequences, mini_batches, batch.advantages, old, reference)


def evaluate(
    config: TrainConfig, inputs: Inputs, workers: Workers, run: "Run", between_batches: Callable = lambda: None
) -> dict[str, float]:
    """Scores on the held-out queries, with the same random numbers every time; {} without any."""
    if not inputs.eval:
        return {}
    metrics: dict[str, float] = {}
    with timed(metrics, "time/eval", run):
        temperature = 0.0 if config.eval_greedy else None
        batch = experience.sample(
            workers.engine,
            inputs,
            inputs.eval,
            config.eval_responses,
            f"{config.seed}/eval",
            temperature,
            between_batches,
        )
        experience.judge(workers.judge, batch)
        scores = experience.score_metrics(batch)
    names = {
        "eval/judge_score": "reward/mean",
        "eval/true_score": "reward/true_mean",
        "eval/agreement": "judge/agreement",
        "eval/length_mean": "response/length_mean",
        "eval/finished_share": "response/finished_share",
    }
    return metrics | {ours: scores[theirs] for ours, theirs in names.items() if theirs in scores}


def warn_about_gradients(progress: Progress, step: int, metrics: dict[str, float]) -> None:
    """A judge gradient that is zero or not finite carries no credit: say so, never silently."""
    bad, passes = metrics["attribution/zero_or_nonfinite"], metrics["attribution/passes"]
    if bad:
        progress.message(
            f"warning: step {step}: {bad:.0f} of {passes:.0f} judge gradients were zero or not finite; "
            "their tokens share the item's credit evenly"
        )


@contextmanager
def timed(metrics: dict[str, float], name: str, run: "Run | None" = None):
    """Wall seconds of the block into ``metrics[name]``; shows the phase."""
    if run is not None:
        run.phase(name.removeprefix("time/"))
    start = time.perf_counter()
    yield
    torch.cuda.synchronize()
    metrics[name] = time.perf_counter() - start


def check_same_run(config: TrainConfig, output: Path) -> None:
    """Raise ``UserError`` when ``output`` holds another run than the one that ``config`` describes."""
    file = output / CONFIG_FILE
    if not file.is_file():
        return
    before, now = yaml.safe_load(file.read_text()), asdict(config)
    for option in FIXED:
        old, new = before, now
        for part in option.split("."):
            old, new = old[part], new[part]
        if old != new:
            raise UserError(
                option, f"{new!r}, but output_dir {output} holds a run with {old!r}", "choose another output_dir"
            )


class Run:
    """What rank 0 writes and shows while training; silent elsewhere."""

    def __init__(self, config: TrainConfig, output: Path, done: int, heartbeat: Heartbeat):
        """``done``: the last finished step, whose checkpoint has been loaded; 0 for none."""
        self.config, self.done, self.saved, self.heartbeat = config, done, done, heartbeat
        self.is_writer = dist.get_rank() == 0
        self.progress = Progress(config.steps, enabled=self.is_writer)
        self.records = None
        if self.is_writer:
            plain = asdict(config)
            self.records = MetricsLog(output, config.log, plain)
            replace_text(output / CONFIG_FILE, yaml.safe_dump(plain, sort_keys=False))
            self.records.truncate_after(done if done else -1)

    def __enter__(self) -> "Run":
        self.progress.__enter__()
        self.heartbeat.beat(state="running", step=self.done, saved_step=self.saved)
        if self.done >= self.config.steps:
            self.progress.message(f"finished already, at step {self.done}")
        elif self.done:
            self.progress.message(f"resuming after step {self.done}")
        return self

    def __exit__(self, *error) -> None:
        self.progress.__exit__(*error)
        if self.records is not None:
            self.records.close()

    def phase(self, name: str) -> None:
        """What happens now: sample, judge, update, eval, save."""
        self.progress.phase(name)
        self.heartbeat.beat(phase=name)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """``step`` is finished."""
        if self.records is not None and metrics:
            self.records.log(step, metrics)
        self.progress.step(step, metrics)
        self.done = step
        self.heartbeat.beat(step=step)

    def save(self, checkpointer: Checkpointer) -> None:
        """A checkpoint of the last finished step (collective)."""
        self.phase("save")
        checkpointer.save(self.done)
        self.saved = self.done
        self.heartbeat.beat(saved_step=self.saved)

    def sample(self, step: int, batch: Experience, inputs: Inputs) -> None:
        """Keep a few of the step's responses for the report: the first of each of the first groups."""
        every = self.config.log.samples_every
        if self.records is None or not every or (step - 1) % every:
            return
        for group in batch.groups[: self.config.log.samples_per_step]:
            self.records.sample(experience.sample_record(batch, inputs, group.start, step))
