"""Prompts of queries as token ids: checked for every row before a run begins, made when a step asks for them.

A text of n bytes has at most a known multiple of n tokens, so most rows are known to fit without being tokenized.
"""

import json
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerFast

from g2r_megatron.config.options import RolloutConfig
from g2r_megatron.data.tokenizer import chat_parts, conversation_text, encode_parts, encode_text, leading_ids, steps_of
from g2r_megatron.data.types import Query
from g2r_megatron.errors import UserError

# How many times as many UTF-8 bytes a normalizer or pre-tokenizer can make of a text, at most.
# Normal forms: https://www.unicode.org/faq/normalization.html; Metaspace writes a blank as a character of 3 bytes.
NORMAL_FORMS = {"NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11}
GROWTH = {"Metaspace": 3, "Lowercase": 3}
NO_GROWTH = {
    *("ByteLevel", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "BertPreTokenizer"),
    *("CharDelimiterSplit", "Strip", "StripAccents", "Prepend", "UnicodeScripts"),
}
PER_RUN = 4  # tokens that a tokenizer may put before a text of its own: a blank of up to 3 bytes, a leading token
CACHED_PROMPTS = 1024


@lru_cache(maxsize=16)
def _growth(tokenizer: PreTrainedTokenizerFast) -> tuple[int, tuple[str, ...]] | None:
    """The factor for texts that are in all the named normal forms already, and those forms; None if it is unknown."""
    backend, factor, forms = tokenizer.backend_tokenizer, 1, []
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
        most = factor * len(text.encode()) + PER_RUN
        if not text.isascii():
            for form in forms:
                most *= 1 if unicodedata.is_normalized(form, text) else NORMAL_FORMS[form]
        total += most
    return total


class Prompts:
    """``prompts[id]``: the token ids of a query's prompt, rendered when they are asked for (the last ones are kept).

    ``measure`` renders a prompt and checks its length.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rollout: RolloutConfig):
        self._tokenizer, self._rollout = tokenizer, rollout
        self._queries: dict[str, Query] = {}
        self._ids = lru_cache(maxsize=CACHED_PROMPTS)(self._render)

    def add(self, queries: Sequence[Query]) -> None:
        """Queries that may be asked for."""
        self._queries |= {query.id: query for query in queries}

    def __getitem__(self, id: str) -> list[int]:
        return self._ids(id)

    def _render(self, id: str) -> list[int]:
        return self._encode(self._parts(self._queries[id]))

    def measure(self, query: Query) -> None:
        """Raise ``UserError`` for a conversation that the chat template rejects, or whose prompt is too long."""
        limit = self._rollout.max_prompt_tokens
        parts = self._parts(query)
        if most_tokens(self._tokenizer, [text for text, _ in parts]) <= limit:
            return
        tokens = len(self._encode(parts))
        if tokens > limit:
            raise UserError(
                "rollout.max_prompt_tokens",
                f"query {query.id!r} has {tokens} prompt tokens, more than {limit}",
                "raise it or leave the query out",
            )

    def _parts(self, query: Query) -> list[tuple[str, bool]]:
        """As ``data.tokenizer.render_prompt`` puts a prompt together."""
        if self._rollout.chat_template:
            return chat_parts(self._tokenizer, query.messages, f"query {query.id!r}")
        return [(conversation_text(query.messages) + "\nassistant:", False)]

    def _encode(self, parts: list[tuple[str, bool]]) -> list[int]:
        if self._rollout.chat_template:
            return encode_parts(self._tokenizer, parts)
        return [*leading_ids(self._tokenizer), *encode_text(self._tokenizer, parts[0][0])]
