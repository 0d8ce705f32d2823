"""A tokenizer from the files of a model directory: ``tokenizer.json``, ``tokenizer.model``, or a vocabulary and merges.

Ids are those that the files state, for added tokens too.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from g2r_megatron.data.sentencepiece_model import build_backend
from g2r_megatron.data.stand_ins import check_stand_ins
from g2r_megatron.errors import UserError, warn

TO_SAVE_AGAIN = "save it again with transformers' save_pretrained"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
FILES_BESIDE = ("merges.txt", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
PROCESSOR_TEMPLATE = "chat_template.json"  # of models that also read images or sounds
# Tokenizers of other libraries, which no file of ``TOKENIZER_FILES`` accompanies: (pattern, what reads it).
OTHER_TOKENIZERS = (
    ("tekken.json", "mistral-common"),
    ("*.tiktoken", "tiktoken"),
    ("tiktoken.model", "tiktoken"),
    ("tokenizer.model.*", "mistral-common"),
    ("spiece.model", "sentencepiece, under another name than tokenizer.model"),
    ("sentencepiece.bpe.model", "sentencepiece, under another name than tokenizer.model"),
    ("vocab.txt", "BERT's tokenizer"),
)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
NO_LIMIT = 10**30  # as transformers writes a length without limit


class SentencePieceTokenizer(PreTrainedTokenizerFast):
    """A tokenizer whose backend was made from ``tokenizer.model`` here: transformers converts no file itself."""

    @classmethod
    def convert_to_native_format(cls, **options) -> dict:  # type: ignore[override]
        return options


def has_tokenizer(directory: Path) -> bool:
    """Whether the directory holds files that ``load_tokenizer`` reads."""
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


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
    check_stand_ins(*(path / name for name in (*TOKENIZER_FILES, *FILES_BESIDE, PROCESSOR_TEMPLATE)))
    _refuse_byte_order_marks(path)
    config = json_object(path / "tokenizer_config.json")
    _check_code(path, config)
    try:
        tokenizer = _read_tokenizer(path, config)
        _keep_stated_ids(tokenizer, path, config)
        tokenizer.model_max_length = NO_LIMIT  # rollout.max_prompt_tokens and judge.max_length are the limits
        _read_chat_template(tokenizer, path)
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


def _refuse_byte_order_marks(path: Path) -> None:
    """Raise ``UserError`` for a JSON file that the libraries do not read because an editor put a mark before it."""
    for name in (*TOKENIZER_FILES, *FILES_BESIDE):
        file = path / name
        if file.suffix == ".json" and file.is_file():
            with file.open("rb") as stream:
                if stream.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK:
                    raise UserError(str(file), "begins with a byte order mark", "save it as UTF-8 without one")


def _check_code(path: Path, config: dict) -> None:
    """Raise ``UserError`` for a tokenizer that is code; a warning where ``tokenizer.json`` says the same without it."""
    code = config.get("auto_map")
    names = code.get("AutoTokenizer") if isinstance(code, dict) else code
    if not names or (isinstance(names, list) and not any(names)):
        return
    if (path / "tokenizer.json").is_file():
        warn(f"{path}: its tokenizer's own code ({names}) is not run; tokenizer.json is read")
        return
    raise UserError(
        str(path / "tokenizer_config.json"),
        f"the tokenizer is code (auto_map {code})",
        "code from a model directory is never run; give a directory with a tokenizer.json",
    )


def _read_chat_template(tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Take the template of ``chat_template.json`` where the tokenizer has none, and check what it has."""
    template = tokenizer.chat_template
    if template is None:
        template = tokenizer.chat_template = json_object(path / PROCESSOR_TEMPLATE).get("chat_template")
    texts = template.values() if isinstance(template, dict) else [template]
    if template is not None and not all(isinstance(text, str) for text in texts):
        found = f"chat_template is a {type(template).__name__}"
        raise UserError(f"tokenizer {path}", found, "it must be a text, or a list of objects with name and template")


def json_object(path: Path) -> dict:
    """The file's object; empty without the file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
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
        return _read_vocabulary(path, config)
    needed = "tokenizer.json, tokenizer.model, or vocab.json and merges.txt must be there"
    for pattern, library in OTHER_TOKENIZERS:
        for file in sorted(path.glob(pattern)):
            raise UserError(
                "tokenizer", f"{path} has no tokenizer files but {file.name}, which is read by {library}", needed
            )
    raise UserError("tokenizer", f"{path} has no tokenizer files", needed)


def _read_vocabulary(path: Path, config: dict):
    """``vocab.json`` and ``merges.txt``: how texts are split before merges, transformers knows by the tokenizer's class."""
    from transformers import AutoTokenizer  # imports torch's compiler: a second of every command's start

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except ValueError as error:
        named = config.get("tokenizer_class", "missing")
        raise UserError(
            f"tokenizer {path}",
            f"vocab.json and merges.txt do not say how texts are split, and no class that does is named "
            f"(tokenizer_class {named}, config.json's model_type)",
            "name the class that made them (GPT2Tokenizer, Qwen2Tokenizer) in tokenizer_config.json, or give a "
            "tokenizer.json",
        ) from error


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


def _keep_stated_ids(tokenizer: PreTrainedTokenizerFast, path: Path, config: dict) -> None:
    """Give every added token the id that its directory states, also where those ids leave gaps.

    The tokenizers library numbers added tokens without gaps, whatever the files say, unless the vocabulary has them.
    Raises ``UserError`` for an id that another token has, or a token of the vocabulary that is said to have another id.
    """
    whole = json_object(path / "tokenizer.json") if (path / "tokenizer.json").is_file() else {}
    stated = [(token["content"], token["id"]) for token in whole.get("added_tokens") or []]
    stated += json_object(path / "added_tokens.json").items()
    stated += [(token["content"], i) for i, token in (config.get("added_tokens_decoder") or {}).items()]
    found = tokenizer.get_vocab()
    moved = {token: int(number) for token, number in stated if found.get(token) != int(number)}
    if not moved:
        return
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    taken = {number for token, number in found.items() if token not in moved}
    for token, number in moved.items():
        disputed = any(other == token and int(said) != number for other, said in stated)
        if disputed or token not in found or not isinstance(vocabulary, dict) or token in vocabulary or number in taken:
            raise UserError(
                f"tokenizer {path}",
                f"token {token!r} is said to be {number}, but is {found.get(token)}",
                "the files belong to different tokenizers; " + TO_SAVE_AGAIN,
            )
        taken.add(number)
        vocabulary[token] = number
    for token in state["added_tokens"]:
        token["id"] = moved.get(token["content"], token["id"])
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """The highest id of a token, plus one: more than ``len(tokenizer)`` where ids leave gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def hide_tokens(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str]) -> None:
    """Make added tokens control tokens, so that no text is ever encoded to them. For use right after loading."""
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    hidden = [AddedToken(added[text].content, special=True, normalized=False) for text in tokens]
    tokenizer.backend_tokenizer.add_special_tokens(hidden)
