"""The figures of the report. The page shows them, and ``g2r report --figures`` writes them to files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from g2r_megatron.report.charts import Chart, Curve, line_chart
from g2r_megatron.report.runs import TARGET_SCORE, WINDOW, Group, Run

# (metric, title, format) of small charts; a chart is drawn if a run logged the metric
HEALTH_CHARTS = (
    ("attribution/ess_share", "Spread of alpha: ESS/T (1 is flat)", "{:.2f}"),
    ("attribution/flat_share", "Share of flat attributions", "{:.2f}"),
    ("attribution/max_alpha", "Largest alpha", "{:.3f}"),
    ("attribution/faithfulness", "Faithfulness of credit, running mean", "{:+.2f}"),
    ("attribution/faithfulness_shuffled", "The same of shuffled credit", "{:+.2f}"),
    ("attribution/cos_median", "Median |cos(gradient, embedding)|", "{:.3f}"),
    ("attribution/key_token_mass", "Alpha on key tokens", "{:.2f}"),
    ("attribution/passes", "Backward passes a step", "{:.0f}"),
)
TRAINING_CHARTS = (
    ("judge/gap", "Judge minus true score, training batches", "{:+z.3f}"),
    ("judge/agreement", "Judge agrees with the truth", "{:.3f}"),
    ("eval/gold_score", "Score by the gold judge, held-out prompts", "{:.3f}"),
    ("judge/verifier_agreement", "Judge agrees with the verifier", "{:.3f}"),
    ("response/length_mean", "Response length, tokens", "{:.1f}"),
    ("response/finished_share", "Finished responses", "{:.2f}"),
    ("group/zero_variance_share", "Groups without variance", "{:.2f}"),
    ("loss/kl", "KL to the initial policy", "{:.4f}"),
    ("ratio/clip_share", "Clipped ratios", "{:.3f}"),
    ("optimizer/grad_norm", "Gradient norm", "{:.2f}"),
    ("optimizer/lr", "Learning rate", "{:.2e}"),
)
# metrics of the alarms' checks; the charts are drawn even if no alarm went on
ALARM_CHARTS = (
    ("attribution/faithfulness", "Faithfulness of credit", "{:.2f}"),
    ("alarms/master_keys", "Criteria met by empty responses", "{:.2f}"),
    ("alarms/internalization_gap", "Self-internalisation gap", "{:.2f}"),
    ("eval/gold_agreement", "Judge agrees with the gold judge", "{:.2f}"),
    ("eval/exploitation_rate", "Exploitation rate", "{:.2f}"),
)
DECILES = 10


@dataclass(frozen=True)
class Figure:
    """A chart with its curves. ``name``: unique in a report; its files are named by it."""

    name: str
    chart: Chart
    curves: Sequence[Curve]


def drawn(figures: Sequence[Figure]) -> str:
    """HTML of the figures that have a point."""
    return "".join(line_chart(figure.chart, figure.curves) for figure in figures)


def has_truth(groups: Sequence[Group]) -> bool:
    """Whether any run knows the true score of its training batches (its rubric items have checks)."""
    return any(run.series("reward/true_mean") for group in groups for run in group.runs)


def learning_figures(groups: Sequence[Group]) -> list[Figure]:
    """The score by step and by training time."""
    key, name = ("reward/true_mean", "True") if has_truth(groups) else ("reward/mean", "Judged")
    evaluation = "eval/true_score" if has_truth(groups) else "eval/judge_score"
    marks = [(TARGET_SCORE, str(TARGET_SCORE))] if has_truth(groups) else []
    by_step = [
        Curve(
            g.label,
            g.slot,
            g.curve(lambda run: run.smooth(key)),
            [point[:2] for point in g.curve(lambda run: run.series(evaluation))],
        )
        for g in groups
    ]
    by_time = [Curve(g.label, g.slot, _against_seconds(g, key)) for g in groups]
    return [
        Figure(
            "learning",
            Chart(f"{name} score by step", "step", 630, 340, "{:.3f}", marks, end_labels=True),
            by_step,
        ),
        Figure(
            "learning_by_time",
            Chart(f"{name} score by training time", "seconds", 350, 340, "{:.3f}", marks),
            by_time,
        ),
    ]


def _against_seconds(group: Group, key: str) -> list[tuple[float, float, float, float]]:
    """The curve of ``key``, with x in seconds of training: the group's mean up to each step."""

    def elapsed(run: Run) -> list[tuple[int, float]]:
        seconds = 0.0
        return [(step, seconds := seconds + value) for step, value in run.series("time/step")]

    seconds_at = {step: seconds for step, seconds, _, _ in group.curve(elapsed)}
    smooth = group.curve(lambda run: run.smooth(key))
    return [(seconds_at[x], middle, low, high) for x, middle, low, high in smooth if x in seconds_at]


def position_figures(groups: Sequence[Group]) -> list[Figure]:
    """The advantage by place in the response; and, by step, the first tenth minus the last tenth."""
    keys = [f"advantage/position_{decile}" for decile in range(DECILES)]

    def by_place(run: Run) -> list[tuple[int, float]]:
        averages = [run.average(key) for key in keys]
        return [(place, value) for place, value in enumerate(averages) if value is not None]

    def at_stop(run: Run) -> list[tuple[int, float]]:
        value = run.average("advantage/stop_token")
        return [] if value is None else [(DECILES, value)]

    def ramp(run: Run) -> list[tuple[int, float]]:
        return [
            (int(row["step"]), row[keys[0]] - row[keys[-1]]) for row in run.rows if keys[0] in row and keys[-1] in row
        ]

    places = [Curve(g.label, g.slot, g.curve(by_place) + g.curve(at_stop), loose=len(g.curve(at_stop))) for g in groups]
    ramps = [Curve(group.label, group.slot, group.curve(ramp)) for group in groups]
    names = [*(f"{10 * place}%" for place in range(DECILES)), "stop"]
    level = (-0.1, 0.1)
    return [
        Figure(
            "advantage_by_place",
            Chart("Mean advantage by place, all steps", "place", 630, 260, "{:+z.3f}", [], names, level, True),
            places,
        ),
        Figure(
            "advantage_ramp",
            Chart("First tenth minus last tenth", "step", 350, 260, "{:+z.3f}", y_range=level),
            ramps,
        ),
    ]


def metric_figures(groups: Sequence[Group], charts: Sequence[tuple[str, str, str]]) -> list[Figure]:
    """A small chart of each metric in ``charts``, with marks where an alarm of this metric went on."""
    return [_metric_figure(groups, key, key, title, form) for key, title, form in charts]


def alarm_figures(groups: Sequence[Group]) -> list[Figure]:
    """Figures of ``ALARM_CHARTS``, and of the metric of every alarm that went on."""
    curves = {key: (title, form) for key, title, form in ALARM_CHARTS}
    titles = {key: (title, form) for key, title, form in (*HEALTH_CHARTS, *TRAINING_CHARTS)}
    for group in groups:
        for run in group.runs:
            for alarm in run.alarms:
                key = str(alarm["curve"])
                curves.setdefault(key, titles.get(key, (key, "{:.3f}")))
    return [_metric_figure(groups, _alarm_name(key), key, title, form) for key, (title, form) in curves.items()]


def _alarm_name(key: str) -> str:
    """Name of a figure among the alarms. Another figure, among the metrics, may have ``key`` as its name."""
    return key if key.startswith("alarms/") else f"alarms {key}"


def _metric_figure(groups: Sequence[Group], name: str, key: str, title: str, form: str) -> Figure:
    def of_run(run: Run) -> Sequence[tuple[float, float]]:
        return run.series(key)

    return Figure(name, Chart(title, "step", form=form), [_metric_curve(group, key, of_run) for group in groups])


def _metric_curve(group: Group, key: str, of_run: Callable[[Run], Sequence[tuple[float, float]]]) -> Curve:
    marks = [mark for run in group.runs for mark in _marks(run, key)]
    return Curve(group.label, group.slot, group.curve(of_run), marks=marks)


def _marks(run: Run, key: str) -> list[tuple[float, float, str]]:
    """(step, value, alarm) on the curve ``key``, at each step at which an alarm of this metric went on."""
    points = run.series(key)
    marks = []
    for alarm in run.alarms:
        before = [value for step, value in points if step <= alarm["step"]]
        if alarm["curve"] == key and before:
            marks.append((float(alarm["step"]), before[-1], str(alarm["alarm"])))
    return marks


def smoothing_note() -> str:
    """A sentence that says what the lines and circles of the learning curves are."""
    return f"Lines: training batches, mean of the last {WINDOW} steps. Circles: held-out prompts."
