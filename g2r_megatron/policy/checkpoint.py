"""Training checkpoints: Megatron-Core's torch_dist format, complete or absent, the last N kept.

A checkpoint is written as ``step_00000020.incomplete`` and renamed when every rank has finished and the files are on
disk, so a directory without the suffix is always whole. Nothing older is deleted before that.
"""

import os
import queue
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint.api import CheckpointException

from g2r_megatron.errors import UserError
from g2r_megatron.model.torch_dist import (
    checked_facts,
    copy_model_files,
    load_chunks,
    load_sharded,
    reason_of,
    sharded_metadata,
    sharded_weights,
    sync_directory,
    sync_to_disk,
    write_facts,
)
from g2r_megatron.parallel import cpu
from g2r_megatron.policy.trainer import PolicyTrainer, load_optimizer_state

NAME = re.compile(r"step_(\d{8})")


def complete_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of the complete checkpoints under ``directory``, oldest first."""
    if not directory.is_dir():
        return []
    found = [(int(m[1]), path) for path in directory.iterdir() if (m := NAME.fullmatch(path.name))]
    return sorted(found)


class Checkpointer:
    """Saves and restores one policy: weights, optimizer, schedule, RNG state of every rank, step.

    The step is also the data position: the order of queries is a function of seed and step.
    """

    def __init__(self, trainer: PolicyTrainer, directory: Path, keep_last: int):
        self.trainer, self.directory, self.keep_last = trainer, directory, keep_last

    def _sharded_state(self, is_loading: bool, with_rng: bool) -> dict:
        model = self.trainer.model
        weights = sharded_weights(model.chunks, model.groups)
        state = weights | {
            "optimizer": self.trainer.optimizer.sharded_state_dict(
                # of several chunks it takes all of them by name, of one its content
                weights.get("model", weights),
                is_loading=is_loading,
                metadata=sharded_metadata(model.groups),
            ),
            "scheduler": self.trainer.scheduler.state_dict(),
        }
        if with_rng:
            world, rank = dist.get_world_size(), dist.get_rank()
            rng = {
                "torch": torch.get_rng_state(),
                "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
            }
            state["rng"] = ShardedObject("rng", rng, (world,), (rank,), replica_id=0)
        return state

    def save(self, step: int) -> None:
        """Write the checkpoint of ``step`` (collective), then delete all but the newest ``keep_last``.

        Raises ``UserError`` when it cannot be written, say for want of space.
        """
        final = self.directory / f"step_{step:08d}"
        temporary = final.with_name(final.name + ".incomplete")
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        dist.barrier()
        _write_without_other_processes()
        try:
            dist_checkpointing.save(self._sharded_state(is_loading=False, with_rng=True), str(temporary))
        except CheckpointException as error:  # on every rank, but only rank 0 is told why
            reason = [reason_of(error) if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(reason, src=0)
            remedy = "make room; the checkpoints before it are intact, and the same command resumes"
            raise UserError(f"checkpoint {final}", f"cannot be written ({reason[0]})", remedy) from error
        dist.barrier()
        if dist.get_rank() == 0:
            place = {"world_size": dist.get_world_size(), "device": cpu.device().type}
            copy_model_files(self.trainer.model.hf, temporary)
            write_facts(temporary, {"step": step, **place, "fused_experts": self.trainer.model.hf.fused_experts})
            sync_to_disk(temporary)
            shutil.rmtree(final, ignore_errors=True)  # only ever the same step of an earlier, resumed attempt
            os.rename(temporary, final)
            sync_directory(self.directory)
            for _, path in complete_checkpoints(self.directory)[: -self.keep_last]:
                doomed = path.rename(path.with_name(path.name + ".incomplete"))  # half deleted is not whole either
                shutil.rmtree(doomed)
        dist.barrier()

    def load_latest(self) -> int:
        """Restore the newest complete checkpoint (collective); its step, or 0 when there is none."""
        if dist.get_rank() == 0:
            for path in self.directory.glob("*.incomplete"):
                shutil.rmtree(path)
        found = complete_checkpoints(self.directory)
        if not found:
            return 0
        step, path = found[-1]
        facts = checked_facts(path)
        # another world has other ranks, another device another generator; nothing random depends on it (sampling is keyed)
        with_rng = facts["world_size"] == dist.get_world_size() and facts.get("device") == cpu.device().type
        state = load_sharded(path, self._sharded_state(is_loading=True, with_rng=with_rng))
        chunks = self.trainer.model.chunks
        load_chunks(chunks, {name: state[name] for name in sharded_weights(chunks, self.trainer.model.groups)})
        load_optimizer_state(self.trainer.optimizer, state["optimizer"])
        self.trainer.scheduler.load_state_dict(state["scheduler"])
        if with_rng:
            torch.set_rng_state(state["rng"]["torch"])
            tensor_parallel.get_cuda_rng_tracker().set_states(state["rng"]["tracker"])
        return step


def _write_without_other_processes() -> None:
    """Keep Megatron-Core's save inside this process: what it starts for speed outlives a killed run.

    Its default queue has a manager process of its own, and each file is written by a forked process, which would still
    be writing while the next run resumes (and forking a process with CUDA and threads is a risk of its own).
    """
    filesystem_async._results_queue = queue.Queue()
    FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write_buckets)


def _write_buckets(transforms: list, use_msc: bool, rank: int, buckets: list, results: queue.Queue) -> None:
    """Same contract as ``write_preloaded_data_multiproc``: {bucket index: what was written} or an exception."""
    written: dict | Exception = {}
    for i, bucket in enumerate(buckets):
        outcome, open_buckets = queue.Queue(), queue.Queue()
        open_buckets.put(i)
        FileSystemWriterAsync.write_preloaded_data(transforms, i, bucket, outcome, open_buckets, use_fsync=True)
        _, entries = outcome.get()
        if isinstance(entries, Exception):
            written = entries
            break
        written[i] = entries
    results.put(written)
