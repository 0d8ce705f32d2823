"""Tokens a second of the rollout engines, and what putting the weights into vLLM takes.

    make vllm
    python benchmarks/rollout.py --model DIR [--prompts 64] [--tokens 256]
    python benchmarks/rollout.py --model DIR --prompts 32 --tokens 128 --engines megatron transformers   # without vLLM
    python benchmarks/rollout.py --model DIR --prompts 32 --tokens 256 --slots 16 --mixed --engines megatron transformers

Raw vLLM and our engine are one vLLM, in one process, with the same prompts and sampling parameters, and take turns; each
response is cut at ``--tokens`` (no stop token). Raw vLLM is called as its users do, with one ``SamplingParams`` for all
prompts and log-probs of the sampled tokens; ours has a seed for each response. Medians of the rounds. A synchronisation is
compared with one copy of the weights' bytes in memory. transformers samples with ``generate`` and its cache.

``--mixed``: prompts of 20 to 200 tokens, and responses whose lengths are drawn beforehand from a log-normal distribution
(median 40, cut at ``--tokens``), the same for both engines: a response ends when it has its number of tokens. At most
``--slots`` sequences are decoded together. transformers takes the prompts in the order given, batch after batch with
padding on the left, each until its longest response has ended. Megatron's engine gives the row of a sequence that has
ended to the next one.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median

import torch

from g2r_megatron.parallel.cpu import import_megatron

ROOT = Path(__file__).resolve().parents[1]


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Wall seconds, and this process's CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(ROOT / "examples" / "quickstart" / "model"), help="Hugging Face directory"
    )
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256, help="of each response")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slots", type=int, help="sequences decoded together (all)")
    parser.add_argument("--mixed", action="store_true", help="prompts and responses of many lengths (not with vllm)")
    parser.add_argument("--engines", nargs="+", choices=("vllm", "megatron", "transformers"), default=["vllm"])
    args = parser.parse_args()
    if args.mixed and "vllm" in args.engines:
        parser.error("--mixed: vLLM's responses are not given lengths here; name other --engines")
    return args


@dataclass
class Work:
    """Prompts (token ids), and how many tokens the response to each gets."""

    prompts: list[list[int]]
    lengths: list[int]


def work(args: argparse.Namespace, vocab: int) -> Work:
    """All of one length, or of many."""
    numbers, count = torch.Generator().manual_seed(1), args.prompts
    if not args.mixed:
        ids = torch.randint(vocab, (count, args.prompt_tokens), generator=numbers).tolist()
        return Work(ids, [args.tokens] * count)
    sizes = torch.randint(20, 201, (count,), generator=numbers).tolist()
    lengths = (40 * torch.randn(count, generator=numbers).mul(0.8).exp()).long().clamp(1, args.tokens).tolist()
    return Work([torch.randint(vocab, (size,), generator=numbers).tolist() for size in sizes], lengths)


def end_at(engine, lengths: list[int]) -> None:
    """Let Megatron's ``engine`` sample a stop token as the last of each response, and nowhere else."""
    stop, step = max(engine.stop_ids), engine._step

    def forced(batch, *given) -> list[int]:
        ends = [row.number is not None and len(row.ids) - row.start == lengths[row.number] - 1 for row in batch.rows]
        found = step(batch, *given)
        return [stop if end else token - (token == stop) for end, token in zip(ends, found, strict=True)]

    engine._step = forced


def main() -> None:
    args = parse()
    import_megatron()
    from machine import machine

    from g2r_megatron.config.options import Layout, OptimizerConfig, Precision, RolloutConfig, TrainConfig
    from g2r_megatron.model.build import build_model
    from g2r_megatron.model.hf import open_hf_model
    from g2r_megatron.parallel.groups import build_groups, initialize
    from g2r_megatron.policy.trainer import PolicyTrainer
    from g2r_megatron.rollout.types import Request
    from g2r_megatron.workers import build_engine

    initialize(1)
    policy = build_model(
        "policy", open_hf_model(args.model, "policy.model"), build_groups("policy", Layout()), Precision()
    )
    vocab = policy.geometry.vocab
    todo, slots = work(args, vocab), args.slots or args.prompts
    longest = max(map(len, todo.prompts))
    rollout = RolloutConfig(engine="vllm", batch_size=slots, max_prompt_tokens=longest, max_response_tokens=args.tokens)
    config = TrainConfig(rollout=rollout, optimizer=OptimizerConfig(distributed=False))
    trainer = PolicyTrainer(policy, config)
    requests = [Request(prompt, str(i)) for i, prompt in enumerate(todo.prompts)]
    ways: dict[str, Callable[[], object]] = {}
    others: dict[str, Callable[[], object]] = {}
    if "vllm" in args.engines:
        engine = build_engine(config, trainer, set())
        ways |= {
            "raw vLLM": raw_vllm(engine, todo.prompts, args.tokens),
            "our vLLM engine": lambda: engine.generate(requests),
        }
        copy = torch.empty(sum(p.nbytes for _, p in policy.named_parameters()), dtype=torch.uint8)
        target = torch.empty_like(copy)
        others = {"sync": engine.take_weights, "copy": lambda: target.copy_(copy)}
    if "megatron" in args.engines:
        stops = {vocab - 1} if args.mixed else set()
        megatron = build_engine(replace(config, rollout=replace(rollout, engine="megatron")), trainer, stops)
        if args.mixed:
            end_at(megatron, todo.lengths)
        ways["Megatron engine"] = lambda: [len(found.token_ids) for found in megatron.generate(requests)]
    if "transformers" in args.engines:
        ways["transformers"] = transformers_generate(args.model, todo, slots)
    for name, call in ways.items():  # once to warm up
        if (made := call()) != todo.lengths and name in ("Megatron engine", "transformers"):
            raise SystemExit(f"{name} made responses of {made} tokens, not {todo.lengths}")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in (*ways, *others)}
    for _ in range(args.rounds):
        for name, call in (ways | others).items():
            times[name].append(seconds(call))
    print(machine())
    print(
        f"{args.model}: {args.prompts} prompts of {mean(map(len, todo.prompts)):.0f} tokens (longest {longest}), responses "
        f"of {mean(todo.lengths):.0f} (longest {max(todo.lengths)}), {slots} at a time, {args.rounds} rounds"
    )
    middle = {name: median(wall for wall, _ in found) for name, found in times.items()}
    base = "raw vLLM" if "vllm" in args.engines else args.engines[-1].replace("megatron", "Megatron engine")
    for name in ways:
        speed, ratio = sum(todo.lengths) / middle[name], middle[base] / middle[name]
        cpu = median(cpu for _, cpu in times[base]) / median(cpu for _, cpu in times[name])
        print(f"{name:18} {speed:8.1f} tokens/s   {ratio:.3f} of {base}, by CPU seconds {cpu:.3f}")
    if others:
        print(
            f"sync {middle['sync'] * 1e3:.1f} ms, copy of {copy.nbytes / 1e6:.1f} MB {middle['copy'] * 1e3:.1f} ms",
            end=", ",
        )
        print(f"ratio {middle['sync'] / middle['copy']:.1f}")


def raw_vllm(engine, ids: list[list[int]], tokens: int) -> Callable[[], object]:
    """vLLM as its users call it, on the engine's own instance, which has set vLLM's environment."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": prompt} for prompt in ids]
    plain = SamplingParams(max_tokens=tokens, temperature=1.0, ignore_eos=True, logprobs=0, detokenize=False)
    return lambda: engine._llm.generate(prompts, plain, use_tqdm=False)


def transformers_generate(path: str, todo: Work, slots: int) -> Callable[[], list[int]]:
    """``generate`` of transformers in fp32, at temperature 1 without filters, as ours; returns the responses' lengths."""
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    options = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0, eos_token_id=None)

    class HasItsTokens(StoppingCriteria):
        def __init__(self, ends: torch.Tensor):
            self.ends = ends  # [b]: tokens of the padded prompt and the response

        def __call__(self, input_ids, scores, **_):
            return input_ids.size(1) >= self.ends

    def generate() -> list[int]:
        made = []
        for first in range(0, len(todo.prompts), slots):
            prompts, lengths = (x[first : first + slots] for x in (todo.prompts, todo.lengths))
            width = max(map(len, prompts))
            ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            ends = HasItsTokens(width + torch.tensor(lengths))
            found = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max(lengths),
                stopping_criteria=StoppingCriteriaList([ends]),
                **options,
            )
            made += [min(found.size(1) - width, length) for length in lengths]
        return made

    return generate


if __name__ == "__main__":
    main()
