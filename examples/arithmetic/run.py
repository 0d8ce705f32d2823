"""Runs the example: makes the model, trains it with and without credit from the judge, then the table and report.html.

    python examples/arithmetic/run.py                         # some minutes on two cores
    python examples/arithmetic/run.py --seeds 1 2 3 --output runs/arithmetic-seeds

A run that was interrupted is resumed by running the same command again. Other options go to g2r train.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = "examples/arithmetic"
PRESETS = {
    "grpo": "every token gets the verifier's verdict",
    "robust": "the verdict goes to the lines that the judge's own verdict depends on, where both agree",
}


def run(arguments: list[str]) -> None:
    """One command with its output passed through; ends this program with its exit code if it fails."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env={"OMP_NUM_THREADS": "1", **os.environ})
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "arithmetic", help="directory of model and runs")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    args, options = parser.parse_known_args()
    output = args.output.resolve()
    model = output / "model"
    if not (model / "model.safetensors").is_file():
        run([f"{HERE}/make_model.py", "--output", str(model)])
    directories = []
    for seed in args.seeds:
        for preset in args.presets:
            print(f"\npreset {preset}, seed {seed}: {PRESETS[preset]}", flush=True)
            directories.append(str(output / f"{preset}-{seed}"))
            own = ["--policy.model", str(model), "--grpo.preset", preset, "--seed", str(seed)]
            own += ["--output_dir", directories[-1]]
            run(["-m", "g2r_megatron.cli", "train", "--config", f"{HERE}/config.yaml", *own, *options])
    run(["-m", "g2r_megatron.cli", "report", *directories, "--output", str(output / "report.html")])


if __name__ == "__main__":
    main()
