"""The judge's input: one token sequence per (response, criterion), with the exact span of the response in it."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerFast

from g2r_megatron.config.checks import TEMPLATE_FIELDS, check_template
from g2r_megatron.config.options import JudgeConfig, gated_queries
from g2r_megatron.credit.alignment import Alignment, align
from g2r_megatron.credit.judgements import ItemJudgement, Judgement
from g2r_megatron.data.chat_template import check_template_options, conversation_text, placeholders, render
from g2r_megatron.data.thoughts import closed, open_thought
from g2r_megatron.data.token_bound import most_tokens
from g2r_megatron.data.token_spans import decoded_bounds, encoded_bounds
from g2r_megatron.data.tokenizer import (
    check_structure,
    data_continues,
    encode_parts,
    encode_text,
    leading_ids,
    neutral_ids,
    special_ids,
)
from g2r_megatron.data.types import Query, RubricItem
from g2r_megatron.errors import UserError, warn
from g2r_megatron.judge.packing import shared_length, tree_tokens
from g2r_megatron.judge.types import JudgeInput

# A thinking judge would write its verdict after its thoughts: a template that can leave out thoughts is told to do so.
THINKING_OFF = {"enable_thinking": False, "thinking": False}
PLACEHOLDER = re.compile(r"\{(" + "|".join(TEMPLATE_FIELDS) + r")\}")
CACHED_SIDES = 8192
CACHED_RESPONSES = 512


class ResponseReader(ABC):
    """How a response is placed in the judge's input: as its own token ids, or as its text if the tokenizers differ.

    Subclasses set ``_response_continues``: whether there is text right before the response (``encode_text``).
    """

    needs_rubric = True
    judgement: type[Judgement] = ItemJudgement  # what the judge says of an input
    _response_continues: bool

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        config: JudgeConfig,
        policy_tokenizer: PreTrainedTokenizerFast | None,
    ):
        """``policy_tokenizer``: of the response ids, when they are not ``tokenizer``'s.

        Raises ``UserError`` for ``judge.attribution=null_token`` without a pad token.
        """
        self.null_id: int | None = tokenizer.pad_token_id  # a token without meaning
        if config.attribution == "null_token" and self.null_id is None:
            raise UserError(
                "judge.attribution",
                "null_token, but the judge's tokenizer has no pad token",
                "give it one (pad_token in its tokenizer_config.json), or use another attribution",
            )
        self.tokenizer, self.policy_tokenizer = tokenizer, policy_tokenizer
        self._needs_branch = None  # the option that needs tokens after the response, and its value
        if gated_queries(config, not self.needs_rubric) == "branch":
            self._needs_branch = ("judge.gate_queries", "branch")
        elif config.attribution in ("attention", "occlusion"):
            self._needs_branch = ("judge.attribution", config.attribution)
        self.max_length = config.max_length
        self._encode_response = lru_cache(maxsize=CACHED_RESPONSES)(self._encode_response_uncached)

    @property
    def body_tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of response bodies."""
        return self.tokenizer if self.policy_tokenizer is None else self.policy_tokenizer

    def response(self, body: Sequence[int]) -> tuple[Sequence[int], Alignment | None]:
        """What the judge reads of a response body, and how its tokens map to the body's (None: they are the same)."""
        if self.policy_tokenizer is None:
            return neutral_ids(self.tokenizer, body), None
        return self._encode_response(tuple(body))

    def _encode_response_uncached(self, body: tuple[int, ...]) -> tuple[list[int], Alignment]:
        text, policy_bounds = decoded_bounds(self.policy_tokenizer, body)
        ids, judge_bounds = encoded_bounds(self.tokenizer, text, self._response_continues)
        return ids, align(judge_bounds, policy_bounds)

    def check_branch(self, tokens: int, where: str, remedy: str) -> None:
        """Raise ``UserError`` if no ``tokens`` follow the response and the attribution needs some."""
        if self._needs_branch and tokens <= 0:
            option, value = self._needs_branch
            raise UserError(option, f"{value}, but {where} ends with the response", remedy)

    def check_length(self, query: Query, tokens: int) -> None:
        """Raise ``UserError`` naming the query for a judge input of more than ``judge.max_length`` tokens."""
        if tokens > self.max_length:
            raise UserError(
                "judge.max_length",
                f"the judge input of query {query.id!r} is {tokens} tokens, more than {self.max_length}",
                "raise judge.max_length or shorten the responses",
            )

    @abstractmethod
    def build_items(self, query: Query, response_ids: Sequence[int]) -> list[JudgeInput]:
        """The judge inputs of a response, one a judgement; ``response_ids``: its T tokens without the stop token."""

    @abstractmethod
    def longest(self, query: Query) -> tuple[float, Callable[[], int]]:
        """Tokens of the query's longest judge input without a response: an upper bound, and a function to count."""

    def check_query(self, query: Query, response_tokens: int) -> None:
        """Raise ``UserError`` if a response of so many tokens would make a judge input of ``query`` too long.

        Does not tokenize if the number of bytes shows that the input fits.
        """
        bound, count = self.longest(query)
        if bound + response_tokens > self.max_length and (tokens := count() + response_tokens) > self.max_length:
            raise UserError(
                "judge.max_length",
                f"the judge input of query {query.id!r} is {tokens} tokens with a response of {response_tokens}, more "
                f"than {self.max_length}",
                "raise it, shorten the responses, or leave the query out",
            )


class JudgePrompt(ResponseReader):
    """Builds judge inputs from ``judge.template``, and knows which token ids spell a verdict.

    The operator wrote the template, so special tokens in it are special; braces other than the three fields are
    literal. Conversation and criterion are data (data/tokenizer.py). A thought that the chat template opens for the
    assistant is closed before the verdict (``judge.think``). The response is placed as the token ids that the policy
    sampled. Only special ids are changed (a policy can sample ``<|im_start|>``): each of those is replaced by one
    ordinary token (``stand_in_id``), so the span keeps its length T. Where the policy's ids are not the judge's, the
    response is placed as the text they spell, which the judge's tokenizer encodes as data.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        config: JudgeConfig,
        policy_tokenizer: PreTrainedTokenizerFast | None = None,
    ):
        """``policy_tokenizer``: of the response ids, when they are not ``tokenizer``'s.

        Raises ``UserError`` for a bad template, a missing chat template, or verdict words that cannot work.
        """
        super().__init__(tokenizer, config, policy_tokenizer)
        self.one_sequence = config.credit == "per_response"
        self.true_ids = verdict_ids(tokenizer, config.true_words, "judge.true_words")
        self.false_ids = verdict_ids(tokenizer, config.false_words, "judge.false_words")
        both = set(self.true_ids) & set(self.false_ids)
        if both:
            shared = tokenizer.convert_ids_to_tokens(sorted(both))
            raise UserError("judge.true_words", f"{shared} also spell judge.false_words", "give spellings that differ")
        self._before, self._after = _template_sides(tokenizer, config)
        self._fixed_texts = [text for kind, text in [*self._before, *self._after] if kind == "text"]
        self._leading = [] if config.chat_template else list(leading_ids(tokenizer))
        kind, text = self._before[-1] if self._before else ("text", "")
        self.check_branch(len(self._after), "judge.template", "let something follow {response}, or use another value")
        self._response_continues = kind == "field" or data_continues(tokenizer, text)
        # the text around a response is the same for all responses of the group, a criterion for all responses
        self._encode_side = lru_cache(maxsize=CACHED_SIDES)(self._encode_side_uncached)

    def build(self, query: Query, item: RubricItem, response_ids: Sequence[int]) -> JudgeInput:
        """The judge input for one item; ``response_ids`` are the T body tokens, without the stop token (T may be 0).

        Raises ``UserError`` naming the query when the sequence is longer than ``judge.max_length``.
        """
        conversation = conversation_text(query.messages)
        before = self._side("before", conversation, item.criterion)
        after = self._side("after", conversation, item.criterion)
        response, _ = self.response(response_ids)
        input_ids = [*before, *response, *after]
        self.check_length(query, len(input_ids))
        start = len(before)
        self.check_branch(
            len(after), f"a judge input of query {query.id!r}", "let something follow it, or use another value"
        )
        return JudgeInput(input_ids, start, start + len(response), len(input_ids) - 1)

    def build_items(self, query: Query, response_ids: Sequence[int]) -> list[JudgeInput]:
        """The judge inputs of a response, one for each item of ``query``'s rubric, as ``build`` makes them.

        Raises ``UserError`` naming the query when ``judge.credit=per_response`` must run them as one sequence (their common
        beginning once) that is longer than ``judge.max_length``.
        """
        inputs = [self.build(query, item, response_ids) for item in query.rubric]
        if self.one_sequence and (tokens := tree_tokens(inputs)) > self.max_length:
            raise UserError(
                "judge.max_length",
                f"the {len(inputs)} judge inputs of query {query.id!r} share {shared_length(inputs)} tokens and are "
                f"{tokens} in all, more than {self.max_length}",
                "raise judge.max_length, shorten the responses, or use judge.credit=per_item",
            )
        return inputs

    def described(self, item: JudgeInput) -> dict:
        """Where and how the verdict of ``item`` is read, as plain data."""
        return {"verdict_position": item.verdict_position, "true_ids": self.true_ids, "false_ids": self.false_ids}

    def longest(self, query: Query) -> tuple[float, Callable[[], int]]:
        criteria = [item.criterion for item in query.rubric]
        counted = criteria if self.one_sequence else [max(criteria, key=lambda text: len(text.encode()))]
        texts = [*self._fixed_texts * len(counted), conversation_text(query.messages), *counted]

        def count() -> int:
            inputs = [self.build(query, item, ()) for item in query.rubric]
            return tree_tokens(inputs) if self.one_sequence else max(len(i.input_ids) for i in inputs)

        return most_tokens(self.tokenizer, texts), count

    def _side(self, side: str, conversation: str, criterion: str) -> tuple[int, ...]:
        """Encoded text on one side of the response; cached by the fields on that side."""
        names = {name for kind, name in self._parts(side) if kind == "field"}
        return self._encode_side(
            side, conversation if "conversation" in names else None, criterion if "criterion" in names else None
        )

    def _parts(self, side: str) -> list[tuple[str, str]]:
        return self._before if side == "before" else self._after

    def _encode_side_uncached(self, side: str, conversation: str | None, criterion: str | None) -> tuple[int, ...]:
        values = {"conversation": conversation, "criterion": criterion}
        parts = [(values[text], False) if kind == "field" else (text, True) for kind, text in self._parts(side)]
        leading = self._leading if side == "before" else []
        return (*leading, *encode_parts(self.tokenizer, parts, continues=side == "after"))


def verdict_ids(tokenizer: PreTrainedTokenizerFast, words: Sequence[str], option: str) -> list[int]:
    """Sorted ids of the words, with or without leading space, that are one known token.

    Raises ``UserError`` if none is. A warning names a word that the user chose and that has several tokens: it is not
    used for the verdict.
    """
    ids: set[int] = set()
    left_out = []
    for word in words:
        spelled = [encode_text(tokenizer, spelling, continues=True) for spelling in (word, " " + word)]
        single = (
            {tokens[0] for tokens in spelled if len(tokens) == 1} - special_ids(tokenizer) - {tokenizer.unk_token_id}
        )
        ids |= single
        if not single:
            left_out.append(word)
    if not ids:
        raise UserError(
            option, f"none of {list(words)} is a single token of this tokenizer", "give words that are one token"
        )
    if left_out and list(words) != getattr(JudgeConfig(), option.rpartition(".")[2]):
        warn(f"{option}: {left_out} are not single tokens of this tokenizer; the verdict leaves them out")
    return sorted(ids)


def _template_sides(tokenizer: PreTrainedTokenizerFast, config: JudgeConfig) -> tuple[list, list]:
    """The parts before and after the response, each part ``("text", template text)`` or ``("field", name)``."""
    check_template(config.template)
    check_structure(tokenizer, config.template, "judge.template")
    check_template_options(tokenizer, config.template_options, "judge.template_options", config.chat_template)
    text = _in_chat_template(tokenizer, config) if config.chat_template else config.template
    pieces = PLACEHOLDER.split(text)
    parts = [("field" if i % 2 else "text", piece) for i, piece in enumerate(pieces) if piece]
    response = parts.index(("field", "response"))
    return parts[:response], parts[response + 1 :]


def _in_chat_template(tokenizer: PreTrainedTokenizerFast, config: JudgeConfig) -> str:
    """The judge's template as a user's message, up to the verdict; its fields are not filled yet."""
    where = "judge.chat_template"
    marks = dict(zip(TEMPLATE_FIELDS, placeholders(len(TEMPLATE_FIELDS) + 1), strict=False))
    end = placeholders(len(TEMPLATE_FIELDS) + 1)[-1]
    core = config.template.rstrip()
    content = PLACEHOLDER.sub(lambda match: marks[match[1]], core) + end + config.template[len(core) :]
    message = {"role": "user", "content": content}
    text = render(tokenizer, [message], where, True, THINKING_OFF | config.template_options)
    if wrong := [mark for mark in (*marks.values(), end) if text.count(mark) != 1]:
        names = [f"{{{name}}}" for name, mark in marks.items() if mark in wrong] or ["judge.template"]
        raise UserError(where, f"the chat template does not print {names} exactly once", "use another chat template")
    prompt, _, turn = text.partition(end)
    if config.think == "refuse" and open_thought(turn):
        raise UserError(
            "judge.think",
            f"refuse, and the chat template opens a thought before the verdict ({turn[-20:]!r})",
            "set it to close, turn thinking off with judge.template_options, or take another judge",
        )
    text = prompt + closed(turn)
    # braces of the chat template itself are not fields
    others = PLACEHOLDER.search(text)
    if others:
        raise UserError(where, f"the chat template itself prints {others[0]}", "use another chat template")
    for name, mark in marks.items():
        text = text.replace(mark, f"{{{name}}}")
    return text
