"""`g2r doctor`: what is installed and used, what is missing and why it matters, and whether a needed part is broken.

Every package is imported in a process of its own: a package that raises, or ends the interpreter, becomes a line of the
report.
"""

import importlib.metadata
import json
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.text import Text

from g2r_megatron.plan.config import GIB

State = Literal["ok", "note", "missing", "broken"]
IMPORT_SECONDS = 180.0
PROGRAM_SECONDS = 30.0
SHM_GIB, OPEN_FILES, FREE_DISK_GIB = 8, 4096, 50
TESTED_TORCH, LEAST_TORCH = "2.13.0", (2, 11)
STYLES = {"ok": "green", "note": "yellow", "missing": "yellow", "broken": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``broken`` is what makes the exit code 1; ``what`` says what was found, or what to do."""

    name: str
    state: State
    what: str


@dataclass(frozen=True)
class Package:
    """A package to import: ``needed`` "always", "gpu" (GPUs are slower without) or "no"; ``purpose`` for its absence."""

    module: str
    distribution: str
    needed: Literal["always", "gpu", "no"]
    purpose: str


PACKAGES = (
    Package("megatron.core", "megatron-core", "always", "the models themselves"),
    Package("transformers", "transformers", "always", "configs and tokenizers"),
    Package("safetensors.torch", "safetensors", "always", "weights of Hugging Face models"),
    Package("sentencepiece", "sentencepiece", "always", "tokenizer.model files"),
    Package(
        "transformer_engine.pytorch",
        "transformer-engine",
        "gpu",
        "fused layers, FP8 and the fused optimizer on GPUs (without it bf16 asks for spec torch)",
    ),
    Package(
        "flash_attn", "flash-attn", "no", "a further attention kernel of Transformer Engine (cuDNN's is used without)"
    ),
    Package("vllm", "vllm", "no", "sampling with vLLM"),
    Package("wandb", "wandb", "no", "log.wandb"),
)
# What an interpreter of its own prints of a module: its version, or what the import raised.
PROBE = """
import importlib, json, sys, warnings
warnings.simplefilter("ignore")
try:
    module = importlib.import_module(sys.argv[1])
    print("\\n" + json.dumps({"version": str(getattr(module, "__version__", ""))}))
except BaseException as error:
    print("\\n" + json.dumps({"error": f"{type(error).__name__}: {error}", "absent": getattr(error, "name", None)}))
"""
TORCH_PROBE = """
import json, torch
found = {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": [], "nccl": None, "error": None}
try:
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else None
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found["gpus"].append(f"{p.name}, {p.total_memory / 1024**3:.0f} GiB, sm_{p.major}{p.minor}")
    if found["gpus"]:
        torch.ones(2, device="cuda").sum().item()
except Exception as error:
    found["error"] = f"{type(error).__name__}: {error}"
print("\\n" + json.dumps(found))
"""
# A Python extension, as triton makes one on every node before its first kernel.
EXTENSION = "#include <Python.h>\nint answer(void) { return PY_MAJOR_VERSION; }\n"
# The judge's attention, compiled for the GPU.
FLEX_PROBE = """
import json, time, torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
start = time.perf_counter()
q = torch.randn(1, 2, 256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
mask = create_block_mask(lambda b, h, i, j: j <= i, None, None, 256, 256, device="cuda")
out = torch.compile(flex_attention, dynamic=True, fullgraph=True)(q, q, q, block_mask=mask)
out.float().sum().backward()
exact = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
error = (out - exact).abs().max().item()
print("\\n" + json.dumps({"seconds": time.perf_counter() - start, "error": error}))
"""
FLEX_ERROR = 0.05  # bf16 attention against bf16 attention
NETWORK_FILE_SYSTEMS = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "panfs", "wekafs", "pvfs", "afs")


def run_probe(code: str, *arguments: str) -> dict:
    """The JSON object that ``code`` prints last; {"error": why} when the interpreter gives none."""
    command = [sys.executable, "-c", code, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {IMPORT_SECONDS:.0f} s"}
    lines = done.stdout.strip().splitlines()
    try:
        return json.loads(lines[-1])
    except (IndexError, ValueError):
        said = done.stderr.strip().splitlines()
        return {"error": f"the interpreter ended with {done.returncode}" + (f": {said[-1]}" if said else "")}


def run_program(*command: str) -> str | None:
    """First line a program prints, None if there is none of that name or it fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROGRAM_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def one_line(text: str, limit: int = 200) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---- what is looked at ------------------------------------------------------------------------------------------------


def check_python() -> Finding:
    """Python's version and place; pip refuses to install this project on an unsupported older one."""
    return Finding("Python", "ok", f"{platform.python_version()} at {sys.executable}")


def check_torch(has_gpu: bool) -> list[Finding]:
    """torch, CUDA and NCCL. ``has_gpu``: the driver shows GPUs, so torch must be able to use them."""
    found = run_probe(TORCH_PROBE)
    if "version" not in found:
        return [Finding("torch", "broken", f"cannot be imported ({one_line(found['error'])}); reinstall it")]
    lines = [torch_version(found["version"], found["cuda"])]
    if found["error"]:
        lines.append(Finding("CUDA", "broken", f"{one_line(found['error'])}; driver and torch's CUDA must fit"))
    elif found["gpus"]:
        for i, gpu in enumerate(found["gpus"]):
            lines.append(Finding(f"GPU {i}", "ok", gpu))
        lines.append(
            Finding("NCCL", "ok" if found["nccl"] else "broken", found["nccl"] or "torch was built without it")
        )
    elif has_gpu:
        reason = "torch's CPU build is installed" if not found["cuda"] else "torch sees none (CUDA_VISIBLE_DEVICES?)"
        lines.append(
            Finding(
                "GPU", "broken", f"the driver shows GPUs, but {reason}; tools/install_gpu.sh installs the GPU build"
            )
        )
    else:
        lines.append(Finding("GPU", "note", "none: models run on the CPU, over gloo"))
    return lines


def torch_version(version: str, cuda: str | None) -> Finding:
    """The tested version is right, another one from ``LEAST_TORCH`` on is accepted, an older one is too old."""
    text = f"{version}, " + (f"CUDA {cuda}" if cuda else "CPU build")
    if version.partition("+")[0] == TESTED_TORCH:
        return Finding("torch", "ok", text)
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) >= LEAST_TORCH:
        return Finding("torch", "note", f"{text}; tested with {TESTED_TORCH}")
    return Finding("torch", "broken", f"{text}; older than {'.'.join(map(str, LEAST_TORCH))}: install {TESTED_TORCH}")


def check_driver() -> tuple[bool, Finding]:
    """(GPUs are there, driver's line), as nvidia-smi says."""
    line = run_program("nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader")
    if line is None:
        return False, Finding("NVIDIA driver", "note", "no nvidia-smi, or it fails: no GPU here")
    return True, Finding("NVIDIA driver", "ok", line)


def check_package(package: Package, has_gpu: bool) -> Finding:
    """Imported, absent, or present but its import raises."""
    version = installed_version(package.distribution)
    needed = package.needed == "always" or (package.needed == "gpu" and has_gpu)
    found = run_probe(PROBE, package.module)
    if "error" not in found:
        return Finding(package.distribution, "ok", version or found["version"] or "imported")
    absent = version is None and found.get("absent") in (package.module, package.module.partition(".")[0])
    if absent:
        text = f"not installed; for {package.purpose}"
        if package.needed == "always":
            return Finding(package.distribution, "broken", text)
        return Finding(package.distribution, "note" if needed else "missing", text)
    problem = f"{version or 'there'}, but its import raises {one_line(found['error'])}; for {package.purpose}"
    # Megatron-Core imports Transformer Engine if it is installed: a broken one does harm also without a GPU
    harmful = needed or package.module.startswith("transformer_engine")
    return Finding(package.distribution, "broken" if harmful else "note", problem + "; reinstall or remove it")


def check_apex() -> Finding:
    """NVIDIA's Apex has ``apex.optimizers`` and the compiled ``amp_C``; ``apex`` of PyPI is a Pyramid toolkit."""
    version = installed_version("apex")
    top = run_probe(PROBE, "apex")
    if "error" in top and top.get("absent") == "apex" and version is None:
        return Finding(
            "NVIDIA Apex", "missing", "not installed; optional: fused kernels that Transformer Engine does not have"
        )
    optimizers, kernels = run_probe(PROBE, "apex.optimizers"), run_probe(PROBE, "amp_C")
    if optimizers.get("absent") in ("apex", "apex.optimizers"):
        return Finding(
            "NVIDIA Apex",
            "broken",
            f"apex {version or ''} is PyPI's unrelated package of that name, which Megatron-Core takes for NVIDIA's: "
            "pip uninstall apex (tools/install_gpu.sh builds NVIDIA's)".replace("  ", " "),
        )
    if "error" in optimizers or "error" in top:
        error = optimizers.get("error") or top["error"]
        return Finding("NVIDIA Apex", "broken", f"its import raises {one_line(error)}; rebuild or remove it")
    if "error" in kernels:
        return Finding("NVIDIA Apex", "note", "built without --cuda_ext (no amp_C): rebuild with tools/install_gpu.sh")
    return Finding("NVIDIA Apex", "ok", version or "imported")


def check_compiler(has_gpu: bool) -> Finding:
    """A C compiler and Python's headers: triton compiles with them on each node, for the judge's FlexAttention."""
    name, purpose = "C compiler", "triton builds the judge's attention with it on every node"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return Finding(name, "broken" if has_gpu else "missing", f"no gcc or clang, and CC is not set; {purpose}")
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "extension.c")
        source.write_text(EXTENSION)
        include = sysconfig.get_paths()["include"]
        command = [*shlex.split(compiler), "-shared", "-fPIC", f"-I{include}", str(source), "-o", f"{source}.so"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PROGRAM_SECONDS, check=False)
            said = done.stderr if done.returncode else ""
        except (OSError, subprocess.TimeoutExpired) as error:
            said = str(error)
    if not said:
        return Finding(name, "ok", f"{compiler}, with Python.h")
    hint = "install python3-dev or a Python with headers" if "Python.h" in said else "set CC to another one"
    return Finding(
        name,
        "broken" if has_gpu else "note",
        f"{compiler} cannot build an extension ({one_line(said)}); {hint}; {purpose}",
    )


def check_flex_attention(has_gpu: bool) -> Finding | None:
    """Compiled and run on the GPU, forward and backward; None without one."""
    if not has_gpu:
        return None
    found = run_probe(FLEX_PROBE)
    if "error" in found and "seconds" not in found:
        return Finding("FlexAttention", "broken", f"does not compile ({one_line(found['error'])}); the judge needs it")
    text = f"compiled and run in {found['seconds']:.0f} s, off plain attention by {found['error']:.1g}"
    return Finding("FlexAttention", "ok" if found["error"] <= FLEX_ERROR else "broken", text)


def file_system(path: Path) -> str:
    """Type of the file system that ``path`` is on, or would be, such as "ext4" or "nfs4"."""
    import psutil

    path, kind, longest = path.expanduser().absolute(), "unknown", -1
    for partition in psutil.disk_partitions(all=True):
        if path.is_relative_to(partition.mountpoint) and len(partition.mountpoint) > longest:
            kind, longest = partition.fstype, len(partition.mountpoint)
    return kind


def check_kernel_cache() -> Finding:
    """Compiled kernels belong on the node's own disk: on a shared one all ranks of all nodes lock the same files."""
    directory = Path(os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache")
    kind = file_system(directory)
    if kind.lower().removeprefix("fuse.").startswith(NETWORK_FILE_SYSTEMS):
        return Finding(
            "kernel cache",
            "note",
            f"{directory} is on {kind}; set TRITON_CACHE_DIR to the node's own disk (slurm/env.sh)",
        )
    return Finding("kernel cache", "ok", f"{directory} on {kind}")


def check_machine() -> list[Finding]:
    """Slurm, memory, shared memory, limits, disk."""
    import psutil

    slurm = run_program("sinfo", "--version")
    lines = [Finding("Slurm", "ok" if slurm else "missing", slurm or "no sinfo here; for sbatch slurm/*.sh")]
    memory = psutil.virtual_memory()
    lines.append(
        Finding(
            "memory",
            "ok",
            f"{memory.available / GIB:.0f} of {memory.total / GIB:.0f} GiB available, {os.cpu_count()} CPUs",
        )
    )
    if os.path.isdir("/dev/shm"):
        size = shutil.disk_usage("/dev/shm").total / GIB
        small = (
            f"; NCCL and data workers may want {SHM_GIB}: docker run --shm-size={SHM_GIB}g" if size < SHM_GIB else ""
        )
        lines.append(Finding("/dev/shm", "note" if small else "ok", f"{size:.1f} GiB{small}"))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    low = files != resource.RLIM_INFINITY and files < OPEN_FILES
    lines.append(
        Finding("open files", "note" if low else "ok", f"{files}" + (f"; ulimit -n {OPEN_FILES}" if low else ""))
    )
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    text = (
        "unlimited"
        if locked == resource.RLIM_INFINITY
        else f"{locked / GIB:.3f} GiB; InfiniBand wants ulimit -l unlimited"
    )
    lines.append(Finding("locked memory", "ok" if text == "unlimited" else "note", text))
    free = shutil.disk_usage(".").free / GIB
    few = f"; checkpoints of large models want more than {FREE_DISK_GIB}" if free < FREE_DISK_GIB else ""
    lines.append(Finding("disk here", "note" if few else "ok", f"{free:.0f} GiB free in {os.getcwd()}{few}"))
    return lines


def findings() -> list[Finding]:
    """The whole report, in order."""
    has_gpu, driver = check_driver()
    with ThreadPoolExecutor() as threads:  # each import runs in its own process
        torch, apex = threads.submit(check_torch, has_gpu), threads.submit(check_apex)
        flex = threads.submit(check_flex_attention, has_gpu)
        packages = list(threads.map(check_package, PACKAGES, [has_gpu] * len(PACKAGES)))
        kernels = [check_compiler(has_gpu), flex.result(), check_kernel_cache()]
        report = [check_python(), driver, *torch.result(), *packages, apex.result(), *kernels, *check_machine()]
        return [finding for finding in report if finding is not None]


def examine() -> int:
    """Print the report: 1 if something that this kind of machine needs is broken, else 0."""
    out = Console(highlight=False, soft_wrap=True)
    report = findings()
    width = max(len(finding.name) for finding in report)
    for finding in report:
        line = Text(f"{finding.name:<{width}}  ")
        line.append(f"{finding.state:<7}", style=STYLES[finding.state] if out.is_terminal else "")
        out.print(line.append(f"  {finding.what}"))
    broken = [finding.name for finding in report if finding.state == "broken"]
    out.print(f"broken: {', '.join(broken)}" if broken else "nothing that is needed here is broken")
    return 1 if broken else 0
