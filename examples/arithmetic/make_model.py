"""Makes the example's model: one small Qwen3 that both adds, with mistakes, and judges solutions.

    python examples/arithmetic/make_model.py --output runs/arithmetic/model

The writer learns solutions in which a third of all sums is wrong more often than not, so there is something to improve. The
judge learns ``prompt | solution | right => True/False``, on solutions of all qualities. Policy prompts and judge inputs are
built by the program's own code: token for token what training sees. No held-out prompt is used.
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
from g2r_megatron.data.types import Query, RubricItem
from g2r_megatron.judge.prompt import JudgePrompt

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
from toy_models import IGNORED, ROLES, make_network, make_tokenizer, next_token_loss, save  # noqa: E402

LR, WARMUP, DECAYING = 3e-3, 50, 0.4
BATCH = 32  # solutions written and solutions judged of an optimizer step


class Lessons:
    """Training rows: (input ids, labels [s])."""

    def __init__(self, tokenizer, judge: JudgeConfig, seed: int):
        self.tokenizer, self.prompt, self.rng = tokenizer, JudgePrompt(tokenizer, judge), random.Random(seed)
        self.verdict = {True: self.prompt.true_ids[0], False: self.prompt.false_ids[0]}
        self.item = RubricItem(task.CRITERION, 1.0)

    def terms(self, count: int = task.TERMS) -> tuple[int, ...]:
        while task.is_held_out(terms := task.sample_terms(self.rng, count)):
            pass
        return terms

    def query(self, terms: tuple[int, ...]) -> Query:
        return Query("lesson", ({"role": "user", "content": task.prompt(terms)},), (self.item,))

    def writer_row(self) -> tuple[list[int], list[int]]:
        """A solution after its prompt, with the end token."""
        terms = self.terms()
        prompt = render_prompt(self.tokenizer, self.query(terms).messages, False, "make_model")
        text, _ = task.solution(terms, self.rng)
        ids = [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]
        return prompt + ids, [IGNORED] * len(prompt) + ids

    def judge_row(self, progress: float) -> tuple[list[int], list[int]]:
        """A solution and its verdict, in half of the cases a careful one, so that both verdicts are common.

        It grows from two terms to four over the first half of training: a judge that begins with four learns nothing.
        """
        terms = self.terms(min(task.TERMS, 2 + int(6 * progress)))
        text, right = task.solution(terms, self.rng, mistakes=self.rng.choice([0.3, 1.0]))
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        built = self.prompt.build(self.query(terms), self.item, ids).input_ids
        return [*built, self.verdict[right]], [IGNORED] * len(built) + [self.verdict[right]]


def train(network, lessons: Lessons, steps: int) -> None:
    """AdamW with warm-up and a linear decay at the end."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=0.1, betas=(0.9, 0.98))
    start = time.time()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LR * min(1.0, (step + 1) / WARMUP, (1 - step / steps) / DECAYING)
        written = next_token_loss(network, [lessons.writer_row() for _ in range(BATCH)])
        judged = next_token_loss(network, [lessons.judge_row(step / steps) for _ in range(BATCH)])
        (written + judged).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            seconds = time.time() - start
            print(f"step {step + 1}/{steps} writer {written:.4f} judge {judged:.4f} {seconds:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Hugging Face directory to write")
    parser.add_argument("--steps", type=int, default=1200, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    make_tokenizer(args.output, [":"], [*ROLES, *task.words()])
    tokenizer = load_tokenizer(str(args.output))
    judge = JudgeConfig(**yaml.safe_load((HERE / "config.yaml").read_text())["judge"])
    network = make_network(tokenizer, hidden=96, positions=256)
    print(f"{sum(p.numel() for p in network.parameters()):,} parameters, {len(tokenizer)} tokens")
    train(network, Lessons(tokenizer, judge, args.seed), args.steps)
    save(network, tokenizer, args.output)


if __name__ == "__main__":
    main()
