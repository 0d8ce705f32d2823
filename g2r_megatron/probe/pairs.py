"""Which (response, criterion) pairs are measured: a seeded sample, of different responses as far as there are."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from g2r_megatron.credit.faithfulness import FEWEST_SENTENCES
from g2r_megatron.credit.sentences import sentence_ids
from g2r_megatron.data.tokenizer import encode_text, token_texts
from g2r_megatron.data.types import Query
from g2r_megatron.judge.hiding import unit_spans
from g2r_megatron.judge.prompt import ResponseReader


@dataclass(frozen=True)
class Response:
    """A row of the input whose response has sentences enough. ``spans``: its sentences, in tokens of ``body``."""

    row: int  # in the input, from 0
    query: Query
    body: list[int]
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class RowVerdicts:
    """(p(True), p(False)) of every item of a row.

    ``plain``: as the row is. ``swapped``: with the words of the verdicts exchanged in the template; None if the template
    does not name both. ``negated``: with "It is not true that: " before the criterion.
    """

    plain: list[list[float]]
    swapped: list[list[float]] | None
    negated: list[list[float]]


@dataclass
class Pair:
    """What was measured of one pair; lists run over the response's sentences.

    ``verdict``: None if the judge is a reward model, whose pairs are responses (``item`` 0). ``masked``, ``deleted``: what the
    verdict's margin, or the score, loses without the sentence. ``credit``: of each attribution, the sum of
    b over the sentence; ``ess``: ESS/T of its alpha; ``seconds``: of each measurement.
    """

    row: int
    item: int
    verdict: bool | None
    masked: list[float]
    deleted: list[float]
    credit: dict[str, list[float]] = field(default_factory=dict)
    ess: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def eligible(queries: Sequence[Query], prompt: ResponseReader, seed: int) -> list[Response]:
    """The rows whose responses have sentences enough, in an order that ``seed`` decides."""
    found = []
    for row, query in enumerate(queries):
        body = encode_text(prompt.tokenizer, query.response or "")
        spans = unit_spans(sentence_ids(token_texts(prompt.tokenizer, body)))
        if len(spans) >= FEWEST_SENTENCES:
            found.append(Response(row, query, body, spans))
    random.Random(f"rows/{seed}").shuffle(found)
    return found


def verdict(probabilities: Sequence[float]) -> bool:
    """The more probable verdict of (p(True), p(False))."""
    return probabilities[0] > probabilities[1]


def rows_with(verdicts: Sequence[RowVerdicts], wanted: bool) -> int:
    """How many rows have an item with that verdict."""
    return sum(any(verdict(item) == wanted for item in row.plain) for row in verdicts)


def choose(
    responses: Sequence[Response], verdicts: Sequence[RowVerdicts], wanted: bool, count: int, seed: int
) -> list[tuple[int, int]]:
    """Up to ``count`` (place in ``responses``, item) with that verdict: one of each response in turn, then a second, ..."""
    places = []
    for place, (response, row) in enumerate(zip(responses, verdicts)):
        items = [k for k, item in enumerate(row.plain) if verdict(item) == wanted]
        random.Random(f"items/{seed}/{response.row}").shuffle(items)
        places += [(turn, place, item) for turn, item in enumerate(items)]
    return [(place, item) for _, place, item in sorted(places)[:count]]
