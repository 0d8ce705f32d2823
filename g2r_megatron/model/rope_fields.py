"""The rotary position fields of config.json: which tables we have, and what belongs to each.

Tables are transformers' own (model/hf.py). transformers only logs a key that a rope type does not know, and takes a
table without a type for the unscaled one; here both are refused.
"""

from pathlib import Path

from g2r_megatron.errors import UserError

# type -> numbers that it needs, other keys that it reads
ROPE_TYPES = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        ("factor",),
        (
            *("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale"),
            *("mscale_all_dim", "truncate"),
        ),
    ),
}
OF_ALL = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
NOTES = {"finetuned"}  # of the first YaRN checkpoints
FACTORS = {"factor", "attn_factor", "extrapolation_factor"}  # 1 changes nothing, also where a type does not read it


def check_rope(file: Path, fields: dict) -> None:
    """Raise ``UserError`` naming the field of ``file`` whose rotary positions we would not compute as it says."""
    _check_number(f"{file} rope_theta", fields.get("rope_theta"), needed=False)
    where = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    table = fields.get(where)
    if not table:
        return
    where = f"{file} {where}"
    if not isinstance(table, dict):
        raise UserError(where, repr(table), "must be null or an object with rope_type")
    kind = table.get("rope_type", table.get("type"))  # transformers stops at rope_type null beside a type
    table = {name: value for name, value in table.items() if value is not None}
    scaling = {name for name, value in table.items() if name not in OF_ALL and not _is_one(name, value)}
    if kind is None and not scaling:
        kind = "default"
    if kind is None:
        raise UserError(where, f"has no rope_type, but {sorted(table)}", f"give rope_type: one of {list(ROPE_TYPES)}")
    if kind not in ROPE_TYPES:
        raise UserError(f"{where} rope_type", repr(kind), f"is not supported; must be one of {list(ROPE_TYPES)}")
    if table.get("type", kind) != kind:
        raise UserError(
            f"{where} type", f"{table['type']!r}, while rope_type is {kind!r}", "keep the one that is right"
        )
    if table.get("partial_rotary_factor") not in (None, 1.0):
        raise UserError(f"{where} partial_rotary_factor", repr(table["partial_rotary_factor"]), "must be 1.0")
    numbers, others = ROPE_TYPES[kind]
    for name in numbers:
        _check_number(f"{where}.{name}", table.get(name), needed=True)
    for name in ("rope_theta", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"):
        _check_number(f"{where}.{name}", table.get(name), needed=False)
    unknown = [name for name in sorted(scaling - NOTES - {*numbers, *others}) if table[name]]
    if unknown:
        raise UserError(
            f"{where}.{unknown[0]}",
            f"{table[unknown[0]]!r} is not read by rope type {kind}",
            "remove it if the model does not need it",
        )


def _is_one(name: str, value) -> bool:
    return name in FACTORS and type(value) in (int, float) and value == 1


def _check_number(where: str, value, needed: bool) -> None:
    if value is None and not needed:
        return
    if type(value) not in (int, float) or not value > 0:
        raise UserError(where, repr(value), "must be a number above 0")
