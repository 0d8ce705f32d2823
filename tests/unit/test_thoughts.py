"""Thoughts of a policy: what the judge sees of a response, and the advantages of the tokens that it does not see.

Left out: how marks are found in published templates (test_chat_templates.py), and sampling.
"""

from dataclasses import replace

import pytest
import torch
from tokenizers import AddedToken

from g2r_megatron.config.options import GrpoConfig, RolloutConfig, TrainConfig
from g2r_megatron.config.presets import resolve_preset
from g2r_megatron.credit.judgements import ItemJudgement
from g2r_megatron.data.thoughts import closed, is_thought_mark, open_thought, opening_mark, without_empty_thought
from g2r_megatron.data.tokenizer import encode_text
from g2r_megatron.data.types import Query, RubricItem
from g2r_megatron.errors import UserError
from g2r_megatron.experience import Rollouts, assign_credit
from g2r_megatron.judge.health import JudgeHealth
from g2r_megatron.rollout.thoughts import ThoughtEnd, thought_end
from g2r_megatron.rollout.types import Response
from tiny_models import CHATML, build_tokenizer

OPENING = CHATML.replace("<|im_start|>assistant\n'", "<|im_start|>assistant\n<think>\n'")
SWITCH = CHATML.replace("{%- endif %}", "{%- if not think %}{{ '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}")


def made(template: str, *marks: str):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in marks])
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers():
    """The marks as added tokens, and as ordinary text."""
    return [made(OPENING, "<think>", "</think>"), made(OPENING)]


HIDDEN = object()  # an unclosed thought
CASES = [
    # (ends a thought, opened by the prompt, only own thoughts; response; answer)
    (("</think>", True, True), "hm</think>\n\nRest.", "Rest."),
    (("</think>", True, True), "hm, ends", HIDDEN),
    (("</think>", True, True), "", HIDDEN),
    (("</think>", True, True), "</think>Rest.", "Rest."),
    (("</think>", True, True), "a</think>b</think>c", "b</think>c"),
    (("</think>", False, True), "<think>\nhm\n</think>\n\nRest. 🙂", "Rest. 🙂"),
    (("</think>", False, True), "\n<think>hm", HIDDEN),
    (("</think>", False, True), "Rest.", "Rest."),
    (("</think>", False, True), "Write </think> to close <think>.", "Write </think> to close <think>."),
    (("</think>", False, False), "hm</think>Rest.", "Rest."),
    (("</think>", False, False), "Rest.", "Rest."),
    (("Answer:", True, False), "hm 🙂 Answer: rest", "rest"),
    (("Answer:", True, False), "hm", HIDDEN),
]


@pytest.mark.parametrize(("how", "text", "answer"), CASES)
def test_split(tokenizers, how, text, answer):
    """What follows the first mark, and the blanks after it, is the answer; no mark where one is due leaves none."""
    for tokenizer in tokenizers:
        body = encode_text(tokenizer, text)
        thought, closed_ = ThoughtEnd(*how).split(tokenizer, body)
        assert closed_ == (answer is not HIDDEN)
        left = tokenizer.decode(body[thought:], clean_up_tokenization_spaces=False)
        # a token may hold the mark's end and the answer's first blank
        assert left.lstrip() == ("" if answer is HIDDEN else answer)
        assert thought == len(body) if answer is HIDDEN else thought <= len(body)


def test_think_end_option():
    """auto asks the prompt, then the template, then the tokenizer; none and a text are taken at their word."""

    def found(tokenizer, **options):
        return thought_end(tokenizer, RolloutConfig(**options))

    opening, closing = made(OPENING), made(SWITCH)
    assert found(opening) == ThoughtEnd("</think>", True, True) and found(opening, think_end="none") is None
    assert found(closing) == ThoughtEnd("</think>", False, True)
    assert found(made(CHATML)) is None and found(made(CHATML), chat_template=False) is None
    assert found(made(CHATML, "[THINK]", "[/THINK]")) == ThoughtEnd("[/THINK]", False, True)
    assert found(made(CHATML), think_end="Answer:") == ThoughtEnd("Answer:", True, False)
    assert found(opening, think_end="</think>") == ThoughtEnd("</think>", True, False)
    assert found(closing, think_end="</think>") == ThoughtEnd("</think>", False, False)


def test_marks():
    """Opening and closing marks belong together; an empty thought at the end is known from one with words in it."""
    for opening, close in (
        *(("<think>", "</think>"), ("<reasoning>", "</reasoning>"), ("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷")),
        *(("<|START_THINKING|>", "<|END_THINKING|>"), ("<|begin_of_thought|>", "<|end_of_thought|>")),
    ):
        assert opening_mark(close) == opening and open_thought(f"a{opening}\n") == (close, "\n")
        assert open_thought(f"a{opening}b{close}") is None and is_thought_mark(opening) and is_thought_mark(close)
        assert (
            closed(f"a{opening}") == f"a{opening}{close}"
            and closed(closed(f"a{opening}\n")) == f"a{opening}\n\n{close}\n\n"
        )
        assert without_empty_thought(f"a{opening}\n\n{close}\n\n") == "a"
        assert without_empty_thought(f"a{opening}b{close}") == f"a{opening}b{close}"
    assert not is_thought_mark("<think> ") and opening_mark("Answer:") is None and closed("a") == "a"


class OwnIds:
    """A judge that reads the policy's ids."""

    def response(self, body):
        return body, None


@pytest.mark.parametrize("advantage", ["sequence", "token_return", "itemwise", "sequence_weighted"])
def test_advantages_of_thoughts(advantage):
    """The answer's tokens have the advantages they would have without the thought; the thought's have the sequence's.

    Also with empty answers, closed or not, cut or not: one value for each sampled token.
    """
    config = resolve_preset(TrainConfig(grpo=GrpoConfig(advantage=advantage, normalize_std=False)))
    config = replace(config, judge=replace(config.judge, smoothing="none", standardize=False))
    query = Query("q", ({"role": "user", "content": "a"},), (RubricItem("b", 1.0), RubricItem("c", 2.0)))
    stop = [9]
    responses = [
        Response([1], [5, 6, 7, 8, *stop], True, "78", thought=2),
        Response([1], [5, 6, 7], False, "", thought=3, closed=False),
        Response([1], [5, *stop], True, "", thought=1, closed=False),
        Response([1], [7, 8, 7], False, "787"),
    ]
    answers = [replace(r, token_ids=[*r.answer_ids, *stop * r.finished], thought=0) for r in responses]
    answers[1] = replace(answers[1], token_ids=stop, finished=True)  # an empty answer stands as one stop token

    def credit(some):
        rows = []
        for i, r in enumerate(some):
            scores = torch.arange(float(len(r.answer_ids))) if r.answer_ids else None
            rows.append([ItemJudgement(0.9, 0.1, i % 2 == 0, scores), ItemJudgement(0.2, 0.8, i == 3, scores)])
        rollouts = Rollouts(4, [query] * 4, some, [str(i) for i in range(4)])
        return assign_credit(rollouts, rows, prompt=OwnIds(), config=config, mix=1.0).advantages

    whole, alone = credit(responses), credit(answers)
    rewards = [1 / 3, 0.0, 1 / 3, 2 / 3]
    for r, found, expected, reward in zip(responses, whole, alone, rewards, strict=True):
        assert found.shape == (len(r.token_ids),)
        assert torch.equal(found[r.thought :], expected[: len(r.answer_ids) + r.finished])
        centred = reward - sum(rewards) / 4
        torch.testing.assert_close(found[: r.thought], torch.full((r.thought,), centred))
    assert [r.answered for r in responses] == [True, False, False, False]


def test_health_of_a_judge():
    """Verdict rate, answer mass, shapes of alpha and broken gradients of all rows; a low answer mass says what to look at."""
    health = JudgeHealth(flat_threshold=0.95)
    flat, hot = torch.full((4,), 0.25), torch.tensor([1.0, 0.0, 0.0, 0.0])
    health.count(
        "a", [ItemJudgement(0.3, 0.1, True, torch.ones(4), 1.0, 0.5), ItemJudgement(0.1, 0.3, False)], [flat, None]
    )
    health.count("b", [ItemJudgement(0.4, 0.2, True, torch.zeros(4), 0.0, float("nan"))], [hot])
    assert health.summary() == "66.7% of 3 items True; answer mass 0.467; ESS/T 0.62, 50.0% flat, 50.0% on one token"
    mass, gradients = health.warnings()
    for word in ("0.467", "judge.template", "judge.think", "judge.true_words", "language"):
        assert word in mass
    assert "1 of 2 backward passes" in gradients and "b item 1 (zero)" in gradients
    assert JudgeHealth(0.95).summary() is None and JudgeHealth(0.95).warnings() == []


def test_the_mark_of_another_thought_is_refused(tokenizers):
    """A closing mark that the opened thought never has would hide nothing; other texts may end a thought."""
    for tokenizer in tokenizers:
        with pytest.raises(
            UserError, match="think_end: '</thinking>', but the chat template opens .* '</think>' closes"
        ):
            thought_end(tokenizer, RolloutConfig(think_end="</thinking>"))
        assert thought_end(tokenizer, RolloutConfig(think_end="Answer:")) == ThoughtEnd("Answer:", True, own=False)
