"""The training loop: sample, judge, credit, update (Algorithm 1 of Grad2Reward, arXiv 2602.01791).

Every rank of the policy runs this same code. What is sharded, and over which ranks, is known to the objects in
``Workers``; what is shown, saved and recorded, to ``Run``. launch.py does what comes before and after.
"""

from dataclasses import replace

import torch

from g2r_megatron.alarms.checks import alarm_checks
from g2r_megatron.config.options import TrainConfig
from g2r_megatron.credit.advantages import mix_at
from g2r_megatron.data.order import epoch_batch
from g2r_megatron.eval.held_out import evaluate
from g2r_megatron.experience import Rollouts, assign_credit, sample_and_submit, step_metrics
from g2r_megatron.parallel.preemption import leave_if_asked
from g2r_megatron.policy.correction import Correction, check_sampler, correct
from g2r_megatron.policy.trainer import check_first_ratio
from g2r_megatron.records.phase_times import PhaseTimes
from g2r_megatron.rollout.recording import step_name
from g2r_megatron.run import Run
from g2r_megatron.workers import Inputs, Workers


def take_steps(config: TrainConfig, inputs: Inputs, workers: Workers, run: Run) -> None:
    """Take the steps that are left, and save their checkpoints."""
    leave_if_asked()
    if run.done == 0:
        metrics = evaluate(config, inputs, workers, run, 0, between_batches=leave_if_asked)
        run.check_keep_best(metrics)
        run.log(0, metrics)
    for step in range(run.done + 1, config.steps + 1):
        if run.is_out_of_patience:
            break
        leave_if_asked()
        metrics = train_step(config, inputs, workers, run, step)
        if config.evaluates_after(step):
            metrics |= evaluate(config, inputs, workers, run, step)
        run.log(step, metrics)
        run.stop_on_alarm()
        if workers.trainer.bad_in_a_row >= config.optimizer.max_bad_steps:
            run.stop_after_bad_steps(workers.trainer.bad_in_a_row)
        if run.wants_checkpoint(step, metrics) or step == config.steps:
            run.save()
        if run.is_out_of_patience:
            run.stop_out_of_patience()
    run.finish_save(wait=True)


def train_step(config: TrainConfig, inputs: Inputs, workers: Workers, run: Run, step: int) -> dict[str, float]:
    """One step; returns its metrics (the same on every rank).

    Parts of the batch go to the judge as soon as they are sampled. A judge on ranks of its own works on them while the
    policy samples the next part and computes log-probs; a judge on the policy's ranks begins when it is asked.
    """
    times = PhaseTimes(run.phase)
    mix = mix_at(config.grpo.mix, config.grpo.mix_anneal, (step - 1) / config.steps)
    mix = 0.0 if run.watch.uses_sequence_credit else mix
    dtype = workers.trainer.model.config.params_dtype
    order = (config.rollout.prompts_per_step, step - 1, config.seed, config.data.shuffle)
    with times("step", shown=False):
        with times("sample"):
            rollouts = sample_and_submit(
                workers,
                inputs,
                queries=[inputs.train[i] for i in epoch_batch(len(inputs.train), *order)],
                group_size=config.rollout.responses_per_prompt,
                key=f"{config.seed}/{step}",
                batch=step_name(step),
                parts=config.judge.parts,
                mix=mix,
                measured=run.measured_responses(step),
                between_batches=leave_if_asked,
            )
            workers.engine.rest()
        leave_if_asked()
        with workers.judge_on_device(times):
            with times("update"):
                # in a run's first step also where none is needed: it shows that the update computes the same (below)
                old_pass = step == run.first or config.needs_old_pass
                log_probs = workers.trainer.update_log_probs(rollouts.sequences, workers.reference, old_pass)
                correction = corrected(config, rollouts, log_probs.old, dtype)
            with times("judge"):
                judgements, judge_metrics = workers.judge.judge_submitted()
                batch = assign_credit(rollouts, judgements, prompt=inputs.prompt, config=config, mix=mix)
            with times("alarms", shown=False):
                checked = alarm_checks(config, inputs, workers, rollouts, step)
        leave_if_asked()
        with times("update"):
            metrics, old = workers.trainer.update(
                batch.sequences,
                log_probs.mini_batches,
                advantages=correction.scaled(batch.advantages) if correction else batch.advantages,
                old=log_probs.old,
                reference=log_probs.reference,
                kept=correction.kept if correction else None,
            )
        with times("sync", shown=False):
            workers.engine.take_weights()
        if step == run.first:
            check_first_ratio(metrics, dtype)
        if log_probs.old is None:
            log_probs = replace(log_probs, old=old)
            correction = corrected(config, rollouts, old, dtype)  # none is on: the comparison of sampler and trainer
        metrics |= checked | (correction.metrics if correction else {})
        metrics |= (
            run.faithfulness.add(judge_metrics)
            | step_metrics(batch, inputs, config.judge.flat_threshold)
            | {"attribution/mix": mix}
        )
    metrics |= times.metrics()
    if config.judge.ranks:
        metrics["time/judge_busy_share"] = metrics.pop("time/judge_busy") / metrics["time/step"]
    run.record(step, batch, inputs, log_probs, metrics)
    return metrics


def corrected(
    config: TrainConfig, rollouts: Rollouts, old: list[torch.Tensor] | None, dtype: torch.dtype
) -> Correction | None:
    """What the difference between sampler and trainer does to the loss; None where the trainer itself has sampled.

    None also while the trainer's log-probs ``old`` are not there yet.

    Raises ``RunError`` when the difference is too large for the same weights.
    """
    sampler = rollouts.sampler_log_probs
    if sampler is None or old is None:
        return None
    check_sampler(old, sampler, dtype)
    return correct(old, sampler, config.rollout)
