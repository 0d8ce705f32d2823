"""A sentencepiece ``tokenizer.model`` as a fast tokenizer with sentencepiece's own ids.

transformers 5 rebuilds such files by the class that the directory names and loses what that class does not know: the
leading blank of a Mistral directory, the unigram scores of one that says LlamaTokenizer, normalisation rules. Here the
file alone decides, and a sample text is compared with sentencepiece before anything is trained on the result.

Where they may differ: text that spells a control or byte piece ("<s>", "<0x0A>") with a character that a unigram model
does not know. sentencepiece has bytes for it; here it is that piece, which data/tokenizer.py replaces if it is control.
"""

import re
from pathlib import Path

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from g2r_megatron.errors import UserError

Piece = ModelProto.SentencePiece
BLANK = "▁"  # how pieces spell a space
LEADING_SPACES = "^ +"
# Below any sum of real scores: the library would choose control and byte pieces for text that spells them.
NEVER = -1e4
TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\n")  # the first line of Llama 3's own file
SAMPLE = (
    "The answer is: True or False?\n\n  - caf\u00e9, 12.5 % (x_1 = y);\tdef f(a): return [a]\n\u4f60\u597d \U0001f600 "
)


def read_sentencepiece(path: Path) -> ModelProto:
    """The parsed file. Raises ``UserError`` unless it is a complete sentencepiece model of a kind we can convert."""

    def refuse(found: str, remedy: str = "restore the file, or give a tokenizer.json") -> UserError:
        return UserError(str(path), found, remedy)

    data = path.read_bytes()
    if TIKTOKEN.match(data):
        raise refuse("it is of tiktoken, not of sentencepiece", "give a tokenizer.json (transformers converts it)")
    proto = ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise refuse("not a sentencepiece model, or cut off") from error
    if not proto.pieces or not proto.HasField("trainer_spec") or not proto.HasField("normalizer_spec"):
        raise refuse("not a sentencepiece model, or cut off")
    try:
        sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise refuse(f"rejected by sentencepiece ({error})") from error
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    kind = TrainerSpec.ModelType.Name(trainer.model_type)
    if kind not in ("UNIGRAM", "BPE"):
        raise refuse(f"model type {kind}", "must be UNIGRAM or BPE")
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise refuse("blanks are not the beginning of a piece", "give a tokenizer.json")
    plain = kind == "BPE" and not normalizer.add_dummy_prefix and not normalizer.remove_extra_whitespaces
    if any(p.type == Piece.USER_DEFINED and (not plain or " " in p.piece) for p in proto.pieces):
        # the tokenizers library cuts texts at such pieces and treats each part as a text of its own
        raise refuse("user-defined pieces with blanks, or in a model that is not plain BPE", "give a tokenizer.json")
    return proto


def build_backend(path: Path) -> tuple[Tokenizer, ModelProto]:
    """The file as a ``tokenizers.Tokenizer`` and its contents; no special tokens are added to texts.

    Raises ``UserError`` for a file that is no sentencepiece model or that does not convert exactly.
    """
    proto = read_sentencepiece(path)
    backend = Tokenizer(_bpe(proto) if proto.trainer_spec.model_type == TrainerSpec.BPE else _unigram(proto))
    backend.normalizer = normalizers.Sequence(_normalizers(proto))
    steps = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(steps)
    control = (Piece.CONTROL, Piece.UNKNOWN)
    backend.add_special_tokens([AddedToken(p.piece, normalized=False) for p in proto.pieces if p.type in control])
    # looked for in normalised text, where blanks are spelled as in pieces
    backend.add_tokens([AddedToken(p.piece, normalized=True) for p in proto.pieces if p.type == Piece.USER_DEFINED])
    _compare(backend, path)
    return backend, proto


def _bpe(proto: ModelProto) -> models.BPE:
    """Merges are not in the file: any two neighbours that spell a piece merge, the piece of the highest score first."""
    ids = {p.piece: i for i, p in enumerate(proto.pieces)}
    scores = {p.piece: p.score for p in proto.pieces if p.type == Piece.NORMAL}
    merges = [
        (-score, ids[piece], piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return models.BPE(
        vocab=ids,
        merges=[(left, right) for _, _, left, right in sorted(merges)],
        unk_token=proto.trainer_spec.unk_piece,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _unigram(proto: ModelProto) -> models.Unigram:
    scores = [(p.piece, p.score if p.type == Piece.NORMAL else NEVER) for p in proto.pieces]
    return models.Unigram(scores, unk_id=proto.trainer_spec.unk_id, byte_fallback=proto.trainer_spec.byte_fallback)


def _normalizers(proto: ModelProto) -> list:
    spec = proto.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(pattern), "") for pattern in (LEADING_SPACES, " +$")]
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(BLANK))
    return [*steps, normalizers.Replace(" ", BLANK)]


def _compare(backend: Tokenizer, path: Path) -> None:
    """Raise ``UserError`` unless both give the same ids for a sample text."""
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for line in (SAMPLE, *SAMPLE.splitlines()):
        expected, found = original.encode(line), backend.encode(line, add_special_tokens=False).ids
        if found != expected:
            raise UserError(
                str(path), f"{line!r} would be {found}, for sentencepiece {expected}", "give a tokenizer.json"
            )
