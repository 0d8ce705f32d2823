"""The vLLM engine in each rank of the policy (rollout.engine vllm): what it holds and does while the policy samples."""

import math
from dataclasses import replace

from g2r_megatron.config.options import GPU_SHARE, Layout
from g2r_megatron.plan.config import GIB, PlanConfig
from g2r_megatron.plan.models import Job, PlannedModel
from g2r_megatron.plan.stages import expected_stages
from g2r_megatron.plan.workload import Rollout, Workload


def in_ranks(config: PlanConfig) -> bool:
    """Whether the policy's ranks have vLLM engines."""
    return config.rollout.engine == "vllm" and config.rollout.vllm.mode == "colocated" and not config.rollout.replay


def on_servers(config: PlanConfig) -> bool:
    return config.rollout.engine == "vllm" and config.rollout.vllm.mode == "servers" and not config.rollout.replay


def none_here(config: PlanConfig) -> bool:
    """Whether the job's ranks do not sample: servers do, or another run has done (rollout.replay)."""
    return on_servers(config) or bool(config.rollout.replay)


def engine_model(job: Job) -> PlannedModel:
    """The whole policy on every one of its ranks; no rank shares the work of another."""
    kind = replace(job.policy.kind, trains=False, recompute="none")
    stages = expected_stages(job.policy.hf, Layout(), job.policy.ranks)
    return replace(job.policy, layout=Layout(), kind=kind, fp8=False, stages=stages)


def engine_bytes(job: Job) -> dict[str, float]:
    """What the engine takes at its start and gives back before the update: its share of the GPU, or its weights alone if larger."""
    share = job.config.rollout.vllm.options.get("gpu_memory_utilization", GPU_SHARE)
    return {"vLLM engine": max(share * job.config.hardware.memory_gib * GIB, engine_model(job).weight_bytes(0))}


def engine_rollout(work: Workload, config: PlanConfig, ranks: int) -> Rollout:
    """Sampling in one rank's engine. Prompts of a batch need not be equally long: each is read in one pass of its own length."""
    share = math.ceil(math.ceil(work.responses / work.parts) / ranks)
    batches = math.ceil(share / config.rollout.batch_size)
    mean = work.prompt * (1 - config.prompt_spread / 2)
    sequences = min(share, config.rollout.batch_size)
    return Rollout(work.parts * batches, sequences, sequences, work.prompt, work.response, mean)
