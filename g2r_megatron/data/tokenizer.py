"""Text to token ids and back, such that data can never become a control token.

Conversations, criteria and responses are data: a user who writes ``<|im_end|>`` has written ten characters, not
ended a turn. So text comes in two kinds: *trusted* (a chat template's own pieces, the judge template of the config),
in which special tokens are parsed, and *data*, in which they are not. ``encode_parts`` encodes a mixture of both;
ordinary text is tokenized across the seams, so a prompt without hostile text has exactly its usual ids.

"Special" is what the tokenizer declares special; added tokens it does not declare so (Qwen3's ``<think>``) are
ordinary text, as they are for Hugging Face. The tokenizer must not be changed after loading: facts about it are cached.
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from jinja2.exceptions import TemplateError
from tokenizers import Encoding, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from g2r_megatron.data.sentencepiece_model import LEADING_SPACES, build_backend
from g2r_megatron.errors import UserError

SLOT = "@@g2r-slot-{}@@"
# Llama 3.2's template prints today's date unless it is given one: a prompt must not depend on the day it is rendered.
TEMPLATE_DATE = "26 Jul 2024"
UTF8_MAX_BYTES = 4
REPLACEMENT = "\ufffd"
TO_SAVE_AGAIN = "save it again with transformers' save_pretrained"


class SentencePieceTokenizer(PreTrainedTokenizerFast):
    """A tokenizer whose backend was made from ``tokenizer.model`` here: transformers converts no file itself."""

    @classmethod
    def convert_to_native_format(cls, **options) -> dict:
        return options


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face directory; local files only, no code from the directory is run.

    ``tokenizer.json`` is taken as it is (transformers 5 rebuilds some of them by the model's type, with other ids),
    else ``tokenizer.model`` with sentencepiece's ids, else ``vocab.json`` and ``merges.txt`` by transformers. Raises
    ``UserError`` for a missing directory, one without tokenizer files, files that cannot be read or contradict each
    other, and tokenizers that are code.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError("tokenizer", f"{path} is not a directory", "give a Hugging Face model directory")
    config = _json_object(path / "tokenizer_config.json")
    code = config.get("auto_map")
    if code and (not isinstance(code, dict) or "AutoTokenizer" in code):
        raise UserError(
            str(path / "tokenizer_config.json"),
            f"the tokenizer is code (auto_map {code})",
            "code from a model directory is never run; give a directory with a tokenizer.json and no auto_map",
        )
    try:
        tokenizer = _read_tokenizer(path, config)
        _check_added_tokens(tokenizer, path, config)
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception for a broken file
        first_line = (str(error).splitlines() or [""])[0]
        raise UserError(
            "tokenizer", f"{path} cannot be read ({type(error).__name__}: {first_line})", TO_SAVE_AGAIN
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            "tokenizer", f"{path} is a {type(tokenizer).__name__}", "a fast tokenizer is needed (tokenizer.json)"
        )
    return tokenizer


def _json_object(path: Path) -> dict:
    """The file's object; empty without the file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(str(path), f"not readable as JSON ({error})", "restore the file") from error
    if not isinstance(content, dict):
        raise UserError(str(path), f"a {type(content).__name__}", "must be a JSON object; restore the file")
    return content


def _read_tokenizer(path: Path, config: dict):
    if (path / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
    if (path / "tokenizer.model").is_file():
        return _read_sentencepiece(path, config)
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    raise UserError(
        "tokenizer",
        f"{path} has no tokenizer files",
        "tokenizer.json, tokenizer.model, or vocab.json and merges.txt must be there",
    )


def _read_sentencepiece(path: Path, config: dict) -> SentencePieceTokenizer:
    """What the configs beside ``tokenizer.model`` leave open comes from it; begin-of-text leads every text."""
    backend, proto = build_backend(path / "tokenizer.model")
    tokenizer = SentencePieceTokenizer.from_pretrained(str(path), tokenizer_object=backend, local_files_only=True)
    spec = proto.trainer_spec
    for role, number in (("unk", spec.unk_id), ("bos", spec.bos_id), ("eos", spec.eos_id)):
        if getattr(tokenizer, f"{role}_token") is None and 0 <= number < len(proto.pieces):
            setattr(tokenizer, f"{role}_token", proto.pieces[number].piece)
    tokenizer.add_bos_token = bool(config.get("add_bos_token", True)) and tokenizer.bos_token is not None
    return tokenizer


def _check_added_tokens(tokenizer: PreTrainedTokenizerFast, path: Path, config: dict) -> None:
    """Raise ``UserError`` for a token that has another number than its directory says (it would be appended last)."""
    stated = [(token, i) for token, i in _json_object(path / "added_tokens.json").items()]
    stated += [(token["content"], i) for i, token in (config.get("added_tokens_decoder") or {}).items()]
    vocabulary = tokenizer.get_vocab()
    for token, number in stated:
        if vocabulary.get(token) != int(number):
            raise UserError(
                f"tokenizer {path}",
                f"token {token!r} is said to be {number}, but is {vocabulary.get(token)}",
                "the files belong to different tokenizers; " + TO_SAVE_AGAIN,
            )


# ---- what the tokenizer calls special -------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def special_ids(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Ids of control tokens; the unknown token is ordinary (data may hold unknown words) unless it has another role."""
    ids = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    control = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    if tokenizer.unk_token_id not in control:
        ids.discard(tokenizer.unk_token_id)
    return frozenset(ids)


@lru_cache(maxsize=16)
def _special_pattern(tokenizer: PreTrainedTokenizerFast) -> tuple[re.Pattern, list[int]]:
    """A pattern with one group per special token (longest first), and the id of each group."""
    added = {i: t for i, t in tokenizer.added_tokens_decoder.items() if t.special and t.content}
    order = sorted(added, key=lambda i: -len(added[i].content))
    groups = [
        (r"\s*" if added[i].lstrip else "") + f"({re.escape(added[i].content)})" + (r"\s*" if added[i].rstrip else "")
        for i in order
    ]
    return re.compile("|".join(groups) or r"(?!)"), order


@lru_cache(maxsize=16)
def stand_in_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The ordinary token that replaces special ids in data: "?", else the unknown token, else the lowest such id."""
    special = special_ids(tokenizer)
    question = _ordinary_ids(tokenizer, "?", continues=True)
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


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str, continues: bool = False) -> list[int]:
    """Token ids of data: no special tokens added, none parsed, none produced.

    Tokenizers in sentencepiece's manner put a blank before a text; ``continues`` says that other text precedes it,
    so that it gets none.
    """
    # a word-level vocabulary can hold "</s>" as an ordinary word, which no parser option prevents
    return neutral_ids(tokenizer, _ordinary_ids(tokenizer, text, continues))


def _ordinary_ids(tokenizer: PreTrainedTokenizerFast, text: str, continues: bool) -> list[int]:
    return ordinary_encoding(tokenizer, text, continues).ids if text else []


def ordinary_encoding(tokenizer: PreTrainedTokenizerFast, text: str, continues: bool) -> Encoding:
    """Ids and character offsets of a text that is not empty; a special id can be among them (see ``encode_text``)."""
    without_blank, _ = _continuation(tokenizer)
    if continues and without_blank is not None:
        return without_blank.encode(text, add_special_tokens=False)
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).encodings[0]


def data_continues(tokenizer: PreTrainedTokenizerFast, before: str) -> bool:
    """Whether data right after the trusted text ``before`` continues a text (``encode_text``) or begins one."""
    ids = encode_parts(tokenizer, [(before, True)])
    return bool(ids) and (ids[-1] not in special_ids(tokenizer) or _continuation(tokenizer)[1])


@lru_cache(maxsize=16)
def _continuation(tokenizer: PreTrainedTokenizerFast) -> tuple[Tokenizer | None, bool]:
    """The backend for text that continues other text (None: the usual one), and whether it also serves text after a
    special token, which some tokenizers (Metaspace "first") do not count as a beginning and others do."""
    backend = tokenizer.backend_tokenizer
    parts = [step for name in ("normalizer", "pre_tokenizer") for step in steps_of(getattr(backend, name))]
    schemes = {step["prepend_scheme"] for step in parts if step["type"] == "Metaspace"}
    if schemes <= {"never"} and not any(step["type"] == "Prepend" for step in parts):
        return None, False
    state = json.loads(backend.to_str())
    for name, children in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        kept = [_without_blank(step) for step in steps_of(getattr(backend, name))]
        state[name] = {"type": "Sequence", children: [step for step in kept if step]} if kept else None
    copy = Tokenizer.from_str(json.dumps(state))
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True  # as ordinary text
    return copy, "first" in schemes


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
    """Token ids of ``(text, trusted)`` parts in order; special tokens are parsed in trusted parts only.

    Ordinary text between two special tokens is tokenized in one piece even when it spans several parts.
    ``continues``: the first part follows other text (see ``encode_text``).
    """
    pattern, pattern_ids = _special_pattern(tokenizer)
    _, after_special = _continuation(tokenizer)
    ids: list[int] = []
    run = ""
    for text, trusted in parts:
        start = 0
        for match in pattern.finditer(text) if trusted else ():
            ids += encode_text(tokenizer, run + text[start : match.start()], continues)
            ids.append(pattern_ids[match.lastindex - 1])
            run, start, continues = "", match.end(), after_special
        run += text[start:]
    return ids + encode_text(tokenizer, run, continues)


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


def conversation_text(messages: Sequence[dict]) -> str:
    """The conversation as "role: content" lines."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def chat_parts(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[dict],
    where: str,
    generation_prompt: bool = True,
    **template_options,
) -> list[tuple[str, bool]]:
    """The conversation in the chat template: ``(piece, True)``, ``(content, False)``, ..., ``(piece, True)``.

    The template sees a slot instead of each content (with the content's own surrounding blanks, which templates may
    trim), so it cannot be steered by content. Raises ``UserError`` (naming ``where``) when there is no template, when
    it rejects the conversation, or when it repeats, drops or reorders a content.
    """
    if not tokenizer.chat_template:
        raise UserError(where, "the tokenizer has no chat template", "set chat_template to false")
    cores = [message["content"].strip() for message in messages]
    slotted = [_with_slot(message, SLOT.format(i)) for i, message in enumerate(messages)]
    options = {"date_string": TEMPLATE_DATE, **template_options}
    try:
        rest = tokenizer.apply_chat_template(
            slotted, tokenize=False, add_generation_prompt=generation_prompt, **options
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        roles = [message["role"] for message in messages]
        raise UserError(
            where, f"the chat template rejects roles {roles} ({error})", "change the messages or the template"
        ) from error
    parts: list[tuple[str, bool]] = []
    for i, core in enumerate(cores):
        head, found, rest = rest.partition(SLOT.format(i))
        if not found or SLOT.format(i) in rest or SLOT.format(i) in head:
            raise UserError(
                where,
                f"the chat template does not print message {i} exactly once and in order",
                "use another chat template",
            )
        parts += [(head, True), (core, False)]
    return [*parts, (rest, True)]


def _with_slot(message: dict, slot: str) -> dict:
    """The message with its content replaced by ``slot`` between the content's own leading and trailing blanks."""
    content = message["content"]
    lead = content[: len(content) - len(content.lstrip())]
    trail = content[len(lead) :][len(content[len(lead) :].rstrip()) :]
    return {**message, "content": lead + slot + trail}


def render_prompt(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[dict], chat_template: bool, where: str
) -> list[int]:
    """Token ids of a conversation up to where the assistant's next turn begins.

    ``messages``: ``{"role", "content"}`` dicts. With ``chat_template`` the tokenizer's template and its generation
    prompt; without, "role: content" lines and "assistant:" after the tokenizer's leading tokens. ``where`` names the
    conversation in errors (see ``chat_parts``).
    """
    if chat_template:
        return encode_parts(tokenizer, chat_parts(tokenizer, messages, where))
    return [*leading_ids(tokenizer), *encode_text(tokenizer, conversation_text(messages) + "\nassistant:")]


# ---- stopping -------------------------------------------------------------------------------------------------------


def stop_token_ids(tokenizer: PreTrainedTokenizerFast, extra: Sequence[str] = ()) -> set[int]:
    """Ids that end a response: end of sequence, generation_config.json's, the chat template's end of turn, ``extra``.

    ``extra`` comes from ``rollout.stop``; each must be a single token (``UserError`` otherwise).
    """
    stop = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    stop |= _generation_config_eos(tokenizer)
    if tokenizer.chat_template:
        stop |= _end_of_turn(tokenizer)
    for word in extra:
        ids = encode_parts(tokenizer, [(word, True)], continues=True)
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise UserError(
                "rollout.stop", f"{word!r} is {len(ids)} tokens, or unknown", "give strings that are one token each"
            )
        stop.add(ids[0])
    return stop


def _generation_config_eos(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """The ``eos_token_id`` (number or list) of the generation_config.json beside the tokenizer, if there is one."""
    path = Path(tokenizer.name_or_path) / "generation_config.json"
    if not path.is_file():
        return set()
    try:
        eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise UserError(str(path), f"not a JSON object ({error})", "save it again with transformers") from error
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(type(i) is int and 0 <= i < len(tokenizer) for i in ids):
        raise UserError(str(path), f"eos_token_id {eos!r}", f"token ids must be whole numbers below {len(tokenizer)}")
    return set(ids)


def _end_of_turn(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """The special token with which the chat template closes an assistant turn (none if it closes with plain text)."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    after, _ = chat_parts(tokenizer, messages, "stop tokens", generation_prompt=False)[-1]
    pattern, pattern_ids = _special_pattern(tokenizer)
    match = pattern.match(after.lstrip())
    return {pattern_ids[match.lastindex - 1]} if match else set()


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
