"""Prompts of queries as token ids: checked for every row before a run begins, made when a step asks for them."""

from collections.abc import Iterable
from functools import lru_cache

from transformers import PreTrainedTokenizerFast

from g2r_megatron.config.options import RolloutConfig
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

    def __init__(self, tokenizer: PreTrainedTokenizerFast, config: RolloutConfig):
        self._tokenizer, self._config = tokenizer, config
        self._queries: dict[str, Query] = {}
        self._ids = lru_cache(maxsize=CACHED_PROMPTS)(self._render)

    def add(self, queries: Iterable[Query]) -> None:
        """Queries that may be asked for."""
        self._queries |= {query.id: query for query in queries}

    def __getitem__(self, id: str) -> list[int]:
        return self._ids(id)

    def _render(self, id: str) -> list[int]:
        return self._tokens(self._queries[id])

    def _tokens(self, query: Query) -> list[int]:
        where = f"query {query.id!r}"
        options = self._config.template_options
        return render_prompt(self._tokenizer, query.messages, self._config.chat_template, where, options)

    def check(self, query: Query) -> None:
        """Raise ``UserError`` for a conversation that the chat template rejects, or whose prompt is too long."""
        limit = self._config.max_prompt_tokens
        if most_tokens(self._tokenizer, self._texts(query)) <= limit:
            return
        tokens = len(self._tokens(query))
        if tokens > limit:
            raise UserError(
                "rollout.max_prompt_tokens",
                f"query {query.id!r} has {tokens} prompt tokens, more than {limit}",
                "raise it or leave the query out",
            )

    def _texts(self, query: Query) -> list[str]:
        """What ``render_prompt`` encodes."""
        if self._config.chat_template:
            where, options = f"query {query.id!r}", self._config.template_options
            return [text for text, _ in chat_parts(self._tokenizer, query.messages, where, options=options)]
        return [conversation_text(query.messages)]
