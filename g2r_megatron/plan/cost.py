"""Work, communication and time of a step's phases, from stated speeds (config.py, ``Hardware``).

Only one overlap is counted: with ``judge.ranks`` the judge works during the policy's sampling and log-probs. Ring
algorithms: a rank sends (n - 1) / n of a tensor to gather or reduce-scatter it over n ranks, twice that to all-reduce
it.
"""

import math
from dataclasses import asdict, dataclass

from g2r_megatron.plan.activations import FP32, SAMPLING, kv_cache_bytes
from g2r_megatron.plan.config import Hardware
from g2r_megatron.plan.engine import engine_model, engine_rollout, in_ranks, none_here
from g2r_megatron.plan.models import Job, PlannedModel
from g2r_megatron.plan.workload import (
    Passes,
    Rollout,
    Workload,
    attribution_passes,
    policy_passes,
    reference_passes,
    rollout,
    verdict_passes,
    workload,
)

# Operations of a decoding step that are more than views, counted in plain torch layers (test_plan_memory.py).
# Transformer Engine's operations do several of these at once, but its modules take as much host time.
LAYER_OPERATIONS = 51
QK_NORM_OPERATIONS = 17
EXPERTS_OPERATIONS = 67
STEP_OPERATIONS = 41
LATENCY = 20e-6  # seconds of one small collective
ATTENTION_BACKWARD = 2.5  # products of attention's backward to those of its forward (it computes the scores again)


@dataclass
class Phase:
    """One phase of a step, on its busiest rank. Bytes are what a rank sends."""

    name: str
    model: str
    micro_batches: int
    tokens: int  # of a micro-batch
    tflop: float
    tp_bytes: float
    ep_bytes: float
    pp_bytes: float
    dp_bytes: float
    compute_s: float
    communication_s: float
    seconds: float  # with the pipeline's bubble


@dataclass
class Links:
    """Bytes a rank sends over each dimension, in one micro-batch (or at the end of a phase)."""

    tp: float = 0.0
    ep: float = 0.0
    pp: float = 0.0
    dp: float = 0.0

    def __add__(self, other: "Links") -> "Links":
        return Links(self.tp + other.tp, self.ep + other.ep, self.pp + other.pp, self.dp + other.dp)

    def __mul__(self, factor: float) -> "Links":
        return Links(*(value * factor for value in asdict(self).values()))


def _bandwidth(model: PlannedModel, first: int, span: int, per_node: int, hardware: Hardware) -> float:
    """Bytes/s between ranks ``first`` .. ``first + span - 1`` of the model: NVLink within a node."""
    start = model.first + first
    inside = start // per_node == (start + span - 1) // per_node
    return (hardware.nvlink_gb_s if inside else hardware.network_gb_s) * 1e9 * hardware.link_use


def link_seconds(model: PlannedModel, links: Links, job: Job) -> float:
    """Seconds that ``links`` take. The slowest group of a kind counts: one across nodes makes the others wait."""
    per_node, hardware, layout = job.config.gpus_per_node, job.config.hardware, model.layout
    stage = model.ranks // layout.pp
    spans = {
        "tp": layout.tp * layout.cp,
        "ep": layout.ep * layout.etp,
        "dp": stage,
        "pp": model.ranks if layout.pp > 1 else 1,
    }
    total = 0.0
    for name, sent in asdict(links).items():
        if sent:
            span = spans[name]
            starts = range(0, model.ranks - span + 1, span)
            total += sent / min(_bandwidth(model, start, span, per_node, hardware) for start in starts)
    return total


def forward_flop(model: PlannedModel, stage: int, passes: Passes) -> float:
    """Multiply-adds x 2 of one micro-batch's forward on one rank of ``stage``."""
    s, g, layout = model.stages[stage], model.geometry, model.layout
    experts = s.experts * layout.ep * layout.etp * model.topk / g.experts / layout.tp if g.experts else 0.0
    tokens = passes.tokens / layout.cp
    return tokens * (2 * (s.dense + experts) + _attention_flop(model, stage, passes)) + _logits_flop(
        model, stage, passes
    )


def _attention_flop(model: PlannedModel, stage: int, passes: Passes) -> float:
    g = model.geometry
    return 4 * passes.context * g.heads * g.head_dim / model.layout.tp * model.stages[stage].layer_count


def _dense_mlp_flop(model: PlannedModel, stage: int) -> float:
    """Of a token: the feed-forward parts of the stage's layers without experts."""
    g, s = model.geometry, model.stages[stage]
    return 2 * 3 * g.hidden * g.ffn / model.layout.tp * (s.layer_count - s.moe_layers)


def _logits_flop(model: PlannedModel, stage: int, passes: Passes) -> float:
    return 2 * passes.logit_rows * model.geometry.hidden * model.logits_here(stage)


def backward_flop(model: PlannedModel, stage: int, passes: Passes) -> float:
    """Of the backward: input gradients, weight gradients where the model trains, and what is recomputed."""
    forward, tokens = forward_flop(model, stage, passes), passes.tokens / model.layout.cp
    attention = tokens * _attention_flop(model, stage, passes)
    products = (forward - attention) * (2 if model.kind.trains else 1)
    again = 0.0
    if model.kind.recompute == "full":
        again = forward
    elif model.kind.recompute == "selective":
        again = tokens * _dense_mlp_flop(model, stage) if model.geometry.has_dense_layers else attention
    return products + ATTENTION_BACKWARD * attention + again


def forward_links(model: PlannedModel, stage: int, tokens: float, sp: bool | None = None) -> Links:
    """What one micro-batch of ``tokens`` tokens sends in the forward."""
    s, g, layout = model.stages[stage], model.geometry, model.layout
    row = tokens / layout.cp * g.hidden * model.kind.a
    t, sp = layout.tp, layout.sp if sp is None else sp
    # two gathers and two reduce-scatters a layer with sequence parallelism, else two all-reduces: as much
    dense_layers = s.layer_count - s.moe_layers
    tp = 4 * (t - 1) / t * row * (dense_layers + s.moe_layers / 2)
    key_values = tokens / layout.cp * 2 * g.kv_heads * g.head_dim / t * model.kind.a
    tp += (layout.cp - 1) * key_values * s.layer_count
    e, x = layout.ep, layout.etp
    copies = row / t * model.topk  # this rank's tokens, once for each of their experts
    ep = s.moe_layers * (2 * copies * (e - 1) / e + 2 * copies * (x - 1)) if g.experts else 0.0
    hops = len(s.layers) - (stage == layout.pp - 1)  # virtual stages send, too
    pp = row / (t if sp else 1) * hops if layout.pp > 1 else 0.0
    return Links(tp, ep, pp)


def backward_links(model: PlannedModel, stage: int, tokens: float) -> Links:
    """The backward: as much as the forward, gathers for weight gradients again, and a recomputed forward again."""
    forward = forward_links(model, stage, tokens)
    links = Links(forward.tp, forward.ep, forward.pp)
    if model.kind.trains and model.layout.sp:
        links.tp += forward.tp / 2
    if model.kind.recompute == "full":
        links += Links(forward.tp, forward.ep)
    elif model.kind.recompute == "selective" and model.geometry.has_dense_layers:
        links.tp += forward.tp / 2  # at most: of a layer's two products that send, one
    return links


def _pipelined(model: PlannedModel, micro_batches: int, seconds: float) -> float:
    """``micro_batches`` of ``seconds`` each through the pipeline: its ends idle while it fills and drains."""
    return seconds * (micro_batches + (model.layout.pp - 1) / (model.layout.vpp or 1)) if micro_batches else 0.0


def run_phase(
    job: Job, name: str, model: PlannedModel, passes: Passes, backward: bool, end: Links | None = None
) -> Phase:
    """A phase of equal micro-batches; the slowest stage sets the pace. ``end``: what is sent once, after them."""
    hardware = job.config.hardware
    speed = (hardware.fp32_tflops if model.kind.dtype == "fp32" else hardware.tflops) * 1e12 * hardware.mfu
    best = None
    for stage in range(model.layout.pp):
        flop = forward_flop(model, stage, passes)
        links = forward_links(model, stage, passes.tokens)
        if backward:
            flop += backward_flop(model, stage, passes)
            links += backward_links(model, stage, passes.tokens)
        compute, sending = flop / speed, link_seconds(model, links, job)
        if best is None or compute + sending > sum(best[2:]):
            best = flop, links, compute, sending
    flop, links, compute, sending = best
    end, count = end or Links(), passes.micro_batches
    total = links * count + end
    last = link_seconds(model, end, job)
    return Phase(
        name,
        model.name,
        count,
        passes.tokens,
        flop * count / 1e12,
        *(total.tp, total.ep, total.pp, total.dp),
        compute_s=compute * count,
        communication_s=sending * count + last,
        seconds=_pipelined(model, count, compute + sending) + last,
    )


def gradient_links(model: PlannedModel, stage: int, distributed: bool) -> Links:
    """One optimizer step: fp32 gradients reduced over the replicas, updated weights gathered from their shards."""
    s, sent = model.stages[stage], 0.0
    for count, n in ((s.total - s.experts, model.dp), (s.experts, model.expert_dp)):
        weights = model.kind.a if distributed else FP32
        sent += count * (FP32 + weights) * (n - 1) / n
    return Links(dp=sent)


def sampling_phase(job: Job, work: Workload) -> Phase:
    """Sampling by the engine in use. On servers and in a replay the job itself has nothing to do.

    How long it waits for servers is not known here.
    """
    if none_here(job.config):
        return Phase("rollout", job.policy.name, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0, 0.0)
    if in_ranks(job.config):
        sampling = engine_rollout(work, job.config, job.policy.ranks)
        return rollout_phase(job, sampling, engine_model(job), is_replayed=True)
    return rollout_phase(job, rollout(work, job.config, job.policy.ranks), job.policy)


def rollout_phase(job: Job, sampling: Rollout, model: PlannedModel, is_replayed: bool = False) -> Phase:
    """Sampling as in rollout/megatron.py: prompts at the speed of large products, then one token at a time.

    A decoding step reads weights and cache, and draws from logits of the whole vocabulary; the host launches each
    operation, and waits at the end of the step. The stages of a pipeline work one after the other. ``is_replayed``: the
    layers are one captured graph, as vLLM's, which the host launches at once.
    """
    hardware = job.config.hardware
    tokens, count = math.ceil(sampling.prompts * sampling.read), sampling.batches * sampling.steps
    phase = run_phase(job, "rollout", model, Passes(sampling.batches, tokens, sampling.read / 2, 1), False)
    memory = hardware.memory_gb_s * 1e9 * hardware.memory_use
    # logits in fp32 and fp64, written and read
    step = (
        sampling.sequences * model.geometry.vocab * 2 * SAMPLING / memory + STEP_OPERATIONS * hardware.launch_us / 1e6
    )
    links = Links(tp=sampling.sequences * model.logits_here(model.layout.pp - 1) * model.kind.a * (model.layout.tp - 1))
    sending = link_seconds(model, links, job)
    for stage, s in enumerate(model.stages):
        read = model.kind.a * (s.dense + s.vocabulary / len(model.stages) + _experts_read(model, stage, sampling))
        read += sampling.context * kv_cache_bytes(model.geometry, s, model.layout, model.kind, sampling.sequences, 1)
        operations = 0 if is_replayed else stage_operations(model, stage)
        step += max(read / memory, operations * hardware.launch_us / 1e6)
        sent = forward_links(model, stage, sampling.sequences, sp=False)
        sending += link_seconds(model, sent, job)
        sending += s.layer_count * LATENCY * (2 * (model.layout.tp > 1) + 2 * (model.layout.ep > 1))
        links += sent
    phase.tp_bytes += links.tp * count
    phase.ep_bytes += links.ep * count
    phase.pp_bytes += links.pp * count
    phase.seconds = (phase.compute_s + phase.communication_s) * model.layout.pp + (step + sending) * count
    phase.compute_s += step * count
    phase.communication_s += sending * count
    return phase


def stage_operations(model: PlannedModel, stage: int) -> int:
    """Operations of a stage's layers in one decoding step."""
    s = model.stages[stage]
    layer = LAYER_OPERATIONS + (QK_NORM_OPERATIONS if model.hf.family.qk_norm else 0)
    return s.layer_count * layer + s.moe_layers * EXPERTS_OPERATIONS


def _experts_read(model: PlannedModel, stage: int, sampling: Rollout) -> float:
    """Parameters of the experts that a step of decoding touches on a rank."""
    if not model.geometry.experts:
        return 0.0
    replicas = max(1, model.layout.ep * model.layout.etp // model.layout.tp)
    share = 1 - (1 - model.topk / model.geometry.experts) ** (sampling.sequences * replicas)
    return model.stages[stage].experts * share


def step_phases(job: Job) -> list[Phase]:
    """The phases of a training step, in order."""
    config, work = job.config, workload(job.config)
    policy, judge = job.policy, job.judge
    passes = policy_passes(work, config, policy.ranks)
    steps = config.grpo.mini_batches
    end = max(
        (gradient_links(policy, i, config.optimizer.distributed) for i in range(policy.layout.pp)), key=lambda x: x.dp
    )
    phases = [
        sampling_phase(job, work),
    ]
    if config.needs_old_pass:  # else only in a run's first step
        phases.append(run_phase(job, "old log-probs", policy, passes, backward=False))
    if job.reference is not None or job.judge_is_reference:
        model = judge if job.judge_is_reference else job.reference
        phases.append(run_phase(job, "reference", model, reference_passes(work, config, model.ranks), backward=False))
    phases.append(run_phase(job, "verdicts", judge, verdict_passes(work, config, judge.ranks), backward=False))
    if work.attributed:
        attribution = attribution_passes(work, config, judge.ranks)
        phases.append(run_phase(job, "attribution", judge, attribution, backward=True))
    if config.judge.offload:
        phases.append(_load_phase(job))
    phases.append(run_phase(job, "update", policy, passes, True, end * steps))
    return phases


def _load_phase(job: Job) -> Phase:
    """The judge's weights from host memory, once a step."""
    largest = max(job.judge.weight_bytes(stage) for stage in range(job.judge.layout.pp))
    seconds = largest / (job.config.hardware.host_gb_s * 1e9 * job.config.hardware.link_use)
    return Phase("judge load", "judge", 0, 0, 0, 0, 0, 0, 0, 0.0, seconds, seconds)


def step_seconds(job: Job, phases: list[Phase]) -> float:
    """A step: all phases one after the other; with own ranks the judge works beside sampling and log-probs.

    Part i is judged while part i + 1 is sampled, so the policy waits for the last part (or, with a slow judge, for all
    parts but the first).
    """
    seconds = {phase.name: phase.seconds for phase in phases}
    if job.shared:
        return sum(seconds.values())
    parts = workload(job.config).parts
    judging = seconds["verdicts"] + seconds.get("attribution", 0.0)
    sampling = seconds["rollout"]
    judged = max(sampling + judging / parts, sampling / parts + judging)
    before = sampling + seconds.get("old log-probs", 0.0) + seconds.get("reference", 0.0)
    return max(before, judged) + seconds["update"]
