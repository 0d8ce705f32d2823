"""Sentences of a response in any language, with places that are exact: the spans of a text, joined, are the text.

Rules follow Unicode's sentence boundaries (UAX 29) and add what answers of language models need: abbreviations, list
numbers, Markdown and code. Sentence libraries want the language of a text first, cut Markdown tables and code inside a
line, or change the text (docs/credit.md names those that were tried).
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

WINDOW_TOKENS = 20  # about so many tokens make a unit of credit where a text has no sentence ends
NEAR = 80  # so many characters around a mark decide whether it ends a sentence

ALWAYS = "。！？｡।॥؟۔։။።᙮។៕"  # full stops of scripts in which they mean nothing else: no blank has to follow
ENDS = ".!?…‼⁇⁈⁉"  # these end a sentence only before a blank
CLOSERS = "\"'”’»«›‹)]}」』】》〉）］｣*_~"  # what closes a sentence stays with it; also Markdown's bold and italics
CLOSED = rf"[{re.escape(CLOSERS)}]*+(?:[ \u00a0\u202f]»(?=\s|$))?"  # French puts a blank before »
BREAK = re.compile(rf"(?<![{ENDS}])[{ENDS}]++{CLOSED}(?=\s|$)|(?:[{ALWAYS}]|．(?!\d))[{ALWAYS}{ENDS}]*+{CLOSED}|\n")
FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})[^\n]*\n.*?(?:^ {0,3}\1[`~]*[ \t]*$|\Z)", re.M | re.S)
# a line that is a list item, a heading, a quotation or a row of a table stands for itself
MARKED_LINE = re.compile(r"[ \t]*(?:[-*+•‣◦·–—]\s|#{1,6}\s|>|\||(?:\d{1,3}|[A-Za-z])[.)]\s|\(\w{1,3}\)\s|\*\*)")
LIST_NUMBER = re.compile(r"[ \t>]*(?:[-*+•]\s+)?[*_]{0,2}(?:\d{1,3}|[A-Za-z]|[ivxIVX]{1,4})\.[*_]{0,2}$")
LAST_WORD = re.compile(r"[^\s(\[{\"'“‘«*_/—–]*$")
DOTTED = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]", re.U)  # e.g, U.S, z.B
# before a word they are no sentence end, whatever follows
TITLES = frozenset(
    """dr mr mrs ms prof st sr mt rev hon gen col capt lt sgt sen rep gov pres vs eg ie cf viz al fig figs eq eqs sec ch vol
    vols pp ed eds trans approx ca resp bzw vgl abb bd nr hr fr frau evtl ggf inkl exkl sog mme mlle dra sra srta sig dott
    avv ing dhr mevr ltda núm pág tel e.g i.e z.b d.h u.a o.g m.a""".split()  # noqa: SIM905
)
# before a small letter or a number they are none
SHORT_FORMS = frozenset(
    """no nos p art min max avg est dept jr inc ltd co corp etc usw
    jan feb mar apr jun jul aug sep sept oct nov dec""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a text. ``ended``: by a sentence's end, and not by a line's or the text's."""

    start: int
    end: int
    ended: bool


def sentences(text: str) -> list[Span]:
    """The sentences of ``text`` in order, without gaps: a span begins where the one before ends. None for "".

    Blanks after a sentence belong to it. A code block is one span; so are a list item's sentences, a heading, a row of
    a table. What holds no letter and no digit (rules, bullets alone) belongs to the span before, at the start to the next.
    """
    spans, start = [], 0
    for fence in FENCE.finditer(text):
        spans += _prose(text[start : fence.start()], start)
        start = fence.end()
        spans.append(Span(fence.start(), start, False))
    return _joined(text, spans + _prose(text[start:], start))


def _prose(text: str, offset: int) -> list[Span]:
    """Spans of ``text``, which holds no code block and begins at ``offset``."""
    has_capitals = any(char.isupper() for char in text)
    spans, start = [], 0
    for match in BREAK.finditer(text):
        at, after, mark = match.start(), match.end(), match[0]
        if at < start:  # among the blanks after the last sentence
            continue
        if mark == "\n":
            is_end = _line_ends(text, at, has_capitals)
        else:
            is_end = mark[0] not in ENDS or _sentence_ends(text, at, mark, has_capitals)
        if is_end:
            after = len(text) - len(text[after:].lstrip())
            spans.append(Span(offset + start, offset + after, mark != "\n"))
            start = after
    return [*spans, Span(offset + start, offset + len(text), False)] if start < len(text) else spans


def _line_ends(text: str, at: int, has_capitals: bool) -> bool:
    """Whether the line break at ``at`` ends a span: not where prose goes on in the next line with a small letter."""
    following = text[at + 1 : at + 1 + NEAR]
    if not has_capitals or not following.strip() or re.match(r"[ \t]*\n", following):
        return True
    indented = following[0] in " \t"  # as a list item goes on in its next line
    if MARKED_LINE.match(following) or (MARKED_LINE.match(_line_before(text, at)) and not indented):
        return True
    return not following.lstrip()[0].islower()


def _sentence_ends(text: str, at: int, mark: str, has_capitals: bool) -> bool:
    """Whether ``mark`` (of ENDS and what closes them) at ``at`` ends a sentence; a blank or nothing follows it."""
    after = at + len(mark)
    line = _line_before(text, after)
    if line.lstrip().startswith("|"):  # a row of a table
        return False
    following = text[after : after + NEAR].lstrip()
    small, stop = bool(following) and following[0].islower(), mark.rstrip(CLOSERS + " \u00a0\u202f")
    goes_on = len(mark) > len(stop) or bool(stop.strip("!?‼⁇⁈⁉"))  # "Really?" she said; well... no
    if small and has_capitals and goes_on:
        return False
    if stop != "." or not following:
        return True
    if LIST_NUMBER.match(line):
        return False
    before = text[max(0, at - NEAR) : at]
    word = LAST_WORD.search(before)[0]
    if len(word) == 1 and word.isupper() and word.isascii():
        return not _is_initial(before[:-1])
    if DOTTED.fullmatch(word) and (word.isupper() or word.lower() in TITLES):  # U.S.; e.g.
        return False
    if DOTTED.fullmatch(word) or word.lower() in SHORT_FORMS:  # 8 a.m.; etc.
        return not (small or following[0].isdigit())
    return word.lower() not in TITLES


def _line_before(text: str, at: int) -> str:
    """What stands between the last line break before ``at`` and ``at``, of a long line its beginning."""
    start = text.rfind("\n", 0, at) + 1
    return text[start : min(at, start + NEAR)]


def _is_initial(before: str) -> bool:
    """Whether a single capital after ``before`` begins a name: at a line's start, after a capital or another short form."""
    words = before.rpartition("\n")[2].split()
    return not words or words[-1][0].isupper() or words[-1].endswith(".")


def _joined(text: str, spans: list[Span]) -> list[Span]:
    """``spans`` with those that hold no letter and no digit joined to the one before, or to the one after at the start."""
    result: list[Span] = []
    for span in spans:
        says_something = any(char.isalnum() for char in text[span.start : span.end])
        first_is_empty = len(result) == 1 and not any(c.isalnum() for c in text[: result[0].end])
        if result and (first_is_empty or not says_something):
            ended = span.ended if first_is_empty else result[-1].ended
            result[-1] = Span(result[-1].start, span.end, ended)
        else:
            result.append(span)
    return result


def sentence_ids(token_texts: list[str]) -> Tensor:
    """Number of each token's sentence, from 0 without gaps: [T] int64.

    ``token_texts``: the text of each token; joined they are the response. A token is of the sentence in which its first
    character that is not blank stands. A stretch of more than 1.5 ``WINDOW_TOKENS`` tokens without sentence end (a code
    block, a text in Thai) is cut into windows of about ``WINDOW_TOKENS`` tokens.
    """
    text = "".join(token_texts)
    spans = sentences(text)
    numbers, at, number = [], 0, 0
    for token in token_texts:
        first = at + len(token) - len(token.lstrip()) if token.strip() else at
        while number + 1 < len(spans) and spans[number].end <= first:
            number += 1
        numbers.append(number)
        at += len(token)
    ids = torch.tensor(numbers, dtype=torch.int64)
    if not numbers:
        return ids
    used, ids, counts = ids.unique_consecutive(return_inverse=True, return_counts=True)
    windows = [
        1 if not spans or spans[span].ended or count <= 1.5 * WINDOW_TOKENS else round(count / WINDOW_TOKENS)
        for span, count in zip(used.tolist(), counts.tolist(), strict=True)
    ]
    place = torch.cat([torch.arange(count) * parts // count for count, parts in zip(counts.tolist(), windows)])
    before = torch.tensor([0, *windows[:-1]]).cumsum(0)  # units of the sentences before
    return before[ids] + place
