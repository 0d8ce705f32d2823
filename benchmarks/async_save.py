"""What a checkpoint costs the training: saved while it waits, saved in the background, and read back with its check sums.

    python benchmarks/async_save.py [--hidden 512 --layers 8 --saves 3 --directory DIR --output FILE]
    torchrun --nproc-per-node 2 benchmarks/async_save.py ...

A random Qwen3 policy with Adam in fp32 makes training steps on made-up responses of 64 tokens; in one process, by turns,
it saves and waits, and saves in the background while steps go on. "Blocked" is the time of ``begin`` and of the ``finish``
that finds the files written: what training waits for. Steps are timed with and without a save beside them. A plain write
of as many bytes with fsync is the disk's own time. Everything is deleted afterwards.
"""

import argparse
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median

import torch
import torch.distributed as dist
from transformers import Qwen3Config, Qwen3ForCausalLM

from g2r_megatron.cli import exit_code
from g2r_megatron.config.options import Layout, OptimizerConfig, PolicyConfig, Precision, TrainConfig
from g2r_megatron.device import on_cpu
from g2r_megatron.model.build import build_model
from g2r_megatron.model.hf import open_hf_model
from g2r_megatron.model.torch_dist import check_contents, checked_facts
from g2r_megatron.parallel.groups import build_groups, initialize
from g2r_megatron.policy.checkpoint import Checkpointer
from g2r_megatron.policy.log_probs import TokenSequence
from g2r_megatron.policy.trainer import PolicyTrainer

VOCABULARY = 8192


def make_model(directory: Path, hidden: int, layers: int) -> None:
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, head_dim=64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(1)
    Qwen3ForCausalLM(config).save_pretrained(directory)


def make_trainer(model: Path) -> PolicyTrainer:
    policy = build_model("policy", open_hf_model(str(model), "model"), build_groups("policy", Layout()), Precision())
    config = TrainConfig(policy=PolicyConfig(micro_batch_tokens=256), optimizer=OptimizerConfig(lr=1e-5), steps=10**6)
    return PolicyTrainer(policy, config)


class Steps:
    """Training steps on four responses, timed."""

    def __init__(self, trainer: PolicyTrainer):
        self.trainer = trainer
        ids = torch.arange(64).tolist()
        self.sequences = [TokenSequence(ids[:16], ids) for _ in range(4)]
        self.advantages = [torch.ones(64)] * 4

    def one(self) -> float:
        """Seconds of a step."""
        start = time.perf_counter()
        old = self.trainer.log_probs(self.sequences, [[0, 1, 2, 3]])
        self.trainer.update(self.sequences, [[0, 1, 2, 3]], self.advantages, old, None)
        torch.cuda.synchronize()
        return time.perf_counter() - start


def plain_write(directory: Path, size: int) -> float:
    """Seconds to write ``size`` bytes to one file, with fsync."""
    block, file = os.urandom(2**24), directory / "plain"
    start = time.perf_counter()
    with file.open("wb") as stream:
        for _ in range(size // len(block)):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    file.unlink()
    return seconds


def measure(directory: Path, saves: int) -> dict[str, list[float]]:
    """Seconds, by what was timed."""
    trainer = make_trainer(directory / "model")
    steps, checkpointer = Steps(trainer), Checkpointer(trainer, directory / "checkpoints", keep_last=1)
    found: dict[str, list[float]] = {name: [] for name in ("waited", "blocked", "written", "alone", "beside")}
    steps.one()
    for n in range(saves):
        found["alone"] += [steps.one() for _ in range(3)]
        start = time.perf_counter()
        checkpointer.save(2 * n + 1)
        found["waited"].append(time.perf_counter() - start)
        start = time.perf_counter()
        checkpointer.begin(2 * n + 2)
        blocked, done, beside = time.perf_counter() - start, None, []
        while done is None:
            beside.append(steps.one())
            start = time.perf_counter()
            done = checkpointer.finish(wait=False)
            blocked += time.perf_counter() - start
        found["beside"] += beside[:-1] or beside  # in the last one the writing has ended
        found["blocked"].append(blocked)
        found["written"].append(checkpointer.background_seconds[-1])
    path = directory / "checkpoints" / f"step_{2 * saves:08d}"
    start = time.perf_counter()
    check_contents(path, checked_facts(path), dist.get_rank(), dist.get_world_size())
    dist.barrier()
    found["check sums"] = [time.perf_counter() - start]
    start = time.perf_counter()
    checkpointer.load_latest()
    found["load"] = [time.perf_counter() - start]
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    found["plain write"] = [plain_write(directory, size) for _ in range(3)] if dist.get_rank() == 0 else [0.0]
    found["bytes"] = [float(size)]
    return found


def table(found: dict[str, list[float]]) -> str:
    """The figures as a page of markdown."""
    rows = [
        ("plain write of as many bytes, fsync", found["plain write"]),
        ("save, training waits", found["waited"]),
        ("save in the background: training is blocked", found["blocked"]),
        ("save in the background: written after", found["written"]),
        ("training step, no save beside it", found["alone"]),
        ("training step, a save beside it", found["beside"]),
        ("reading all files for their check sums", found["check sums"]),
        ("load_latest, check sums included", found["load"]),
    ]
    where = f"{os.cpu_count()} cores, {platform.platform(terse=True)}, torch {torch.__version__}"
    where = where if on_cpu() else f"{torch.cuda.get_device_name()}, {where}"
    lines = [
        f"`{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`, {dist.get_world_size()} ranks, {where}; "
        f"a checkpoint of {found['bytes'][0] / 1e9:.2f} GB",
        "",
        "| | mean s | median s | max s | times |",
        "|---|---|---|---|---|",
        *(f"| {name} | {mean(v):.2f} | {median(v):.2f} | {max(v):.2f} | {len(v)} |" for name, v in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="hidden size, a multiple of 64 (%(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="%(default)s")
    parser.add_argument("--saves", type=int, default=3, help="of each kind (%(default)s)")
    parser.add_argument("--directory", type=Path, help="where to write (default: the system's temporary directory)")
    parser.add_argument("--output", type=Path, help="file to append the table to")
    args = parser.parse_args()
    initialize(seed=1)
    chosen = [tempfile.mkdtemp(dir=args.directory) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(chosen, src=0)
    directory = Path(chosen[0])
    try:
        if dist.get_rank() == 0:
            make_model(directory / "model", args.hidden, args.layers)
        dist.barrier()
        found = measure(directory, args.saves)
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(directory)
    if dist.get_rank() == 0:
        print(table(found))
        if args.output:
            with args.output.open("a") as file:
                file.write(table(found) + "\n")


if __name__ == "__main__":
    sys.exit(exit_code(main))
