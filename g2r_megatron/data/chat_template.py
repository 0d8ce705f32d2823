"""Conversations as text: a tokenizer's chat template, and which of its output is the template's and which is data.

The text is always the one that transformers renders of the plain messages. To tell data from template, the messages
are rendered a second time with marks in them (private characters that occur nowhere else): around each text, and
inside each place where a text spells a control token. Without its marks the second rendering must equal the first.
What is left whole between two marks, the template has written. Where a template reads what is marked and then renders
something else, the marks are put in other places; where that does not help, what cannot be told apart counts as data.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import count, takewhile
from typing import cast

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

from g2r_megatron.data.thoughts import is_thought_mark
from g2r_megatron.errors import UserError

# Templates that print today's date get this one: a prompt must not depend on the day it is rendered.
TEMPLATE_DATE = datetime(2024, 7, 26)
DATE_STRING = TEMPLATE_DATE.strftime("%d %b %Y")
DATE_CALL = re.compile(r"strftime_now\(\s*(?:'([^']*)'|\"([^\"]*)\")\s*\)")
DATE_MACRO = "{% macro strftime_now(format) %}{{ g2r_dates[format] }}{% endmacro %}\n"
PRIVATE = range(0xF0000, 0x10FFFE)
# arguments of apply_chat_template that are not the template's
RESERVED = (
    *("conversation", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict", "return_tensors"),
    *("padding", "truncation", "max_length", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    *("sanitize_control_tokens", "messages", "strftime_now"),
)
PLAIN_KEYS = ("role", "type", "name", "id", "tool_call_id")  # what templates compare, not print
Part = tuple[str, bool]


# ---- the template ---------------------------------------------------------------------------------------------------


def template_sources(tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """The tokenizer's chat templates by name; a single one is called "default"."""
    template = tokenizer.chat_template
    return template if isinstance(template, dict) else {"default": template} if template else {}


def template_source(tokenizer: PreTrainedTokenizerFast, options: Mapping, where: str) -> str:
    """The template that transformers takes with ``options``: ``chat_template`` names it, else tool_use with tools, or default."""
    sources = template_sources(tokenizer)
    if not sources:
        raise UserError(where, "the tokenizer has no chat template", "set chat_template to false")
    name = options.get("chat_template")
    if name is None:
        name = "tool_use" if options.get("tools") is not None and "tool_use" in sources else "default"
    if not isinstance(name, str) or name not in sources:
        raise UserError(
            where,
            f"the tokenizer has no chat template {name!r}, but {sorted(sources)}",
            "name one of them with template_options: {chat_template: NAME}",
        )
    return sources[name]


def check_template_options(
    tokenizer: PreTrainedTokenizerFast, options: Mapping, option: str, chat_template: bool
) -> None:
    """Raise ``UserError`` for template options that do nothing: reserved names, names that the template never reads, and
    truth values in quotes, which all count as true."""
    if not options:
        return
    if not chat_template:
        raise UserError(option, f"{dict(options)} with chat_template false", "there is no template to read them")
    source = template_source(tokenizer, options, option)
    for name in options:
        if name in RESERVED:
            raise UserError(option, f"{name!r} is not the template's to read", "leave it out")
        if name != "chat_template" and not re.search(rf"\b{re.escape(name)}\b", source):
            raise UserError(option, f"the chat template never reads {name!r}", "leave it out, or correct its name")
        value = options[name]
        if isinstance(value, str) and value.lower() in ("true", "false", "none", "null"):
            raise UserError(option, f"{name} is the text {value!r}, which counts as true", "write it without quotes")


def check_system_prompt(
    tokenizer: PreTrainedTokenizerFast, prompt: str, options: Mapping, option: str, chat_template: bool
) -> None:
    """Raise ``UserError`` where the chat template leaves out, or rejects, the system message that ``option`` gives."""
    if not prompt or not chat_template:
        return
    (mark,) = placeholders(1)
    messages = [{"role": "system", "content": mark}, {"role": "user", "content": "a"}]
    if mark not in render(tokenizer, messages, option, True, options):
        raise UserError(option, "the chat template does not print system messages", "put it into the prompts")


def render(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[dict],
    where: str,
    generation_prompt: bool = True,
    options: Mapping | None = None,
) -> str:
    """The text that transformers renders, on ``TEMPLATE_DATE``.

    ``messages``: dicts as transformers takes them (contents may be lists of parts, there may be tool calls). ``options``
    go to the template; ``where`` names the conversation in errors. Raises ``UserError`` when there is no template or it
    rejects the messages.
    """
    options = {"date_string": DATE_STRING, **(options or {})}
    source = template_source(tokenizer, options, where)
    options["chat_template"] = source
    if "strftime_now" in source:
        options["chat_template"] = DATE_MACRO + source
        options["g2r_dates"] = {(a or b): TEMPLATE_DATE.strftime(a or b) for a, b in DATE_CALL.findall(source)}
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation_prompt, **options
        )
        return cast(str, text)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        roles = [message["role"] for message in messages]
        problem = " ".join(str(error).split())
        raise UserError(
            where, f"the chat template rejects roles {roles} ({problem})", "change the messages or the template"
        ) from error


# ---- template and data ----------------------------------------------------------------------------------------------


class ControlTexts:
    """Texts of a tokenizer's control tokens, and where data could spell one: in whole, or across the end of a text."""

    def __init__(self, texts: Sequence[str]):
        self.texts = sorted(filter(None, texts), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, self.texts)) or "(?!)")
        # an assistant's own thoughts are tokens, and templates read them
        kept = [text for text in self.texts if not is_thought_mark(text)]
        self._any = re.compile("(?=(" + "|".join(map(re.escape, self.texts)) + "))" if self.texts else "(?!)")
        self._without_thoughts = re.compile("(?=(" + "|".join(map(re.escape, kept)) + "))" if kept else "(?!)")
        self._heads = {text[:n] for text in self.texts for n in range(1, len(text))}
        self._tails = {text[n:] for text in self.texts for n in range(1, len(text))}
        self._longest = max(map(len, self.texts), default=0)

    def spans(self, text: str, thoughts: bool) -> list[tuple[int, int]]:
        """Every place, overlapping ones too, where ``text`` spells a control token; ``thoughts``: also a thought's marks."""
        if not self.pattern.search(text):  # a faster test, which most texts end
            return []
        pattern = self._any if thoughts else self._without_thoughts
        return [match.span(1) for match in pattern.finditer(text)]

    def begins_inside(self, text: str) -> bool:
        """Whether ``text`` begins as a control token ends."""
        return any(text[:n] in self._tails for n in range(1, self._longest))

    def ends_inside(self, text: str) -> bool:
        """Whether ``text`` ends as a control token begins."""
        return any(text[-n:] in self._heads for n in range(1, self._longest))


def template_parts(
    tokenizer: PreTrainedTokenizerFast,
    control: ControlTexts,
    messages: Sequence[dict],
    where: str,
    generation_prompt: bool = True,
    options: Mapping | None = None,
) -> list[Part]:
    """``render`` in ``(text, trusted)`` parts: a control token in a trusted part is the template's, or a thought's mark
    in an assistant's turn; data's are in other parts, or no part has the whole of one. Arguments as of ``render``.
    """

    def rendered(messages: Sequence[dict]) -> str:
        return render(tokenizer, messages, where, generation_prompt, options)

    plain = rendered(messages)
    enclosing = Enclosing(control, messages)
    marked = _attempt(rendered, enclosing.messages)
    if marked is not None and enclosing.removed(marked) == plain:
        return enclosing.parts(marked, rendered)
    beside = Beside(control, messages)
    other = _attempt(rendered, beside.messages)
    if other is not None and beside.removed(other) == plain:
        return beside.parts(other)
    instead = Instead(control, messages)
    other = _attempt(rendered, instead.messages)
    if other is not None and instead.restored(other) == plain:
        return instead.parts(other)
    return [(plain, False)] if marked is None else enclosing.parts_where_equal(marked, plain)


def _attempt(rendered: Callable[[Sequence[dict]], str], messages: Sequence[dict]) -> str | None:
    """The rendering of marked messages; None where the template rejects them though it takes the plain ones."""
    try:
        return rendered(messages)
    except UserError:
        return None


def _equal_characters(a: Iterable[str], b: Iterable[str]) -> int:
    """How many characters are the same at the beginning of both."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


@dataclass
class Enclosing:
    """Marks around every text (its blanks outside), and after the first character of each control token in one."""

    control: ControlTexts
    original: Sequence[dict]

    def __post_init__(self):
        fresh = _fresh_characters(self.original)
        self.inside = next(fresh)
        self.regions: dict[str, tuple[str, str]] = {}  # opening mark -> (closing mark, text between)

        def mark(text: str, role: str, printed: bool) -> str:
            core = text.strip()
            if not core:
                return text
            spans = self.control.spans(core, thoughts=role != "assistant")
            broken = _inserted(core, [(start + 1, self.inside) for start, _ in spans])
            if printed:
                opening, closing = next(fresh), next(fresh)
                self.regions[opening] = closing, core
                broken = opening + broken + closing
            lead = text[: len(text) - len(text.lstrip())]
            return lead + broken + text[len(lead) + len(core) :]

        self.messages = [_changed(message, mark) for message in self.original]
        self._marks = re.compile("[" + self.inside + "".join(o + c for o, (c, _) in self.regions.items()) + "]")

    def removed(self, marked: str) -> str:
        return self._marks.sub("", marked)

    def parts(self, marked: str, rendered: Callable[[Sequence[dict]], str]) -> list[Part]:
        """Parts of the marked rendering. Between two marks stands what the template has written, or a text.

        Where the template has changed a text, a rendering without the text's control tokens decides whose they are."""
        doubtful = self._doubtful(marked)
        if doubtful:
            scrubbed = _attempt(rendered, self._scrubbed())
            if scrubbed is not None and self._written(marked) == self._written(scrubbed):
                doubtful = []  # the same control tokens without any data: they are the template's
        parts, at = [], 0
        for start, end in doubtful:
            parts += [*self._pieces(marked[at:start]), (self.removed(marked[start:end]), False)]
            at = end
        return [*parts, *self._pieces(marked[at:])]

    def parts_where_equal(self, marked: str, plain: str) -> list[Part]:
        """Parts of ``plain``, another rendering: as far as both are equal from the beginning, and from the end; what
        lies between counts as data."""
        bare = self.removed(marked)
        head = _equal_characters(plain, bare)
        tail = min(_equal_characters(reversed(plain), reversed(bare)), len(plain) - head, len(bare) - head)
        if self._doubtful(marked):
            head = tail = 0
        places = [i for i, char in enumerate(marked) if not self._marks.match(char)] + [len(marked)]
        between = plain[head : len(plain) - tail]
        return [
            *self._pieces(marked[: places[head]]),
            *([(between, False)] if between else []),
            *self._pieces(marked[places[len(bare) - tail] :]),
        ]

    def _pieces(self, marked: str) -> list[Part]:
        # a control token of one character has no inside to break: it stands alone between marks
        return [(p, len(p) > 1 or not self.control.pattern.fullmatch(p)) for p in self._marks.split(marked) if p]

    def _doubtful(self, marked: str) -> list[tuple[int, int]]:
        """(start, end) of each place between a text's two marks that is not the text and has a control token in it."""
        found, last = [], 0
        for match in self._marks.finditer(marked):
            closing, core = self.regions.get(match[0], ("", ""))
            end = marked.find(closing, match.end()) if closing else -1
            if match.start() < last or end < 0 or self.removed(marked[match.end() : end]) == core:
                continue
            if self._written(marked[match.start() : end]):
                found.append((match.start(), end))
                last = end
        return found

    def _written(self, marked: str) -> list[str]:
        """The control tokens without a mark in them, but for those of thoughts."""
        return [m[0] for m in self.control.pattern.finditer(marked) if not is_thought_mark(m[0])]

    def _scrubbed(self) -> list[dict]:
        """The messages with an x for every character, in any case, of a control token that is no thought's mark."""
        marks = [text for text in self.control.texts if is_thought_mark(text)]
        kept = "|".join(map(re.escape, marks)) or "(?!)"
        signs = {char.casefold() for text in self.control.texts if text not in marks for char in text}

        def scrub(text: str, role: str, printed: bool) -> str:
            if not printed:
                return text
            return re.sub(
                rf"({kept})|\S", lambda match: match[1] or ("x" if match[0].casefold() in signs else match[0]), text
            )

        return [_changed(message, scrub) for message in self.original]


@dataclass
class Beside:
    """Marks beside the control tokens in a text, so that a template which looks for them finds them: after one at the
    text's beginning, before all others; and at an end of a text that could be half of a control token."""

    control: ControlTexts
    original: Sequence[dict]

    def __post_init__(self):
        fresh = _fresh_characters(self.original)
        # at one place (of two control tokens in a row) marks stand in this order: each beside its own token
        self.after, self.before, self.end = next(fresh), next(fresh), next(fresh)

        def mark(text: str, role: str, printed: bool) -> str:
            spans = self.control.spans(text, thoughts=role != "assistant")
            inserts = [(end, self.after) if start == 0 else (start, self.before) for start, end in spans]
            inserts += [(0, self.end)] * self.control.begins_inside(text)
            inserts += [(len(text), self.end)] * self.control.ends_inside(text)
            return _inserted(text, inserts)

        self.messages = [_changed(message, mark) for message in self.original]
        self._marks = re.compile(f"[{self.before}{self.after}{self.end}]")
        token = self.control.pattern.pattern
        self._data = re.compile(f"((?:{self.before})(?:{token})|(?:{token})(?={self.after}))")

    def removed(self, marked: str) -> str:
        return self._marks.sub("", marked)

    def parts(self, marked: str) -> list[Part]:
        pieces = [(piece, i % 2 == 0) for i, piece in enumerate(self._data.split(marked))]
        return [
            (text, trusted)
            for piece, trusted in pieces
            for text in (self._marks.split(piece) if trusted else [self.removed(piece)])
            if text
        ]


@dataclass
class Instead:
    """Marks instead of characters, so that no text changes its length (templates that count or cut): of the first and
    the last character of a text, blanks aside, and of the last one of each control token in it."""

    control: ControlTexts
    original: Sequence[dict]

    def __post_init__(self):
        fresh = _fresh_characters(self.original)
        self._mark_of: dict[str, str] = {}

        def mark(text: str, role: str, printed: bool) -> str:
            places = {end - 1 for _, end in self.control.spans(text, thoughts=role != "assistant")}
            if printed and text.strip():
                places |= {len(text) - len(text.lstrip()), len(text.rstrip()) - 1}
            chars = list(text)
            for place in places:
                if text[place] not in self._mark_of:
                    self._mark_of[text[place]] = next(fresh)
                chars[place] = self._mark_of[text[place]]
            return "".join(chars)

        self.messages = [_changed(message, mark) for message in self.original]
        self._restore = str.maketrans({mark: char for char, mark in self._mark_of.items()})
        self._marks = re.compile(f"([{''.join(self._mark_of.values())}])" if self._mark_of else "(?!)()")

    def restored(self, marked: str) -> str:
        return marked.translate(self._restore)

    def parts(self, marked: str) -> list[Part]:
        pieces = enumerate(self._marks.split(marked))
        return [(self.restored(piece), i % 2 == 0) for i, piece in pieces if piece]


def _changed(value, change: Callable[[str, str, bool], str], role: str = "", printed: bool = True):
    """A message with ``change(text, role, printed)`` for every text in it; ``printed``: not one that templates compare."""
    if isinstance(value, str):
        return change(value, role, printed)
    if isinstance(value, Mapping):
        role = role or str(value.get("role", ""))
        return {
            (change(key, role, False) if isinstance(key, str) else key): _changed(
                item, change, role, printed and key not in PLAIN_KEYS
            )
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_changed(item, change, role, printed) for item in value]
    return value


def _inserted(text: str, inserts: Sequence[tuple[int, str]]) -> str:
    """``text`` with each mark before the character at its place."""
    pieces, at = [], 0
    for place, mark in sorted(set(inserts)):
        pieces += [text[at:place], mark]
        at = place
    return "".join([*pieces, text[at:]])


def _fresh_characters(messages: Sequence[dict]) -> Iterator[str]:
    """Private characters that occur nowhere in ``messages``."""
    used: set[str] = set()

    def note(text: str, role: str, printed: bool) -> str:
        used.update(text)
        return text

    for message in messages:
        _changed(message, note)
    return (char for number in PRIVATE if (char := chr(number)) not in used)


def placeholder_for(messages: Sequence[dict]) -> str:
    """A character that stands for a text which is put in later, and occurs nowhere in ``messages``."""
    return next(_fresh_characters(messages))


def placeholders(number: int) -> list[str]:
    """``number`` characters that stand for texts which are put in later."""
    return [chr(i) for _, i in zip(range(number), count(PRIVATE[-1], -1))]


def split_once(text: str, placeholder: str, where: str, what: str) -> tuple[str, str]:
    """``text`` before and after ``placeholder``. Raises ``UserError`` unless the template has printed it exactly once."""
    if text.count(placeholder) != 1:
        raise UserError(
            where,
            f"the chat template prints {what} {text.count(placeholder)} times, not once",
            "use another chat template",
        )
    before, _, after = text.partition(placeholder)
    return before, after


# ---- without a template ---------------------------------------------------------------------------------------------


def content_text(content) -> str:
    """A message's content as one text: itself, the texts of its parts in a row, or nothing for None."""
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else part.get("text") or "" for part in content or ())


def conversation_text(messages: Sequence[dict]) -> str:
    """The conversation as "role: content" lines."""
    return "\n".join(f"{message['role']}: {content_text(message.get('content'))}" for message in messages)


def with_system_prompt(messages: Sequence[dict], prompt: str) -> tuple[dict, ...]:
    """``messages`` with ``prompt`` as their first, system message; as they are where they begin with one or it is empty."""
    if not prompt or messages[0]["role"] in ("system", "developer"):
        return tuple(messages)
    return ({"role": "system", "content": prompt}, *messages)
