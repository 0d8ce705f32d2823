"""`g2r doctor`: what is broken is said in a line and by the exit code, never by a traceback.

Packages that raise, die or are others of the same name are real modules in a directory on the path of the interpreters
that the doctor starts. Leaves out what only a machine with a GPU can show (tests/gpu).
"""

import sys
from pathlib import Path

import pytest

from g2r_megatron.cli import main
from g2r_megatron.plan import doctor
from g2r_megatron.plan.doctor import Package

GPU_PACKAGE = Package("fused_things", "fused-things", "gpu", "speed")


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """``modules(name, source)`` makes a module importable in interpreters started from here."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(name: str, source: str) -> None:
        file = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)

    return write


def program(directory: Path, name: str, script: str, monkeypatch) -> None:
    """An executable ``name`` that is found first."""
    file = directory / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("source", "has_gpu", "state", "said"),
    [
        (None, False, "missing", "not installed; for speed"),
        (None, True, "note", "not installed; for speed"),
        ("__version__ = '1.2'", True, "ok", "1.2"),
        ("raise OSError('libcudart.so.12: no such file\\nand more')", True, "broken", "OSError: libcudart.so.12"),
        ("raise OSError('libcudart.so.12')", False, "note", "reinstall or remove it"),
        ("import os; os.abort()", True, "broken", "the interpreter ended with -6"),
        ("raise SystemExit(3)", True, "broken", "SystemExit: 3"),
        ("import gone_elsewhere", True, "broken", "No module named 'gone_elsewhere'"),
    ],
)
def test_packages(modules, source, has_gpu, state, said):
    """Absent, whole, raising, killing the interpreter, lacking something: broken where this kind of machine needs it."""
    if source is not None:
        modules("fused_things", source)
    finding = doctor.check_package(GPU_PACKAGE, has_gpu)
    assert finding.state == state and said in finding.what and "\n" not in finding.what


@pytest.mark.parametrize(
    ("files", "state", "said"),
    [
        ({}, "missing", "not installed"),
        ({"apex.__init__": ""}, "broken", "PyPI's unrelated package"),
        ({"apex.__init__": "", "apex.optimizers": ""}, "note", "without --cuda_ext"),
        ({"apex.__init__": "", "apex.optimizers": "", "amp_C": ""}, "ok", "imported"),
        (
            {"apex.__init__": "", "apex.optimizers": "import amp_C", "amp_C": "raise ImportError('ABI')"},
            "broken",
            "ABI",
        ),
    ],
    ids=["absent", "the_other_apex", "python_only", "whole", "broken_build"],
)
def test_apex(modules, files, state, said):
    """NVIDIA's has apex.optimizers and amp_C; PyPI's `apex` has neither, and Megatron-Core would take it for NVIDIA's."""
    for name, source in files.items():
        modules(name, source)
    finding = doctor.check_apex()
    assert finding.state == state and said in finding.what


@pytest.mark.parametrize(
    ("version", "state"),
    [("2.13.0+cu130", "ok"), ("2.14.0a0+nv26.04", "note"), ("2.11.0", "note"), ("2.9.1+cu128", "broken")],
)
def test_torch_versions(version, state):
    """The tested one, others that are let through with a word, one that is too old."""
    assert doctor.torch_version(version, "13.0").state == state


def test_a_driver_with_gpus_needs_a_torch_that_sees_them(tmp_path, monkeypatch):
    """torch's CPU build beside a GPU is what is broken; without a driver it is not."""
    if "+cpu" not in __import__("torch").__version__:
        pytest.skip("needs torch's CPU build")
    program(tmp_path, "nvidia-smi", "echo 570.86.10, NVIDIA H100 80GB HBM3", monkeypatch)
    has_gpu, driver = doctor.check_driver()
    assert has_gpu and driver.what.startswith("570.86.10")
    states = {finding.name: finding.state for finding in doctor.check_torch(has_gpu)}
    assert states == {"torch": "ok", "GPU": "broken"}
    program(tmp_path, "nvidia-smi", "echo 'no devices were found'; exit 9", monkeypatch)
    assert doctor.check_driver()[0] is False


@pytest.mark.parametrize(
    ("script", "has_gpu", "state", "said"),
    [
        ("exit 0", True, "ok", "with Python.h"),
        ("echo 'fatal error: Python.h: No such file' >&2; exit 1", True, "broken", "install python3-dev"),
        ("echo 'cannot execute cc1' >&2; exit 1", True, "broken", "set CC to another one"),
        ("echo 'cannot execute cc1' >&2; exit 1", False, "note", "cannot execute cc1"),
    ],
)
def test_compilers(tmp_path, monkeypatch, script, has_gpu, state, said):
    """One that works, one without Python's headers, one that is broken: triton would find out in the middle of a run."""
    program(tmp_path, "cc", script, monkeypatch)
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    finding = doctor.check_compiler(has_gpu)
    assert finding.state == state and said in finding.what


def test_no_compiler(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [doctor.check_compiler(has_gpu).state for has_gpu in (True, False)] == ["broken", "missing"]


@pytest.mark.parametrize(
    ("kind", "state"), [("ext4", "ok"), ("tmpfs", "ok"), ("nfs4", "note"), ("fuse.beegfs", "note")]
)
def test_the_kernel_cache_is_on_the_node(tmp_path, monkeypatch, kind, state):
    """The file system is that of the longest mount point above the directory."""
    from types import SimpleNamespace

    import psutil

    mounts = [("/", "ext4"), (str(tmp_path), kind), (str(tmp_path / "other"), "ext4")]
    found = [SimpleNamespace(mountpoint=place, fstype=fstype) for place, fstype in mounts]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: found)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    finding = doctor.check_kernel_cache()
    assert finding.state == state and kind in finding.what


def test_flex_attention_is_compiled_where_there_is_a_gpu(monkeypatch):
    """A compiler's error, a wrong result, a right one; without a GPU there is nothing to say."""
    answers = iter([{"error": "InductorError: no cc"}, {"seconds": 9.0, "error": 0.5}, {"seconds": 9.0, "error": 0.01}])
    monkeypatch.setattr(doctor, "run_probe", lambda code: next(answers))
    assert doctor.check_flex_attention(False) is None
    assert [doctor.check_flex_attention(True).state for _ in range(3)] == ["broken", "broken", "ok"]


def test_the_command_on_this_machine(capsys):
    """Exit code 0 and a line a thing, plain text in a pipe."""
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    names = {line.split("  ")[0] for line in out.splitlines()}
    assert {
        "Python",
        "torch",
        "megatron-core",
        "NVIDIA Apex",
        "Slurm",
        "C compiler",
        "kernel cache",
        "/dev/shm",
        "open files",
    } <= names
    assert "\x1b" not in out and sys.executable in out and "Traceback" not in out


def test_something_broken_is_exit_code_1(capsys, monkeypatch):
    """The last line names it."""
    monkeypatch.setattr(doctor, "PACKAGES", (Package("not_there_at_all", "not-there-at-all", "always", "everything"),))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "broken: not-there-at-all"
