"""config.json of a language model: which fields are used, which are ignored with one warning, which are refused.

What a config class of transformers declares is read as transformers reads it. Another field is refused if it is set and
its name suggests that it changes what a layer computes: transformers would ignore it, but the model's own code uses it.
All others (notes of trainers, savers and vendors, generation options) are ignored.
"""

import copy
import dataclasses
import json
import re
from pathlib import Path

from transformers import GenerationConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from g2r_megatron.data.stand_ins import check_stand_ins
from g2r_megatron.errors import UserError, warn
from g2r_megatron.model.families import FAMILIES, Family
from g2r_megatron.model.rope_fields import check_rope

ADAPTER = "adapter_config.json"
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
}
# Nothing here depends on them, and transformers refuses some spellings of them that are around.
NOT_READ = {
    "dtype",
    "torch_dtype",
    "use_cache",
    "initializer_range",
    *GenerationConfig._get_default_generation_params(),
}
# Beginnings of words in the names of fields that change what a layer computes.
FUNCTION_WORDS = (
    *("rope", "rotary", "yarn", "ntk", "alibi", "norm", "rmsnorm", "layernorm", "qk", "scal", "multipl", "softcap"),
    *("logit", "clip", "attn", "attention", "act", "expert", "moe", "rout", "bias", "window", "sliding", "sink", "mup"),
    *("residual", "layer", "head", "mlp", "ffn", "lora", "mla", "tie", "quant", "sparse", "mamba", "ssm", "conv"),
)
# Words for training, for the choice of a kernel, or for printing. A name with one of them is ignored.
NOTES = re.compile(
    r"dropout|pdrop|layerdrop|init|loss|implementation|flash|sdpa|xformers|eager|output_|lora_(alpha|r)$"
)
OTHER_SENSES = re.compile(
    r"vision|visual|image|video|audio|speech|sound|multi_?modal|multimodal|projector|^mm_|processor|text_config$"
)
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
        content = json.loads(file.read_text(encoding="utf-8"))
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
    aside = _left_aside(file, fields, config)
    if not whole:
        aside |= _left_aside(file, {k: v for k, v in raw.items() if k not in fields}, None)
    _check_values(file, fields, config)
    if aside:
        warn(f"{file}: fields that nothing here reads are left aside: {', '.join(sorted(aside))}")
    if is_reward_model and config.num_labels != 1:
        raise UserError(
            f"{file} id2label",
            f"{config.num_labels} labels" if "id2label" in fields else "missing, which means 2 labels",
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
            f"{file} quantization_config", "set", "quantized checkpoints cannot be loaded; dequantize it first"
        )
    return FAMILIES[model_type]


def _is_reward_model(file: Path, fields: dict, family: Family) -> bool:
    """By ``architectures``; a model saved without its output layer's class counts as a language model."""
    names = fields.get("architectures") or [family.architecture]
    language = [family.architecture], [family.architecture.replace("ForCausalLM", "Model")]
    if names not in (*language, [family.reward_architecture]):
        raise UserError(
            f"{file} architectures",
            repr(names),
            f"must be {language[0]}, or of a reward model {[family.reward_architecture]}",
        )
    return names == [family.reward_architecture]


def _as_transformers_reads(file: Path, fields: dict) -> PretrainedConfig:
    check_rope(file, fields)
    config_class = CONFIG_MAPPING[fields["model_type"]]
    declared = _declared(config_class)
    read = {
        name: copy.deepcopy(value)
        for name, value in fields.items()
        if name in declared | UNDECLARED | NEUTRAL.keys() and name not in NOT_READ
        if value is not None or name in declared
    }
    for name in AT_LEAST_ONE:
        value = read.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise UserError(f"{file} {name}", repr(value), "must be a whole number of at least 1")
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


def _left_aside(file: Path, fields: dict, config: PretrainedConfig | None) -> set[str]:
    """Names of set fields that nothing reads. Raises ``UserError`` for one that may change what the model computes.

    ``config``: what declares the other fields; None for those beside a language model in a larger model's file.
    """
    known = (
        _declared(type(config)) | UNDECLARED | NEUTRAL.keys() | NOT_READ if config else {"architectures", "model_type"}
    )
    aside = set()
    for name in sorted(fields.keys() - known - {"transformers_version", "dtype", "torch_dtype"}):
        value = fields[name]
        if not value:  # null, false, 0, empty
            continue
        if speaks_of_function(name):
            about = f"is not a field of {type(config).__name__}" if config else "is not part of the language model"
            raise UserError(
                f"{file} {name}",
                f"{json.dumps(value)[:60]} {about}",
                "it may change what the model computes; remove it if it does not",
            )
        aside.add(name)
    return aside


def speaks_of_function(name: str) -> bool:
    """Whether the name of a field that we do not know says that it is about what the model computes."""
    if NOTES.search(name) or OTHER_SENSES.search(name):
        return False
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()
    return any(word.startswith(FUNCTION_WORDS) for word in re.split(r"[^a-z0-9]+", words))


def _check_values(file: Path, fields: dict, config: PretrainedConfig) -> None:
    """Raise an error for a config feature that the Megatron-Core model would silently ignore."""

    def refuse(field: str, value, valid: str):
        raise UserError(f"{file} {field}", repr(value), f"is not supported; must be {valid}")

    for field, neutral in NEUTRAL.items():
        value = getattr(config, field, None)
        if value is not None and value not in neutral:
            refuse(field, value, repr(neutral[0]))
    types = getattr(config, "layer_types", None)
    if types is not None:
        if unknown := sorted(set(types) - {"full_attention", "sliding_attention"}):
            refuse("layer_types", unknown[0], "full_attention or sliding_attention")
        if len(types) != config.num_hidden_layers:
            refuse("layer_types", f"{len(types)} entries", f"one for each of {config.num_hidden_layers} layers")
    if config.model_type in ("mistral", "mixtral") and fields.get("layer_types"):
        refuse("layer_types", fields["layer_types"], f"absent: {type(config).__name__} does not read it")
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
