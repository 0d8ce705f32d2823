"""Where each token stands in a text, in UTF-8 bytes: of ids that a policy sampled, and of a text that is encoded.

A text of L bytes in T tokens has T + 1 bounds, [T + 1] fp64 from 0 to L that never fall: token t is what stands between
bounds t and t + 1. Neighbours meet, so that every byte belongs to one token; tokens can share a character, or have no text.
"""

import codecs
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from g2r_megatron.data.tokenizer import REPLACEMENT, neutral_ids, ordinary_encoding, stand_in_id

BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")
# byte-level vocabularies spell each byte as a character: the visible ones of Latin-1 as themselves, the others from 256 on
_VISIBLE = [*range(ord("!"), 127), *range(ord("¡"), 173), *range(174, 256)]
BYTE_OF = {chr(byte): byte for byte in _VISIBLE}
BYTE_OF |= {chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*_VISIBLE}))}


def decoded_bounds(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> tuple[str, Tensor]:
    """The text that ``ids`` spell after other text (special ids as ``neutral_ids`` replaces them), and their bounds.

    What is not UTF-8 is U+FFFD in the text, as everywhere in Python; the tokens whose bytes it replaces share it. An id
    that the tokenizer does not have has no text.
    """
    pieces = [token_bytes(tokenizer, token) for token in neutral_ids(tokenizer, ids)]
    raw = b"".join(pieces)
    stretches: list[tuple[int, int]] = []

    def replace(error: UnicodeDecodeError) -> tuple[str, int]:
        stretches.append((error.start, error.end))
        return REPLACEMENT, error.end

    codecs.register_error("g2r-replace", replace)  # type: ignore[arg-type]  # Python tells nobody else where it replaced what
    text = raw.decode("utf-8", "g2r-replace")
    widths = [1.0] * len(raw)  # of each byte, in bytes of the text
    for start, end in stretches:
        widths[start:end] = [len(REPLACEMENT.encode()) / (end - start)] * (end - start)
    at = [0.0, *accumulate(widths)]
    return text, torch.tensor([at[end] for end in accumulate(map(len, pieces), initial=0)], dtype=torch.float64)


def encoded_bounds(tokenizer: PreTrainedTokenizerFast, text: str, continues: bool) -> tuple[list[int], Tensor]:
    """``encode_text`` of the data ``text``, and the bounds of its tokens in ``text``.

    Where the tokens do not spell the text itself (a normalising tokenizer, unknown words), the tokenizer's character
    offsets count: tokens that share characters divide them by the bytes they spell. Characters that no token claims
    belong to the token before, or, blanks, to the one after.
    """
    if not text or not (encoding := ordinary_encoding(tokenizer, text, continues)).ids:
        return [], torch.zeros(1, dtype=torch.float64)
    lengths = [len(token_bytes(tokenizer, token)) for token in encoding.ids]
    spelled = b"".join(token_bytes(tokenizer, token) for token in encoding.ids)
    if not continues and spelled == b" " + text.encode():  # sentencepiece's blank before a text
        lengths[0] -= 1
        spelled = spelled[1:]
    if spelled == text.encode():
        bounds: Sequence[float] = list(accumulate(lengths, initial=0))
    else:
        bounds = _bounds_of_offsets(text, encoding.offsets, lengths)
    return neutral_ids(tokenizer, encoding.ids), torch.tensor(bounds, dtype=torch.float64)


def _bounds_of_offsets(text: str, offsets: Sequence[tuple[int, int]], lengths: Sequence[int]) -> list[float]:
    """Bounds from each token's (first, last + 1) character and the number of bytes it spells."""
    at = list(accumulate((len(char.encode()) for char in text), initial=0))  # character -> byte
    groups: list[list[int]] = []  # of tokens that share characters: [first token, first character, last character + 1]
    for token, (start, end) in enumerate(offsets):
        if groups and start < groups[-1][2]:
            groups[-1][2] = max(groups[-1][2], end)
        else:
            groups.append([token, start, end])
    bounds, start = [0.0], 0
    for (first, _, end), following in zip(groups, [*groups[1:], [len(offsets), len(text), len(text)]], strict=True):
        last = following[0] == len(offsets)
        end = len(text) if last else end + len(text[end : following[1]].rstrip())
        sizes = [max(size, 1) for size in lengths[first : following[0]]]
        width = at[end] - at[start]
        bounds += [at[start] + width * part / sum(sizes) for part in accumulate(sizes)]
        start = end
    return bounds


@lru_cache(maxsize=1 << 19)  # a few vocabularies
def token_bytes(tokenizer: PreTrainedTokenizerFast, token: int) -> bytes:
    """The bytes that a token adds to a text which goes on; none for an id that the tokenizer does not have."""
    piece = tokenizer.backend_tokenizer.id_to_token(token)
    if piece is None:
        return b""
    steps = _decoder_steps(tokenizer)
    if steps == ["ByteLevel"]:  # added tokens stand for themselves
        return bytes(BYTE_OF[char] for char in piece) if BYTE_OF.keys() >= set(piece) else piece.encode()
    if "ByteFallback" in steps and BYTE_PIECE.fullmatch(piece):
        return bytes([int(piece[3:5], 16)])
    decode, before = tokenizer.backend_tokenizer.decode, stand_in_id(tokenizer)
    start = len(decode([before], skip_special_tokens=False))
    return decode([before, token], skip_special_tokens=False)[start:].encode()


@lru_cache(maxsize=16)
def _decoder_steps(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The types of the steps of the tokenizer's decoder."""
    decoder = tokenizer.backend_tokenizer.decoder
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    return [step["type"] for step in state.get("decoders", [state])]
