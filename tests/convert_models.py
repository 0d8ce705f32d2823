"""Hugging Face directories for the converters' tests, and conversions run in a rank. Not a test.

A conversion in a rank answers with the error message, or None, so that a refusal does not cost a world.
"""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tiny_models import build_model, build_tokenizer

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# name -> (family, dtype of the files, size of a file, changes to the config)
DIRECTORIES = {
    "qwen2": ("qwen2", FP32, "1GB", {}),
    "qwen2_untied": ("qwen2", BF16, "50KB", {"tie_word_embeddings": False}),
    "qwen3_tied": ("qwen3", BF16, "1GB", {"tie_word_embeddings": True}),
    "llama3": ("llama3", FP32, "50KB", {}),
    "llama3_half": ("llama3", FP16, "1GB", {"tie_word_embeddings": True}),
    "mistral": ("mistral", BF16, "1GB", {"num_key_value_heads": 1}),
    "qwen3_moe": ("qwen3_moe", BF16, "100KB", {}),
    "qwen3_moe_some_layers": ("qwen3_moe", FP32, "1GB", {"mlp_only_layers": [2], "tie_word_embeddings": True}),
    "mixtral": ("mixtral", FP32, "1GB", {}),
}
FUSED = {"qwen3_moe_fused": "qwen3_moe", "mixtral_fused": "mixtral"}  # the same weights, all experts in one tensor


@cache
def _tokenizer():
    return build_tokenizer()


def write_directory(name: str, directory: Path) -> Path:
    """Write one of ``DIRECTORIES`` or ``FUSED``: weights, config, tokenizer, generation config."""
    family, dtype, shard, changes = DIRECTORIES[FUSED.get(name, name)]
    model = build_model(family, len(_tokenizer()), **changes).to(dtype)
    model.generation_config.eos_token_id = _tokenizer().eos_token_id
    model.save_pretrained(directory, max_shard_size=shard)
    _tokenizer().save_pretrained(directory)
    if name in FUSED:
        tensors = fused(tensors_of(directory))
        for file in directory.glob("model*.safetensors*"):
            file.unlink()
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts of each layer stacked as transformers 5 holds them: gate_up_proj [E, 2I, H] and down_proj [E, H, I]."""
    result, experts = {}, {}
    parts = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1, "down_proj": 2, "w2": 2}
    for name, tensor in tensors.items():
        before, found, after = name.partition(".experts.")
        if not found:
            result[name] = tensor
            continue
        expert, part, _ = after.split(".")
        layer = before.replace("block_sparse_moe", "mlp")
        experts.setdefault(layer, {}).setdefault(int(expert), {})[parts[part]] = tensor
    result = {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in result.items()}
    for layer, of_layer in experts.items():
        ordered = [of_layer[i] for i in range(len(of_layer))]
        result[f"{layer}.experts.gate_up_proj"] = torch.stack([torch.cat([e[0], e[1]]) for e in ordered])
        result[f"{layer}.experts.down_proj"] = torch.stack([e[2] for e in ordered])
    return result


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory's safetensors files, by the safetensors library."""
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def other_files(directory: Path) -> dict[str, bytes]:
    """Content of all files but weights and their index."""
    return {p.name: p.read_bytes() for p in directory.iterdir() if "safetensors" not in p.name}


def copy_of(directory: Path, to: Path) -> Path:
    """A copy to be spoilt."""
    shutil.copytree(directory, to)
    return to


# In the ranks.


def answer(function: Callable, *args) -> str | None:
    """The message of the ``UserError`` that a call raises, None without one."""
    from g2r_megatron.errors import UserError

    try:
        function(*args)
    except UserError as error:
        return str(error)
    return None


def to_megatron(source: str, output: str) -> str | None:
    from g2r_megatron.convert.to_megatron import convert_to_megatron

    return answer(convert_to_megatron, source, Path(output))


def to_hf(checkpoint: str, output: str, hf_files: str | None = None) -> str | None:
    from g2r_megatron.convert.to_hf import convert_to_hf

    return answer(convert_to_hf, Path(checkpoint), Path(output), Path(hf_files) if hf_files else None)
