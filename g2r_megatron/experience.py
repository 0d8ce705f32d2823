"""One step's batch on its way from prompts to advantages: sample, judge, credit, measure."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from g2r_megatron.config import TrainConfig
from g2r_megatron.data.tokenizer import token_texts
from g2r_megatron.data.types import Query
from g2r_megatron.grpo.advantages import GroupScores, group_advantages, items_needing_attribution
from g2r_megatron.grpo.metrics import (
    advantage_metrics,
    attribution_metrics,
    judge_metrics,
    key_token_metrics,
    response_metrics,
    reward_metrics,
)
from g2r_megatron.grpo.truth import key_token_mask, true_reward, true_verdicts
from g2r_megatron.judge.attribution import response_reward, token_rewards
from g2r_megatron.judge.stage import JudgeStage
from g2r_megatron.judge.types import ItemJudgement, backward_passes
from g2r_megatron.policy.log_probs import TokenSequence
from g2r_megatron.rollout.engine import MegatronRolloutEngine, Request
from g2r_megatron.rollout.types import Response
from g2r_megatron.workers import Inputs


@dataclass
class Experience:
    """N = queries x G responses, grouped by query; every list below has N entries."""

    group_size: int
    queries: list[Query]
    responses: list[Response]
    keys: list[str]
    judgements: list[list[ItemJudgement]]
    alphas: list[list[torch.Tensor | None]]
    advantages: list[torch.Tensor]

    @property
    def sequences(self) -> list[TokenSequence]:
        return [TokenSequence(r.prompt_ids, r.token_ids) for r in self.responses]

    @property
    def groups(self) -> list[slice]:
        return [slice(i, i + self.group_size) for i in range(0, len(self.queries), self.group_size)]

    def reward(self, i: int) -> float:
        """The judge's rubric score of response ``i``."""
        weights = [item.weight for item in self.queries[i].rubric]
        return response_reward([j.verdict for j in self.judgements[i]], weights)


def sample(
    engine: MegatronRolloutEngine,
    inputs: Inputs,
    queries: list[Query],
    group_size: int,
    key: str,
    temperature: float | None = None,
    between_batches: Callable[[], None] = lambda: None,
) -> Experience:
    """``group_size`` responses a query. ``key`` and the query's id seed the sampling, nothing else does (collective)."""
    repeated = [query for query in queries for _ in range(group_size)]
    keys = [f"{key}/{query.id}/{j}" for query in queries for j in range(group_size)]
    prompts = [inputs.prompt_ids[query.id] for query in repeated]
    requests = [Request(ids, k) for ids, k in zip(prompts, keys, strict=True)]
    responses = []
    for i, (ids, finished) in enumerate(engine.generate(requests, temperature, between_batches=between_batches)):
        body = ids[:-1] if finished else ids
        text = inputs.tokenizer.decode(body, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        responses.append(Response(prompts[i], ids, finished, text))
    return Experience(group_size, repeated, responses, keys, [], [], [])


def judge(stage: JudgeStage, batch: Experience) -> list:
    """Fill in the verdicts (collective); returns the judge inputs for ``attribute``."""
    inputs = stage.inputs(batch.queries, [r.body_ids for r in batch.responses])
    batch.judgements = stage.verdicts(inputs, batch.keys)
    return inputs


def attribute(stage: JudgeStage, batch: Experience, inputs: list, config: TrainConfig, mix: float) -> None:
    """Backward passes for the items that can change an advantage, then alphas and advantages (collective)."""
    needed: list[list[bool]] = []
    for group in batch.groups:
        needed += items_needing_attribution(*_verdict_table(batch, group), config.grpo, mix).tolist()
    weights = [[item.weight for item in query.rubric] for query in batch.queries]
    stage.attribute(inputs, batch.judgements, needed, weights)
    bodies = [r.body_ids for r in batch.responses]
    batch.alphas = [stage.alphas(body, row) for body, row in zip(bodies, batch.judgements, strict=True)]
    batch.advantages = []
    for group in batch.groups:
        verdicts, weights = _verdict_table(batch, group)
        members = batch.responses[group]
        lengths, finished = [len(r.body_ids) for r in members], [r.finished for r in members]
        scores = GroupScores(verdicts, weights, batch.alphas[group], lengths, finished)
        batch.advantages += group_advantages(scores, config.grpo, mix)


def _verdict_table(batch: Experience, group: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Verdicts [G, K] bool and weights [K] of one group."""
    verdicts = torch.tensor([[j.verdict for j in row] for row in batch.judgements[group]])
    return verdicts, torch.tensor([item.weight for item in batch.queries[group.start].rubric], dtype=torch.float64)


def score_metrics(batch: Experience) -> dict[str, float]:
    """Rewards, verdicts against the truth where it is known, response lengths."""
    rewards = [[batch.reward(i) for i in range(g.start, g.stop)] for g in batch.groups]
    verdicts = [[j.verdict for j in row] for row in batch.judgements]
    truths = [true_verdicts(q, r.text) for q, r in zip(batch.queries, batch.responses, strict=True)]
    weights = [[item.weight for item in q.rubric] for q in batch.queries]
    finished = [r.finished for r in batch.responses]
    return (
        reward_metrics(rewards)
        | judge_metrics(verdicts, truths, weights)
        | response_metrics([len(r.token_ids) for r in batch.responses], finished)
    )


def credit_metrics(batch: Experience, inputs: Inputs, flat_threshold: float) -> dict[str, float]:
    """Health of the attributions and where the advantages went."""
    attributed = [
        (i, k) for i, row in enumerate(batch.judgements) for k, j in enumerate(row) if j.attribution is not None
    ]
    passes = [(i, k) for i, row in enumerate(batch.judgements) for k in backward_passes(row)]
    metrics = attribution_metrics(
        [batch.judgements[i][k].attribution for i, k in passes],
        [batch.alphas[i][k] for i, k in passes],
        [batch.judgements[i][k].cos for i, k in passes],
        flat_threshold,
    )
    key_alphas, masks, texts = [], [], {}
    for i, k in attributed:
        check = batch.queries[i].rubric[k].check
        if check is not None:
            if i not in texts:
                texts[i] = token_texts(inputs.tokenizer, batch.responses[i].body_ids)
            key_alphas.append(batch.alphas[i][k])
            masks.append(key_token_mask(check, texts[i]))
    finished = [r.finished for r in batch.responses]
    largest = max(float(a.abs().max()) for a in batch.advantages)
    return (
        metrics
        | key_token_metrics(key_alphas, masks)
        | advantage_metrics(batch.advantages, finished)
        | {"advantage/max_abs": largest}
    )


def sample_record(batch: Experience, inputs: Inputs, i: int, step: int) -> dict:
    """Response ``i`` as the report draws it: tokens, their advantages and rewards, each item's verdict and alpha."""
    query, response, judgements = batch.queries[i], batch.responses[i], batch.judgements[i]
    alphas = batch.alphas[i]
    truths = true_verdicts(query, response.text) or [None] * len(query.rubric)
    verdicts, weights = [j.verdict for j in judgements], [item.weight for item in query.rubric]
    rewards = token_rewards(verdicts, weights, alphas, query.positive_weight, len(response.body_ids))
    items = [
        {
            "criterion": item.criterion,
            "weight": item.weight,
            "verdict": j.verdict,
            "p_true": j.p_true,
            "truth": truth,
            "alpha": None if alpha is None else alpha.tolist(),
        }
        for item, j, truth, alpha in zip(query.rubric, judgements, truths, alphas, strict=True)
    ]
    return {
        "step": step,
        "query_id": query.id,
        "prompt": "\n".join(f"{m['role']}: {m['content']}" for m in query.messages),
        "response": response.text,
        "reward": batch.reward(i),
        "true_reward": true_reward(query, response.text),
        "tokens": token_texts(inputs.tokenizer, response.body_ids),
        "advantages": batch.advantages[i].tolist(),
        "token_rewards": rewards.tolist(),
        "items": items,
    }
