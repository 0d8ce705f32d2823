"""A probe's results as text: the cells for terminal and page, and the terminal's table."""

from io import StringIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

TITLES = {
    "score": "scored responses",
    "true": "pairs judged True",
    "false": "pairs judged False",
}  # of probe.json's tables
HEADINGS = (
    "credit", "masked: Spearman", "top", "deleted: Spearman", "top", "ESS/T median (lowest)", "seconds", "passes",
)  # fmt: skip


def method_rows(of_verdict: dict) -> list[list[str]]:
    """The cells of every attribution, and of masking itself against deletion; ``of_verdict``: ``true`` of probe.json."""
    rows = []
    for name, found in of_verdict["attributions"].items():
        masked, deleted = found["masked"], found["deleted"]
        cells = [
            _interval(masked["spearman"]),
            _share(masked["top"]),
            _interval(deleted["spearman"]),
            _share(deleted["top"]),
        ]
        ess = f"{found['ess_median']:.2f} ({found['ess_lowest']:.2f})"
        seconds = "" if found["seconds"] is None else f"{found['seconds']:.2f}"
        rows.append([name, *cells, ess, seconds, found["passes"] or ""])
    both, seconds = of_verdict["masked_with_deleted"], of_verdict["seconds"]
    cells = [_interval(both["spearman"]), _share(both["top"]), "", f"{seconds['masked']:.2f}", "1 + sentences"]
    rows.append(["masking itself", "1", "1", *cells])
    return rows


def said_of_judge(found: dict) -> list[str]:
    """Lines on the pairs and on how the judge answers."""
    sizes = f"{found['sentences_mean']:.1f} sentences a response; top sentence by chance {found['top_by_chance']:.2f}"
    if "score" in found:
        return [f"{found['responses']} responses scored by a reward model; {sizes}"]
    judge = found["judge"]
    lines = [
        f"{found['pairs_true']} pairs judged True, {found['pairs_false']} judged False, of {found['responses']} responses; "
        + sizes,
        f"of {judge['items']} verdicts {judge['true_rate']:.0%} True; p(True) + p(False) {judge['answer_mass']:.2f}",
    ]
    if judge["swapped_same"] is None:
        lines.append("words in the other order: not measured, judge.template does not name both")
    else:
        lines.append(
            f"words in the other order: {judge['swapped_true_rate']:.0%} True, {judge['swapped_same']:.0%} of verdicts the same"
        )
    lines.append(
        f'"It is not true that: ...": {judge["negated_true_rate"]:.0%} True, {judge["negated_opposite"]:.0%} of verdicts opposite'
    )
    return lines


def summary_table(found: dict) -> str:
    """Plain text, ready to print."""
    out = StringIO()
    console = Console(file=out, width=150, color_system=None, force_terminal=False)
    for kind, title in TITLES.items():
        if kind not in found:
            continue
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
        for number, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="right" if number else "left")
        for row in method_rows(found[kind]):
            table.add_row(*map(escape, row))
        console.print(table)
    for line in said_of_judge(found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").splitlines())


def _interval(values: list[float]) -> str:
    mean, low, high = values
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def _share(values: list[float]) -> str:
    return f"{values[0]:.2f}"
