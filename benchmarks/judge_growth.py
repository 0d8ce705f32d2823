"""How the judge's cost grows with the response's length, the number of criteria and the ranks; and the largest input.

    python benchmarks/judge_growth.py [--hidden 128 --layers 2 --output benchmarks/results]

A random model judges random tokens: a conversation of 400 tokens, a response, criteria of 110 tokens, all judged True. CPU
seconds of the process are the least of the repetitions. Memory is what a pass adds to the process at its peak, beside
what judge/activation_memory.py says of it; the largest real HealthBench rubric (33 criteria) on a response of 4096 tokens must stay
within 0.7 to 1.1 of it. Writes judge_growth.md and judge_growth.svg.
"""

import argparse
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch
from judge_cost import memory, write_model
from machine import machine

from g2r_megatron.config.options import JudgeConfig, Layout, Precision
from g2r_megatron.judge.activation_memory import judge_activation_bytes
from g2r_megatron.judge.frozen import FrozenJudge, Pass
from g2r_megatron.judge.types import JudgeInput
from g2r_megatron.model.build import build_model
from g2r_megatron.model.hf import open_hf_model
from g2r_megatron.parallel.groups import build_groups, initialize
from g2r_megatron.report.charts import Chart, Curve, line_chart

CONVERSATION, CRITERION = 400, 110  # tokens
LENGTHS, CRITERIA = (128, 512, 1024, 2048, 4096), (1, 4, 8, 16, 33)
LARGEST = 33  # criteria of the largest rubric of HealthBench
FIXED_LENGTH, FIXED_CRITERIA = 512, 8
RANKS = {"1 rank": Layout(), "2 data parallel": Layout(), "2 tensor parallel, SP": Layout(tp=2, sp=True)}
RESPONSES = 4  # of the comparison of ranks
MARGIN = (0.7, 1.1)  # measured peak over the formula's
WORDS = {"sparse": "verdicts", "item": "and a backward an item", "response": "and one backward a response"}
STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#555}.title{font-weight:600;fill:#222}"
    ".grid{stroke:#ddd}.line{fill:none;stroke:currentColor;stroke-width:2}.dot{fill:currentColor}.hair{display:none}"
    ".c0{color:#2563c4;fill:#2563c4}.c1{color:#c2551b;fill:#c2551b}.c2{color:#1a8a5a;fill:#1a8a5a}"
)


def inputs(response: int, criteria: int, vocab: int) -> list[JudgeInput]:
    """One response of random tokens under so many criteria."""
    numbers = torch.Generator().manual_seed(response + criteria)
    prefix = torch.randint(10, vocab, (CONVERSATION + response,), generator=numbers).tolist()
    own = torch.randint(10, vocab, (criteria, CRITERION), generator=numbers).tolist()
    return [
        JudgeInput([*prefix, 10 + k, *own[k][1:]], CONVERSATION, CONVERSATION + response, len(prefix) + CRITERION - 1)
        for k in range(criteria)
    ]


class Judged:
    """A judge on ``layout``, with one tree a micro-batch."""

    def __init__(self, directory: str, layout: Layout, recompute: str = "none"):
        initialize(seed=1)
        hf = open_hf_model(directory, "judge.model")
        model = build_model("judge", hf, build_groups("judge", layout), Precision(), recompute)
        config = JudgeConfig(target="log_prob", attribution="grad_x_embed", micro_batch_tokens=1, recompute=recompute)
        self.judge, self.geometry = FrozenJudge(model, config, [1], [2]), hf.geometry

    def run(self, way: str, rows: list[list[JudgeInput]]) -> None:
        self.judge.verdict_log_probs(rows)
        if way == "item":
            self.judge.token_gradients([Pass([item], [True], [1.0]) for row in rows for item in row])
        elif way == "response":
            self.judge.token_gradients([Pass(row, [True] * len(row), [1 / len(row)] * len(row)) for row in rows])

    def measure(self, way: str, rows: list[list[JudgeInput]], repetitions: int) -> dict:
        found = []
        for _ in range(repetitions):
            before, start, start_cpu = memory(reset=True), time.perf_counter(), time.process_time()
            self.run(way, rows)
            seconds = time.perf_counter() - start
            found.append((time.process_time() - start_cpu, seconds, memory() - before))
        best, branches = min(found), len(rows[0]) if way != "item" else 1
        shared = rows[0][0].verdict_position - CRITERION + 1
        formula = judge_activation_bytes(
            self.geometry,
            layers=self.geometry.layers,
            row_tokens=shared + branches * CRITERION,
            verdicts=branches,
            recompute=self.judge.config.recompute,
            backward=way != "sparse",
        )
        return {"cpu": best[0], "wall": best[1], "mib": min(f[2] for f in found) / 2**20, "formula": formula / 2**20}


def one_rank(args: argparse.Namespace, directory: str, connection) -> None:
    """Everything but the comparison of ranks."""
    judged = Judged(directory, Layout())
    judged.run("response", [inputs(64, 2, args.vocab)])
    for length, criteria in [(n, FIXED_CRITERIA) for n in args.lengths] + [(FIXED_LENGTH, k) for k in args.criteria]:
        rows = [inputs(length, criteria, args.vocab)]
        found = {way: judged.measure(way, rows, 1 if length > 2000 else args.repetitions) for way in WORDS}
        connection.send((length, criteria, found))
    for recompute in ("none", "full"):
        judged = Judged(directory, Layout(), recompute)
        judged.run("response", [inputs(64, 2, args.vocab)])
        connection.send((recompute, judged.measure("response", [inputs(args.longest, LARGEST, args.vocab)], 1)))
    connection.send(None)


def many_ranks(args, directory: str, layout: Layout, rank: int, ranks: int, port: int, connection) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    judged = Judged(directory, layout)
    rows = [inputs(FIXED_LENGTH, FIXED_CRITERIA, args.vocab) for _ in range(RESPONSES)]
    judged.run("response", rows[:1])
    connection.send({way: judged.measure(way, rows, args.repetitions) for way in WORDS})


def compare_ranks(args: argparse.Namespace, directory: str, processes) -> dict[str, dict[str, dict]]:
    """name -> way -> the figures of the slowest rank."""
    results = {}
    for name, layout in RANKS.items():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ranks, pipes = int(name[0]), []
        for rank in range(ranks):
            here, there = processes.Pipe()
            own = (args, directory, layout, rank, ranks, port, there)
            processes.Process(target=many_ranks, args=own, daemon=True).start()
            there.close()
            pipes.append(here)
        found = [pipe.recv() for pipe in pipes]
        results[name] = {way: {key: max(f[way][key] for f in found) for key in found[0][way]} for way in WORDS}
        print(name, results[name], flush=True)
    return results


def growth_table(head: str, rows: list[tuple]) -> str:
    lines = [
        f"| {head} | verdicts, CPU s | + item | + response | verdicts, MiB (formula) | + item | + response |",
        "|---|---|---|---|---|---|---|",
    ]
    for x, found in rows:
        seconds = " | ".join(f"{r['cpu']:.2f}" for r in found.values())
        sizes = " | ".join(f"{r['mib']:.0f} ({r['formula']:.0f})" for r in found.values())
        lines.append(f"| {x} | {seconds} | {sizes} |")
    return "\n".join(lines)


def chart(title: str, x_label: str, rows: list[tuple], key: str) -> str:
    """One chart as an SVG element with its title."""
    curves = [
        Curve(WORDS[way], slot, [(x, f[way][key], f[way][key], f[way][key]) for x, f in rows], loose=0)
        for slot, way in enumerate(WORDS)
    ]
    figure = line_chart(Chart(title, x_label, width=360, height=220), curves)
    svg = figure[figure.index("<svg") : figure.index("</svg>")]
    body = svg[svg.index(">") + 1 :]
    return f'<svg y="24" width="360" height="220" viewBox="0 0 360 220">{body}</svg><text class="title" x="16" y="16">{title}</text>'


def drawing(lengths: list[tuple], criteria: list[tuple]) -> str:
    charts = [
        chart(f"CPU s, {FIXED_CRITERIA} criteria", "response tokens", lengths, "cpu"),
        chart(f"CPU s, response of {FIXED_LENGTH} tokens", "criteria", criteria, "cpu"),
        chart(f"Peak MiB, {FIXED_CRITERIA} criteria", "response tokens", lengths, "mib"),
    ]
    parts = [f'<g transform="translate({i * 372},0)">{c}</g>' for i, c in enumerate(charts)]
    names = list(WORDS.values())
    legend = "".join(
        f'<text class="c{i}" style="fill:currentColor" x="{16 + 190 * i}" y="266">■ {n}</text>'
        for i, n in enumerate(names)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="1110" height="276" viewBox="0 0 1110 276"><style>{STYLE}</style>'
        f'<rect width="1110" height="276" fill="#fff"/>{"".join(parts)}{legend}</svg>\n'
    )


def report(args, points: list[tuple], long: dict, ranks: dict) -> str:
    lengths, criteria = points[: len(args.lengths)], points[len(args.lengths) :]
    lines = [
        f"| ranks | {' | '.join(f'{w}, s' for w in WORDS.values())} | {' | '.join(f'{w}, CPU s a rank' for w in WORDS.values())} |",
        "|---" * 7 + "|",
    ]
    for name, f in ranks.items():
        cells = [f"{f[w][key]:.2f}" for key in ("wall", "cpu") for w in WORDS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    rest = [
        f"- recompute {name}: {r['mib']:.0f} MiB measured, {r['formula']:.0f} MiB by the formula ({r['mib'] / r['formula']:.2f}), "
        f"{r['cpu']:.1f} CPU s"
        for name, r in long.items()
    ]
    return "\n".join(
        [
            "# How the judge's cost grows",
            "",
            f"`python benchmarks/judge_growth.py --hidden {args.hidden} --layers {args.layers} --vocab {args.vocab} "
            f"--repetitions {args.repetitions}`",
            "",
            " ".join((__doc__ or "").split("\n\n")[2].split()).split(" Writes ")[0],
            "",
            machine(),
            "",
            "![growth](judge_growth.svg)",
            "",
            f"Response length, {FIXED_CRITERIA} criteria:",
            "",
            growth_table("response tokens", [(n, f) for n, _, f in lengths]),
            "",
            f"Criteria, a response of {FIXED_LENGTH} tokens:",
            "",
            growth_table("criteria", [(k, f) for _, k, f in criteria]),
            "",
            f"Ranks: {RESPONSES} responses of {FIXED_LENGTH} tokens, {FIXED_CRITERIA} criteria each, on this machine's "
            f"{os.cpu_count()} cores over gloo, the slowest rank. Waiting for another rank counts as CPU time.",
            "",
            *lines,
            "",
            f"The largest rubric, {LARGEST} criteria, on a response of {args.longest} tokens "
            f"({CONVERSATION + args.longest + LARGEST * CRITERION} tokens in one "
            "row), verdicts and one backward:",
            "",
            *rest,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(hidden=128, layers=2, vocab=2048, repetitions=2).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="response tokens")
    parser.add_argument("--criteria", type=int, nargs="+", default=CRITERIA)
    parser.add_argument("--longest", type=int, default=4096, help="response tokens of the largest input")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)  # freed tensors are given back: the peak is of what lives
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(
        ["g2r_megatron.judge.stage", "transformers.models.qwen3"]
    )  # imported once, for all
    with tempfile.TemporaryDirectory() as directory:
        write_model(args, "True False rest water", directory)
        ranks = compare_ranks(args, directory, processes)
        here, there = processes.Pipe()
        processes.Process(target=one_rank, args=(args, directory, there), daemon=True).start()
        there.close()
        found = []
        while (message := here.recv()) is not None:
            found.append(message)
            print(message, flush=True)
    count = len(args.lengths) + len(args.criteria)
    points, long = found[:count], dict(found[count:])
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "judge_growth.md").write_text(report(args, points, long, ranks))
    lengths, criteria = points[: len(args.lengths)], points[len(args.lengths) :]
    svg = drawing([(n, f) for n, _, f in lengths], [(k, f) for _, k, f in criteria])
    (args.output / "judge_growth.svg").write_text(svg)
    for name, r in long.items():
        if not MARGIN[0] <= r["mib"] / r["formula"] <= MARGIN[1]:
            sys.exit(
                f"recompute {name}: {r['mib']:.0f} MiB measured, {r['formula']:.0f} by the formula: not within {MARGIN}"
            )


if __name__ == "__main__":
    main()
