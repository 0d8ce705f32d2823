"""Bytes that a micro-batch of the judge needs besides the weights, and the check before it runs that they are free."""

from collections.abc import Sequence

from g2r_megatron.device import free_bytes, on_cpu
from g2r_megatron.errors import UserError
from g2r_megatron.judge.packing import Tree
from g2r_megatron.judge.suffixes import SuffixPlan, planned_tokens
from g2r_megatron.judge.types import JudgeInput
from g2r_megatron.model.build import MegatronModel
from g2r_megatron.model.hf import Geometry
from g2r_megatron.model.suffix_attention import scores_at_once
from g2r_megatron.parallel.microbatches import padded

GIB = 2**30


def judge_activation_bytes(
    geometry: Geometry,
    *,
    layers: int,
    row_tokens: int,
    verdicts: int = 1,
    tp: int = 1,
    sp: bool = False,
    cp: int = 1,
    etp: int = 1,
    bytes_per_number: int = 4,
    recompute: str = "none",
    backward: bool = True,
    window: bool = False,
    rows: float = 1,
) -> int:
    """Peak bytes of one rank while the judge runs a row of ``row_tokens``, above weights.

    ``layers`` on this rank (of all its virtual stages), ``verdicts`` in the row, ``bytes_per_number`` of activations (4
    fp32, 2 bf16), ``recompute`` as in the config ("selective" in a model with experts counts as "none"),
    ``backward``: the attribution pass, else the verdict pass,
    ``window``: some layers have a sliding window, ``rows``: micro-batches in flight
    (``rows_in_flight``). The formula is explained in judge/packing.py. Measured peaks of the attribution are 0.8 to 1
    of it. Those of the verdict pass, which is far smaller, are up to 1.25 of it. test_judge_memory.py and
    benchmarks/judge_growth.py compare the formula with measurements.
    """
    g, tokens = geometry, -(-row_tokens // cp)
    whole, attention = g.hidden / (tp if sp else 1), (g.heads + max(g.kv_heads, tp)) * g.head_dim / tp
    mlp = 2 * g.ffn / tp
    if g.experts:
        mlp = max(whole + 3 * g.experts_per_token * g.expert_ffn / etp, mlp if g.dense_layers else 0)
    kept = 2 * whole + 3 * attention + 2 * g.head_dim + mlp  # of a layer, a token
    if cp > 1:
        kept += 2 * max(g.kv_heads, tp) * g.head_dim / tp * cp  # keys and values of the whole row
    at_work = 4 * whole + 2 * attention + mlp
    numbers = at_work
    if backward:
        numbers += 4 * whole  # embeddings, directions, the leaf and its gradient
        if recompute == "full":
            numbers += rows * layers * whole + kept
        elif recompute == "selective" and not g.experts:
            numbers += rows * layers * (kept - mlp) + mlp
        else:
            numbers += rows * layers * kept
    logits = 12 * verdicts * g.padded_vocab(tp, 1) / tp
    if on_cpu():
        mask = bytes_per_number * row_tokens * tokens if window or cp > 1 else 0
    else:
        mask = 4 * row_tokens * tokens
    return round(bytes_per_number * tokens * numbers + logits + mask)


def rows_in_flight(pp: int, vpp: int | None) -> float:
    """Micro-batches whose activations the first pipeline stage holds at once, in Megatron-Core's schedules."""
    return pp if vpp is None else ((vpp + 1) * pp - 1) / vpp


def check_memory(model: MegatronModel, rows: Sequence[Sequence[Tree]], config, backward: bool) -> None:
    """Raise ``UserError`` with the numbers if this replica's largest of ``rows`` does not fit into free memory.

    ``config``: the JudgeConfig.
    """
    layout, bytes_per_number = model.groups.layout, model.config.params_dtype.itemsize
    layers = sum(len(chunk.decoder.layers) for chunk in model.chunks)
    need, tokens, verdicts = 0, 0, 0
    for row in rows:
        length = padded(sum(len(tree.ids) for tree in row), model.length_multiple)
        items = sum(len(tree.items) for tree in row)
        found = judge_activation_bytes(
            model.geometry,
            layers=layers,
            row_tokens=length,
            verdicts=items,
            tp=layout.tp,
            sp=layout.sp,
            cp=layout.cp,
            etp=layout.etp,
            bytes_per_number=bytes_per_number,
            recompute=config.recompute,
            backward=backward,
            window=model.hf.sliding_window is not None,
            rows=min(rows_in_flight(layout.pp, layout.vpp), len(rows)),
        )
        if found > need:
            need, tokens, verdicts = found, length, items
    if need > free_bytes():
        work = "attribution" if backward else "a verdict pass"
        _refuse(f"{work} over {tokens} tokens with {verdicts} criteria", need, config)


def suffix_activation_bytes(
    geometry: Geometry,
    *,
    layers: int,
    prefix_tokens: int,
    suffix_tokens: int,
    verdicts: int,
    tp: int = 1,
    cp: int = 1,
    bytes_per_number: int = 4,
    window: bool = False,
    rows: int = 1,
    backward: bool = True,
    **options,
) -> int:
    """Peak bytes of one rank while it runs a row of prefixes and a row of suffixes (judge/suffixes.py).

    ``options``: the others of ``judge_activation_bytes``. The prefixes need the memory of one working layer, and the
    keys and values of every layer, all of them on each context parallel rank. Suffixes need what any row needs.
    """
    common = dict(tp=tp, cp=cp, bytes_per_number=bytes_per_number, rows=rows, **options)
    keys = 2 * bytes_per_number * max(geometry.kv_heads, tp) * geometry.head_dim / tp * prefix_tokens * layers * rows
    prefix = judge_activation_bytes(
        geometry, layers=layers, row_tokens=prefix_tokens, verdicts=0, backward=False, window=window, **common
    )
    suffixes = judge_activation_bytes(
        geometry, layers=layers, row_tokens=suffix_tokens, verdicts=verdicts, backward=backward, **common
    )
    masks = 4 * suffix_tokens / cp * (prefix_tokens + suffix_tokens) if window or cp > 1 else 0
    return round(keys + max(prefix, suffixes + masks) + 3 * 4 * scores_at_once(on_cpu=on_cpu()))


def check_suffix_memory(
    model: MegatronModel, plans: Sequence[SuffixPlan], inputs: Sequence[JudgeInput], config, backward: bool = True
) -> None:
    """As ``check_memory``, of rows of suffixes; ``config``: the JudgeConfig."""
    layout, need, tokens, verdicts = model.groups.layout, 0, (0, 0), 0
    for plan in plans:
        prefix, suffixes = planned_tokens(plan, inputs)
        count = sum(len(unit.suffixes) for unit in plan.units)
        found = suffix_activation_bytes(
            model.geometry,
            layers=sum(len(chunk.decoder.layers) for chunk in model.chunks),
            prefix_tokens=padded(prefix, model.length_multiple),
            suffix_tokens=padded(suffixes, model.length_multiple),
            verdicts=count,
            tp=layout.tp,
            sp=layout.sp,
            cp=layout.cp,
            etp=layout.etp,
            bytes_per_number=model.config.params_dtype.itemsize,
            recompute=config.recompute,
            window=model.hf.sliding_window is not None,
            rows=int(min(rows_in_flight(layout.pp, layout.vpp), len(plans))),
            backward=backward,
        )
        if found > need:
            need, tokens, verdicts = found, (prefix, suffixes), count
    if need > free_bytes():
        work = f"{'attribution' if backward else 'a pass'} over {tokens[1]} tokens with {verdicts} verdicts behind {tokens[0]} tokens"
        _refuse(work, need, config)


def _refuse(work: str, need: float, config) -> None:
    raise UserError(
        "judge.micro_batch_tokens",
        f"{work} needs about {need / GIB:.2f} GiB on each rank, {free_bytes() / GIB:.2f} GiB are free "
        f"(micro_batch_tokens {config.micro_batch_tokens})",
        "lower it, set judge.recompute to full, spread the judge with judge.layout, or shorten responses",
    )
