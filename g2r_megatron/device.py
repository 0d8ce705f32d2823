"""The device that this process computes on: which one it is, its memory, its clock.

The one place that asks whether there is a CUDA device (parallel/cpu.py makes Megatron-Core run where there is none).
"""

import os
import time
from collections.abc import Callable

import psutil
import torch

_CPU = torch.device("cpu")


def on_cpu() -> bool:
    """True where there is no CUDA device."""
    return not torch.cuda.is_available()


def local_device() -> torch.device:
    """The device that models and their inputs live on."""
    return _CPU if on_cpu() else torch.device("cuda", torch.cuda.current_device())


def collective_backend() -> str:
    """The torch.distributed backend of model traffic."""
    return "gloo" if on_cpu() else "nccl"


def free_bytes() -> int:
    """Memory that this rank can still take: of its GPU, or its share of the host's (of the ranks that torchrun started)."""
    if on_cpu():
        return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def stopwatch() -> Callable[[], float]:
    """Start now; the returned function gives the seconds since then, on a GPU by events in its stream, after all work before them."""
    if on_cpu():
        began = time.perf_counter()
        return lambda: time.perf_counter() - began
    start = torch.cuda.Event(enable_timing=True)
    start.record()

    def seconds() -> float:
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000  # it says milliseconds

    return seconds
