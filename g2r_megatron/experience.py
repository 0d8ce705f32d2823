"""One step's batch on its way from prompts to advantages: sample and send to the judge, credit, measure."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from g2r_megatron.config.options import TrainConfig
from g2r_megatron.credit import grading
from g2r_megatron.credit.advantages import group_advantages
from g2r_megatron.credit.hazards import (
    advantage_metrics,
    attribution_metrics,
    key_token_metrics,
    response_metrics,
    reward_metrics,
)
from g2r_megatron.credit.truth import key_token_mask, true_reward
from g2r_megatron.data.tokenizer import token_texts
from g2r_megatron.data.types import Query
from g2r_megatron.judge.own_ranks import OwnRanks
from g2r_megatron.judge.parts import Part, SharedRanks
from g2r_megatron.judge.stage import item_alphas
from g2r_megatron.judge.types import Judgement, backward_passes
from g2r_megatron.policy.log_probs import TokenSequence
from g2r_megatron.rollout.megatron import MegatronRolloutEngine, Request
from g2r_megatron.rollout.types import Response
from g2r_megatron.workers import Inputs


@dataclass
class Experience:
    """N = queries x G responses, grouped by query; every list below has N entries."""

    group_size: int
    queries: list[Query]
    responses: list[Response]
    keys: list[str]
    judgements: list[list[Judgement]] = field(default_factory=list)
    alphas: list[list[torch.Tensor | None]] = field(default_factory=list)
    advantages: list[torch.Tensor] = field(default_factory=list)

    @property
    def sequences(self) -> list[TokenSequence]:
        return [TokenSequence(r.prompt_ids, r.token_ids) for r in self.responses]

    @property
    def groups(self) -> list[slice]:
        return [slice(i, i + self.group_size) for i in range(0, len(self.queries), self.group_size)]

    def reward(self, i: int) -> float:
        """The judge's score of response ``i``."""
        return grading.reward(self.queries[i], self.judgements[i])


def sample_and_submit(
    engine: MegatronRolloutEngine,
    judge: SharedRanks | OwnRanks,
    inputs: Inputs,
    queries: list[Query],
    group_size: int,
    key: str,
    *,
    parts: int,
    mix: float | None,
    temperature: float | None = None,
    between_batches: Callable[[], None] = lambda: None,
) -> Experience:
    """``sample`` in ``parts`` parts of whole groups; each goes to the judge before the next is begun (collective).

    ``mix``: as in ``Part``. The judgements are ``judge.results()``.
    """
    batch = Experience(group_size, [], [], [])
    for part in range(parts):
        some = queries[part * len(queries) // parts : (part + 1) * len(queries) // parts]
        if not some:
            continue
        sampled = sample(engine, inputs, some, group_size, key, temperature, between_batches)
        judge.submit(Part(some, group_size, [r.body_ids for r in sampled.responses], sampled.keys, mix))
        batch.queries += sampled.queries
        batch.responses += sampled.responses
        batch.keys += sampled.keys
    return batch


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
    return Experience(group_size, repeated, responses, keys)


def credit(batch: Experience, inputs: Inputs, config: TrainConfig, mix: float) -> None:
    """Alphas and advantages from the judgements."""
    bodies = [r.body_ids for r in batch.responses]
    batch.alphas = [
        item_alphas(inputs.prompt, config.judge, body, row, key)
        for body, row, key in zip(bodies, batch.judgements, batch.keys, strict=True)
    ]
    batch.advantages = []
    for group in batch.groups:
        members = batch.responses[group]
        lengths, finished = [len(r.body_ids) for r in members], [r.finished for r in members]
        query, rows = batch.queries[group.start], batch.judgements[group]
        scores = grading.group_scores(query, rows, batch.alphas[group], lengths, finished)
        batch.advantages += group_advantages(scores, config.grpo, mix)


def score_metrics(batch: Experience) -> dict[str, float]:
    """Rewards, verdicts against the truth where it is known, response lengths."""
    rewards = [[batch.reward(i) for i in range(g.start, g.stop)] for g in batch.groups]
    finished = [r.finished for r in batch.responses]
    return (
        reward_metrics(rewards)
        | grading.metrics(batch.queries, [r.text for r in batch.responses], batch.judgements)
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
        if grading.is_score(batch.judgements[i]):  # of the response as a whole, not of an item with a check
            continue
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
    query, response, row, alphas = batch.queries[i], batch.responses[i], batch.judgements[i], batch.alphas[i]
    rewards = grading.row_token_rewards(query, row, alphas, len(response.body_ids), response.finished)
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
        "items": grading.sample_items(query, response.text, row, alphas),
    }
