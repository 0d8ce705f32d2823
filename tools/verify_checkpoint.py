"""Compare two checkpoints, each a Hugging Face directory or a Megatron checkpoint: every tensor, the config, logits.

python tools/verify_checkpoint.py Qwen3-8B qwen3-8b-megatron --logits

Exit code: 0 equal, 1 different, 2 when one of them cannot be read.
"""

import argparse
import os
import sys

from g2r_megatron.cli import OneLineParser, exit_code


def main(argv: list[str]) -> int:
    """Parse the command line, compare and print what differs."""
    parser = OneLineParser(
        "verify_checkpoint.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", metavar="A", help="Hugging Face directory or Megatron checkpoint")
    parser.add_argument("b", metavar="B", help="Hugging Face directory or Megatron checkpoint")
    parser.add_argument("--hashes", action="store_true", help="print the sha256 of every tensor, not only of the whole")
    parser.add_argument("--logits", action="store_true", help="run both on --text in fp32 (one process) and compare")
    parser.add_argument("--text", help="what --logits runs on (default: a paragraph in several languages)")
    arguments = parser.parse_args(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the work is the CPU's and the disk's, in any number of processes
    from g2r_megatron.parallel.cpu import import_megatron

    import_megatron()
    from g2r_megatron.convert.comparison import verify

    return verify((arguments.a, arguments.b), arguments.hashes, arguments.logits, arguments.text)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
