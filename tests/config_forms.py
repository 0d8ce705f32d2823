"""Published forms of config.json: those of tests/real_configs, and further ones as other tools and versions save them.

Not a test. The further ones are written down from what is published of these models, field for field, with their odd
fields; a few are what a user makes of a published one (YaRN switched on as the model card says).
"""

import json
from pathlib import Path

CONFIGS = Path(__file__).parent / "real_configs"
LLAMA = dict(
    architectures=["LlamaForCausalLM"],
    attention_bias=False,
    attention_dropout=0.0,
    bos_token_id=1,
    eos_token_id=2,
    hidden_act="silu",
    hidden_size=4096,
    initializer_range=0.02,
    intermediate_size=11008,
    max_position_embeddings=4096,
    model_type="llama",
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=32,
    pretraining_tp=1,
    rms_norm_eps=1e-05,
    rope_scaling=None,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    use_cache=True,
    vocab_size=32000,
)
QWEN2 = dict(
    architectures=["Qwen2ForCausalLM"],
    attention_dropout=0.0,
    bos_token_id=151643,
    eos_token_id=151643,
    hidden_act="silu",
    hidden_size=3584,
    initializer_range=0.02,
    intermediate_size=18944,
    max_position_embeddings=131072,
    max_window_layers=28,
    model_type="qwen2",
    num_attention_heads=28,
    num_hidden_layers=28,
    num_key_value_heads=4,
    rms_norm_eps=1e-06,
    rope_theta=10000,
    sliding_window=4096,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    use_cache=True,
    use_sliding_window=False,
    vocab_size=152064,
)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
CHUNKS = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
JS = {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}
MORE_FORMS = {
    "SmolLM2-360M": LLAMA
    | dict(is_llama_config=True, rope_interleaved=False, tie_word_embeddings=True, mlp_bias=False, pad_token_id=2)
    | {"transformers.js_config": JS, "rope_theta": 100000, "num_key_value_heads": 8, "unk_token_id": 0}
    | {"_model_name_or_path": "SmolLM2-360M"},
    "Llama-2-7b-early": LLAMA | dict(max_length=4096, pad_token_id=0, pretraining_tp=2, torch_dtype="float16"),
    "vicuna-16k": LLAMA | dict(rope_scaling={"factor": 4.0, "type": "linear"}, max_sequence_length=16384),
    "TinyLlama-unsloth": LLAMA
    | dict(_name_or_path="tinyllama", unsloth_version="2024.9", pad_token_id=0, head_dim=64, num_key_value_heads=4),
    "Llama-3.1-axolotl": LLAMA
    | dict(
        rope_scaling=dict(
            factor=8.0,
            high_freq_factor=4.0,
            low_freq_factor=1.0,
            original_max_position_embeddings=8192,
            rope_type="llama3",
        ),
        eos_token_id=[128001, 128008, 128009],
        _attn_implementation_autoset=True,
        quantization_config=None,
        num_key_value_heads=8,
        use_flash_attn=True,
    ),
    "llama-dynamic": LLAMA | dict(rope_scaling={"factor": 2.0, "type": "dynamic"}, rope_theta=1000000),
    "R1-Distill-Qwen": QWEN2 | dict(use_mrope=False),
    "Qwen2.5-1M": QWEN2
    | dict(dual_chunk_attention_config=CHUNKS, max_position_embeddings=1010000, sliding_window=None)
    | dict(is_causal=True, qkv_bias=True, attention_bias=True, activation_function="silu", rotary_pct=1.0),
    "Qwen2.5-YaRN": QWEN2 | dict(rope_scaling={**YARN, "type": "yarn"}, max_position_embeddings=32768),
    "Qwen3-of-transformers-5": {
        **{k: v for k, v in QWEN2.items() if k not in ("rope_theta", "torch_dtype", "max_window_layers")},
        **dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=128, attention_bias=False),
        **dict(rope_parameters={"rope_theta": 1000000, **YARN, "attention_factor": 0.9}, dtype="bfloat16"),
        **dict(layer_types=["full_attention"] * 28, sliding_window=None, pad_token_id=None),
    },
    "Mistral-of-llava": {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": 10,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_config": {"model_type": "pixtral", "hidden_size": 1024, "head_dim": 64},
        "tie_word_embeddings": False,
        "text_config": {
            **{k: LLAMA[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")},
            **dict(model_type="mistral", head_dim=128, rms_norm_eps=1e-05, rope_theta=1000000000.0, vocab_size=131072),
            **dict(max_position_embeddings=1024000, num_key_value_heads=8, is_composition=True, sliding_window=None),
        },
    },
}


def published_forms() -> dict[str, dict]:
    """Name -> the fields of its config.json, 22 in all."""
    files = {path.stem: json.loads(path.read_text()) for path in sorted(CONFIGS.glob("*.json"))}
    return files | json.loads(json.dumps(MORE_FORMS))


def shrunken(fields: dict) -> dict:
    """The form at a size that is built in milliseconds: 2 layers, hidden 32, 64 positions, experts of 8."""
    if "text_config" in fields:
        return fields | {"text_config": shrunken(fields["text_config"])}
    alike = fields.get("num_key_value_heads") == fields["num_attention_heads"]
    sizes = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4 if alike else 2,
        head_dim=16,
        vocab_size=61,
        max_position_embeddings=64,
        max_window_layers=1,
        bos_token_id=1,
        eos_token_id=2,
        num_experts=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
    )
    small = fields | {name: size for name, size in sizes.items() if name in fields}
    if small.get("layer_types"):
        small["layer_types"] = small["layer_types"][:2]
    if small.get("sliding_window"):
        small["sliding_window"] = 5
    for table in ("rope_scaling", "rope_parameters"):
        if small.get(table) and "original_max_position_embeddings" in small[table]:
            small[table] = small[table] | {"original_max_position_embeddings": 16}
    return small
