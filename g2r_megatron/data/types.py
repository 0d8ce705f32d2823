"""What a training query is: a conversation and the rubric its answer is judged by."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RubricItem:
    """One criterion. ``weight`` < 0 marks a pitfall (docs/method.md: c_k, w_k).

    ``check`` is an optional regular expression that decides the item programmatically: the item is
    truly met when ``re.search(check, response)`` matches, and the match's groups (the whole match if
    there are none) are the key characters. It exists for tasks with a known truth and never reaches the judge.
    """

    criterion: str
    weight: float
    tags: tuple[str, ...] = ()
    check: str | None = None


@dataclass(frozen=True)
class Query:
    """A conversation (``messages`` as ``{"role", "content"}``) with its rubric, which may be empty for a reward model.

    ``response`` is set only in files of responses to be judged (``g2r judge``).
    """

    id: str
    messages: tuple[dict, ...]
    rubric: tuple[RubricItem, ...]
    reference: str | None = None
    response: str | None = None

    @property
    def positive_weight(self) -> float:
        """sum_k max(w_k, 0): the denominator of the rubric score; > 0 by validation if there is a rubric."""
        return sum(max(item.weight, 0.0) for item in self.rubric)
