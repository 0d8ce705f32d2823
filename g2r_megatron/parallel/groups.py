"""torch.distributed start-up and the process groups of one layout."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection

from g2r_megatron.config.layout import check_layout, data_parallel_size
from g2r_megatron.config.options import Layout
from g2r_megatron.device import collective_backend, on_cpu
from g2r_megatron.parallel import cpu, sides

_timeout = timedelta(minutes=30)  # how long a rank waits for the others: of every group, set by ``initialize``


@dataclass
class ModelGroups:
    """One model's layout and its groups in the shared world."""

    layout: Layout
    pgs: ProcessGroupCollection

    @property
    def is_first_stage(self) -> bool:
        """This rank holds the embeddings."""
        return self.pgs.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """This rank holds the output layer."""
        return self.pgs.pp.rank() == self.pgs.pp.size() - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last stage of this rank's pipeline."""
        return dist.get_process_group_ranks(self.pgs.pp)[-1]

    @property
    def dp_rank(self) -> int:
        return self.pgs.dp.rank()

    @property
    def dp_size(self) -> int:
        return self.pgs.dp.size()

    @property
    def replicas_share_experts(self) -> bool:
        """Experts are spread over ranks of several data-parallel replicas: these meet in every layer with experts."""
        return self.layout.etp * self.layout.ep > self.layout.tp

    @property
    def is_replica_writer(self) -> bool:
        """TP rank 0 of the last stage, where logits are: one rank a data-parallel replica (one a context parallel rank)."""
        return self.is_last_stage and self.pgs.tp.rank() == 0


def initialize(seed: int, judge_ranks: int = 0, timeout_minutes: float | None = None) -> None:
    """Join the world (torchrun's environment, or a world of one) and seed Megatron-Core's RNG tracker.

    With ``judge_ranks``, the job's last ranks make a world of their own and the others theirs (parallel/sides.py), so that
    in both of them the world is the ranks of one model.
    A rank that waits for longer than ``timeout_minutes`` (30) for another one fails: with gloo an exception in the
    collective, with NCCL its watchdog ends the process. A peer that has died shows at once with gloo.
    Megatron-Core's global ``parallel_state`` is set up trivially (every size 1): models take their groups from
    ``ProcessGroupCollection``, but a few call sites look up a global group before they find they need none.
    """
    global _timeout
    cpu.install()
    if timeout_minutes is not None:
        _timeout = timedelta(minutes=timeout_minutes)
    if not on_cpu():
        for name, value in gpu_environment(_timeout).items():
            os.environ.setdefault(name, value)
    if not dist.is_initialized():
        if "RANK" in os.environ:
            if not on_cpu():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            if judge_ranks:
                sides.join(judge_ranks, _timeout)
            else:
                dist.init_process_group(collective_backend(), timeout=_timeout)
        else:
            if not on_cpu():
                torch.cuda.set_device(0)
            dist.init_process_group(
                collective_backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=_timeout
            )
    if not parallel_state.model_parallel_is_initialized():
        minutes = _timeout.total_seconds() / 60
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False, distributed_timeout_minutes=minutes)
    seed_all(seed)


def gpu_environment(timeout: timedelta) -> dict[str, str]:
    """Settings of the environment that torch and NCCL read when they start. What the user has set stays.

    torch's watchdog ends a collective that waits for longer than ``timeout``. A call of CUDA or NCCL that does not return
    can block the watchdog; then its heartbeat monitor ends the process after the same time. Before that, the flight
    recorder writes the last collectives of every rank to TORCH_FR_DUMP_TEMP_FILE + rank.
    """
    return {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",  # abort the communicator, end the process
        "TORCH_NCCL_ENABLE_MONITORING": "1",
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": str(max(1, round(timeout.total_seconds()))),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_BUFFER_SIZE": "2000",  # collectives
        # Megatron-Core overlaps communication with products by the order of their launch; read when CUDA starts.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }


def make_deterministic() -> None:
    """Make a job that is repeated on the same machines give the same bits. An operation that cannot do so raises an error.

    Call it before CUDA starts: cuBLAS, Transformer Engine and NCCL read the environment. Models built from now on take
    Megatron-Core's ``deterministic_mode`` (model/build.py).
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    torch.use_deterministic_algorithms(True)


def seed_all(seed: int) -> None:
    """Seed torch and the model-parallel RNG tracker alike on every rank (models here have no dropout)."""
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


@cache
def _subgroup_of(world: dist.ProcessGroup, rank_lists: tuple[tuple[int, ...], ...]) -> dist.ProcessGroup | None:
    """The group among ``rank_lists`` that this rank is in, or None (collective the first time).

    There is one group for each split of the ranks, for all dimensions and both models. Most dimensions of a layout split the
    ranks alike (all of size 1 do), and each group costs buffers and a communicator; with gloo also a thread that polls.
    """
    group, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in rank_lists], timeout=_timeout)
    return group


def _subgroup(rank_lists: Iterable[list[int]]) -> dist.ProcessGroup | None:
    return _subgroup_of(dist.group.WORLD, tuple(tuple(ranks) for ranks in rank_lists))


@contextmanager
def _without_world_size() -> Iterator[None]:
    """HyperCommGrid takes WORLD_SIZE for the size of the world. It is the job's; the world may be one side of it."""
    before = os.environ.pop("WORLD_SIZE", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["WORLD_SIZE"] = before


def build_groups(name: str, layout: Layout) -> ModelGroups:
    """The process groups of one model over the whole world (collective: every rank calls it).

    Rank order is Megatron's: tensor parallel fastest, then context, data, pipeline slowest. Expert groups
    come from a second grid over the same pipeline split, as in Megatron's ``parallel_state``.
    """
    world = dist.get_world_size()
    check_layout(name, layout, world)
    dp = data_parallel_size(layout, world)
    expert_dp = world // (layout.etp * layout.ep * layout.pp)
    with _without_world_size():
        dense = HyperCommGrid([layout.tp, layout.cp, dp, layout.pp], ["tp", "cp", "dp", "pp"])
        expert = HyperCommGrid([layout.etp, layout.ep, expert_dp, layout.pp], ["tp", "ep", "dp", "pp"])
    pgs = ProcessGroupCollection()
    for attribute, grid, dims in (
        ("tp", dense, ["tp"]),
        ("cp", dense, ["cp"]),
        ("dp", dense, ["dp"]),
        ("pp", dense, ["pp"]),
        ("tp_cp", dense, ["tp", "cp"]),
        ("dp_cp", dense, ["cp", "dp"]),
        ("mp", dense, ["tp", "pp"]),
        ("tp_dp_cp", dense, ["tp", "cp", "dp"]),
        ("intra_dist_opt", dense, ["tp", "cp", "dp", "pp"]),
        ("ep", expert, ["ep"]),
        ("expt_tp", expert, ["tp"]),
        ("expt_dp", expert, ["dp"]),
        ("tp_ep", expert, ["tp", "ep"]),
        ("tp_ep_pp", expert, ["tp", "ep", "pp"]),
    ):
        setattr(pgs, attribute, _subgroup(grid.get_rank_enum(dims)))
    pgs.intra_dp_cp, pgs.intra_expt_dp, pgs.inter_dist_opt, pgs.hcp = pgs.dp_cp, pgs.expt_dp, None, None
    pipelines = dense.get_rank_enum(["pp"])
    pgs.embd = _subgroup(sorted({ranks[0], ranks[-1]}) for ranks in pipelines)
    pgs.pos_embd = _subgroup([ranks[0]] for ranks in pipelines)
    return ModelGroups(layout, pgs)
