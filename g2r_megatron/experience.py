"""One step's batch on its way from prompts to advantages: sample and send to the judge, assign credit, measure."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch

from g2r_megatron.config.options import TrainConfig
from g2r_megatron.credit.advantages import group_advantages
from g2r_megatron.credit.hazards import (
    advantage_metrics,
    attribution_metrics,
    key_token_metrics,
    response_metrics,
    reward_metrics,
)
from g2r_megatron.credit.judgements import JudgementRow, backward_passes, kind_of
from g2r_megatron.credit.truth import key_token_mask, true_reward, true_verdicts
from g2r_megatron.data.tokenizer import token_texts
from g2r_megatron.data.types import Query
from g2r_megatron.judge.parts import Part
from g2r_megatron.judge.prompt import ResponseReader
from g2r_megatron.judge.stage import item_alphas
from g2r_megatron.policy.log_probs import TokenSequence, UpdateLogProbs
from g2r_megatron.rollout.thoughts import with_thoughts
from g2r_megatron.rollout.types import Request, Response, RolloutEngine, Sampled
from g2r_megatron.workers import Inputs, PolicyInputs, Workers, verified_by_all


@dataclass(frozen=True)
class Rollouts:
    """N = queries x G sampled responses, grouped by query; every list has N entries."""

    group_size: int
    queries: list[Query]
    responses: list[Response]
    keys: list[str]  # what seeded the sampling of each response

    @property
    def sequences(self) -> list[TokenSequence]:
        return [TokenSequence(r.prompt_ids, r.token_ids) for r in self.responses]

    @property
    def bodies(self) -> list[list[int]]:
        """The token ids that the judge reads, [T] a response: without its thought and the stop token."""
        return [r.answer_ids for r in self.responses]

    @property
    def finished(self) -> list[bool]:
        return [r.finished for r in self.responses]

    @cached_property
    def truths(self) -> list[list[bool] | None]:
        """Whether each response really meets each rubric item, None where that is not known (credit/truth.py)."""
        return [true_verdicts(query, r.text) for query, r in zip(self.queries, self.responses, strict=True)]

    @property
    def sampler_log_probs(self) -> list[torch.Tensor] | None:
        """Of the sampled tokens by another program than the trainer, fp32 [T] with the stop token; else None."""
        if not all(r.log_probs is not None for r in self.responses):
            return None
        return [torch.tensor(r.log_probs, dtype=torch.float32) for r in self.responses]

    @property
    def groups(self) -> list[slice]:
        return [slice(i, i + self.group_size) for i in range(0, len(self.queries), self.group_size)]


@dataclass(frozen=True)
class Experience(Rollouts):
    """Rollouts with what the judge said of them and the credit that their tokens got."""

    judgements: list[JudgementRow]
    alphas: list[list[torch.Tensor | None]]  # [T] of each judgement that was attributed
    advantages: list[torch.Tensor]  # fp32 [thought + T + finished]

    def reward(self, i: int) -> float:
        """The judge's score of response ``i``."""
        return kind_of(self.judgements[i]).reward(self.queries[i], self.judgements[i])


def sample_and_submit(
    workers: Workers,
    inputs: Inputs,
    *,
    queries: list[Query],
    group_size: int,
    key: str,
    batch: str,
    parts: int,
    mix: float | None,
    measured: int = 0,
    temperature: float | None = None,
    between_batches: Callable[[], None] = lambda: None,
) -> Rollouts:
    """``sample`` in ``parts`` parts of whole groups; each goes to the judge before the next is begun (collective).

    ``batch``: as in ``Request``; ``mix``: as in ``Part``; ``measured``: of the first part.
    The judgements come from ``workers.judge.judge_submitted()``.
    """
    sampled: list[Rollouts] = []
    for part in range(parts):
        some = queries[part * len(queries) // parts : (part + 1) * len(queries) // parts]
        if not some:
            continue
        found = sample(workers.engine, inputs, some, group_size, key, temperature, between_batches, batch)
        verified = None
        if inputs.verifier is not None:
            verified = verified_by_all(inputs.verifier, found.queries, [response.text for response in found.responses])
        to_measure = 0 if sampled else measured
        workers.judge.submit(Part(some, group_size, found.bodies, found.keys, mix, verified, to_measure))
        sampled.append(found)
    return Rollouts(
        group_size,
        [query for found in sampled for query in found.queries],
        [response for found in sampled for response in found.responses],
        [name for found in sampled for name in found.keys],
    )


def sample(
    engine: RolloutEngine,
    inputs: Inputs,
    queries: list[Query],
    group_size: int,
    key: str,
    temperature: float | None = None,
    between_batches: Callable[[], None] = lambda: None,
    batch: str = "",
) -> Rollouts:
    """``group_size`` responses a query. ``key`` and the query's id seed the sampling, nothing else does (collective)."""
    repeated = [query for query in queries for _ in range(group_size)]
    keys = [f"{key}/{query.id}/{j}" for query in queries for j in range(group_size)]
    responses = respond(engine, inputs, repeated, keys, temperature, between_batches, batch)
    return Rollouts(group_size, repeated, responses, keys)


def respond(
    engine: RolloutEngine,
    inputs: PolicyInputs,
    queries: list[Query],
    keys: list[str],
    temperature: float | None = None,
    between_batches: Callable[[], None] = lambda: None,
    batch: str = "",
) -> list[Response]:
    """A response to each of ``queries``; ``keys`` seed the sampling, nothing else does (collective)."""
    prompts = [inputs.prompt_ids[query.id] for query in queries]
    requests = [Request(ids, key, batch) for ids, key in zip(prompts, keys, strict=True)]
    sampled = engine.generate(requests, temperature, between_batches=between_batches)
    return [_response(inputs, prompt, found) for prompt, found in zip(prompts, sampled, strict=True)]


def _response(inputs: PolicyInputs, prompt: list[int], sampled: Sampled) -> Response:
    """What was sampled, divided into thought and answer."""
    ids, finished, log_probs = sampled
    body = ids[:-1] if finished else ids
    thought, closed = (0, True) if inputs.thought_end is None else inputs.thought_end.split(inputs.tokenizer, body)
    text = inputs.tokenizer.decode(body[thought:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Response(prompt, ids, finished, cast(str, text), thought, closed, log_probs)


def assign_credit(
    rollouts: Rollouts, judgements: list[JudgementRow], *, prompt: ResponseReader, config: TrainConfig, mix: float
) -> Experience:
    """Token weights alpha of every attributed judgement, and from them the advantages of every token.

    ``prompt``: of the judge; it knows how the judge's tokens lie on the policy's. ``mix``: the weight of alpha in this
    step (credit/advantages.py).
    """
    alphas = [
        item_alphas(prompt, config.judge, body, row, key)
        for body, row, key in zip(rollouts.bodies, judgements, rollouts.keys, strict=True)
    ]
    advantages: list[torch.Tensor] = []
    for group in rollouts.groups:
        rows, responses = judgements[group], rollouts.responses[group]
        lengths = [len(r.answer_ids) for r in responses]
        # an empty answer that was cut off is credited as if it had a stop token
        ended = [r.finished or not length for r, length in zip(responses, lengths, strict=True)]
        scores = kind_of(rows[0]).group_scores(rollouts.queries[group.start], rows, alphas[group], lengths, ended)
        answers = group_advantages(scores, config.grpo, mix)
        sequence = group_advantages(scores, replace(config.grpo, advantage="sequence"), mix)
        advantages += with_thoughts(answers, [float(advantage[-1]) for advantage in sequence], responses)
    return Experience(
        rollouts.group_size, rollouts.queries, rollouts.responses, rollouts.keys, judgements, alphas, advantages
    )


def step_metrics(batch: Experience, inputs: Inputs, flat_threshold: float) -> dict[str, float]:
    """What a training step reports of its batch: scores, the health of the credit, where the advantages went."""
    return score_metrics(batch, batch.judgements) | credit_metrics(batch, inputs, flat_threshold)


def score_metrics(rollouts: Rollouts, judgements: list[JudgementRow]) -> dict[str, float]:
    """Rewards, verdicts against the truth where it is known, response lengths."""
    kind = kind_of(judgements[0])
    rewards = [kind.reward(query, row) for query, row in zip(rollouts.queries, judgements, strict=True)]
    return (
        reward_metrics([rewards[group] for group in rollouts.groups])
        | kind.metrics(rollouts.queries, rollouts.truths, judgements)
        | response_metrics([len(r.token_ids) for r in rollouts.responses], [r.answered for r in rollouts.responses])
    )


def credit_metrics(batch: Experience, inputs: Inputs, flat_threshold: float) -> dict[str, float]:
    """Health of the attributions and where the advantages went."""
    passes = [(i, k) for i, row in enumerate(batch.judgements) for k in backward_passes(row)]
    metrics = attribution_metrics(
        [batch.judgements[i][k].attribution for i, k in passes],
        [batch.alphas[i][k] for i, k in passes],
        [batch.judgements[i][k].cos for i, k in passes],
        flat_threshold,
    )
    key_alphas, masks = [], []
    for i, row in enumerate(batch.judgements):
        checks = kind_of(row).checks(batch.queries[i])
        checked = [k for k, judgement in enumerate(row) if judgement.attribution is not None and checks[k] is not None]
        texts = token_texts(inputs.tokenizer, batch.responses[i].answer_ids) if checked else []
        key_alphas += [batch.alphas[i][k] for k in checked]
        masks += [key_token_mask(checks[k], texts) for k in checked]
    return (
        metrics
        | key_token_metrics(key_alphas, masks)
        | advantage_metrics(batch.advantages, batch.finished)
        | {"advantage/max_abs": max(float(a.abs().max()) for a in batch.advantages)}
    )


def sample_record(batch: Experience, inputs: Inputs, i: int, step: int) -> dict:
    """Response ``i`` as the report draws it: the answer's tokens, their advantages and rewards, each item's verdict and
    alpha; of a thought only how many tokens it has."""
    query, response, row, alphas = batch.queries[i], batch.responses[i], batch.judgements[i], batch.alphas[i]
    kind = kind_of(row)
    rewards = kind.token_rewards(query, row, alphas, len(response.answer_ids), response.finished)
    return {
        "step": step,
        "query_id": query.id,
        "prompt": prompt_text(query),
        "response": response.text,
        "thought_tokens": response.thought,
        "reward": batch.reward(i),
        "true_reward": true_reward(query, response.text),
        "tokens": token_texts(inputs.tokenizer, response.answer_ids),
        "advantages": batch.advantages[i][response.thought :].tolist(),
        "token_rewards": rewards.tolist(),
        "items": kind.sample_items(query, response.text, row, alphas),
    }


def prompt_text(query: Query) -> str:
    """The conversation for people, a line a message."""
    return "\n".join(f"{m['role']}: {m['content']}" for m in query.messages)


def plain_batch(batch: Experience, log_probs: UpdateLogProbs) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """The batch and what its update was made of, for a file.

    Tensors, responses one after another: ``prompt_ids`` and ``response_ids`` int32 with ``prompt_lengths`` and
    ``response_lengths`` int32 [N], and a value a response token of ``advantages``, ``old_log_probs`` and (with a KL
    penalty) ``reference_log_probs`` fp32. And of each response its query, key, text, reward and verdicts.
    """
    tensors = {"advantages": torch.cat(batch.advantages).float(), "old_log_probs": torch.cat(log_probs.old).float()}
    if log_probs.reference is not None:
        tensors["reference_log_probs"] = torch.cat(log_probs.reference).float()
    for name, parts in (
        ("prompt", [r.prompt_ids for r in batch.responses]),
        ("response", [r.token_ids for r in batch.responses]),
    ):
        tensors[f"{name}_ids"] = torch.tensor([i for part in parts for i in part], dtype=torch.int32)
        tensors[f"{name}_lengths"] = torch.tensor([len(part) for part in parts], dtype=torch.int32)
    return tensors, plain_responses(batch, batch.judgements)


def plain_responses(rollouts: Rollouts, judgements: list[JudgementRow]) -> list[dict]:
    """Of each response its query, key, text, reward and verdicts."""
    return [
        {
            "query_id": query.id,
            "key": key,
            "response": response.text,
            "reward": kind_of(row).reward(query, row),
            "verdicts": [judgement.verdict for judgement in row],
        }
        for query, key, response, row in zip(
            rollouts.queries, rollouts.keys, rollouts.responses, judgements, strict=True
        )
    ]


def dumped(
    rollouts: Rollouts, judgements: list[JudgementRow], step: int
) -> tuple[list[Request], list[Sampled], list[dict]]:
    """What ``rollout.dump`` keeps of a batch of ``step``: requests, what was sampled, and what people read of each."""
    requests = [Request(r.prompt_ids, key) for r, key in zip(rollouts.responses, rollouts.keys, strict=True)]
    sampled = [Sampled(r.token_ids, r.finished, r.log_probs) for r in rollouts.responses]
    rows = [
        {"step": step, "prompt": prompt_text(query), **row, "tokens": len(r.token_ids), "finished": r.finished}
        for row, query, r in zip(
            plain_responses(rollouts, judgements), rollouts.queries, rollouts.responses, strict=True
        )
    ]
    return requests, sampled, rows
