"""Runs the quickstart: the same start trained with each preset, then the table and report.html.

    python examples/quickstart/run.py                         # from the repository root; what `make quickstart` runs
    python examples/quickstart/run.py --seeds 1 2 3 --output runs/three-seeds

A run that was interrupted is resumed by running the same command again.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "examples/quickstart/config.yaml"
PRESETS = ["grpo", "paper", "robust"]


def g2r(arguments: list[str], ranks: int = 1) -> None:
    """Runs one g2r command with its output passed through; ends this program with its exit code if it fails."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "g2r_megatron.cli", *arguments]
    # matrices this small gain nothing from threads; a second core is used by a second rank
    code = subprocess.run(command, cwd=ROOT, env={"OMP_NUM_THREADS": "1", **os.environ}).returncode
    if code:
        sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "quickstart", help="directory of the runs")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--ranks", type=int, default=1, help="data-parallel ranks of each run")
    args, options = parser.parse_known_args()  # the rest is for g2r train, e.g. --steps 10
    output, start = args.output.resolve(), time.time()
    runs = [(preset, seed) for seed in args.seeds for preset in args.presets]
    directories = [str(output / f"{preset}-{seed}") for preset, seed in runs]
    for number, ((preset, seed), directory) in enumerate(zip(runs, directories), start=1):
        print(f"\nrun {number} of {len(runs)}: preset {preset}, seed {seed}", flush=True)
        own = ["--grpo.preset", preset, "--seed", str(seed), "--output_dir", directory]
        g2r(["train", "--config", CONFIG, *own, *options], args.ranks)
    g2r(["report", *directories, "--output", str(output / "report.html")])
    print(f"{(time.time() - start) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
