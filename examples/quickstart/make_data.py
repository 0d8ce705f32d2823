"""Writes the quickstart's queries: ``data/train.jsonl``, and ``data/eval.jsonl`` from the other side of the hash split.

python examples/quickstart/make_data.py
"""

import json
import random
from pathlib import Path

import task

HERE = Path(__file__).parent
SEED = 7
SIZES = {"train": 300, "eval": 48}


def rows(split: str) -> list[str]:
    """The split's JSON lines: different prompts, always the same ones."""
    rng = random.Random(f"{SEED} {split}")
    queries = {}
    while len(queries) < SIZES[split]:
        query = task.query(task.sample_case(rng, held_out=split == "eval"))
        queries[query.id] = query
    return [json.dumps(row(query)) for query in queries.values()]


def row(query) -> dict:
    """One query in g2r's own format."""
    rubric = [
        {"criterion": item.criterion, "weight": item.weight, "tags": list(item.tags), "check": item.check}
        for item in query.rubric
    ]
    return {"id": query.id, "prompt": query.messages[0]["content"], "rubric": rubric}


def main() -> None:
    (HERE / "data").mkdir(exist_ok=True)
    for split in SIZES:
        path = HERE / "data" / f"{split}.jsonl"
        path.write_text("\n".join(rows(split)) + "\n", encoding="utf-8")
        print(f"{path}: {SIZES[split]} queries")


if __name__ == "__main__":
    main()
