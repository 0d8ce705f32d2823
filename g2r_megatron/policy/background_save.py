"""Megatron-Core's asynchronous save, with a thread instead of a forked process.

A forked process continues after the run is killed, and would still write while the next run resumes. It also copies
gloo's and CUDA's threads in any state. Megatron-Core's spawned process needs CUDA. A thread ends with its process. Most
of its work releases Python's lock: writing, fsync, check sums.
"""

import queue
import threading
import time
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCaller, AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from g2r_megatron.model.torch_dist import crc32


class ThreadCaller(AsyncCaller):
    """Runs one request's writes in a thread; the queue asks whether those of all ranks are done."""

    def __init__(self, live: set[int]):
        self._live = live
        self._thread: threading.Thread | None = None

    def schedule_async_call(self, async_req: AsyncRequest) -> None:
        if async_req.async_fn is None:  # nothing to write on this rank
            return
        arguments = list(async_req.async_fn_args)
        arguments[1] = snapshot(async_req.preload_fn(), self._live)
        self._thread = threading.Thread(target=async_req.async_fn, args=arguments, kwargs=async_req.async_fn_kwargs)
        self._thread.daemon = True  # a run that fails does not wait for it
        self._thread.start()

    def is_current_async_call_done(self, blocking: bool = False, no_dist: bool = False) -> bool:
        if blocking:
            self.close()
        is_alive = self._thread is not None and self._thread.is_alive()
        return not is_alive if no_dist else self.sync_all_async_calls(int(is_alive))

    def close(self, abort: bool = False) -> None:
        if self._thread is not None:
            self._thread.join()

    def __del__(self):
        """Nothing to end: Megatron-Core's own raises here."""


class ThreadQueue(AsyncCallsQueue):
    """Megatron-Core's queue of saves that are being written, by threads.

    ``live``: addresses of the storages that training goes on to change; set it before each save.
    """

    def __init__(self):
        super().__init__()
        self.live: set[int] = set()

    def _get_async_caller(self) -> AsyncCaller:
        return ThreadCaller(self.live)


def storages(sharded_state: dict) -> set[int]:
    """Addresses of the storages of all tensors in a sharded state."""
    shards = [x for x in nested_values(sharded_state) if isinstance(x, ShardedTensor | ShardedTensorFactory)]
    return {shard.data.untyped_storage().data_ptr() for shard in shards}


def snapshot(preloaded: list, live: set[int]) -> list:
    """``preloaded`` (what is written, on the host) with a copy of each tensor whose storage is in ``live``.

    Training goes on and would change it. What was on a GPU, or is a part of a storage, has been copied already.
    """
    result = []
    for path, key, (data, tensors) in preloaded:
        copies = [(item, t.clone() if t.untyped_storage().data_ptr() in live else t) for item, t in tensors]
        result.append((path, key, (data, copies)))
    return result


def with_check_sums(request: AsyncRequest, sums: dict[str, int], seconds: list[float]) -> AsyncRequest:
    """The request, that also puts the check sum of each file it wrote into ``sums``, and how long it took."""
    if request.async_fn is None:
        return request

    def write(rank: int, buckets: list, results: queue.Queue, **options) -> None:
        start = time.perf_counter()
        request.async_fn(rank, buckets, results, **options)
        for path in (Path(bucket[0]) for bucket in buckets):
            if path.is_file():  # if not, the results give the reason
                sums[path.name] = crc32(path)
        seconds.append(time.perf_counter() - start)

    return request._replace(async_fn=write)


def write_in_this_process() -> None:
    """Have Megatron-Core write in the thread that asks for it (call before each save).

    Its own queue has a manager process, and each file is written by a forked one: see above.
    """
    filesystem_async._results_queue = queue.Queue()
    FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write_buckets)


@torch.no_grad()
def _write_buckets(transforms: list, use_msc: bool, rank: int, buckets: list, results: queue.Queue) -> None:
    """Same contract as ``write_preloaded_data_multiproc``: {bucket index: what was written} or an exception."""
    written: dict[int, Any] = {}
    for i, bucket in enumerate(buckets):
        outcome, open_buckets = queue.Queue(), queue.Queue()
        open_buckets.put(i)
        FileSystemWriterAsync.write_preloaded_data(transforms, i, bucket, outcome, open_buckets, use_fsync=True)
        _, entries = outcome.get()
        if isinstance(entries, Exception):
            results.put(_disk_error(entries))
            return
        written[i] = entries
    results.put(written)


def _disk_error(error: BaseException) -> BaseException:
    """The disk's error that made torch's writer fail; the writer's own error does not name it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error
