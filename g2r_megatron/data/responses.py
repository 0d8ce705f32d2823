"""Reads the responses of a row to be judged, in the forms of many tools, and the fields that the output repeats.

Texts, lists of texts, None (a response without text), messages, OpenAI's and vLLM's choices and batch results, vLLM's
``RequestOutput``, the output list of OpenAI's Responses, Anthropic's, Gemini's and Bedrock's batch results, FastChat's turns.
Text of a response is data: it is never parsed. What a model thought before it is no part of it.
"""

import math
import re

from g2r_megatron.data.fields import Fields
from g2r_megatron.data.files import shown

NAMES = (
    *("response", "responses", "completion", "completions", "generation", "generations", "generated_text", "output"),
    *("outputs", "choices", "model_response", "model_output", "prediction", "resps", "result", "modelOutput"),
)
SEVERAL = ("responses", "completions", "generations", "outputs", "choices", "resps")  # names of lists
LIST_IN_TEXT = re.compile(r"""\s*\[\s*['"{].*\]\s*""", re.DOTALL)  # as JSON and Python write it into CSV
OBJECTS = ("result", "modelOutput")  # a text under these names says how something went
INNER = (
    *("body", "choices", "candidates", "outputs", "output", "message", "content", "parts", "turns", "text"),
    *("generated_text", "generation"),
)
FAILED = ("error", "abort")  # finish reasons
FAILED_REQUESTS = ("errored", "expired", "canceled", "cancelled", "failed")  # types and states of whole requests
TEXTS = {"text": "text", "output_text": "text", "refusal": "refusal"}  # type of a part -> where its text is
CALLS = re.compile(r"tool_?use|function_?call|tool_?call", re.IGNORECASE)
MEDIA = re.compile(r"image|audio|video|inlineData")
KEPT_TEXT, KEPT_NUMBERS = 1000, 64  # repeated in the output: texts of so many characters, lists


# The number that a tool gave a response (None if it gave none), and its text.
Found = tuple[int | None, str]


def has_responses(row: Fields, names: tuple[str, ...]) -> bool:
    """Whether one of ``names`` is there, empty or not."""
    return bool(_there(row, names))


def _there(row: Fields, names: tuple[str, ...]) -> list[str]:
    """Those of ``names`` that are there and may hold responses, empty or not. One name alone was chosen: it counts."""
    there = [name for name in names if name in row.data or row.has(name)]
    return there if len(names) == 1 else [name for name in there if _may_hold(name, row.get(name))]


def _may_hold(name: str, value) -> bool:
    """Not so: a text that says how something went, and the options of a multiple choice."""
    if name == "choices":
        return not isinstance(value, dict) and not (isinstance(value, list) and all(isinstance(c, str) for c in value))
    return name not in OBJECTS or isinstance(value, dict)


def read_responses(row: Fields, names: tuple[str, ...], answer: str | None) -> list[Found]:
    """All responses of a row with their numbers, at least one; "" for one without text.

    ``names``: fields that may hold them; ``answer``: the last message of the conversation, for a row without such a
    field. Raises ``UserError`` where there is none, or a request that failed.
    """
    there = _there(row, names)
    if row.data.get("error") and not any(row.has(name) for name in there):
        raise row.fail("error", "the request for this response failed: make it again, or skip the row")
    if not there:
        if answer is None:
            raise row.nothing("response", names)
        return [(None, answer)]
    if len(there) > 1 and there[0] != "response":
        there = [name for name in there if row.has(name)] or there[:1]
    name, *others = there
    value = row.get(name)
    if name in SEVERAL and len(names) > 1 and isinstance(value, str) and LIST_IN_TEXT.fullmatch(value):
        remedy = f"it is a list written as a text: write a list, or take it as one response with data.fields: {{response: {name}}}"
        raise row.fail(name, remedy)
    found = _texts(row, name, value)
    if name != "response":
        for other in others:
            if row.get(other) != value and [text for _, text in _texts(row, other, row.get(other))] != [
                text for _, text in found
            ]:
                remedy = f"say which is the response with data.fields: {{response: {name}}}"
                raise row.fail(other, f"it is there beside {name}: {remedy}")
    if not found:
        raise row.fail(name, "it must hold at least one response")
    return _numbered([(index, row.valid(name, text)) for index, text in found])


def _numbered(found: list[Found]) -> list[Found]:
    """Responses in the order of their own numbers where each has another one, else numbered as they stand."""
    numbers = [index for index, _ in found if index is not None]
    if len(found) == 1:
        return [(index or None, text) for index, text in found]  # the first of several, or the only one
    if len(set(numbers)) == len(found):
        return sorted(found, key=lambda response: response[0] or 0)
    return [(place, text) for place, (_, text) in enumerate(found)]


def _texts(row: Fields, name: str, value) -> list[Found]:
    if value is None:
        return [(None, "")]
    if isinstance(value, str):
        return [(None, value)]
    if isinstance(value, list):
        if value and all(isinstance(part, dict) and "role" in part and "type" not in part for part in value):
            value = [value[-1]] if len(value) == 1 else _refuse(row, name, "it must be one message, the assistant's")
        if value and all(isinstance(part, dict) and "type" in part for part in value):
            return [(None, _text_of_parts(row, name, value))]
        return [text for part in value for text in _texts(row, name, part)]
    if isinstance(value, dict):
        return _texts_of_object(row, name, value)
    raise row.fail(name, "it must be a text, a list of texts, or the result of a request")


def _texts_of_object(row: Fields, name: str, value: dict) -> list[Found]:
    status = value.get("status_code")
    if status not in (None, 200) or value.get("error"):
        problem = f"status {status}" if value.get("error") is None else shown(value["error"])
        _refuse(row, name, f"the request for this response failed ({problem}): make it again, or skip the row")
    states = (value.get("type"), value.get("status"))
    has_failed = any(state in FAILED_REQUESTS for state in states) or value.get("finish_reason") in FAILED
    if has_failed or (status is not None and value.get("body", value) is None):
        _refuse(row, name, "the request for this response failed: make it again, or skip the row")
    if value.get("content") is None and isinstance(value.get("refusal"), str):
        return [(None, value["refusal"])]
    if not value.get("content") and (value.get("tool_calls") or value.get("function_call")):
        _refuse(row, name, "it is a tool call and no text: leave the row out")
    inner = next((inner for inner in INNER if inner in value), None)
    if inner is None:
        _refuse(row, name, f"it must be a text, or an object with one of {', '.join(INNER)}")
    found = _texts_inside(row, name, inner, value[inner])
    index = value.get("index")
    index = int(index) if isinstance(index, str) and index.isdecimal() else index
    return [(index, found[0][1])] if type(index) is int and len(found) == 1 else found


def _texts_inside(row: Fields, name: str, inner: str, value) -> list[Found]:
    """The texts in the field ``inner`` of an object."""
    if inner == "parts" and isinstance(value, list) and all(isinstance(part, dict) for part in value):  # Gemini's
        typed = [
            {**part, "type": "thinking" if part.get("thought") else "text" if "text" in part else " ".join(part)}
            for part in value
        ]
        return [(None, _text_of_parts(row, name, typed))]
    if inner == "turns" and isinstance(value, list) and len(value) != 1:  # FastChat's
        _refuse(
            row, name, "it answers several turns: give a row for each, with the turns before it in its conversation"
        )
    return _texts(row, name, value)


def _text_of_parts(row: Fields, name: str, parts: list[dict]) -> str:
    """The text of one response: its text parts joined. Thoughts are none of it, nor tool calls beside text."""
    texts: list[str] = []
    for part in parts:
        kind = str(part["type"])
        if kind == "message":  # of OpenAI's Responses
            texts += [text for _, text in _texts(row, name, part.get("content"))]
        elif kind in TEXTS:
            text = part.get(TEXTS[kind])
            texts.append(
                text if isinstance(text, str) else "" if text is None else _refuse(row, name, "text must be text")
            )
        elif MEDIA.search(kind):
            _refuse(row, name, f"it holds a part of type {kind!r}: only text can be judged, leave the row out")
    if not texts and any(CALLS.search(str(part["type"])) for part in parts):
        _refuse(row, name, "it is a tool call and no text: leave the row out")
    return "".join(texts)


def _refuse(row: Fields, name: str, remedy: str):
    raise row.fail(name, remedy)


def kept(data: dict, used: set[str]) -> dict:
    """The fields of ``data`` that come back beside the judgement: earlier scores, labels, short texts and numbers.

    ``used``: top-level names that the row was read from; they do not come back.
    """
    return {name: _plain(value) for name, value in data.items() if name not in used and _is_short(value)}


def _plain(value):
    """``value`` as plain JSON; NaN and infinities, which JSON lacks, become null."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_short(value) -> bool:
    if isinstance(value, str):
        return len(value) <= KEPT_TEXT
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return 0 < len(value) <= KEPT_NUMBERS and all(isinstance(number, bool | int | float) for number in value)
    return isinstance(value, bool | int | float)
