"""config.json of a language model: which fields are used, which are ignored with one warning, which are refused.

What a config class of transformers declares is read as transformers reads it. Another field is refused if it is set and
its name suggests that it changes what a layer computes (undeclared_fields.py). All others (notes of trainers, savers and
vendors, generation options) are ignored.
"""

import copy
import dataclasses
import json
from pathlib import Path

from transformers import GenerationConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from g2r_megatron.data.stand_ins import check_stand_ins
from g2r_megatron.errors import UserError, warn
from g2r_megatron.model.families import FAMILIES, Family
from g2r_megatron.model.rope_fields import check_rope
from g2r_megatron.model.safetensors_format import INDEX, SINGLE
from g2r_megatron.model.undeclared_fields import contradicts, says_the_same, speaks_of_function

ADAPTER = "adapter_config.json"
NO_FIELDS = {"architectures", "transformers_version", "dtype", "torch_dtype"}  # read elsewhere, or by nobody
# Fields that change what the model computes in a way that we do not support, with the values that change nothing.
NEUTRAL = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0.0,),
    "router_jitter_noise": (0.0,),
    "use_mrope": (False,),
    "partial_rotary_factor": (1.0,),
}
DUAL_CHUNKS = "dual_chunk_attention_config"  # changes attention beyond its lengths alone: HFModel.positions
# Fields that transformers reads although its config classes do not declare them (any more), or that have no effect.
UNDECLARED = {
    "model_type",
    "rope_theta",
    "rope_scaling",
    "original_max_position_embeddings",
    "head_dim",
    "max_window_layers",
    "_name_or_path",
    "num_labels",
    DUAL_CHUNKS,
}
# Nothing here depends on them, and transformers refuses some spellings of them that are around.
NOT_READ = {
    "dtype",
    "torch_dtype",
    "use_cache",
    "initializer_range",
    *GenerationConfig._get_default_generation_params(),
}
AT_LEAST_ONE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "max_position_embeddings", "sliding_window", "moe_intermediate_size"),
    *("num_experts_per_tok", "decoder_sparse_step"),
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A checked config.json. ``fields``: of the language model alone; ``whole``: it was not part of a larger model."""

    config: PretrainedConfig
    family: Family
    is_reward_model: bool
    fields: dict
    whole: bool


def read_json(file: Path) -> dict:
    """The object in a JSON file. Raises ``UserError`` naming a file that is unreadable or holds something else."""
    check_stand_ins(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(str(file), f"not readable as JSON ({error})", "restore the file") from error
    if not isinstance(content, dict):
        raise UserError(str(file), f"holds a {type(content).__name__}", "must be a JSON object")
    return content


def read_config(directory: Path, option: str) -> ModelConfig:
    """Read and check ``directory``'s config.json; warns once of the fields that are ignored.

    Raises ``UserError`` naming the field for anything that we would not convert exactly.
    """
    _check_kind(directory, option)
    file = directory / "config.json"
    raw = read_json(file)
    fields = language_model_fields(raw)
    whole = fields is raw
    family = _family(file, fields)
    is_reward_model = _is_reward_model(file, fields, family)
    config = _as_transformers_reads(file, fields)
    aside = _left_aside(file, fields, config, family)
    if not whole:
        aside |= _around_it(file, {k: v for k, v in raw.items() if k not in fields})
    _check_values(file, fields, config)
    if aside:
        warn(f"{file}: fields that nothing here reads are left aside: {', '.join(sorted(aside))}")
    if is_reward_model and config.num_labels != 1:
        raise UserError(
            f"{file} id2label",
            f"{config.num_labels} labels"
            if {"id2label", "num_labels"} & fields.keys()
            else "missing, which means 2 labels",
            "a reward model has one label, its score: this one is a classifier",
        )
    return ModelConfig(config, family, is_reward_model, fields, whole)


def language_model_fields(raw: dict) -> dict:
    """The fields of the language model: ``raw`` itself, or its text_config where that is of a family that we know."""
    text = raw.get("text_config")
    if raw.get("model_type") in FAMILIES or not isinstance(text, dict) or text.get("model_type") not in FAMILIES:
        return raw
    shared = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    above = {name: raw[name] for name in shared if raw.get(name) is not None}
    return {**text, **above, "architectures": [FAMILIES[text["model_type"]].architecture]}


def _check_kind(directory: Path, option: str) -> None:
    """Raise ``UserError`` for a directory without a model. The error says what the files show the directory to be."""
    if (directory / ADAPTER).is_file():
        base = read_json(directory / ADAPTER).get("base_model_name_or_path") or "BASE"
        raise UserError(
            option,
            f"{directory} is a PEFT adapter ({ADAPTER})",
            'merge it into its model first: python -c "from peft import AutoPeftModelForCausalLM as M; m = M.from_pretrained('
            f"'{directory}'); m.merge_and_unload().save_pretrained('MERGED')\" (base model {base}), and copy the tokenizer to MERGED",
        )
    if (directory / "config.json").is_file():
        return
    own = (
        "params.json"
        if (directory / "params.json").is_file()
        else next((f.name for f in directory.glob("*.gguf")), None)
    )
    remedy = "must be a Hugging Face model directory"
    if own:
        raise UserError(option, f"{directory} has {own}, but no config.json: it is in another format", remedy)
    snapshots = sorted((directory / "snapshots").glob("*/config.json")) if (directory / "snapshots").is_dir() else []
    if snapshots:
        raise UserError(option, f"{directory} is a folder of the Hugging Face cache", f"give {snapshots[-1].parent}")
    raise UserError(option, f"{directory} has no config.json", remedy)


def _family(file: Path, fields: dict) -> Family:
    model_type = fields.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(f"{file} model_type", repr(model_type), f"must be one of {sorted(FAMILIES)}")
    if fields.get("quantization_config"):
        raise UserError(
            f"{file} quantization_config",
            json.dumps(fields["quantization_config"])[:60],
            "quantized checkpoints cannot be loaded; dequantize it first",
        )
    return FAMILIES[model_type]


def _is_reward_model(file: Path, fields: dict, family: Family) -> bool:
    """By ``architectures``; a model saved without its output layer's class counts as a language model."""
    names = fields.get("architectures") or [family.architecture]
    known = (family.architecture, family.architecture.replace("ForCausalLM", "Model"), family.reward_architecture)
    # PyTorch's fully_shard puts FSDP before a class's name; early Llama has "LLaMA".
    plain = [str(name).removeprefix("FSDP").casefold() for name in names] if isinstance(names, list) else names
    if plain not in [[name.casefold()] for name in known]:
        remedy = f"must be {[family.architecture]}, or of a reward model {[family.reward_architecture]}"
        raise UserError(f"{file} architectures", repr(names), remedy)
    return plain == [family.reward_architecture.casefold()]


def _as_transformers_reads(file: Path, fields: dict) -> PretrainedConfig:
    check_rope(file, fields)
    _check_dual_chunks(file, fields.get(DUAL_CHUNKS))
    config_class = CONFIG_MAPPING[fields["model_type"]]
    declared = _declared(config_class)
    read = {
        name: copy.deepcopy(value)
        for name, value in fields.items()
        if name in declared | UNDECLARED | NEUTRAL.keys() and name not in NOT_READ
        if value is not None or name in declared
    }
    for name, value in read.items():
        read[name] = _of_its_type(file, name, value, config_class)
    try:
        return config_class.from_dict(read)
    except Exception as error:  # its validators raise classes of their own
        reason = " ".join(str(error).split())
        words = reason.lower().replace(" ", "_")  # "The hidden size (33) is not ..."
        named = [name for name in read if name in words or name.removeprefix("num_") in words]
        where = f"{file} {', '.join(named)}".rstrip()
        raise UserError(where, f"refused by transformers ({reason})", "correct the file") from error


def _declared(config_class: type[PretrainedConfig]) -> set[str]:
    names = {f.name for f in dataclasses.fields(config_class)}
    return names | set(config_class.attribute_map) | set(config_class.attribute_map.values())


def _of_its_type(file: Path, name: str, value, config_class: type[PretrainedConfig]):
    """A value as transformers wants it: 0 and 1 for a switch, 4096.0 and "SiLU" are other spellings."""
    if value is None:
        return value
    if name in AT_LEAST_ONE:
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int or value < 1:
            raise UserError(f"{file} {name}", repr(value), "must be a whole number of at least 1")
    if name in ("rope_scaling", "rope_parameters") and isinstance(value, dict):
        return {key: inner for key, inner in value.items() if inner is not None}
    if name == "hidden_act" and isinstance(value, str) and value.lower() in NEUTRAL["hidden_act"]:
        return value.lower()
    is_switch = any(f.name == name and type(f.default) is bool for f in dataclasses.fields(config_class))
    return bool(value) if is_switch and type(value) is int and value in (0, 1) else value


def _left_aside(file: Path, fields: dict, config: PretrainedConfig, family: Family) -> set[str]:
    """Names of set fields that nothing reads. Raises ``UserError`` for one that may change what the model computes."""
    known = _declared(type(config)) | UNDECLARED | NEUTRAL.keys() | NOT_READ | NO_FIELDS
    aside = set()
    for name in sorted(fields.keys() - known):
        value = fields[name]
        if contradicts(name, value):
            raise UserError(f"{file} {name}", json.dumps(value), "is not supported; must be true")
        if not value or says_the_same(name, value, config, family):  # null, false, 0, empty; or nothing new
            continue
        if name == "transformers_weights" and value in (SINGLE, INDEX):
            continue
        if speaks_of_function(name) or name == "transformers_weights":
            raise _refused(file, name, value, f"is not a field of {type(config).__name__}")
        aside.add(name)
    return aside


def _around_it(file: Path, fields: dict) -> set[str]:
    """As ``_left_aside``, of the fields beside a language model in a larger model's file."""
    aside = {name for name in fields.keys() - NO_FIELDS - {"text_config", "model_type"} if fields[name]}
    for name in sorted(filter(speaks_of_function, aside)):
        raise _refused(file, name, fields[name], "is not part of the language model")
    return aside


def _refused(file: Path, name: str, value, about: str) -> UserError:
    remedy = "it may change what the model computes; remove it if it does not"
    return UserError(f"{file} {name}", f"{json.dumps(value)[:60]} {about}", remedy)


def _check_dual_chunks(file: Path, chunks) -> None:
    """Raise ``UserError`` unless ``dual_chunk_attention_config`` is null or says up to where attention is plain."""
    if not chunks:
        return
    where = f"{file} {DUAL_CHUNKS}"
    sizes = ("chunk_size", "local_size")
    if not isinstance(chunks, dict) or any(type(chunks.get(name)) is not int for name in sizes):
        raise UserError(where, json.dumps(chunks)[:60], f"must be null or an object with {' and '.join(sizes)}")
    if not 0 < chunks["local_size"] < chunks["chunk_size"]:
        raise UserError(where, json.dumps(chunks)[:60], "local_size must be above 0 and below chunk_size")
    if other := [name for name in chunks.keys() - {*sizes, "original_max_position_embeddings"} if chunks[name]]:
        raise UserError(f"{where}.{other[0]}", json.dumps(chunks[other[0]])[:60], "is not supported; must be null")


def _check_values(file: Path, fields: dict, config: PretrainedConfig) -> None:
    """Raise an error for a config feature that the Megatron-Core model would silently ignore."""

    def refuse(field: str, value, valid: str):
        raise UserError(f"{file} {field}", repr(value), f"is not supported; must be {valid}")

    for field, neutral in NEUTRAL.items():
        value = getattr(config, field, None)
        always_has_it = field == "attention_bias" and FAMILIES[config.model_type].qkv_bias  # and reads no field of it
        if value is not None and value not in neutral and not always_has_it:
            refuse(field, value, repr(neutral[0]))
    types = getattr(config, "layer_types", None)
    if types is not None:
        if unknown := sorted(set(types) - {"full_attention", "sliding_attention"}):
            refuse("layer_types", unknown[0], "full_attention or sliding_attention")
        if len(types) != config.num_hidden_layers:
            refuse("layer_types", f"{len(types)} entries", f"one for each of {config.num_hidden_layers} layers")
        if "sliding_attention" in types and getattr(config, "sliding_window", None) is None:
            refuse("layer_types", "sliding_attention", "full_attention in a model without a sliding window")
    heads = config.num_attention_heads
    if config.hidden_size % heads and not getattr(config, "head_dim", None):
        refuse("num_attention_heads", heads, f"a divisor of hidden_size {config.hidden_size}")
    if heads % (getattr(config, "num_key_value_heads", None) or heads):
        refuse("num_key_value_heads", config.num_key_value_heads, f"a divisor of num_attention_heads {heads}")
    if (getattr(config, "head_dim", None) or config.hidden_size // heads) % 2:
        refuse("head_dim", getattr(config, "head_dim", config.hidden_size // heads), "even, for rotary positions")
    experts = getattr(config, "num_local_experts", 0)
    if FAMILIES[config.model_type].dense is None and experts < 1:
        refuse("num_local_experts", experts, "at least 1")
    if experts and config.num_experts_per_tok > experts:
        refuse("num_experts_per_tok", config.num_experts_per_tok, f"at most the {experts} experts")
