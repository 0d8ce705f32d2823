"""The figures of the report as files: SVG and PNG are pictures, CSV has the numbers."""

import csv
import io
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from xml.sax.saxutils import escape

from g2r_megatron.errors import UserError, unwritable
from g2r_megatron.records.files import make_directory, replace_text
from g2r_megatron.report.assets import FIGURE_CSS
from g2r_megatron.report.charts import Curve, chart_body, drawable, slot_class
from g2r_megatron.report.criteria import criterion_figures, tag_figures
from g2r_megatron.report.figures import (
    HEALTH_CHARTS,
    TRAINING_CHARTS,
    Figure,
    alarm_figures,
    learning_figures,
    metric_figures,
    position_figures,
)
from g2r_megatron.report.runs import Group, load_groups
from g2r_megatron.report.text import plain

PNG_ZOOM = 2  # pixels a unit
FONTS = "DejaVu Sans, Liberation Sans, Arial, Helvetica, sans-serif"
TITLE_LINES, LINE = 2, 16
CHARACTER = 7.4  # approximate width of a character of the title


def write_figures(run_dirs: Sequence[Path], directory: Path, formats: Sequence[str]) -> list[str]:
    """Write every figure that has a point, in each format. Returns the names of the figures.

    Raises ``UserError`` for a broken run directory, and for PNG if the package that draws it is not installed.
    """
    if "png" in formats and find_spec("resvg_py") is None:
        raise UserError(
            "--format", "png, but the package resvg-py is not installed", "pip install 'g2r-megatron[report]'"
        )
    figures = [figure for figure in all_figures(load_groups(list(run_dirs))) if drawable(figure.curves)]
    make_directory(directory)
    write: dict[str, Callable[[Path, Figure], None]] = {"svg": _write_svg, "png": _write_png, "csv": _write_csv}
    for figure in figures:
        for form in formats:
            write[form](directory / f"{file_name(figure.name)}.{form}", figure)
    return [figure.name for figure in figures]


def all_figures(groups: Sequence[Group]) -> list[Figure]:
    """All figures of the page, in the page's order."""
    return [
        *learning_figures(groups),
        *tag_figures(groups),
        *criterion_figures(groups),
        *metric_figures(groups, HEALTH_CHARTS),
        *position_figures(groups),
        *alarm_figures(groups),
        *metric_figures(groups, TRAINING_CHARTS),
    ]


def file_name(name: str) -> str:
    """``name`` with letters, digits and underscores only. A name can contain a criterion, which is text of a user."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:60]


def svg(figure: Figure) -> str:
    """An SVG document: title, names of the curves, chart. ``figure`` has a point to draw."""
    chart, curves = replace(figure.chart, end_labels=False), drawable(figure.curves)  # the names are above the chart
    body, _ = chart_body(chart, curves)
    title = textwrap.wrap(plain(chart.title), int(chart.width / CHARACTER), max_lines=TITLE_LINES, placeholder=" …")
    top = 6
    head = ""
    for line in title:
        top += LINE
        head += f'<text class="title" x="8" y="{top}">{escape(line)}</text>'
    for curve in curves:
        top += LINE
        head += f'<g class="{slot_class(curve.slot)}"><path class="line" d="M8 {top - 4}h18"/></g>'
        head += f'<text x="32" y="{top}">{escape(plain(curve.label))}</text>'
    top += 6
    height = chart.height + top
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{chart.width}" height="{height}" viewBox="0 0 {chart.width} {height}" '
        f'font-family="{FONTS}"><style>{FIGURE_CSS}</style><rect width="100%" height="100%" fill="#ffffff"/>{head}'
        f'<g transform="translate(0 {top})">{body}</g></svg>\n'
    )


def csv_text(curves: Sequence[Curve]) -> str:
    """CSV, one line for each point. ``kind``: line (mean, lowest and highest over the runs), circle, or the alarm that went on."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("curve", "kind", "x", "mean", "low", "high"))
    for curve in curves:
        writer.writerows((curve.label, "line", *point) for point in curve.points)
        writer.writerows((curve.label, "circle", x, y, "", "") for x, y in curve.dots)
        writer.writerows((curve.label, f"alarm {name}", x, y, "", "") for x, y, name in curve.marks)
    return out.getvalue()


def _write_svg(path: Path, figure: Figure) -> None:
    replace_text(path, svg(figure))


def _write_csv(path: Path, figure: Figure) -> None:
    replace_text(path, csv_text(figure.curves))


def _write_png(path: Path, figure: Figure) -> None:
    import resvg_py

    try:
        path.write_bytes(bytes(resvg_py.svg_to_bytes(svg_string=svg(figure), zoom=PNG_ZOOM)))
    except OSError as error:
        raise unwritable(path, error) from error
