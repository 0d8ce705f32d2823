"""A Hugging Face model directory, or a Megatron checkpoint with one inside: its config, checked field by field."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from g2r_megatron.data.tokenizer import load_tokenizer
from g2r_megatron.errors import UserError
from g2r_megatron.model.families import FAMILIES, Family
from g2r_megatron.model.safetensors_files import SafetensorsReader

ROPE_TYPES = ("default", "llama3", "linear")
HF_FILES = "hf"  # subdirectory of a Megatron checkpoint with the config and tokenizer of its model
CHECKPOINT_FACTS = "g2r.json"  # our own facts in a Megatron checkpoint
# Fields of config.json that change what the model computes in a way that we do not carry over: their neutral value.
NEUTRAL = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "pretraining_tp": 1,  # of Llama: splits products, which changes rounding
    "router_jitter_noise": 0.0,
    "use_mrope": False,
    "partial_rotary_factor": 1.0,
}
# Fields that transformers reads although its config classes do not declare them (any more), or that say nothing.
UNDECLARED = {
    "model_type",
    "torch_dtype",
    "rope_theta",
    "rope_scaling",
    "head_dim",
    "max_window_layers",
    "_name_or_path",
    "num_labels",
}


@dataclass(frozen=True)
class Geometry:
    """The sizes that decide every tensor's shape."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    experts: int = 0  # of each mixture-of-experts layer
    expert_ffn: int = 0
    experts_per_token: int = 0
    dense_layers: frozenset[int] = frozenset()  # the layers without experts, in a model with experts
    is_reward_model: bool = False  # a score of one number where a language model has its output layer

    def is_moe(self, layer: int) -> bool:
        """Whether layer number ``layer`` (from 0, over the whole model) has experts."""
        return self.experts > 0 and layer not in self.dense_layers

    def padded_vocab(self, tp: int, dp: int) -> int:
        """Vocabulary rows rounded up so that each TP shard's element count is a multiple of lcm(dp, 128).

        Megatron-Core's distributed optimizer keeps a tied embedding in a gradient bucket of its own, padded to that
        multiple, and its reshardable checkpoints are only right (0.16) when no padding falls inside the buffer.
        """
        alignment = math.lcm(dp, 128)
        multiple = tp * (alignment // math.gcd(alignment, self.hidden))
        return -(-self.vocab // multiple) * multiple


@dataclass(frozen=True)
class HFModel:
    """A validated model. ``option`` is the config option that named it, for error messages.

    ``path``: the directory of config.json and the tokenizer, and of the weights unless there is a ``checkpoint``, the
    Megatron checkpoint that holds them. ``fused_experts``: Hugging Face files store (or stored) all experts of a layer
    in one tensor.
    """

    option: str
    path: Path
    config: PretrainedConfig
    family: Family
    geometry: Geometry
    checkpoint: Path | None = None
    fused_experts: bool = False

    @property
    def architecture(self) -> str:
        """The Hugging Face class of the model."""
        return self.family.reward_architecture if self.geometry.is_reward_model else self.family.architecture

    def inverse_frequencies(self) -> torch.Tensor:
        """RoPE inverse frequencies [head_dim / 2], fp32, from transformers' own functions."""
        rope = self.config.rope_parameters
        if rope["rope_type"] == "default":
            exponent = torch.arange(0, self.geometry.head_dim, 2, dtype=torch.int64).float() / self.geometry.head_dim
            return 1.0 / (rope["rope_theta"] ** exponent)
        with torch.device("cpu"):  # a caller that builds on the meta device asks for their values all the same
            return ROPE_INIT_FUNCTIONS[rope["rope_type"]](self.config, "cpu")[0]

    @property
    def sliding_window(self) -> tuple[int, list[bool]] | None:
        """(positions a token sees, itself included; which layers have the window), or None without any."""
        width = getattr(self.config, "sliding_window", None)
        types = getattr(self.config, "layer_types", None)
        layers = [types is None or t == "sliding_attention" for t in types or [None] * self.geometry.layers]
        return (width, layers) if width is not None and any(layers) else None


def open_hf_model(path: str, option: str) -> HFModel:
    """Read and check ``config.json`` of a Hugging Face directory or of a Megatron checkpoint's ``hf/``.

    Raises ``UserError`` for anything that we would not carry over exactly.
    """
    directory = Path(path)
    if not path or not directory.is_dir():
        raise UserError(
            option, repr(path), "must be a Hugging Face model directory (config.json, *.safetensors, tokenizer)"
        )
    if (directory / ".metadata").is_file() or (directory / CHECKPOINT_FACTS).is_file():
        return _open_checkpoint(directory, option)
    hf = _open_config(directory, option)
    if hf.geometry.experts and any(directory.glob("*.safetensors")):
        hf = dataclasses.replace(hf, fused_experts=_has_fused_experts(hf, SafetensorsReader(directory).names))
    return hf


def _open_checkpoint(checkpoint: Path, option: str) -> HFModel:
    """The model of a Megatron checkpoint, converted or left by training."""
    if not (checkpoint / HF_FILES / "config.json").is_file():
        raise UserError(
            option,
            f"{checkpoint} is a Megatron checkpoint without {HF_FILES}/config.json",
            f"copy config.json and the tokenizer of the model it was made from to {checkpoint / HF_FILES}",
        )
    facts = read_json(checkpoint / CHECKPOINT_FACTS)
    hf = _open_config(checkpoint / HF_FILES, option)
    return dataclasses.replace(hf, checkpoint=checkpoint, fused_experts=bool(facts.get("fused_experts")))


def read_json(file: Path) -> dict:
    """The object in a JSON file. Raises ``UserError`` naming a file that is unreadable or holds something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(str(file), f"not readable as JSON ({error})", "restore the file") from error
    if not isinstance(content, dict):
        raise UserError(str(file), f"holds a {type(content).__name__}", "must be a JSON object")
    return content


def _open_config(directory: Path, option: str) -> HFModel:
    if not (directory / "config.json").is_file():
        raise UserError(option, f"{directory} has no config.json", "must be a Hugging Face model directory")
    raw = read_json(directory / "config.json")
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(f"{directory}/config.json model_type", repr(model_type), f"must be one of {sorted(FAMILIES)}")
    family = FAMILIES[model_type]
    known = [family.architecture], [family.reward_architecture]
    if raw.get("architectures") not in (None, *known):
        raise UserError(
            f"{directory}/config.json architectures",
            repr(raw["architectures"]),
            f"must be {known[0]}, or of a reward model {known[1]}",
        )
    is_reward_model = raw.get("architectures") == known[1]
    if raw.get("quantization_config"):
        raise UserError(
            f"{directory}/config.json quantization_config",
            "set",
            "quantized checkpoints cannot be loaded; dequantize it first",
        )
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # its validators raise classes of their own
        reason = " ".join(str(error).split())
        raise UserError(
            f"{directory}/config.json", f"refused by transformers ({reason})", "correct the file"
        ) from error
    _refuse_what_is_not_carried_over(directory, raw, config)
    if is_reward_model and config.num_labels != 1:
        raise UserError(
            f"{directory}/config.json id2label",
            f"{config.num_labels} labels" if "id2label" in raw else "missing, which means 2 labels",
            "a reward model has one label, its score: this one is a classifier",
        )
    return HFModel(option, directory, config, family, _geometry(config, family, is_reward_model))


def _geometry(config: PretrainedConfig, family: Family, is_reward_model: bool) -> Geometry:
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    experts, expert_ffn, chosen, dense = 0, 0, 0, frozenset()
    if family.experts is not None:
        experts, chosen = config.num_local_experts, config.num_experts_per_tok
        expert_ffn = getattr(config, "moe_intermediate_size", config.intermediate_size)
        every = getattr(config, "decoder_sparse_step", 1)
        dense = {i for i in range(layers) if (i + 1) % every} | set(getattr(config, "mlp_only_layers", []))
    return Geometry(
        layers=layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        tied=bool(config.tie_word_embeddings) and not is_reward_model,
        experts=experts,
        expert_ffn=expert_ffn,
        experts_per_token=chosen,
        dense_layers=frozenset(dense),
        is_reward_model=is_reward_model,
    )


def _refuse_what_is_not_carried_over(directory: Path, raw: dict, config: PretrainedConfig) -> None:
    """A config feature that the Megatron-Core model would silently lose is an error, and so is an unknown field."""

    def refuse(field: str, value, valid: str):
        raise UserError(f"{directory}/config.json {field}", repr(value), f"is not supported; must be {valid}")

    declared = {f.name for f in dataclasses.fields(config)} | {*config.attribute_map, *config.attribute_map.values()}
    for field in sorted(raw.keys() - declared - UNDECLARED - NEUTRAL.keys()):
        raise UserError(
            f"{directory}/config.json {field}",
            repr(raw[field])[:60],
            f"is not a field of {type(config).__name__}; remove it if the model does not need it",
        )
    for field, neutral in NEUTRAL.items():
        if (value := getattr(config, field, neutral)) != neutral and value is not None:
            refuse(field, value, repr(neutral))
    rope = config.rope_parameters
    if rope["rope_type"] not in ROPE_TYPES:
        refuse("rope type", rope["rope_type"], f"one of {list(ROPE_TYPES)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        refuse("partial_rotary_factor", rope["partial_rotary_factor"], "1.0")
    types = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if types:
        refuse("layer_types", sorted(types)[0], "full_attention or sliding_attention")
    if config.model_type in ("mistral", "mixtral") and "layer_types" in raw:
        refuse("layer_types", raw["layer_types"], f"absent: {type(config).__name__} does not read it")
    if config.hidden_size % config.num_attention_heads and not getattr(config, "head_dim", None):
        refuse("num_attention_heads", config.num_attention_heads, f"a divisor of hidden_size {config.hidden_size}")


def _has_fused_experts(hf: HFModel, names: set[str]) -> bool:
    fused = {name for m in hf.family.fused_experts.values() if m.fused for name in m.hf}
    return any(name.format(i=i) in names for name in fused for i in range(hf.geometry.layers))


def load_model_tokenizer(hf: HFModel) -> PreTrainedTokenizerFast:
    """The directory's tokenizer. Raises ``UserError`` when it has tokens that the model has no embedding for."""
    tokenizer = load_tokenizer(hf.path)
    if len(tokenizer) > hf.geometry.vocab:
        raise UserError(
            hf.option,
            f"the tokenizer of {hf.path} has {len(tokenizer)} tokens, the model {hf.geometry.vocab}",
            "give the directory of a model with its own tokenizer",
        )
    return tokenizer
