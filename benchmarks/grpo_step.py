"""A whole GRPO step, ours beside TRL's GRPOTrainer: the same model, prompts and sizes.

    python benchmarks/grpo_step.py                                     # the quickstart's model, without a judge
    python benchmarks/grpo_step.py --judge_items 10                    # with a judge of 10 rubric items a response
    python benchmarks/grpo_step.py --engine vllm                       # ours samples with vLLM
    python benchmarks/grpo_step.py --model DIR --prompts 4 --group 4 --tokens 64 --steps 3

Both are in one process and take turns, step by step: sample ``--prompts`` times ``--group`` responses that are cut at
``--tokens`` (no stop token), score them, and update once with Adam (one mini-batch, no KL penalty, fp32, no
recomputation). TRL generates with transformers and runs the responses as one padded batch. Ours runs packed rows, and
generates with Megatron-Core's cache or with vLLM, whose weights are then synchronised in every step.

Without ``--judge_items`` the score is a cheap function of the tokens. With it a frozen copy of the model says of each item
whether the response meets it, and the score is the share of the items met. Ours asks by its judge stage, the items of a
response behind one prefix. TRL asks in a reward function: for each response a batch of the items' prompts through
transformers, with the logits of the last position. CPU seconds are those of the process. Medians of the steps after the first.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from g2r_megatron.data.types import Query, RubricItem
from g2r_megatron.parallel.cpu import import_megatron

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "examples" / "quickstart"
LEARNING_RATE = 1e-6


Seconds = tuple[float, float]  # wall, CPU
TEMPLATE = "{conversation} | {response} | {criterion} =>"  # of the judge, as the quickstart's


@dataclass
class Times:
    """Seconds of each step: sampling (with the synchronisation of weights), the judge, and all of it."""

    sample: list[Seconds] = field(default_factory=list)
    judge: list[Seconds] = field(default_factory=list)
    step: list[Seconds] = field(default_factory=list)

    def medians(self) -> dict[str, Seconds]:
        """Of the steps after the first; the update is what is left beside sampling and judge."""
        kept = {"sample": self.sample[1:], "judge": self.judge[1:], "step": self.step[1:]}
        parts = zip(kept["step"], kept["sample"], kept["judge"], strict=True)
        kept["update"] = [(a[0] - b[0] - c[0], a[1] - b[1] - c[1]) for a, b, c in parts]
        return {name: (median(t[0] for t in found), median(t[1] for t in found)) for name, found in kept.items()}


def now() -> Seconds:
    return time.perf_counter(), time.process_time()


def since(start: Seconds) -> Seconds:
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
    parser.add_argument("--engine", choices=("megatron", "vllm"), default="megatron", help="that ours samples with")
    parser.add_argument("--judge_items", type=int, default=0, help="rubric items of a response; 0: no judge")
    return parser.parse_args()


def read_queries(args: argparse.Namespace) -> list[Query]:
    """The quickstart's prompts, each with ``judge_items`` criteria: its own, then those of the rows after it."""
    rows = [json.loads(line) for line in (QUICKSTART / "data" / "train.jsonl").read_text().splitlines()]
    criteria = [[item["criterion"] for item in row["rubric"]] for row in rows]
    queries = []
    for i, row in enumerate(rows[: args.prompts * args.steps]):
        found = [text for own in criteria[i:] + criteria[:i] for text in own][: args.judge_items]
        messages = ({"role": "user", "content": row["prompt"]},)
        queries.append(Query(row["id"], messages, tuple(RubricItem(text, 1.0) for text in found)))
    return queries


def prompt_text(query: Query) -> str:
    return f"user: {query.messages[0]['content']}"


def our_step(args: argparse.Namespace, queries: list[Query], tokenizer, times: Times) -> Callable[[], None]:
    """A function that takes one step of ours."""
    from g2r_megatron.config.options import Layout, OptimizerConfig, PolicyConfig, Precision, RolloutConfig, TrainConfig
    from g2r_megatron.model.build import build_model
    from g2r_megatron.model.hf import open_hf_model
    from g2r_megatron.parallel.groups import build_groups, initialize
    from g2r_megatron.policy.log_probs import TokenSequence
    from g2r_megatron.policy.trainer import PolicyTrainer
    from g2r_megatron.rollout.types import Request
    from g2r_megatron.workers import build_engine

    initialize(1)
    prompts = [tokenizer(prompt_text(query))["input_ids"] for query in queries]
    rollout = RolloutConfig(
        engine=args.engine, max_prompt_tokens=max(map(len, prompts)), max_response_tokens=args.tokens
    )
    optimizer = OptimizerConfig(distributed=False, lr=LEARNING_RATE)
    config = TrainConfig(
        policy=PolicyConfig(micro_batch_tokens=args.micro_batch_tokens), rollout=rollout, optimizer=optimizer
    )
    hf, groups = open_hf_model(args.model, "policy.model"), build_groups("policy", Layout())
    trainer = PolicyTrainer(build_model("policy", hf, groups, Precision()), config)
    engine = build_engine(config, trainer, set())
    judge = our_judge(hf, groups, tokenizer, args.micro_batch_tokens) if args.judge_items else score_tokens

    def step() -> None:
        number, start = len(times.step), now()
        chosen = [i for i in batch_of(range(len(prompts)), number, args.prompts) for _ in range(args.group)]
        wanted = [prompts[i] for i in chosen]
        found = engine.generate([Request(ids, f"{number}/{i}") for i, ids in enumerate(wanted)])
        engine.rest()
        sampling = since(start)
        sequences = [TokenSequence(ids, sampled.token_ids) for ids, sampled in zip(wanted, found, strict=True)]
        begin = now()
        scores = torch.tensor(judge([queries[i] for i in chosen], [sampled.token_ids for sampled in found]))
        times.judge.append(since(begin))
        scores = scores.view(-1, args.group)
        z = ((scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-6)).flatten()
        advantages = [a.expand(len(s.response_ids)) for a, s in zip(z, sequences, strict=True)]
        known = trainer.update_log_probs(sequences, None, config.needs_old_pass)
        trainer.update(sequences, known.mini_batches, advantages, known.old, None)
        begin = now()
        engine.take_weights()
        sync = since(begin)
        times.sample.append((sampling[0] + sync[0], sampling[1] + sync[1]))
        times.step.append(since(start))

    return step


def score_tokens(queries: list[Query], responses: list[list[int]]) -> list[float]:
    return [score(ids) for ids in responses]


def our_judge(hf, groups, tokenizer, budget: int) -> Callable[[list[Query], list[list[int]]], list[float]]:
    """The share of its items that each response meets, by our judge stage and a frozen copy of the model."""
    from g2r_megatron.config.options import JudgeConfig
    from g2r_megatron.judge.prompt import JudgePrompt
    from g2r_megatron.workers import build_judge_stage

    verdicts_alone = dict(target="log_prob", attribution="uniform", normalize="softmax", standardize=False)
    config = JudgeConfig(
        template=TEMPLATE, chat_template=False, smoothing="none", micro_batch_tokens=budget, **verdicts_alone
    )
    stage = build_judge_stage(config, hf, JudgePrompt(tokenizer, config), groups)

    def judge(queries: list[Query], responses: list[list[int]]) -> list[float]:
        rows = stage.verdicts(stage.inputs(queries, responses), [""] * len(queries), attributed=False)
        return [sum(item.verdict for item in row) / len(row) for row in rows]

    return judge


def their_judge(args: argparse.Namespace, tokenizer) -> Callable[..., list[float]]:
    """The same as a reward function of TRL, by transformers: a batch of prompts for the items of a response."""
    from transformers import AutoModelForCausalLM

    from g2r_megatron.config.options import JudgeConfig
    from g2r_megatron.judge.prompt import JudgePrompt

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    words = JudgePrompt(tokenizer, JudgeConfig(template=TEMPLATE, chat_template=False))

    @torch.no_grad()
    def reward(prompts: list[str], completions: list[str], criteria: list[list[str]], **_) -> list[float]:
        scores = []
        for prompt, completion, items in zip(prompts, completions, criteria, strict=True):
            texts = [TEMPLATE.format(conversation=prompt, response=completion, criterion=item) for item in items]
            batch = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
            options = {name: batch[name] for name in ("input_ids", "attention_mask")}
            logits = model(**options, logits_to_keep=1).logits[:, -1]
            p_true, p_false = (logits.softmax(-1)[:, ids].sum(-1) for ids in (words.true_ids, words.false_ids))
            scores.append((p_true > p_false).float().mean().item())
        return scores

    return reward


def batch_of(prompts: Sequence, number: int, count: int) -> list:
    """The prompts of step ``number``."""
    return [prompts[(number * count + i) % len(prompts)] for i in range(count)]


def run_trl(
    args: argparse.Namespace, queries: list[Query], tokenizer, times: Times, after_step: Callable[[], None]
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
    judge = their_judge(args, tokenizer) if args.judge_items else None

    def reward(completion_ids, **columns) -> list[float]:
        start = now()
        scores = [score(ids) for ids in completion_ids] if judge is None else judge(**columns)
        times.judge.append(since(start))
        return scores

    class TakeTurns(TrainerCallback):
        def on_step_begin(self, *given, **named):
            self.start = now()

        def on_step_end(self, *given, **named):
            times.step.append(since(self.start))
            after_step()

    rows = [{"prompt": prompt_text(q), "criteria": [item.criterion for item in q.rubric]} for q in queries]
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
            reward_funcs=reward,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
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
    ours, theirs, queries = Times(), Times(), read_queries(args)
    run_trl(args, queries, tokenizer, theirs, our_step(args, queries, tokenizer, ours))
    print(machine()[:-1] + f", trl {version('trl')}.")
    print(
        f"{args.model}: {args.prompts} x {args.group} responses of {args.tokens} tokens, engine {args.engine}, "
        f"{args.judge_items} rubric items, {args.steps} steps"
    )
    mine, others = ours.medians(), theirs.medians()
    for name, (wall, cpu) in mine.items():
        if name == "judge" and not args.judge_items:
            continue
        print(
            f"{name:6}  ours {wall:6.2f} s, {cpu:6.2f} CPU s   TRL {others[name][0]:6.2f} s, {others[name][1]:6.2f} CPU s"
            f"   ratio {wall / others[name][0]:.2f}, CPU {cpu / others[name][1]:.2f}"
        )


if __name__ == "__main__":
    main()
