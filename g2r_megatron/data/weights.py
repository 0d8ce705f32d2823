"""Reads the weight of a rubric item: a number, a word, or a word in its title. Nothing that may be a weight is ignored."""

import re
from functools import lru_cache

from g2r_megatron.data.fields import Fields
from g2r_megatron.errors import UserError, warn

# Weights in words (RaR, arXiv 2507.17746); what meeting a pitfall means depends on the data set.
WORDS = {"essential": 1.0, "important": 0.7, "optional": 0.3}
PITFALL, PITFALL_WEIGHT = "pitfall", 0.9
WORD = rf"({'|'.join([*WORDS, PITFALL])})s?(?:\s+criteri(?:a|on))?"
WHOLE_WORD = re.compile(rf"\W*{WORD}\W*", re.IGNORECASE)
# "Pitfall Criteria: ..." or "[Optional] ..." opening a criterion
OPENING_WORD = re.compile(rf"\W*{WORD}[\s*_]*[:\])]", re.IGNORECASE)
# "[+5] ...", "(3 points) ..." or "... (3 points)": points that stand in the text
POINTS = (
    r"[\[(]\s*(?:[+\-−]\s*\d+(?:\.\d+)?(?:\s*(?:points?|pts?|marks?))?|\d+(?:\.\d+)?\s*(?:points?|pts?|marks?))\s*[\])]"
)
POINTS_IN_TEXT = re.compile(rf"\W*{POINTS}|.*{POINTS}\W*\Z", re.IGNORECASE | re.DOTALL)
SCORE = "score"  # a weight where nothing else is; beside a weight it is the result of an earlier judgement
# Fields that may name one of the words.
LABELS = ("title", "type", "category", "tags", "name", "priority", "level", "kind", "label", "group", "section")
# Fields that say whether meeting the item is bad, and their values that say so.
SIGNS: dict[tuple[str, ...], frozenset[str]] = {
    (
        "negative",
        "is_negative",
        "pitfall",
        "is_pitfall",
        "is_penalty",
        "reversed",
        "is_reversed",
        "inverted",
    ): frozenset({"true", "yes", "1"}),
    ("positive", "is_positive", "desirable", "is_desirable"): frozenset({"false", "no", "0"}),
    ("polarity", "sign", "direction", "type", "category", "kind"): frozenset(
        {"negative", "penalty", "undesirable", "-", "-1", "minus"}
    ),
}
SIGN_NAMES = tuple(dict.fromkeys(name for names in SIGNS for name in names))
# Words in the name of a field that make it look like a weight.
WEIGHTY = frozenset(
    (
        *("weight", "weights", "weighting", "weightage", "point", "points", "pts", "importance", "important"),
        *("priority", "worth", "penalty", "mark", "marks", "coefficient", "coef"),
    )
)
# Words in the name of a field that make it a result.
RESULTS = frozenset(("awarded", "earned", "achieved", "obtained", "received"))
# A list of items beside the rubric
BAD_ITEMS = re.compile(r"(negative|neg)_?(rubrics?|criteria|items)|pitfalls|penalties|deductions", re.IGNORECASE)
NAME_PARTS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
HARMLESS = {"id", "index", "idx", "check"}  # fields of an item that say nothing about its weight


class WrongPolarity(UserError):
    """``data.polarity`` does not fit the data as a whole, so no single row is at fault."""


class WeightReader:
    """Reads the weights of rubric items, and counts those that have none."""

    def __init__(self, names: dict[str, tuple[str, ...]], polarity: str | None, mapped: bool):
        """``names``: see ``rows.NAMES``; ``mapped``: data.fields says which field is the weight."""
        self.names, self.polarity, self.mapped = names["weight"], polarity, mapped
        self._known = {*names["weight"], *names["criterion"], *names["tags"], *HARMLESS}
        self._criteria = names["criterion"]
        self.items = self.without = 0
        self._example: list[str] = []  # fields of the first item without a weight

    def weight(self, item: Fields, criterion: str) -> float:
        """The weight of ``item``, whose text is ``criterion``."""
        self.items += 1
        there = item.there(self.names)
        label = None if self.mapped and there else self._label(item, criterion)
        if there:
            weight = self._given(item, there)
        elif label is not None:
            weight = self._of_word(item, *label)
        else:
            weight = self._missing(item, criterion)
        if weight > 0 and self.polarity is None and not (self.mapped and there):
            _check_sign(item, label)
        return weight

    def refuse_lists(self, row: Fields, items: list[Fields]) -> None:
        """Raise ``UserError`` for weights that stand in a list of their own, or items in a second list for bad ones."""
        for name, value in _with_inner(row.data):
            if not isinstance(value, list) or not value:
                continue
            last = name.rpartition(".")[2]
            if BAD_ITEMS.fullmatch(last):
                raise row.fail(name, "it stands beside the rubric and would not be read: put all items into one list")
            unweighted = not any(item.there(self.names) for item in items)
            if unweighted and _is_weighty(last) and len(value) == len(items):
                raise row.fail(name, "it may be the weights: give each item of the rubric its own")

    def warn(self) -> None:
        """Say once how many items had no weight, where that may not be meant."""
        other = [name for name in self._example if name not in self._known]
        if self.without < self.items and self.without:
            warn(f"{self.without} of {self.items} rubric items have no weight: they weigh 1")
        elif self.without and other:
            name = "map another name with data.fields: {weight: NAME}"
            warn(f"no rubric item has a weight (fields {self._example}): each weighs 1; {name}")

    def _given(self, item: Fields, there: list[str]) -> float:
        if len(there) > 1 and SCORE in there:
            there.remove(SCORE)
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
        if isinstance(value, str) and (match := WHOLE_WORD.fullmatch(value)):
            return self._of_word(item, name, match[1].lower())
        try:
            return item.number(name)
        except UserError as error:
            if not isinstance(value, str):
                raise
            remedy = f"it must be a finite number, or one of {', '.join([*WORDS, PITFALL])}"
            raise item.fail(name, remedy) from error

    def _of_word(self, item: Fields, name: str, word: str) -> float:
        if word != PITFALL:
            return WORDS[word]
        if self.polarity is None:
            remedy = (
                "the sign depends on the data set: with data.polarity=raw meeting it is a fault (-.9), with flip_negated"
                ' it is good where the criterion begins with "does not ..." (+.9)'
            )
            raise item.fail(name, remedy)
        return -PITFALL_WEIGHT

    def _label(self, item: Fields, criterion: str) -> tuple[str, str] | None:
        """The field that names one of the words, and the word. Raises ``UserError`` where two name different ones."""
        found = [(name, word) for name in item.there(LABELS) for word in _words(item.get(name))]
        if match := OPENING_WORD.match(criterion):
            name = next((name for name, value in item.data.items() if value == criterion), "criterion")
            found.append((name, match[1].lower()))
        for name, word in found[1:]:
            if word != found[0][1]:
                raise item.fail(name, f"it differs from {found[0][0]}: one item is of one kind")
        return found[0] if found else None

    def _missing(self, item: Fields, criterion: str) -> float:
        """1, unless a field that we do not know looks like a weight, or the text holds points."""
        if POINTS_IN_TEXT.match(criterion):
            name = item.first(self._criteria) or "criterion"
            raise item.fail(name, "it holds its points: give them in a field of their own, such as weight")
        self.without += 1
        self._example = self._example or list(item.data)
        for name, value in _with_inner(item.data):
            is_set = (
                value is not None and value is not False and isinstance(value, bool | int | float | str) and value != ""
            )
            if is_set and name not in self._known and _is_weighty(name.rpartition(".")[2]):
                remedy = f"it may be the weight: say so with data.fields: {{weight: {name}}}, or leave the field out"
                raise item.fail(name, remedy)
        return 1.0


def _check_sign(item: Fields, label: tuple[str, str] | None) -> None:
    """Raise ``UserError`` for an item with a positive weight that is called bad."""
    remedy = (
        "its weight is positive: give it the sign that is meant, or keep the numbers as they are with data.polarity=raw"
    )
    if label is not None and label[1] == PITFALL:
        raise item.fail(label[0], remedy)
    for name in item.there(SIGN_NAMES):
        value = str(item.get(name)).strip().lower()
        if any(name in names and value in bad for names, bad in SIGNS.items()):
            raise item.fail(name, remedy)


def _words(value) -> list[str]:
    """The weight words among the texts of a label."""
    texts = value if isinstance(value, list) else [value]
    return [word for text in texts if isinstance(text, str) and (word := _word(text))]


@lru_cache(maxsize=4096)
def _word(text: str) -> str | None:
    """The weight word that ``text`` is. Cached, because labels recur."""
    match = WHOLE_WORD.fullmatch(text)
    return match[1].lower() if match else None


@lru_cache(maxsize=4096)
def _is_weighty(name: str) -> bool:
    parts = {part.lower() for part in NAME_PARTS.findall(name)}
    return not parts & RESULTS and (bool(parts & WEIGHTY) or {"max", "score"} <= parts)


def _with_inner(data: dict):
    """The fields of an object and of the objects in it, by dotted names."""
    for name, value in data.items():
        yield name, value
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", part) for inner, part in value.items())
