"""From requests to answers, on the judge's ranks: the same calls as ``g2r judge``, on rows that come over the network.

Every rank does all of this with the same requests (the model's passes are collective), and the first one answers.
A request that cannot be judged is answered 422 and does not change what the others get.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from g2r_megatron.config.options import Attribution, GrpoConfig, JudgeConfig
from g2r_megatron.config.presets import PRESETS, fill_from_preset
from g2r_megatron.config.serve_options import ServeConfig
from g2r_megatron.credit.advantages import Scores, group_advantages
from g2r_megatron.credit.judgements import JudgementRow, kind_of, plain_number, plain_numbers
from g2r_megatron.credit.sentences import sentence_ids
from g2r_megatron.data.token_spans import encoded_bounds
from g2r_megatron.data.tokenizer import token_texts
from g2r_megatron.data.tokenizer_files import load_tokenizer
from g2r_megatron.data.types import Query, RubricItem
from g2r_megatron.errors import UserError
from g2r_megatron.judge.frozen import FrozenJudge
from g2r_megatron.judge.hiding import read_hidden, unit_spans
from g2r_megatron.judge.prompt import JudgePrompt
from g2r_megatron.judge.reward_prompt import RewardPrompt, judge_prompt
from g2r_megatron.judge.stage import JudgeStage, item_alphas
from g2r_megatron.judge.types import JudgeInput
from g2r_megatron.model.build import MegatronModel
from g2r_megatron.model.hf import HFModel, load_model_tokenizer
from g2r_megatron.serve.schema import OWN_TOKENIZER

Prompt = JudgePrompt | RewardPrompt
Answer = tuple[int, dict[str, Any]]  # HTTP status and JSON


@dataclass(frozen=True)
class Row:
    """One response of a request. ``size``: tokens that the answer has entries for, a stop token included."""

    query: Query
    prompt: Prompt
    body: list[int]
    inputs: list[JudgeInput]
    finished: bool
    size: int
    spans: list[list[int]] | None  # of a text

    @property
    def key(self) -> str:
        """What seeds the row's random numbers: for a text as in ``g2r judge``, without the seed."""
        return f"{self.query.id}/{self.query.response}"


@dataclass(frozen=True)
class Job:
    """One admitted request. ``attribution``: judge.attribution, None for scores alone."""

    number: int
    kind: str
    request: dict[str, Any]
    rows: list[Row]
    attribution: Attribution | None


class Answerer:
    """Judges requests with one model (collective)."""

    def __init__(self, hf: HFModel, config: ServeConfig):
        """Reads the tokenizers. Raises ``UserError`` for one that cannot work, before the weights are read."""
        self.config, self.judge_config = config, config.judge
        tokenizer = load_model_tokenizer(hf)
        self._vocab = hf.geometry.vocab
        others: dict[str, PreTrainedTokenizerFast | None] = {OWN_TOKENIZER: None}
        for name, directory in config.serve.tokenizers.items():
            others[name] = _other_tokenizer(name, directory, tokenizer)
        kinds = dict.fromkeys([config.judge.attribution, *config.serve.attributions])
        self._configs = {kind: _with_attribution(config.judge, kind) for kind in kinds}
        self.prompts = {
            (kind, name): judge_prompt(hf, tokenizer, own, other)
            for kind, own in self._configs.items()
            for name, other in others.items()
        }
        self.stages: dict[str, JudgeStage] = {}
        self.grpo = fill_from_preset(GrpoConfig(), PRESETS[config.preset]["grpo"])

    def use(self, model: MegatronModel) -> None:
        """Build the judge of each attribution on the one ``model``."""
        for kind, own in self._configs.items():
            prompt = self.prompts[kind, OWN_TOKENIZER]
            judge = FrozenJudge(model, own, prompt.true_ids, prompt.false_ids, prompt.null_id)
            self.stages[kind] = JudgeStage(judge, prompt, own)

    def answers(self, kinds: Sequence[str], requests: Sequence[dict[str, Any]]) -> list[Answer]:
        """One answer a request, in order (collective)."""
        found: dict[int, Answer] = {}
        jobs: list[Job] = []
        for number, (kind, request) in enumerate(zip(kinds, requests, strict=True)):
            try:
                jobs.append(self._admitted(number, kind, request))
            except UserError as error:
                found[number] = refusal(error)
        together: dict[tuple[bool, Attribution | None], list[Job]] = {}
        for job in jobs:
            together.setdefault((job.kind == "hide", job.attribution), []).append(job)
        for (hides, attribution), group in together.items():
            run = self._hidden if hides else self._judged
            found |= run(group, attribution)
        return [found[number] for number in range(len(requests))]

    # ---- what a request asks for -----------------------------------------------------------------------------------

    def _admitted(self, number: int, kind: str, request: dict[str, Any]) -> Job:
        """Raises ``UserError`` for what the schema cannot see: tokens, lengths, conversations that templates reject."""
        attribution = request["options"].get("attribution") if kind == "credit" else None
        if kind == "credit":
            attribution = attribution or self.judge_config.attribution
        prompt = self.prompts.get((attribution or self.judge_config.attribution, request["tokenizer"]))
        if prompt is None:
            self._refuse_unknown(attribution, request["tokenizer"])
        if kind == "hide" and request["tokenizer"] != OWN_TOKENIZER:
            raise UserError(
                "tokenizer", request["tokenizer"], "sentences are hidden in texts or the judge's own tokens"
            )
        if prompt.needs_rubric != bool(request["rubric"]):
            found = "is missing" if prompt.needs_rubric else "is there, but the judge is a reward model"
            raise UserError("rubric", found, "give criteria to a language model, and none to a reward model")
        query = query_of(request)
        responses = [request["response"]] if kind == "hide" else request["responses"]
        rows = [self._row(query, prompt, response) for response in responses]
        if kind == "credit" and len(rows) == 1 and request["options"].get("baseline") == "rloo":
            raise UserError("options.baseline", "rloo with one response", "give several responses, or use group")
        if kind == "hide":
            _check_sentences(rows[0], request["sentences"])
        return Job(number, kind, request, rows, attribution)

    def _refuse_unknown(self, attribution: Attribution | None, tokenizer: str) -> None:
        kinds, names = ([*dict.fromkeys(key[i] for key in self.prompts)] for i in range(2))
        if attribution is not None and attribution not in kinds:
            raise UserError("options.attribution", attribution, f"this service has {', '.join(kinds)}")
        raise UserError("tokenizer", repr(tokenizer), f"this service has {', '.join(names)}")

    def _row(self, query: Query, prompt: Prompt, response: dict[str, Any]) -> Row:
        tokenizer, spans, finished = prompt.body_tokenizer, None, bool(response.get("finished"))
        if (text := response.get("text")) is not None:
            if prompt.policy_tokenizer is not None:
                raise UserError("tokenizer", "given with a text", "a text is divided into the judge's own tokens")
            body, bounds = encoded_bounds(tokenizer, text, continues=False)
            spans = character_spans(text, bounds.tolist())
        else:
            ids, text = response["token_ids"], ""
            known = len(tokenizer) if prompt.policy_tokenizer is not None else min(len(tokenizer), self._vocab)
            if ids and max(ids) >= known:
                raise UserError("responses.token_ids", str(max(ids)), f"the tokenizer has {known} tokens")
            body = ids[:-1] if finished else ids
            text = json.dumps(ids)
        query = replace(query, response=text)
        inputs = prompt.build_items(query, body)
        return Row(query, prompt, body, inputs, finished, len(body) + finished, spans)

    # ---- what the judge says ---------------------------------------------------------------------------------------

    def _judged(self, jobs: list[Job], attribution: Attribution | None) -> dict[int, Answer]:
        """Scores, and with an ``attribution`` credit, of all responses of ``jobs`` in one pass (collective)."""
        stage = self.stages[attribution or self.judge_config.attribution]
        rows = [row for job in jobs for row in job.rows]
        inputs = [row.inputs for row in rows]
        keys = [f"{self.config.seed}/{row.key}" for row in rows]
        judgements = stage.verdicts(inputs, keys, attributed=attribution is not None)
        if attribution is not None:
            weights = [kind_of(found).weights(row.query) for row, found in zip(rows, judgements, strict=True)]
            needed = [
                [judgement.verdict is not False and weight != 0 for judgement, weight in zip(found, some, strict=True)]
                for found, some in zip(judgements, weights, strict=True)
            ]
            stage.attribute(inputs, judgements, needed, weights)
        found, left = {}, list(zip(judgements, keys, strict=True))
        for job in jobs:
            own, left = left[: len(job.rows)], left[len(job.rows) :]
            if attribution is None:
                found[job.number] = (200, {"responses": [_score(row, j) for row, (j, _) in zip(job.rows, own)]})
            else:
                found[job.number] = self._credit(job, [j for j, _ in own], [key for _, key in own])
        return found

    def _credit(self, job: Job, judgements: list[JudgementRow], keys: list[str]) -> Answer:
        """Token weights, rewards and advantages of one request's responses."""
        config = self._configs[job.attribution]
        alphas = [
            item_alphas(row.prompt, config, row.body, judged, key)
            for row, judged, key in zip(job.rows, judgements, keys, strict=True)
        ]
        lengths = [len(row.body) for row in job.rows]
        # an empty response that was cut off is credited as if it had a stop token, as in training
        ended = [row.finished or not length for row, length in zip(job.rows, lengths, strict=True)]
        scores = kind_of(judgements[0]).group_scores(job.rows[0].query, judgements, alphas, lengths, ended)
        advantages: list[torch.Tensor | None] = [None] * len(job.rows)
        if len(job.rows) > 1:
            advantages = [*self._advantages(job, scores)]
        responses = []
        for i, (row, judged, found) in enumerate(zip(job.rows, judgements, alphas, strict=True)):
            record = kind_of(judged).output_record(row.query, judged, found)
            for part in record.get("items", [record]):
                del part["attribution"]
                part["alpha"] = _per_token(part["alpha"], row.size)
            sentences = unit_spans(sentence_ids(token_texts(row.prompt.body_tokenizer, row.body)))
            rewards = scores.token_rewards(i, found).float()[: row.size]
            record |= {"sentences": sentences, "token_rewards": plain_numbers(rewards)}
            if row.spans is not None:
                record["spans"] = row.spans
            if advantages[i] is not None:
                record["advantages"] = plain_numbers(advantages[i][: row.size])
            responses.append(record)
        return 200, {"responses": responses}

    def _advantages(self, job: Job, scores: Scores) -> list[torch.Tensor]:
        """[size] of each response, by the request's estimator."""
        names = set(GrpoConfig.__dataclass_fields__)
        given = {k: v for k, v in job.request["options"].items() if k in names and v is not None}
        options = replace(self.grpo, **given)
        return group_advantages(scores, options, options.mix)

    def _hidden(self, jobs: list[Job], attribution: Attribution | None) -> dict[int, Answer]:
        """Margins with and without sentences (collective)."""
        stage = self.stages[self.judge_config.attribution]
        inputs, spans = [], []
        for job in jobs:
            (row,) = job.rows
            units = unit_spans(sentence_ids(token_texts(row.prompt.body_tokenizer, row.body)))
            inputs += row.inputs
            spans += [[units[i] for i in sorted(set(job.request["sentences"]))]] * len(row.inputs)
        margins = []
        for values in read_hidden(stage.judge, inputs, spans):
            margin = values[:, 0].double() - values[:, 1].double() if values.size(1) == 2 else values[:, 0].double()
            margins.append(plain_numbers(margin))
        found = {}
        for job in jobs:
            count = len(job.rows[0].inputs)
            own, margins = margins[:count], margins[count:]
            order = sorted(set(job.request["sentences"]))
            hidden = [[margin[1 + order.index(i)] for i in job.request["sentences"]] for margin in own]
            found[job.number] = (200, {"margins": [margin[0] for margin in own], "hidden": hidden})
        return found


def query_of(request: dict[str, Any]) -> Query:
    """The query of a request; without an id it gets the one that ``g2r judge`` gives such a row."""
    messages = request["messages"] or [{"role": "user", "content": request["prompt"]}]
    messages = tuple({"role": message["role"], "content": message["content"]} for message in messages)
    hashed = hashlib.sha1(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:16]
    rubric = tuple(RubricItem(item["criterion"], item["weight"]) for item in request["rubric"])
    return Query(request["id"] or hashed, messages, rubric)


def character_spans(text: str, bounds: Sequence[float]) -> list[list[int]]:
    """[first, last + 1) character of each token. ``bounds``: [T + 1] in bytes of UTF-8 (data/token_spans.py).

    A character that several tokens spell is in the span of each of them.
    """
    starts = [0, *accumulate(len(character.encode()) for character in text)]  # of each character, and the end

    def span(low: float, high: float) -> list[int]:
        first = min(bisect_right(starts, low) - 1, len(text))
        return [first, max(first, bisect_right(starts, high - 1e-9)) if high > low else first]

    return [span(low, high) for low, high in pairwise(bounds)]


def refusal(error: UserError) -> Answer:
    """The answer to a request that cannot be judged."""
    return 422, {"error": str(error)}


def _score(row: Row, judgements: JudgementRow) -> dict[str, Any]:
    record = kind_of(judgements).output_record(row.query, judgements, [None] * len(judgements))
    for part in record.get("items", [record]):
        del part["attribution"], part["alpha"]
    record["reward"] = plain_number(record["reward"]) if record["reward"] is not None else None
    return record


def _per_token(alpha: list | None, size: int) -> list | None:
    """``alpha`` of the body with an entry for the stop token, which the judge does not read."""
    return None if alpha is None else alpha + [0.0] * (size - len(alpha))


def _with_attribution(judge: JudgeConfig, kind: Attribution) -> JudgeConfig:
    if kind == judge.attribution:
        return judge
    return replace(judge, attribution=kind, gate_queries=None, gate_levels=[1.0])


def _other_tokenizer(name: str, directory: str, judge: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast | None:
    """None for one whose tokens the judge all has under the same ids: it then reads the ids themselves."""
    if not Path(directory).is_dir():
        raise UserError(f"serve.tokenizers.{name}", f"{directory} is not a directory", "give a tokenizer's directory")
    tokenizer = load_tokenizer(directory)
    return None if tokenizer.get_vocab().items() <= judge.get_vocab().items() else tokenizer


def _check_sentences(row: Row, wanted: Sequence[int]) -> None:
    units = unit_spans(sentence_ids(token_texts(row.prompt.body_tokenizer, row.body)))
    if max(wanted) >= len(units):
        raise UserError("sentences", str(max(wanted)), f"the response has {len(units)} sentences, counted from 0")
    if row.inputs[0].response_end >= len(row.inputs[0].input_ids):
        raise UserError("sentences", "nothing follows the response in the judge's input", "use another judge.template")
