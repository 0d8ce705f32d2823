"""The report's section on alarms: where each went on, on the curve it watches."""

from collections.abc import Sequence
from html import escape

from g2r_megatron.report.charts import Chart, Curve, line_chart, slot_class
from g2r_megatron.report.runs import Group, Run

# what the checks of alarms measure, drawn also where no alarm went on: (metric, title, format)
MEASURED = (
    ("attribution/faithfulness", "Faithfulness of credit", "{:.2f}"),
    ("alarms/master_keys", "Criteria met by empty responses", "{:.2f}"),
    ("alarms/internalization_gap", "Self-internalisation gap", "{:.2f}"),
    ("eval/gold_agreement", "Judge agrees with the gold judge", "{:.2f}"),
    ("eval/exploitation_rate", "Exploitation rate", "{:.2f}"),
)


def alarm_list(groups: Sequence[Group]) -> str:
    """The alarms of all runs in words; empty text without any. Texts of the run's files are escaped."""
    return "".join(
        f'<p><span class="chip {slot_class(group.slot)}">{escape(group.label)}</span> '
        f'<span class="fine">seed {escape(run.seed)}</span> {escape(str(alarm["text"]))}</p>'
        for group in groups
        for run in group.runs
        for alarm in run.alarms
    )


def alarm_charts(groups: Sequence[Group]) -> str:
    """The curves of ``MEASURED`` and of every alarm that went on, with a mark at each place where one did."""
    curves = {key: (title, form) for key, title, form in MEASURED}
    for group in groups:
        for run in group.runs:
            for alarm in run.alarms:
                curves.setdefault(str(alarm["curve"]), (str(alarm["curve"]), "{:.3f}"))
    return "".join(_chart(groups, key, title, form) for key, (title, form) in curves.items())


def _chart(groups: Sequence[Group], key: str, title: str, form: str) -> str:
    lines = [
        Curve(
            group.label,
            group.slot,
            group.curve(lambda run: run.series(key)),
            dots=[mark for run in group.runs for mark in _marks(run, key)],
        )
        for group in groups
    ]
    return line_chart(Chart(title, "step; ○ an alarm went on", form=form), lines)


def _marks(run: Run, key: str) -> list[tuple[float, float]]:
    """(step, value) on the curve ``key`` at the steps where an alarm on it went on."""
    points = run.series(key)
    marks = []
    for alarm in run.alarms:
        before = [value for step, value in points if step <= alarm["step"]]
        if alarm["curve"] == key and before:
            marks.append((float(alarm["step"]), before[-1]))
    return marks
