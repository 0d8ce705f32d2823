"""The judge stage: responses in, verdicts (or scores of a reward model), attributions and token weights out.

Every rank holds the whole batch (token ids are small) and gets the whole result; the heavy passes inside
``FrozenJudge`` are shared out over the judge's data-parallel replicas.
"""

import random
from collections.abc import Sequence

import torch

from g2r_megatron.config.options import JudgeConfig
from g2r_megatron.credit.attribution import Weighting, alpha_from_attribution, pooled_weights, shuffled
from g2r_megatron.credit.judgements import ItemJudgement, Judgement, ScoreJudgement
from g2r_megatron.credit.sentences import sentence_ids
from g2r_megatron.data.tokenizer import token_texts
from g2r_megatron.data.types import Query
from g2r_megatron.judge.frozen import FrozenJudge, Pass
from g2r_megatron.judge.prompt import JudgePrompt, ResponseReader
from g2r_megatron.judge.reward_prompt import RewardPrompt
from g2r_megatron.judge.types import JudgeInput


class JudgeStage:
    """Judges (query, response body) pairs against every item of the query's rubric; a reward model scores them.

    Below, a response has one entry for each item, or a single one for its score.
    """

    def __init__(self, judge: FrozenJudge, prompt: JudgePrompt | RewardPrompt, config: JudgeConfig):
        self.judge, self.prompt, self.config = judge, prompt, config

    def inputs(self, queries: Sequence[Query], bodies: Sequence[list[int]]) -> list[list[JudgeInput]]:
        """The judge inputs of each response. ``bodies``: response token ids without the stop token."""
        return [self.prompt.build_items(query, body) for query, body in zip(queries, bodies, strict=True)]

    def verdicts(self, inputs: list[list[JudgeInput]], keys: Sequence[str]) -> list[list[Judgement]]:
        """Verdicts of every item of every response, or its score (collective).

        ``keys``: one string a response that seeds sampled verdicts, so that they depend on nothing else.
        """
        if isinstance(self.prompt, RewardPrompt):
            return [[ScoreJudgement(score)] for score in self.judge.scores(inputs).tolist()]
        probabilities = iter(self.judge.verdict_log_probs(inputs).exp().tolist())
        return [
            [self._judgement(*next(probabilities), f"{key}/{k}") for k in range(len(row))]
            for row, key in zip(inputs, keys, strict=True)
        ]

    def _judgement(self, p_true: float, p_false: float, key: str) -> ItemJudgement:
        if self.config.verdict == "sample":
            return ItemJudgement(p_true, p_false, random.Random(key).random() * (p_true + p_false) < p_true)
        return ItemJudgement(p_true, p_false, p_true > p_false)

    def attribute(
        self,
        inputs: list[list[JudgeInput]],
        judgements: list[list[Judgement]],
        needed: list[list[bool]],
        weights: list[list[float]],
    ) -> None:
        """Fill ``attribution``, ``grad_norm`` and ``cos`` of the judgements marked in ``needed`` (collective).

        ``weights``: w_k of each judgement; ``judge.credit=per_response`` pools the marked items by them, and all of them then
        hold the one result (docs/method.md). With ``judge.attribution=uniform`` nothing runs and nothing is filled.
        """
        if self.config.attribution == "uniform":
            return
        credited: list[list[Judgement]] = []  # by each pass
        passes: list[Pass] = []
        for row, found, marks, row_weights in zip(inputs, judgements, needed, weights, strict=True):
            # an empty response has no token to credit
            marked = [k for k, mark in enumerate(marks) if mark and row[k].response_end > row[k].response_start]
            for items in [[k] for k in marked] if self.config.credit == "per_item" else [marked] if marked else []:
                factors = pooled_weights([row_weights[k] for k in items]) if len(items) > 1 else [1.0]
                passes.append(Pass([row[k] for k in items], [found[k].verdict for k in items], factors))
                credited.append([found[k] for k in items])
        for items, gradients in zip(credited, self.judge.token_gradients(passes), strict=True):
            attribution = gradients.attribution(self.config.attribution)
            for item in items:
                item.attribution = attribution
                item.grad_norm = gradients.l2.square().sum().sqrt().item()
                item.cos = gradients.cos

    def alphas(self, body: list[int], judgements: list[Judgement], key: str = "") -> list[torch.Tensor | None]:
        """``item_alphas`` of one response."""
        return item_alphas(self.prompt, self.config, body, judgements, key)


def item_alphas(
    prompt: ResponseReader, config: JudgeConfig, body: list[int], judgements: list[Judgement], key: str
) -> list[torch.Tensor | None]:
    """alpha_t [T] of each judgement over the ``body`` of one response; None where no backward ran. Needs no judge.

    ``key``: a string of the response that seeds ``judge.shuffle``; all items of the response get the same order.
    """
    sentences = None
    if config.smoothing == "sentence":
        sentences = sentence_ids(token_texts(prompt.body_tokenizer, body))
    _, alignment = prompt.response(body)
    weighting = Weighting(config.normalize, config.smoothing, config.tau, config.standardize, config.smear_gamma)
    alphas = [
        None if j.attribution is None else alpha_from_attribution(j.attribution, weighting, sentences, alignment)
        for j in judgements
    ]
    if config.shuffle:
        units = torch.arange(len(body)) if sentences is None else sentences
        alphas = [None if alpha is None else shuffled(alpha, units, f"shuffle/{key}") for alpha in alphas]
    return alphas
