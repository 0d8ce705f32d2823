"""Layouts checked against the world and the model, before any process group or weight exists."""

from g2r_megatron.config.options import Layout
from g2r_megatron.errors import UserError

SMALLEST_INTERLEAVED_PP = 3


def data_parallel_size(layout: Layout, world_size: int) -> int:
    """Ranks left over for data parallelism: world / (tp cp pp). Assumes a validated layout."""
    return world_size // (layout.tp * layout.cp * layout.pp)


def stages(layout: Layout) -> int:
    """Pipeline stages, virtual ones counted."""
    return layout.pp * (layout.vpp or 1)


def stage_layers(layout: Layout, layers: int) -> list[int]:
    """Layers of each stage in the order of the layers; virtual stage v of pipeline rank p is number v * pp + p."""
    return layout.stage_layers or [layers // stages(layout)] * stages(layout)


def check_layout(name: str, layout: Layout, world_size: int, judge_ranks: int = 0) -> None:
    """Raise ``UserError`` unless ``layout`` fits the ranks of its model. ``name`` is "policy" or "judge".

    ``world_size``: ranks of the job, the last ``judge_ranks`` of which are the judge's alone; 0: both models have all.
    """
    where = f"{name}.layout"
    for option in ("tp", "pp", "cp", "ep", "etp"):
        size = getattr(layout, option)
        if size < 1:
            raise UserError(f"{where}.{option}", str(size), "must be at least 1")
    if layout.cp != 1 and name == "policy":
        raise UserError(
            f"{where}.cp",
            str(layout.cp),
            "must be 1: sampling and log-probs have no context parallelism; only judge.layout.cp may be more",
        )
    if layout.vpp is not None and layout.vpp < 2:
        raise UserError(f"{where}.vpp", str(layout.vpp), "must be at least 2, or left out")
    if layout.vpp is not None and layout.pp < SMALLEST_INTERLEAVED_PP:
        # with two ranks the next and the previous stage are the same rank, and their messages get mixed up
        raise UserError(f"{where}.vpp", f"{layout.vpp} with pp {layout.pp}", "virtual stages need pp of 3 or more")
    if layout.sp and layout.tp == 1:
        raise UserError(
            f"{where}.sp", "true with tp 1", "sequence parallelism needs tp > 1; set sp false or tp 2 or more"
        )
    if not judge_ranks:
        _check_world(where, layout, world_size, f"the world of {world_size}", "start {} processes")
    elif name == "judge":
        _check_world(where, layout, judge_ranks, f"the {judge_ranks} of judge.ranks", "set judge.ranks to {}")
    else:
        left = world_size - judge_ranks
        _check_world(
            where,
            layout,
            left,
            f"the {left} that judge.ranks {judge_ranks} leaves of {world_size}",
            f"start {{}} processes besides the {judge_ranks}",
        )


def _check_world(where: str, layout: Layout, world_size: int, found: str, remedy: str) -> None:
    """``found`` says what the ``world_size`` ranks are, ``remedy`` how there can be {} of them."""
    ranks = layout.tp * layout.pp * layout.cp
    if world_size % ranks:
        fits = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise UserError(
            f"{where}.tp x {where}.cp x {where}.pp",
            f"{layout.tp} x {layout.cp} x {layout.pp} = {ranks} ranks do not divide {found}",
            f"choose sizes whose product is one of {fits}, or {remedy.format(ranks)}",
        )
    stage = world_size // layout.pp
    if stage % (layout.etp * layout.ep):
        raise UserError(
            f"{where}.etp x {where}.ep",
            f"{layout.etp} x {layout.ep} = {layout.etp * layout.ep} ranks do not divide the {stage} of a pipeline stage",
            f"choose sizes whose product is one of {[n for n in range(1, stage + 1) if stage % n == 0]}",
        )


def check_layout_for_model(
    name: str, layout: Layout, *, heads: int, kv_heads: int, ffn: int, layers: int, experts: int, expert_ffn: int
) -> None:
    """Raise ``UserError`` unless the model's dimensions divide over ``layout``."""
    tp = f"{name}.layout.tp"
    if heads % layout.tp:
        raise UserError(tp, f"{layout.tp} does not divide the {heads} attention heads", _divisors("tp", heads))
    if kv_heads % layout.tp and layout.tp % kv_heads:
        raise UserError(
            tp,
            f"{layout.tp} against {kv_heads} key-value heads",
            "one must divide the other; " + _divisors("tp", kv_heads),
        )
    if ffn % layout.tp:
        raise UserError(tp, f"{layout.tp} does not divide the feed-forward size {ffn}", _divisors("tp", ffn))
    _check_stages(name, layout, layers)
    _check_experts(name, layout, experts, expert_ffn)


def _check_stages(name: str, layout: Layout, layers: int) -> None:
    split, number = layout.stage_layers, stages(layout)
    where = f"{name}.layout.stage_layers"
    if split is None:
        if layers % number:
            option = f"{name}.layout.pp" if layout.vpp is None else f"{name}.layout.pp x {name}.layout.vpp"
            raise UserError(
                option, f"{number} does not divide the {layers} layers", _divisors("it", layers) + f", or give {where}"
            )
        return
    if len(split) != number or min(split) < 1 or sum(split) != layers:
        raise UserError(where, str(split), f"must be {number} numbers of at least 1 that add up to {layers} layers")


def _check_experts(name: str, layout: Layout, experts: int, expert_ffn: int) -> None:
    ep, etp = f"{name}.layout.ep", f"{name}.layout.etp"
    if not experts:
        for option, size in ((ep, layout.ep), (etp, layout.etp)):
            if size != 1:
                raise UserError(option, f"{size} for a model without experts", "must be 1")
        return
    if experts % layout.ep:
        raise UserError(ep, f"{layout.ep} does not divide the {experts} experts", _divisors("ep", experts))
    if expert_ffn % layout.etp:
        raise UserError(
            etp,
            f"{layout.etp} does not divide the experts' feed-forward size {expert_ffn}",
            _divisors("etp", expert_ffn),
        )
    if layout.tp > 1 and not layout.sp:
        raise UserError(
            f"{name}.layout.sp",
            f"false with tp {layout.tp} and experts",
            "Megatron-Core trains a mixture of experts with tensor parallelism only together with sp; set it true",
        )


def _divisors(option: str, number: int) -> str:
    return f"{option} may be one of {[n for n in range(1, min(number, 64) + 1) if number % n == 0]}"
