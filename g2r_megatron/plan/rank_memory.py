"""Device memory of every rank: what the rank always holds, and what each phase of a step adds."""

from dataclasses import dataclass, field, replace

from g2r_megatron.config.presets import without_credit
from g2r_megatron.plan import activations
from g2r_megatron.plan.activations import FP32, LOGITS_BACKWARD, LOGITS_FORWARD, SAMPLING
from g2r_megatron.plan.config import PlanConfig
from g2r_megatron.plan.engine import engine_bytes, in_ranks, none_here
from g2r_megatron.plan.models import Job, PlannedModel
from g2r_megatron.plan.workload import (
    Passes,
    Rollout,
    Workload,
    attribution_passes,
    kept_prefix_tokens,
    policy_passes,
    reference_passes,
    rollout,
    verdict_passes,
    workload,
)


@dataclass
class RankMemory:
    """Ranks ``first`` .. ``last``, which are all alike. Bytes of one of them.

    ``static``: what the rank always holds; ``phases``: what each phase adds, its parts by name.
    """

    first: int
    last: int
    policy_stage: int | None
    judge_stage: int | None
    gold_stage: int | None
    static: dict[str, float] = field(default_factory=dict)
    phases: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> float:
        return sum(self.static.values()) + sum(self.phases[self.peak_phase].values())


def training_state(model: PlannedModel, stage: int, distributed: bool) -> dict[str, float]:
    """Megatron-Core's DDP and optimizer: fp32 gradients, fp32 main weights of bf16 ones, Adam's two moments."""
    s = model.stages[stage]
    main = FP32 if model.kind.dtype == "bf16" else 0
    share, expert_share = (model.dp, model.expert_dp) if distributed else (1, 1)
    return {
        "gradients": FP32 * s.total,
        "optimizer": (main + 2 * FP32) * ((s.total - s.experts) / share + s.experts / expert_share),
    }


def update_bytes(model: PlannedModel, stage: int, passes: Passes) -> dict[str, float]:
    """Forward and backward of one micro-batch after the other, pipelined."""
    tokens = passes.tokens / model.layout.cp
    kept = activations.in_flight(model.layout, stage, passes.micro_batches) * model.keeps(stage)
    if model.kind.recompute != "none":
        kept += model.layer_keeps(stage)
    work = model.works(stage, backward=True)
    logits = passes.logit_rows * model.logits_here(stage) * LOGITS_BACKWARD
    # logits are freed before the layers' backward begins
    return {"activations": tokens * kept + max(logits, tokens * work)}


def forward_bytes(model: PlannedModel, stage: int, passes: Passes) -> dict[str, float]:
    """A pass without gradients: one layer at work, or the logits, and the row."""
    logits = passes.logit_rows * model.logits_here(stage) * LOGITS_FORWARD
    work = passes.tokens / model.layout.cp * model.works(stage, backward=False)
    return {"activations": max(logits, work)} | row_bytes(model, 1, passes)


def kept_layers(model: PlannedModel, stage: int) -> int:
    """Layers that keep what they gather until their backward."""
    return 1 if model.kind.recompute == "full" else model.stages[stage].layer_count


def row_bytes(model: PlannedModel, layers: int, passes: Passes, mask: bool = True) -> dict[str, float]:
    """A packed row's mask while it is built, and keys and values that CP ranks gather in ``layers``.

    ``mask`` False: of an update, where the mask is built before much is kept, and is gone at the peak.
    """
    layout, g = model.layout, model.geometry
    gathered = 2 * model.kind.a * passes.tokens * g.kv_heads * g.head_dim / layout.tp * layers if layout.cp > 1 else 0
    return {"row": (FP32 * passes.tokens**2 / layout.cp if mask else 0) + gathered}


def prefix_key_bytes(model: PlannedModel, stage: int, work: Workload, passes: Passes) -> float:
    """Keys and values of the prefixes of the micro-batches in flight (judge/suffixes.py); CP ranks have all of them."""
    g, tokens = model.geometry, kept_prefix_tokens(work, passes)
    rows = activations.in_flight(model.layout, stage, passes.micro_batches)
    heads = max(1, g.kv_heads / model.layout.tp)
    return rows * 2 * model.kind.a * tokens * heads * g.head_dim * model.stages[stage].layer_count


def rollout_bytes(model: PlannedModel, stage: int, sampling: Rollout) -> dict[str, float]:
    """The KV cache, and the prompts' pass (without sequence parallelism) or the drawing of tokens."""
    g, layout = model.geometry, replace(model.layout, sp=False)
    cache = activations.kv_cache_bytes(g, model.stages[stage], layout, model.kind, sampling.sequences, sampling.length)
    # prompts at the limit, each with one response, as in an evaluation
    prefill = sampling.sequences * sampling.prompt * model.works(stage, backward=False, layout=layout)
    drawing = sampling.sequences * g.vocab * (model.kind.a + SAMPLING) if model.logits_here(stage) else 0
    return {"KV cache": cache, "activations": max(prefill, drawing)}


def rank_memory(job: Job) -> list[RankMemory]:
    """One entry a run of neighbouring ranks that hold the same stages."""
    config, work = job.config, workload(job.config)
    groups: list[RankMemory] = []
    for rank in range(job.ranks):
        gold_stage = job.gold.stage_of(rank) if job.gold is not None else None
        stages = job.policy.stage_of(rank), job.judge.stage_of(rank), gold_stage
        if groups and (groups[-1].policy_stage, groups[-1].judge_stage, groups[-1].gold_stage) == stages:
            groups[-1].last = rank
        else:
            groups.append(RankMemory(rank, rank, *stages))
    for group in groups:
        if group.policy_stage is not None:
            _add_policy(group, job, work)
        if group.judge_stage is not None:
            _add_judge(group, job, work, config.judge.offload)
        if job.gold is not None and group.gold_stage is not None:
            group.phases["evaluation by eval.judge"] = _gold_bytes(job.gold, group.gold_stage, config)
    return groups


def _add_policy(group: RankMemory, job: Job, work) -> None:
    model, stage, config = job.policy, group.policy_stage, job.config
    passes = policy_passes(work, config, model.ranks)
    group.static["policy weights"] = model.weight_bytes(stage)
    group.static |= training_state(model, stage, config.optimizer.distributed)
    if not none_here(config):
        in_engine = engine_bytes(job) if in_ranks(config) else None
        group.phases["rollout"] = in_engine or rollout_bytes(model, stage, rollout(work, config, model.ranks))
    # in a run's first step at least
    group.phases["old log-probs"] = forward_bytes(model, stage, passes)
    row = row_bytes(model, kept_layers(model, stage), passes, mask=False)
    group.phases["update"] = update_bytes(model, stage, passes) | row
    if job.reference is not None:
        group.static["reference weights"] = job.reference.weight_bytes(stage)
        passes = reference_passes(work, config, model.ranks)
        group.phases["reference"] = forward_bytes(job.reference, stage, passes)


def _add_judge(group: RankMemory, job: Job, work, offload: bool) -> None:
    model, stage, config = job.judge, group.judge_stage, job.config
    passes = verdict_passes(work, config, model.ranks)
    phases = {"verdicts": forward_bytes(model, stage, passes)}
    if work.attributed:
        passes = attribution_passes(work, config, model.ranks)
        row = row_bytes(model, kept_layers(model, stage), passes)
        phases["attribution"] = update_bytes(model, stage, passes) | row
        if work.gates:
            phases["attribution"]["prefix keys"] = prefix_key_bytes(model, stage, work, passes)
    if job.judge_is_reference:
        phases["reference"] = forward_bytes(model, stage, reference_passes(work, config, model.ranks))
    if offload:
        for parts in phases.values():
            parts["judge weights"] = model.weight_bytes(stage)
    else:
        group.static["judge weights"] = model.weight_bytes(stage)
    group.phases |= phases


def _gold_bytes(model: PlannedModel, stage: int, config: PlanConfig) -> dict[str, float]:
    """Its weights, in host memory otherwise, and verdicts on responses at the limits."""
    judge = replace(config, judge=replace(without_credit(config.eval.judge), parts=1))
    passes = verdict_passes(workload(judge), judge, model.ranks)
    return {"judge weights": model.weight_bytes(stage)} | forward_bytes(model, stage, passes)
