"""Scores on the held-out queries of a training run."""

from collections.abc import Callable

from g2r_megatron.config.options import TrainConfig
from g2r_megatron.experience import sample_and_submit, score_metrics
from g2r_megatron.records.phase_times import PhaseTimes
from g2r_megatron.run import Run
from g2r_megatron.workers import Inputs, Workers

# what an evaluation reports -> the same number of a training batch
NAMES = {
    "eval/judge_score": "reward/mean",
    "eval/true_score": "reward/true_mean",
    "eval/agreement": "judge/agreement",
    "eval/length_mean": "response/length_mean",
    "eval/finished_share": "response/finished_share",
}


def evaluate(
    config: TrainConfig, inputs: Inputs, workers: Workers, run: Run, between_batches: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Sample and judge ``inputs.eval``, with the same random numbers every time (collective); {} without any."""
    if not inputs.eval:
        return {}
    times = PhaseTimes(run.phase)
    with times("eval"):
        rollouts = sample_and_submit(
            workers,
            inputs,
            queries=inputs.eval,
            group_size=config.eval_responses,
            key=f"{config.seed}/eval",
            parts=config.judge.parts,
            mix=None,
            temperature=0.0 if config.eval_greedy else None,
            between_batches=between_batches,
        )
        with workers.judge_on_device():
            judgements, _ = workers.judge.judge_submitted()
        scores = score_metrics(rollouts, judgements)
    return times.metrics() | {ours: scores[theirs] for ours, theirs in NAMES.items() if theirs in scores}
