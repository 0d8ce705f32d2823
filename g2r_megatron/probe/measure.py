"""Measures one judge: its verdicts on changed questions; and for a pair, what each sentence is worth and what each attribution says."""

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from g2r_megatron.config.command_options import ProbeConfig, Probed
from g2r_megatron.config.options import JudgeConfig
from g2r_megatron.credit.attribution import effective_sample_share, shuffled
from g2r_megatron.data.types import Query
from g2r_megatron.judge.frozen import FrozenJudge
from g2r_megatron.judge.hiding import read_deleted, read_hidden
from g2r_megatron.judge.prompt import JudgePrompt
from g2r_megatron.judge.reward_prompt import RewardPrompt
from g2r_megatron.judge.stage import JudgeStage, item_alphas
from g2r_megatron.judge.targets import VerdictTarget
from g2r_megatron.judge.types import JudgeInput
from g2r_megatron.model.build import MegatronModel
from g2r_megatron.probe.pairs import Pair, Response, RowVerdicts, verdict

NEGATION = "It is not true that: {}"


def swapped_template(config: JudgeConfig) -> str | None:
    """``judge.template`` with the first spellings of the verdicts in each other's place; None unless it names both."""
    true, false = config.true_words[0], config.false_words[0]
    words = re.compile(rf"\b(?:{re.escape(true)}|{re.escape(false)})\b")
    if set(words.findall(config.template)) != {true, false}:
        return None
    return words.sub(lambda found: false if found[0] == true else true, config.template)


def method_config(judge: JudgeConfig, method: Probed) -> JudgeConfig:
    """The judge's options for one of ``ProbeConfig.attributions``."""
    if method == "gate_branch":
        return replace(judge, attribution="gate", gate_queries="branch")
    if method == "gate_all":
        return replace(judge, attribution="gate", gate_queries="all")
    return replace(judge, attribution=method, gate_levels=[1.0])


class Prober:
    """Measures with one model. Every rank passes the same and gets all results (collective)."""

    def __init__(self, model: MegatronModel, prompt: JudgePrompt | RewardPrompt, config: ProbeConfig):
        self.prompt, self.config = prompt, config
        judge_config = replace(config.judge, verdict="compare")
        self.stages = {
            method: JudgeStage(FrozenJudge(model, own, prompt.true_ids, prompt.false_ids, prompt.null_id), prompt, own)
            for method in config.attributions
            for own in [method_config(judge_config, method)]
        }
        self.judge = next(iter(self.stages.values())).judge
        template = swapped_template(judge_config)
        self.swapped = None
        if template is not None and isinstance(prompt, JudgePrompt):
            self.swapped = JudgePrompt(prompt.tokenizer, replace(judge_config, template=template))

    def verdicts(self, responses: Sequence[Response]) -> list[RowVerdicts]:
        """The verdicts of every item, on the question as it is and on the changed ones, in one call of the judge. A reward
        model has none.

        Most templates put what is changed after the response, so the rows share their beginning."""
        rows = []
        for response in responses:
            negated = _negated(response.query)
            asked = [(self.prompt, response.query), (self.prompt, negated)]
            asked += [(self.swapped, response.query)] if self.swapped else []
            rows.append([item for prompt, query in asked for item in prompt.build_items(query, response.body)])
        read = iter(self.judge.verdict_log_probs(rows).exp().tolist())
        found = []
        for response in responses:
            take = partial(lambda n: [next(read) for _ in range(n)], len(response.query.rubric))
            plain, negated_values = take(), take()
            found.append(RowVerdicts(plain, take() if self.swapped else None, negated_values))
        return found

    def measure(self, responses: Sequence[Response], items: Sequence[int]) -> list[Pair]:
        """One pair of each response."""
        inputs = [self.prompt.build_items(r.query, r.body)[k] for r, k in zip(responses, items, strict=True)]
        spans = [response.spans for response in responses]
        seconds: dict[str, float] = {}
        masked = self._timed("masked", seconds, lambda: read_hidden(self.judge, inputs, spans))
        deleted = self._timed("deleted", seconds, lambda: read_deleted(self.judge, inputs, spans))
        pairs = [
            Pair(response.row, item, _verdict(without[0].tolist()), _lost(without), _lost(gone))
            for response, item, without, gone in zip(responses, items, masked, deleted, strict=True)
        ]
        for method, stage in self.stages.items():
            found = self._timed(method, seconds, lambda: _attributions(stage, inputs))  # noqa: B023
            for pair, response, judgement in zip(pairs, responses, found, strict=True):
                self._credit(pair, response, method, judgement)
        for pair in pairs:
            pair.seconds = {name: value / len(pairs) for name, value in seconds.items()}
        return pairs

    def _timed(self, name: str, seconds: dict[str, float], run):
        start = time.monotonic()
        result = run()
        seconds[name] = time.monotonic() - start
        return result

    def _credit(self, pair: Pair, response: Response, method: str, judgement) -> None:
        """Add to ``pair`` the sums of ``judgement``'s b over each sentence. The first method's sums, shuffled, are the placebo."""
        b = judgement.attribution
        (alpha,) = item_alphas(self.prompt, self.config.judge, response.body, [judgement], "")
        pair.credit[method] = [float(b[low:high].double().sum()) for low, high in response.spans]
        pair.ess[method] = effective_sample_share(alpha)
        if method == self.config.attributions[0]:
            sums, key = (
                torch.tensor(pair.credit[method], dtype=torch.float64),
                f"{self.config.seed}/{pair.row}/{pair.item}",
            )
            pair.credit["shuffled"] = shuffled(sums, torch.arange(len(sums)), key).tolist()
            pair.ess["shuffled"] = pair.ess[method]


def _attributions(stage: JudgeStage, inputs: Sequence[JudgeInput]) -> list:
    """The judgement of each input, with its attribution. The time of the verdict's pass is included."""
    rows = [[item] for item in inputs]
    judgements = stage.verdicts(rows, [""] * len(rows))
    stage.attribute(rows, judgements, [[True]] * len(rows), [[1.0]] * len(rows))
    return [judgement for (judgement,) in judgements]


def _verdict(values: list[float]) -> bool | None:
    """Of log-probs [2]; None of a score [1]."""
    return verdict(values) if len(values) == VerdictTarget.columns else None


def _lost(values: torch.Tensor) -> list[float]:
    """How much the verdict's margin, or the score, falls without each part. ``values``: log-probs, fp32 [1 + parts, 2], or
    scores [1 + parts, 1], the first with all parts."""
    values = values.double()
    measure = values[:, 0] - values[:, 1] if values.size(1) == VerdictTarget.columns else values[:, 0]
    return (measure[0] - measure[1:]).tolist()


def _negated(query: Query) -> Query:
    return replace(
        query, rubric=tuple(replace(item, criterion=NEGATION.format(item.criterion)) for item in query.rubric)
    )
