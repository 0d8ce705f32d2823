"""The programmatic truth of rubric items that carry a ``check`` (data/types.py); only metrics read it."""

import re

import torch
from torch import Tensor

from g2r_megatron.credit.attribution import response_reward
from g2r_megatron.data.types import Query


def true_verdicts(query: Query, text: str) -> list[bool] | None:
    """Whether the response ``text`` really meets each rubric item; None unless there are items and all have a check."""
    checks = [item.check for item in query.rubric if item.check is not None]
    if not checks or len(checks) < len(query.rubric):
        return None
    return [re.search(check, text) is not None for check in checks]


def true_reward(query: Query, text: str) -> float | None:
    """The rubric score r(x, o) by the checks instead of the judge; None unless every item has a check."""
    verdicts = true_verdicts(query, text)
    return None if verdicts is None else response_reward(verdicts, [item.weight for item in query.rubric])


def key_token_mask(check: str, token_texts: list[str]) -> Tensor:
    """Tokens that decide an item: [T] bool, True where a token overlaps a key character of the first match.

    ``token_texts``: the T pieces whose concatenation is the response. Key characters are those in the groups
    of ``check`` that took part in the match, or the whole match if none did. All False without a match.
    """
    mask = torch.zeros(len(token_texts), dtype=torch.bool)
    match = re.search(check, "".join(token_texts))
    if match is None:
        return mask
    groups = [match.span(g) for g in range(1, match.re.groups + 1) if match.span(g)[0] >= 0]
    spans = groups or [match.span()]
    start = 0
    for t, text in enumerate(token_texts):
        end = start + len(text)
        mask[t] = any(max(start, low) < min(end, high) for low, high in spans)
        start = end
    return mask
