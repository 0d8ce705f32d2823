"""The results of an evaluation as files: a record a response, what they add up to, and the page.

``g2r eval`` and the evaluations of a training write the same files (records/evaluations.py reads them).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from g2r_megatron.config.options import JudgeConfig, VerdictJudgeConfig
from g2r_megatron.credit.judgements import ItemJudgement, JudgementRow, plain_number
from g2r_megatron.data.types import Query
from g2r_megatron.eval.page import eval_page
from g2r_megatron.eval.scoring import summary
from g2r_megatron.records.evaluations import PAGE, RESPONSES, SUMMARY
from g2r_megatron.records.files import make_directory, replace_text


@dataclass(frozen=True)
class Answer:
    """A response to be scored. ``length``: tokens, with the stop token; it and ``finished`` are None where nobody knows."""

    text: str
    length: int | None
    finished: bool | None


def record_of(
    query: Query, sample: int, answer: Answer, judged: JudgementRow, gold: JudgementRow | None = None
) -> dict:
    """Response number ``sample`` (from 0) to ``query``, with its verdicts, as plain data.

    ``gold``: what another judge says of it, the gold judge of a training.
    """
    items = [
        {
            "criterion": item.criterion,
            "weight": item.weight,
            "tags": list(item.tags),
            "verdict": found.verdict,
            "p_true": plain_number(found.p_true),
            "p_false": plain_number(found.p_false),
        }
        for item, found in zip(query.rubric, judged, strict=True)
        if isinstance(found, ItemJudgement)
    ]
    of_gold = {}
    if gold is not None:
        of_gold = {"gold_score": ItemJudgement.reward(query, gold)}
        for item, found in zip(items, gold, strict=True):
            item["gold"] = found.verdict
    return {
        "id": query.id,
        "sample": sample,
        "dataset": query.dataset,
        "tags": list(query.tags),
        "score": ItemJudgement.reward(query, judged),
        **of_gold,
        "length": answer.length,
        "finished": answer.finished,
        "prompt": list(query.messages),
        "response": answer.text,
        "items": items,
    }


def verified_record(query: Query, sample: int, answer: Answer, right: bool) -> dict:
    """Response number ``sample`` to a ``query`` with an answer, which no judge has read."""
    item = ItemJudgement(float(right), float(not right), right)
    return {**record_of(query, sample, answer, [item]), "items": [], "answer": query.answer}


def data_key(queries: Sequence[Query]) -> str:
    """A digest of the rows: ids, conversations and rubrics, in any order."""
    rows = sorted(
        json.dumps([q.id, q.messages, [[i.criterion, i.weight, i.tags] for i in q.rubric], q.tags, q.answer])
        for q in {query.id: query for query in queries}.values()
    )
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def judge_facts(judge: VerdictJudgeConfig | JudgeConfig) -> dict:
    """What decides verdicts: the model and how it is asked. Layouts do not."""
    names = ("model", "template", "chat_template", "template_options", "think", "true_words", "false_words")
    return {name: getattr(judge, name) for name in names}


def write_results(directory: Path, facts: dict, records: Sequence[dict], seed: int) -> dict:
    """Write the three files (rank 0); returns the content of eval.json. ``facts``: who was evaluated, on what, by whom."""
    make_directory(directory)
    found = {**facts, "seed": seed, **summary(records, seed)}
    replace_text(directory / RESPONSES, "".join(json.dumps(record) + "\n" for record in records))
    replace_text(directory / PAGE, eval_page(found, records))
    replace_text(directory / SUMMARY, json.dumps(found, indent=1) + "\n")
    return found
