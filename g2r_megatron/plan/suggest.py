"""`g2r plan --suggest`: layouts of policy and judge that fit a number of nodes, the cheapest estimated step first."""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace

from g2r_megatron.config.options import Dtype, Layout
from g2r_megatron.config.presets import OWN_RANKS_PARTS
from g2r_megatron.errors import UserError
from g2r_megatron.model.hf import HFModel
from g2r_megatron.plan.checks import Problems
from g2r_megatron.plan.config import GIB, PlanConfig
from g2r_megatron.plan.cost import step_phases, step_seconds
from g2r_megatron.plan.models import Job
from g2r_megatron.plan.planner import count_stages_as_built, count_stages_by_formula, fits, try_job
from g2r_megatron.plan.rank_memory import rank_memory

SHOWN = 2  # of each place of the judge
TRIED = 300  # pairs of layouts whose memory is computed, for each place of the judge
SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass
class Suggestion:
    """A job that fits, with the options that make it out of the config it was asked for."""

    job: Job
    seconds: float
    peak_gib: float

    @property
    def options(self) -> str:
        """What to add to the command line."""
        config, parts = self.job.config, []
        for name in ("policy", "judge"):
            section = getattr(config, name)
            layout = section.layout
            for option in ("tp", "pp", "ep", "sp"):
                value = getattr(layout, option)
                parts.append(f"--{name}.layout.{option} {str(value).lower()}")
            parts.append(f"--{name}.recompute {section.recompute}")
        parts.append(f"--judge.ranks {config.judge.ranks} --judge.offload {str(config.judge.offload).lower()}")
        return " ".join(parts)


def suggest(config: PlanConfig, policy: HFModel, judge: HFModel, problems: Problems) -> list[Suggestion]:
    """Jobs that fit, fastest first: the best of each place of the judge. Each one has been built on the meta device."""
    found: list[Suggestion] = []
    for place in judge_places(config):
        found += _best_of_place(place, policy, judge)
    counted: dict = {}

    def count(name: str, hf: HFModel, layout: Layout, dtype: Dtype, ranks: int) -> list:
        """As built, each model and layout once."""
        key = name, str(layout), ranks
        if key not in counted:
            counted[key] = count_stages_as_built(name, hf, layout, dtype, ranks)
        return counted[key]

    built = [s for s in found if try_job(s.job.config, policy, judge, count) is not None]
    if not built:
        world = config.nodes * config.gpus_per_node
        problems.append(UserError("--suggest", f"no layout fits {world} GPUs", "add nodes, or shorten the limits"))
    return sorted(built, key=lambda s: s.seconds)


def judge_places(config: PlanConfig) -> Iterator[PlanConfig]:
    """The config with the judge on all ranks, on them but offloaded, and on ranks of its own (whole nodes, or halves)."""
    for offload in (False, True):
        yield replace(config, judge=replace(config.judge, ranks=0, parts=1, offload=offload))
    per_node, world = config.gpus_per_node, config.nodes * config.gpus_per_node
    whole = [n * per_node for n in range(1, config.nodes)]
    for ranks in sorted({*whole, per_node // 4, per_node // 2}):
        if 0 < ranks < world and (ranks in whole or config.nodes <= 2):
            parts = min(OWN_RANKS_PARTS, config.rollout.prompts_per_step)
            yield replace(config, judge=replace(config.judge, ranks=ranks, parts=parts, offload=False))


def candidates(hf: HFModel, ranks: int, per_node: int) -> Iterator[tuple[Layout, str]]:
    """Layouts that divide the model and the ranks, with each kind of recompute; tensor parallel within a node."""
    kinds = ("none", "selective", "full") if hf.geometry.has_dense_layers else ("none", "full")
    for tp in (n for n in SIZES if n <= per_node):
        for pp in (n for n in SIZES if n <= 16 and hf.geometry.layers % n == 0):
            for ep in SIZES if hf.geometry.experts else (1,):
                if ranks % (tp * pp) == 0 and (ranks // pp) % ep == 0:
                    for recompute in kinds:
                        yield Layout(tp=tp, pp=pp, ep=ep, sp=tp > 1), recompute


def _with(config: PlanConfig, name: str, candidate: tuple[Layout, str]) -> PlanConfig:
    layout, recompute = candidate
    return replace(config, **{name: replace(getattr(config, name), layout=layout, recompute=recompute)})


def _best_of_place(config: PlanConfig, policy: HFModel, judge: HFModel) -> list[Suggestion]:
    """The fastest pairs of layouts that fit. Times of policy and judge are independent, memory is not."""
    world, own = config.nodes * config.gpus_per_node, config.judge.ranks
    options = {
        "policy": list(candidates(policy, world - own, config.gpus_per_node)),
        "judge": list(candidates(judge, own or world, config.gpus_per_node)),
    }
    first = {name: _first_valid(config, name, options, policy, judge) for name in options}
    if None in first.values():
        return []
    timed = {name: [] for name in options}
    base = _with(_with(config, "policy", first["policy"]), "judge", first["judge"])
    for name, choices in options.items():
        for number, choice in enumerate(choices):
            job = try_job(_with(base, name, choice), policy, judge, count_stages_by_formula)
            if job is not None and _can_fit(job, name):
                phases = [phase for phase in step_phases(job) if phase.model == name]
                timed[name].append((sum(p.seconds for p in phases), number, choice))
        timed[name].sort(key=lambda entry: entry[:2])
    found: list[Suggestion] = []
    for policy_choice, judge_choice in _cheapest_pairs(timed["policy"], timed["judge"]):
        pair = _with(_with(config, "policy", policy_choice), "judge", judge_choice)
        job = try_job(pair, policy, judge, count_stages_by_formula)
        memory = rank_memory(job) if job is not None else []
        if memory and all(fits(group, config) for group in memory):
            peak = max(group.peak for group in memory) / GIB
            found.append(Suggestion(job, step_seconds(job, step_phases(job)), peak))
            if len(found) == SHOWN:
                break
    return found


def _first_valid(config, name: str, options: dict, policy: HFModel, judge: HFModel):
    """Some choice for ``name`` that works together with some choice of the other model."""
    other = "judge" if name == "policy" else "policy"
    for choice in options[name]:
        for beside in options[other]:
            if try_job(_with(_with(config, name, choice), other, beside), policy, judge, count_stages_by_formula):
                return choice
    return None


def _can_fit(job: Job, name: str) -> bool:
    """Whether the model alone would fit: weights of the other are not counted."""
    own = {"policy": ("policy weights", "gradients", "optimizer", "reference weights"), "judge": ("judge weights",)}[
        name
    ]
    phases = {"policy": ("rollout", "old log-probs", "update"), "judge": ("verdicts", "attribution")}[name]
    for group in rank_memory(job):
        static = sum(size for part, size in group.static.items() if part in own)
        most = max([0, *(sum(parts.values()) for phase, parts in group.phases.items() if phase in phases)])
        if not fits(replace(group, static={"weights": static}, phases={"peak": {"peak": most}}), job.config):
            return False
    return True


def _cheapest_pairs(first: list, second: list) -> Iterator[tuple]:
    """Pairs of (seconds, number, choice) lists in the order of their summed seconds, ``TRIED`` of them at most."""
    heap = [(first[0][0] + second[0][0], 0, 0)] if first and second else []
    seen = {(0, 0)}
    for _ in range(TRIED):
        if not heap:
            return
        _, i, j = heapq.heappop(heap)
        yield first[i][2], second[j][2]
        for a, b in ((i + 1, j), (i, j + 1)):
            if a < len(first) and b < len(second) and (a, b) not in seen:
                seen.add((a, b))
                heapq.heappush(heap, (first[a][0] + second[b][0], a, b))
