"""The marks with which models and chat templates open and close a thought, in text: ``<think>`` and similar ones.

Known are the tags of published templates: ``<think>``, ``<thinking>``, ``<reasoning>``, ``<seed:think>`` and the like,
``[THINK]``, ``<|START_THINKING|>``, ``<|begin_of_thought|>`` and Gemma's ``<|channel>thought``.
"""

import re

_NAME = r"(?:\w+:)?\w*(?:think|thought|reason)\w*"
# an opening mark -> the closing one; the pattern's group is the tag's name
_PAIRS = (
    (rf"<({_NAME})>", "</{}>"),
    (r"\[(THINK|THINKING|REASONING)\]", "[/{}]"),
    (r"<\|START_(THINKING|REASONING)\|>", "<|END_{}|>"),
    (r"<\|begin_of_(thought|thinking)\|>", "<|end_of_{}|>"),
    (r"◁(think)▷", "◁/{}▷"),
)
_CHANNEL = "<|channel>thought", "<channel|>"  # Gemma 4; its marks are also used for other channels
_OPEN = re.compile("|".join([*(pattern for pattern, _ in _PAIRS), f"({re.escape(_CHANNEL[0])})"]))
_CLOSE = re.compile(
    rf"</({_NAME})>|\[/(THINK|THINKING|REASONING)\]|<\|END_(THINKING|REASONING)\|>|<\|end_of_(thought|thinking)\|>|◁/(think)▷"
)


def is_thought_mark(text: str) -> bool:
    """Whether ``text`` is one opening or closing mark and nothing else."""
    return bool(_OPEN.fullmatch(text) or _CLOSE.fullmatch(text))


def closing_mark(opening: re.Match) -> str:
    """The closing mark of a match of an opening one."""
    if opening.lastindex > len(_PAIRS):
        return _CHANNEL[1]
    return _PAIRS[opening.lastindex - 1][1].format(opening[opening.lastindex])


def open_thought(text: str) -> tuple[str, str] | None:
    """(closing mark, text after the opening one) of the last thought in ``text`` that is not closed there; else None."""
    matches = list(_OPEN.finditer(text))
    if not matches:
        return None
    close, rest = closing_mark(matches[-1]), text[matches[-1].end() :]
    return None if close in rest else (close, rest)


def opening_mark(close: str) -> str | None:
    """The mark that opens what ``close`` closes; None for a text that is no closing mark."""
    if close == _CHANNEL[1]:
        return _CHANNEL[0]
    match = _CLOSE.fullmatch(close)
    if match is None:
        return None
    opening = {"</": "<", "[/": "[", "◁/": "◁"}.get(close[:2])
    if opening is not None:
        return opening + close[2:]
    return close.replace("END_", "START_").replace("end_of_", "begin_of_")


def thought_end_of(text: str) -> str | None:
    """The closing mark that a chat template's source or another text speaks of; None if it speaks of none."""
    if match := _CLOSE.search(text):
        return match[0]
    return closing_mark(match) if (match := _OPEN.search(text)) else None


def begins_with_thought(text: str) -> bool:
    """Whether ``text`` opens a thought before anything else."""
    return bool(_OPEN.match(text.lstrip()))


def closed(text: str) -> str:
    """``text`` with the thought closed that is open at its end, as templates write an empty thought; else ``text``."""
    found = open_thought(text)
    if found is None:
        return text
    close, rest = found
    blank = "\n" in rest
    return text + ("\n" * blank + close + "\n\n" * blank)


def without_empty_thought(text: str) -> str:
    """``text`` without the thought, of blanks only, at its end."""
    matches = list(_OPEN.finditer(text))
    if not matches:
        return text
    inside, found, after = text[matches[-1].end() :].partition(closing_mark(matches[-1]))
    return text[: matches[-1].start()] if found and not (inside + after).strip() else text
