"""A Hugging Face model directory: config checked against what we carry over, safetensors read slice by slice."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from g2r_megatron.data.tokenizer import load_tokenizer
from g2r_megatron.errors import UserError
from g2r_megatron.model.families import FAMILIES, Family

ROPE_TYPES = ("default", "llama3", "linear")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


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
    """A validated directory. ``option`` is the config option that named it, for error messages."""

    option: str
    path: Path
    config: PretrainedConfig
    family: Family
    geometry: Geometry

    def inverse_frequencies(self) -> torch.Tensor:
        """RoPE inverse frequencies [head_dim / 2], fp32, from transformers' own functions."""
        rope = self.config.rope_parameters
        if rope["rope_type"] == "default":
            exponent = torch.arange(0, self.geometry.head_dim, 2, dtype=torch.int64).float() / self.geometry.head_dim
            return 1.0 / (rope["rope_theta"] ** exponent)
        return ROPE_INIT_FUNCTIONS[rope["rope_type"]](self.config, "cpu")[0]


def open_hf_model(path: str, option: str) -> HFModel:
    """Read and check ``config.json``. Raises ``UserError`` for anything that we would not carry over exactly."""
    directory = Path(path)
    if not path or not directory.is_dir():
        raise UserError(
            option, repr(path), "must be a Hugging Face model directory (config.json, *.safetensors, tokenizer)"
        )
    if not (directory / "config.json").is_file():
        raise UserError(option, f"{directory} has no config.json", "must be a Hugging Face model directory")
    try:
        raw = json.loads((directory / "config.json").read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{directory}/config.json", f"not readable as JSON ({error})", "restore the file") from error
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(f"{directory}/config.json model_type", repr(model_type), f"must be one of {sorted(FAMILIES)}")
    if raw.get("quantization_config"):
        raise UserError(
            f"{directory}/config.json quantization_config",
            "set",
            "quantized checkpoints cannot be loaded; dequantize it first",
        )
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{directory}/config.json", f"not accepted by transformers ({error})", "restore the file"
        ) from error
    _refuse_what_is_not_carried_over(directory, config, FAMILIES[model_type])
    heads = config.num_attention_heads
    geometry = Geometry(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
    )
    return HFModel(option, directory, config, FAMILIES[model_type], geometry)


def _refuse_what_is_not_carried_over(directory: Path, config, family: Family) -> None:
    """A config feature that the Megatron-Core model would silently lose is an error."""

    def refuse(field: str, value, valid: str):
        raise UserError(f"{directory}/config.json {field}", repr(value), f"is not supported; must be {valid}")

    rope = config.rope_parameters
    if rope["rope_type"] not in ROPE_TYPES:
        refuse("rope type", rope["rope_type"], f"one of {list(ROPE_TYPES)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        refuse("partial_rotary_factor", rope["partial_rotary_factor"], "1.0")
    if config.hidden_act != "silu":
        refuse("hidden_act", config.hidden_act, "'silu'")
    if getattr(config, "use_sliding_window", False):
        refuse("use_sliding_window", True, "false")
    if not family.qkv_bias and getattr(config, "attention_bias", False):
        refuse("attention_bias", True, f"false for {family.model_type}")
    if getattr(config, "mlp_bias", False):
        refuse("mlp_bias", True, "false")
    if config.hidden_size % config.num_attention_heads and not getattr(config, "head_dim", None):
        refuse("num_attention_heads", config.num_attention_heads, f"a divisor of hidden_size {config.hidden_size}")


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


class SafetensorsReader:
    """Slices of the tensors of a directory's safetensors files; nothing is read before it is asked for."""

    def __init__(self, directory: Path):
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            self._file_of = {
                name: directory / file for name, file in json.loads(index.read_text())["weight_map"].items()
            }
            for file in sorted(set(self._file_of.values())):
                if not file.is_file():
                    raise UserError(str(index), f"names {file.name}, which is missing", "restore the missing shard")
        elif (directory / "model.safetensors").is_file():
            file = directory / "model.safetensors"
            self._file_of = dict.fromkeys(self._open(file).keys(), file)
        else:
            pickles = [p.name for p in directory.glob("*.bin")]
            found = f"only pickle files {pickles}" if pickles else "no model.safetensors"
            raise UserError(
                str(directory), found, "weights must be safetensors files; save the model with safe_serialization=True"
            )
        self._handles = {}

    @staticmethod
    def _open(file: Path):
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(str(file), f"not a readable safetensors file ({error})", "restore the file") from error

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def _slice(self, name: str):
        file = self._file_of[name]
        if file not in self._handles:
            self._handles[file] = self._open(file)
        try:
            return self._handles[file].get_slice(name)
        except SafetensorError as error:
            raise UserError(str(file), f"does not hold {name} ({error})", "restore the file or its index") from error

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Raises ``UserError`` for a dtype that is no weight of ours (quantized integers, fp8)."""
        found = self._slice(name).get_dtype()
        if found not in DTYPES:
            raise UserError(f"{self._file_of[name]} {name}", f"dtype {found}", f"must be one of {sorted(DTYPES)}")
        return DTYPES[found]

    def read(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Rows (dim 0) or columns (dim 1) ``start:stop`` of a tensor, CPU, in the file's dtype."""
        part = self._slice(name)
        return part[start:stop] if dim == 0 else part[:, start:stop]
