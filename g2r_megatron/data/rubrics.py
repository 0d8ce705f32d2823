"""Reads the rubric of a row in the forms of many projects: its items, their criteria and their weights."""

import re
import sys
from collections.abc import Collection

from g2r_megatron.data.fields import Fields, decoded
from g2r_megatron.data.types import RubricItem
from g2r_megatron.data.weights import WHOLE_WORD, WeightReader
from g2r_megatron.errors import UserError

GROUND_TRUTH, STYLE = "reward_model.ground_truth", "reward_model.style"  # an answer, or a list of items
NO_CRITERION = re.compile(
    r"[a-z]+(_[a-z0-9]+)+|weights?|points?|scores?|scale|min|max|total|threshold|version|id|index"
)
TEST_CASE = {"text", "name", "title"}  # may as well be fields of test cases
SCALE = re.compile(r"score_?\d")
ITEMS = ("rubrics", "rubric", "criteria", "items")  # of an object that holds the list
# "does not ..." opening a criterion, after a title such as RaR's "Pitfall Criteria:"
NEGATED = re.compile(
    r"^\s*(\w+ criteria:\s*)?(does\s+not|doesn['’]t|do\s+not|don['’]t|never|avoids?|refrains?)\b", re.IGNORECASE
)


class RubricReader:
    """Reads the rubrics of rows with the field names and the polarity that were chosen."""

    def __init__(self, names: dict[str, tuple[str, ...]], polarity: str | None, mapped: Collection[str] = ()):
        """``names``: of ``rubric``, ``criterion``, ``weight``, ``tags``; see ``rows.NAMES``. ``mapped``: roles of data.fields."""
        self.names, self.polarity, self.mapped = names, polarity, mapped
        self.weights = WeightReader(names, polarity, "weight" in mapped)
        self.found: set[str] = set()  # roles of items that some item has

    def read(self, row: Fields, required: bool) -> tuple[list[RubricItem], list[Fields]]:
        """The items, and the objects that they were read from; both empty where there is no rubric and none is required."""
        name = self._place(row)
        if name is None:
            if required:
                raise row.nothing("rubric", self.names["rubric"])
            return [], []
        sources = self._items(row, name)
        self.found |= {role for role in self.mapped if any(source.there(self.names[role]) for source in sources)}
        self.weights.refuse_lists(row, sources)
        items = [self._item(source) for source in sources]
        if sum(max(item.weight, 0.0) for item in items) <= 0:
            found = "no rubric item has a positive weight"
            raise UserError(row.where, found, "the score divides by their sum: give at least one")
        return items, sources

    def has_rubric(self, row: Fields) -> bool:
        """Whether the row has a rubric, valid or not."""
        return self._place(row) is not None

    def _place(self, row: Fields) -> str | None:
        """The field that holds the rubric; a second one must hold the same."""
        there = row.there(self.names["rubric"])
        if GROUND_TRUTH in there and "rubric" not in self.mapped and not self._is_rubric(row):
            there.remove(GROUND_TRUTH)
        full = [name for name in there if decoded(row.get(name))] or there
        for other in full[1:]:
            if decoded(row.get(other)) != decoded(row.get(full[0])):
                raise row.fail(other, f"it differs from {full[0]}: choose one with data.fields: {{rubric: {full[0]}}}")
        return full[0] if full else None

    def _is_rubric(self, row: Fields) -> bool:
        """Whether the ground truth holds items and not accepted answers: texts may be either, so their style decides."""
        value = decoded(row.get(GROUND_TRUTH))
        if isinstance(value, dict):
            value = next((decoded(value[inner]) for inner in ITEMS if inner in value), None)
        if not isinstance(value, list) or not value:
            return False
        items = [decoded(item) for item in value]
        return row.get(STYLE) == "rubric" or all(
            isinstance(item, dict) and set(item) & (set(self.names["criterion"]) - TEST_CASE) for item in items
        )

    def _items(self, row: Fields, name: str) -> list[Fields]:
        criterion, weight = self.names["criterion"][0], self.names["weight"][0]
        value = decoded(row.get(name))
        if isinstance(value, dict):
            lists = [inner for inner in ITEMS if isinstance(decoded(value.get(inner)), list) and decoded(value[inner])]
            inner = lists[0] if lists else None
            if len(lists) > 1 and decoded(value[lists[1]]) != decoded(value[lists[0]]):
                raise row.fail(name, f"{lists[0]} and {lists[1]} differ: put all items into one list")
            if inner is not None:
                name, value = f"{name}.{inner}", decoded(value[inner])
            elif self._is_item(value):
                value = [value]
            elif value and all(map(_is_weight, value.values())):  # {criterion: weight}
                _refuse_names(row, name, value)
                value = [{criterion: text, weight: number} for text, number in value.items()]
            elif value and all(isinstance(item, dict) for item in value.values()):  # {name: item}
                value = [{"name": key, **item} for key, item in value.items()]
        if not isinstance(value, list) or not value:
            raise row.fail(name, "it must be a list of criteria (objects or texts) that is not empty")
        texts = all(isinstance(decoded(item), str) for item in value)
        return [row.element(name, i, {criterion: item} if texts else item) for i, item in enumerate(value)]

    def _is_item(self, value: dict) -> bool:
        """Whether an object is a single item, and no scale that describes each score."""
        texts = [name for name in self.names["criterion"] if name not in ("title", "name")]
        return any(isinstance(value.get(name), str) for name in texts) and not any(map(SCALE.match, value))

    def _item(self, item: Fields) -> RubricItem:
        text = self._criterion(item)
        weight = self.weights.weight(item, text)
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


def _is_weight(value) -> bool:
    return type(value) in (int, float) or (isinstance(value, str) and bool(WHOLE_WORD.fullmatch(value)))


def _refuse_names(row: Fields, name: str, value: dict) -> None:
    """Raise ``UserError`` for numbers by the names of fields, such as a lowest and a highest score: no criteria."""
    for key in value:
        if NO_CRITERION.fullmatch(key):
            raise row.fail(name, f"{key!r} is the name of a field and no criterion: give a list of criteria")


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
