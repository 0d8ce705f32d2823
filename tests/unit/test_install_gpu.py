"""tools/install_gpu.sh: the commands of a dry run, and checks that stop before anything is installed.

nvcc and nvidia-smi are scripts that answer as real ones do. Leaves out the installation itself, which needs CUDA.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "install_gpu.sh"
NVCC = 'echo "Cuda compilation tools, release {version}, V{version}.61"'
SMI = "echo {driver}"


@pytest.fixture
def install(tmp_path):
    """``install(*options, nvcc="12.8", driver="570.86.10")`` -> the finished process."""

    def run(*options: str, nvcc: str | None = "12.8", driver: str | None = "570.86.10"):
        for name, script, value in (("nvcc", NVCC, nvcc), ("nvidia-smi", SMI, driver)):
            file = tmp_path / name
            answer = script.format(version=nvcc, driver=driver) if value else "exit 9"
            file.write_text(f"#!/bin/sh\n{answer}\n")
            file.chmod(0o755)
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CONDA_PREFIX": "/env"}
        command = ["bash", str(SCRIPT), "--python", sys.executable, *options]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)

    return run


def test_the_script_is_bash():
    """bash parses it."""
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_dry_run_prints_the_commands(install):
    """Every version pinned, Apex from source with both extensions at a commit, nothing run."""
    done = install("--dry-run", "--flash-attn")
    assert done.returncode == 0 and "would stop" not in done.stdout
    lines = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    assert lines[0].split()[1:] == ["-m", "pip", "install", "torch==2.9.1"]
    assert any(line.endswith("transformer-engine\\[pytorch\\]==2.11.0 ") for line in lines)
    assert any("flash-attn==2.8.3" in line for line in lines)
    (apex,) = (line for line in lines if "apex" in line)
    assert "--build-option=--cpp_ext" in apex and "--build-option=--cuda_ext" in apex
    assert re.search(r"git\+https://github.com/NVIDIA/apex@[0-9a-f]{40}", apex)
    assert lines[-1].split()[1:] == ["-m", "g2r_megatron.cli", "doctor"]


def test_options_leave_things_out(install):
    """FlashAttention only if asked for, Apex unless it is declined."""
    done = install("--dry-run", "--no-apex")
    assert done.returncode == 0 and "flash-attn" not in done.stdout and "apex" not in done.stdout


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (dict(nvcc="11.8"), "nvcc is of CUDA 11.8"),
        (dict(driver="535.104.05"), "driver 535.104.05 is older than 570"),
        (dict(driver=None), "nvidia-smi sees no GPU"),
    ],
)
def test_a_wrong_machine_is_refused_first(install, answers, said):
    """One line, exit code 2, nothing installed; a dry run says it and goes on."""
    done = install(**answers)
    assert done.returncode == 2 and done.stderr.startswith("install_gpu: error: ") and said in done.stderr
    assert done.stdout == ""
    done = install("--dry-run", **answers)
    assert done.returncode == 0 and f"# would stop: {said}" in done.stdout


def test_a_build_node_has_no_driver(install):
    """--no-driver leaves that check out."""
    assert "would stop" not in install("--dry-run", "--no-driver", driver=None).stdout


def test_unknown_options(install):
    """Named, with the way to the list of them."""
    done = install("--fast")
    assert done.returncode == 2 and "--fast: no such option; see --help" in done.stderr
