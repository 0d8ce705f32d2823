"""The training loop: sample -> judge -> attribute -> update -> log -> save.

Algorithm 1 of Grad2Reward (arXiv 2602.01791) with the options of config.py. Every rank runs this same code (but for ranks
that are the judge's alone, see judge/own_ranks.py); what is sharded, and over which ranks, is the business of the objects
in ``Workers``.
"""

import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

from g2r_megatron import experience
from g2r_megatron.config import TrainConfig, resolve_preset
from g2r_megatron.data.order import epoch_batch
from g2r_megatron.errors import UserError
from g2r_megatron.experience import Experience
from g2r_megatron.grpo.advantages import mix_at
from g2r_megatron.judge.own_ranks import own_ranks, serve
from g2r_megatron.parallel.groups import initialize
from g2r_megatron.parallel.sides import on_judge_side
from g2r_megatron.policy.checkpoint import Checkpointer
from g2r_megatron.policy.export import export_policy
from g2r_megatron.policy.log_probs import plan_micro_batches, response_log_probs
from g2r_megatron.records.metrics import MetricsLog
from g2r_megatron.records.progress import Progress
from g2r_megatron.workers import Inputs, Workers, build_judge, build_workers, read_inputs

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
    """Train to ``config.steps``, resuming from the newest checkpoint under ``config.output_dir`` if there is one."""
    config = resolve_preset(config)
    output = Path(config.output_dir)
    check_same_run(config, output)
    inputs = read_inputs(config)
    initialize(config.seed, config.judge.ranks)
    if on_judge_side(config.judge.ranks):
        serve(config.judge.ranks, lambda: build_judge(config, inputs), config.grpo)
        return
    with own_ranks(config.judge.ranks) as judge:
        run_training(config, inputs, build_workers(config, inputs, judge), output)


def run_training(config: TrainConfig, inputs: Inputs, workers: Workers, output: Path) -> None:
    """``train`` on the policy's ranks."""
    checkpointer = Checkpointer(workers.trainer, output / "checkpoints", config.checkpoint.keep_last)
    done = checkpointer.load_latest()
    with Run(config, output, done) as run:
        if done == 0:
            run.log(0, evaluate(config, inputs, workers, run.progress))
        for step in range(done + 1, config.steps + 1):
            run.log(step, train_step(config, inputs, workers, run, step))
            if step == config.steps or (config.checkpoint.save_every and step % config.checkpoint.save_every == 0):
                run.progress.phase("save")
                checkpointer.save(step)
        if config.checkpoint.export_hf:
            run.progress.phase("save")
            export_policy(workers.trainer.model, output / "hf")


def train_step(config: TrainConfig, inputs: Inputs, workers: Workers, run: "Run", step: int) -> dict[str, float]:
    """One step; returns its metrics (the same on every rank)."""
    metrics: dict[str, float] = {}
    progress, rollout = run.progress, config.rollout
    chosen = epoch_batch(len(inputs.train), rollout.prompts_per_step, step - 1, config.seed, config.data.shuffle)
    mix = mix_at(config.grpo.mix, config.grpo.mix_anneal, (step - 1) / config.steps)
    with timed(metrics, "time/step"):
        with timed(metrics, "time/sample", progress):
            queries = [inputs.train[i] for i in chosen]
            batch = experience.sample_and_submit(
                *(workers.engine, workers.judge, inputs, queries, rollout.responses_per_prompt),
                f"{config.seed}/{step}",
                parts=config.judge.parts,
                mix=mix,
            )
        with judge_weights(workers, metrics):
            with timed(metrics, "time/update", progress):  # a judge on ranks of its own is not waited for yet
                mini_batches, old, reference = log_probs(config, workers, batch)
            with timed(metrics, "time/judge", progress):
                batch.judgements, judge_metrics = workers.judge.results()
                experience.credit(batch, inputs, config, mix)
        with timed(metrics, "time/update", progress):
            metrics |= workers.trainer.update(batch.sequences, mini_batches, batch.advantages, old, reference)
        metrics |= judge_metrics
        metrics |= experience.score_metrics(batch)
        metrics |= experience.credit_metrics(batch, inputs, config.judge.flat_threshold)
        metrics["attribution/mix"] = mix
    if config.judge.ranks:
        metrics["time/judge_busy_share"] = metrics.pop("time/judge_busy") / metrics["time/step"]
    warn_about_gradients(progress, step, metrics)
    run.sample(step, batch, inputs)
    if step == config.steps or (config.eval_every and step % config.eval_every == 0):
        metrics |= evaluate(config, inputs, workers, progress)
    return metrics


def log_probs(config: TrainConfig, workers: Workers, batch: Experience) -> tuple[list, list, list | None]:
    """What the update needs besides advantages: mini-batches, old and reference log-probs from the models themselves."""
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
    return mini_batches, old, reference


def evaluate(config: TrainConfig, inputs: Inputs, workers: Workers, progress: Progress) -> dict[str, float]:
    """Scores on the held-out queries, with the same random numbers every time; {} without any."""
    if not inputs.eval:
        return {}
    metrics: dict[str, float] = {}
    with timed(metrics, "time/eval", progress):
        temperature = 0.0 if config.eval_greedy else None
        batch = experience.sample_and_submit(
            *(workers.engine, workers.judge, inputs, inputs.eval, config.eval_responses, f"{config.seed}/eval"),
            parts=config.judge.parts,
            mix=None,
            temperature=temperature,
        )
        with judge_weights(workers, {}):
            batch.judgements, _ = workers.judge.results()
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
def timed(metrics: dict[str, float], name: str, progress: Progress | None = None):
    """Add the wall seconds of the block to ``metrics[name]``; shows the phase."""
    if progress is not None:
        progress.phase(name.removeprefix("time/"))
    start = time.perf_counter()
    yield
    torch.cuda.synchronize()
    metrics[name] = metrics.get(name, 0.0) + time.perf_counter() - start


@contextmanager
def judge_weights(workers: Workers, metrics: dict[str, float]):
    """With ``judge.offload``, the judge's weights are on the device inside the block; ``time/judge_load``: what it took."""
    if workers.host_weights is None:
        yield
        return
    with timed(metrics, "time/judge_load"):
        workers.host_weights.load()
    yield
    workers.host_weights.release()


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


def write_config(path: Path, plain: dict) -> None:
    """Atomically: a run killed right here must find its config whole."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(yaml.safe_dump(plain, sort_keys=False))
    temporary.replace(path)


class Run:
    """What rank 0 writes and shows while training; silent elsewhere."""

    def __init__(self, config: TrainConfig, output: Path, done: int):
        self.config = config
        self.is_writer = dist.get_rank() == 0
        self.progress = Progress(config.steps, enabled=self.is_writer)
        self.records = None
        if self.is_writer:
            output.mkdir(parents=True, exist_ok=True)
            plain = asdict(config)
            self.records = MetricsLog(output, config.log, plain)
            write_config(output / CONFIG_FILE, plain)
            self.records.truncate_after(done if done else -1)
        self.done = done

    def __enter__(self) -> "Run":
        self.progress.__enter__()
        if self.done >= self.config.steps:
            self.progress.message(f"finished already, at step {self.done}")
        elif self.done:
            self.progress.message(f"resuming after step {self.done}")
        return self

    def __exit__(self, *error) -> None:
        self.progress.__exit__(*error)
        if self.records is not None:
            self.records.close()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self.records is not None and metrics:
            self.records.log(step, metrics)
        self.progress.step(step, metrics)

    def sample(self, step: int, batch: Experience, inputs: Inputs) -> None:
        """Keep a few of the step's responses for the report: the first of each of the first groups."""
        every = self.config.log.samples_every
        if self.records is None or not every or (step - 1) % every:
            return
        for group in batch.groups[: self.config.log.samples_per_step]:
            self.records.sample(experience.sample_record(batch, inputs, group.start, step))
