"""``g2r eval compare A B``: is B better than A on the same rows? Paired by row, plain numbers, no model.

A row's score is the mean over its samples. The difference of the means has a 95% interval of a paired bootstrap: rows are drawn
with replacement, each with both of its scores. p is the share of these samples that do not have the sign of the
difference, doubled.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np

from g2r_megatron.errors import UserError, warn
from g2r_megatron.eval.page import compare_page
from g2r_megatron.eval.scoring import CLIPPED
from g2r_megatron.eval.table import COMPARED, compared_rows, text_table
from g2r_megatron.records.evaluations import read_results
from g2r_megatron.records.files import replace_text

RESAMPLES = 10_000
SAME = 1e-9  # a smaller difference of two rows is none


def compare(a: Path, b: Path, output: Path, seed: int, most_changed: int) -> None:
    """Print the comparison of two directories of results, and write its page."""
    (found_a, rows_a), (found_b, rows_b) = read_results(a), read_results(b)
    check_same(a, b, found_a, found_b)
    datasets = compared(rows_a, rows_b, seed)
    pairs = most_different(rows_a, rows_b)[:most_changed]
    replace_text(output, compare_page(str(a), str(b), datasets, pairs))
    print(f"A: {a}\nB: {b}\n\n{text_table(COMPARED, compared_rows(datasets))}\n\nrows that changed most, B - A:")
    for difference, record, _ in pairs:
        print(f"  {difference:+.3f}  {record['id']}")
    print(f"\ncompare: {output}", flush=True)


def check_same(a: Path, b: Path, found_a: dict, found_b: dict) -> None:
    """Raise ``UserError`` unless both are of the same rows and of the same judge, asked in the same way."""
    if found_a["data"] != found_b["data"]:
        raise UserError(f"{a} and {b}", "results on different rows", "evaluate both on the same data files")
    differing = [name for name, value in found_a["judge"].items() if found_b["judge"].get(name) != value]
    if differing == ["model"]:
        warn(f"judge.model is {found_a['judge']['model']} for {a} and {found_b['judge']['model']} for {b}: one judge?")
    elif differing:
        raise UserError(
            f"{a} and {b}",
            f"judge.{differing[0]} differs",
            "judge both in the same way: g2r eval --responses judges again",
        )


def row_scores(records: Sequence[dict]) -> dict[str, float]:
    """id -> mean score over its samples."""
    scores: dict[str, list[float]] = {}
    for record in records:
        scores.setdefault(record["id"], []).append(record["score"])
    return {id: fmean(own) for id, own in scores.items()}


def compared(rows_a: Sequence[dict], rows_b: Sequence[dict], seed: int) -> dict[str, dict]:
    """Of each data set: rows, both scores, their difference with its interval, p, wins and losses of B."""
    found = {}
    for dataset in dict.fromkeys(record["dataset"] for record in rows_a):
        a, b = (row_scores([r for r in rows if r["dataset"] == dataset]) for rows in (rows_a, rows_b))
        x, y = np.array(list(a.values())), np.array([b[id] for id in a])
        places = np.random.RandomState(seed).randint(0, len(x), size=(RESAMPLES, len(x)))
        means_a, means_b = x[places].mean(axis=1), y[places].mean(axis=1)
        mean_a, mean_b = x.mean(), y.mean()
        if dataset in CLIPPED:
            mean_a, mean_b, means_a, means_b = (np.clip(v, 0, 1) for v in (mean_a, mean_b, means_a, means_b))
        difference, drawn = float(mean_b - mean_a), means_b - means_a
        against = float((drawn <= 0).mean() if difference >= 0 else (drawn >= 0).mean())
        found[dataset] = {
            "rows": len(x),
            "a": float(mean_a),
            "b": float(mean_b),
            "difference": difference,
            "low": float(np.quantile(drawn, 0.025)),
            "high": float(np.quantile(drawn, 0.975)),
            "p": min(1.0, 2 * against),
            "wins": int((y - x > SAME).sum()),
            "losses": int((x - y > SAME).sum()),
        }
    return found


def most_different(rows_a: Sequence[dict], rows_b: Sequence[dict]) -> list[tuple[float, dict, dict]]:
    """(difference of the row's scores, a record of A, one of B), largest change first; rows without change are left out.

    The records are the first samples of the row.
    """
    a, b = row_scores(rows_a), row_scores(rows_b)
    first_a, first_b = ({record["id"]: record for record in reversed(rows)} for rows in (rows_a, rows_b))
    pairs = [(b[id] - a[id], first_a[id], first_b[id]) for id in a if abs(b[id] - a[id]) > SAME]
    return sorted(pairs, key=lambda pair: -abs(pair[0]))
