"""config.json as people have it: which fields are left aside with one warning, which are refused by name, and RoPE.

Tables equal transformers' own modules'. What the models then compute is tests/parity/test_config_forms.py; weights are
not looked at here.
"""

import json

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from config_forms import LLAMA, MORE_FORMS, QWEN2, YARN
from g2r_megatron.errors import UserError, warn
from g2r_megatron.model.hf import HFModel, open_hf_model
from g2r_megatron.model.undeclared_fields import speaks_of_function


@pytest.fixture
def opened(tmp_path):
    """``opened(fields)`` -> the model of a directory with this config.json and nothing else."""

    def open_config(fields: dict) -> HFModel:
        warn.cache_clear()  # a warning is said once a process
        (tmp_path / "config.json").write_text(json.dumps(fields))
        return open_hf_model(str(tmp_path), "policy.model")

    return open_config


# Fields.

SET_ASIDE = {
    "saved by GGUF tools": dict(_model_name_or_path="x", unk_token_id=3, is_llama_config=True),
    "trainers": dict(neftune_noise_alpha=5.0, unsloth_fixed=True, use_liger_kernel=True, lora_alpha=16),
    "savers": dict(_attn_implementation_autoset=True, _flash_attn_2_enabled=True, attn_implementation="sdpa"),
    "losses": dict(router_aux_loss_coef=0.001, embd_pdrop=0.1, resid_dropout=0.1, label_smoothing=0.1),
    "vendors": dict(internal_version="7b-1", auto_map={"AutoModelForCausalLM": "m.M"}, model_max_length=4096),
    "optimisers": dict(max_grad_norm=1.0, gradient_clipping=1.0, layerwise_lr_decay=0.9, freeze_layers=3),
    "kernels": dict(use_fused_rms_norm=True, kv_cache_quant_policy="int8", activation_checkpointing=True),
    "words that begin alike": dict(conversation_template="x", action_tokens=[1], converted_from="a", header_size=3),
    "heads and tokenizers of others": dict(summary_activation="tanh", classifier_bias=True, do_normalize=True),
    "sizes of the embedding": dict(pad_vocab_size_multiple=64, ffn_dim_multiplier=1.3),
    "merged adapters": dict(lora_target_modules=["q_proj"], use_lora=True),
    "other senses": dict(vision_config={"hidden_act": "gelu"}, audio_token_id=5, mm_projector_bias=True),
}


@pytest.mark.parametrize("fields", SET_ASIDE.values(), ids=SET_ASIDE)
def test_fields_that_nothing_reads_are_named_in_one_warning(opened, capsys, fields):
    opened(LLAMA | fields)
    err = capsys.readouterr().err
    assert err.count("warning") == 1 and all(name in err for name in fields)


def test_unset_fields_and_generation_options_are_not_worth_a_warning(opened, capsys):
    unset = dict(rope_interleaved=False, quantization_config=None, pruned_heads={}, logits_scaling=0, attn_bias=None)
    opened(LLAMA | unset | dict(do_sample=True, temperature=0.7, max_length=4096, top_p=0.9))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("dtype", ["torch.bfloat16", "bf16", "auto", "float16", None])
@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
def test_any_spelling_of_the_dtype(opened, name, dtype):
    """The files say what the weights are."""
    assert opened({k: v for k, v in LLAMA.items() if k != "torch_dtype"} | {name: dtype}).geometry.hidden == 4096


# What is computed anyway, in other words: not worth a warning.
SAME = {
    "activations": dict(hidden_act="SiLU", activation_function="silu", hidden_activation="swish", mlp_act="silu"),
    "norms and positions": dict(norm_type="RMSNorm", position_embedding_type="rope", use_rope=True, is_causal=True),
    "kinds of attention": dict(layer_types=["full_attention"] * 32, attention_type="GQA", attention_head_type="mha"),
    "sizes": dict(
        n_layers=32, n_heads=32, num_kv_heads=32, rotary_dim=128, attention_head_dim=128, layer_norm_eps=1e-5
    ),
    "factors of one": dict(logit_scale=1.0, embedding_multiplier=1, rotary_pct=1.0, rope_scaling_factor=1.0),
    "switches and sizes of other types": dict(mlp_bias=0, attention_bias=0, max_position_embeddings=4096.0),
    "dual chunks off": dict(dual_chunk_attention_config=None, transformers_weights="model.safetensors"),
    "a class as fully_shard names it": dict(architectures=["FSDPLlamaForCausalLM"]),
}


@pytest.mark.parametrize("fields", SAME.values(), ids=SAME)
def test_what_is_computed_anyway_may_be_said(opened, capsys, fields):
    hf = opened(LLAMA | fields)
    assert (hf.config.hidden_act, hf.config.mlp_bias, hf.positions) == ("silu", False, 4096)
    assert capsys.readouterr().err == ""


def test_a_family_may_name_what_only_it_has(opened):
    """Biases and norms of queries and keys belong to some families; a list of windows says what Mistral does anyway."""
    mistral = LLAMA | dict(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=4096)
    opened(QWEN2 | dict(qkv_bias=True, attention_bias=True))
    opened(MORE_FORMS["Qwen3-of-transformers-5"] | dict(use_qk_norm=True))
    opened(mistral | dict(layer_types=["sliding_attention"] * 32))
    for fields, name in (
        (QWEN2 | dict(use_qk_norm=True), "use_qk_norm"),
        (mistral | dict(layer_types=["full_attention"] * 32), "layer_types"),
        (MORE_FORMS["Qwen3-of-transformers-5"] | dict(layer_types=["sliding_attention"] * 28), "layer_types"),
    ):
        with pytest.raises(UserError, match=f"config.json {name}"):
            opened(fields)


@pytest.mark.parametrize("fields", [dict(is_causal=False), dict(is_causal=None), dict(use_rope=False)])
def test_unset_fields_that_deny_what_is_computed(opened, fields):
    """transformers attends to later tokens with is_causal false, and with null."""
    with pytest.raises(UserError, match=f"config.json {next(iter(fields))}: .*must be true"):
        opened(LLAMA | fields)


REFUSED = dict(
    rope_interleaved=True,
    no_rope_layers=[1, 0],
    logits_scaling=8.0,
    logit_scale=0.1,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
    embedding_multiplier=12.0,
    residual_multiplier=0.2,
    scale_emb=12,
    use_qk_norm=True,
    qkv_bias=True,
    use_parallel_residual=True,
    clip_qkv=8.0,
    alibi=True,
    num_experts=8,
    moe_layer_start=1,
    sliding_window=4096,
    layer_types=["chunked_attention"] * 32,
    activation_function="gelu_new",
    mlpBias=True,
    per_layer_config={"0": {}},
    quant_method="awq",
    compressionQuant={"bits": 4},
    attention_bias=True,
    mlp_bias=True,
    hidden_act="gelu",
    attention_dropout=0.1,
    quantization_config={"quant_method": "fp8"},
    layer_norm_eps=1e-6,
    n_layers=31,
    compression_config={"quant_method": "compressed-tensors"},
    dim_model_base=256,
    position_embedding_type="alibi",
    attention_type="bidirectional",
    use_bidirectional_attention=True,
    attention_multiplier=1.0,
    norm_type="layernorm",
    scoring_func="sigmoid",
    no_bias=True,
    transformers_weights="other.safetensors",
    dual_chunk_attention_config={"chunk_size": 4096},
)


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_may_change_the_function_are_refused_by_name(opened, name):
    with pytest.raises(UserError) as error:
        opened(LLAMA | {name: REFUSED[name]})
    assert error.value.where.endswith(f"config.json {name}") and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["pad_token_id", "kv_cache_dtype", "tokenizer_class", "keys_to_ignore", "version"])
def test_names_without_a_functions_words(name):
    assert not speaks_of_function(name)


def test_the_language_model_of_a_larger_one(opened, capsys):
    """text_config counts, what is around it is named; the outer tie_word_embeddings decides."""
    whole = MORE_FORMS["Mistral-of-llava"]
    hf = opened(whole | {"tie_word_embeddings": True})
    assert (hf.family.model_type, hf.geometry.head_dim, hf.geometry.tied) == ("mistral", 128, True)
    assert "image_token_index" in capsys.readouterr().err
    with pytest.raises(UserError, match="config.json final_logit_softcapping"):
        opened(whole | {"final_logit_softcapping": 30.0})
    with pytest.raises(UserError, match="model_type: 'llava'"):
        opened(whole | {"text_config": {"model_type": "gemma2"}})


def test_a_file_with_a_byte_order_mark(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8-sig")
    assert open_hf_model(str(tmp_path), "policy.model").geometry.hidden == 4096


# RoPE.

LLAMA3 = MORE_FORMS["Llama-3.1-axolotl"]["rope_scaling"]
TABLES = {
    "default": {},
    "linear": dict(rope_scaling={"type": "linear", "factor": 4.0}),
    "llama3": dict(rope_scaling=LLAMA3),
    "yarn": dict(rope_scaling=YARN),
    "yarn of another spelling": dict(rope_scaling={"type": "yarn", "factor": 4.0}),
    "yarn with its own factor": dict(rope_scaling={**YARN, "attention_factor": 1.2}),
    "yarn with mscale": dict(rope_scaling={**YARN, "mscale": 1.0, "mscale_all_dim": 0.8, "beta_fast": 16}),
    "yarn, not truncated": dict(rope_parameters={**YARN, "rope_theta": 1000000.0, "truncate": False}),
    "yarn of a length beside it": dict(
        rope_scaling={"type": "yarn", "factor": 8.0}, original_max_position_embeddings=2048
    ),
    "yarn with vLLM's factors of one": dict(rope_scaling={**YARN, "attn_factor": 1, "extrapolation_factor": 1.0}),
    "yarn with a null": dict(rope_scaling={**YARN, "attention_factor": None}),
    "a factor of one": dict(rope_scaling={"factor": 1.0}),
    "a factor of one of the default": dict(rope_scaling={"rope_type": "default", "factor": 1.0}),
    "dynamic": dict(rope_scaling={"type": "dynamic", "factor": 2.0}),
    "theta alone": dict(rope_theta=500000.0, rope_scaling=None),
}


@pytest.mark.parametrize("fields", TABLES.values(), ids=TABLES)
def test_tables_are_transformers_own(opened, tmp_path, fields):
    """Inverse frequencies bit for bit, and the factor of sines and cosines."""
    table, factor = opened(LLAMA | fields).rope_table()
    expected = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    assert torch.equal(table, expected.inv_freq) and factor == expected.attention_scaling


BAD_ROPE = [
    # (fields, the field at fault)
    (dict(rope_scaling={"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}), "rope_scaling rope_type"),
    (dict(rope_scaling={"type": "su", "factor": 2.0}), "rope_scaling rope_type"),
    (dict(rope_scaling={"rope_type": "mrope", "mrope_section": [8, 12, 12]}), "rope_scaling rope_type"),
    (dict(rope_scaling={"factor": 4.0}), "rope_scaling"),
    (dict(rope_scaling={"type": "linear", "rope_type": "yarn", "factor": 4.0}), "rope_scaling type"),
    (dict(rope_scaling={"type": "dynamic"}), "rope_scaling.factor"),
    (dict(rope_scaling={"rope_type": "default", "factor": 8.0}), "rope_scaling.factor"),
    (dict(rope_scaling={"rope_type": None, "type": "yarn", "factor": 4.0}), "rope_scaling"),
    (dict(rope_scaling={"type": "dynamic", "alpha": 1000.0, "factor": 1.0}), "rope_scaling.alpha"),
    (dict(rope_scaling={"type": "linear", "factor": "4"}), "rope_scaling.factor"),
    (dict(rope_scaling={**YARN, "attn_factor": 1.1}), "rope_scaling.attn_factor"),
    (dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "partial_rotary_factor"),
    (dict(rope_parameters={"full_attention": {"rope_type": "default"}}), "rope_parameters"),
    (dict(rope_scaling="linear"), "rope_scaling"),
    (dict(rope_theta="10000"), "rope_theta"),
]


@pytest.mark.parametrize(("fields", "field"), BAD_ROPE)
def test_other_rotary_positions_are_refused_by_name(opened, fields, field):
    """transformers only logs some of these, and computes without them."""
    with pytest.raises(UserError) as error:
        opened(LLAMA | fields)
    assert error.value.where.endswith(field)


def test_lengths_beyond_the_models_positions(opened, capsys):
    """YaRN reaches factor x the original positions; dynamic NTK ends at max_position_embeddings; others are warned of."""
    yarn = opened(QWEN2 | dict(rope_scaling=YARN, max_position_embeddings=32768))
    yarn.check_positions(131072, "rollout")
    assert capsys.readouterr().err == ""
    opened(LLAMA).check_positions(4097, "judge.max_length")
    said = capsys.readouterr().err
    assert "judge.max_length allows 4097 tokens" in said and "made for 4096" in said
    chunks = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
    million = opened(QWEN2 | dict(dual_chunk_attention_config=chunks, max_position_embeddings=1010000))
    million.check_positions(262144 - 8192, "rollout")
    with pytest.raises(UserError, match="allows 262144 tokens.*253952 .dual_chunk_attention_config"):
        million.check_positions(262144, "rollout")
    dynamic = opened(MORE_FORMS["llama-dynamic"])
    dynamic.check_positions(4096, "rollout")
    with pytest.raises(UserError, match="allows 4097 tokens.*dynamic"):
        dynamic.check_positions(4097, "rollout")


# Directories.


def test_what_is_no_model_directory_says_what_it_is(tmp_path):
    def said(name: str, file: str, content: str = "{}", at: str = "") -> str:
        directory = tmp_path / name
        (directory / at).mkdir(parents=True)
        (directory / at / file).write_text(content)
        with pytest.raises(UserError) as error:
            open_hf_model(str(directory), "policy.model")
        assert "\n" not in str(error.value)
        return str(error.value)

    adapter = said("adapter", "adapter_config.json", '{"base_model_name_or_path": "Qwen/Qwen3-8B"}')
    assert "PEFT adapter" in adapter and "merge_and_unload" in adapter and "Qwen/Qwen3-8B" in adapter
    assert "has params.json, but no config.json" in said("meta", "params.json")
    assert "has m.gguf, but no config.json" in said("gguf", "m.gguf")
    assert "give " + str(tmp_path / "cached/snapshots/abc") in said("cached", "config.json", at="snapshots/abc")
    assert "is a Git LFS pointer" in said("lfs", "config.json", "version https://git-lfs.github.com/spec/v1")


def test_a_name_of_the_hub_is_found_in_the_cache(tmp_path, monkeypatch):
    """Under refs/main; nothing is downloaded, and what is not there is one line with the command."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:
        open_hf_model("Qwen/Qwen3-8B", "judge.model")
    assert str(error.value).startswith("judge.model: 'Qwen/Qwen3-8B'") and "hf download Qwen/Qwen3-8B" in str(
        error.value
    )
    snapshot = tmp_path / "models--Qwen--Qwen3-8B/snapshots/abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--Qwen--Qwen3-8B/refs").mkdir()
    (tmp_path / "models--Qwen--Qwen3-8B/refs/main").write_text("abc")
    (tmp_path / "blob").write_text(json.dumps(LLAMA))
    (snapshot / "config.json").symlink_to(tmp_path / "blob")
    addresses = ("https://huggingface.co/Qwen/Qwen3-8B/tree/main", "hf.co/Qwen/Qwen3-8B", "hf://Qwen/Qwen3-8B/")
    for name in ("Qwen/Qwen3-8B", "https://huggingface.co/Qwen/Qwen3-8B", "Qwen/Qwen3-8B@main", *addresses):
        assert open_hf_model(name, "judge.model").path == snapshot
    with pytest.raises(UserError, match="hf download Qwen/Qwen3-8B --revision v2"):
        open_hf_model("Qwen/Qwen3-8B@v2", "judge.model")


def test_paths_as_people_give_them(tmp_path, monkeypatch):
    """The home directory, file://, a slash too many; a file or an address elsewhere is one line that says what to give."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(LLAMA))
    for path in ("~/m", "~/m//", f"file://{tmp_path}/m", f"{tmp_path}/m/"):
        assert open_hf_model(path, "judge.model").path == tmp_path / "m"
    for path, said in {
        f"{tmp_path}/m/config.json": f"is a file; .*give {tmp_path}/m if",
        "s3://bucket/m": "is an address; copy the model to this machine",
        "https://example.org/m": "is an address; copy the model to this machine",
        "/absent/m": "'/absent/m' is no directory",
        "Qwen3-8B": "'Qwen3-8B' is no directory",
    }.items():
        with pytest.raises(UserError, match=said):
            open_hf_model(path, "judge.model")
