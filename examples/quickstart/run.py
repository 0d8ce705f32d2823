"""Runs the quickstart: the same start trained with each preset, then the table and report.html.

    python examples/quickstart/run.py                         # what `make quickstart` runs
    python examples/quickstart/run.py --seeds 1 2 3 --output runs/three-seeds
    python examples/quickstart/run.py --engine vllm           # after make vllm

A run that was interrupted is resumed by running the same command again.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "examples/quickstart/config.yaml"
PRESETS = {
    "grpo": "every token gets the response's score",
    "paper": "token rewards from the judge's gradient, return-to-go (arXiv 2602.01791)",
    "robust": "each criterion's score goes to the sentences that the judge's verdict depends on",
}


def g2r(arguments: list[str], ranks: int = 1) -> None:
    """Runs one g2r command with its output passed through; ends this program with its exit code if it fails."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "g2r_megatron.cli", *arguments]
    # matrices this small gain little from threads; a second core is used by a second rank
    process = subprocess.Popen(command, cwd=ROOT, env={"OMP_NUM_THREADS": "1", **os.environ})
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # the terminal interrupts the ranks too; no rank may outlive this program
        raise
    if code:
        sys.exit(code)


def default_ranks() -> int:
    """Two data-parallel ranks nearly halve a step on two cores; one where there is a GPU, which ranks cannot share."""
    return 1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1)


def parse() -> tuple[argparse.Namespace, list[str]]:
    """This script's options, and the rest, which is for g2r train (e.g. --steps 10)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "quickstart", help="directory of the runs")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument(
        "--engine", choices=("megatron", "vllm"), default="megatron", help="of the rollouts (%(default)s)"
    )
    parser.add_argument("--ranks", type=int, default=default_ranks(), help="data-parallel ranks (%(default)s here)")
    return parser.parse_known_args()


def main() -> None:
    args, options = parse()
    output, start = args.output.resolve(), time.time()
    runs = [(preset, seed) for seed in args.seeds for preset in args.presets]
    directories = [str(output / f"{preset}-{seed}") for preset, seed in runs]
    print(f"A tiny policy learns to write clinic notes; its own frozen copy judges them. {len(runs)} runs.", flush=True)
    for number, ((preset, seed), directory) in enumerate(zip(runs, directories), start=1):
        print(f"\n[{number}/{len(runs)}] preset {preset}, seed {seed}: {PRESETS[preset]}", flush=True)
        own = ["--rollout.engine", args.engine, "--grpo.preset", preset, "--seed", str(seed), "--output_dir", directory]
        g2r(["train", "--config", CONFIG, *own, *options], args.ranks)
    print(flush=True)
    g2r(["report", *directories, "--output", str(output / "report.html")])
    print(f"{(time.time() - start) / 60:.1f} minutes in all", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on from the last checkpoint")
