"""Text to token ids and back, such that data can never become a control token.

Conversations, criteria and responses are data: a user who writes ``<|im_end|>`` has written ten characters, not
ended a turn. So text comes in two kinds: *trusted* (a chat template's own pieces, the judge template of the config),
in which special tokens are parsed, and *data*, in which they are not. ``encode_parts`` encodes a mixture of both;
ordinary text is tokenized across the seams, so a prompt without hostile text has exactly its usual ids.

Control tokens are what the tokenizer declares special, and added tokens that its chat template prints as structure
(DeepSeek-R1-Distill's turns). A thought's marks (``<think>``) that the template prints are control tokens too, except
in what an assistant wrote. The tokenizer must not be changed after loading: facts about it are cached.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from g2r_megatron.data.chat_template import (
    ControlTexts,
    Part,
    conversation_text,
    placeholders,
    render,
    split_once,
    template_parts,
    template_sources,
)
from g2r_megatron.data.sentencepiece_model import LEADING_SPACES
from g2r_megatron.data.thoughts import is_thought_mark
from g2r_megatron.data.tokenizer_files import json_object, vocabulary_size
from g2r_megatron.data.tokenizer_files import load_tokenizer as load_tokenizer  # found here too
from g2r_megatron.errors import UserError

# Added tokens that any text may hold: words, blanks, sentence punctuation; and signs without a word between them.
ORDINARY = re.compile(r"[\w\s.,;!?'’\"()-]*|[\W_]*")
ROLES = ("system", "user", "assistant", "tool")
UTF8_MAX_BYTES = 4
REPLACEMENT = "\ufffd"


# ---- control tokens -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def special_ids(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Ids of control tokens, declared or not, but for undeclared marks of thoughts.

    The unknown token is ordinary (data may hold unknown words) unless it has another role.
    """
    ids = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    control = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    if tokenizer.unk_token_id not in control:
        ids.discard(tokenizer.unk_token_id)
    return frozenset(ids | (_printed_ids(tokenizer) - thought_ids(tokenizer)))


@lru_cache(maxsize=16)
def thought_ids(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Ids of a thought's marks that the chat template prints and the tokenizer does not declare special."""
    added = tokenizer.added_tokens_decoder
    return frozenset(i for i in _printed_ids(tokenizer) if is_thought_mark(added[i].content))


@lru_cache(maxsize=16)
def _printed_ids(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Added tokens that are not declared special, no ordinary text, and printed by a chat template.

    A template's source shows what it can print; tokens that it puts together (``'<|' + role + '|>'``) show when it renders.
    """
    added = {
        i: token.content
        for i, token in tokenizer.added_tokens_decoder.items()
        if not token.special and not ORDINARY.fullmatch(token.content)
    }
    if not added:
        return frozenset()
    sources = template_sources(tokenizer)
    printed = [*sources.values(), *(text for name in sources for text in _renderings(tokenizer, name))]
    return frozenset(i for i, content in added.items() if any(content in text for text in printed))


def check_structure(tokenizer: PreTrainedTokenizerFast, text: str, where: str) -> None:
    """Raise ``UserError`` if a prompt's own ``text`` writes an added token that data may write too."""
    control = special_ids(tokenizer) | thought_ids(tokenizer)
    for i, token in tokenizer.added_tokens_decoder.items():
        plain = token.special or i in control or ORDINARY.fullmatch(token.content) or is_thought_mark(token.content)
        if not plain and token.content in text:
            raise UserError(
                where,
                f"{token.content!r} is an added token that the tokenizer does not call special: a response could write it too",
                "set its special to true in tokenizer_config.json and tokenizer.json, or leave it out",
            )


def _renderings(tokenizer: PreTrainedTokenizerFast, name: str) -> list[str]:
    """Short conversations in the template ``name``; without those that it rejects."""
    found = []
    for roles in (
        ("user",),
        ("user", "assistant", "user"),
        *(("user", "assistant", role) for role in ROLES),
        ROLES[:2],
    ):
        try:
            messages = [{"role": role, "content": "a"} for role in roles]
            found.append(render(tokenizer, messages, "", options={"chat_template": name}))
        except UserError:  # not all take all roles
            continue
    return found


@lru_cache(maxsize=16)
def _control_pattern(tokenizer: PreTrainedTokenizerFast) -> tuple[re.Pattern, list[int]]:
    """A pattern with one group per control token (longest first), and the id of each group."""
    control = special_ids(tokenizer) | thought_ids(tokenizer)
    added = {i: t for i, t in tokenizer.added_tokens_decoder.items() if (t.special or i in control) and t.content}
    order = sorted(added, key=lambda i: -len(added[i].content))
    groups = [
        (r"\s*" if added[i].lstrip else "") + f"({re.escape(added[i].content)})" + (r"\s*" if added[i].rstrip else "")
        for i in order
    ]
    return re.compile("|".join(groups) or r"(?!)"), order


@lru_cache(maxsize=16)
def _control_texts(tokenizer: PreTrainedTokenizerFast) -> ControlTexts:
    _, order = _control_pattern(tokenizer)
    return ControlTexts([tokenizer.added_tokens_decoder[i].content for i in order])


@lru_cache(maxsize=16)
def stand_in_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The ordinary token that replaces special ids in data: "?", else the unknown token, else the lowest such id."""
    special = special_ids(tokenizer)
    question = ordinary_encoding(tokenizer, "?", continues=True).ids
    if len(question) == 1 and question[0] not in special:
        return question[0]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in special:
        return tokenizer.unk_token_id
    return next(i for i in range(len(tokenizer)) if i not in special)


def neutral_ids(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[int]:
    """``ids`` of data, same length, with every special id replaced by ``stand_in_id``: positions stay aligned."""
    special = special_ids(tokenizer)
    if special.isdisjoint(ids):
        return list(ids)
    stand_in = stand_in_id(tokenizer)
    return [stand_in if i in special else i for i in ids]


# ---- encoding -------------------------------------------------------------------------------------------------------


def encode_text(
    tokenizer: PreTrainedTokenizerFast, text: str, continues: bool = False, thoughts: bool = True
) -> list[int]:
    """Token ids of data: no special tokens added, no control token parsed, none produced.

    Tokenizers in sentencepiece's manner put a blank before a text; ``continues`` says that other text precedes it,
    so that it gets none. ``thoughts``: marks of thoughts are tokens, as in what an assistant wrote.
    """
    if not text:
        return []
    # a word-level vocabulary can hold "</s>" as an ordinary word, which no parser option prevents
    ids = neutral_ids(tokenizer, ordinary_encoding(tokenizer, text, continues, thoughts).ids)
    marks = frozenset() if thoughts else thought_ids(tokenizer)
    return ids if marks.isdisjoint(ids) else [stand_in_id(tokenizer) if i in marks else i for i in ids]


def ordinary_encoding(
    tokenizer: PreTrainedTokenizerFast, text: str, continues: bool, thoughts: bool = True
) -> Encoding:
    """Ids and character offsets of a text that is not empty; a special id can be among them (see ``encode_text``)."""
    without_blank = continues and _blanks(tokenizer)[0]
    hidden = _printed_ids(tokenizer) if not thoughts else _printed_ids(tokenizer) - thought_ids(tokenizer)
    if not without_blank and not hidden:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).encodings[0]
    return _data_backend(tokenizer, without_blank, hidden).encode(text, add_special_tokens=False)


def data_continues(tokenizer: PreTrainedTokenizerFast, before: str) -> bool:
    """Whether data right after the trusted text ``before`` continues a text (``encode_text``) or begins one."""
    ids = encode_parts(tokenizer, [(before, True)])
    control = special_ids(tokenizer) | thought_ids(tokenizer)
    return bool(ids) and (ids[-1] not in control or _blanks(tokenizer)[1])


@lru_cache(maxsize=16)
def _blanks(tokenizer: PreTrainedTokenizerFast) -> tuple[bool, bool]:
    """Whether the tokenizer puts a blank before a text, and whether text after a control token gets none, which some
    tokenizers (Metaspace "first") do not count as a beginning and others do."""
    backend = tokenizer.backend_tokenizer
    parts = [step for name in ("normalizer", "pre_tokenizer") for step in steps_of(getattr(backend, name))]
    schemes = {step["prepend_scheme"] for step in parts if step["type"] == "Metaspace"}
    puts = not schemes <= {"never"} or any(step["type"] == "Prepend" for step in parts)
    return puts, "first" in schemes


@lru_cache(maxsize=32)
def _data_backend(tokenizer: PreTrainedTokenizerFast, without_blank: bool, hidden: frozenset[int]) -> Tokenizer:
    """The tokenizer's backend for data: parses no special tokens and none of ``hidden``; ``without_blank``: puts no
    blank before a text."""
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    if without_blank:
        for name, children in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
            kept = [_without_blank(step) for step in steps_of(getattr(backend, name))]
            state[name] = {"type": "Sequence", children: [step for step in kept if step]} if kept else None
    for token in state["added_tokens"]:
        token["special"] = token["special"] or token["id"] in hidden
    copy = Tokenizer.from_str(json.dumps(state))
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True  # those called special: as ordinary text
    return copy


def steps_of(component) -> list[dict]:
    """The serialized steps of a normalizer or pre-tokenizer."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    return state.get("normalizers") or state.get("pretokenizers") or [state]


def _without_blank(step: dict) -> dict | None:
    if step["type"] == "Prepend" or step.get("pattern") == {"Regex": LEADING_SPACES}:
        return None
    return step | {"prepend_scheme": "never"} if step["type"] == "Metaspace" else step


def encode_parts(
    tokenizer: PreTrainedTokenizerFast, parts: Iterable[tuple[str, bool]], continues: bool = False
) -> list[int]:
    """Token ids of ``(text, trusted)`` parts in order; control tokens are parsed in trusted parts only.

    Ordinary text between two control tokens is tokenized in one piece even when it spans several parts.
    ``continues``: the first part follows other text (see ``encode_text``).
    """
    pattern, pattern_ids = _control_pattern(tokenizer)
    _, after_control = _blanks(tokenizer)
    ids: list[int] = []
    run = ""
    for text, trusted in parts:
        start = 0
        for match in pattern.finditer(text) if trusted else ():
            ids += encode_text(tokenizer, run + text[start : match.start()], continues, thoughts=False)
            ids.append(pattern_ids[match.lastindex - 1])
            run, start, continues = "", match.end(), after_control
        run += text[start:]
    return ids + encode_text(tokenizer, run, continues, thoughts=False)


@lru_cache(maxsize=16)
def leading_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Special tokens that the tokenizer puts before every text, e.g. Llama's begin-of-text; often none."""
    full = tokenizer("a").input_ids
    plain = tokenizer("a", add_special_tokens=False).input_ids
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return tuple(full[:start])
    return ()


# ---- conversations --------------------------------------------------------------------------------------------------


def chat_parts(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[dict],
    where: str,
    generation_prompt: bool = True,
    options: Mapping | None = None,
) -> list[Part]:
    """The conversation in the chat template, as ``encode_parts`` takes it; together the text that transformers renders.

    ``options`` go to the template. Raises ``UserError`` (naming ``where``) when there is no template or it rejects the
    conversation.
    """
    return template_parts(tokenizer, _control_texts(tokenizer), messages, where, generation_prompt, options)


def parts_around(parts: Sequence[Part], placeholder: str, where: str, what: str) -> tuple[list[Part], list[Part]]:
    """The parts before and after ``placeholder``; ``UserError`` unless it stands there exactly once."""
    split_once("".join(text for text, _ in parts), placeholder, where, what)
    i = next(i for i, (text, _) in enumerate(parts) if placeholder in text)
    (text, trusted) = parts[i]
    before, _, after = text.partition(placeholder)
    return [*parts[:i], (before, trusted)], [(after, trusted), *parts[i + 1 :]]


def render_prompt(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[dict],
    chat_template: bool,
    where: str,
    options: Mapping | None = None,
) -> list[int]:
    """Token ids of a conversation up to where the assistant's next turn begins.

    ``messages``: ``{"role", "content"}`` dicts. With ``chat_template`` the tokenizer's template (with ``options``) and
    its generation prompt; without, "role: content" lines and "assistant:" after the tokenizer's leading tokens.
    ``where`` names the conversation in errors (see ``chat_parts``).
    """
    if chat_template:
        return encode_parts(tokenizer, chat_parts(tokenizer, messages, where, options=options))
    text = conversation_text(messages) + "\nassistant:"
    return [*leading_ids(tokenizer), *encode_parts(tokenizer, [(text, False)])]


def generation_prompt(tokenizer: PreTrainedTokenizerFast, options: Mapping | None, where: str) -> str:
    """What the chat template prints after a user's message for the assistant's turn to begin."""
    (mark,) = placeholders(1)
    return split_once(
        render(tokenizer, [{"role": "user", "content": mark}], where, True, options), mark, where, "a message"
    )[1]


# ---- stopping -------------------------------------------------------------------------------------------------------


def stop_token_ids(
    tokenizer: PreTrainedTokenizerFast, extra: Sequence[str] = (), options: Mapping | None = None
) -> set[int]:
    """Ids that end a response: end of sequence, generation_config.json's, the chat template's end of turn, ``extra``.

    ``extra`` comes from ``rollout.stop``; each must be a single token (``UserError`` otherwise). ``options`` go to the
    template.
    """
    stop = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    stop |= _stated_eos(tokenizer)
    if tokenizer.chat_template:
        stop |= _end_of_turn(tokenizer, options)
    for word in extra:
        ids = encode_parts(tokenizer, [(word, True)], continues=True)
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise UserError(
                "rollout.stop", f"{word!r} is {len(ids)} tokens, or unknown", "give strings that are one token each"
            )
        stop.add(ids[0])
    return stop


def _stated_eos(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """The ``eos_token_id`` (number or list) that transformers' generate heeds: of the generation_config.json beside the
    tokenizer, without that file of config.json. One of config.json that is no token of the tokenizer ends nothing."""
    size, directory = vocabulary_size(tokenizer), Path(tokenizer.name_or_path)
    path = directory / "generation_config.json"
    config = json_object(path if path.is_file() else directory / "config.json")
    eos = config.get("eos_token_id")
    if eos is None and isinstance(config.get("text_config"), dict):
        eos = config["text_config"].get("eos_token_id")
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    known = [i for i in ids if type(i) is int and 0 <= i < size]
    if len(known) < len(ids) and path.is_file():
        raise UserError(str(path), f"eos_token_id {eos!r}", f"token ids must be whole numbers below {size}")
    return set(known)


def _end_of_turn(tokenizer: PreTrainedTokenizerFast, options: Mapping | None) -> set[int]:
    """The control token with which the chat template closes an assistant turn (none if it closes with plain text).

    Where nothing closes the last turn, it is what comes before the next one: a token of its own, or the user's marker.
    """
    mark, question = placeholders(2)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
    pattern, pattern_ids = _control_pattern(tokenizer)
    for turns in (messages, [*messages, {"role": "user", "content": question}]):
        text = render(tokenizer, turns, "stop tokens", False, options)
        match = pattern.match(split_once(text, mark, "stop tokens", "a message")[1].lstrip())
        if match:
            return {pattern_ids[match.lastindex - 1]}
    return set()


# ---- decoding -------------------------------------------------------------------------------------------------------


def token_texts(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[str]:
    """The text each token adds, ``len(ids)`` strings; joined they are the decoded text (special tokens as written).

    A character spread over several byte tokens belongs to the last of them; the others are "". Tokens that are not
    valid UTF-8 show as replacement characters, whose number may differ from the decoded text's.
    """
    decode = tokenizer.backend_tokenizer.decode
    before = stand_in_id(tokenizer)  # a text's first token may lose its blank: the later ones must not be first
    prefix = len(decode([before], skip_special_tokens=False))

    def added(start: int, end: int) -> str:
        if start == 0:
            return decode(ids[:end], skip_special_tokens=False)
        return decode([before, *ids[start:end]], skip_special_tokens=False)[prefix:]

    texts = [""] * len(ids)
    start = 0  # tokens [start, end) wait for a whole character
    for end in range(1, len(ids) + 1):
        text = added(start, end)
        if text.endswith(REPLACEMENT) and end - start == UTF8_MAX_BYTES:  # the first of them begins no character
            texts[start], start = added(start, start + 1), start + 1
            text = added(start, end)
        if not text.endswith(REPLACEMENT) or end == len(ids):
            texts[end - 1], start = text, end
    return texts
