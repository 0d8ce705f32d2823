"""Tokens a second of the rollout engines, and what putting the weights into vLLM takes.

    make vllm
    python benchmarks/rollout.py --model DIR [--prompts 64] [--tokens 256]
    python benchmarks/rollout.py --model DIR --prompts 32 --tokens 128 --engines megatron transformers   # without vLLM

Raw vLLM and our engine are one vLLM, in one process, with the same prompts and sampling parameters, and take turns; each
response is cut at ``--tokens`` (no stop token). Raw vLLM is called as its users do, with one ``SamplingParams`` for all
prompts and log-probs of the sampled tokens; ours has a seed for each response. Medians of the rounds. A synchronisation is
compared with one copy of the weights' bytes in memory. transformers samples with ``generate``, one batch with its cache.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

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
    parser.add_argument("--engines", nargs="+", choices=("vllm", "megatron", "transformers"), default=["vllm"])
    return parser.parse_args()


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
    rollout = RolloutConfig(
        engine="vllm", batch_size=args.prompts, max_prompt_tokens=args.prompt_tokens, max_response_tokens=args.tokens
    )
    policy = build_model(
        "policy", open_hf_model(args.model, "policy.model"), build_groups("policy", Layout()), Precision()
    )
    config = TrainConfig(rollout=rollout, optimizer=OptimizerConfig(distributed=False))
    trainer = PolicyTrainer(policy, config)
    vocab = policy.geometry.vocab
    ids = torch.randint(vocab, (args.prompts, args.prompt_tokens), generator=torch.Generator().manual_seed(1)).tolist()
    requests = [Request(prompt, str(i)) for i, prompt in enumerate(ids)]
    ways: dict[str, Callable[[], object]] = {}
    others: dict[str, Callable[[], object]] = {}
    if "vllm" in args.engines:
        engine = build_engine(config, trainer, set())
        ways |= {"raw vLLM": raw_vllm(engine, ids, args.tokens), "our vLLM engine": lambda: engine.generate(requests)}
        copy = torch.empty(sum(p.nbytes for _, p in policy.named_parameters()), dtype=torch.uint8)
        target = torch.empty_like(copy)
        others = {"sync": engine.take_weights, "copy": lambda: target.copy_(copy)}
    if "megatron" in args.engines:
        megatron = build_engine(replace(config, rollout=replace(rollout, engine="megatron")), trainer, set())
        ways["Megatron engine"] = lambda: megatron.generate(requests)
    if "transformers" in args.engines:
        ways["transformers"] = transformers_generate(args.model, ids, args.tokens)
    for call in ways.values():  # once to warm up
        call()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in (*ways, *others)}
    for _ in range(args.rounds):
        for name, call in (ways | others).items():
            times[name].append(seconds(call))
    print(machine())
    print(
        f"{args.model}: {args.prompts} prompts of {args.prompt_tokens} tokens, responses of {args.tokens}, {args.rounds} rounds"
    )
    middle = {name: median(wall for wall, _ in found) for name, found in times.items()}
    base = "raw vLLM" if "vllm" in args.engines else args.engines[-1].replace("megatron", "Megatron engine")
    for name in ways:
        speed, ratio = args.prompts * args.tokens / middle[name], middle[base] / middle[name]
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


def transformers_generate(path: str, ids: list[list[int]], tokens: int) -> Callable[[], object]:
    """``generate`` of transformers in fp32, at temperature 1 without filters, as ours."""
    from transformers import AutoModelForCausalLM

    model, prompts = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), torch.tensor(ids)
    options = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0, eos_token_id=None)
    mask = torch.ones_like(prompts)
    return lambda: model.generate(prompts, attention_mask=mask, max_new_tokens=tokens, **options)


if __name__ == "__main__":
    main()
