"""Speed and memory of the checkpoint converters, beside ``cp`` of the same files on the same disk in the same run.

    python benchmarks/convert.py [--gigabytes 16 --processes 1 2 --directory DIR --output FILE]

The checkpoint has the shapes of Qwen3-30B-A3B (hidden 2048, 128 experts of 768, 32 heads and 4 key-value heads of 128,
vocabulary 151936, separate experts) with as many layers as fit into ``--gigabytes``, random bf16 numbers, shards of 4 GB.
Every timed step is a process of its own, with its start (imports, several seconds) in its time, and reads files that
have been dropped from the page cache; ``cp`` is followed by ``sync``, and the converters sync what they write. Peak RSS is
that of the largest single process. Everything is deleted afterwards.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from g2r_megatron.cli import exit_code

TOOLS = Path(__file__).parent.parent / "tools"
SHARD_BYTES = 4 * 10**9
POOL_NUMBERS = 2**26  # random numbers that the weights are cut from, each tensor at another place
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "dtype": "bfloat16",
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
SMALL = {  # the same shapes in a few hundred kB
    "hidden_size": 64,
    "head_dim": 16,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
LAYER_BYTES = 2 * (128 * 3 * 768 * 2048 + (32 + 4 + 4) * 128 * 2048 + 32 * 128 * 2048)
VOCABULARY_BYTES = 2 * 2 * 151936 * 2048


def make_checkpoint(directory: Path, gigabytes: float, small: bool) -> None:
    """Write the Hugging Face directory, a block of rows at a time; ``small``: two layers of ``SMALL`` sizes."""
    import torch

    from g2r_megatron.convert.tensor_table import row_blocks
    from g2r_megatron.model.hf import open_hf_model
    from g2r_megatron.model.safetensors_files import SafetensorsWriter
    from g2r_megatron.model.weights import hf_shapes

    directory.mkdir()
    layers = 2 if small else max(1, round((gigabytes * 1e9 - VOCABULARY_BYTES) / LAYER_BYTES))
    config = CONFIG | (SMALL if small else {}) | {"num_hidden_layers": layers}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    shapes = hf_shapes(open_hf_model(str(directory), "--directory"))
    writer = SafetensorsWriter(directory, {n: (torch.bfloat16, shape) for n, shape in shapes.items()}, SHARD_BYTES)
    generator = torch.Generator().manual_seed(1)
    pool = (0.02 * torch.randn(POOL_NUMBERS // 2**8 if small else POOL_NUMBERS, generator=generator)).bfloat16()
    for name, shape in shapes.items():
        for block in row_blocks([(shape, torch.bfloat16)]):
            count = block.nbytes // 2
            start = int(torch.randint(len(pool) - count, (), generator=generator))
            writer.write(name, pool[start : start + count].view(block.stop - block.start, *shape[1:]), block.start)
    writer.finish()


def evict(directory: Path) -> None:
    """Write the files out and drop them from the page cache, so that the next reader reads the disk."""
    for file in directory.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def size_of(directory: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def timed(command: list[str], sources: list[Path], settle: bool) -> tuple[float, float]:
    """(seconds, peak RSS in GB of the largest process) of a command that reads ``sources`` from the disk.

    ``settle``: wait before until nothing on the machine is left to be written.
    """
    for source in sources:
        evict(source)
    if settle:
        os.sync()
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)  # with what its own children used, as far as it has waited for them
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss / 1e6


def tool(name: str, processes: int, *arguments: object) -> list[str]:
    """The command line of a tool in one process, or under torchrun."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return [*launcher, str(TOOLS / name), *map(str, arguments)]


def measure(work: Path, processes: list[int], settle: bool) -> list[tuple[str, float, float, float]]:
    """(step, GB of the weights, seconds, peak RSS in GB) of every step."""
    source, copy, megatron, back = (work / name for name in ("source", "copy", "megatron", "back"))
    rows = []

    def step(name: str, nbytes: int, command: list[str], *sources: Path) -> None:
        seconds, peak = timed(command, list(sources), settle)
        rows.append((name, nbytes / 1e9, seconds, peak))
        print(f"{name}: {seconds:.1f} s, {nbytes / 1e9 / seconds:.2f} GB/s, peak RSS {peak:.2f} GB", flush=True)

    nbytes = size_of(source)
    step("cp -r, sync", nbytes, ["sh", "-c", f"cp -r '{source}' '{copy}' && {'sync' if settle else 'true'}"], source)
    shutil.rmtree(copy)
    for n in processes:
        label = f"{n} process{'es' if n > 1 else ''}"
        to_megatron = tool("convert_hf_to_megatron.py", n, "--hf", source, "--output", megatron)
        step(f"HF to Megatron, {label}", nbytes, to_megatron, source)
        to_hf = tool("convert_megatron_to_hf.py", n, "--checkpoint", megatron, "--output", back)
        step(f"Megatron to HF, {label}", nbytes, to_hf, megatron)
        shutil.rmtree(megatron)
        step(f"verify (reads both), {label}", 2 * nbytes, tool("verify_checkpoint.py", n, source, back), source, back)
        shutil.rmtree(back)
    return rows


def table(rows: list[tuple[str, float, float, float]]) -> str:
    """Markdown; the first row is what the others are compared with."""
    base = rows[0][1] / rows[0][2]
    lines = ["| step | seconds | GB/s | of cp's speed | peak RSS of a process |", "|---|---|---|---|---|"]
    for name, gigabytes, seconds, peak in rows:
        rate = gigabytes / seconds
        lines.append(f"| {name} | {seconds:.1f} | {rate:.2f} | {rate / base:.2f} | {peak:.2f} GB |")
    return "\n".join(lines)


def machine(work: Path) -> str:
    """What the figures were taken on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    free = shutil.disk_usage(work).free / 1e9
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformers"))
    cuda = "" if importlib.util.find_spec("transformer_engine") is None else ", Transformer Engine"
    return (
        f"{os.cpu_count()} CPU cores ({platform.machine()}), {memory:.0f} GB RAM, a virtual machine's disk of unknown type "
        f"({free:.0f} GB free), Python {platform.python_version()}, {versions}{cuda}"
    )


def main() -> None:
    """Make the checkpoint, time every step, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.5, help="of weights; one layer is 1.25 (%(default)s)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="(%(default)s)")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--output", type=Path, help="markdown file for the table")
    parser.add_argument("--small", action="store_true", help="a tiny checkpoint: whether it works, not how fast")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)  # the step that needs torch, in its own process
    args = parser.parse_args()
    if args.make:
        sys.exit(exit_code(lambda: make_checkpoint(args.make, args.gigabytes, args.small)))
    work = Path(tempfile.mkdtemp(prefix="g2r-convert-", dir=args.directory))
    try:
        description = machine(work)
        make = [sys.executable, __file__, "--make", str(work / "source"), "--gigabytes", str(args.gigabytes)]
        make += ["--small"] if args.small else []
        subprocess.run(make, check=True)
        size = size_of(work / "source") / 1e9
        rows = measure(work, args.processes, settle=not args.small)
    finally:
        shutil.rmtree(work)
    shapes = "shapes of SMALL" if args.small else "Qwen3-30B-A3B shapes"
    intro = f"{size:.2f} GB of {shapes} in bf16, shards of 4 GB, files not in the page cache. {description}."
    options = f"--gigabytes {args.gigabytes:g} --processes {' '.join(map(str, args.processes))}"
    text = f"# Converting checkpoints\n\n`python benchmarks/convert.py {options}`\n\n{intro}\n\n{table(rows)}\n"
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
