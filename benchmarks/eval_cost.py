"""What ``g2r eval`` costs beside what it cannot do without: the same responses sampled, and judged in one pass without gradients.

    python benchmarks/eval_cost.py --data FILE [--rows 12 --tokens 32 --rounds 2 --model DIR] [options of g2r eval]

Both load the same model twice, as policy and as judge, sample greedily with the same engine and judge every criterion of
every response. ``g2r eval`` also reads and checks options and rows, keeps every response as it comes, scores, and writes
records, summary and page. Rounds alternate, so that both see the same machine; seconds of the CPU are those of this process.
"""

import argparse
import contextlib
import gc
import io
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from machine import machine

from g2r_megatron.config import parsing
from g2r_megatron.config.checks import check_eval_config
from g2r_megatron.config.command_options import EvalConfig
from g2r_megatron.eval.command import check_lengths, evaluate_model, read_rows
from g2r_megatron.experience import respond
from g2r_megatron.model.build import build_model
from g2r_megatron.parallel import groups
from g2r_megatron.workers import judge_texts, read_policy, read_verdict_judge, start_engine

ROOT = Path(__file__).resolve().parents[1]
MODEL = Path.home() / ".cache" / "g2r-megatron" / "SmolLM2-135M-Instruct"
TARGET = 1.15
Result = TypeVar("Result")


def options(args: argparse.Namespace, data: Path, output: Path, more: list[str]) -> EvalConfig:
    """The options of ``g2r eval``."""
    given = ["--policy.model", str(args.model), "--judge.model", str(args.model), "--greedy", "--data", f'["{data}"]']
    given += ["--rollout.max_response_tokens", str(args.tokens), "--output", str(output)]
    config = parsing.parse(EvalConfig, "eval_cost", [*given, *more])
    check_eval_config(config, 1)
    return config


def raw(config: EvalConfig, rows: int | None = None) -> Callable[[], int]:
    """Sampling and one sparse judging pass over the first ``rows`` rows (None: all), with rows, prompts and tokenizers read

    before; returns the number of its verdicts.
    """
    policy = read_policy(config.policy, config.rollout, config.system_prompt, "system_prompt")
    judge = read_verdict_judge(config.judge, "judge")
    queries = read_rows(config)[:rows]
    check_lengths(config, judge, policy, queries)

    def run() -> int:
        layout = groups.build_groups("policy", config.policy.layout)
        model = build_model("policy", policy.policy, layout, config.policy.precision, "none", config.policy.spec)
        model.freeze()
        engine = start_engine(model, config.rollout, config.policy.precision.dtype, policy.stop_ids, 1)
        engine.take_weights()
        texts = [r.text for r in respond(engine, policy, queries, [query.id for query in queries], 0.0)]
        del engine, model
        gc.collect()
        return sum(map(len, judge_texts(judge.load(), queries, texts)))

    return run


def seconds(work: Callable[[], Result]) -> tuple[float, float, Result]:
    """Of the clock and of the CPU, and the result."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        result = work()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=32, help="of a response")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--data", type=Path, required=True, help="rows, such as HealthBench's")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    args, more = parser.parse_known_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory() as directory:
        rows = Path(directory, "rows.jsonl")
        rows.write_text("".join(args.data.read_text().splitlines(keepends=True)[: args.rows]))
        config = options(args, rows, Path(directory, "unused"), more)
        groups.initialize(config.seed)
        raw(config, rows=1)()  # warms up: kernels, the page cache
        bare = raw(config)
        found: dict[str, list[tuple[float, float]]] = {"raw": [], "g2r eval": []}
        for number in range(args.rounds):
            config = options(args, rows, Path(directory, f"eval-{number}"), more)
            *spent, verdicts = seconds(bare)
            found["raw"].append(tuple(spent))
            found["g2r eval"].append(seconds(partial(evaluate_model, config))[:2])
            print(number + 1, {name: own[-1] for name, own in found.items()}, flush=True)
    report = table(found, args, verdicts)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "eval_cost.md").write_text(report)
    print(report)


def table(found: dict[str, list[tuple[float, float]]], args: argparse.Namespace, verdicts: int) -> str:
    """The medians of the rounds, and the median of their ratios."""
    lines = ["| | seconds | of the CPU |", "|---|---|---|"]
    for name, own in found.items():
        lines.append(f"| {name} | {median(wall for wall, _ in own):.1f} | {median(cpu for _, cpu in own):.1f} |")
    ratios = [
        median(whole[i] / bare[i] for whole, bare in zip(found["g2r eval"], found["raw"], strict=True)) for i in (0, 1)
    ]
    lines.append(f"| ratio | {ratios[0]:.3f} | {ratios[1]:.3f} |")
    said = (
        f"{args.rows} rows of `{args.data.name}`, {verdicts} verdicts, responses of at most {args.tokens} tokens, model "
        f"`{args.model.name}`, {args.rounds} rounds. The target is {TARGET}."
    )
    doc = " ".join((__doc__ or "").split("\n\n")[2].split())
    return "\n".join(["# Cost of an evaluation", "", said, "", doc, "", machine(), "", *lines, ""])


if __name__ == "__main__":
    main()
