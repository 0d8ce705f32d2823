"""Thoughts of a policy: where its thought ends and its answer begins, and which advantage the tokens of a thought get.

The judge and the report see the answer. A thought's tokens get the advantage of the whole sequence, because no credit is
known for single ones. ``rollout.think_end`` chooses the mark that ends a thought.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from g2r_megatron.config.options import RolloutConfig
from g2r_megatron.data.chat_template import template_source, template_sources
from g2r_megatron.data.thoughts import is_thought_mark, open_thought, opening_mark, thought_end_of
from g2r_megatron.data.tokenizer import generation_prompt, token_texts
from g2r_megatron.errors import UserError
from g2r_megatron.rollout.types import Response


@dataclass(frozen=True)
class ThoughtEnd:
    """What ends a policy's thought.

    ``text``: the closing mark. ``opened``: a response is a thought from its first token, until the mark comes. ``own``:
    only a response that begins with the opening mark has a thought, if it is not ``opened``.
    """

    text: str
    opened: bool
    own: bool

    def split(self, tokenizer: PreTrainedTokenizerFast, body: Sequence[int]) -> tuple[int, bool]:
        """(tokens of the thought with its mark and the blanks after it, whether it is closed) of a response's body.

        A response without a thought has 0 tokens of it and counts as closed; one that is not closed is all thought.
        """
        decode, opening = tokenizer.backend_tokenizer.decode, opening_mark(self.text)
        begins = opening is not None and decode(body, skip_special_tokens=False).lstrip().startswith(opening)
        if self.own and not self.opened and not begins:
            return 0, True
        end = self._end(tokenizer, body)
        if end is None:
            return (len(body), False) if self.opened or begins else (0, True)
        while end < len(body) and not decode([body[end]], skip_special_tokens=False).strip():
            end += 1
        return end, True

    def _end(self, tokenizer: PreTrainedTokenizerFast, body: Sequence[int]) -> int | None:
        """How many tokens there are up to the end of the first mark, also if it ends inside a token. None without a mark."""
        token = tokenizer.get_added_vocab().get(self.text)
        if token is not None and token in body:
            return list(body).index(token) + 1
        texts = token_texts(tokenizer, body)
        place = "".join(texts).find(self.text)
        if place < 0:
            return None
        length = 0
        for number, text in enumerate(texts, 1):
            length += len(text)
            if length >= place + len(self.text):
                return number
        raise AssertionError("the mark lies inside the text")


def thought_end(tokenizer: PreTrainedTokenizerFast, config: RolloutConfig) -> ThoughtEnd | None:
    """What ends the policy's thoughts by ``rollout.think_end``; None: its responses are answers from the first token.

    ``auto``: the mark of the thought that the chat template opens for the assistant, else one that the template speaks
    of, else one that is an added token; the latter two where a response begins with the opening mark. Raises ``UserError``
    for the mark of another thought than the one that the template opens.
    """
    if config.think_end == "none":
        return None
    prompt = generation_prompt(tokenizer, config.template_options, "rollout") if config.chat_template else ""
    found = open_thought(prompt)
    if config.think_end != "auto":
        named = config.think_end
        if found is not None and found[0] != named and is_thought_mark(named):
            raise UserError(
                "rollout.think_end",
                f"{named!r}, but the chat template opens a thought that {found[0]!r} closes",
                f"set it to auto or {found[0]!r}, or turn thinking off with rollout.template_options",
            )
        return ThoughtEnd(named, (found is not None and found[0] == named) or opening_mark(named) is None, own=False)
    if found is not None:
        return ThoughtEnd(found[0], opened=True, own=True)
    sources = [template_source(tokenizer, config.template_options, "rollout")] if template_sources(tokenizer) else []
    marks = [text for text in tokenizer.get_added_vocab() if is_thought_mark(text) and opening_mark(text)]
    text = next(filter(None, map(thought_end_of, [*sources, *marks])), None)
    return None if text is None else ThoughtEnd(text, opened=False, own=True)


def with_thoughts(
    answers: Sequence[torch.Tensor], sequence: Sequence[float], responses: Sequence[Response]
) -> list[torch.Tensor]:
    """Advantages of all tokens of each response, fp32 [thought + answer + finished].

    ``answers``: those of the answer's tokens and one of the stop token, also of a response that has none but an empty
    answer; ``sequence``: the sequence's advantage, which every token of the thought gets.
    """
    return [
        torch.cat([torch.full((r.thought,), whole), answer[: len(r.answer_ids) + r.finished]])
        for answer, whole, r in zip(answers, sequence, responses, strict=True)
    ]
