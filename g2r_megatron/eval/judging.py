"""Verdicts of a judge that only scores, on responses as texts."""

from collections.abc import Sequence

from g2r_megatron.credit.judgements import JudgementRow
from g2r_megatron.data.tokenizer import encode_text
from g2r_megatron.data.types import Query
from g2r_megatron.judge.stage import JudgeStage


def judge_texts(stage: JudgeStage, queries: Sequence[Query], texts: Sequence[str]) -> list[JudgementRow]:
    """The judgements of a response to each of ``queries`` (collective). The judge's own tokenizer reads ``texts``."""
    bodies = [encode_text(stage.prompt.tokenizer, text) for text in texts]
    inputs = stage.inputs(queries, bodies)
    return list(stage.verdicts(inputs, [""] * len(inputs), attributed=False))
