"""A world of CPU processes (gloo) that a test module starts once and then asks for one case after another.

Not a test. ``World.run`` calls a function of the test module on every rank and returns what each rank returned, so
that assertions stay in the test, in a process of their own. A case that raises, dies or hangs fails that test
alone: its world is killed and the next case gets a new one. The worlds are forked from a server that has imported
Megatron-Core, which takes longer than most cases.
"""

import faulthandler
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.forkserver import ensure_running

import torch

from g2r_megatron.config.options import Layout

SLOWEST_CASE = 120.0  # seconds
GRACE = 1.0  # seconds for the other ranks to report what went wrong with them

# name -> (processes, layout); data parallel takes what tp and pp leave over
LAYOUTS = {
    "tp1pp1": (1, Layout()),
    "tp2pp1": (2, Layout(tp=2)),
    "tp2pp1sp": (2, Layout(tp=2, sp=True)),
    "tp1pp2": (2, Layout(pp=2)),
    "tp2pp2sp": (4, Layout(tp=2, pp=2, sp=True)),
    "tp1pp1dp2": (2, Layout()),
    "tp1pp4": (4, Layout(pp=4)),
    "tp4pp1": (4, Layout(tp=4)),
}
EXPERT_LAYOUTS = {
    "ep2": (2, Layout(ep=2)),
    "etp2": (2, Layout(etp=2)),
    "ep4": (4, Layout(ep=4)),
    "tp2sp_ep2": (2, Layout(tp=2, sp=True, ep=2)),
    "tp2sp_ep2_dp2": (4, Layout(tp=2, sp=True, ep=2)),
    "tp2sp_ep2_etp2": (4, Layout(tp=2, sp=True, ep=2, etp=2)),
    "pp2_ep2": (4, Layout(pp=2, ep=2)),
    "pp2_uneven_etp2": (4, Layout(pp=2, stage_layers=[1, 3], etp=2)),
}
STAGE_LAYOUTS = {
    "pp2_uneven": (2, Layout(pp=2, stage_layers=[3, 1])),
    "tp2_pp2_uneven": (4, Layout(tp=2, pp=2, sp=True, stage_layers=[1, 3])),
    "pp4_vpp2": (4, Layout(pp=4, vpp=2)),  # of 8 layers
    "pp3_vpp2_uneven": (3, Layout(pp=3, vpp=2, stage_layers=[2, 1, 1, 1, 1, 2])),
}
CONTEXT_LAYOUTS = {
    "cp2": (2, Layout(cp=2)),
    "cp4": (4, Layout(cp=4)),
    "cp2_dp2": (4, Layout(cp=2)),
    "cp2_tp2": (4, Layout(tp=2, cp=2)),
    "cp2_tp2sp": (4, Layout(tp=2, cp=2, sp=True)),
    "cp2_pp2": (4, Layout(cp=2, pp=2)),
    "cp2_ep2": (2, Layout(cp=2, ep=2)),
    "cp2_ep4_dp2": (4, Layout(cp=2, ep=4)),
    "cp2_pp2_uneven_ep2": (4, Layout(cp=2, pp=2, stage_layers=[3, 1], ep=2)),
    "cp2_tp2sp_ep2_etp2": (4, Layout(tp=2, cp=2, sp=True, ep=2, etp=2)),
}
ALL_LAYOUTS = LAYOUTS | EXPERT_LAYOUTS | STAGE_LAYOUTS | CONTEXT_LAYOUTS


def fits(layout: str, *, layers: int, moe: bool) -> bool:
    """Whether a tiny model of so many layers can be spread in this way."""
    sizes = ALL_LAYOUTS[layout][1]
    if sizes.vpp or layers != 4:  # tiny models have 4 layers, the ones for virtual stages 8
        return bool(sizes.vpp) and layers == 8
    return (sizes.tp == 1 or sizes.sp) if moe else sizes.ep == sizes.etp == 1


PROCESSES = multiprocessing.get_context("forkserver")
PRELOADED = ["g2r_megatron.launch", "g2r_megatron.judge.offline", "transformers.models.auto.modeling_auto"]
PROCESSES.set_forkserver_preload(PRELOADED)


@contextmanager
def environment(**settings: str) -> Iterator[None]:
    """``settings`` in this process's environment."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@cache
def start_server() -> None:
    """Start the server blind to GPUs: these worlds are of CPU processes, also on a machine that has one GPU."""
    with environment(CUDA_VISIBLE_DEVICES=""):
        ensure_running()


@contextmanager
def server_with(*modules: str, **settings: str) -> Iterator[None]:
    """Meanwhile the server has imported ``modules`` too, with ``settings`` in its environment. No world may live on."""
    start_server.cache_clear()
    forkserver._forkserver._stop()
    PROCESSES.set_forkserver_preload([*PRELOADED, *modules])
    try:
        with environment(**settings):
            start_server()
        yield
    finally:
        start_server.cache_clear()
        forkserver._forkserver._stop()
        PROCESSES.set_forkserver_preload(PRELOADED)


class CaseFailed(AssertionError):
    """A case raised, died or hung; the message holds every rank's traceback."""


def _serve(rank: int, size: int, judge_ranks: int, port: int, connection) -> None:
    """Join the world, then run the cases that come through ``connection`` until it closes."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    faulthandler.enable()  # a rank that dies of a signal shows where
    torch.set_num_threads(1)  # the ranks share the cores
    from g2r_megatron.parallel.groups import initialize

    initialize(1, judge_ranks)
    while True:
        try:
            function, args = connection.recv()
        except EOFError:  # the test session ended
            return
        try:
            reply = (True, function(*args))
        except Exception:  # reported to the test as this case's result
            reply = (False, traceback.format_exc())
        connection.send(reply)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class World:
    """``size`` processes, started by the first case. The last ``judge_ranks`` of them are on the judge's side."""

    def __init__(self, size: int, judge_ranks: int = 0):
        self.size, self.judge_ranks = size, judge_ranks
        self._ranks: list[tuple] = []  # (process, connection)

    def _start(self) -> None:
        start_server()
        port = free_port()
        for rank in range(self.size):
            here, there = PROCESSES.Pipe()
            process = PROCESSES.Process(
                target=_serve, args=(rank, self.size, self.judge_ranks, port, there), daemon=True
            )
            process.start()
            there.close()
            self._ranks.append((process, here))

    def run(self, function: Callable, *args, timeout: float = SLOWEST_CASE) -> list:
        """[function(*args) of rank 0, of rank 1, ...]. ``function``: of a module; arguments and results: no tensors.

        Raises ``CaseFailed`` naming every rank that raised, died or did not answer within ``timeout`` seconds.
        """
        if not self._ranks:
            self._start()
        replies: dict[int, tuple[bool, object]] = {}
        for rank, (_, connection) in enumerate(self._ranks):
            try:
                connection.send((function, args))
            except OSError:
                replies[rank] = (False, "died before the case")
        deadline = time.monotonic() + timeout
        while len(replies) < self.size:
            left = deadline - time.monotonic()
            pending = {connection: rank for rank, (_, connection) in enumerate(self._ranks) if rank not in replies}
            ready = wait(list(pending), timeout=max(left, 0))
            if not ready:
                replies |= dict.fromkeys(pending.values(), (False, "no answer: hung, or waiting for another rank"))
            for connection in ready:
                replies[pending[connection]] = self._reply(pending[connection])
            if not all(good for good, _ in replies.values()):
                deadline = min(deadline, time.monotonic() + GRACE)
        if not all(good for good, _ in replies.values()):
            self.close()  # ranks may be waiting for each other: nothing more can be asked of them
            failures = [f"rank {rank}: {text}" for rank, (good, text) in sorted(replies.items()) if not good]
            given = ", ".join(repr(arg)[:80] for arg in args)
            raise CaseFailed(f"{function.__name__}({given}) in a world of {self.size}\n" + "\n".join(failures))
        return [replies[rank][1] for rank in range(self.size)]

    def _reply(self, rank: int) -> tuple[bool, object]:
        process, connection = self._ranks[rank]
        try:
            return connection.recv()
        except (EOFError, OSError):
            process.join(timeout=GRACE)
            return False, f"died (exit code {process.exitcode})"

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        for process, connection in self._ranks:
            connection.close()
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        for process, _ in self._ranks:
            process.join()
        self._ranks = []


class Worlds:
    """The worlds of one test module, by size; ``worlds[3, 1]`` has a judge rank of its own (parallel/sides.py)."""

    def __init__(self):
        self._worlds: dict[int | tuple[int, int], World] = {}

    def __getitem__(self, size: int | tuple[int, int]) -> World:
        return self._worlds.setdefault(size, World(size) if isinstance(size, int) else World(*size))

    def on(self, layout: str, function: Callable, *args) -> list:
        """``function(layout, *args)`` on the ranks that the named layout of ``ALL_LAYOUTS`` needs."""
        return self[ALL_LAYOUTS[layout][0]].run(function, ALL_LAYOUTS[layout][1], *args)

    def close(self) -> None:
        for world in self._worlds.values():
            world.close()


# What follows runs in the ranks.


_made: dict = {}


def groups_of(layout: Layout):
    """The process groups of ``layout``, made once a world (making them is the slow part of a case)."""
    from g2r_megatron.parallel.groups import build_groups

    if repr(layout) not in _made:
        _made[repr(layout)] = build_groups("judge", layout)  # which of the two is named in errors only
    return _made[repr(layout)]


def padded_batch(model, sequences, positions, items: list[int]):
    """A ``TokenBatch`` of ``sequences[i] for i in items`` as a batch padded on the right: what packed rows are held to."""
    from g2r_megatron.model.schedule import TokenBatch
    from g2r_megatron.parallel.microbatches import padded

    length = padded(max([1, *(len(sequences[i]) for i in items)]), model.length_multiple)
    # no mask: attention is causal and nothing after a sequence's end is read
    ids = [[*sequences[i], *[0] * (length - len(sequences[i]))] for i in items] or [[0] * length]
    rows = [row * length + p for row, i in enumerate(items) for p in positions[i]]
    return TokenBatch(torch.tensor(ids), torch.tensor(rows, dtype=torch.int64), items)
