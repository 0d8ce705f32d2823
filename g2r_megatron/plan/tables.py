"""A plan on the terminal, as plain text and as JSON."""

import json
from dataclasses import asdict, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from g2r_megatron.config.options import Layout
from g2r_megatron.plan.config import GIB
from g2r_megatron.plan.engine import in_ranks
from g2r_megatron.plan.models import PlannedModel
from g2r_megatron.plan.planner import Plan, available_bytes, fits
from g2r_megatron.plan.rank_memory import RankMemory
from g2r_megatron.plan.suggest import Suggestion
from g2r_megatron.plan.workload import workload

PLAIN_WIDTH = 160
COLUMNS = (
    "policy weights",
    "gradients",
    "optimizer",
    "reference weights",
    "judge weights",
    "KV cache",
    "activations",
    "row",
)
GB = 1e9


def console() -> Console:
    """Colours and lines on a terminal; elsewhere plain text of a fixed width."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=PLAIN_WIDTH, no_color=True)


def _table(out: Console, title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD if out.is_terminal else box.ASCII2)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right")
    return table


def layout_text(layout: Layout) -> str:
    """Sizes that are not 1, such as "tp2 pp4 ep8 sp"."""
    parts = [f"{name}{getattr(layout, name)}" for name in ("tp", "pp", "vpp", "cp", "ep", "etp")]
    parts = [part for part in parts if not part.endswith("None") and part.rstrip("0123456789") + "1" != part]
    return " ".join(parts + (["sp"] if layout.sp else [])) or "tp1"


def ranks_text(first: int, last: int) -> str:
    return f"{first}-{last}" if last > first else str(first)


def _model_line(model: PlannedModel) -> str:
    total = sum(stage.total for stage in model.stages)
    per_rank = ", ".join(dict.fromkeys(f"{stage.total / 1e9:.3f}" for stage in model.stages))
    return (
        f"{model.name}: {model.hf.path} on ranks {ranks_text(model.first, model.first + model.ranks - 1)}, "
        f"{layout_text(model.layout)} dp{model.dp}, {model.kind.dtype}{' fp8' if model.fp8 else ''}, recompute "
        f"{model.kind.recompute}; {per_rank} billion parameters a rank"
        + (f" ({total / 1e9:.3f} a pipeline of them)" if len(model.stages) > 1 else "")
    )


def _role(group: RankMemory, plan: Plan) -> str:
    names = []
    for name, stage, model in (
        ("policy", group.policy_stage, plan.job.policy),
        ("judge", group.judge_stage, plan.job.judge),
    ):
        if stage is not None:
            names.append(name if model.layout.pp == 1 else f"{name} {stage + 1}/{model.layout.pp}")
    return " + ".join(names)


def print_plan(plan: Plan, out: Console) -> None:
    """Tables of memory and time, notes and assumptions. Problems are printed by the caller."""
    if plan.job is not None:
        for model in filter(None, (plan.job.policy, plan.job.judge, plan.job.reference, plan.job.gold)):
            label = "reference" if model is plan.job.reference else model.name
            out.print(_model_line(replace(model, name=label)), soft_wrap=True)
        out.print()
        out.print(_memory_table(plan, out))
        out.print(_time_table(plan, out))
        where = "one after the other" if plan.job.shared else "the judge beside sampling and log-probs"
        out.print(f"step: about {plan.step_seconds:.1f} s ({where}), {_busy(plan)}", soft_wrap=True)
    for note in plan.notes:
        out.print(f"note: {note}", soft_wrap=True)
    if plan.job is not None:
        out.print(f"assumed: {'; '.join(assumptions(plan))}", soft_wrap=True)


def _busy(plan: Plan) -> str:
    tokens = workload(plan.config).responses * workload(plan.config).response
    text = f"{tokens / plan.step_seconds:.0f} response tokens/s"
    if plan.job.shared:
        return text
    judge = sum(phase.seconds for phase in plan.phases if phase.model == "judge")
    policy = sum(phase.seconds for phase in plan.phases if phase.model == "policy")
    return f"{text}; policy ranks busy {policy / plan.step_seconds:.0%}, judge ranks {judge / plan.step_seconds:.0%}"


def _memory_table(plan: Plan, out: Console) -> Table:
    """GiB a rank: what it always holds, and the phase that needs the most."""
    shown = [n for n in COLUMNS if any(n in {**g.static, **g.phases[g.peak_phase]} for g in plan.memory)]
    table = _table(out, "GiB a rank, at its fullest", "ranks", "role", "fullest in", *shown, "needed", "usable")
    for group in plan.memory:
        parts = {**group.static, **group.phases[group.peak_phase]}
        usable = available_bytes(plan.config) / GIB
        table.add_row(
            ranks_text(group.first, group.last),
            _role(group, plan),
            group.peak_phase,
            *(f"{parts[name] / GIB:.1f}" if name in parts else "" for name in shown),
            f"{group.peak / GIB:.1f}",
            f"{usable:.1f}" + ("" if fits(group, plan.config) else " (too much)"),
            style=None if fits(group, plan.config) else "red",
        )
    return table


def _time_table(plan: Plan, out: Console) -> Table:
    table = _table(
        out,
        "A step at the limits; work and bytes sent are of one rank",
        *("phase", "model", "micro-batches", "tokens each", "TFLOP", "TP GB", "EP GB", "PP GB", "DP GB"),
        *("compute s", "links s", "with bubbles s"),
    )
    for p in plan.phases:
        table.add_row(
            *(p.name, p.model, str(p.micro_batches), str(p.tokens), f"{p.tflop:.0f}"),
            *(f"{sent / GB:.1f}" for sent in (p.tp_bytes, p.ep_bytes, p.pp_bytes, p.dp_bytes)),
            *(f"{s:.1f}" for s in (p.compute_s, p.communication_s, p.seconds)),
        )
    return table


def assumptions(plan: Plan) -> list[str]:
    """The assumptions behind the numbers."""
    h, work = plan.config.hardware, workload(plan.config)
    lines = [
        f"{work.responses} responses of {work.response} tokens to prompts of {work.prompt} (the limits: an upper bound)",
        f"{work.items} criteria of {work.criterion} tokens, {work.attributed:g} of them with a backward pass",
        f"{h.tflops:g} TFLOP/s bf16 (FP8 the same), {h.fp32_tflops:g} fp32, of which {h.mfu:.0%} are reached",
        f"decoding reads memory at {h.memory_use:.0%} of {h.memory_gb_s:g} GB/s, and launches an operation in {h.launch_us:g} us; "
        f"its prompts have {work.prompt * (1 - plan.config.prompt_spread):.0f} to {work.prompt} tokens",
        *(("vLLM replays captured graphs of the whole policy on every rank",) if in_ranks(plan.config) else ()),
        f"NVLink {h.nvlink_gb_s:g} and network {h.network_gb_s:g} GB/s a GPU and direction, {h.link_use:.0%} reached, not "
        "overlapped with compute",
        f"{h.reserve_gib:g} of {h.memory_gib:g} GiB for CUDA, NCCL and fragments",
        "experts evenly used; attention without score matrices",
    ]
    models = (plan.job.policy, plan.job.judge)
    if any(model.kind.te for model in models):
        lines.append("activations of Transformer Engine's layers follow from what they save, not measured on a GPU")
    if plan.config.judge.offload:
        lines.append(f"host memory {h.host_gb_s:g} GB/s a GPU")
    return lines


def print_suggestions(suggestions: list[Suggestion], out: Console) -> None:
    """A table, and the options of each row to paste."""
    table = _table(out, "Layouts that fit", "", "judge on", "policy", "judge", "step s", "fullest rank GiB")
    for number, s in enumerate(suggestions, 1):
        p, c = s.job.policy, s.job.judge
        place = (
            ("all ranks, offloaded" if s.job.config.judge.offload else "all ranks")
            if s.job.shared
            else f"{c.ranks} of its own"
        )
        texts = [
            f"{layout_text(m.layout)} dp{m.dp}{f', {m.kind.recompute} recompute' if m.kind.recompute != 'none' else ''}"
            for m in (p, c)
        ]
        table.add_row(str(number), place, *texts, f"{s.seconds:.1f}", f"{s.peak_gib:.1f}")
    out.print(table)
    for number, s in enumerate(suggestions, 1):
        out.print(f"{number}: {s.options}", soft_wrap=True)


def plan_json(plan: Plan) -> str:
    """Everything that is printed, in bytes and seconds."""
    content: dict[str, Any] = {
        "fits": not plan.problems,
        "problems": [str(problem) for problem in plan.problems],
        "notes": plan.notes,
    }
    if plan.job is not None:
        content["models"] = [
            {"name": m.name, "layout": asdict(m.layout), "ranks": [m.first, m.first + m.ranks - 1], "dp": m.dp}
            | {"stages": [asdict(stage) | {"total": stage.total} for stage in m.stages]}
            for m in filter(None, (plan.job.policy, plan.job.judge, plan.job.reference, plan.job.gold))
        ]
        content["memory"] = [
            asdict(group) | {"peak": group.peak, "peak_phase": group.peak_phase} for group in plan.memory
        ]
        content["usable_bytes"] = available_bytes(plan.config)
        content["phases"] = [asdict(phase) for phase in plan.phases]
        content["step_seconds"] = plan.step_seconds
        content["assumptions"] = assumptions(plan)
    return json.dumps(content, indent=1)


def suggestions_json(suggestions: list[Suggestion], problems: list) -> str:
    """The rows of the table, with the options that make them."""
    rows = [{"step_seconds": s.seconds, "peak_gib": s.peak_gib, "options": s.options} for s in suggestions]
    return json.dumps({"suggestions": rows, "problems": [str(problem) for problem in problems]}, indent=1)
