"""The tests here need the cluster of cluster.py, which they do not start (.ci/run does)."""

import pytest
from cluster import is_up


@pytest.fixture(scope="session", autouse=True)
def running_cluster() -> None:
    if not is_up():
        pytest.skip("no test cluster (python tests/slurm/cluster.py start: root, slurm-wlm and munge)")
