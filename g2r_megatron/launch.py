"""``g2r train`` from its options to its end: what happens before and after the loop (train.py)."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from g2r_megatron.config.options import TrainConfig
from g2r_megatron.config.presets import resolve_preset
from g2r_megatron.errors import UserError
from g2r_megatron.judge.own_ranks import own_ranks, serve
from g2r_megatron.parallel.groups import initialize, make_deterministic
from g2r_megatron.parallel.preemption import Preempted
from g2r_megatron.parallel.sides import on_judge_side
from g2r_megatron.policy.checkpoint import Checkpointer
from g2r_megatron.policy.export import export_policy
from g2r_megatron.records.failures import reported
from g2r_megatron.records.heartbeat import Heartbeat
from g2r_megatron.records.wandb_run import check_wandb_session
from g2r_megatron.rollout.facts import check_dump, check_replay, facts_of
from g2r_megatron.rollout.vllm.check_servers import check_servers
from g2r_megatron.run import CONFIG_FILE, Run
from g2r_megatron.train import take_steps
from g2r_megatron.workers import Inputs, Workers, build_judge, build_workers, read_inputs

# A run directory belongs to one trajectory: these options may not change when it is resumed (layouts may).
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
# What a preset implied when the run began; a preset that has changed since must not change the run.
IMPLIED = ("judge.target", "judge.attribution", "grpo.advantage", "grpo.mix_anneal")


def train(config: TrainConfig) -> None:
    """Train to ``config.steps``, resuming from the newest checkpoint under ``config.output_dir`` if there is one.

    Every rank calls this. Raises ``Preempted`` when a signal has asked to leave and all is saved
    (parallel/preemption.py).
    """
    config = resolve_preset(config)
    output = Path(config.output_dir)
    check_same_run(config, output)
    check_wandb_session(config.log)
    inputs = read_inputs(config)
    check_servers(inputs.policy, config.rollout, config.policy.precision.dtype, config.judge.ranks)
    sampling = check_recordings(config, inputs, output)
    heartbeat, ranks = Heartbeat(output, config.steps), config.judge.ranks
    with reported(heartbeat):
        heartbeat.beat(state="starting")
        if config.deterministic:
            make_deterministic()
        initialize(config.seed, ranks, config.timeout_minutes)
        if on_judge_side(ranks):
            heartbeat.beat(phase="judge")  # named when this rank fails
            serve(ranks, lambda: build_judge(config, inputs), config.grpo)
            return
        with own_ranks(ranks, config.timeout_minutes) as judge:
            run_training(config, inputs, build_workers(config, inputs, judge), output, heartbeat, sampling)


def run_training(
    config: TrainConfig,
    inputs: Inputs,
    workers: Workers,
    output: Path,
    heartbeat: Heartbeat,
    sampling: dict[str, Any],
) -> None:
    """``train`` on the policy's ranks. ``sampling``: of ``check_recordings``."""
    checkpointer = Checkpointer(workers.trainer, output / "checkpoints", config.checkpoint.keep_last)
    done = checkpointer.load_latest()
    workers.engine.take_weights()
    with Run(config, output, done, heartbeat, checkpointer, sampling) as run:
        run.tell_what_it_runs_on(inputs, workers.trainer.inner_optimizer)
        try:
            take_steps(config, inputs, workers, run)
        except Preempted:
            if config.judge.ranks:
                workers.judge.judge_submitted()  # the judge ranks end when they have answered
            run.leave()
            raise
        if config.checkpoint.export_hf and run.is_ready_to_export():
            run.phase("save")
            export_policy(workers.trainer.model, output / "hf")
        heartbeat.beat(state="finished")


def check_recordings(config: TrainConfig, inputs: Inputs, output: Path) -> dict[str, Any]:
    """What decides the run's responses, if they are dumped or replayed; raises ``UserError`` for directories that do not fit."""
    rollout = config.rollout
    if not (rollout.dump or rollout.replay):
        return {}
    facts = facts_of(config, inputs.policy, inputs.tokenizer, inputs.train, inputs.eval)
    if rollout.replay:
        check_replay(config, facts)
    if rollout.dump:
        file = output / CONFIG_FILE
        before = yaml.safe_load(file.read_text())["rollout"].get("dump") if file.is_file() else None
        check_dump(config, facts, goes_on=bool(before) and os.path.realpath(before) == os.path.realpath(rollout.dump))
    return facts


def check_same_run(config: TrainConfig, output: Path) -> None:
    """Raise ``UserError`` when ``output`` holds another run than the one that ``config`` describes."""
    file = output / CONFIG_FILE
    if not file.is_file():
        return
    before, now = yaml.safe_load(file.read_text()), asdict(config)
    for option in (*FIXED, *IMPLIED):
        old, new = before, now
        for part in option.split("."):
            old, new = old[part], new[part]
        if old != new:
            keep = f"give --{option}={old} to go on with it, or " if option in IMPLIED else ""
            raise UserError(
                option, f"{new!r}, but output_dir {output} holds a run with {old!r}", f"{keep}choose another output_dir"
            )
