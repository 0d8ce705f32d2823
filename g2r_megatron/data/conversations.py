"""The conversation of a row, however a project writes it: a text, messages, turns with from/value, instruction + input."""

from g2r_megatron.data.fields import STRUCTURE_IN_TEXT, Fields, decoded
from g2r_megatron.data.files import shown

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
ACCEPTED_ROLES = "one of system, user, assistant (or developer, human, gpt, chatgpt, bot, model)"
# Fields that hold a whole conversation: its last message may be the answer.
WITH_ANSWER = ("messages", "conversations", "conversation", "body.messages")
TEXT_PARTS = (None, "text", "input_text", "output_text")

Messages = tuple[dict, ...]


def read_conversation(row: Fields, names: tuple[str, ...], system: tuple[str, ...]) -> tuple[Messages, str | None]:
    """The messages up to the user's last one, and the answer after it if the row has one.

    ``names``: fields that may hold it, the first that is there does; another one that is there too must say the same.
    ``system``: fields of a system message that stands apart. Raises ``UserError`` for anything else.
    """
    name = row.first(names)
    if name is None:
        raise row.nothing("conversation", names)
    messages = _messages(row, name)
    if name == "instruction":
        messages = [*_history(row), *_with_input(row, messages)]
    answer = None
    if messages[-1]["role"] == "assistant" and name in WITH_ANSWER and len(messages) > 1:
        answer = messages.pop()["content"]
    if messages[-1]["role"] != "user":
        field = f"{name}[{len(messages) - 1}].role"
        raise row.fail(field, "the last message must be the user's: the response comes after it")
    for other in row.there(names)[1:]:
        if not _says_the_same(decoded(row.get(other)), messages):
            remedy = f"say which is the prompt with data.fields: {{prompt: {name}}} or {{prompt: {other}}}"
            raise row.fail(other, f"it differs from {name}: {remedy}")
    return (*_system(row, system, messages), *messages), answer


def _messages(row: Fields, name: str) -> list[dict]:
    value = row.get(name)
    found = decoded(value)
    if isinstance(found, str):
        if STRUCTURE_IN_TEXT.match(found):
            raise row.fail(name, "it looks like messages, but is not whole JSON: write them as a list of objects")
        return [{"role": "user", "content": row.text(name)}]
    if isinstance(found, dict):
        inner = next(
            (inner for inner in ("messages", "conversations", "prompt") if isinstance(found.get(inner), list)), None
        )
        found = found[inner] if inner else [found]
    elif not isinstance(found, list) or not found:
        raise row.fail(name, "it must be a text, or a list of messages that is not empty")
    if isinstance(value, str) and not all(isinstance(message, dict) for message in found):
        remedy = 'as the user\'s own words write [{"role": "user", "content": TEXT}], as messages a list of objects'
        raise row.fail(name, f"it is JSON, but not messages: {remedy}")
    return [_message(row.element(name, i, message)) for i, message in enumerate(found)]


def _message(message: Fields) -> dict:
    """``{"role", "content"}`` of a message or of a from/value turn; a system message may be empty."""
    spelled = ("from", "value") if message.has("from") and not message.has("role") else ("role", "content")
    role = ROLES.get(message.text(spelled[0]).lower())
    if role is None:
        raise message.fail(spelled[0], f"it must be {ACCEPTED_ROLES}")
    if message.get("tool_calls"):
        raise message.fail("tool_calls", "conversations with tools are not supported: leave the row out")
    return {"role": role, "content": _content(message, spelled[1], may_be_blank=role == "system")}


def _content(message: Fields, name: str, may_be_blank: bool) -> str:
    """A text, or a list of parts: their texts, one a line."""
    value = message.get(name)
    if not isinstance(value, list):
        return message.text(name, may_be_blank)
    texts = []
    for part in value:
        text = part.get("text") if isinstance(part, dict) and part.get("type") in TEXT_PARTS else part
        if not isinstance(text, str):
            raise message.fail(name, f"each part must be a text, and {shown(part)} is not")
        texts.append(text)
    text = message.valid(name, "\n".join(texts))
    if not text.strip() and not may_be_blank:
        raise message.fail(name, "it must hold a text that is not empty")
    return text


def _with_input(row: Fields, messages: list[dict]) -> list[dict]:
    """An instruction with the material that it is about on the lines after it."""
    material = row.get("input")
    if material is None or (isinstance(material, str) and not material.strip()):
        return messages
    return [*messages[:-1], {"role": "user", "content": f"{messages[-1]['content']}\n{row.text('input')}"}]


def _history(row: Fields) -> list[dict]:
    """Earlier [question, answer] pairs of an instruction."""
    pairs = decoded(row.get("history")) or []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) and text.strip() for text in pair)
        for pair in pairs
    ):
        raise row.fail("history", "it must be a list of [question, answer] pairs")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair)]


def _system(row: Fields, names: tuple[str, ...], messages: list[dict]) -> list[dict]:
    """The system message that stands apart from the others, unless it is among them."""
    name = row.first(names)
    if name is None or row.get(name) == "":
        return []
    text = row.text(name)
    if messages[0]["role"] == "system":
        if messages[0]["content"].strip() != text.strip():
            raise row.fail(name, "it differs from the system message of the conversation: leave one of them out")
        return []
    return [{"role": "system", "content": text}]


def _says_the_same(other, messages: list[dict]) -> bool:
    """Whether another field repeats (a part of) the conversation: its text, or its last user message, is in it."""
    if isinstance(other, dict):
        other = other.get("messages") or [other]
    if isinstance(other, list):
        texts = [decoded(turn) for turn in other]
        texts = [turn.get("content", turn.get("value")) for turn in texts if isinstance(turn, dict)]
        return any(text == message["content"] for text in texts for message in messages if message["role"] == "user")
    if not isinstance(other, str):
        return True  # no conversation, such as a number
    return any(other.strip() in message["content"] or message["content"] in other for message in messages)
