"""A reward model's input: conversation and response in its own chat template, with the exact span of the response."""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerFast

from g2r_megatron.config.options import JudgeConfig
from g2r_megatron.credit.judgements import ScoreJudgement
from g2r_megatron.data.chat_template import Part, check_template_options, placeholder_for
from g2r_megatron.data.thoughts import begins_with_thought, without_empty_thought
from g2r_megatron.data.token_bound import most_tokens
from g2r_megatron.data.tokenizer import chat_parts, data_continues, encode_parts, parts_around
from g2r_megatron.data.types import Query
from g2r_megatron.errors import UserError
from g2r_megatron.judge.prompt import JudgePrompt, ResponseReader
from g2r_megatron.judge.types import JudgeInput
from g2r_megatron.model.hf import HFModel

CACHED_CONVERSATIONS = 1024
# Options of a judge that reads a prompt and says True or False.
OF_VERDICTS = ("template", "chat_template", "true_words", "false_words", "verdict", "credit", "think")
THOUGHT_BEGINS = 16  # the opening mark of a response's own thought is in these first tokens
PROBE = ({"role": "user", "content": "a"},)


class RewardPrompt(ResponseReader):
    """Builds the one input of a (conversation, response).

    Content is data. The response is placed as in
    ``JudgePrompt``: as its own token ids, where only special ids are changed, or as the text they spell.

    The chat template gets the response without the blanks around it, so a template that trims contents does not change
    it. If the template prints an empty thought before an answer, a response that has its own thought gets no empty one.
    """

    needs_rubric = False
    judgement = ScoreJudgement
    true_ids: Sequence[int] = ()  # a score has no spellings
    false_ids: Sequence[int] = ()

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        config: JudgeConfig,
        policy_tokenizer: PreTrainedTokenizerFast | None = None,
        pad_id: int | None = None,
    ):
        """``pad_id``: the model's ``pad_token_id``; its score is read at the last other token, as transformers does.

        Raises ``UserError`` for a tokenizer without chat template, or options that only a judge of verdicts has.
        """
        super().__init__(tokenizer, config, policy_tokenizer)
        _refuse_options_of_verdicts(config)
        if not tokenizer.chat_template:
            raise UserError(
                "judge.model",
                "the reward model's tokenizer has no chat template",
                "give it the one that the model was trained with (chat_template.jinja, or in tokenizer_config.json)",
            )
        check_template_options(tokenizer, config.template_options, "judge.template_options", chat_template=True)
        self.pad_id, self._options = pad_id, config.template_options
        before, after = self._parts(PROBE, "judge.model")
        self._response_continues = data_continues(tokenizer, before[-1][0])
        self._prints_thought = _without_empty_thought(before) != before
        behind = encode_parts(tokenizer, after, continues=True)
        read_after = self.score_position([-1, *behind])
        self.reads_behind_response = read_after > 0  # the score, not at the response's last token
        self.check_branch(read_after, "what the score is read from", "use another value")
        self._sides = lru_cache(maxsize=CACHED_CONVERSATIONS)(self._sides_uncached)

    def build_items(self, query: Query, response_ids: Sequence[int]) -> list[JudgeInput]:
        """The input of a response: ``response_ids`` are the T body tokens, without the stop token (T may be 0).

        Raises ``UserError`` naming the query when the sequence is longer than ``judge.max_length``, or when the chat
        template rejects its conversation.
        """
        decode = self.body_tokenizer.backend_tokenizer.decode
        thinks = self._prints_thought and begins_with_thought(
            decode(response_ids[:THOUGHT_BEGINS], skip_special_tokens=False)
        )
        before, after = self._sides(json.dumps(query.messages), query.id, thinks)
        response, _ = self.response(response_ids)
        input_ids = [*before, *response, *after]
        self.check_length(query, len(input_ids))
        start = len(before)
        return [JudgeInput(input_ids, start, start + len(response), self.score_position(input_ids))]

    def described(self, item: JudgeInput) -> dict:
        """Where the score of ``item`` is read, as plain data."""
        return {"score_position": item.verdict_position}

    def longest(self, query: Query) -> tuple[float, Callable[[], int]]:
        before, after = self._parts(query.messages, f"query {query.id!r}")

        def count() -> int:
            return len(self.build_items(query, ())[0].input_ids)

        return most_tokens(self.tokenizer, [text for text, _ in [*before, *after]]), count

    def score_position(self, input_ids: Sequence[int]) -> int:
        """Of the rightmost token that is not padding by its id (0 if all are): where transformers reads the score."""
        return next((i for i in reversed(range(len(input_ids))) if input_ids[i] != self.pad_id), 0)

    def _sides_uncached(self, conversation: str, id: str, thinks: bool) -> tuple[list[int], list[int]]:
        """Token ids around a response; ``conversation``: as JSON, ``thinks``: the response has a thought of its own."""
        before, after = self._parts(json.loads(conversation), f"query {id!r}")
        if thinks:
            before = _without_empty_thought(before)
        return encode_parts(self.tokenizer, before), encode_parts(self.tokenizer, after, continues=True)

    def _parts(self, messages: Sequence[dict], where: str) -> tuple[list[Part], list[Part]]:
        """The parts before and after the response, as ``encode_parts`` takes them; the last part before it has text."""
        mark = placeholder_for(messages)
        answered = [*messages, {"role": "assistant", "content": mark}]
        parts = chat_parts(self.tokenizer, answered, where, False, self._options)
        before, after = parts_around(parts, mark, where, "the response")
        return [part for part in before if part[0]] or [("", True)], after


def _without_empty_thought(before: list[Part]) -> list[Part]:
    text, trusted = before[-1]
    return [*before[:-1], (without_empty_thought(text), trusted)]


def _refuse_options_of_verdicts(config: JudgeConfig) -> None:
    defaults = JudgeConfig()
    for name in OF_VERDICTS:
        if getattr(config, name) != getattr(defaults, name):
            raise UserError(
                f"judge.{name}",
                "set, but judge.model is a reward model",
                "leave it out: a reward model reads the conversation in its own chat template and gives a score",
            )


def judge_prompt(
    hf: HFModel,
    tokenizer: PreTrainedTokenizerFast,
    config: JudgeConfig,
    policy_tokenizer: PreTrainedTokenizerFast | None = None,
) -> JudgePrompt | RewardPrompt:
    """The prompt that the judge ``hf`` with ``tokenizer`` needs; ``policy_tokenizer``: see ``ResponseReader``."""
    if hf.geometry.is_reward_model:
        return RewardPrompt(tokenizer, config, policy_tokenizer, hf.config.pad_token_id)
    return JudgePrompt(tokenizer, config, policy_tokenizer)
