"""probe.html: what was measured, and the measured responses sentence by sentence. The page needs no other file. All texts are escaped."""

from html import escape

from g2r_megatron.probe.table import HEADINGS, TITLES, method_rows, said_of_judge
from g2r_megatron.report.heatmap import strip, token_span
from g2r_megatron.report.page import document, section
from g2r_megatron.report.text import visible

MOST_PAIRS = 40  # drawn; the numbers of all are in probe.json
OPEN_CARDS = 2  # shown without a click
NOTES = (
    "Credit of a sentence is the sum of b over its tokens. Masked: what the verdict's margin (a reward model's score) loses when no "
    "later token may look at the sentence; deleted: when its tokens are left out. Spearman: mean over pairs of the rank correlation of "
    "credit and loss, with 95% bootstrap interval over responses; top: share of pairs whose most credited sentence is the one that costs "
    "most. Shuffled is a placebo: the first credit with its sentences in random order. Passes: sequences run forward + backward; * over "
    "the branch alone."
)


def probe_page(found: dict, pairs: list[dict]) -> str:
    """The whole HTML document; ``found`` and ``pairs`` as in probe.json."""
    tables = "".join(
        section(title[0].upper() + title[1:], "" if kind == "false" else NOTES, _table(found[kind]), charts=False)
        for kind, title in TITLES.items()
        if kind in found
    )
    lines = "".join(f"<p>{visible(line)}</p>" for line in said_of_judge(found))
    of_items = "Over all items of the rows that were judged." if "judge" in found else ""
    judge = section("The judge", of_items, lines, charts=False)
    cards = "".join(_card(pair, number < OPEN_CARDS) for number, pair in enumerate(pairs[:MOST_PAIRS]))
    note = (
        "Green: the verdict (of True and False their difference) or the score loses without the sentence, or the credit is positive; "
        "orange: it gains, or the credit is negative. Each strip is on the scale of its largest entry, a token's shade is its sentence's."
    )
    samples = section("Sentence by sentence", note, cards, charts=False)
    model = f'<span class="fine">{visible(str(found["judge_model"]))}</span>'
    return document("g2r probe", model, visible(found["line"]), tables + judge + samples)


def _table(of_verdict: dict) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in HEADINGS)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in method_rows(of_verdict))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _card(pair: dict, is_open: bool) -> str:
    rows = {"masked": pair["masked"], "deleted": pair["deleted"], **pair["credit"]}
    strips = "".join(_strip(name, values, pair) for name, values in rows.items())
    verdict = "" if pair["verdict"] is None else f" <b>{pair['verdict']}</b>"
    return (
        f'<details class="sample"{" open" if is_open else ""}><summary>{visible(str(pair["id"]))}: '
        f"{visible(pair['criterion'])}{verdict}</summary><div class='strips'>{strips}</div></details>"
    )


def _strip(name: str, values: list[float], pair: dict) -> str:
    scale = max(map(abs, values)) or 1.0
    spans = []
    for number, ((low, high), value) in enumerate(zip(pair["sentences"], values, strict=True), 1):
        kind, tip = "good" if value >= 0 else "bad", f"sentence {number} of {len(values)} · {value:+.4g}"
        spans += [token_span(token, kind, abs(value) / scale, tip) for token in pair["tokens"][low:high]]
    label = f'<p class="what">{escape(name)}</p><p class="fine">darkest = ±{scale:.3g}</p>'
    return strip(label, spans, "item")
