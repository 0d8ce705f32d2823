"""Prompts of queries as token ids: checked for every row before a run begins, made when a step asks for them."""

from collections.abc import Iterable, Mapping
from functools import lru_cache

from transformers import PreTrainedTokenizerFast

from g2r_megatron.data.chat_template import conversation_text
from g2r_megatron.data.token_bound import most_tokens
from g2r_megatron.data.tokenizer import chat_parts, render_prompt
from g2r_megatron.data.types import Query
from g2r_megatron.errors import UserError

CACHED_PROMPTS = 1024


class Prompts:
    """``prompts[id]``: the token ids of a query's prompt, rendered when they are asked for (the last ones are kept).

    A hundred thousand prompts as lists of numbers would take gigabytes.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, chat_template: bool, max_tokens: int, options: Mapping | None = None
    ):
        """``chat_template`` and its ``options``: as of ``render_prompt``; ``max_tokens``: ``rollout.max_prompt_tokens``."""
        self._tokenizer, self._chat_template, self._max_tokens = tokenizer, chat_template, max_tokens
        self._options = options
        self._queries: dict[str, Query] = {}
        self._ids = lru_cache(maxsize=CACHED_PROMPTS)(self._render)

    def add(self, queries: Iterable[Query]) -> None:
        """Register queries, whose prompts may then be asked for."""
        self._queries |= {query.id: query for query in queries}

    def __getitem__(self, id: str) -> list[int]:
        return self._ids(id)

    def _render(self, id: str) -> list[int]:
        return self.render(self._queries[id])

    def render(self, query: Query) -> list[int]:
        """The token ids of a prompt of any length, not kept."""
        where = f"query {query.id!r}"
        return render_prompt(self._tokenizer, query.messages, self._chat_template, where, self._options)

    def check(self, query: Query) -> None:
        """Raise ``UserError`` for a conversation that the chat template rejects, or whose prompt is too long."""
        limit = self._max_tokens
        if most_tokens(self._tokenizer, self._texts(query)) <= limit:
            return
        tokens = len(self.render(query))
        if tokens > limit:
            raise UserError(
                "rollout.max_prompt_tokens",
                f"query {query.id!r} has {tokens} prompt tokens, more than {limit}",
                "raise it or leave the query out",
            )

    def _texts(self, query: Query) -> list[str]:
        """What ``render_prompt`` encodes."""
        if self._chat_template:
            where = f"query {query.id!r}"
            return [text for text, _ in chat_parts(self._tokenizer, query.messages, where, options=self._options)]
        return [conversation_text(query.messages)]
