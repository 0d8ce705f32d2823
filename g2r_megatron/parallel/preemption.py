"""SIGUSR1 and SIGTERM ask a run to leave; all ranks agree on where they leave.

A signal reaches one rank or several, at any moment. Its handler only notes it. A signal may reach the launcher alone:
torchrun passes on only what its --signals-to-handle names. Then the signal ends the launcher, and a rank treats the end of its
launcher as a signal. Where a rank may leave, the ranks reduce one number, so that all leave at the same place. These
places are between the phases of a step and between the batches of a sampling phase, always before the optimizer changes
the weights. The last finished step is saved there. A run that resumes from it equals a run that was never interrupted.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from g2r_megatron.errors import Preempted

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, try again
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

_asked = False
_LAUNCHER = os.getppid() if "RANK" in os.environ else None  # a process that nobody launched may outlive its shell
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

    asked = torch.tensor(int(_wants_to_leave() or _told()), device=local_device())
    dist.all_reduce(asked, op=dist.ReduceOp.MAX)
    if asked.item():
        raise Preempted


def _wants_to_leave() -> bool:
    """Whether this rank was signalled, or its launcher has ended."""
    return _asked or (_LAUNCHER is not None and os.getppid() != _LAUNCHER)


def tell_other_side() -> None:
    """Called by a rank that is the judge's alone (parallel/sides.py), after each part: it does not decide where to leave."""
    from torch.distributed import DistError

    from g2r_megatron.parallel.sides import job_store

    if _wants_to_leave():
        try:
            job_store().set(_KEY, "")
        except DistError as gone:  # the store ended with its launcher: the policy's ranks notice that too
            print(f"g2r: the job's store does not answer ({gone})", file=sys.stderr, flush=True)


def _told() -> bool:
    """Whether a judge rank has reported a signal. Also true if the store has ended with its launcher."""
    from torch.distributed import DistError

    from g2r_megatron.parallel.sides import has_sides, job_store

    if not has_sides():
        return False
    try:
        return job_store().check([_KEY])
    except DistError:
        return True
