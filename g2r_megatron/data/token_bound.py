"""An upper bound on the number of tokens of a text, from its bytes: most rows are known to fit without tokenizing them."""

import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

from transformers import PreTrainedTokenizerFast

from g2r_megatron.data.tokenizer import steps_of

# How many times as many UTF-8 bytes a normalizer or pre-tokenizer can make of a text, at most.
# Normal forms: https://www.unicode.org/faq/normalization.html; Metaspace writes a blank as a character of 3 bytes.
NormalForm = Literal["NFC", "NFD", "NFKC", "NFKD"]
NORMAL_FORMS: dict[NormalForm, int] = {"NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11}
GROWTH = {"Metaspace": 3, "Lowercase": 3}
NO_GROWTH = {
    *("ByteLevel", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "BertPreTokenizer"),
    *("CharDelimiterSplit", "Strip", "StripAccents", "Prepend", "UnicodeScripts"),
}
PER_TEXT = 16  # tokens around a text: a blank of up to 3 bytes, leading tokens, the assistant's name


@lru_cache(maxsize=16)
def _growth(tokenizer: PreTrainedTokenizerFast) -> tuple[int, tuple[NormalForm, ...]] | None:
    """The factor for texts that are in all the named normal forms already, and those forms; None if it is unknown."""
    backend, factor, forms = tokenizer.backend_tokenizer, 1, list[NormalForm]()
    for step in [*steps_of(backend.normalizer), *steps_of(backend.pre_tokenizer)]:
        kind = step["type"]
        if kind in NORMAL_FORMS:
            forms.append(kind)
        elif kind == "Replace":
            old = step["pattern"].get("String", "")
            new = len(step["content"].encode())
            # what a regular expression matches has at least one byte
            factor *= max(1, -(-new // max(1, len(old.encode()))))
        elif kind in GROWTH:
            factor *= GROWTH[kind]
        elif kind not in NO_GROWTH:
            return None
    return factor, tuple(forms)


def most_tokens(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> float:
    """A number of tokens that the concatenated ``texts`` cannot exceed, however they are encoded; inf if unknown.

    Every token of a text stands for at least one byte of the normalized text (byte fallback included), and a control
    token for at least one byte of its spelling.
    """
    growth = _growth(tokenizer)
    if growth is None:
        return float("inf")
    factor, forms = growth
    total = 0.0
    for text in texts:
        most = factor * len(text.encode()) + PER_TEXT
        if not text.isascii():
            for form in forms:
                most *= 1 if unicodedata.is_normalized(form, text) else NORMAL_FORMS[form]
        total += most
    return total
