"""Layouts checked against the world and the model, before any process group or weight exists."""

from g2r_megatron.config import Layout
from g2r_megatron.errors import UserError


def data_parallel_size(layout: Layout, world_size: int) -> int:
    """Ranks left over for data parallelism: world / (tp cp pp). Assumes a validated layout."""
    return world_size // (layout.tp * layout.cp * layout.pp)


def check_layout(name: str, layout: Layout, world_size: int) -> None:
    """Raise ``UserError`` unless ``layout`` fits the world. ``name`` is "policy" or "judge"."""
    where = f"{name}.layout"
    for option in ("tp", "pp", "cp", "ep", "etp"):
        size = getattr(layout, option)
        if size < 1:
            raise UserError(f"{where}.{option}", str(size), "must be at least 1")
    for option in ("cp", "ep", "etp"):
        if getattr(layout, option) != 1:
            raise UserError(f"{where}.{option}", str(getattr(layout, option)), "only 1 is supported in this version")
    if layout.vpp is not None:
        raise UserError(
            f"{where}.vpp", str(layout.vpp), "virtual pipeline stages are not supported in this version; leave it out"
        )
    if layout.sp and layout.tp == 1:
        raise UserError(
            f"{where}.sp", "true with tp 1", "sequence parallelism needs tp > 1; set sp false or tp 2 or more"
        )
    ranks = layout.tp * layout.pp * layout.cp
    if world_size % ranks:
        fits = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise UserError(
            f"{where}.tp x {where}.pp",
            f"{layout.tp} x {layout.pp} = {ranks} ranks do not divide the world of {world_size}",
            f"choose sizes whose product is one of {fits}, or start {ranks} processes",
        )


def check_layout_for_model(name: str, layout: Layout, *, heads: int, kv_heads: int, ffn: int, layers: int) -> None:
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
    if layers % layout.pp:
        raise UserError(
            f"{name}.layout.pp", f"{layout.pp} does not divide the {layers} layers", _divisors("pp", layers)
        )


def _divisors(option: str, number: int) -> str:
    return f"{option} may be one of {[n for n in range(1, min(number, 64) + 1) if number % n == 0]}"
