"""The test harness itself: a case that raises, dies or hangs is reported as that case, and the next one still runs.

Leaves out time-outs of the world's start.
"""

import os
import time

import pytest
import torch
import torch.distributed as dist

from distributed import CaseFailed


def sum_of_ranks() -> float:
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total)
    return total.item()


def raise_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("rank 1 is unwell")
    dist.barrier()


def die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def hang_on_rank_1() -> None:
    time.sleep(60 * dist.get_rank())


@pytest.mark.parametrize(
    "case, message, timeout",
    [(raise_on_rank_1, "rank 1 is unwell", 60), (die_on_rank_1, "exit code 7", 60), (hang_on_rank_1, "no answer", 2)],
)
def test_a_failing_case_fails_alone(worlds, case, message, timeout):
    """The failure names the case and what happened to rank 1; a new world answers the next case."""
    with pytest.raises(CaseFailed, match=f"(?s){case.__name__}.*rank 1.*{message}"):
        worlds[2].run(case, timeout=timeout)
    assert worlds[2].run(sum_of_ranks) == [1.0, 1.0]
