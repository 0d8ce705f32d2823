"""What slurm/env.sh and ``initialize`` tell torch and NCCL: threads of a rank, time-outs, where recordings go.

Leaves out NCCL itself; a rank that hangs under gloo is found in test_train_resume.py (``stop_one_rank``).
"""

import subprocess
from datetime import timedelta
from pathlib import Path

import pytest

from g2r_megatron.parallel.groups import gpu_environment

ENV = Path(__file__).parents[2] / "slurm" / "env.sh"


def sourced(**environment: str) -> dict[str, str]:
    """The variables after env.sh, as job.sh reads it."""
    given = {"PATH": "/usr/bin:/bin", "G2R_HOME": "/nowhere", **environment}
    command = ["bash", "-euo", "pipefail", "-c", f"source {ENV}; env"]
    done = subprocess.run(command, capture_output=True, text=True, env=given, check=True)
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


@pytest.mark.parametrize(
    ("cores", "ranks", "given", "threads"),
    [("96", "8", None, "12"), ("192", "8", None, "16"), ("2", "8", None, "1"), ("96", "8", "3", "3")],
)
def test_threads_of_a_rank(cores, ranks, given, threads):
    """Its share of the cores, at least 1 and at most 16; what the user has set stays."""
    environment = {"SLURM_CPUS_ON_NODE": cores, "GPUS": ranks} | ({"OMP_NUM_THREADS": given} if given else {})
    assert sourced(**environment)["OMP_NUM_THREADS"] == threads


def test_recordings_go_to_the_attempt_s_logs():
    found = sourced(LOG="/logs/job-1/attempt_2", GPUS="8")
    assert found["TORCH_FR_DUMP_TEMP_FILE"] == "/logs/job-1/attempt_2/collectives_rank_"
    assert found["TRITON_CACHE_DIR"].startswith("/tmp/") and found["NCCL_DEBUG"] == "WARN"


@pytest.mark.parametrize("minutes", [0.2, 30.0])
def test_a_stuck_watchdog_is_found_as_late_as_a_stuck_rank(minutes):
    """The monitor's own default is 8 minutes, whatever the run's time-out is."""
    found = gpu_environment(timedelta(minutes=minutes))
    assert int(found["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]) == round(60 * minutes)
    assert found["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1" and int(found["TORCH_FR_BUFFER_SIZE"]) > 0
