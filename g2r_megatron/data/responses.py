"""Reads the responses of a row to be judged, in the forms of many tools, and the fields that the output repeats.

Texts, lists of texts, None (a response without text), messages, OpenAI's and vLLM's choices and batch results, vLLM's
``RequestOutput``, the output list of OpenAI's Responses. Text of a response is data: it is never parsed.
"""

import math

from g2r_megatron.data.fields import Fields
from g2r_megatron.data.files import shown

NAMES = (
    "response",
    "responses",
    "completion",
    "completions",
    "generation",
    "generations",
    "generated_text",
    "output",
    "outputs",
    "choices",
    "model_response",
    "model_output",
    "prediction",
    "resps",
)
INNER = ("body", "choices", "outputs", "output", "message", "content", "text", "generated_text")
FAILED = ("error", "abort")  # finish reasons
KEPT_TEXT, KEPT_NUMBERS = (
    1000,
    64,
)  # what the output repeats: texts of up to so many characters, lists of up to so many numbers


# The number that a tool gave a response (None if it gave none), and its text.
Found = tuple[int | None, str]


def has_responses(row: Fields, names: tuple[str, ...]) -> bool:
    """Whether one of ``names`` is there, empty or not."""
    return any(name in row.data or row.has(name) for name in names)


def read_responses(row: Fields, names: tuple[str, ...], answer: str | None) -> list[Found]:
    """All responses of a row with their numbers, at least one; "" for one without text.

    ``names``: fields that may hold them; ``answer``: the last message of the conversation, for a row without such a
    field. Raises ``UserError`` where there is none, or a request that failed.
    """
    there = [name for name in names if name in row.data or row.has(name)]
    if row.data.get("error") and not any(row.has(name) for name in there):
        raise row.fail("error", "the request for this response failed: make it again, or skip the row")
    if len(there) > 1 and there[0] != "response":
        there = [name for name in there if row.has(name)] or there[:1]
        for other in there[1:]:
            if row.get(other) != row.get(there[0]):
                remedy = f"say which is the response with data.fields: {{response: {there[0]}}}"
                raise row.fail(other, f"it is there beside {there[0]}: {remedy}")
    if not there:
        if answer is None:
            raise row.nothing("response", names)
        return [(None, answer)]
    found = _texts(row, there[0], row.get(there[0]))
    if not found:
        raise row.fail(there[0], "it must hold at least one response")
    return _numbered([(index, row.valid(there[0], text)) for index, text in found])


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
        if value and all(isinstance(part, dict) and "role" in part for part in value):
            value = [value[-1]] if len(value) == 1 else _refuse(row, name, "it must be one message, the assistant's")
        if value and all(isinstance(part, dict) and "text" in part and "type" in part for part in value):
            return [(None, "".join(part["text"] or "" for part in value))]
        if value and all(isinstance(part, dict) and "type" in part for part in value):  # of OpenAI's Responses
            messages = [part for part in value if part["type"] == "message"]
            return [text for part in messages for text in _texts(row, name, part.get("content"))] or [(None, "")]
        return [text for part in value for text in _texts(row, name, part)]
    if isinstance(value, dict):
        return _texts_of_object(row, name, value)
    raise row.fail(name, "it must be a text, a list of texts, or the result of a request")


def _texts_of_object(row: Fields, name: str, value: dict) -> list[Found]:
    status = value.get("status_code")
    if status not in (None, 200) or value.get("error"):
        problem = f"status {status}" if value.get("error") is None else shown(value["error"])
        _refuse(row, name, f"the request for this response failed ({problem}): make it again, or skip the row")
    if value.get("finish_reason") in FAILED or (status is not None and value.get("body", value) is None):
        _refuse(row, name, "the request for this response failed: make it again, or skip the row")
    if value.get("content") is None and isinstance(value.get("refusal"), str):
        return [(None, value["refusal"])]
    if not value.get("content") and (value.get("tool_calls") or value.get("function_call")):
        _refuse(row, name, "it is a tool call and no text: leave the row out")
    inner = next((inner for inner in INNER if inner in value), None)
    if inner is None:
        _refuse(row, name, f"it must be a text, or an object with one of {', '.join(INNER)}")
    found = _texts(row, name, value[inner])
    index = value.get("index")
    index = int(index) if isinstance(index, str) and index.isdecimal() else index
    return [(index, found[0][1])] if type(index) is int and len(found) == 1 else found


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
