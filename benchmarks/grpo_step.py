"""A whole GRPO step without a judge, ours beside TRL's GRPOTrainer: the same model, prompts and sizes.

    python benchmarks/grpo_step.py                                                          # the quickstart's model
    python benchmarks/grpo_step.py --model DIR --prompts 4 --group 4 --tokens 64

Both are in one process and take turns, step by step: sample ``--prompts`` times ``--group`` responses that are cut at
``--tokens`` (no stop token), score them by a cheap function of their tokens, and update once with Adam (one mini-batch, no KL
penalty, fp32, no recomputation). TRL generates with transformers and runs the responses as one padded batch; ours generates
with Megatron-Core's cache and runs packed rows. CPU seconds are those of the process. Medians of the steps after the first.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from g2r_megatron.parallel.cpu import import_megatron

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "examples" / "quickstart"
LEARNING_RATE = 1e-6


@dataclass
class Times:
    """(wall seconds, CPU seconds) of each step: sampling, and all of it."""

    sample: list[tuple[float, float]] = field(default_factory=list)
    step: list[tuple[float, float]] = field(default_factory=list)

    def medians(self) -> dict[str, tuple[float, float]]:
        """Of the steps after the first; the update is all but sampling."""
        kept = {"sample": self.sample[1:], "step": self.step[1:]}
        kept["update"] = [(a[0] - b[0], a[1] - b[1]) for a, b in zip(kept["step"], kept["sample"], strict=True)]
        return {name: (median(t[0] for t in found), median(t[1] for t in found)) for name, found in kept.items()}


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
    end = now()
    return end[0] - start[0], end[1] - start[1]


def score(ids: list[int]) -> float:
    """Cheap, and different for each response."""
    return sum(token % 7 for token in ids) / max(len(ids), 1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(QUICKSTART / "model"), help="Hugging Face directory")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--group", type=int, default=8, help="responses of a prompt")
    parser.add_argument("--tokens", type=int, default=42, help="of each response")
    parser.add_argument("--micro_batch_tokens", type=int, default=2048, help="of a row of ours, as in the quickstart")
    parser.add_argument("--steps", type=int, default=6)
    return parser.parse_args()


def our_step(args: argparse.Namespace, prompts: list[list[int]], times: Times) -> Callable[[], None]:
    """A function that takes one step of ours."""
    from g2r_megatron.config.options import Layout, OptimizerConfig, PolicyConfig, Precision, RolloutConfig, TrainConfig
    from g2r_megatron.model.build import build_model
    from g2r_megatron.model.hf import open_hf_model
    from g2r_megatron.parallel.groups import build_groups, initialize
    from g2r_megatron.policy.log_probs import TokenSequence
    from g2r_megatron.policy.trainer import PolicyTrainer
    from g2r_megatron.rollout.megatron import MegatronRolloutEngine
    from g2r_megatron.rollout.types import Request

    initialize(1)
    rollout = RolloutConfig(max_prompt_tokens=max(map(len, prompts)), max_response_tokens=args.tokens)
    optimizer = OptimizerConfig(distributed=False, lr=LEARNING_RATE)
    config = TrainConfig(
        policy=PolicyConfig(micro_batch_tokens=args.micro_batch_tokens), rollout=rollout, optimizer=optimizer
    )
    policy = build_model(
        "policy", open_hf_model(args.model, "policy.model"), build_groups("policy", Layout()), Precision()
    )
    trainer = PolicyTrainer(policy, config)
    engine = MegatronRolloutEngine(policy, rollout, set())

    def step() -> None:
        number, start = len(times.step), now()
        wanted = [prompt for prompt in batch_of(prompts, number, args.prompts) for _ in range(args.group)]
        found = engine.generate([Request(ids, f"{number}/{i}") for i, ids in enumerate(wanted)])
        times.sample.append(since(start))
        sequences = [TokenSequence(ids, sampled.token_ids) for ids, sampled in zip(wanted, found, strict=True)]
        scores = torch.tensor([score(sampled.token_ids) for sampled in found]).view(-1, args.group)
        z = ((scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-6)).flatten()
        advantages = [a.expand(len(s.response_ids)) for a, s in zip(z, sequences, strict=True)]
        known = trainer.update_log_probs(sequences, None, config.needs_old_pass)
        trainer.update(sequences, known.mini_batches, advantages, known.old, None)
        times.step.append(since(start))

    return step


def batch_of(prompts: list, number: int, count: int) -> list:
    """The prompts of step ``number``."""
    return [prompts[(number * count + i) % len(prompts)] for i in range(count)]


def run_trl(
    args: argparse.Namespace, texts: list[str], tokenizer, times: Times, after_step: Callable[[], None]
) -> None:
    """``args.steps`` steps of TRL's trainer, and ``after_step()`` after each."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    generate = model.generate

    def timed_generate(*inputs, **options):
        start = now()
        found = generate(*inputs, **options)
        times.sample.append(since(start))
        return found

    model.generate = timed_generate

    class TakeTurns(TrainerCallback):
        def on_step_begin(self, *given, **named):
            self.start = now()

        def on_step_end(self, *given, **named):
            times.step.append(since(self.start))
            after_step()

    with tempfile.TemporaryDirectory() as output:
        arguments = GRPOConfig(
            output_dir=output,
            max_steps=args.steps,
            per_device_train_batch_size=args.prompts * args.group,
            num_generations=args.group,
            max_completion_length=args.tokens,
            generation_kwargs={"min_new_tokens": args.tokens},
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            beta=0.0,
            bf16=False,
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=lambda completion_ids, **_: [score(ids) for ids in completion_ids],
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
            processing_class=tokenizer,
            callbacks=[TakeTurns()],
        )
        trainer.train()


def main() -> None:
    args = parse()
    import_megatron()
    from machine import machine

    from g2r_megatron.data.tokenizer_files import load_tokenizer

    tokenizer = load_tokenizer(Path(args.model))
    rows = (QUICKSTART / "data" / "train.jsonl").read_text().splitlines()
    texts = [f"user: {json.loads(row)['prompt']}" for row in rows][: args.prompts * args.steps]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    ours, theirs = Times(), Times()
    run_trl(args, texts, tokenizer, theirs, our_step(args, prompts, ours))
    print(machine()[:-1] + f", trl {version('trl')}.")
    print(f"{args.model}: {args.prompts} x {args.group} responses of {args.tokens} tokens, {args.steps} steps")
    mine, others = ours.medians(), theirs.medians()
    for name, (wall, cpu) in mine.items():
        print(
            f"{name:6}  ours {wall:6.2f} s, {cpu:6.2f} CPU s   TRL {others[name][0]:6.2f} s, {others[name][1]:6.2f} CPU s"
            f"   ratio {wall / others[name][0]:.2f}, CPU {cpu / others[name][1]:.2f}"
        )


if __name__ == "__main__":
    main()
