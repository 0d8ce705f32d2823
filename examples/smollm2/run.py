"""A real pretrained model, end to end on a CPU: make, convert, verify, judge, probe, tune a judge, train with two presets, report.

    python examples/smollm2/run.py [--output DIR] [--steps 2] [options of g2r train]      # about 25 minutes on 2 cores

The same command goes on after an interruption: what is made, converted, judged, probed, tuned or trained already is not done again.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from make_judge import make_judge
from make_model import make

ROOT = Path(__file__).resolve().parents[2]
HERE = Path("examples/smollm2")
PRESETS = ("grpo", "robust")


def run(*command: str) -> None:
    """Runs Python with ``command`` from the repository's root; ends this program with its exit code if it fails."""
    code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if code:
        sys.exit(code)


def g2r(*arguments: str, ranks: int = 1) -> None:
    """Runs one g2r command."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    if ranks > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    run(*launcher, "-m", "g2r_megatron.cli", *arguments)


def convert_and_verify(model: Path, output: Path) -> None:
    """A Megatron checkpoint of ``model``, compared with it tensor by tensor and by logits."""
    checkpoint = output / "megatron"
    if not checkpoint.exists():
        run("tools/convert_hf_to_megatron.py", "--hf", str(model), "--output", str(checkpoint))
    run("tools/verify_checkpoint.py", str(model), str(checkpoint), "--logits")


def judge(model: Path, output: Path) -> None:
    """Verdicts, attributions and token rewards of four answers to questions."""
    judged = output / "judged.jsonl"
    if not judged.exists():
        rows = str(HERE / "data" / "rows.jsonl")
        g2r("judge", "--judge.model", str(model), "--input", rows, "--output", str(judged), "--preset", "robust")


def probe(model: Path, output: Path) -> None:
    """Whether its credit is true, on a few of these answers: gates against the attribution of older presets."""
    probed = output / "probe"
    if not (probed / "probe.json").exists():
        rows = str(HERE / "data" / "rows.jsonl")
        options = ["--sample", "6", "--attributions", '["gate_branch", "contracted"]']
        g2r("probe", "--judge.model", str(model), "--input", rows, "--output", str(probed), *options)


def train(model: Path, tuned: Path, output: Path, options: list[str], ranks: int) -> None:
    """Both presets from the same start with the judge ``tuned``, then the report."""
    models = ["--policy.model", str(model), "--judge.model", str(tuned)]
    for preset in PRESETS:
        print(f"\npreset {preset}", flush=True)
        own = [*models, "--grpo.preset", preset, "--output_dir", str(output / preset)]
        g2r("train", "--config", str(HERE / "config.yaml"), *own, *options, ranks=ranks)
    g2r("report", *(str(output / preset) for preset in PRESETS), "--output", str(output / "report.html"))
    print("These are single runs of few steps. Several seeds: benchmarks/results/credit_study_smollm2.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "smollm2", help="directory of all results")
    parser.add_argument("--ranks", type=int, default=min(2, os.cpu_count() or 1), help="of training (%(default)s here)")
    args, options = parser.parse_known_args()
    model, output = make(), args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    convert_and_verify(model, output)
    judge(model, output)
    probe(model, output)
    train(model, make_judge(model), output, options, args.ranks)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on")
