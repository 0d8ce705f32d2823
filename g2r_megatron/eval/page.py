"""eval.html and compare.html: scores, and responses with their verdicts. They stand alone, and no text in them can act."""

from collections.abc import Sequence
from html import escape

from g2r_megatron.eval.table import COMPARED, HEADINGS, compared_rows, said_of, score_rows
from g2r_megatron.report.page import document, section
from g2r_megatron.report.text import visible

MOST_RESPONSES = 40  # drawn; all are in responses.jsonl
OPEN_CARDS = 2  # shown without a click
NOTES = (
    "HealthBench: points met over points possible, mean over responses, clipped to [0, 1]; a tag of criteria counts only the criteria "
    "that have it. Other data sets: the mean rubric score. Standard error: 1,000 bootstrap samples of the responses."
)


def eval_page(found: dict, records: Sequence[dict]) -> str:
    """The whole HTML document of an evaluation; ``found`` as in eval.json."""
    scores = section("Scores", NOTES, table(HEADINGS, score_rows(found)), charts=False)
    lines = "".join(f"<p>{visible(line)}</p>" for line in said_of(found))
    about = section("Responses and judge", "", lines, charts=False)
    lowest = sorted(records, key=lambda record: record["score"])[:MOST_RESPONSES]
    cards = "".join(card(record, number < OPEN_CARDS) for number, record in enumerate(lowest))
    note = f"The {len(lowest)} of {len(records)} responses with the lowest scores, lowest first."
    responses = section("Lowest scores", note, cards, charts=False)
    headline = "; ".join(
        f"{dataset} {own['score']['mean']:.3f} ± {own['score']['error']:.3f}"
        for dataset, own in found["datasets"].items()
    )
    who = (
        f'<span class="fine">{visible(str(found["policy"]))}, judged by {visible(str(found["judge"]["model"]))}</span>'
    )
    return document("g2r eval", who, visible(headline), scores + about + responses)


def compare_page(a: str, b: str, datasets: dict[str, dict], pairs: Sequence[tuple[float, dict, dict]]) -> str:
    """The whole HTML document of a comparison; ``pairs``: (difference, record of A, record of B), drawn in this order."""
    note = (
        "Rows are paired; a row's score is the mean over its samples. Interval: paired bootstrap over rows. p: twice the share of "
        "bootstrap samples without the sign of the difference."
    )
    scores = section("A against B", note, table(COMPARED, compared_rows(datasets)), charts=False)
    cards = "".join(_pair(*pair, number < OPEN_CARDS) for number, pair in enumerate(pairs))
    changed = section("Rows that changed most", "B minus A; the first sample of each.", cards, charts=False)
    headline = "; ".join(
        f"{dataset} {own['a']:.3f} → {own['b']:.3f} ({own['difference']:+.3f} [{own['low']:+.3f}, {own['high']:+.3f}])"
        for dataset, own in datasets.items()
    )
    who = f'<span class="fine">A: {visible(a)}, B: {visible(b)}</span>'
    return document("g2r eval compare", who, visible(headline), scores + changed)


def _pair(difference: float, a: dict, b: dict, is_open: bool) -> str:
    kind = "good" if difference > 0 else "bad"
    sides = response(a, "A") + response(b, "B")
    return (
        f'<details class="sample"{" open" if is_open else ""}><summary>{visible(str(a["id"]))} <b class="{kind}">{difference:+.2f}</b>'
        f"</summary>{_prompt(a)}{sides}</details>"
    )


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are text; a row whose first one begins with a blank is a part of the row above."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(
        f"<tr{' class=run' * row[0].startswith(' ')}>{''.join(f'<td>{visible(cell)}</td>' for cell in row)}</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def card(record: dict, is_open: bool) -> str:
    """A response as a ``<details>``: the prompt, the response, the verdict of each criterion."""
    tokens = "" if record["length"] is None else f"{record['length']} tokens"
    return (
        f'<details class="sample"{" open" if is_open else ""}><summary>{visible(str(record["id"]))} <b>{record["score"]:.2f}</b> '
        f'<span class="fine">{tokens}</span></summary>'
        f"{_prompt(record)}{response(record)}</details>"
    )


def response(record: dict, name: str = "") -> str:
    """The text of a response and its verdicts, a met criterion of negative weight marked as bad; ``name``: shown before its score."""
    items = "".join(f"<li>{_verdict(item)} {visible(item['criterion'])}</li>" for item in record["items"])
    return (
        f'<div class="strip"><div class="label"><p class="what">{f"{name}: " * bool(name)}score {record["score"]:.3f}</p></div>'
        f'<p class="text">{visible(record["response"])}</p></div><div class="rest"><ul>{items}</ul></div>'
    )


def _prompt(record: dict) -> str:
    text = "\n".join(f"{message['role']}: {message['content']}" for message in record["prompt"])
    return f'<div class="prompt"><p>{visible(text)}</p></div>'


def _verdict(item: dict) -> str:
    good = item["verdict"] == (item["weight"] > 0)
    gold = f", gold judge: {_word(item['gold'])}" if item.get("gold", item["verdict"]) != item["verdict"] else ""
    return f'<b class="{"good" if good else "bad"}">{_word(item["verdict"])}</b>{gold} ({item["weight"]:+g})'


def _word(verdict: bool) -> str:
    return "met" if verdict else "not met"
