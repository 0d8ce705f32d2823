"""The table of runs: the score of each group, and the steps and seconds that it needed. For the terminal and the page."""

import time
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from g2r_megatron.records.heartbeat import described, read_heartbeat
from g2r_megatron.report.figures import has_truth
from g2r_megatron.report.runs import TARGET_SCORE, WINDOW, Group, Score, choose_score, load_groups

NOTHING = "–"


@dataclass(frozen=True)
class Number:
    """Mean of a group, with the lowest and highest of its seeds; or the value of one run. None: not measured."""

    mean: float | None
    low: float | None
    high: float | None

    def text(self, form: str) -> str:
        return NOTHING if self.mean is None else form.format(self.mean)

    def spread(self, form: str) -> str:
        """``low–high``, or ``low to high`` if ``low`` has a minus sign. Empty if both are equal."""
        if self.low == self.high:
            return ""
        return f"{form.format(self.low)}{' to ' if self.low < 0 else '–'}{form.format(self.high)}"


@dataclass(frozen=True)
class SummaryRow:
    """One line of the table: a group, or one run of a group."""

    label: str
    slot: int
    is_run: bool  # whether it is a run of the group above
    before: Number
    after: Number
    steps: Number  # to TARGET_SCORE; mean of the runs that reached it
    seconds: Number  # to TARGET_SCORE
    reached: tuple[int, int]  # (runs that reached TARGET_SCORE, all runs)
    last_step: int
    gap: Number  # judge minus true
    step_seconds: Number

    @property
    def steps_text(self) -> str:
        """``11``, ``15 in 2 of 3 runs``, or ``not in 50``. The number is the mean of the runs that reached the target."""
        count, of = self.reached
        if self.steps.mean is None:
            return f"not in {self.last_step}"
        return self.steps.text("{:.0f}") + (f" in {count} of {of} runs" if count < of else "")


def summary_rows(groups: list[Group], score: Score) -> list[SummaryRow]:
    """One row for each group, in order. A group of several seeds is followed by one row for each run."""
    rows = []
    for group in groups:
        rows.append(_row(group, group.label, score, is_run=False))
        if len(group.runs) > 1:
            rows += [
                _row(Group(group.label, group.slot, [run]), f"seed {run.seed}", score, is_run=True)
                for run in group.runs
            ]
    return rows


def target_note() -> str:
    """The definition of "steps to 0.65" for a caption."""
    return f"first step whose {WINDOW}-step mean of the training batches' true score reaches {TARGET_SCORE}"


def summary_table(run_dirs: list[Path]) -> str:
    """The table as plain text without control codes.

    Raises ``UserError`` if a run directory is missing, empty or broken.
    """
    groups = load_groups(run_dirs)
    score = choose_score(groups)
    truth = has_truth(groups)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run")
    for heading in ["before", "after", *([f"steps to {TARGET_SCORE}", "judge - true"] if truth else []), "s/step"]:
        table.add_column(heading, justify="right")
    for row in summary_rows(groups, score):
        cells = [_cell(row.before, "{:.3f}"), _cell(row.after, "{:.3f}")]
        if truth:
            cells += [_with_spread(row.steps_text, row.steps.spread("{:.0f}")), _cell(row.gap, "{:+z.3f}")]
        table.add_row(escape(("  " if row.is_run else "") + row.label), *cells, _cell(row.step_seconds, "{:.2f}"))
    out = StringIO()
    console = Console(file=out, width=140, color_system=None, force_terminal=False)
    console.print(table)
    console.print(
        f"before, after: {score.label}" + ("; with several seeds: mean (lowest–highest)" if _many(groups) else "")
    )
    if truth:
        console.print(f"steps to {TARGET_SCORE}: {target_note()}")
    for run in (run for group in groups for run in group.runs):
        if said := read_heartbeat(run.path):
            console.print(f"{run.path}: {described(said, time.time())}", markup=False, soft_wrap=True)
    return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").splitlines()) + "\n"


def _many(groups: list[Group]) -> bool:
    return any(len(group.runs) > 1 for group in groups)


def _cell(number: Number, form: str) -> str:
    return _with_spread(number.text(form), number.spread(form))


def _with_spread(text: str, spread: str) -> str:
    return f"{text} ({spread})" if spread else text


def _row(group: Group, label: str, score: Score, is_run: bool) -> SummaryRow:
    def before_or_after(index: int):
        return lambda run: pair[index] if (pair := score.of_run(run)) else None

    steps = _number(group, lambda run: run.steps_to_target)
    return SummaryRow(
        label=label,
        slot=group.slot,
        is_run=is_run,
        before=_number(group, before_or_after(0)),
        after=_number(group, before_or_after(1)),
        steps=steps,
        seconds=_number(group, lambda run: run.seconds_to_target),
        reached=(len(group.values(lambda run: run.steps_to_target)), len(group.runs)),
        last_step=max(run.last_step for run in group.runs),
        gap=_number(group, lambda run: run.judge_gap),
        step_seconds=_number(group, lambda run: run.average("time/step")),
    )


def _number(group: Group, of_run) -> Number:
    values = group.values(of_run)
    return Number(group.mean(of_run), min(values, default=None), max(values, default=None))
