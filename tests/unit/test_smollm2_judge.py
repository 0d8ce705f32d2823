"""What examples/smollm2/make_judge.py computes: the verdict on each criterion, from a prefix that runs once.

With a random tiny model and random stories. Leaves out what tuning reaches with SmolLM2 (benchmarks/results/credit_study_smollm2.md).
"""

import torch

from g2r_megatron.config.options import JudgeConfig
from g2r_megatron.data.types import Query, RubricItem
from g2r_megatron.judge.prompt import JudgePrompt
from scripts import load
from tiny_models import build_model, build_tokenizer

ITEMS = tuple(RubricItem(text, 1, check=check) for text, check in (("has an a", "a"), ("is long and has a b", "b")))
QUERY = Query("q", ({"role": "user", "content": "write"},), ITEMS)


def parts():
    make_judge = load("examples/smollm2/make_judge.py")
    tokenizer = build_tokenizer()
    prompt = JudgePrompt(tokenizer, JudgeConfig())
    texts = ["a word", "an apple and a bee", "no", "blob"]
    stories = [make_judge.read(prompt, QUERY, tokenizer.encode(text)) for text in texts]
    return make_judge, build_model("llama3", len(tokenizer)), prompt, stories


def test_verdicts_are_those_of_whole_inputs():
    """To 0.02 (bf16 products) of log-probs that differ by more, from padded prefixes of several lengths."""
    make_judge, model, prompt, stories = parts()
    assert [story.met for story in stories] == [[True, False], [True, True], [False, False], [False, True]]
    with torch.no_grad():
        found = make_judge.verdicts(model, prompt, stories)
        whole = torch.empty_like(found)
        for i, story in enumerate(stories):
            for k, branch in enumerate(story.branches):
                last = model(torch.tensor([story.prefix + branch])).logits[0, -1].log_softmax(0)
                whole[i, k, 0], whole[i, k, 1] = (last[ids].logsumexp(0) for ids in (prompt.true_ids, prompt.false_ids))
    assert whole.std() > 0.1 and (found - whole).abs().max() < 0.02


def test_tuning_learns_the_checks():
    """Thirty steps with four stories: verdicts agree with the checks. Embedding and lowest layers stay as they were."""
    make_judge, model, prompt, stories = parts()
    make_judge.FROZEN_LAYERS, make_judge.BATCH, make_judge.LEARNING_RATE = 1, 4, 3e-3
    frozen = model.model.embed_tokens.weight.clone()
    make_judge.tune(model, prompt, stories, steps=30, seed=1)
    with torch.no_grad():
        true, false = make_judge.verdicts(model, prompt, stories).unbind(2)
    assert ((true > false) == torch.tensor([story.met for story in stories])).all()
    assert torch.equal(model.model.embed_tokens.weight, frozen)
