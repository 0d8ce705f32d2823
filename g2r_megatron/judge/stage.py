"""The judge stage: from responses to verdicts (or scores of a reward model), attributions and token weights.

Every rank holds the whole batch (token ids are small) and gets the whole result; the expensive passes inside
``FrozenJudge`` are divided over the judge's data-parallel replicas.
"""

import random
from collections.abc import Sequence

import torch

from g2r_megatron.config.options import JudgeConfig
from g2r_megatron.credit.attribution import Weighting, alpha_from_attribution, pooled_weights, shuffled
from g2r_megatron.credit.judgements import Judgement, JudgementRow
from g2r_megatron.credit.sentences import sentence_ids
from g2r_megatron.data.tokenizer import token_texts
from g2r_megatron.data.types import Query
from g2r_megatron.judge.frozen import FrozenJudge
from g2r_megatron.judge.hiding import attention_mass, occlusion, unit_spans
from g2r_megatron.judge.prompt import ResponseReader
from g2r_megatron.judge.types import JudgeInput, Pass


class JudgeStage:
    """Judges (query, response body) pairs against every item of the query's rubric; a reward model scores them.

    Below, a response has one entry for each item, or a single one for its score.
    """

    def __init__(self, judge: FrozenJudge, prompt: ResponseReader, config: JudgeConfig):
        self.judge, self.prompt, self.config = judge, prompt, config

    def inputs(self, queries: Sequence[Query], bodies: Sequence[list[int]]) -> list[list[JudgeInput]]:
        """The judge inputs of each response. ``bodies``: response token ids without the stop token."""
        return [self.prompt.build_items(query, body) for query, body in zip(queries, bodies, strict=True)]

    def verdicts(
        self, inputs: list[list[JudgeInput]], keys: Sequence[str], attributed: bool = True
    ) -> list[list[Judgement]]:
        """Verdicts of every item of every response, or its score (collective).

        ``keys``: one string a response that seeds sampled verdicts, so that they depend on nothing else. ``attributed``:
        ``attribute`` will be called for some of them. If the verdict pass gives attributions too (judge/gates.py), it
        then computes all of them, and ``attribute`` keeps those that are needed.
        """
        draws = self._draws(inputs, keys) if self.config.verdict == "sample" else None
        if attributed and self._in_one_pass:
            values, verdicts, gates = self.judge.gates.verdicts(inputs, draws)
        else:
            values, gates = self.judge.read(inputs), None
            verdicts = self.judge.target.decide(values, draws).tolist()
        found = self.prompt.judgement.from_output(values, verdicts)
        for judgement, b in zip(found, gates or (), strict=gates is not None):
            _credit([judgement], b)
        judgements = iter(found)
        return [[next(judgements) for _ in row] for row in inputs]

    @staticmethod
    def _draws(inputs: list[list[JudgeInput]], keys: Sequence[str]) -> torch.Tensor:
        """What decides sampled verdicts: fp64 [inputs], numbers in [0, 1) that depend on ``keys`` alone."""
        draws = [
            random.Random(f"{key}/{k}").random() for row, key in zip(inputs, keys, strict=True) for k in range(len(row))
        ]
        return torch.tensor(draws, dtype=torch.float64)

    @property
    def _in_one_pass(self) -> bool:
        """Whether one pass gives verdicts and attributions."""
        return self.judge.gates is not None and self.judge.gates.queries == "branch"

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
        if self._in_one_pass:
            self._keep(credited, passes, judgements)
            return
        if (scores := self._not_at_embeddings(passes)) is not None:
            for together, b in zip(credited, scores, strict=True):
                _credit(together, b)
            return
        for together, gradients in zip(credited, self.judge.token_gradients(passes), strict=True):
            attribution = gradients.attribution(self.config.attribution)
            for item in together:
                item.attribution = attribution
                item.grad_norm = gradients.l2.square().sum().sqrt().item()
                item.cos = gradients.cos

    def _not_at_embeddings(self, passes: list[Pass]) -> list[torch.Tensor] | None:
        """b of each pass if it is not a gradient at the embeddings, else None."""
        kind = self.config.attribution
        if self.judge.gates is not None:
            return self.judge.gates.gradients(passes)
        if kind == "occlusion":
            return occlusion(self.judge, passes, [self.sentences(one.inputs[0]) for one in passes])
        return attention_mass(self.judge, passes) if kind == "attention" else None

    def sentences(self, item: JudgeInput) -> list[tuple[int, int]]:
        """The sentences of a response as the judge reads it."""
        response = item.input_ids[item.response_start : item.response_end]
        return unit_spans(sentence_ids(token_texts(self.prompt.tokenizer, response)))

    def _keep(self, credited: list[list[Judgement]], passes: list[Pass], judgements: list[list[Judgement]]) -> None:
        """The verdict pass's attributions of each pass's items, combined by the pass's weights."""
        combined = [
            sum((weight * item.attribution for weight, item in zip(one.weights, items, strict=True)), torch.zeros(()))
            for one, items in zip(passes, credited, strict=True)
        ]
        for row in judgements:
            for judgement in row:
                judgement.attribution = judgement.grad_norm = judgement.cos = None
        for items, b in zip(credited, combined, strict=True):
            _credit(items, b)

    def alphas(self, body: list[int], judgements: JudgementRow, key: str = "") -> list[torch.Tensor | None]:
        """``item_alphas`` of one response."""
        return item_alphas(self.prompt, self.config, body, judgements, key)


def _credit(items: list[Judgement], b: torch.Tensor) -> None:
    """b [T] of ``items`` that is not a gradient at embeddings: ``grad_norm`` is its norm, and it has no ``cos``."""
    for item in items:
        item.attribution, item.grad_norm, item.cos = b, b.norm().item(), float("nan")


def item_alphas(
    prompt: ResponseReader, config: JudgeConfig, body: list[int], judgements: JudgementRow, key: str
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
