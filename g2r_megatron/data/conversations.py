"""Reads the conversation of a row: a text, messages, turns with from/value, or instruction and input."""

import re

from g2r_megatron.data.fields import STRUCTURE_IN_TEXT, Fields, decoded
from g2r_megatron.data.files import shown
from g2r_megatron.errors import UserError

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
# What a question may be about, in a field of its own.
MATERIAL = (
    *("context", "contexts", "passage", "passages", "document", "documents", "article", "background", "story"),
    *("chat_history", "conversation_history", "options", "option_a", "opa", "choice_a", "source_text", "input_text"),
)
# Fields of a row or a message that a text model cannot read.
OTHER_MEDIA = (
    *("tools", "functions", "images", "image", "videos", "video", "audios", "audio", "body.tools", "body.functions"),
    *("image_url", "image_path", "multi_modal_data", "available_tools", "extra_info.tools", "extra_info.tools_kwargs"),
    *("extra_info.images", "extra_info.image"),
)
# What stands for them in the text of a prompt.
MEDIA_MARK = re.compile(r"<(?:image|video|audio)(?:_\d+)?>|<\|(?:image|video|audio)(?:_\w+)?\|>|<__media__>")
NOTHING = ("", "none", "null", "n/a")  # texts that spell a missing value
IN_MESSAGES = ("tool_calls", "function_call", "images", "image", "videos", "audio")
# Thoughts of an earlier answer: templates may read them by these names.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# A prompt that a chat template has made: the turn markers of published templates.
RENDERED = re.compile(
    r"""\s*(?:<s>|<bos>|<\|begin_of_text\|>|<｜begin▁of▁sentence｜>|<\|endoftext\|>|\[gMASK\]|<sop>)?\s*
    (?:<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|start\|>|<\|(?:user|system|assistant)\|>|<｜User｜>
    |<\|START_OF_TURN_TOKEN\|>|<\|turn>|\[INST\].*\[/INST\]|<\|role_start\|>|<\|header_start\|>)""",
    re.DOTALL | re.VERBOSE,
)
# The same without its special tokens, as trainers write what they sampled from.
DECODED = re.compile(r"\s*(?:system\n.*)?user\n.*\s?(?:assistant|model)\s*(?:<think>\s*(?:</think>\s*)?)?\Z", re.DOTALL)
RENDERED_END = re.compile(r"(?:\n\nAssistant:|\n###\s*(?:Response|Assistant):|<extra_id_1>Assistant)\s*\Z")
TEXT_PARTS = (None, "text", "input_text", "output_text")

Messages = tuple[dict, ...]


def read_conversation(
    row: Fields, names: tuple[str, ...], system: tuple[str, ...], material: tuple[str, ...] = ()
) -> tuple[Messages, str | None]:
    """The messages up to the user's last one, and the answer after it if the row has one.

    ``names``: fields that may hold it, the first that is there does; another one that is there too must say the same.
    ``system``: fields of a system message that stands apart; ``material``: fields that must not say what the messages
    do not. Raises ``UserError`` for anything else.
    """
    name = row.first(names)
    if name is None:
        raise row.nothing("conversation", names)
    messages = _messages(row, name)
    if name == "instruction":
        messages = _with_input(row, messages)
    if name == "instruction" or (material and isinstance(decoded(row.get(name)), str)):
        messages = [*_history(row), *messages]
    answer = None
    if messages[-1]["role"] == "assistant" and name in WITH_ANSWER and len(messages) > 1:
        answer = messages.pop()["content"]
    if messages[-1]["role"] != "user":
        found = f"{name}[{len(messages) - 1}] is of the role {messages[-1]['role']}"
        raise UserError(row.where, found, "the last message must be the user's: the response comes after it")
    whole = [*_system(row, system, messages), *messages]
    for other in row.there(names)[1:]:
        if not _says_the_same(row, other, whole):
            remedy = f"say which is the prompt with data.fields: {{prompt: {name}}} or {{prompt: {other}}}"
            raise row.fail(other, f"it differs from {name}: {remedy}")
    if isinstance(decoded(row.get(name)), str):
        _refuse_material(row, name, material, messages)
    return tuple(whole), answer


def is_rendered(value) -> bool:
    """Whether a prompt is a text that a chat template has made."""
    return isinstance(value, str) and bool(RENDERED.match(value) or RENDERED_END.search(value) or DECODED.match(value))


def refuse_other_media(row: Fields) -> None:
    """Raise ``UserError`` for tools, images, sound or video beside the conversation."""
    for name in row.there(OTHER_MEDIA):
        value = decoded(row.get(name))
        if value not in ([], {}, False) and not (isinstance(value, str) and value.strip().lower() in NOTHING):
            raise row.fail(name, "tools, images, sound and video are not supported: leave the row out, or the field")


def media_mark(messages: Messages) -> str | None:
    """The first mark in a conversation that stands for an image, sound or video, if there is one."""
    found = (MEDIA_MARK.search(message["content"]) for message in messages)
    return next((mark[0] for mark in found if mark), None)


def _refuse_material(row: Fields, name: str, material: tuple[str, ...], messages: list[dict]) -> None:
    """Raise ``UserError`` for a text beside the question ``name`` that would not be read."""
    for other in row.there(material):
        text = messages[-1]["content"]
        if any(part.strip() not in text for part in _texts_in(decoded(row.get(other)))):
            remedy = f"put it into {name}, or leave it out with data.fields: {{prompt: {name}}}"
            raise row.fail(other, f"it stands beside {name} and would not be read: {remedy}")


def _texts_in(value) -> list[str]:
    """All texts in a value, at any depth."""
    if isinstance(value, dict | list):
        return [text for part in (value.values() if isinstance(value, dict) else value) for text in _texts_in(part)]
    return [value] if isinstance(value, str) else []


def _messages(row: Fields, name: str) -> list[dict]:
    value = row.get(name)
    found = decoded(value)
    if isinstance(found, str):
        if STRUCTURE_IN_TEXT.match(found):
            raise row.fail(name, "it looks like messages, but is not whole JSON: write them as a list of objects")
        if is_rendered(found):
            remedy = "give the messages as they were before (for results of vLLM, give `queries`)"
            raise row.fail(name, f"it is what a chat template has made of a conversation: {remedy}")
        return [{"role": "user", "content": row.text(name)}]
    if isinstance(found, dict):
        inner = next(
            (inner for inner in ("messages", "conversations", "prompt") if isinstance(found.get(inner), list)), None
        )
        found = found[inner] if inner else [found]
    elif not isinstance(found, list) or not found:
        raise row.fail(name, "it must be a text, or a list of messages that is not empty")
    if isinstance(value, str | dict) and not all(map(_is_message, found)):
        remedy = 'as the user\'s own words write [{"role": "user", "content": TEXT}], as messages a list of objects'
        raise row.fail(name, f"it is {'JSON' if isinstance(value, str) else 'an object'}, but not messages: {remedy}")
    return [_message(row.element(name, i, message)) for i, message in enumerate(found)]


def _is_message(value) -> bool:
    return isinstance(decoded(value), dict) and ("role" in decoded(value) or "from" in decoded(value))


def _message(message: Fields) -> dict:
    """``{"role", "content"}`` of a message or of a from/value turn, and an assistant's thoughts by the name that they have;
    a system message may be empty."""
    spelled = ("from", "value") if message.has("from") and not message.has("role") else ("role", "content")
    role = ROLES.get(message.text(spelled[0]).lower())
    if role is None:
        raise message.fail(spelled[0], f"it must be {ACCEPTED_ROLES}")
    for name in IN_MESSAGES:
        if message.data.get(name):
            raise message.fail(name, "conversations with tools, images or sound are not supported: leave the row out")
    thoughts = {name: message.text(name) for name in THOUGHTS if not _is_blank(message.get(name))}
    content = _content(message, spelled[1], may_be_blank=role == "system")
    return {"role": role, "content": content, **(thoughts if role == "assistant" else {})}


def _content(message: Fields, name: str, may_be_blank: bool) -> str:
    """A text, or a list of parts: their texts, one a line."""
    value = message.get(name)
    if isinstance(parts := decoded(value), list) and parts and all(map(_is_part, parts)):
        value = parts
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


def _is_part(value) -> bool:
    return isinstance(value, dict) and "type" in value and "text" in value


def _with_input(row: Fields, messages: list[dict]) -> list[dict]:
    """An instruction with the material that it is about on the lines after it."""
    materials = [name for name in ("input", "context") if not _is_blank(row.get(name))]  # Alpaca, Dolly
    texts = [messages[-1]["content"], *(row.text(name) for name in materials)]
    return [*messages[:-1], {"role": "user", "content": "\n".join(dict.fromkeys(texts))}]


def _is_blank(value) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _history(row: Fields) -> list[dict]:
    """Earlier turns: [question, answer] pairs or messages. A text beside a question is no history of a conversation."""
    pairs = decoded(row.get("history")) or []
    if isinstance(pairs, str) and not row.has("instruction"):
        return []
    if isinstance(pairs, list) and all(map(_is_message, pairs)):
        return [_message(row.element("history", i, message)) for i, message in enumerate(pairs)]
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) and text.strip() for text in pair)
        for pair in pairs
    ):
        raise row.fail("history", "it must be a list of [question, answer] pairs")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair)]


def _system(row: Fields, names: tuple[str, ...], messages: list[dict]) -> list[dict]:
    """The system message that stands apart from the others, unless it is among them."""
    there = [name for name in row.there(names) if not _is_blank(row.get(name))]
    texts = [_system_text(row, name) for name in there]
    for name, text in zip(there, texts):
        if text.strip() != texts[0].strip():
            raise row.fail(name, f"it differs from {there[0]}: choose one with data.fields: {{system: {name}}}")
    if texts and messages[0]["role"] == "system":
        if messages[0]["content"].strip() != texts[0].strip():
            raise row.fail(there[0], "it differs from the system message of the conversation: leave one of them out")
        return []
    return [{"role": "system", "content": text} for text in texts[:1]]


def _system_text(row: Fields, name: str) -> str:
    if isinstance(row.get(name), str) and row.text(name).strip().lower() in NOTHING:
        raise row.fail(name, "it is how a missing value is written: leave it empty or null")
    return _content(row, name, may_be_blank=False)


def _says_the_same(row: Fields, name: str, messages: list[dict]) -> bool:
    """Whether the field ``name`` repeats (a part of) the conversation, or goes on after it.

    A text may be shorter than a message (a question in a template), never longer: then it is what was to be asked.
    """
    other = decoded(row.get(name))
    if isinstance(other, dict):
        other = other.get("messages") or [other]
    texts = [message["content"].strip() for message in messages]
    if isinstance(other, list):
        if not other or not all(map(_is_message, other)):
            return False
        turns = [_message(row.element(name, i, turn))["content"].strip() for i, turn in enumerate(other)]
        own = texts[messages[0]["role"] == "system" and texts[0] not in turns :]
        return turns[: len(own)] == own or all(turn in texts for turn in turns)
    if not isinstance(other, str):
        return True  # no conversation, such as a number
    return any(other.strip() in text for text in texts)
