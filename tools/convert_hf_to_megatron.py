"""A Hugging Face directory becomes a Megatron checkpoint, bit for bit and in bounded memory.

python tools/convert_hf_to_megatron.py --hf Qwen3-30B-A3B --output qwen3-30b-megatron
torchrun --nproc-per-node 4 tools/convert_hf_to_megatron.py --hf Qwen3-30B-A3B --output qwen3-30b-megatron
"""

import argparse
import os
import sys
from pathlib import Path

from g2r_megatron.cli import OneLineParser, exit_code


def main(argv: list[str]) -> None:
    """Parse the command line and convert."""
    parser = OneLineParser(
        "convert_hf_to_megatron.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--hf", required=True, metavar="DIR", help="Hugging Face directory (config.json, *.safetensors, tokenizer)"
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="DIR",
        help="checkpoint to make; must not exist; read on any layout",
    )
    arguments = parser.parse_args(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the work is the CPU's and the disk's, in any number of processes
    from g2r_megatron.parallel.cpu import import_megatron

    import_megatron()
    from g2r_megatron.convert.to_megatron import convert_to_megatron

    convert_to_megatron(arguments.hf, arguments.output)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
