"""The judge stage: responses in, verdicts, attributions and token weights out.

Every rank holds the whole batch (token ids are small) and gets the whole result; the heavy passes inside
``FrozenJudge`` are shared out over the judge's data-parallel replicas.
"""

import random
from collections.abc import Sequence

import torch

from g2r_megatron.config import JudgeConfig
from g2r_megatron.data.tokenizer import token_texts
from g2r_megatron.data.types import Query
from g2r_megatron.judge.attribution import alpha_from_attribution, sentence_ids
from g2r_megatron.judge.frozen import FrozenJudge
from g2r_megatron.judge.prompt import JudgeInput, JudgePrompt
from g2r_megatron.judge.types import ItemJudgement


class JudgeStage:
    """Judges (query, response body) pairs against every item of the query's rubric."""

    def __init__(self, judge: FrozenJudge, prompt: JudgePrompt, config: JudgeConfig):
        self.judge, self.prompt, self.config = judge, prompt, config

    def inputs(self, queries: Sequence[Query], bodies: Sequence[list[int]]) -> list[list[JudgeInput]]:
        """One judge input per response and rubric item. ``bodies``: response token ids without the stop token."""
        return [
            [self.prompt.build(query, item, body) for item in query.rubric]
            for query, body in zip(queries, bodies, strict=True)
        ]

    def verdicts(self, inputs: list[list[JudgeInput]], keys: Sequence[str]) -> list[list[ItemJudgement]]:
        """Verdicts of every item of every response (collective).

        ``keys``: one string a response that seeds sampled verdicts, so that they depend on nothing else.
        """
        flat = [item for row in inputs for item in row]
        probabilities = iter(self.judge.verdict_log_probs(flat).exp().tolist())
        return [
            [self._judgement(*next(probabilities), f"{key}/{k}") for k in range(len(row))]
            for row, key in zip(inputs, keys, strict=True)
        ]

    def _judgement(self, p_true: float, p_false: float, key: str) -> ItemJudgement:
        if self.config.verdict == "sample":
            return ItemJudgement(p_true, p_false, random.Random(key).random() * (p_true + p_false) < p_true)
        return ItemJudgement(p_true, p_false, p_true > p_false)

    def attribute(
        self, inputs: list[list[JudgeInput]], judgements: list[list[ItemJudgement]], needed: list[list[bool]]
    ) -> None:
        """Fill ``attribution``, ``grad_norm`` and ``cos`` of the judgements marked in ``needed`` (collective)."""
        flat = [item for row in inputs for item in row]
        results = [item for row in judgements for item in row]
        marks = [mark for row in needed for mark in row]
        # an empty response has no token to credit
        wanted = {
            i: results[i].verdict
            for i, mark in enumerate(marks)
            if mark and flat[i].response_end > flat[i].response_start
        }
        for i, gradients in self.judge.token_gradients(flat, wanted).items():
            results[i].attribution = gradients.attribution(self.config.attribution)
            results[i].grad_norm = gradients.l2.square().sum().sqrt().item()
            results[i].cos = gradients.cos

    def alphas(self, body: list[int], judgements: list[ItemJudgement]) -> list[torch.Tensor | None]:
        """alpha_t [T] of each item over the ``body`` of one response; None where no backward ran."""
        c, sentences = self.config, None
        if c.pool == "sentence":
            sentences = sentence_ids(token_texts(self.prompt.body_tokenizer, body), c.sentence_delimiters)
        _, alignment = self.prompt.response(body)
        options = c.tau, c.standardize, c.pool, c.smear_gamma, sentences, alignment
        return [
            None if item.attribution is None else alpha_from_attribution(item.attribution, *options)
            for item in judgements
        ]
