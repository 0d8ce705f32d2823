"""Draws heatmap.svg, the picture of the README: where the quickstart's judge finds each criterion in one response.

    python docs/images/draw_heatmap.py [--output FILE]

Judges examples/quickstart/data/responses.jsonl with `g2r judge` and draws the first row as it comes out: a line a
criterion, a column a token, the shade T alpha_t. Nothing is chosen or edited but which of the unmet criteria is shown.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMOOTHING = "sentence"  # alpha averaged over each sentence; the dot is the token with the largest b before that

LEFT, CELL, ROW, TOP = 208, 23, 25, 176  # px: width of the labels, of a cell, height of a line, where the cells begin
GREEN, RED, INK, GREY, LINE = "#1a7f37", "#cf222e", "#1f2328", "#656d76", "#d8dee4"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
SANS = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif"


def judged_row() -> tuple[str, dict]:
    """(prompt, output row of `g2r judge`) of the first response."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory, "judged.jsonl")
        command = [sys.executable, "-m", "g2r_megatron.cli", "judge", "--config", "examples/quickstart/judge.yaml"]
        options = ["--output", str(output), "--judge.smoothing", SMOOTHING]
        subprocess.run([*command, *options], cwd=ROOT, check=True)
        row = json.loads(output.read_text().splitlines()[0])
    query = json.loads((ROOT / "examples/quickstart/data/responses.jsonl").read_text().splitlines()[0])
    return query["prompt"], row


def text(x: float, y: float, content: str, size: float = 13, fill: str = INK, **attributes: str) -> str:
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{fill}"{extra}>{escape(content)}</text>'


def cells(y: float, shares: list[float], colours: list[str]) -> str:
    """One line of the map; ``shares``: opacity of each cell, in [0, 1]."""
    parts = []
    for column, (share, colour) in enumerate(zip(shares, colours, strict=True)):
        x = LEFT + column * CELL
        parts.append(
            f'<rect x="{x}" y="{y}" width="{CELL - 2}" height="{ROW - 4}" rx="3" fill="{colour}" '
            f'fill-opacity="{max(0.06, min(share, 1.0)):.2f}"/>'
        )
    return "".join(parts)


def item_line(y: float, item: dict, tokens: int) -> str:
    """A criterion: its weight and name, and where it was found."""
    met, colour = item["verdict"], GREEN if item["weight"] > 0 else RED
    label = text(38, y + 15, f"{item['weight']:+g}", fill=colour if met else GREY, text_anchor="end", font_weight="600")
    label += text(46, y + 15, item["criterion"], fill=INK if met else GREY)
    if not item["alpha"]:
        return label + cells(y, [0.0] * tokens, [GREY] * tokens) + text(LEFT + 8, y + 15, "not met", 12, GREY)
    shades = [0.9 * alpha / max(item["alpha"]) for alpha in item["alpha"]]
    top = max(range(tokens), key=lambda t: item["attribution"][t])
    dot = f'<circle cx="{LEFT + top * CELL + (CELL - 2) / 2}" cy="{y + (ROW - 4) / 2}" r="3.2" fill="#fff"/>'
    return label + cells(y, shades, [colour] * tokens) + dot


def heat_map(prompt: str, row: dict) -> str:
    """The picture as SVG."""
    tokens, rewards = [token.strip() for token in row["tokens"]], row["token_rewards"]
    number, largest = len(tokens), max(abs(r) for r in rewards)
    met = [item for item in row["items"] if item["verdict"]]
    unmet = next(item for item in row["items"] if not item["verdict"] and item["weight"] > 0)
    shown = [item for item in row["items"] if item in met or item is unmet]
    width = LEFT + number * CELL + 16
    body = [
        text(16, 30, "prompt", 12, GREY),
        text(80, 30, prompt, 13, font_family=MONO),
        text(16, 52, "response", 12, GREY),
        text(80, 52, "sampled by the untrained policy; its tokens are the columns", 12, GREY),
    ]
    for column, token in enumerate(tokens):
        x = LEFT + column * CELL + 14
        turn = f"rotate(-58 {x:g} {TOP - 42})"
        body.append(text(x, TOP - 42, token, 12.5, font_family=MONO, transform=turn))
    y = TOP - 36
    body.append(text(16, y + 15, f"usual: one number, {row['reward']:.2f}", 12, GREY))
    body.append(cells(y, [0.5] * number, [GREEN] * number))
    y += ROW + 10
    for item in shown:
        body.append(item_line(y, item, number))
        y += ROW
    y += 10
    body.append(text(16, y + 15, f"reward a token, sum {sum(rewards):.2f}", 12, INK, font_weight="600"))
    body.append(cells(y, [abs(r) / largest for r in rewards], [GREEN if r >= 0 else RED for r in rewards]))
    y += ROW + 8
    legend = "Shade: share of the criterion's credit (alpha, averaged over sentences). "
    legend += "Dot: the token with the largest attribution. Red: a pitfall."
    body.append(text(16, y + 12, legend, 11, GREY))
    height = y + 26
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="{SANS}"><rect width="{width}" height="{height}" rx="8" fill="#fff" stroke="{LINE}"/>'
        + "".join(body)
        + "</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("heatmap.svg"))
    output = parser.parse_args().output
    output.write_text(heat_map(*judged_row()), encoding="utf-8")
    print(output)


if __name__ == "__main__":
    main()
