"""Messages of a run that fails: the first error of all ranks comes first, with rank, phase and step.

The error of one rank makes the others fail too, because they wait for it in a collective. The launcher then prints its
own summary. So ranks under torchrun ask its store which rank failed first. The store ends after the ranks.
"""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from g2r_megatron.errors import Preempted, RunError, UserError
from g2r_megatron.records.heartbeat import Heartbeat

STORE_SECONDS = 10.0  # for the machine of torchrun's store to answer
GRACE_SECONDS = 5.0  # for the other ranks to fail as well: the launcher ends all of them once one has exited


@contextmanager
def reported(heartbeat: Heartbeat) -> Iterator[None]:
    """Around a run: an error is printed as soon as it happens, written to the heartbeat, and raised again."""
    try:
        yield
        _end_quietly()
    except Preempted:
        raise
    except KeyboardInterrupt:
        heartbeat.fail("interrupted", write=os.environ.get("RANK", "0") == "0")
        raise
    except Exception as error:
        first, is_mine = announce(error, heartbeat.place())
        try:
            heartbeat.fail(first, write=is_mine or os.environ.get("RANK", "0") == "0")
        except UserError as refused:  # a full disk is often why the run failed at all
            print(f"g2r: error: {refused}", file=sys.stderr, flush=True)
        raise


def announce(error: Exception, place: str | None = None) -> tuple[str, bool]:
    """Print ``error`` once, on the rank that failed first. Returns (the first error of all ranks, whether it is this one).

    A mistake of the user, or the end of a run, is one line; anything else has ``place`` (which rank was doing what)
    before it, and a traceback on the first rank. Later calls with the same error print nothing.
    """
    if not hasattr(error, "announced"):
        error.announced = _announce(error, place)  # type: ignore[attr-defined]
    return error.announced  # type: ignore[attr-defined]


def is_announced(error: Exception) -> bool:
    return hasattr(error, "announced")


def _announce(error: Exception, place: str | None) -> tuple[str, bool]:
    is_line = isinstance(error, UserError | RunError)
    line = str(error) if is_line else f"{place}: {_one_line(error)}"
    store = _launcher_store()
    if store is None:  # a single process, or ranks without torchrun
        if os.environ.get("RANK", "0") == "0" or not is_line:
            _print(line, None if is_line else error)
        return line, True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this rank is ending by itself
    failed = _failed_key()
    is_first = store.add(failed, 1) == 1
    store.set(f"{failed}/{os.environ['RANK']}", "")
    if is_first:
        _print(line, None if is_line else error)
        store.set(f"{failed}/line", line)
    elif not is_line:
        print(f"g2r: then {line}", file=sys.stderr, flush=True)
    world = int(os.environ["WORLD_SIZE"])
    deadline = time.monotonic() + GRACE_SECONDS
    while (silent := [r for r in range(world) if not store.check([f"{failed}/{r}"])]) and time.monotonic() < deadline:
        time.sleep(0.05)
    line = store.get(f"{failed}/line").decode()
    if silent and not is_line:
        note = f"no word from rank {', '.join(map(str, silent))}: killed, or stuck"
        line = f"{line}; {note}"
        if is_first:
            print(f"g2r: {note}", file=sys.stderr, flush=True)
    return line, is_first


def _end_quietly() -> None:
    """Report that this rank has ended, so that a rank that fails later (a policy's, after the judge's) does not wait for it."""
    store = _launcher_store()
    if store is not None:
        store.set(f"{_failed_key()}/{os.environ['RANK']}", "")


def _failed_key() -> str:
    return f"g2r/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _launcher_store():
    """torchrun's store, which ends after the ranks; None without torchrun, or when its machine does not answer."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import DistError, TCPStore

    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # a store that has ended refuses at once; TCPStore itself would try again until the time is up
        socket.create_connection(address, STORE_SECONDS).close()
        return TCPStore(*address, timeout=timedelta(seconds=STORE_SECONDS))
    except (DistError, OSError) as gone:
        print(f"g2r: torchrun's store does not answer ({_one_line(gone)})", file=sys.stderr, flush=True)
        return None


def _print(line: str, error: Exception | None) -> None:
    print(f"g2r: error: {line}", file=sys.stderr, flush=True)
    if error is not None:
        traceback.print_exception(error)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
