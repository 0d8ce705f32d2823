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
    """``install(*options, nvcc="13.0", driver="580.65.06")`` -> the finished process."""

    def run(*options: str, nvcc: str | None = "13.0", driver: str | None = "580.65.06"):
        for name, script, value in (("nvcc", NVCC, nvcc), ("nvidia-smi", SMI, driver)):
            file = tmp_path / name
            answer = script.format(version=nvcc, driver=driver) if value else "exit 9"
            file.write_text(f"#!/bin/sh\n{answer}\n")
            file.chmod(0o755)
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CONDA_PREFIX": "/env", "PYTHONPATH": str(tmp_path)}
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
    assert lines[0].split()[1:] == ["-m", "pip", "install", "torch==2.13.0"]
    assert any(line.endswith("transformer-engine\\[core_cu13\\,pytorch\\]==2.11.0 ") for line in lines)
    assert any("flash-attn==2.8.3" in line for line in lines)
    (apex,) = (line for line in lines if "apex" in line)
    assert "--build-option=--cpp_ext" in apex and "--build-option=--cuda_ext" in apex
    assert re.search(r"git\+https://github.com/NVIDIA/apex@[0-9a-f]{40}", apex)
    assert lines[-1].split()[1:] == ["-m", "g2r_megatron.cli", "doctor"]


def image_torch(directory: Path, version: str, cuda: str) -> None:
    """What an image's torch shows of itself: its metadata and torch.version."""
    (directory / "torch").mkdir()
    (directory / "torch" / "__init__.py").write_text(f"class version:\n    cuda = {cuda!r}\n")
    metadata = directory / f"torch-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("version", "cuda", "core"),
    [
        ("2.12.1+cu129", "12.9", "core_cu12"),
        ("2.14.0a0+nv26.04", "13.1", "core_cu13"),
        ("2.11.0+cu130", "13.0", "core_cu13"),
    ],
)
def test_the_torch_of_an_image_is_kept_with_a_warning(install, tmp_path, version, cuda, core):
    """Older or newer than the pin: what is compiled goes by its CUDA, which nvcc must have."""
    image_torch(tmp_path, version, cuda)
    done = install("--dry-run", nvcc=cuda)
    assert done.returncode == 0 and "would stop" not in done.stdout and "torch==" not in done.stdout
    assert f"# warning: torch {version.partition('+')[0]} (CUDA {cuda}) is there and kept" in done.stdout
    assert core in done.stdout
    assert "would stop: nvcc is of CUDA 11.8" in install("--dry-run", nvcc="11.8").stdout


def test_a_torch_that_is_too_old_is_replaced(install, tmp_path):
    """Its torchrun and compiler are not the ones that this project runs on."""
    image_torch(tmp_path, "2.9.1+cu128", "12.8")
    done = install("--dry-run")
    assert "torch 2.9.1 is older than 2.11: replaced by 2.13.0" in done.stdout and "torch==2.13.0" in done.stdout


def test_one_torch_everywhere():
    """What is installed on GPUs is what CI installs, and what the project's metadata lets through begins at LEAST_TORCH."""
    script, constraints, project = (
        (ROOT / name).read_text() for name in ("tools/install_gpu.sh", "constraints-cpu.txt", "pyproject.toml")
    )
    (torch,) = re.findall(r"^TORCH=(.*)$", script, re.MULTILINE)
    (least,) = re.findall(r"^LEAST_TORCH=(.*)$", script, re.MULTILINE)
    assert f"\ntorch=={torch}\n" in constraints and f'"torch>={least}.0a0"' in project


def test_options_leave_things_out(install):
    """FlashAttention only if asked for, Apex unless it is declined."""
    done = install("--dry-run", "--no-apex")
    assert done.returncode == 0 and "flash-attn" not in done.stdout and "apex" not in done.stdout


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (dict(nvcc="11.8"), "nvcc is of CUDA 11.8"),
        (dict(driver="535.104.05"), "driver 535.104.05 is older than 580"),
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
