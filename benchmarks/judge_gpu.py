"""Time and memory of the judge's two passes on one GPU, by layers and number format.

    python benchmarks/judge_gpu.py [--hidden 2048 --layers 16 --output benchmarks/results]

A random model of Qwen3's shape (about 1B parameters by default) judges random sequences: the verdict pass (forward, logits
at one position) and the attribution pass (forward and backward to the embeddings; no weight gradients). Both are timed
after a warm-up, the best of a few repetitions. Accuracy of random weights says nothing about a trained judge; the rank
correlation of the attributions with plain torch in bf16 only shows that the formats compute the same thing.
"""

import argparse
import json
import platform
import random
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from g2r_megatron.config.options import JudgeConfig, Layout, Precision
from g2r_megatron.device import local_device, on_cpu
from g2r_megatron.errors import UserError
from g2r_megatron.judge.frozen import FrozenJudge, Pass
from g2r_megatron.judge.types import JudgeInput
from g2r_megatron.model.build import MegatronModel, build_model
from g2r_megatron.model.hf import open_hf_model
from g2r_megatron.parallel.groups import build_groups, initialize

FORMATS = {  # name -> (layers, FP8 recipe, recompute)
    "torch bf16": ("torch", "none", "none"),
    "te bf16": ("te", "none", "none"),
    "te bf16, full recompute": ("te", "none", "full"),
    "te fp8 tensorwise": ("te", "tensorwise", "none"),
    "te fp8 blockwise": ("te", "blockwise", "none"),
}
TRUE_IDS, FALSE_IDS = [5], [9]


def write_random_model(args: argparse.Namespace, directory: str) -> None:
    """A bf16 Hugging Face directory of Qwen3's shape with heads of 128."""
    config = Qwen3Config(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 128,
        num_key_value_heads=max(args.hidden // 256, 1),
        head_dim=128,
        tie_word_embeddings=True,
    )
    torch.manual_seed(1)
    with local_device():
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)


def random_inputs(args: argparse.Namespace) -> list[JudgeInput]:
    """Sequences of one length whose middle half is the response."""
    numbers, n = random.Random(1), args.tokens
    return [
        JudgeInput([numbers.randrange(10, args.vocab) for _ in range(n)], n // 4, 3 * n // 4, n - 1)
        for _ in range(args.sequences)
    ]


def timed(function, repetitions: int) -> tuple[float, float, object]:
    """(best seconds, peak GiB allocated, last result) after one warm-up."""
    function()
    on_gpu = not on_cpu()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repetitions):
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = function()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds), torch.cuda.max_memory_allocated() / 2**30 if on_gpu else float("nan"), result


def measure(model: MegatronModel, inputs: list[JudgeInput], args: argparse.Namespace) -> tuple[dict, torch.Tensor]:
    """Figures of one format, and the attributions of all response tokens in a row."""
    options = JudgeConfig(attribution="contracted", target="logit_margin", micro_batch_tokens=args.micro_batch_tokens)
    judge = FrozenJudge(model, options, TRUE_IDS, FALSE_IDS)
    verdict, verdict_gib, _ = timed(lambda: judge.verdict_log_probs([[item] for item in inputs]), args.repetitions)
    passes = [Pass([item], [True], [1.0]) for item in inputs]
    attribution, attribution_gib, found = timed(lambda: judge.token_gradients(passes), args.repetitions)
    tokens = args.sequences * args.tokens
    figures = {
        "verdict_seconds": verdict,
        "attribution_seconds": attribution,
        "attribution_over_verdict": attribution / verdict,
        "verdict_tokens_per_second": tokens / verdict,
        "attribution_tokens_per_second": tokens / attribution,
        "verdict_peak_gib": verdict_gib,
        "attribution_peak_gib": attribution_gib,
    }
    return figures, torch.cat([gradients.dot for gradients in found])


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's, for values without ties."""
    return torch.corrcoef(torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double())[0, 1].item()


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def machine() -> dict[str, str]:
    gpu = "none" if on_cpu() else torch.cuda.get_device_name()
    packages = ("torch", "megatron-core", "transformer-engine", "transformers")
    return {"gpu": gpu, "cuda": str(torch.version.cuda), "python": platform.python_version()} | {
        name: installed(name) for name in packages
    }


def markdown(facts: dict, results: dict[str, dict]) -> str:
    """The table of a results file; ratios are against the first format."""
    first = next(iter(results.values()))
    rows = [
        "| layers and format | verdict s | attribution s | ratio | verdict speed-up | attribution speed-up | peak GiB | rank corr. |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, r in results.items():
        speed = [first[key] / r[key] for key in ("verdict_seconds", "attribution_seconds")]
        rows.append(
            f"| {name} | {r['verdict_seconds']:.3f} | {r['attribution_seconds']:.3f} | {r['attribution_over_verdict']:.2f} "
            f"| {speed[0]:.2f} | {speed[1]:.2f} | {r['attribution_peak_gib']:.1f} | {r['rank_correlation']:.4f} |"
        )
    return "\n".join([f"{key}: {value}  " for key, value in facts.items()] + ["", *rows]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(
        hidden=2048, layers=16, vocab=32768, sequences=32, tokens=1024, micro_batch_tokens=16384, repetitions=3
    ).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    initialize(seed=1)
    groups, inputs, results, reference = build_groups("judge", Layout()), random_inputs(args), {}, None
    with tempfile.TemporaryDirectory() as directory:
        write_random_model(args, directory)
        hf = open_hf_model(directory, "judge.model")
        for name, (spec, fp8, recompute) in FORMATS.items():
            try:
                model = build_model("judge", hf, groups, Precision("bf16", fp8), recompute, spec)
            except UserError as error:
                print(f"{name}: left out: {error}")
                continue
            results[name], scores = measure(model, inputs, args)
            reference = scores if reference is None else reference
            results[name]["rank_correlation"] = rank_correlation(scores, reference)
            print(name, json.dumps(results[name]), flush=True)
            del model
    sizes = {key: value for key, value in vars(args).items() if key != "output"}
    facts = machine() | {"sizes": ", ".join(f"{key} {value}" for key, value in sizes.items())}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "judge_gpu.json").write_text(json.dumps({"machine": facts, "results": results}, indent=2) + "\n")
    (args.output / "judge_gpu.md").write_text(markdown(facts, results))
    print(markdown(facts, results))


if __name__ == "__main__":
    main()
