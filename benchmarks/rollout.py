"""Tokens a second of the rollout engines, and what putting the weights into vLLM takes.

    make vllm
    python benchmarks/rollout.py --model DIR [--prompts 64] [--tokens 256]

Raw vLLM and our engine are one vLLM, in one process, with the same prompts and sampling parameters, and take turns; each
response is cut at ``--tokens`` (no stop token). Raw vLLM is called as its users do, with one ``SamplingParams`` for all
prompts and log-probs of the sampled tokens; ours has a seed for each response. Medians of the rounds. A synchronisation is
compared with one copy of the weights' bytes in memory.
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


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(ROOT / "examples" / "quickstart" / "model"), help="Hugging Face directory"
    )
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256, help="of each response")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megatron", action="store_true", help="measure Megatron's engine too")
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
    engine = build_engine(config, trainer, set())
    from vllm import SamplingParams  # now that the engine has set its environment

    vocab = policy.geometry.vocab
    ids = torch.randint(vocab, (args.prompts, args.prompt_tokens), generator=torch.Generator().manual_seed(1)).tolist()
    requests = [Request(prompt, str(i)) for i, prompt in enumerate(ids)]
    prompts = [{"prompt_token_ids": prompt} for prompt in ids]
    plain = SamplingParams(max_tokens=args.tokens, temperature=1.0, ignore_eos=True, logprobs=0, detokenize=False)
    ways = {
        "raw vLLM": lambda: engine._llm.generate(prompts, plain, use_tqdm=False),
        "our vLLM engine": lambda: engine.generate(requests),
    }
    if args.megatron:
        megatron = build_engine(replace(config, rollout=replace(rollout, engine="megatron")), trainer, set())
        ways["Megatron engine"] = lambda: megatron.generate(requests)
    copy = torch.empty(sum(p.nbytes for _, p in policy.named_parameters()), dtype=torch.uint8)
    target = torch.empty_like(copy)
    for call in ways.values():  # once to warm up
        call()
    times: dict[str, list[float]] = {name: [] for name in (*ways, "sync", "copy")}
    for _ in range(args.rounds):
        for name, call in ways.items():
            times[name].append(seconds(call))
        times["sync"].append(seconds(engine.take_weights))
        times["copy"].append(seconds(lambda: target.copy_(copy)))
    print(machine())
    print(
        f"{args.model}: {args.prompts} prompts of {args.prompt_tokens} tokens, responses of {args.tokens}, {args.rounds} rounds"
    )
    middle = {name: median(found) for name, found in times.items()}
    for name in ways:
        speed, ratio = args.prompts * args.tokens / middle[name], middle["raw vLLM"] / middle[name]
        print(f"{name:18} {speed:8.0f} tokens/s   {ratio:.3f} of raw vLLM")
    print(
        f"sync {middle['sync'] * 1e3:.1f} ms, copy of {copy.nbytes / 1e6:.1f} MB {middle['copy'] * 1e3:.1f} ms",
        end=", ",
    )
    print(f"ratio {middle['sync'] / middle['copy']:.1f}")


if __name__ == "__main__":
    main()
