"""The tests here need the cluster of cluster.py, which they do not start (.ci/run does)."""

from collections.abc import Iterator

import pytest
from cluster import ask, is_up
from jobs import SUBMITTED


@pytest.fixture(scope="session", autouse=True)
def running_cluster() -> None:
    if not is_up():
        pytest.skip("no test cluster (python tests/slurm/cluster.py start: root, slurm-wlm and munge)")


@pytest.fixture(autouse=True)
def jobs_end_with_their_test(running_cluster) -> Iterator[None]:
    yield
    while SUBMITTED:
        ask("scancel", "--quiet", SUBMITTED.pop())
