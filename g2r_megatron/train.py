"""The training loop: sample -> judge -> attribute -> update -> log -> save.

Algorithm 1 of Grad2Reward (arXiv 2602.01791) with the options of config/options.py. Every rank runs this same code (but for ranks
that are the judge's alone, see judge/own_ranks.py); what is sharded, and over which ranks, is the business of the objects
in ``Workers``.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import yaml

from g2r_megatron import experience
from g2r_megatron.config.options import TrainConfig, resolve_preset
from g2r_megatron.credit.advantages import mix_at
from g2r_megatron.data.order import epoch_batch
from g2r_megatron.device import stopwatch
from g2r_megatron.errors import UserError
from g2r_megatron.experience import Experience
from g2r_megatron.judge.own_ranks import own_ranks, serve
from g2r_megatron.parallel import preemption
from g2r_megatron.parallel.groups import initialize, make_deterministic
from g2r_megatron.parallel.sides import on_judge_side
from g2r_megatron.policy.checkpoint import Checkpointer
from g2r_megatron.policy.export import export_policy
from g2r_megatron.policy.log_probs import plan_micro_batches, response_log_probs
from g2r_megatron.records.failures import reported
from g2r_megatron.records.heartbeat import Heartbeat
from g2r_megatron.records.progress_bar import Progress
from g2r_megatron.run import CONFIG_FILE, Run
from g2r_megatron.workers import Inputs, Workers, build_judge, build_workers, read_inputs

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

    Raises ``Preempted`` when a signal has asked to leave and all is saved (parallel/preemption.py).
    """
    config = resolve_preset(config)
    output = Path(config.output_dir)
    check_same_run(config, output)
    inputs = read_inputs(config)
    heartbeat, ranks = Heartbeat(output, config.steps), config.judge.ranks
    with reported(heartbeat):
        heartbeat.beat(state="starting")
        if config.deterministic:
            make_deterministic()
        initialize(config.seed, ranks, config.timeout_minutes)
        if on_judge_side(ranks):
            heartbeat.beat(phase="judge")  # said of this rank when it fails
            serve(ranks, lambda: build_judge(config, inputs), config.grpo)
            return
        with own_ranks(ranks, config.timeout_minutes) as judge:
            run_training(config, inputs, build_workers(config, inputs, judge), output, heartbeat)


def run_training(config: TrainConfig, inputs: Inputs, workers: Workers, output: Path, heartbeat: Heartbeat) -> None:
    """``train`` on the policy's ranks."""
    checkpointer = Checkpointer(workers.trainer, output / "checkpoints", config.checkpoint.keep_last)
    done = checkpointer.load_latest()
    with Run(config, output, done, heartbeat, checkpointer) as run:
        try:
            take_steps(config, inputs, workers, run)
        except preemption.Preempted:
            if config.judge.ranks:
                workers.judge.results()  # of the parts that it has been sent: it ends when it has answered
            run.leave()
            raise
        if config.checkpoint.export_hf:
            run.phase("save")
            export_policy(workers.trainer.model, output / "hf")
        heartbeat.beat(state="finished")


def take_steps(config: TrainConfig, inputs: Inputs, workers: Workers, run: Run) -> None:
    """The steps that are left, and their checkpoints."""
    preemption.leave_if_asked()
    if run.done == 0:
        run.log(0, evaluate(config, inputs, workers, run, preemption.leave_if_asked))
    for step in range(run.done + 1, config.steps + 1):
        preemption.leave_if_asked()
        run.log(step, train_step(config, inputs, workers, run, step))
        if workers.trainer.bad_in_a_row >= config.optimizer.max_bad_steps:
            run.stop_after_bad_steps(workers.trainer.bad_in_a_row)
        if step == config.steps or (config.checkpoint.save_every and step % config.checkpoint.save_every == 0):
            run.save()
    run.finish_save(wait=True)


def train_step(config: TrainConfig, inputs: Inputs, workers: Workers, run: Run, step: int) -> dict[str, float]:
    """One step; returns its metrics (the same on every rank)."""
    metrics: dict[str, float] = {}
    rollout = config.rollout
    chosen = epoch_batch(len(inputs.train), rollout.prompts_per_step, step - 1, config.seed, config.data.shuffle)
    mix = mix_at(config.grpo.mix, config.grpo.mix_anneal, (step - 1) / config.steps)
    with timed(metrics, "time/step"):
        with timed(metrics, "time/sample", run):
            queries = [inputs.train[i] for i in chosen]
            batch = experience.sample_and_submit(
                *(workers.engine, workers.judge, inputs, queries, rollout.responses_per_prompt),
                f"{config.seed}/{step}",
                parts=config.judge.parts,
                mix=mix,
                between_batches=preemption.leave_if_asked,
            )
        preemption.leave_if_asked()
        with judge_weights(workers, metrics):
            with timed(metrics, "time/update", run):  # a judge on ranks of its own is not waited for yet
                mini_batches, old, reference = log_probs(config, workers, batch)
            with timed(metrics, "time/judge", run):
                batch.judgements, judge_metrics = workers.judge.results()
                experience.credit(batch, inputs, config, mix)
        preemption.leave_if_asked()
        with timed(metrics, "time/update", run):
            metrics |= workers.trainer.update(batch.sequences, mini_batches, batch.advantages, old, reference)
        metrics |= judge_metrics
        metrics |= experience.score_metrics(batch)
        metrics |= experience.credit_metrics(batch, inputs, config.judge.flat_threshold)
        metrics["attribution/mix"] = mix
    if config.judge.ranks:
        metrics["time/judge_busy_share"] = metrics.pop("time/judge_busy") / metrics["time/step"]
    if metrics["optimizer/skipped_steps"]:
        run.keep_bad_step(step, batch, old, reference, metrics)
    warn_about_gradients(run.progress, step, metrics)
    run.sample(step, batch, inputs)
    if step == config.steps or (config.eval_every and step % config.eval_every == 0):
        metrics |= evaluate(config, inputs, workers, run)
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


def evaluate(
    config: TrainConfig, inputs: Inputs, workers: Workers, run: Run, between_batches: Callable = lambda: None
) -> dict[str, float]:
    """Scores on the held-out queries, with the same random numbers every time; {} without any."""
    if not inputs.eval:
        return {}
    metrics: dict[str, float] = {}
    with timed(metrics, "time/eval", run):
        temperature = 0.0 if config.eval_greedy else None
        batch = experience.sample_and_submit(
            *(workers.engine, workers.judge, inputs, inputs.eval, config.eval_responses, f"{config.seed}/eval"),
            parts=config.judge.parts,
            mix=None,
            temperature=temperature,
            between_batches=between_batches,
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
def timed(metrics: dict[str, float], name: str, run: Run | None = None):
    """Add the seconds of the block to ``metrics[name]``; shows the phase."""
    if run is not None:
        run.phase(name.removeprefix("time/"))
    seconds = stopwatch()
    yield
    metrics[name] = metrics.get(name, 0.0) + seconds()


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
