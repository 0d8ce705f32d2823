"""How long judge inputs can get, before any is built: each byte of their texts is at most one token."""

from collections.abc import Iterable

from g2r_megatron.config.options import JudgeConfig
from g2r_megatron.data.types import Query
from g2r_megatron.model.hf import HFModel

AROUND_MESSAGE = 32  # tokens of a chat template around one message, at most


def check_judge_positions(judge: HFModel, config: JudgeConfig, queries: Iterable[tuple[Query, int]]) -> None:
    """Warn, or refuse (``UserError``), when judge inputs can be longer than the judge's positions.

    ``queries``: each with the largest number of tokens that a response to it can have. A judge that refuses inputs
    beyond its positions is checked against ``judge.max_length`` alone, which limits every input.
    """
    if judge.ends_at_positions:
        judge.check_positions(config.max_length, "judge.max_length")
        return
    longest = max((_bytes(query) + tokens for query, tokens in queries), default=0) + len(config.template.encode())
    judge.check_positions(min(longest, config.max_length), "judge.max_length with these rows")


def _bytes(query: Query) -> int:
    conversation = sum(len(str(message["content"]).encode()) + AROUND_MESSAGE for message in query.messages)
    return conversation + AROUND_MESSAGE + max((len(item.criterion.encode()) for item in query.rubric), default=0)
