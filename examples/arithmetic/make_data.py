"""Writes data/train.jsonl and data/eval.jsonl: sums of four numbers with their answers.

python examples/arithmetic/make_data.py
"""

import argparse
import json
import random
from pathlib import Path

import task

HERE = Path(__file__).parent
COUNTS = {"train": 300, "eval": 64}
SEED = 1


def rows(held_out: bool, count: int, rng: random.Random) -> list[dict]:
    """Different prompts, each with the right sum."""
    found: dict[tuple[int, ...], dict] = {}
    while len(found) < count:
        terms = task.sample_terms(rng)
        if task.is_held_out(terms) == held_out:
            found[terms] = {"id": "-".join(map(str, terms)), "prompt": task.prompt(terms), "answer": str(sum(terms))}
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "data", help="directory to write to")
    output = parser.parse_args().output
    output.mkdir(exist_ok=True)
    for name, count in COUNTS.items():
        lines = [json.dumps(row) + "\n" for row in rows(name == "eval", count, random.Random(f"{SEED}/{name}"))]
        (output / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
