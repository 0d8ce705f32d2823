"""SIGUSR1 and SIGTERM: the wish to be elsewhere, and the agreement of all ranks on where to leave.

A signal reaches one rank or several, at any moment; its handler only notes it. Where a rank may leave, it asks the
others (one number is reduced), so that all leave at the same place. These places are between the phases of a step and
between the batches of a sampling phase, always before the optimizer has touched the weights: what is saved then is the
last finished step, and the run that goes on from there is the run that was never interrupted.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from g2r_megatron.errors import Preempted

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, try again
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

_asked = False
_KEY = f"g2r/preempted/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"  # in the job's store


@contextmanager
def listening() -> Iterator[None]:
    """In the block the signals are noted instead of ending the process (main thread only)."""
    global _asked
    _asked = False
    before = [signal.signal(number, _note) for number in SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


def _note(number: int, frame) -> None:
    global _asked
    _asked = True


def leave_if_asked() -> None:
    """Raise ``Preempted`` on every rank if any has been signalled. Collective over the world (of the policy's ranks)."""
    import torch  # the command line reads this file before it knows whether it needs torch
    import torch.distributed as dist

    from g2r_megatron.device import local_device

    asked = torch.tensor(int(_asked or _told()), device=local_device())
    dist.all_reduce(asked, op=dist.ReduceOp.MAX)
    if asked.item():
        raise Preempted


def tell_other_side() -> None:
    """Called by a rank that is the judge's alone (parallel/sides.py), after each part: it has no say where to leave."""
    from g2r_megatron.parallel.sides import job_store

    if _asked:
        job_store().set(_KEY, "")


def _told() -> bool:
    """Whether a judge rank has told of its signal."""
    from g2r_megatron.parallel.sides import has_sides, job_store

    return has_sides() and job_store().check([_KEY])
