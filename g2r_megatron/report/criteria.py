"""The report by criterion: the share of held-out responses that meet it at each evaluation, by the judge and by the gold judge."""

from collections.abc import Sequence
from html import escape

from g2r_megatron.report.charts import Chart, Curve, slot_class
from g2r_megatron.report.evaluations import Criterion
from g2r_megatron.report.figures import Figure
from g2r_megatron.report.runs import Group, Run, mean
from g2r_megatron.report.text import visible

MOST_CHARTS, MOST_TAGS, MOST_ROWS = 9, 9, 60
FEWEST = 4  # responses of an evaluation; the share of fewer responses is too uncertain for a curve


def ranked_criteria(groups: Sequence[Group]) -> list[str]:
    """Criteria by their effect on the score, largest first: |weight| x responses x |change of the share met|."""
    moved: dict[str, float] = {}
    for group in groups:
        for run in group.runs:
            for text, criterion in run.evaluations.criteria.items():
                moves = abs(criterion.weight) * criterion.responses * abs(criterion.change)
                moved[text] = max(moved.get(text, 0.0), moves)
    return sorted(moved, key=lambda text: (-moved[text], text))


def criterion_figures(groups: Sequence[Group]) -> list[Figure]:
    """Figures of the first of ``ranked_criteria`` that have ``FEWEST`` responses or more."""
    chosen = [text for text in ranked_criteria(groups) if _example(groups, text).responses >= FEWEST][:MOST_CHARTS]
    return [_criterion_figure(groups, number, text) for number, text in enumerate(chosen, 1)]


def _criterion_figure(groups: Sequence[Group], number: int, text: str) -> Figure:
    def by(run: Run, gold: bool) -> list[tuple[int, float]]:
        criterion = run.evaluations.criteria.get(text)
        return criterion.shares(gold) if criterion else []

    curves = [
        Curve(
            group.label,
            group.slot,
            group.curve(lambda run: by(run, False)),
            [point[:2] for point in group.curve(lambda run: by(run, True))],
        )
        for group in groups
    ]
    title = f"{text} ({_example(groups, text).weight:+g})"
    return Figure(f"criterion {number} {text}", Chart(title, "step", y_range=(0.0, 1.0)), curves)


def tag_figures(groups: Sequence[Group]) -> list[Figure]:
    """The score of each tag, by the definition of its data set."""
    tags = dict.fromkeys(tag for group in groups for run in group.runs for tag in run.evaluations.tags)
    return [
        Figure(
            f"tag {number} {tag}",
            Chart(f"Score of {tag}", "step", form="{:.3f}"),
            [Curve(g.label, g.slot, g.curve(lambda run: run.evaluations.tags.get(tag, []))) for g in groups],  # noqa: B023
        )
        for number, tag in enumerate(list(tags)[:MOST_TAGS], 1)
    ]


def criteria_table(groups: Sequence[Group]) -> str:
    """Share met at the first and at the last evaluation, each group's mean; below it the gold judge's."""
    ranked = ranked_criteria(groups)
    head = "".join(
        f'<th><span class="swatch {slot_class(group.slot)}">{escape(group.label)}</span></th>' for group in groups
    )
    body = "".join(
        f"<tr><td>{visible(text)}</td><td>{_example(groups, text).weight:+g}</td>"
        f"<td>{_example(groups, text).responses}</td>{''.join(_cell(group, text) for group in groups)}</tr>"
        for text in ranked[:MOST_ROWS]
    )
    left = len(ranked) - MOST_ROWS
    more = f'<p class="fine">{left} more criteria are in the evaluations of the runs.</p>' if left > 0 else ""
    return (
        f'<details><summary>All criteria, share met at the first and last evaluation</summary><div class="scroll"><table class="health">'
        f"<thead><tr><th>criterion</th><th>weight</th><th>responses</th>{head}</tr></thead><tbody>{body}</tbody></table></div>{more}</details>"
    )


def _cell(group: Group, text: str) -> str:
    found = [run.evaluations.criteria[text] for run in group.runs if text in run.evaluations.criteria]
    if not found:
        return "<td>–</td>"
    said = _ends([criterion.shares() for criterion in found])
    gold = [shares for criterion in found if (shares := criterion.shares(gold=True))]
    return f"<td>{said}{f'<small>gold {_ends(gold)}</small>' if gold else ''}</td>"


def _ends(shares: Sequence[Sequence[tuple[int, float]]]) -> str:
    first, last = mean([own[0][1] for own in shares]), mean([own[-1][1] for own in shares])
    return f"{first:.2f} → {last:.2f}"


def _example(groups: Sequence[Group], text: str) -> Criterion:
    """The criterion as the first run that has it knows it."""
    runs = (run for group in groups for run in group.runs)
    return next(run.evaluations.criteria[text] for run in runs if text in run.evaluations.criteria)
