"""Training checkpoints: Megatron-Core's torch_dist format, complete or absent, the last N kept.

A checkpoint is written as ``step_00000020.incomplete`` and renamed when every rank has finished and the files are on
disk, so a directory without the suffix is always whole. Older checkpoints are deleted only after that. Check sums find
a checkpoint that was damaged later: it is named and not changed, and the one before it is used.
"""

import io
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.base import StrategyAction, register_default_strategy
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch.distributed.checkpoint.api import CheckpointException

from g2r_megatron.device import local_device
from g2r_megatron.errors import UserError, unwritable
from g2r_megatron.model.torch_dist import (
    check_contents,
    checked_facts,
    copy_model_files,
    crc32,
    load_chunks,
    load_sharded,
    reason_of,
    sharded_metadata,
    sharded_weights,
    sync_directory,
    sync_to_disk,
    write_facts,
)
from g2r_megatron.parallel.agreement import raised_by_all, union
from g2r_megatron.policy.background_save import ThreadQueue, storages, with_check_sums, write_in_this_process
from g2r_megatron.policy.optimizer_shards import sharded_optimizer_state
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
        self._kept: frozenset[int] = frozenset()  # steps whose checkpoints are not deleted
        self.damaged: list[tuple[str, str]] = []  # what ``load_latest`` could not use, and why
        self.background_seconds: list[float] = []  # this rank's writing, of the saves that are done
        self._writing: int | None = None  # the step whose save has begun
        self._queue = ThreadQueue()

    def _sharded_state(self, is_loading: bool, with_rng: bool) -> dict:
        model = self.trainer.model
        weights = sharded_weights(model.chunks, model.groups)
        state = weights | {
            "optimizer": sharded_optimizer_state(
                self.trainer.optimizer,
                # it takes several chunks by name, but of a single chunk its content
                weights.get("model", weights),
                is_loading,
                sharded_metadata(model.groups),
            ),
            "scheduler": self.trainer.scheduler.state_dict(),
            "bad_in_a_row": self.trainer.bad_in_a_row,
        }
        if with_rng:
            world, rank = dist.get_world_size(), dist.get_rank()
            rng = {
                "torch": torch.get_rng_state(),
                "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
            }
            state["rng"] = ShardedObject("rng", rng, (world,), (rank,), replica_id=0)
        return state

    # ---- saving: every method is collective ------------------------------------------------------------------------

    def save(self, step: int) -> None:
        """Write the checkpoint of ``step``, then delete all but the newest ``keep_last``.

        Raises ``UserError`` when it cannot be written, say for want of space.
        """
        self.begin(step, in_background=False)

    def begin(self, step: int, in_background: bool = True, kept: Collection[int] = ()) -> int | None:
        """Copy the state of ``step`` and begin to write it; ``finish`` completes the checkpoint.

        Without ``in_background`` the checkpoint is complete when this returns. ``kept``: steps whose checkpoints are not
        deleted then, beside the last ones. Waits for an earlier save, and returns
        the step of that one if it was not finished.
        """
        earlier = self.finish(wait=True)
        self._kept = frozenset(kept)
        temporary = self._path(step, ".incomplete")
        with raised_by_all(), self._refusals(step):
            if dist.get_rank() == 0:
                if temporary.exists():
                    shutil.rmtree(temporary)
                temporary.mkdir(parents=True)
        write_in_this_process()
        register_default_strategy(StrategyAction.SAVE_COMMON, "torch", 1, _CommonState("torch", 1))
        with self._refusals(step):
            state = self._sharded_state(is_loading=False, with_rng=True)
            self._queue.live = storages(state)
            # weights are the same on all data-parallel ranks: each writes its part of them
            strategy = FullyParallelSaveStrategyWrapper(
                get_default_save_sharded_strategy(), self.trainer.model.groups.pgs.dp_cp
            )
            request = dist_checkpointing.save(state, str(temporary), strategy, async_sharded_save=True)
            sums: dict[str, int] = {}
            request = with_check_sums(request, sums, self.background_seconds)
            request.add_finalize_fn(lambda: self._complete(step, sums))
            if in_background:
                self._queue.schedule_async_request(request)
                self._writing = step
            else:
                request.execute_sync()
        return earlier

    def finish(self, wait: bool) -> int | None:
        """If what ``begin`` started has been written by all ranks, make it a checkpoint; its step, else None.

        ``wait`` until it is. Raises ``UserError`` as ``save`` does.
        """
        step, self._writing = self._writing, None
        if step is None:
            return None
        with self._refusals(step):
            done = self._queue.maybe_finalize_async_calls(blocking=wait)
        if not done:
            self._writing = step
            return None
        return step

    def _complete(self, step: int, sums: dict[str, int]) -> None:
        """All files are written: add what is ours, give the directory its name, delete what is too old."""
        known = union(sums)
        temporary, final = self._path(step, ".incomplete"), self._path(step)
        with raised_by_all(), self._refusals(step):
            if dist.get_rank() == 0:
                copy_model_files(self.trainer.model.hf, temporary)
                files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
                names = [path.relative_to(temporary).as_posix() for path in files]
                known |= {name: crc32(path) for name, path in zip(names, files, strict=True) if name not in known}
                place = {"world_size": dist.get_world_size(), "device": local_device().type}
                write_facts(
                    temporary, {"step": step, **place, "fused_experts": self.trainer.model.hf.fused_experts}, known
                )
                sync_to_disk(temporary)
                self._set_aside(final)
                os.rename(temporary, final)
                sync_directory(self.directory)
                done = [(other, path) for other, path in complete_checkpoints(self.directory) if other <= step]
                older = [path for other, path in done if other not in self._kept]
                for path in older[: -self.keep_last]:
                    doomed = path.rename(
                        path.with_name(path.name + ".incomplete")
                    )  # a half-deleted checkpoint must not look whole
                    shutil.rmtree(doomed)

    def _set_aside(self, path: Path) -> None:
        """Rename an older checkpoint of the same step, which could not be loaded. It is kept."""
        if path.exists():
            names = [path.with_name(f"{path.name}.damaged{suffix}") for suffix in ("", *map(str, range(2, 1000)))]
            path.rename(next(name for name in names if not name.exists()))

    def _path(self, step: int, suffix: str = "") -> Path:
        return self.directory / f"step_{step:08d}{suffix}"

    @contextmanager
    def _refusals(self, step: int) -> Iterator[None]:
        """An error of the disk in the block becomes a ``UserError`` that names the checkpoint and the cause.

        All ranks get an error in the ranks' files. Rank 0 alone gets an error in what only it writes at the end
        (.metadata).
        """
        try:
            yield
        except CheckpointException as error:  # on every rank, but only rank 0 is told why
            reason = [reason_of(error) if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(reason, src=0)
            raise self._unwritable(step, reason[0]) from error
        except OSError as error:
            raise self._unwritable(step, reason_of(error)) from error

    def _unwritable(self, step: int, reason: str) -> UserError:
        remedy = "make room; the checkpoints before it are intact, and the same command resumes"
        return UserError(f"checkpoint {self._path(step)}", f"cannot be written ({reason})", remedy)

    # ---- loading ---------------------------------------------------------------------------------------------------

    def load_latest(self) -> int:
        """Restore the newest checkpoint that is whole (collective); its step, or 0 when there is none at all.

        Damaged ones are left as they are and named in ``damaged``. Raises ``UserError`` when all are.
        """
        with raised_by_all():
            if dist.get_rank() == 0:
                self._remove_leftovers()
        found = [complete_checkpoints(self.directory)]
        dist.broadcast_object_list(found, src=0)
        for step, path in reversed(found[0]):
            problem = self._problem_of(path)
            if problem is None:
                self._load(path)
                return step
            self.damaged.append(problem)
        if self.damaged:
            where, what = self.damaged[0]
            raise UserError(where, f"{what}, and no other one is whole", "restore one, or choose another output_dir")
        return 0

    def load(self, step: int) -> None:
        """Restore the checkpoint of ``step`` (collective). Raises ``UserError`` when it is damaged."""
        problem = self._problem_of(self._path(step))
        if problem is not None:
            raise UserError(*problem, "restore it, or take another checkpoint")
        self._load(self._path(step))

    def _remove_leftovers(self) -> None:
        for path in self.directory.glob("*.incomplete"):
            try:
                shutil.rmtree(path)
            except OSError as error:
                reason = f"cannot be removed ({error.strerror})"
                raise UserError(str(path), reason, "it is left from an interrupted save: remove it") from error

    def _problem_of(self, path: Path) -> tuple[str, str] | None:
        """Why the checkpoint cannot be used, or None; every rank reads its share of the files (collective)."""
        try:
            check_contents(path, checked_facts(path), dist.get_rank(), dist.get_world_size())
            mine = None
        except UserError as error:
            mine = (error.where, error.found)
        problems: list[tuple[str, str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, mine)
        return next(filter(None, problems), None)

    def _load(self, path: Path) -> None:
        facts = checked_facts(path)
        # another world has other ranks, another device another generator; nothing random depends on it (sampling is keyed)
        with_rng = facts["world_size"] == dist.get_world_size() and facts.get("device") == local_device().type
        state = load_sharded(path, self._sharded_state(is_loading=True, with_rng=with_rng))
        chunks = self.trainer.model.chunks
        weights = sharded_weights(chunks, self.trainer.model.groups)
        load_chunks(chunks, {name: state[name] for name in weights})
        load_optimizer_state(self.trainer.optimizer, state["optimizer"], weights)
        self.trainer.scheduler.load_state_dict(state["scheduler"])
        self.trainer.bad_in_a_row = state.get("bad_in_a_row", 0)  # older checkpoints have none
        if with_rng:
            torch.set_rng_state(state["rng"]["torch"])
            tensor_parallel.get_cuda_rng_tracker().set_states(state["rng"]["tracker"])


class _CommonState(TorchCommonSaveStrategy):
    """Rank 0 writes what is the same on all ranks; if that fails, all ranks raise."""

    def save_common(self, common_state_dict: dict, checkpoint_dir: str | Path) -> None:
        file = Path(checkpoint_dir) / COMMON_STATE_FNAME
        with raised_by_all():
            if dist.get_rank() == 0:
                content = io.BytesIO()
                torch.save(common_state_dict, content)
                try:
                    file.write_bytes(content.getvalue())
                except OSError as error:
                    raise unwritable(file, error) from error
