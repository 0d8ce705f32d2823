"""`g2r plan`: checks, memory, work and time of a job together, with a fix if the job does not fit."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations

from g2r_megatron.config.layout import check_layout
from g2r_megatron.config.options import Dtype
from g2r_megatron.errors import UserError
from g2r_megatron.model.hf import HFModel
from g2r_megatron.plan.checks import Problems, check_config, check_inputs, missing_files
from g2r_megatron.plan.config import GIB, PlanConfig
from g2r_megatron.plan.cost import Phase, step_phases, step_seconds
from g2r_megatron.plan.engine import in_ranks, on_servers
from g2r_megatron.plan.models import CountStages, Job, PlannedModel, plan_job
from g2r_megatron.plan.rank_memory import RankMemory, rank_memory
from g2r_megatron.plan.stages import built_stages, expected_stages
from g2r_megatron.plan.workload import Workload, workload

Change = dict[str, object]  # option -> value


@dataclass
class Plan:
    """What is known of a job. Without a ``job`` (it cannot be built) there are only ``problems``."""

    config: PlanConfig
    problems: Problems
    notes: list[str] = field(default_factory=list)
    job: Job | None = None
    memory: list[RankMemory] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)

    @property
    def step_seconds(self) -> float:
        return step_seconds(self.job, self.phases)


def make_plan(config: PlanConfig) -> Plan:
    """The plan of a config whose preset is resolved. Bad input is in ``problems``, never raised."""
    problems = Problems()
    policy, judge = check_config(config, problems)
    plan = Plan(config, problems)
    if problems:
        return plan
    missing = missing_files(config)
    plan.notes += [f"not there yet: {line}" for line in missing]
    if not missing:
        check_inputs(config, [policy] if judge is policy else [policy, judge], problems)
    job = problems.catch(plan_job, config, policy, judge, count_stages_as_built)
    if job is None:
        return plan
    plan.job, plan.memory, plan.phases = job, rank_memory(job), step_phases(job)
    plan.notes += job_notes(job, workload(config))
    for group in plan.memory:
        if not fits(group, config):
            problems.append(_too_large(group, job))
    return plan


def count_stages_as_built(name: str, hf: HFModel, layout, dtype: Dtype, ranks: int) -> list:
    """``CountStages`` of the real model, built on the meta device."""
    return built_stages(name, hf, layout, dtype, ranks)


def count_stages_by_formula(name: str, hf: HFModel, layout, dtype: Dtype, ranks: int) -> list:
    """``CountStages`` by formula."""
    return expected_stages(hf, layout, ranks)


def available_bytes(config: PlanConfig) -> float:
    return (config.hardware.memory_gib - config.hardware.reserve_gib) * GIB


def fits(group: RankMemory, config: PlanConfig) -> bool:
    return group.peak <= available_bytes(config)


# ---- what does not fit, and what would help ---------------------------------------------------------------------------


def _too_large(group: RankMemory, job: Job) -> UserError:
    parts = {**group.static, **group.phases[group.peak_phase]}
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size / GIB >= 0.05)
    where = f"ranks {group.first}-{group.last}" if group.last > group.first else f"rank {group.first}"
    hardware = job.config.hardware
    found = (
        f"{group.peak / GIB:.1f} GiB needed in {group.peak_phase} ({listed}), "
        f"{available_bytes(job.config) / GIB:.1f} usable of {hardware.memory_gib:g}"
    )
    return UserError(where, found, fix(job))


def fix(job: Job) -> str:
    """The smallest changes of options (at most three together) after which every rank's memory is enough."""
    config, models = job.config, (job.policy.hf, job.judge.hf)
    changes = list(possible_changes(config))
    found: list[str] = []
    for size in (1, 2, 3):
        for chosen in combinations(changes, size):
            options = [name for change in chosen for name in change]
            if len(set(options)) == len(options):
                merged = {name: value for change in chosen for name, value in change.items()}
                if _fits_with(config, merged, *models):
                    found.append(" ".join(f"--{name} {_shown(value)}" for name, value in merged.items()))
            if len(found) == 3:
                break
        if found:
            return "fits with " + ", or ".join(found)
    return "no three changes of recompute, micro-batches or layout are enough: add nodes, or try --suggest"


def possible_changes(config: PlanConfig) -> Iterator[Change]:
    """Changes that save memory, the cheapest first."""
    p, c, r = config.policy, config.judge, config.rollout
    work = workload(config)
    for name, section in (("policy", p), ("judge", c)):
        for recompute in {"none": ("selective", "full"), "selective": ("full",), "full": ()}[section.recompute]:
            yield {f"{name}.recompute": recompute}
    if p.micro_batch_tokens >= 2 * work.sequence:
        yield {"policy.micro_batch_tokens": work.sequence}
    if c.micro_batch_tokens >= 2 * work.judge_tree:
        yield {"judge.micro_batch_tokens": work.judge_tree}
    if in_ranks(config):
        yield {"rollout.engine": "megatron"}
    for divisor in (2, 4, 8):
        if r.batch_size >= divisor:
            yield {"rollout.batch_size": r.batch_size // divisor}
    if not c.offload and not c.ranks:
        yield {"judge.offload": True}
    sections = [("policy", p.layout), ("judge", c.layout)]
    if config.eval.judge.model is not None:
        sections.append(("eval.judge", config.eval.judge.layout))
    for name, layout in sections:
        for factor in (2, 4, 8):
            if layout.tp * factor <= config.gpus_per_node:
                yield {f"{name}.layout.tp": layout.tp * factor, f"{name}.layout.sp": True}
            yield {f"{name}.layout.ep": layout.ep * factor}
        if layout.stage_layers is None and layout.vpp is None:
            for factor in (2, 4):
                yield {f"{name}.layout.pp": layout.pp * factor}


def changed(config: PlanConfig, change: Change) -> PlanConfig:
    """The config with dotted options set."""
    for option, value in change.items():
        config = _with(config, option.split("."), value)
    return config


def _with(section, names: list[str], value):
    if len(names) == 1:
        return replace(section, **{names[0]: value})
    return replace(section, **{names[0]: _with(getattr(section, names[0]), names[1:], value)})


def _fits_with(config: PlanConfig, change: Change, policy: HFModel, judge: HFModel) -> bool:
    job = try_job(changed(config, change), policy, judge, count_stages_by_formula)
    return job is not None and all(fits(group, config) for group in rank_memory(job))


def try_job(config: PlanConfig, policy: HFModel, judge: HFModel, count: CountStages) -> Job | None:
    """The job, or None where its layouts do not fit the world or the models."""
    from g2r_megatron.config.options import Precision
    from g2r_megatron.model.build import check_model

    world = config.nodes * config.gpus_per_node
    try:
        if config.eval.judge.model is not None:
            check_layout("eval.judge", config.eval.judge.layout, world, config.judge.ranks)
        for name, hf, section in (("policy", policy, config.policy), ("judge", judge, config.judge)):
            check_layout(name, section.layout, world, config.judge.ranks)
            check_model(name, hf, section.layout, Precision(dtype=section.precision.dtype), "torch")
        return plan_job(config, policy, judge, count)
    except UserError:  # that is the answer: the layout does not fit
        return None


def _shown(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- what is worth knowing --------------------------------------------------------------------------------------------


def job_notes(job: Job, work: Workload) -> list[str]:
    """What works, but perhaps not as the user intended."""
    config, notes = job.config, []
    if on_servers(config):
        notes.append(
            "sampling on servers (rollout.vllm.urls) is not in the plan: it takes the job's time, but not its GPUs"
        )
    if work.sequence > config.policy.micro_batch_tokens:
        notes.append(
            f"a prompt and response at their limits ({work.sequence} tokens) exceed policy.micro_batch_tokens "
            f"{config.policy.micro_batch_tokens}: such a sequence is a micro-batch of its own"
        )
    if work.judge_input > config.judge.max_length:
        notes.append(
            f"a judge input at the limits ({work.judge_input} tokens) exceeds judge.max_length "
            f"{config.judge.max_length}: training stops at such a row"
        )
    elif work.pooled and work.judge_tree > config.judge.max_length:
        notes.append(
            f"judge.credit=per_response at the limits needs {work.judge_tree} tokens, more than judge.max_length "
            f"{config.judge.max_length}: training stops at such a row"
        )
    for model, length in ((job.policy, work.sequence), (job.judge, work.judge_input)):
        positions = model.hf.positions
        if length > positions:
            notes.append(f"{model.name}: {length} tokens at the limits, the model was made for {positions}")
        if model.layout.tp > config.gpus_per_node:
            notes.append(f"{model.name}.layout.tp {model.layout.tp} spans nodes of {config.gpus_per_node}: very slow")
    if work.responses % job.policy.dp:
        notes.append(f"{work.responses} responses a step are uneven over {job.policy.dp} policy replicas: some idle")
    if config.judge.offload:
        notes.append(f"judge.offload pins {_host_gib(job.judge, config):.0f} GiB of host memory on each node")
    if job.gold is not None:
        notes.append(
            f"eval.judge pins {_host_gib(job.gold, config):.0f} GiB of host memory on each node between evaluations, whose "
            "time is not in the plan"
        )
    return notes


def _host_gib(model: PlannedModel, config: PlanConfig) -> float:
    """Of a node, whose ranks all keep their weights in host memory."""
    return max(model.weight_bytes(stage) for stage in range(model.layout.pp)) / GIB * config.gpus_per_node
