"""A job whose last ranks are the judge's: two worlds (torch.distributed's default group), and a channel between them.

On each side "the world" is the ranks of one model, as it is in a job that policy and judge share. So no other code
depends on the other side. The channel is gloo, on the CPU: token ids go one way and a few numbers a token come back. It joins
the policy's rank 0 and every judge rank. Messages are JSON and fp32 numbers, never pickles.
"""

import json
import os
from collections import deque
from collections.abc import Iterable
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from g2r_megatron.device import collective_backend, local_device

POLICY = 0  # number in the channel of the policy's rank 0; the judge ranks are 1, 2, ...
FIRST_JUDGE = 1
FOR_EVER = timedelta(days=365)  # judge ranks idle while the policy updates; the wait ends when the other end dies
_opened = count()  # channels of this process
HEADER = torch.int64.itemsize  # a message begins with the bytes of its JSON text


@cache
def job_store() -> dist.Store:
    """The job's key-value store: torchrun's, or one on rank 0."""
    store, _, _ = next(rendezvous("env://"))
    return store


def _place(judge_ranks: int) -> tuple[int, int]:
    """(this process's rank in the job, ranks of the policy)."""
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) - judge_ranks


def on_judge_side(judge_ranks: int) -> bool:
    """Whether this process is one of the job's last ``judge_ranks``."""
    if not judge_ranks:
        return False
    rank, policy_ranks = _place(judge_ranks)
    return rank >= policy_ranks


def join(judge_ranks: int, timeout: timedelta) -> None:
    """Join the world of this process's side; ranks count from 0 on either."""
    rank, policy_ranks = _place(judge_ranks)
    side, first, size = ("judge", policy_ranks, judge_ranks) if rank >= policy_ranks else ("policy", 0, policy_ranks)
    store = dist.PrefixStore(f"g2r/{side}", job_store())
    dist.init_process_group(collective_backend(), store=store, rank=rank - first, world_size=size, timeout=timeout)


def has_sides() -> bool:
    """Whether this job has been divided (``join``)."""
    return job_store.cache_info().currsize > 0


class Channel:
    """Messages (``packed``) between the policy's rank 0 and the judge ranks, in order from each sender to each receiver."""

    def __init__(self, number: int, judge_ranks: int):
        self.number, self.judges = number, range(FIRST_JUDGE, judge_ranks + 1)
        store = dist.PrefixStore(f"g2r/channel/{next(_opened)}", job_store())
        self._group: Any = dist.ProcessGroupGloo(store, number, judge_ranks + 1, FOR_EVER)
        self._under_way: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def send(self, receivers: Iterable[int], message: torch.Tensor) -> None:
        """Start sending; returns at once, whatever the receivers do."""
        while self._under_way and self._under_way[0][0].is_completed():
            self._under_way.popleft()
        size = torch.tensor([message.numel()])
        for receiver in receivers:
            for part in (size, message):
                self._under_way.append((self._group.send([part], receiver, 0), part))

    def receive(self, sender: int, timeout: timedelta = FOR_EVER) -> torch.Tensor:
        """The next message from ``sender``; waits until the sender ends, and at most ``timeout``."""
        size = torch.empty(1, dtype=torch.int64)
        self._group.recv([size], sender, 0).wait(timeout)
        message = torch.empty(int(size), dtype=torch.uint8)
        self._group.recv([message], sender, 0).wait(timeout)
        return message

    def flush(self, timeout: timedelta = FOR_EVER) -> None:
        """Wait until everything sent has arrived."""
        while self._under_way:
            self._under_way.popleft()[0].wait(timeout)


def open_channel(judge_ranks: int) -> Channel | None:
    """A new channel (collective over its ranks); None on policy ranks but the first."""
    rank, policy_ranks = _place(judge_ranks)
    if rank >= policy_ranks:
        return Channel(rank - policy_ranks + FIRST_JUDGE, judge_ranks)
    return Channel(POLICY, judge_ranks) if rank == 0 else None


def packed(value: Any, numbers: torch.Tensor | None = None) -> torch.Tensor:
    """A JSON value (infinities and NaN allowed) and fp32 ``numbers`` [n] as one message: uint8 [m]."""
    text = json.dumps(value).encode()
    text += b" " * (-len(text) % torch.float32.itemsize)  # the numbers behind it are aligned
    parts = [torch.tensor([len(text)]), torch.frombuffer(bytearray(text), dtype=torch.uint8)]
    parts += [] if numbers is None else [numbers]
    return torch.cat([part.view(torch.uint8) for part in parts])


def unpacked(message: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """(value, numbers [n] fp32) of a ``packed`` message."""
    end = HEADER + int(message[:HEADER].view(torch.int64))
    return json.loads(message[HEADER:end].numpy().tobytes()), message[end:].view(torch.float32)


def from_first_rank(message: torch.Tensor | None) -> torch.Tensor:
    """Rank 0's uint8 ``message`` [m] on every rank of this side, on the CPU (collective; None elsewhere)."""
    size = torch.tensor([0 if message is None else message.numel()], device=local_device())
    dist.broadcast(size, 0)
    content = torch.empty(int(size), dtype=torch.uint8) if message is None else message
    content = content.to(local_device())
    dist.broadcast(content, 0)
    return content.cpu()
