"""The responses of a row to be judged, however the tool that made them writes them, and what of the row comes back.

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
KEPT_TEXT, KEPT_NUMBERS = 1000, 64  # what comes back: texts of so many characters, lists of so many numbers


def read_responses(row: Fields, names: tuple[str, ...], answer: str | None) -> list[str]:
    """All responses of a row, at least one; "" for one without text.

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
        return [answer]
    texts = _texts(row, there[0], row.get(there[0]))
    if not texts:
        raise row.fail(there[0], "it must hold at least one response")
    return [row.valid(there[0], text) for text in texts]


def _texts(row: Fields, name: str, value) -> list[str]:
    if value is None:
        return [""]
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        if value and all(isinstance(part, dict) and "role" in part for part in value):
            value = [value[-1]] if len(value) == 1 else _refuse(row, name, "it must be one message, the assistant's")
        if value and all(isinstance(part, dict) and "text" in part and "type" in part for part in value):
            return ["".join(part["text"] or "" for part in value)]
        if value and all(isinstance(part, dict) and "type" in part for part in value):  # of OpenAI's Responses
            messages = [part for part in value if part["type"] == "message"]
            return [text for part in messages for text in _texts(row, name, part.get("content"))] or [""]
        return [text for part in value for text in _texts(row, name, part)]
    if isinstance(value, dict):
        return _texts_of_object(row, name, value)
    raise row.fail(name, "it must be a text, a list of texts, or the result of a request")


def _texts_of_object(row: Fields, name: str, value: dict) -> list[str]:
    status = value.get("status_code")
    if status not in (None, 200) or value.get("error"):
        problem = f"status {status}" if value.get("error") is None else shown(value["error"])
        _refuse(row, name, f"the request for this response failed ({problem}): make it again, or skip the row")
    if value.get("content") is None and isinstance(value.get("refusal"), str):
        return [value["refusal"]]
    inner = next((inner for inner in INNER if inner in value), None)
    if inner is None:
        _refuse(row, name, f"it must be a text, or an object with one of {', '.join(INNER)}")
    return _texts(row, name, value[inner])


def _refuse(row: Fields, name: str, remedy: str):
    raise row.fail(name, remedy)


def kept(data: dict, used: set[str]) -> dict:
    """The fields of ``data`` that come back beside the judgement: earlier scores, labels, short texts and numbers.

    ``used``: top-level names that the row was read from; they do not come back.
    """
    return {name: _plain(value) for name, value in data.items() if name not in used and _is_short(value)}


def _plain(value):
    """JSON has no NaN and no infinities: null."""
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
