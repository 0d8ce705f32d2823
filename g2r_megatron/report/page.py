"""report.html: one page in one file that compares runs: what they learned, which tokens got the credit, what went wrong."""

import base64
import hashlib
from functools import partial
from html import escape
from pathlib import Path

import yaml

from g2r_megatron.errors import UserError
from g2r_megatron.report.alarms import alarm_list
from g2r_megatron.report.assets import CSS, SCRIPT
from g2r_megatron.report.charts import slot_class
from g2r_megatron.report.credited import credited_cards
from g2r_megatron.report.criteria import criteria_table, criterion_figures, tag_figures
from g2r_megatron.report.figures import (
    HEALTH_CHARTS,
    TRAINING_CHARTS,
    alarm_figures,
    drawn,
    has_truth,
    learning_figures,
    metric_figures,
    position_figures,
    smoothing_note,
)
from g2r_megatron.report.hazards import HAZARDS
from g2r_megatron.report.heatmap import FULL_SHADE, SHADE_POWER, pick_samples, sample_card
from g2r_megatron.report.runs import TARGET_SCORE, Group, Run, Score, choose_score, load_groups
from g2r_megatron.report.summary import NOTHING, Number, SummaryRow, summary_rows, target_note
from g2r_megatron.report.text import visible

PHASES = ("sample", "judge", "update")
OPEN_CARDS = 2  # heat maps that are open at the start: those with the smallest ESS/T


def write_report(run_dirs: list[Path], output: Path) -> None:
    """Write the page of the runs to ``output`` (UTF-8). The page makes no request. Text in it is shown and never run.

    Raises UserError when a run directory is missing, empty or broken, or ``output`` cannot be written.
    """
    groups = load_groups(run_dirs)
    page = render_page(groups)
    try:
        Path(output).write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(
            "--output", f"cannot write {output} ({error.strerror})", "give a file in an existing folder"
        ) from error


def render_page(groups: list[Group]) -> str:
    """The whole HTML document."""
    score = choose_score(groups)
    rows = summary_rows(groups, score)
    sections = (
        _table(groups, rows, score), _learning(groups), _criteria(groups), _heat_maps(groups), _credited(groups),
        _attribution(groups), _positions(groups), _alarms(groups), _training(groups), _phases(groups),
        _first_and_last(groups), _configs(groups),
    )  # fmt: skip
    return document("g2r report", _swatches(groups), _headline(rows), "".join(sections))


def document(title: str, navigation: str, headline: str, content: str) -> str:
    """A whole HTML page. ``title`` is text, the other arguments are HTML."""
    # the page shows text of a model, so the browser may run one script only: ours, named by its hash
    script_hash = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'"
    theme = '<button id="theme" class="end" hidden>light / dark</button>'
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{CSS}</style></head><body><nav><div><b>{escape(title)}</b>{navigation}{theme}</div></nav>"
        f"<main><h1>{headline}</h1>{content}</main>"
        f'<div id="tip" role="status"></div><script>{SCRIPT}</script></body></html>\n'
    )


def _swatches(groups: list[Group]) -> str:
    return "".join(
        f'<button class="swatch {slot_class(group.slot)}" data-toggle="{group.slot}" aria-pressed="true"'
        f' title="show or hide in all charts">{escape(group.label)}</button>'
        for group in groups
    )


def _headline(rows: list[SummaryRow]) -> str:
    """The page's heading: the score of each group before and after."""
    groups = [row for row in rows if not row.is_run and row.after.mean is not None]
    if not groups:
        return "Too few steps for a comparison yet"
    parts = [f"{row.label} {row.before.text('{:.2f}')} → {row.after.text('{:.2f}')}" for row in groups]
    return "Rubric score: " + "; ".join(f'<span class="whole">{escape(part)}</span>' for part in parts)


def _table(groups: list[Group], rows: list[SummaryRow], score: Score) -> str:
    truth = has_truth(groups)
    steps = max(run.last_step for group in groups for run in group.runs)
    runs = sum(len(group.runs) for group in groups)
    ends = [number.mean for row in rows for number in (row.before, row.after) if number.mean is not None]
    low, high = (min([0.0, *ends]), max([1.0, *ends]))
    headings = ["before", "after"]
    headings += [f"steps to {TARGET_SCORE}", f"seconds to {TARGET_SCORE}", "judge − true"] if truth else []
    head = '<th>run</th><th class="dumbbell">before → after</th>'
    head += "".join(f"<th>{heading}</th>" for heading in [*headings, "seconds a step"])
    body = "".join(_table_row(row, truth, low, high) for row in rows)
    note = f"Before and after: {score.label}."
    if truth:
        note += f" Steps to {TARGET_SCORE}: {target_note()}. Judge − true: at the last evaluation; above zero the judge is too kind."
    if runs > len(groups):
        note += " Groups of several seeds show the mean, and lowest–highest below it."
    return (
        f'<p class="lede">{runs} run{"s" * (runs > 1)}, {steps} steps. Everything below was measured in these runs.</p>'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="fine">{escape(note)}</p>'
    )


def _table_row(row: SummaryRow, truth: bool, low: float, high: float) -> str:
    cells = [f'<td class="dumbbell">{_dumbbell(row, low, high)}</td>']
    cells += [_cell(row.before, "{:.3f}"), _cell(row.after, "{:.3f}")]
    if truth:
        cells += [
            _spread_cell(row.steps_text, row.steps.spread("{:.0f}")),
            _cell(row.seconds, "{:.0f}"),
            _cell(row.gap, "{:+z.3f}"),
        ]
    cells.append(_cell(row.step_seconds, "{:.2f}"))
    name = (
        escape(row.label) if row.is_run else f'<span class="swatch {slot_class(row.slot)}">{escape(row.label)}</span>'
    )
    return f'<tr class="{"run" if row.is_run else "group"}"><td>{name}</td>{"".join(cells)}</tr>'


def _cell(number: Number, form: str) -> str:
    return _spread_cell(number.text(form), number.spread(form))


def _spread_cell(text: str, spread: str) -> str:
    return f"<td>{text}{f'<small>{spread}</small>' if spread else ''}</td>"


def _dumbbell(row: SummaryRow, low: float, high: float) -> str:
    """SVG: a line from the score before (open circle) to the score after (full circle). All rows have the same scale."""
    if row.before.mean is None or row.after.mean is None:
        return ""
    before, after = (6 + (number.mean - low) / (high - low) * 178 for number in (row.before, row.after))
    width = 2 if row.is_run else 4
    return (
        f'<svg viewBox="0 0 190 16" class="{slot_class(row.slot)}" aria-hidden="true"><line class="grid" x1="6" x2="184" y1="8" y2="8"/>'
        f'<line x1="{before:.1f}" x2="{after:.1f}" y1="8" y2="8" stroke="var(--c)" stroke-width="{width}"/>'
        f'<circle class="dot" cx="{before:.1f}" cy="8" r="{width}"/><circle cx="{after:.1f}" cy="8" r="{width + 1}" fill="var(--c)"/></svg>'
    )


def _learning(groups: list[Group]) -> str:
    bands = "Bands: lowest to highest seed. " if any(len(group.runs) > 1 for group in groups) else ""
    note = f"{smoothing_note()} {bands}By time, a method pays for its attribution."
    return section("Learning", note, drawn(learning_figures(groups)))


def _criteria(groups: list[Group]) -> str:
    if not any(run.evaluations.criteria for group in groups for run in group.runs):
        return ""
    note = (
        "Share of held-out responses that meet a criterion: by the judge that training learns from (lines), and by the gold judge or "
        "the truth where there is one (circles). Drawn are the criteria whose change moved the score most, and scores by tag."
    )
    charts = drawn(criterion_figures(groups)) + drawn(tag_figures(groups))
    content = f'<div class="charts">{charts}</div>{criteria_table(groups)}'
    return section("Criterion by criterion", note, content, charts=False)


def _credited(groups: list[Group]) -> str:
    cards = credited_cards(groups)
    note = (
        "Over all logged responses: the sentences and words that got most of a criterion's credit. N×: times what an attribution "
        "that says nothing gives them."
    )
    return section("Most credited sentences and words", note, cards, charts=False) if cards else ""


def _heat_maps(groups: list[Group]) -> str:
    picked = pick_samples(groups)
    scale = "".join(
        f'<span class="good" style="--v:{(ratio / FULL_SHADE) ** SHADE_POWER:.2f}"></span>' for ratio in (0, 1, 2, 4, 8)
    )
    note = (
        "One response, once per criterion: the darker a token, the more of the criterion's credit its gradient gives it. "
        "Orange: a criterion of negative weight. An even pale strip is a flat attribution: it says nothing."
    )
    legend = f'<p class="fine">0<span class="scale">{scale}</span>{FULL_SHADE:.0f}× the uniform weight 1/T, or more</p>'
    if not picked:
        return section("Where the credit goes", "No attribution was logged: the preset grpo makes none.", "")
    cards = "".join(sample_card(p, is_open=index < OPEN_CARDS) for index, p in enumerate(picked))
    return section("Where the credit goes", note, legend + cards, charts=False)


def _attribution(groups: list[Group]) -> str:
    head = "".join(
        f'<th><span class="swatch {slot_class(group.slot)}">{escape(group.label)}</span></th>' for group in groups
    )
    body = ""
    for hazard in HAZARDS:
        values = [group.mean(hazard.of_run) for group in groups]
        if all(value is None for value in values):
            continue
        cells = "".join(
            f"<td{' class=flag' if value is not None and hazard.is_flagged(value) else ''}>"
            f"{NOTHING if value is None else hazard.form.format(value)}</td>"
            for value in values
        )
        body += f'<tr><td>{escape(hazard.label)} <span class="fine">{escape(hazard.meaning)}</span></td>{cells}</tr>'
    table = f'<div class="scroll"><table class="health"><thead><tr><th>hazard</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    charts = drawn(metric_figures(groups, HEALTH_CHARTS))
    note = "The known ways in which this method fails, each measured. Marked values (▲) are past the level named beside them."
    return section("Hazards and attribution health", note, f'{table}<div class="charts">{charts}</div>', charts=False)


def _positions(groups: list[Group]) -> str:
    note = "Advantage by place in the response. A level line teaches content; a slope teaches length, whatever is said."
    return section("Position ramp", note, drawn(position_figures(groups)))


def _alarms(groups: list[Group]) -> str:
    note = "What a run said when something looked wrong: each alarm once, when it went on (docs/alarms.md). Triangles: where, on the curve it watches."
    content = f'{alarm_list(groups)}<div class="charts">{drawn(alarm_figures(groups))}</div>'
    return section("Alarms", note, content, charts=False)


def _training(groups: list[Group]) -> str:
    return section("Training health", "", drawn(metric_figures(groups, TRAINING_CHARTS)))


def _phases(groups: list[Group]) -> str:
    totals = {group.slot: group.mean(lambda run: run.average("time/step")) for group in groups}
    longest = max((total for total in totals.values() if total), default=None)
    if longest is None:
        return ""
    bars = ""
    for group in groups:
        total = totals[group.slot]
        if total is None:
            continue
        parts = [(name, group.mean(partial(Run.average, key=f"time/{name}")) or 0.0) for name in PHASES]
        parts.append(("other", max(0.0, total - sum(seconds for _, seconds in parts))))
        spans = "".join(_phase(name, seconds, longest) for name, seconds in parts)
        bars += f'<span class="swatch {slot_class(group.slot)}">{escape(group.label)}</span><div class="bar">{spans}</div><b>{total:.2f} s</b>'
    key = "".join(f'<span class="key {name}_phase"></span>{name}' for name in (*PHASES, "other"))
    return section(
        "Seconds a step",
        "Means over all steps.",
        f'<p class="fine">{key}</p><div class="bars">{bars}</div>',
        charts=False,
    )


def _phase(name: str, seconds: float, longest: float) -> str:
    text = f"{seconds:.2f}" if seconds > 0.07 * longest else ""
    return f'<span class="{name}_phase" style="width:{100 * seconds / longest:.1f}%" data-tip="{name} {seconds:.3f} s">{text}</span>'


def _first_and_last(groups: list[Group]) -> str:
    """The first response in the log of the first step, and that of the last step. So nobody chooses them."""
    parts = ""
    for group in groups:
        samples = group.runs[0].samples
        if samples:
            last = next(sample for sample in samples if sample["step"] == samples[-1]["step"])
            parts += f'<h3 class="swatch {slot_class(group.slot)}">{escape(group.label)}</h3>{_response(samples[0])}{_response(last)}'
    if not parts:
        return ""
    note = "The first response in the log of the first and of the last logged step; none was picked."
    return section("Responses, first and last", note, f'<div class="pairs">{parts}</div>', charts=False)


def _response(sample: dict) -> str:
    true = "" if sample["true_reward"] is None else f", true {sample['true_reward']:.2f}"
    return (
        f'<div><p class="fine">step {sample["step"]} · judged {sample["reward"]:.2f}{true} · prompt: {visible(str(sample["prompt"])[:400])}</p>'
        f"<p>{visible(sample['response'].strip())}</p></div>"
    )


def _configs(groups: list[Group]) -> str:
    parts = ""
    for group in groups:
        for run in group.runs:
            text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
            parts += (
                f'<details><summary><span class="chip {slot_class(group.slot)}">{escape(group.label)}</span> seed {escape(run.seed)}'
                f' <span class="fine">{visible(str(run.path))}</span></summary><pre>{visible(text)}</pre></details>'
            )
    return section("Configuration", "Every option of each run, resolved.", parts, charts=False)


def section(title: str, note: str, content: str, charts: bool = True) -> str:
    """HTML of a section. ``title`` and ``note`` are text, ``content`` is HTML. ``charts``: whether ``content`` is charts."""
    if charts and content:
        content = f'<div class="charts">{content}</div>'
    return f"<section><h2>{escape(title)}</h2>{f'<p class=note>{escape(note)}</p>' if note else ''}{content}</section>"
