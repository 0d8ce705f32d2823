"""Line charts as SVG in the page. This file draws them, the page's style sheet gives the colours.

The page's script shows the values at the pointer.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from g2r_megatron.report.text import plain, visible

LONGEST_NAME = 24  # most characters of the name that is shown at the end of a curve
SLOTS = 6  # colours in the style sheet; more groups use them again, with dashed lines


@dataclass(frozen=True)
class Curve:
    """One line of a chart. ``points``: (x, mean, low, high), x ascending; low and high span the seeds."""

    label: str
    slot: int
    points: Sequence[tuple[float, float, float, float]]
    dots: Sequence[tuple[float, float]] = ()  # (x, y) drawn as circles without a line
    loose: int = 0  # so many points at the end are drawn as circles, and the line does not reach them
    marks: Sequence[tuple[float, float, str]] = ()  # (x, y, name) drawn as triangles with their names


@dataclass(frozen=True)
class Chart:
    """A chart without its curves. The x axis starts at 0.

    ``form``: format of values, e.g. ``{:.2f}``. ``marks``: (y, label) of horizontal lines.
    """

    title: str
    x_label: str
    width: int = 330
    height: int = 190
    form: str = "{:.2f}"
    marks: Sequence[tuple[float, str]] = ()
    x_names: Sequence[str] = ()  # names of x = 0, 1, ...; shown in the place of the numbers
    y_range: tuple[float, float] | None = None  # the y axis covers at least this range
    end_labels: bool = False  # whether each curve has its name at its right end


@dataclass(frozen=True)
class Frame:
    """Maps data coordinates to SVG coordinates."""

    left: float
    right: float
    top: float
    bottom: float
    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return self.left + (value - self.x0) / (self.x1 - self.x0) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - (value - self.y0) / (self.y1 - self.y0) * (self.bottom - self.top)


def line_chart(chart: Chart, curves: Sequence[Curve]) -> str:
    """HTML: a ``<figure>`` with the chart. Empty if no curve has a point."""
    curves = drawable(curves)
    if not curves:
        return ""
    body, frame = chart_body(chart, curves)
    return (
        f'<figure class="chart" style="--w:{chart.width}px"><figcaption>{visible(chart.title)}</figcaption>'
        f'<svg viewBox="0 0 {chart.width} {chart.height}" role="img" aria-label="{visible(chart.title)}"'
        f' data-chart="{escape(_hover_data(chart, curves, frame))}">{body}'
        f'<line class="hair" y1="{frame.top}" y2="{frame.bottom}"/></svg></figure>'
    )


def drawable(curves: Sequence[Curve]) -> list[Curve]:
    """The curves that have a point."""
    return [curve for curve in curves if curve.points or curve.dots]


def chart_body(chart: Chart, curves: list[Curve]) -> tuple[str, Frame]:
    """The SVG elements of a chart, and its coordinates. ``curves``: of ``drawable``, at least one."""
    frame, y_ticks = _frame(chart, curves)
    body = _grid(chart, frame, y_ticks) + "".join(_curve(curve, frame) for curve in curves)
    if chart.end_labels:
        body += _end_labels(curves, frame)
    return body + _mark_names(curves, frame), frame


def slot_class(slot: int) -> str:
    """CSS class of a colour slot."""
    return f"c{slot % SLOTS}" + (" again" if slot >= SLOTS else "")


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round values: 1, 2 or 5 times a power of ten. ``low`` and ``high`` lie between the first and the last."""
    if high <= low:  # of a constant the axis begins or ends at zero
        low, high = (min(low, 0.0), max(low, 0.0)) if low else (0.0, 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _frame(chart: Chart, curves: list[Curve]) -> tuple[Frame, list[float]]:
    xs = [point[0] for curve in curves for point in (*curve.points, *curve.dots)]
    xs += [x for curve in curves for x, _, _ in curve.marks]
    ys = [y for curve in curves for point in curve.points for y in point[2:]]
    ys += [y for curve in curves for _, y in curve.dots] + [y for curve in curves for _, y, _ in curve.marks]
    ys += list(chart.y_range or ())
    y_ticks = nice_ticks(min(ys), max(ys), 4 if chart.height < 240 else 5)
    left = 14 + 6.4 * max(len(_tick(tick, y_ticks)) for tick in y_ticks)
    right = chart.width - (12 + 7.9 * max(len(_short(curve.label)) for curve in curves) if chart.end_labels else 10)
    x0, x1 = min(0.0, *xs), max(xs)
    frame = Frame(left, right, 10, chart.height - 36, x0, x1 if x1 > x0 else x0 + 1, y_ticks[0], y_ticks[-1])
    return frame, y_ticks


def _grid(chart: Chart, frame: Frame, y_ticks: list[float]) -> str:
    parts = []
    for tick in y_ticks:
        y = frame.y(tick)
        kind = "zero" if abs(tick) < 1e-12 and y_ticks[0] < 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{frame.left:.1f}" x2="{frame.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{frame.left - 7:.1f}" y="{y + 3.6:.1f}" text-anchor="end">{_tick(tick, y_ticks)}</text>'
        )
    for value, label in chart.marks:
        if frame.y0 <= value <= frame.y1:
            y = frame.y(value)
            parts.append(f'<line class="mark" x1="{frame.left:.1f}" x2="{frame.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="marktext" x="{frame.left + 4:.1f}" y="{y - 5:.1f}">{escape(label)}</text>')
    for x, name in _x_ticks(chart, frame):
        parts.append(
            f'<text class="tick" x="{frame.x(x):.1f}" y="{frame.bottom + 15:.1f}" text-anchor="middle">{escape(name)}</text>'
        )
    middle = (frame.left + frame.right) / 2
    parts.append(
        f'<text class="axis" x="{middle:.1f}" y="{chart.height - 5}" text-anchor="middle">{escape(chart.x_label)}</text>'
    )
    return "".join(parts)


def _x_ticks(chart: Chart, frame: Frame) -> list[tuple[float, str]]:
    if chart.x_names:
        return [(x, name) for x, name in enumerate(chart.x_names) if frame.x0 <= x <= frame.x1]
    ticks = nice_ticks(frame.x0, frame.x1, max(3, round((frame.right - frame.left) / 90)))
    return [(tick, _tick(tick, ticks)) for tick in ticks if frame.x0 <= tick <= frame.x1]


def _tick(value: float, ticks: list[float]) -> str:
    step = ticks[1] - ticks[0]
    if step < 1e-4 or abs(ticks[-1]) >= 1e5:
        return f"{value:.2g}"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value + 0.0:.{decimals}f}"


def _curve(curve: Curve, frame: Frame) -> str:
    joined = curve.points[: len(curve.points) - curve.loose]
    loose = [(x, y) for x, y, _, _ in curve.points[len(joined) :]]
    parts = []
    if any(high > low for _, _, low, high in joined):
        upper = [f"{frame.x(x):.1f},{frame.y(high):.1f}" for x, _, _, high in joined]
        lower = [f"{frame.x(x):.1f},{frame.y(low):.1f}" for x, _, low, _ in reversed(joined)]
        parts.append(f'<polygon class="band" points="{" ".join(upper + lower)}"/>')
    if len(joined) == 1:
        loose.append(joined[0][:2])
    elif joined:
        line = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y, _, _ in joined)
        parts.append(f'<polyline class="line" points="{line}"/>')
    for x, y in (*loose, *curve.dots):
        parts.append(f'<circle class="dot" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3.4"/>')
    for x, y, name in curve.marks:
        left, top = frame.x(x), frame.y(y)
        tip = visible(f"{curve.label}: alarm {name}")
        parts.append(f'<path class="alarm" d="M{left:.1f} {top - 1:.1f}l6 -11h-12z" data-tip="{tip}"/>')
    return f'<g class="{slot_class(curve.slot)}" data-slot="{curve.slot}">{"".join(parts)}</g>'


def _mark_names(curves: list[Curve], frame: Frame) -> str:
    """Names of the marks as SVG text. Each name is shown once, at its first mark, and no two names have the same height.

    A name is to the right of its mark; in the right half of the chart it is to the left.
    """
    first: dict[str, tuple[float, float]] = {}
    for curve in curves:
        for x, y, name in curve.marks:
            first[name] = min(first.get(name, (x, y)), (x, y))
    parts, used = [], []
    for name, (x, y) in sorted(first.items(), key=lambda mark: frame.y(mark[1][1])):
        left, top = frame.x(x), frame.y(y) - 4
        while any(abs(top - other) < 13 for other in used):
            top += 13
        used.append(top)
        is_right = left > (frame.left + frame.right) / 2
        side = "end" if is_right else "start"
        parts.append(
            f'<text class="alarmtext" x="{left + (-9 if is_right else 9):.1f}" y="{top:.1f}" text-anchor="{side}">{visible(name)}</text>'
        )
    return "".join(parts)


def _end_labels(curves: list[Curve], frame: Frame) -> str:
    """Names at the right ends of the curves, moved down where two would overlap."""
    ends = [(frame.y(curve.points[-1][1]), curve) for curve in curves if curve.points]
    parts, previous = [], -math.inf
    for y, curve in sorted(ends, key=lambda end: end[0]):
        previous = max(y, previous + 15)
        x = frame.x(curve.points[-1][0]) + 8
        parts.append(
            f'<text class="end {slot_class(curve.slot)}" data-slot="{curve.slot}" x="{x:.1f}" y="{previous + 4:.1f}">'
            f"{visible(_short(curve.label))}</text>"
        )
    return "".join(parts)


def _short(label: str) -> str:
    return label if len(label) <= LONGEST_NAME else label[: LONGEST_NAME - 1] + "…"


def _hover_data(chart: Chart, curves: list[Curve], frame: Frame) -> str:
    """JSON for the page's script: it finds the x nearest to the pointer and shows the values there. Names are text, no markup."""

    def value(y: float, low: float, high: float) -> str:
        form = chart.form.format
        return form(y) + (f" ({form(low)}–{form(high)})" if high > low else "")

    def line(curve: Curve, label: str, points, is_dots: bool) -> dict:
        xs, texts = [point[0] for point in points], [value(*point[1:]) for point in points]
        # the script shows circles only at an x that has one
        return {
            "label": plain(label),
            "slot": curve.slot,
            "class": slot_class(curve.slot),
            "x": xs,
            "text": texts,
            "dots": is_dots,
        }

    lines = [line(curve, curve.label, curve.points, False) for curve in curves if curve.points]
    dots = [(curve, [(x, y, y, y) for x, y in curve.dots]) for curve in curves if curve.dots]
    lines += [line(curve, f"{curve.label} ○", points, bool(lines)) for curve, points in dots]
    data = {
        "left": frame.left, "right": frame.right, "x0": frame.x0, "x1": frame.x1, "width": chart.width,
        "x": chart.x_label, "names": list(chart.x_names), "lines": lines,
    }  # fmt: skip
    return json.dumps(data)
