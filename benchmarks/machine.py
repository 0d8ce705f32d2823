"""What a results file says of the machine that it was measured on."""

import os
import platform
from importlib.metadata import version

import psutil
import torch


def machine() -> str:
    """One line: processor or GPU, memory, threads, versions."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{os.cpu_count()} CPU cores ({_processor()}), {psutil.virtual_memory().total / 1e9:.0f} GB RAM"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformers"))
    return f"{device}, {torch.get_num_threads()} threads, Python {platform.python_version()}, {packages}."


def _processor() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":")[1].strip()
    return platform.machine()
