"""The final answer of a response: in its last \\boxed{}, or after its last ####. Text of a response is data."""

import re

BOXES = re.compile(r"\\(?:boxed|fbox)\s*\{")
HASHES = re.compile(r"####[ \t]*([^\n]*)")
LETTER = re.compile(r"\(?\s*([A-Za-z])\s*[).:]?(?:\s.*)?", re.DOTALL)
AROUND = " \t\r\n$.,;"


def final_answer(text: str) -> str | None:
    """What stands in the last \\boxed{} or after the last ####, whichever comes later; None without either.

    A box that is not closed is none.
    """
    found = [(match.start(), match[1].strip()) for match in HASHES.finditer(text)]
    for match in BOXES.finditer(text):
        if (inside := _to_closing_brace(text, match.end())) is not None:
            found.append((match.start(), inside.strip()))
    return max(found, key=lambda one: one[0])[1] if found else None


def _to_closing_brace(text: str, start: int) -> str | None:
    depth = 1
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0) if text[at - 1] != "\\" else 0
        if not depth:
            return text[start:at]
    return None


def plain(answer: str) -> str:
    """An answer without what people write around it: dollars, blanks, a full stop, \\text{}."""
    match = re.fullmatch(r"\\(?:text|mathrm|textbf)\s*\{([^{}]*)\}", answer.strip(AROUND))
    return (match[1] if match else answer).strip(AROUND)


def letter(answer: str) -> str | None:
    """The choice that an answer names: B of "B", "(b)", "B. the second one"; None for anything else."""
    match = LETTER.fullmatch(plain(answer))
    return match[1].upper() if match else None
