"""The sentences and words that got most of a criterion's credit, in all responses of the runs' samples."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape

from g2r_megatron.credit.sentences import sentences
from g2r_megatron.report.charts import slot_class
from g2r_megatron.report.heatmap import attributed
from g2r_megatron.report.runs import Group
from g2r_megatron.report.text import visible

MOST_CRITERIA, MOST_SENTENCES, MOST_WORDS = 10, 3, 8
LONGEST = 160  # characters of a sentence that are shown
WORD = re.compile(r"\w+(?:['’-]\w+)*")


@dataclass
class Credited:
    """A sentence or word, and its credit for one criterion, summed over the ``responses`` that have it.

    ``even``: the credit that it would have if all tokens of a response had the same.
    """

    text: str
    responses: int = 0
    credit: float = 0.0
    even: float = 0.0

    @property
    def above_even(self) -> float:
        """Its credit minus that of a flat attribution. Texts are sorted by this."""
        return self.credit - self.even


@dataclass
class CriterionCredit:
    """Which sentences and words have the credit of one criterion. ``responses``: in how many samples it was attributed."""

    criterion: str
    weight: float
    responses: int = 0
    sentences: dict[str, Credited] = field(default_factory=dict)
    words: dict[str, Credited] = field(default_factory=dict)


def credit_by_criterion(group: Group) -> list[CriterionCredit]:
    """The criteria of all samples of the group's runs. Those that were attributed most often come first."""
    found: dict[str, CriterionCredit] = {}
    for sample in (sample for run in group.runs for sample in run.samples):
        for item in attributed(sample):
            own = found.setdefault(item["criterion"], CriterionCredit(item["criterion"], item["weight"]))
            own.responses += 1
            _add(own, sample["tokens"], item["alpha"])
    return sorted(found.values(), key=lambda own: (-own.responses, -abs(own.weight), own.criterion))


def _add(own: CriterionCredit, tokens: Sequence[str], alpha: Sequence[float]) -> None:
    text, credit = "".join(tokens), character_credit(tokens, alpha)
    even = character_credit(tokens, [1 / len(alpha)] * len(alpha))
    words = ((match[0].casefold(), *match.span()) for match in WORD.finditer(text))
    for table, parts in ((own.sentences, _sentences(text)), (own.words, words)):
        seen = set()
        for name, start, end in parts:
            entry = table.setdefault(name, Credited(name))
            entry.responses += name not in seen
            entry.credit += sum(credit[start:end])
            entry.even += sum(even[start:end])
            seen.add(name)


def _sentences(text: str) -> Iterator[tuple[str, int, int]]:
    for span in sentences(text):
        if name := " ".join(text[span.start : span.end].split()):
            yield name, span.start, span.end


def character_credit(tokens: Sequence[str], alpha: Sequence[float]) -> list[float]:
    """The credit of each character: the token's alpha divided by the number of its characters that are not blank.

    Blank characters get 0. If all characters of a token are blank, each gets the same share.
    """
    credit: list[float] = []
    for token, value in zip(tokens, alpha, strict=False):  # the stop token has an alpha and no text
        counted = [not character.isspace() for character in token]
        counted = counted if any(counted) else [True] * len(token)
        credit += [value * counts / sum(counted) for counts in counted]
    return credit


def most_credited(entries: dict[str, Credited], most: int) -> list[Credited]:
    """The ``most`` entries with the largest ``above_even``, those above 0 only."""
    ranked = sorted(entries.values(), key=lambda entry: (-entry.above_even, entry.text))
    return [entry for entry in ranked[:most] if entry.above_even > 0]


def credited_cards(groups: Sequence[Group]) -> str:
    """HTML: for each group, the criteria with most attributed responses. Empty if nothing was attributed."""
    parts = ""
    for group in groups:
        found = credit_by_criterion(group)
        if not found:
            continue
        strips = "".join(_strip(own) for own in found[:MOST_CRITERIA])
        parts += (
            f'<details class="sample" open><summary><span class="chip {slot_class(group.slot)}">{escape(group.label)}</span> '
            f"{min(len(found), MOST_CRITERIA)} of {len(found)} criteria, those attributed most often</summary>{strips}</details>"
        )
    return parts


def _strip(own: CriterionCredit) -> str:
    kind = "good" if own.weight >= 0 else "bad"
    label = (
        f'<p class="what">{visible(own.criterion)}</p><p class="fine"><b class="{kind}">{own.weight:+g}</b> · '
        f"{own.responses} responses</p>"
    )
    words = " ".join(
        f'<span class="word">{visible(word.text)} <small>{word.credit / word.even:.1f}×</small></span>'
        for word in most_credited(own.words, MOST_WORDS)
    )
    lines = "".join(_sentence(entry) for entry in most_credited(own.sentences, MOST_SENTENCES))
    return f'<div class="strip"><div class="label">{label}</div><div class="credited"><ul>{lines}</ul><p>{words}</p></div></div>'


def _sentence(entry: Credited) -> str:
    text = entry.text if len(entry.text) <= LONGEST else entry.text[: LONGEST - 1] + "…"
    times = f", in {entry.responses} responses" if entry.responses > 1 else ""
    share = entry.credit / entry.responses
    return (
        f'<li>{visible(text)} <span class="fine">{share:.0%} of the credit, {entry.credit / entry.even:.1f}× even{times}'
        "</span></li>"
    )
