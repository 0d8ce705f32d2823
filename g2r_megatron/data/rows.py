"""Turns one row of any project into a ``Query``. Says which fields hold what, and their names.

Every role has a list of names under which public data sets and projects publish it, in the order in which they are
looked for. ``data.format`` fixes the names of one data set, ``data.fields`` those of single roles.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from g2r_megatron.data.conversations import (
    MATERIAL,
    Messages,
    is_rendered,
    media_mark,
    read_conversation,
    refuse_other_media,
)
from g2r_megatron.data.fields import MISSING, Fields, decoded
from g2r_megatron.data.responses import NAMES as RESPONSE_NAMES
from g2r_megatron.data.responses import has_responses, kept, read_responses
from g2r_megatron.data.rubrics import RubricReader, read_tags
from g2r_megatron.data.types import Dataset, Given, Query, RubricItem
from g2r_megatron.errors import UserError, warn

# Where each role is looked for; a dot leads into an object. Names of a rubric's items are those inside an item.
NAMES: dict[str, tuple[str, ...]] = {
    "prompt": (
        *("prompt", "messages", "question", "query", "instruction", "conversations", "conversation", "problem"),
        *("body.messages", "input"),
    ),
    "system": ("system_prompt", "system"),
    "rubric": (
        *("rubric", "rubrics", "criteria", "reward_model.rubrics", "reward_model.rubric", "reward_model.ground_truth"),
        *("extra_info.rubrics", "extra_info.rubric", "extra_info.reward_model.rubrics", "metadata.rubrics"),
        *("metadata.rubric", "info.rubrics", "info.rubric", "checklist", "rubric_items"),
    ),
    "criterion": (
        *("criterion", "description", "rubric_item", "criteria", "requirement", "criterion_description", "text"),
        *("expected_outcome", "content.property.description", "title", "name"),
    ),
    "weight": (
        *(
            "points",
            "weight",
            "criterion_weight",
            "importance",
            "max_points",
            "max_score",
            "point_value",
            "rubric_weight",
        ),
        *("item_weight", "weightage", "score"),
    ),
    "tags": ("tags", "title", "type", "category", "name"),
    "id": (
        *("custom_id", "id", "prompt_id", "question_id", "uid", "uuid", "example_id", "task_id", "extra_info.id"),
        "request_id",
    ),
    "reference": (
        *("reference", "reference_answer", "ideal_completions_data.ideal_completion", "reward_model.ground_truth"),
    ),
    "answer": ("answer", "final_answer", "expected_answer", "reward_model.ground_truth"),
    "response": RESPONSE_NAMES,
}
# Of results alone: Gemini's batches, Bedrock's, lm-eval's samples.
RESULT_IDS = ("key", "recordId", "doc_id")
OWN_PART = "leave it out of the row, or judge the rows as they are, without `queries`"
# The names of one data set, for data.format.
FORMATS: dict[str, dict[str, tuple[str, ...]]] = {
    "g2r": {"prompt": ("prompt",), "rubric": ("rubric",), "criterion": ("criterion",), "weight": ("weight",)},
    "healthbench": {
        "prompt": ("prompt",),
        "rubric": ("rubrics", "reward_model.rubrics"),
        "criterion": ("criterion",),
        "weight": ("points",),
    },
    "rar": {"prompt": ("question",), "rubric": ("rubric",), "criterion": ("description",), "weight": ("weight",)},
    "researchqa": {"prompt": ("query",), "rubric": ("rubric",), "criterion": ("rubric_item",)},
    "verifiable": {},
}


# Tags of the row as a whole, and the field of a rubric's items that tells a data set.
EXAMPLE_TAGS = ("example_tags", "extra_info.example_tags")
DATASET_FIELDS: dict[Dataset, str] = {"healthbench": "points", "rar": "description", "researchqa": "rubric_item"}


def dataset_of(row: Fields, items: Sequence[Fields]) -> Dataset:
    """Which published data set has such field names; "g2r" for any other row."""
    prompt = {"rar": "question", "researchqa": "query"}
    for dataset, name in DATASET_FIELDS.items():
        if items and items[0].has(name) and (dataset not in prompt or row.has(prompt[dataset])):
            return dataset
    return "g2r"


def names_of(format: str, fields: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """The names of every role with ``data.format`` and ``data.fields`` applied."""
    unknown = sorted(set(fields) - set(NAMES))
    if unknown:
        raise UserError("data.fields", f"no field {unknown[0]!r} to map", f"map some of {', '.join(NAMES)}")
    return NAMES | FORMATS.get(format, {}) | {role: (path,) for role, path in fields.items()}


class RowReader:
    """Turns rows into queries, with the names and the polarity that were chosen."""

    def __init__(
        self,
        format: str,
        polarity: str | None,
        fields: dict[str, str],
        require_rubric: bool,
        responses: bool = False,
        criterion: str | None = None,
        may_lack_response: bool = False,
    ):
        """``require_rubric``: else rows may lack it (``Query.rubric`` is then empty). ``responses``: of rows to be judged,
        of which some ``may_lack_response``. ``criterion``: what a judge is asked of a row with an answer and no rubric
        (``verifier.criterion``); None where answers mean nothing."""
        self.names = names_of(format, fields)
        self.dataset = cast(Dataset, format) if format in DATASET_FIELDS else None
        self.mapped, self.responses, self.may_lack_response = dict(fields), responses, may_lack_response
        self._found: set[str] = set()  # roles of data.fields that some row has
        self._without_id = 0
        self._media_marks: list[str] = []  # with the places of the rows
        self._by_messages: dict[str, list[Query]] | None = None  # the queries of joined rows, by their conversation
        self._material = () if "prompt" in fields else MATERIAL if responses else (*MATERIAL, "choices")
        self.require_rubric = require_rubric
        self.criterion, self.verifiable = criterion, format == "verifiable"
        self.answers = 0  # training rows that ended with an answer
        self._rubrics = RubricReader(self.names, polarity, self.mapped)
        # top-level fields that a row may be read from: they do not come back beside a judgement
        roles = ["prompt", "system", "rubric", "reference", "response"]
        roles += ["answer"] if criterion is not None else []
        self._used = {name.partition(".")[0] for role in roles for name in self.names[role]} | {"input", "history"}

    def is_row(self, data: dict) -> bool:
        """Whether an object is a row, and does not only hold rows: it has a conversation, a rubric or a response."""
        row = Fields("", "", data)
        roles = ("prompt", "rubric", "response")
        return any(not self._are_rows(row.get(name)) for role in roles for name in row.there(self.names[role]))

    def _are_rows(self, value) -> bool:
        """Whether a field of a row's name is a list of whole rows."""
        is_list = isinstance(value, list) and bool(value) and isinstance(value[0], dict)
        return is_list and bool(Fields("", "", value[0]).there(self.names["prompt"]))

    def query(self, row: Fields) -> Query:
        """The query of a training row. An answer after the user's last message is its reference."""
        messages, answer = self._conversation(row)
        rubric, sources = self._read_rubric(row)
        reference = self._reference(row) or answer
        self.answers += answer is not None
        return self._query(row, messages, rubric, sources, reference)

    def _query(
        self, row: Fields, messages: Messages, rubric: list[RubricItem], sources: list[Fields], reference: str | None
    ) -> Query:
        tags, answer = read_tags(row, EXAMPLE_TAGS), self._answer(row)
        dataset = self.dataset or dataset_of(row, sources)
        if answer is not None and self.criterion is not None:
            rubric, dataset = [RubricItem(self.criterion.replace("{answer}", answer), 1.0)], "verifiable"
        id = self._id(row, messages)
        return Query(id, messages, tuple(rubric), reference, tags=tags, dataset=dataset, answer=answer)

    def _read_rubric(self, row: Fields) -> tuple[list[RubricItem], list[Fields]]:
        if self._answer(row) is not None:
            return [], []
        if self.criterion is not None and self.require_rubric and not self._rubrics.has_rubric(row):
            raise row.nothing("rubric or answer", (*self.names["rubric"], *self.names["answer"]))
        return self._rubrics.read(row, self.require_rubric)

    def _answer(self, row: Fields) -> str | None:
        """A text or a number, of a row that is scored by it: with ``data.format`` verifiable, or without a rubric."""
        if self.criterion is None or not (self.verifiable or not self._rubrics.has_rubric(row)):
            return None
        found: dict[str, str] = {}
        for name in row.there(self.names["answer"]):
            value = row.get(name)
            if type(value) in (int, float):
                found[name] = str(value)
            elif isinstance(value, str) and value.strip():
                found[name] = row.text(name)
        if found:
            first = next(iter(found))
            for name, text in found.items():
                if not (found[first].strip().endswith(text.strip()) or text.strip().endswith(found[first].strip())):
                    remedy = f"say which is the answer with data.fields: {{answer: {first}}} or {{answer: {name}}}"
                    raise row.fail(name, f"it differs from {first}: {remedy}")
            return found[first]
        if self.verifiable:
            raise row.nothing("answer", self.names["answer"])
        return None

    def judged(self, row: Fields, queries: dict[str, Query] | None) -> list[Query]:
        """A query for every response of a row to be judged; one without a response where the row has none and may lack it.

        ``queries``: by id, those that the rows answer when they hold no conversation themselves.
        """
        name = row.first(self._id_names)
        if queries is None:
            messages, answer = self._own_conversation(row)
            rubric, sources = self._read_rubric(row)
            reference = self._reference(row) or answer
            query = self._query(row, messages, rubric, sources, reference)
            self.answers += answer is not None and bool(row.there(self.names["response"]))
        else:
            name, query = self._named(row, queries)
            answer, sources = self._own_parts(row, query)
        lacks = self.may_lack_response and answer is None and not has_responses(row, self.names["response"])
        responses = [] if lacks else read_responses(row, self.names["response"], answer)
        used = self._used | set(self._used_item_names())
        given = Given(
            row.get(name) if name else query.id,
            None,
            kept(row.data, self._used | {(name or "").partition(".")[0]}),
            tuple(kept(source.data, used) for source in sources),
        )
        return [given.answered(query, choice, response) for choice, response in responses] or [
            replace(query, given=given)
        ]

    def settle(self, joined: bool) -> None:
        """Raise ``UserError`` for a role of ``data.fields`` that no row has, and say what many rows lack.

        ``joined``: the rows were joined with queries, which hold everything but the response.
        """
        roles = {"response"} if joined else set(NAMES) - (set() if self.responses else {"response"})
        for role, path in self.mapped.items():
            if role in roles and role not in self._found | self._rubrics.found:
                raise UserError(
                    "data.fields",
                    f"{role} is mapped to {path!r}, which no row has",
                    "correct its name, or leave it out",
                )
        if "id" in self.mapped and self._without_id:
            warn(f"{self._without_id} rows have no {self.mapped['id']!r}: the id is a hash of the conversation")
        if marks := self._media_marks:
            warn(
                f"rows with a mark for an image, sound or video in their text: {len(marks)} (the first: {marks[0]}); it is "
                "read as these letters; leave rows out that cannot be answered without"
            )
        if not joined:  # else the weights are the queries'
            self._rubrics.weights.warn()

    def _conversation(self, row: Fields) -> tuple[Messages, str | None]:
        self._found |= {role for role in self.mapped if role not in self._found and row.there(self.names[role])}
        refuse_other_media(row)
        messages, answer = read_conversation(row, self.names["prompt"], self.names["system"], self._material)
        if mark := media_mark(messages):
            self._media_marks.append(f"{mark} at {row.where}")
        return messages, answer

    def _own_conversation(self, row: Fields) -> tuple[Messages, str | None]:
        if not row.there(self.names["prompt"]) and row.has("custom_id"):
            found = f"fields {list(row.data)} hold no conversation"
            remedy = "these are results of a batch: give the prompts and rubrics with `queries` (ids are custom_ids)"
            raise UserError(row.where, found, remedy)
        return self._conversation(row)

    def _used_item_names(self) -> list[str]:
        roles = ("criterion", "tags")
        return [name for role in roles for name in self.names[role]] + [
            name for name in self.names["weight"] if name != "score"
        ]

    @property
    def _id_names(self) -> tuple[str, ...]:
        """Of rows to be judged: the id of a batch result has its own name, whatever the queries call theirs."""
        return tuple(dict.fromkeys((*self.names["id"], *NAMES["id"])))

    def _named(self, row: Fields, queries: dict[str, Query]) -> tuple[str | None, Query]:
        """The query that a row answers, and the field that names it; None where only its conversation does."""
        there = row.there((*self._id_names, *RESULT_IDS))
        if not there:
            return None, self._with_conversation(row, queries)
        if "id" in self.mapped and there[0] == self.mapped["id"]:
            there = there[:1]
        known = [name for name in there if id_text(row.get(name)) in queries]
        if not known:
            raise row.fail(there[0], "it must be the id of one of the queries")
        found = [queries[id_text(row.get(name))] for name in known]
        for name, other in zip(known[1:], found[1:]):
            if other is not found[0]:
                remedy = f"say which is the id with data.fields: {{id: {known[0]}}} or {{id: {name}}}"
                raise row.fail(name, f"{known[0]} is the id of another query: {remedy}")
        return known[0], found[0]

    def _with_conversation(self, row: Fields, queries: dict[str, Query]) -> Query:
        """The only query with the conversation of a row that has no id."""
        if not row.there(self.names["prompt"]):
            raise row.nothing("id", (*self._id_names, *RESULT_IDS))
        messages, _ = self._conversation(row)
        if self._by_messages is None:
            self._by_messages = {}
            for query in queries.values():
                self._by_messages.setdefault(json.dumps(query.messages), []).append(query)
        found = self._by_messages.get(json.dumps(messages), [])
        if len(found) != 1:
            problem = f"no id, and {len(found) or 'none'} of the queries have its conversation"
            raise UserError(row.where, problem, f"give its query's id as one of {', '.join(self._id_names)}")
        return found[0]

    def _own_parts(self, row: Fields, query: Query) -> tuple[str | None, list[Fields]]:
        """A row's own answer and rubric items; what it repeats of its query must be the query's."""
        self._found |= {role for role in self.mapped if row.there(self.names[role])}
        prompt, answer = row.first(self.names["prompt"]), None
        if prompt is not None and not is_rendered(row.get(prompt)) and not row.has("prompt_token_ids"):
            messages, answer = read_conversation(row, self.names["prompt"], self.names["system"], self._material)
            if not _agree(messages, query.messages):
                raise row.fail(prompt, f"it differs from the query {query.id!r}: {OWN_PART}")
        rubric, sources = self._rubrics.read(row, required=False)
        theirs = [
            (item.criterion, item.weight if source.there(self.names["weight"]) else known.weight)
            for item, source, known in zip(rubric, sources, query.rubric)
        ]
        if rubric and (len(rubric), theirs) != (len(query.rubric), [(i.criterion, i.weight) for i in query.rubric]):
            raise row.fail(
                row.first(self.names["rubric"]), f"it differs from that of the query {query.id!r}: {OWN_PART}"
            )
        return answer, sources

    def _id(self, row: Fields, messages: Messages) -> str:
        """The row's own id (a whole number counts), else a hash of its conversation."""
        name = row.first(self.names["id"])
        value = row.get(name) if name else None
        if value is None or value == "" or value != value:  # NaN: pandas' missing value
            self._without_id += 1
            return hashlib.sha1(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:16]
        return row.text(name) if isinstance(value, str) or type(value) not in (int, float) else id_text(value)

    def _reference(self, row: Fields) -> str | None:
        """The reference answer of a row. Two that differ are refused."""
        found = {
            name: text for name in self.names["reference"] if (text := self._reference_text(row, name)) is not None
        }
        first = next(iter(found), None)
        for name, text in found.items():
            # what a rule compares with may be the end of a whole reference answer
            if name != "reward_model.ground_truth" and text.strip() != found[first].strip():
                remedy = f"say which is the reference with data.fields: {{reference: {first}}} or {{reference: {name}}}"
                raise row.fail(name, f"it differs from {first}: {remedy}")
        return found[first] if found else None

    def _reference_text(self, row: Fields, name: str) -> str | None:
        """A text; only under our own or a mapped name anything else is a mistake: "ground truth" can be of any type."""
        value = row.get(name)
        if name == "reference" or "reference" in self.mapped:
            return row.optional_text(name)
        if isinstance(value, str) and value not in ("", *MISSING) and not _is_structure(decoded(value)):
            return row.text(name, may_be_blank=True)
        return None


def id_text(value) -> str:
    """An id as it is compared: pandas makes 7 to 7.0 where other rows have none."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _is_structure(value) -> bool:
    """Whether a value is no answer in words or numbers, but a rubric, test cases or a list of accepted answers."""
    if isinstance(value, list):
        return any(isinstance(part, dict | list | str) for part in value)
    return isinstance(value, dict)


def _agree(ours: Messages, theirs: Messages) -> bool:
    """Whether two conversations are the same; a system message may be in one of them only."""
    if not (ours[0]["role"] == theirs[0]["role"] == "system"):
        ours, theirs = (tuple(m for m in messages if m["role"] != "system") for messages in (ours, theirs))
    return ours == theirs
