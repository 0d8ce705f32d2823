"""The judge stage on its own: a file of responses in, a file of judgements, attributions and token rewards out.

One output line per input row, in order: ``id, reward, tokens, token_rewards, items``, and per item ``criterion, weight,
p_true, p_false, verdict, attribution, alpha`` (``attribution`` and ``alpha`` null where no backward ran: items judged
False or of weight 0). A reward model has no items: ``id, reward, tokens, token_rewards, attribution, alpha``. Lists run
over the T tokens of the response. What the judge computed in fp32 is written with 9 significant digits, which identify
an fp32 number; a value that is not finite is null.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Self, TextIO

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from torch import Tensor

from g2r_megatron import grading
from g2r_megatron.config import OfflineJudgeConfig
from g2r_megatron.data.readers import read_queries
from g2r_megatron.data.tokenizer import encode_text, token_texts
from g2r_megatron.data.types import Query
from g2r_megatron.errors import UserError
from g2r_megatron.judge.frozen import FrozenJudge
from g2r_megatron.judge.prompt import JudgePrompt
from g2r_megatron.judge.reward_prompt import RewardPrompt, judge_prompt
from g2r_megatron.judge.stage import JudgeStage
from g2r_megatron.judge.types import JudgeInput, Judgement, backward_passes
from g2r_megatron.model.build import build_model
from g2r_megatron.model.hf import load_model_tokenizer, open_hf_model
from g2r_megatron.parallel import groups
from g2r_megatron.records.progress import format_seconds

SHOWN_ROWS = 20


@dataclass(frozen=True)
class Row:
    """A query with its response as token ids ([T], no stop token)."""

    query: Query
    body: list[int]


@dataclass
class GradientHealth:
    """Backward passes, and those whose gradient was zero or not finite (such an item's alpha is uniform)."""

    passes: int = 0
    bad: list[str] = field(default_factory=list)

    def count(self, row: Row, judgements: Sequence[Judgement]) -> None:
        for number in backward_passes(judgements):
            judgement = judgements[number]
            self.passes += 1
            finite = math.isfinite(judgement.grad_norm) and bool(judgement.attribution.isfinite().all())
            if not finite or judgement.grad_norm == 0:
                item = "" if grading.is_score(judgements) else f" item {number + 1}"
                self.bad.append(f"{row.query.id}{item} ({'zero' if finite else 'not finite'})")

    def warning(self) -> str | None:
        if not self.bad:
            return None
        more = f" and {len(self.bad) - SHOWN_ROWS} more" if len(self.bad) > SHOWN_ROWS else ""
        return (
            f"the judge's gradient was zero or not finite in {len(self.bad)} of {self.passes} backward passes, whose "
            f"tokens share the credit evenly: {', '.join(self.bad[:SHOWN_ROWS])}{more}"
        )


def judge_file(config: OfflineJudgeConfig) -> None:
    """Judge every row of ``config.input`` and write ``config.output`` (collective; rank 0 writes).

    ``config`` is resolved (no None among the options that follow the preset) and has passed ``check_judge_config``.
    Raises ``UserError`` for bad rows, models, tokenizers or layouts before the weights are read. The output has its
    name only when it is complete.
    """
    hf = open_hf_model(config.judge.model, "judge.model")
    tokenizer = load_model_tokenizer(hf)
    prompt = judge_prompt(hf, tokenizer, config.judge)
    rows = read_rows(config, prompt)
    groups.initialize(config.seed)
    layout = groups.build_groups("judge", config.judge.layout)
    model = build_model("judge", hf, layout, config.judge.precision, config.judge.recompute, config.judge.spec)
    judge = FrozenJudge(model, config.judge, prompt.true_ids, prompt.false_ids)
    stage = JudgeStage(judge, prompt, config.judge)
    writes, health, rewards = dist.get_rank() == 0, GradientHealth(), []
    with RowProgress(len(rows), writes) as progress, _complete_or_absent(Path(config.output), writes) as file:
        for first in range(0, len(rows), config.batch_rows):
            batch = rows[first : first + config.batch_rows]
            for row, inputs, judgements in judge_rows(stage, batch, config.seed):
                health.count(row, judgements)
                record = output_record(stage, row, judgements)
                if config.dump_inputs:
                    add_inputs(record, inputs, prompt)
                rewards.append(record["reward"])
                if file is not None:
                    file.write(json.dumps(record, allow_nan=False) + "\n")
            progress.done(first + len(batch))
    if writes:
        print(f"{config.output}: {len(rows)} rows, mean reward {fmean(rewards):.3f}, {health.passes} backward passes")
        if warning := health.warning():
            print(f"g2r: warning: {warning}", file=sys.stderr, flush=True)


def read_rows(config: OfflineJudgeConfig, prompt: JudgePrompt | RewardPrompt) -> list[Row]:
    """All rows of the input, tokenized. Raises ``UserError`` for a bad row or one whose judge input is too long."""
    rubrics = isinstance(prompt, JudgePrompt)
    queries = read_queries(
        [config.input], config.format, config.polarity, require_response=True, require_rubric=rubrics
    )
    rows = [Row(query, encode_text(prompt.tokenizer, query.response)) for query in queries]
    for row in rows:
        prompt.build_items(row.query, row.body)
    return rows


def judge_rows(
    stage: JudgeStage, rows: Sequence[Row], seed: int
) -> list[tuple[Row, list[JudgeInput], list[Judgement]]]:
    """Verdicts of all items, attributions of those judged True with a weight (Algorithm 1), or of all scores (collective)."""
    inputs = stage.inputs([row.query for row in rows], [row.body for row in rows])
    # a sampled verdict depends on the seed and the row alone, not on its place in the file
    judgements = stage.verdicts(inputs, [f"{seed}/{row.query.id}/{row.query.response}" for row in rows])
    weights = [grading.weights(row.query, items) for row, items in zip(rows, judgements, strict=True)]
    needed = [
        [judgement.verdict is not False and weight != 0 for judgement, weight in zip(items, row_weights, strict=True)]
        for items, row_weights in zip(judgements, weights, strict=True)
    ]
    stage.attribute(inputs, judgements, needed, weights)
    return list(zip(rows, inputs, judgements, strict=True))


def output_record(stage: JudgeStage, row: Row, judgements: Sequence[Judgement]) -> dict:
    """The output line of one row, as plain data."""
    query, alphas = row.query, stage.alphas(row.body, judgements)
    reward = grading.reward(query, judgements)
    record = {
        "id": query.id,
        "reward": _number(reward) if grading.is_score(judgements) else reward,
        "tokens": token_texts(stage.prompt.tokenizer, row.body),
        "token_rewards": _numbers(grading.row_token_rewards(query, judgements, alphas, len(row.body)).tolist()),
    }
    if grading.is_score(judgements):
        return record | _attribution(judgements[0], alphas[0])
    return record | {
        "items": [
            {
                "criterion": item.criterion,
                "weight": item.weight,
                "p_true": _number(judgement.p_true),
                "p_false": _number(judgement.p_false),
                "verdict": judgement.verdict,
            }
            | _attribution(judgement, alpha)
            for item, judgement, alpha in zip(query.rubric, judgements, alphas, strict=True)
        ]
    }


def _attribution(judgement: Judgement, alpha: Tensor | None) -> dict:
    """Both null where no backward ran."""
    if alpha is None:
        return {"attribution": None, "alpha": None}
    return {"attribution": _numbers(judgement.attribution.tolist()), "alpha": _numbers(alpha.tolist())}


def add_inputs(record: dict, inputs: Sequence[JudgeInput], prompt: JudgePrompt | RewardPrompt) -> None:
    """Add to each item what the judge read, so that anyone can repeat the gradient with their own autograd."""
    if isinstance(prompt, RewardPrompt):
        (read,) = inputs
        record |= {
            "input_ids": read.input_ids,
            "response_start": read.response_start,
            "response_end": read.response_end,
            "score_position": read.verdict_position,
        }
        return
    for item, judge_input in zip(record["items"], inputs, strict=True):
        item |= {
            "input_ids": judge_input.input_ids,
            "response_start": judge_input.response_start,
            "response_end": judge_input.response_end,
            "verdict_position": judge_input.verdict_position,
            "true_ids": prompt.true_ids,
            "false_ids": prompt.false_ids,
        }


def _number(value: float) -> float | None:
    return float(f"{value:.9g}") if math.isfinite(value) else None


def _numbers(values: Sequence[float]) -> list[float | None]:
    return [_number(value) for value in values]


@contextmanager
def _complete_or_absent(path: Path, writes: bool) -> Iterator[TextIO | None]:
    """A file to write that gets its name at the end and disappears on any failure; None where ``writes`` is false."""
    if not writes:
        yield None
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise UserError("output", f"{path} cannot be written ({error.strerror})", "check the disk") from error
    finally:
        partial.unlink(missing_ok=True)


class RowProgress:
    """Rows done and the time left, on stderr: a bar on a terminal, elsewhere one plain line a batch."""

    def __init__(self, total: int, enabled: bool):
        self.total, self._enabled, self._start = total, enabled, time.monotonic()
        self._bar: RichProgress | None = None
        if enabled and sys.stderr.isatty():
            columns = (
                TextColumn("judge"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("rows  ETA"),
                TimeRemainingColumn(),
            )
            self._bar = RichProgress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc_info) -> None:
        if self._bar is not None:
            self._bar.stop()

    def done(self, rows: int) -> None:
        """``rows`` of ``total`` are judged."""
        if self._bar is not None:
            self._bar.update(self._task, completed=rows)
        elif self._enabled:
            seconds = (time.monotonic() - self._start) / rows * (self.total - rows)
            print(f"judged {rows}/{self.total} rows  ETA {format_seconds(seconds)}", file=sys.stderr, flush=True)
