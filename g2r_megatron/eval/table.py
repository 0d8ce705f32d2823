"""An evaluation's results as text: the cells that terminal and page share, and the table on the terminal."""

from collections.abc import Sequence
from io import StringIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

HEADINGS = ("score of", "mean", "standard error", "responses")
COMPARED = ("data set", "A", "B", "B - A [95%]", "p", "B wins", "ties", "B loses")
SHOWN_TAGS = ("theme:", "axis:")  # on the terminal; the page has all


def score_rows(found: dict, tags: Sequence[str] | None = None) -> list[list[str]]:
    """The cells of every data set, and below it of its tags: those that begin as one of ``tags``, None for all."""
    rows = []
    for dataset, own in found["datasets"].items():
        rows.append(_cells(f"{dataset}, {own['rows']} rows", own["score"]))
        if own["gold"] is not None:
            rows.append(_cells("  by the gold judge", own["gold"]))
        shown = [tag for tag in own["tags"] if tags is None or tag.startswith(tuple(tags))]
        rows += [_cells(f"  {tag}", own["tags"][tag]) for tag in shown]
    return rows


def said_of(found: dict) -> list[str]:
    """Lines on the responses and the judge."""
    finished = "" if found["finished_share"] is None else f", {found['finished_share']:.0%} finished"
    lines = [] if found["length_mean"] is None else [f"mean length {found['length_mean']:.1f} tokens{finished}"]
    if found["items"]:
        mass = f"p(True) + p(False) {found['answer_mass']:.2f}"
        lines.append(f"of {found['items']} verdicts {found['true_share']:.0%} True; {mass}")
    return lines


def text_table(headings: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> str:
    """Plain text, ready to print; all columns but the first are aligned to the right."""
    out = StringIO()
    console = Console(file=out, width=150, color_system=None, force_terminal=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=escape(title) or None, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").splitlines())


def summary_table(found: dict) -> str:
    """What ``g2r eval`` prints."""
    table = text_table(HEADINGS, score_rows(found, SHOWN_TAGS))
    return "\n".join([table, *said_of(found)])


def _cells(name: str, score: dict) -> list[str]:
    return [name, f"{score['mean']:.4f}", f"{score['error']:.4f}", str(score["count"])]


def compared_rows(datasets: dict[str, dict]) -> list[list[str]]:
    """The cells of ``compare.compared``."""
    rows = []
    for dataset, own in datasets.items():
        interval = f"{own['difference']:+.4f} [{own['low']:+.4f}, {own['high']:+.4f}]"
        ties = own["rows"] - own["wins"] - own["losses"]
        counts = [str(own["wins"]), str(ties), str(own["losses"])]
        rows.append(
            [
                f"{dataset}, {own['rows']} rows",
                f"{own['a']:.4f}",
                f"{own['b']:.4f}",
                interval,
                f"{own['p']:.3f}" if own["p"] >= 0.001 else "<0.001",
                *counts,
            ]
        )
    return rows
