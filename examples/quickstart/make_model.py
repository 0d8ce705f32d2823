"""Makes the quickstart's model: one small Qwen3 that both writes clinic notes and judges them.

    python examples/quickstart/make_model.py                # about six minutes on one core

Writes ``model/`` (config, safetensors, tokenizer, generation config). The writer learns notes of random quality, so
there is something to improve; the judge learns ``note, criterion -> True/False`` from the task's own truth, on notes
that are also damaged and mixed up, because a policy under training leaves the writer's ways. Judge inputs are built by
``JudgePrompt``, policy prompts by ``render_prompt``: token for token what training sees. No held-out prompt is used.
"""

import argparse
import random
import sys
import time
from pathlib import Path

import task
import torch
import yaml

from g2r_megatron.config.options import JudgeConfig
from g2r_megatron.data.tokenizer import load_tokenizer, render_prompt
from g2r_megatron.data.types import RubricItem
from g2r_megatron.judge.prompt import JudgePrompt

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
from toy_models import IGNORED, ROLES, make_network, make_tokenizer, next_token_loss, padded, save  # noqa: E402

CUT = 41  # longest note in tokens: with the end token it fits max_response_tokens = 42
LR, WEIGHT_DECAY, WARMUP = 3e-3, 0.1, 50
DECAYING = 0.4  # last part of training, in which the learning rate falls to 0
BATCH = 16  # judge rows (ten verdicts each) and writer rows of an optimizer step


class Lessons:
    """Training rows. A judge row is one note under all its criteria: shared prefix once, then a block a criterion."""

    def __init__(self, tokenizer, judge: JudgeConfig, seed: int):
        self.tokenizer, self.prompt = tokenizer, JudgePrompt(tokenizer, judge)
        self.verdict = {True: self.prompt.true_ids[0], False: self.prompt.false_ids[0]}
        self.word_ids = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
        self.items = task.all_items()
        self.rng = random.Random(seed)

    def ids(self, sentences: list[str]) -> list[int]:
        return self.tokenizer.encode(" ".join(sentences), add_special_tokens=False)

    def writer_row(self) -> tuple[list[int], list[int]]:
        """Input ids and labels [s] of one note after its prompt, with the end token."""
        case = task.sample_case(self.rng, held_out=False)
        prompt = render_prompt(self.tokenizer, task.query(case).messages, False, "make_model")
        sentences = task.write_sentences(case, self.rng)
        while len(self.ids(sentences)) > CUT:
            sentences.pop()
        note = [*self.ids(sentences), self.tokenizer.eos_token_id]
        return prompt + note, [IGNORED] * len(prompt) + note

    def judged_note(self, case: task.Case, longest: int) -> list[int]:
        """Token ids of a note of at most ``longest`` sentences, in half of the cases not as the writer writes."""
        rng = self.rng
        sentences = task.write_sentences(case, rng)
        if rng.random() < 0.3:
            sentences += task.write_sentences(case, rng)
        if rng.random() < 0.3:
            sentences += [task.odd_sentence(case, rng) for _ in range(rng.randint(1, 3))]
        rng.shuffle(sentences)
        ids = self.ids(sentences[:longest])[:CUT]
        if rng.random() < 0.15:
            ids = ids[: rng.randrange(len(ids)) + 1]
        if rng.random() < 0.15:
            for _ in range(rng.randint(1, 3)):
                ids[rng.randrange(len(ids))] = rng.choice((rng.choice(ids), rng.choice(self.word_ids)))
        return ids

    def criteria(self, case: task.Case, note: str) -> list[RubricItem]:
        """The case's own rubric, or as many criteria of the whole domain, half of them true where the note allows.

        The second kind cannot be guessed from the prompt, which is where a judge of the first kind alone gets stuck.
        """
        own = list(task.rubric(case))
        if self.rng.random() < 0.5:
            return own
        met = [item for item, true in zip(self.items, task.truths(self.items, note)) if true]
        met = self.rng.sample(met, min(len(met), len(own) // 2))
        near = [item for item in self.items if item.criterion.split()[-1] in note and item not in met]
        near = self.rng.sample(near, min(len(near), len(own) // 2))
        return met + near + self.rng.sample(self.items, len(own) - len(met) - len(near))

    def verdicts(self, items: list[RubricItem], note: str) -> list[bool]:
        """What the judge is to say."""
        return task.truths(items, note)

    def judge_row(self, longest: int) -> tuple[list[int], list[int], list[int], list[int]]:
        """Ids, labels, block numbers (0: the shared prefix) and positions [s] of one note under ten criteria."""
        case = task.sample_case(self.rng, held_out=False)
        query, note = task.query(case), self.judged_note(case, longest)
        text = self.tokenizer.decode(note)
        items = self.criteria(case, text)
        ids, labels, blocks, positions = [], [], [], []
        for number, (item, true) in enumerate(zip(items, self.verdicts(items, text)), start=1):
            built = self.prompt.build(query, item, note)
            prefix, block = built.input_ids[: built.response_end], built.input_ids[built.response_end :]
            if not ids:
                ids, labels = list(prefix), [IGNORED] * len(prefix)
                blocks, positions = [0] * len(prefix), list(range(len(prefix)))
            ids += block
            labels += [IGNORED] * (len(block) - 1) + [self.verdict[true]]
            blocks += [number] * len(block)
            positions += range(len(prefix), len(prefix) + len(block))
        return ids, labels, blocks, positions


def block_mask(blocks: torch.Tensor) -> torch.Tensor:
    """Causal mask [b, 1, s, s] fp32 (0 or -inf-like): a block sees the shared prefix and itself; padding is -1."""
    same = blocks[:, :, None] == blocks[:, None, :]
    seen = (same | (blocks[:, None, :] == 0)) & torch.ones(blocks.shape[1], blocks.shape[1]).tril().bool()
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]


def judge_loss(network, rows: list) -> torch.Tensor:
    """Mean cross-entropy of the verdict tokens, at the position whose logits predict them."""
    ids, labels, blocks, positions = (padded(list(column), v) for column, v in zip(zip(*rows), (0, IGNORED, -1, 0)))
    hidden = network.model(input_ids=ids, attention_mask=block_mask(blocks), position_ids=positions).last_hidden_state
    asked = labels != IGNORED
    return torch.nn.functional.cross_entropy(network.lm_head(hidden[asked]), labels[asked])


def train(network, lessons: Lessons, steps: int) -> None:
    """AdamW with warm-up and a linear decay at the end; judged notes grow by a sentence every 40 steps."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
    start = time.time()
    for step in range(steps):
        progress = step / steps
        rate = min(1.0, (step + 1) / WARMUP, (1 - progress) / DECAYING)
        optimizer.param_groups[0]["lr"] = LR * rate
        longest = 1 + step // 40
        verdicts = judge_loss(network, [lessons.judge_row(longest) for _ in range(BATCH)])
        notes = next_token_loss(network, [lessons.writer_row() for _ in range(BATCH)])
        (verdicts + notes).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            seconds = time.time() - start
            print(f"step {step + 1}/{steps} judge {verdicts:.4f} writer {notes:.4f} {seconds:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "model", help="Hugging Face directory to write")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    make_tokenizer(args.output, [".", ",", ":"], ["True", "False", "|", "=>", *ROLES, *task.words()])
    tokenizer = load_tokenizer(str(args.output))
    judge = JudgeConfig(**yaml.safe_load((HERE / "config.yaml").read_text())["judge"])
    network = make_network(tokenizer, hidden=128, positions=512)
    print(f"{sum(p.numel() for p in network.parameters()):,} parameters, {len(tokenizer)} tokens")
    train(network, Lessons(tokenizer, judge, args.seed), args.steps)
    save(network, tokenizer, args.output)


if __name__ == "__main__":
    main()
