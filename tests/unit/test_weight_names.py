"""Weight files with names, copies, buffers and dtypes as other tools leave them: the same weights, or refused.

Tiny models are written, their tensors renamed, and read by name. Leaves out the files themselves
(test_safetensors_files.py) and the models' numbers (tests/parity).
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from g2r_megatron.errors import UserError, warn
from g2r_megatron.model.hf import load_model_tokenizer, open_hf_model
from g2r_megatron.model.safetensors_files import SafetensorsReader
from g2r_megatron.model.weights import check_tensors
from tiny_models import build_tiny_hf, build_tiny_reward_model

Weights = dict[str, torch.Tensor]
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """``tiny(family)`` -> (its config.json, its weights); "reward": of a reward model."""
    made = {}

    def get(family: str) -> tuple[str, Weights]:
        if family not in made:
            directory = tmp_path_factory.mktemp(family)
            build = build_tiny_reward_model if family == "reward" else build_tiny_hf
            build("qwen3" if family == "reward" else family, directory)
            made[family] = (directory / "config.json").read_text(), load_file(directory / "model.safetensors")
        return made[family]

    return get


def read(directory: Path, config: str, weights: Weights) -> Weights:
    warn.cache_clear()
    (directory / "config.json").write_text(config)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, directory / "model.safetensors")
    hf = open_hf_model(str(directory), "policy.model")
    reader = SafetensorsReader(hf.path)
    check_tensors(hf, reader)
    return {name: reader.read(name) for name in reader.names}


def renamed(change: Callable[[str], str]) -> Callable[[Weights], Weights]:
    return lambda weights: {change(name): tensor for name, tensor in weights.items()}


def plus(**extra: torch.Tensor) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name.replace("__", "."): tensor for name, tensor in extra.items()}


HARMLESS = {
    # name: (family, what is done to its tensors, what the warning says)
    "saved without its head's class": ("qwen2", renamed(lambda n: n.removeprefix("model.")), ""),
    "inside a larger model, old": ("qwen3", renamed(lambda n: f"language_model.{n}"), ""),
    "inside a larger model, new": ("qwen3", renamed(lambda n: n.replace("model.", "model.language_model.", 1)), ""),
    "compiled": ("qwen2", renamed(lambda n: f"_orig_mod.{n}"), ""),
    "compiled layers": ("qwen3_moe", renamed(lambda n: n.replace(".self_attn", "._orig_mod.self_attn")), ""),
    "of DDP": ("qwen2", renamed(lambda n: f"module.{n}"), ""),
    "of FSDP": ("qwen2", renamed(lambda n: n.replace(".mlp", "._fsdp_wrapped_module.mlp")), ""),
    "of a merged adapter": ("qwen2", renamed(lambda n: f"base_model.model.{n}"), ""),
    "a tied head stored": ("qwen2", lambda w: w | {HEAD: w[EMBEDDING].clone()}, ""),
    "only the tied head stored": ("qwen2", lambda w: {HEAD if n == EMBEDDING else n: t for n, t in w.items()}, ""),
    "inv_freq": ("llama3", plus(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8)), ""),
    "position_ids": ("llama3", plus(model__position_ids=torch.arange(9)), "model.position_ids (of 1)"),
    "fp32 norms": ("llama3", lambda w: {n: t if "norm" in n else t.bfloat16() for n, t in w.items()}, ""),
    "a value head": ("qwen2", plus(v_head__summary__weight=torch.ones(1, 64)), "v_head.summary.weight"),
    "a score": ("qwen3", plus(score__weight=torch.ones(1, 64)), "score.weight"),
    "a head in a reward model": ("reward", lambda w: w | {HEAD: w[EMBEDDING].clone()}, HEAD),
    "a tower": ("qwen3", plus(vision_tower__layers__0__norm__weight=torch.ones(3)), "vision_tower"),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_differences(tiny, tmp_path, capsys, name):
    """All weights under the tables' names with the values of the file; a warning names what is left aside, if anything."""
    family, change, said = HARMLESS[name]
    config, weights = tiny(family)
    changed = change(weights)
    found = read(tmp_path, config, changed)
    assert found.keys() == weights.keys()
    for tensor_name, tensor in found.items():
        assert torch.equal(tensor.float(), weights[tensor_name].to(tensor.dtype).float())
    err = capsys.readouterr().err
    assert said in err and err.count("warning") == bool(said)


def without(*names: str) -> Callable[[Weights], Weights]:
    return lambda weights: {n: t for n, t in weights.items() if n not in names}


REFUSED = {
    "an untied head missing": ("qwen3", without(HEAD), [f"{HEAD} is missing", "set tie_word_embeddings to true"]),
    "a tied head that differs": ("qwen2", lambda w: w | {HEAD: w[EMBEDDING] + 1}, [HEAD, "differs", "set it to false"]),
    "a bias": (
        "llama3",
        plus(model__layers__0__self_attn__q_proj__bias=torch.ones(64)),
        ["unknown tensor", "q_proj.bias"],
    ),
    "a layer too many": (
        "llama3",
        plus(model__layers__4__mlp__down_proj__weight=torch.ones(2)),
        ["unknown", "layers.4"],
    ),
    "a quantized model's": (
        "llama3",
        lambda w: {"model.layers.0.self_attn.q_proj.qweight": torch.ones(2)},
        ["quantized"],
    ),
    "an unmerged adapter's": (
        "llama3",
        lambda w: {name.replace("q_proj.", "q_proj.base_layer."): tensor for name, tensor in w.items()},
        ["merge it"],
    ),
    "an adapter among them": ("llama3", plus(model__layers__0__lora_A__weight=torch.ones(2)), ["merge it", "lora_A"]),
    "an adapter alone": (
        "llama3",
        lambda w: {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2)},
        ["the files are an adapter's", "merge_and_unload"],
    ),
    "fp8 weights": (
        "llama3",
        lambda w: w | {NORM: w[NORM].to(torch.float8_e4m3fn)},
        [NORM, "dtype F8_E4M3", "dequantize"],
    ),
    "packed weights": ("llama3", lambda w: w | {NORM: w[NORM].int()}, [NORM, "dtype I32", "dequantize"]),
    "another shape": ("llama3", lambda w: w | {NORM: w[NORM][:3]}, [NORM, "shape (3,)", "(64,)"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_the_model_is_refused(tiny, tmp_path, name):
    family, change, said = REFUSED[name]
    config, weights = tiny(family)
    with pytest.raises(UserError) as error:
        read(tmp_path, config, change(weights))
    assert "\n" not in str(error.value) and all(text in str(error.value) for text in said)


# Tokens without an embedding.


def with_added_token(directory: Path, text: str, special: bool) -> None:
    whole = json.loads((directory / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    whole["added_tokens"].append({"id": 383, "content": text, "special": special, **flags})
    (directory / "tokenizer.json").write_text(json.dumps(whole))


@pytest.mark.parametrize("special", [True, False])
def test_tokens_without_an_embedding_are_never_used(tmp_path, capsys, special):
    """A padding token for which the embedding was never resized: the model loads, and its name in a text is text."""
    from g2r_megatron.data.tokenizer import encode_text

    with_added_token(build_tiny_hf("qwen3", tmp_path), "[PAD]", special)
    tokenizer = load_model_tokenizer(open_hf_model(str(tmp_path), "policy.model"))
    ids = encode_text(tokenizer, "a [PAD] b")
    assert max(ids) < 383 and tokenizer.decode(ids) == "a [PAD] b"
    assert "1 tokens have no embedding (383 rows) and are never used: [PAD]" in capsys.readouterr().err


def test_a_token_that_every_prompt_needs_must_have_an_embedding(tmp_path):
    build_tiny_hf("qwen3", tmp_path)
    with_added_token(tmp_path, "<|turn|>", True)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}")
    with pytest.raises(
        UserError, match=r"'<\|turn\|>' of .* is 383, but the model has embeddings for 383 tokens; resize"
    ):
        load_model_tokenizer(open_hf_model(str(tmp_path), "policy.model"))
