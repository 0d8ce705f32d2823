"""Draws call_path.svg, the picture of docs/architecture.md: the functions between a prompt and a gradient.

python docs/images/draw_call_path.py [--output FILE]
"""

import argparse
from html import escape
from pathlib import Path

SANS = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
INK, GREY, LINE = "#1f2328", "#656d76", "#8c959f"
POLICY, JUDGE, CREDIT = "#ddf4ff", "#fff1e5", "#dafbe1"  # fill of a box, by the folder that the work is done in
WIDTH, HEIGHT, BOX_W, BOX_H = 960, 404, 250, 74

# (column, row, fill, title, where, what comes out)
BOXES = (
    (0, 0, POLICY, "sample", "rollout/megatron.py  generate", "G responses a prompt: token ids"),
    (1, 0, JUDGE, "read", "judge/prompt.py, packing.py", "one sequence, a branch an item"),
    (2, 0, JUDGE, "judge, forward", "judge/frozen.py  verdict_log_probs", "log p(True), log p(False) an item"),
    (2, 1, JUDGE, "judge, backward", "judge/frozen.py  token_gradients", "g . d, |g| of each response token"),
    (1, 1, CREDIT, "attribute", "credit/attribution.py", "alpha [T] an item"),
    (0, 1, CREDIT, "credit", "credit/judgements.py, advantages.py", "an advantage for each token"),
    (0, 2, POLICY, "update", "policy/trainer.py, losses.py", "new weights"),
    (1, 2, POLICY, "log-probs", "policy/log_probs.py", "old and reference, while the judge works"),
)
ARROWS = ((0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (7, 6))


def place(column: int, row: int) -> tuple[float, float]:
    return 40 + column * (BOX_W + 65), 62 + row * (BOX_H + 38)


def text(x: float, y: float, content: str, size: float, fill: str = INK, font: str = SANS, weight: int = 400) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{fill}" font-family="{font}" '
        f'font-weight="{weight}" text-anchor="middle">{escape(content)}</text>'
    )


def box(column: int, row: int, fill: str, title: str, where: str, result: str) -> str:
    x, y = place(column, row)
    middle = x + BOX_W / 2
    return (
        f'<rect x="{x}" y="{y}" width="{BOX_W}" height="{BOX_H}" rx="8" fill="{fill}" stroke="{LINE}"/>'
        + text(middle, y + 22, title, 15, weight=600)
        + text(middle, y + 42, where, 11, font=MONO)
        + text(middle, y + 61, result, 11.5, GREY)
    )


def arrow(first: int, second: int) -> str:
    (column, row), (to_column, to_row) = BOXES[first][:2], BOXES[second][:2]
    x, y = place(column, row)
    to_x, to_y = place(to_column, to_row)
    if row == to_row:
        right = to_column > column
        start, end = x + BOX_W * right, to_x + BOX_W * (not right)
        points = (start + 4 * (1 if right else -1), y + BOX_H / 2, end - 8 * (1 if right else -1), y + BOX_H / 2)
    else:
        points = (x + BOX_W / 2, y + BOX_H + 3, x + BOX_W / 2, to_y - 8)
    return '<line x1="{:g}" y1="{:g}" x2="{:g}" y2="{:g}" stroke="{}" stroke-width="2" marker-end="url(#tip)"/>'.format(
        *points, LINE
    )


def call_path() -> str:
    """The picture as SVG."""
    loop_x = place(0, 0)[0] - 22  # back from the update to the next step's sampling
    top, bottom = place(0, 0)[1] + BOX_H / 2, place(0, 2)[1] + BOX_H / 2
    loop = (
        f'<path d="M {loop_x + 22} {bottom} H {loop_x} V {top} H {loop_x + 14}" fill="none" stroke="{LINE}" '
        f'stroke-width="2" marker-end="url(#tip)"/>'
    )
    tip = (
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="7" refY="5" markerWidth="6" markerHeight="6" '
        f'orient="auto"><path d="M 0 0 L 10 5 L 0 10 z" fill="{LINE}"/></marker></defs>'
    )
    legend = "".join(
        f'<rect x="{x}" y="{HEIGHT - 26}" width="14" height="14" rx="3" fill="{fill}" stroke="{LINE}"/>'
        f'<text x="{x + 21}" y="{HEIGHT - 14}" font-size="12" fill="{GREY}">{label}</text>'
        for x, fill, label in (
            (40, POLICY, "policy's ranks and layout"),
            (250, JUDGE, "judge's ranks and layout"),
            (460, CREDIT, "plain maths, every rank"),
        )
    )
    title = text(WIDTH / 2, 34, "One step: train_step in train.py", 14)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="{SANS}">{tip}<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#fff" stroke="#d8dee4"/>'
        + title
        + "".join(box(*values) for values in BOXES)
        + "".join(arrow(*ends) for ends in ARROWS)
        + loop
        + legend
        + "</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("call_path.svg"))
    output = parser.parse_args().output
    output.write_text(call_path(), encoding="utf-8")
    print(output)


if __name__ == "__main__":
    main()
