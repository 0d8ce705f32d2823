"""Makes the judge of the task: SmolLM2-135M-Instruct, tuned for some minutes to answer the judge prompt.

    python examples/smollm2/make_judge.py [--output DIR] [--steps 150]

As it is, the model hardly tells stories apart (docs/probe.md says how to see that of a judge). It writes stories on the training
topics, the rubric's checks say what is true of each, and the model learns to say so: cross-entropy of its verdicts, in which
the stories that meet a criterion weigh as much as those that do not. What is there already is used again.
"""

import argparse
import random
import re
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from make_model import CACHE, made_whole, make
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria

from g2r_megatron.config.options import JudgeConfig
from g2r_megatron.data.readers import read_queries
from g2r_megatron.data.types import Query
from g2r_megatron.judge.packing import shared_length
from g2r_megatron.judge.prompt import JudgePrompt
from g2r_megatron.records.progress_bar import CountProgress

DATA = Path(__file__).parent / "data" / "train.jsonl"
DIRECTORY = CACHE / "SmolLM2-135M-story-judge"
STORIES, HELD_OUT = 16, 3  # of a topic, and how many of them only measure the judge
TOKENS = 48  # of a story, as in config.yaml
BATCH = 8  # stories, each with all its criteria
LEARNING_RATE, WARM_UP = 1e-4, 10
FROZEN_LAYERS = 10  # of 30, the lowest, and the embedding: less to compute


@dataclass
class Story:
    """The judge's input for each criterion, split where they differ, and which criteria are met."""

    prefix: list[int]
    branches: list[list[int]]
    met: list[bool]


class Watched(StoppingCriteria):
    """Stops nothing; says how many tokens of each story there are."""

    def __init__(self, progress: CountProgress, prompt_tokens: int):
        self.progress, self.prompt_tokens = progress, prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        tokens = input_ids.size(1) - self.prompt_tokens
        if tokens % 6 == 0:
            self.progress.done(tokens)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def sample(model, tokenizer, queries: list[Query]) -> list[list[list[int]]]:
    """``STORIES`` responses to each query, as token ids without the stop token."""
    texts = [tokenizer.apply_chat_template(q.messages, tokenize=False, add_generation_prompt=True) for q in queries]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    options = dict(max_new_tokens=TOKENS, do_sample=True, top_k=0, top_p=1.0, temperature=1.0)
    options |= dict(num_return_sequences=STORIES, pad_token_id=tokenizer.eos_token_id)
    start = batch["input_ids"].shape[1]
    with CountProgress("judge: sampled", "tokens of each story", TOKENS, 0, enabled=True) as progress:
        found = model.generate(**batch, **options, stopping_criteria=[Watched(progress, start)])
    responses = [[i for i in ids if i != tokenizer.eos_token_id] for ids in found[:, start:].tolist()]
    return [responses[i : i + STORIES] for i in range(0, len(responses), STORIES)]


def read(prompt: JudgePrompt, query: Query, response: list[int]) -> Story:
    """The story as the judge reads it, with the checks' verdicts."""
    inputs = prompt.build_items(query, response)
    shared, text = shared_length(inputs), prompt.tokenizer.decode(response)
    met = [re.search(item.check, text) is not None for item in query.rubric]
    return Story(inputs[0].input_ids[:shared], [item.input_ids[shared:] for item in inputs], met)


def padded(sequences: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both [sequences, longest]."""
    longest = max(map(len, sequences))
    ids, mask = torch.zeros(2, len(sequences), longest, dtype=torch.long)
    for i, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), None) if left else slice(len(sequence))
        ids[i, place], mask[i, place] = torch.tensor(sequence), 1
    return ids, mask


def verdicts(model, prompt: JudgePrompt, stories: list[Story]) -> torch.Tensor:
    """log p(True) and log p(False) of each story and criterion: [stories, criteria, 2]. The prefix of a story runs once."""
    criteria = len(stories[0].branches)
    ids, mask = padded([story.prefix for story in stories], left=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        places = (mask.cumsum(1) - 1).clamp(min=0)
        cache = model.model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True).past_key_values
        cache.batch_repeat_interleave(criteria)
        branches, own = padded([branch for story in stories for branch in story.branches], left=False)
        before = mask.repeat_interleave(criteria, 0)
        hidden = model.model(
            input_ids=branches,
            attention_mask=torch.cat([before, own], 1),
            position_ids=before.sum(1, keepdim=True) + own.cumsum(1) - 1,
            past_key_values=cache,
        ).last_hidden_state
    last = hidden[torch.arange(len(branches)), own.sum(1) - 1].float()
    log_probs = model.lm_head(last).log_softmax(1)
    found = [log_probs[:, ids].logsumexp(1) for ids in (prompt.true_ids, prompt.false_ids)]
    return torch.stack(found, 1).view(len(stories), criteria, 2)


def tune(model, prompt: JudgePrompt, stories: list[Story], steps: int, seed: int) -> None:
    """Adam on the verdicts of random batches; a criterion's two kinds of story have the same weight."""
    for parameter in [*model.model.embed_tokens.parameters(), *model.model.layers[:FROZEN_LAYERS].parameters()]:
        parameter.requires_grad_(False)
    rate = torch.tensor([story.met for story in stories], dtype=torch.float).mean(0).clamp(0.02, 0.98)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / WARM_UP) * (1 - s / steps))
    choice = random.Random(seed)
    with CountProgress("judge: tuned", "steps", steps, 0, enabled=True) as progress:
        for step in range(steps):
            loss = tuning_step(model, prompt, choice.sample(stories, BATCH), rate, optimizer)
            schedule.step()
            if (step + 1) % 10 == 0 or step + 1 == steps:
                progress.done(step + 1)
    print(f"judge: loss {loss:.3f} in the last step", flush=True)


def tuning_step(model, prompt: JudgePrompt, batch: list[Story], rate: torch.Tensor, optimizer) -> float:
    """One step on ``batch``; ``rate`` [criteria]: share of the stories that meet a criterion. Returns the loss."""
    met = torch.tensor([story.met for story in batch])
    weight = torch.where(met, 0.5 / rate, 0.5 / (1 - rate))
    true, false = verdicts(model, prompt, batch).unbind(2)
    loss = -(weight * torch.where(met, true, false)).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def agreement(model, prompt: JudgePrompt, stories: list[Story], criteria: list[str]) -> None:
    """Prints how well verdicts on ``stories`` agree with the checks, a line a criterion."""
    parts = [verdicts(model, prompt, stories[i : i + BATCH]) for i in range(0, len(stories), BATCH)]
    true, false = torch.cat(parts).unbind(2)
    found, answers = true - false, (true.exp() + false.exp()).mean()
    met = torch.tensor([story.met for story in stories])
    for k, criterion in enumerate(criteria):
        yes, no = found[met[:, k], k], found[~met[:, k], k]
        above = (yes[:, None] > no).float().mean() if len(yes) and len(no) else torch.tensor(float("nan"))
        right = ((found[:, k] > 0) == met[:, k]).float().mean()
        print(f"judge: {criterion}: met by {met[:, k].float().mean():.2f}, right {right:.2f}, AUC {above:.2f}")
    print(f"judge: p(True) + p(False) {answers:.2f}")


def make_judge(base: Path, output: Path = DIRECTORY, steps: int = 150, seed: int = 1) -> Path:
    """``output``, made from the model ``base`` if it is not there."""
    if output.is_dir():
        return output
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    prompt, queries = JudgePrompt(tokenizer, JudgeConfig()), read_queries([str(DATA)], "g2r", None)
    print(f"judge: {len(queries) * STORIES} stories", flush=True)
    responses = sample(deepcopy(model).bfloat16(), tokenizer, queries)
    learned, held = [], []
    for query, of_topic in zip(queries, responses, strict=True):
        stories = [read(prompt, query, response) for response in of_topic]
        learned += stories[HELD_OUT:]
        held += stories[:HELD_OUT]
    tune(model, prompt, learned, steps, seed)
    agreement(model, prompt, held, [item.criterion for item in queries[0].rubric])
    with made_whole(output) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DIRECTORY, help="directory to make (%(default)s)")
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    print(make_judge(make(), args.output, args.steps))
