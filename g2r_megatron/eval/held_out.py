"""Scores on the held-out queries of a training run."""

from collections.abc import Callable, Sequence
from statistics import fmean

from g2r_megatron.config.options import TrainConfig
from g2r_megatron.credit.judgements import ItemJudgement, JudgementRow, kind_of
from g2r_megatron.eval.records import Answer, data_key, judge_facts, record_of, write_results
from g2r_megatron.experience import Rollouts, sample_and_submit, score_metrics
from g2r_megatron.records.evaluations import SUMMARY, read_results, step_directory
from g2r_megatron.records.phase_times import PhaseTimes
from g2r_megatron.rollout.recording import eval_name
from g2r_megatron.run import Run
from g2r_megatron.workers import Inputs, Workers

# what an evaluation reports -> the same number of a training batch
NAMES = {
    "eval/judge_score": "reward/mean",
    "eval/true_score": "reward/true_mean",
    "eval/agreement": "judge/agreement",
    "eval/verifier_agreement": "judge/verifier_agreement",
    "eval/answer_mass": "judge/answer_mass",
    "eval/length_mean": "response/length_mean",
    "eval/finished_share": "response/finished_share",
}


def evaluate(
    config: TrainConfig,
    inputs: Inputs,
    workers: Workers,
    run: Run,
    step: int,
    between_batches: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Sample and judge ``inputs.eval`` after ``step``, with the same random numbers every time (collective); {} without any.

    Responses and verdicts go to ``eval/step_...`` of the run, as ``g2r eval`` writes them.
    """
    if not inputs.eval:
        return {}
    times = PhaseTimes(run.phase)
    with times("eval"):
        rollouts = sample_and_submit(
            workers,
            inputs,
            queries=inputs.eval,
            group_size=config.eval.samples,
            key=f"{config.seed}/eval",
            batch=eval_name(step),
            parts=config.judge.parts,
            mix=None,
            temperature=0.0 if config.eval.greedy else None,
            between_batches=between_batches,
        )
        with workers.judge_on_device():
            judgements, _ = workers.judge.judge_submitted()
        run.dump_batch(eval_name(step), rollouts, judgements, step)
        scores = score_metrics(rollouts, judgements)
        gold = true_judgements(rollouts) if kind_of(judgements[0]) is ItemJudgement else None
        if workers.gold is not None:
            gold = workers.gold.judge(rollouts.queries, [response.text for response in rollouts.responses])
            rewards = [kind_of(row).reward(query, row) for query, row in zip(rollouts.queries, judgements, strict=True)]
            answered = [query.answer is not None for query in rollouts.queries]  # the reward is the verifier's
            ItemJudgement.take_verified(gold, [r > 0 if a else None for r, a in zip(rewards, answered, strict=True)])
    metrics = {ours: scores[theirs] for ours, theirs in NAMES.items() if theirs in scores}
    if kind_of(judgements[0]) is ItemJudgement:
        metrics |= keep(config, inputs, run, step, records_of(rollouts, judgements, gold))
    elif gold is not None:
        metrics["eval/gold_score"] = fmean(map(ItemJudgement.reward, rollouts.queries, gold))
    return times.metrics() | metrics


def true_judgements(rollouts: Rollouts) -> list[JudgementRow] | None:
    """What is true of every response, as a gold judge would say it; None unless that is known for all items of all rows."""
    if not all(rollouts.truths):
        return None
    return [[ItemJudgement(float(true), float(not true), true) for true in row or ()] for row in rollouts.truths]


def records_of(rollouts: Rollouts, judgements: list[JudgementRow], gold: list[JudgementRow] | None) -> list[dict]:
    """The records of all responses (eval/records.py)."""
    answers = [Answer(r.text, len(r.token_ids), r.answered) for r in rollouts.responses]
    return [
        record_of(query, i % rollouts.group_size, answers[i], judgements[i], gold[i] if gold else None)
        for i, query in enumerate(rollouts.queries)
    ]


def keep(config: TrainConfig, inputs: Inputs, run: Run, step: int, records: list[dict]) -> dict[str, float]:
    """Write the records (rank 0); what the gold judge says of them."""
    if run.is_writer:
        judge = judge_facts(config.judge)
        judge["model"] = config.judge.model or config.policy.model
        facts = {"policy": config.output_dir, "step": step, "judge": judge, "data": data_key(inputs.eval)}
        write_results(step_directory(run.output, step), facts, records, config.seed)
    if "gold_score" not in records[0]:
        return {}
    first = step_directory(run.output, 0)
    if step == 0 or not (first / SUMMARY).is_file():
        return gold_metrics(records, [])
    found, before = read_results(first)
    return gold_metrics(records, before if found["data"] == data_key(inputs.eval) else [])


def gold_metrics(records: Sequence[dict], before: Sequence[dict]) -> dict[str, float]:
    """The score of the gold judge (or the truth), its agreement with the judge, and the exploitation rate since ``before``.

    The exploitation rate: of the items that the training judge counts for the response now and not before training, the
    share (by absolute weight) that the gold judge does not. Left out where there are no such items.
    """
    items = [item for record in records for item in record["items"]]
    metrics = {
        "eval/gold_score": fmean(record["gold_score"] for record in records),
        "eval/gold_agreement": fmean(item["verdict"] == item["gold"] for item in items),
    }
    earlier = {(record["id"], record["sample"]): record["items"] for record in before}
    won, rejected = 0.0, 0.0
    for record in records:
        old_items = earlier.get((record["id"], record["sample"]), record["items"])
        for item, old in zip(record["items"], old_items, strict=True):
            good = item["weight"] > 0
            if item["verdict"] == good and old["verdict"] != good:
                won += abs(item["weight"])
                rejected += abs(item["weight"]) * (item["gold"] != good)
    return metrics | ({"eval/exploitation_rate": rejected / won} if won else {})
