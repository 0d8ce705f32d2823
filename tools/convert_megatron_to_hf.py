"""A Megatron checkpoint (of a training run, or converted) becomes a Hugging Face directory that transformers loads.

python tools/convert_megatron_to_hf.py --checkpoint run/checkpoints/step_00000200 --output my-model
torchrun --nproc-per-node 4 tools/convert_megatron_to_hf.py --checkpoint qwen3-30b-megatron --output my-model
"""

import argparse
import os
import sys
from pathlib import Path

from g2r_megatron.cli import OneLineParser, exit_code


def main(argv: list[str]) -> None:
    """Parse the command line and convert."""
    parser = OneLineParser(
        "convert_megatron_to_hf.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="DIR",
        help="Megatron checkpoint (torch_dist), saved on any layout",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="directory to make; must not exist")
    parser.add_argument(
        "--hf", type=Path, metavar="DIR", help="config and tokenizer, for a checkpoint that has no hf/ of its own"
    )
    arguments = parser.parse_args(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the work is the CPU's and the disk's, in any number of processes
    from g2r_megatron.parallel.cpu import import_megatron

    import_megatron()
    from g2r_megatron.convert.to_hf import convert_to_hf

    convert_to_hf(arguments.checkpoint, arguments.output, arguments.hf)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
