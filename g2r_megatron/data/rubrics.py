"""The rubric of a row, however a project writes it: where its items are, what a criterion is called, what it weighs."""

import re
import sys

from g2r_megatron.data.fields import Fields, decoded
from g2r_megatron.data.types import RubricItem
from g2r_megatron.errors import UserError

# Weights in words (RaR, arXiv 2507.17746); what meeting a pitfall means depends on the data set.
WORDS = {"essential": 1.0, "important": 0.7, "optional": 0.3}
PITFALL, PITFALL_WEIGHT = "pitfall", 0.9
SCORE = "score"  # a weight where nothing else is; beside a weight it is the result of an earlier judgement
GROUND_TRUTH = "reward_model.ground_truth"  # an answer, or a list of items
ITEMS = ("rubrics", "rubric", "criteria", "items")  # of an object that holds the list
# "does not ..." opening a criterion, after a title such as RaR's "Pitfall Criteria:"
NEGATED = re.compile(
    r"^\s*(\w+ criteria:\s*)?(does\s+not|doesn['’]t|do\s+not|don['’]t|never|avoids?|refrains?)\b", re.IGNORECASE
)


class WrongPolarity(UserError):
    """``data.polarity`` does not go with the data: no matter of a single row."""


class RubricReader:
    """Reads the rubrics of rows with the field names and the polarity that were chosen."""

    def __init__(self, names: dict[str, tuple[str, ...]], polarity: str | None):
        """``names``: of ``rubric``, ``criterion``, ``weight``, ``tags``; see ``rows.NAMES``."""
        self.names, self.polarity = names, polarity

    def read(self, row: Fields, required: bool) -> tuple[list[RubricItem], list[Fields]]:
        """The items, and the objects that they were read from; both empty where there is no rubric and none is required."""
        name = self._place(row)
        if name is None:
            if required:
                raise row.nothing("rubric", self.names["rubric"])
            return [], []
        sources = self._items(row, name)
        items = [self._item(source) for source in sources]
        if sum(max(item.weight, 0.0) for item in items) <= 0:
            found = "no rubric item has a positive weight"
            raise UserError(row.where, found, "the score divides by their sum: give at least one")
        return items, sources

    def has_rubric(self, row: Fields) -> bool:
        """Whether there is one, good or bad."""
        return self._place(row) is not None

    def _place(self, row: Fields) -> str | None:
        """The field that holds the rubric; a second one must hold the same."""
        there = row.there(self.names["rubric"])
        if GROUND_TRUTH in there and not isinstance(decoded(row.get(GROUND_TRUTH)), list):
            there.remove(GROUND_TRUTH)
        full = [name for name in there if decoded(row.get(name))] or there
        for other in full[1:]:
            if decoded(row.get(other)) != decoded(row.get(full[0])):
                raise row.fail(other, f"it differs from {full[0]}: choose one with data.fields: {{rubric: {full[0]}}}")
        return full[0] if full else None

    def _items(self, row: Fields, name: str) -> list[Fields]:
        value = decoded(row.get(name))
        if isinstance(value, dict):
            inner = next((inner for inner in ITEMS if isinstance(decoded(value.get(inner)), list)), None)
            if inner is not None:
                name, value = f"{name}.{inner}", decoded(value[inner])
            elif value and all(type(weight) in (int, float) for weight in value.values()):  # {criterion: weight}
                value = [{"criterion": text, "weight": weight} for text, weight in value.items()]
            elif value and all(isinstance(item, dict) for item in value.values()):  # {name: item}
                value = [{"name": key, **item} for key, item in value.items()]
        if not isinstance(value, list) or not value:
            raise row.fail(name, "it must be a list of criteria (objects or texts) that is not empty")
        texts = all(isinstance(decoded(item), str) for item in value)
        return [row.element(name, i, {"criterion": item} if texts else item) for i, item in enumerate(value)]

    def _item(self, item: Fields) -> RubricItem:
        text = self._criterion(item)
        weight = self._weight(item)
        if weight < 0 and self.polarity == "flip_negated" and NEGATED.match(text):
            weight = -weight
        return RubricItem(text, weight, read_tags(item, self.names["tags"]), _check(item))

    def _criterion(self, item: Fields) -> str:
        """A title or name is the criterion only where there is no other text (``names`` end with them)."""
        there = item.there(self.names["criterion"])
        if not there:
            raise item.nothing("criterion", self.names["criterion"])
        texts = [name for name in there if name not in ("title", "name")]
        for other in texts[1:]:
            if item.get(other) != item.get(texts[0]):
                remedy = f"say which the judge is to read with data.fields: {{criterion: {other}}}"
                raise item.fail(other, f"it is there beside {texts[0]}: {remedy}")
        return item.text(there[0])

    def _weight(self, item: Fields) -> float:
        there = item.there(self.names["weight"])
        if len(there) > 1 and SCORE in there:
            there.remove(SCORE)
        if not there:
            return 1.0
        if there[0] == "points" and self.polarity == "flip_negated":
            raise WrongPolarity(
                "data.polarity",
                f"flip_negated, but {item.where} is HealthBench",
                "set it to raw: a met item with negative points is a fault",
            )
        weights = [self._number(item, name) for name in there]
        for name, weight in zip(there, weights):
            if weight != weights[0]:
                raise item.fail(name, f"it differs from {there[0]}: choose one with data.fields: {{weight: {name}}}")
        return weights[0]

    def _number(self, item: Fields, name: str) -> float:
        value = item.get(name)
        if not isinstance(value, str):
            return item.number(name)
        word = value.strip().lower().removesuffix("criteria").strip()
        if word == PITFALL and self.polarity is None:
            remedy = (
                "the sign depends on the data set: with data.polarity=raw meeting it is a fault (-.9), with flip_negated"
                ' it is good where the criterion begins with "does not ..." (+.9)'
            )
            raise item.fail(name, remedy)
        if word == PITFALL:
            return -PITFALL_WEIGHT
        if word in WORDS:
            return WORDS[word]
        try:
            return item.number(name)
        except UserError as error:
            remedy = f"it must be a finite number, or one of {', '.join([*WORDS, PITFALL])}"
            raise item.fail(name, remedy) from error


def read_tags(item: Fields, names: tuple[str, ...]) -> tuple[str, ...]:
    """An optional list of texts, one text, or an object of them; most tags recur, so equal ones are one object."""
    name = item.first(names)
    value = decoded(item.get(name)) if name else None
    if isinstance(value, dict):
        value = [f"{key}:{tag}" for key, tag in value.items() if tag is not None]
    values = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(tag, str) for tag in values):
        raise item.fail(name, "it must be a list of texts")
    return tuple(sys.intern(tag) for tag in values)


def _check(item: Fields) -> str | None:
    pattern = item.optional_text("check")
    if pattern is not None:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise item.fail("check", f"it must be a regular expression ({error})") from error
    return pattern
