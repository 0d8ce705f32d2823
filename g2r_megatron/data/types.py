"""What a training query is: a conversation and the rubric its answer is judged by."""

from dataclasses import dataclass, field, replace
from typing import Literal

Dataset = Literal["g2r", "healthbench", "rar", "researchqa", "verifiable"]


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class Given:
    """What the output line of a judged row repeats of the row: its id as it was, earlier scores and labels.

    ``choice`` counts the responses of a row that has several. ``items``: earlier results of each rubric item.
    """

    id: str | int | float
    choice: int | None = None
    fields: dict = field(default_factory=dict)
    items: tuple[dict, ...] = ()

    def answered(self, query: "Query", choice: int | None, response: str) -> "Query":
        """``query`` with one of the row's responses, and its number where there are several."""
        return replace(query, response=response, given=replace(self, choice=choice))


@dataclass(frozen=True, slots=True)
class Query:
    """A conversation (``messages`` as ``{"role", "content"}``) with its rubric, which may be empty for a reward model.

    ``response`` and ``given`` are set only in files of responses to be judged (``g2r judge``). ``tags``: of the row as a
    whole (HealthBench's ``example_tags``). ``dataset``: what the row's field names say it is of; it decides how scores
    are averaged (eval/scoring.py). ``answer``: of a row whose reward a verifier decides; its rubric is then one item, what
    the judge is asked.
    """

    id: str
    messages: tuple[dict, ...]
    rubric: tuple[RubricItem, ...]
    reference: str | None = None
    response: str | None = None
    given: Given | None = None
    tags: tuple[str, ...] = ()
    dataset: Dataset = "g2r"
    answer: str | None = None

    @property
    def positive_weight(self) -> float:
        """sum_k max(w_k, 0): the denominator of the rubric score; > 0 by validation if there is a rubric."""
        return sum(max(item.weight, 0.0) for item in self.rubric)
