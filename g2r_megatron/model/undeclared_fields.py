"""Fields of config.json that transformers' class of the model does not declare: which can change what it computes.

transformers itself heeds few of them, but the model's own code may. A field is judged by its name: some speak of what a
layer computes, others of training, kernels, images. It does no harm where its value is what is computed anyway.
"""

import re

from transformers import PretrainedConfig

from g2r_megatron.model.families import Family

# Beginnings of words in the names of fields that change what a layer computes.
FUNCTION_WORDS = (
    *("rope", "rotary", "yarn", "ntk", "alibi", "norm", "rmsnorm", "layernorm", "qk", "scal", "multipl", "softcap"),
    *("logit", "logn", "clip", "attn", "attention", "act", "expert", "moe", "rout", "topk", "scoring", "bias"),
    *("window", "sliding", "sink", "mup", "residual", "layer", "head", "mlp", "ffn", "gate", "dense", "lora", "mla"),
    *("tie", "quant", "compress", "sparse", "mamba", "ssm", "conv", "posit", "causal", "bidirection"),
)
FUNCTION_NAMES = {"dim_model_base", "use_cla", "cla_share_factor", "no_bias"}  # without one of these words
# Words that begin like these, and mean something else.
ORDINARY_WORDS = re.compile(
    r"action|active|actor|actual|convers|convert|header|normali[sz]er?$|quanti(ty|le)|scaler|tier|multiples?$"
)
# Words for training, for the choice of a kernel, or for printing. A name with one of them is left aside.
NOTES = re.compile(
    r"dropout|pdrop|layerdrop|init|loss|implementation|flash|sdpa|xformers|eager|fused|kernel|cache|output_|checkpoint"
    r"|grad|learning_rate|(^|_)lr(_|$)|weight_decay|optimizer|freez|frozen|trainable|offload|recompute|^(use_)?lora"
    r"|summary_|classifier_|dim_multiplier|multiple_of|pad_vocab|vocab_size|templat|logits_to_keep|max_pos|n_positions"
)
OTHER_SENSES = re.compile(
    r"vision|visual|image|video|audio|speech|sound|multi_?modal|multimodal|projector|^mm_|processor|text_config$"
)
# What every model of our families does: true says nothing new, false contradicts it. (transformers masks nothing with
# is_causal: false, or null.)
ALWAYS = re.compile(
    r"^(is_causal|causal|causal_attention|use_causal_mask|use_rope|rope|use_rotary\w*|rotary|rotary_emb|use_rms_?norm|rms_?norm"
    r"|pre_?norm|pre_layer_?norm|gated_mlp|use_gated_mlp|is_gated_act|use_swiglu|swiglu|use_gqa|scale_attn_weights)$"
)
QKV_BIAS = re.compile(r"^(attention_bias|(use_|add_|attn_|attention_)?qkv_bias)$")
QK_NORM = re.compile(r"^(use_)?qk_(layer_?)?norm$")
# Values that say what is computed anyway, for names that match.
SAME_TEXT = (
    (re.compile(r"act(ivation)?(_?(fn|func|function|type))?$"), {"silu", "swish", "swiglu"}),
    (re.compile(r"norm(alization)?(_?(type|func|function|class|class_name))?$"), {"rmsnorm", "rms_norm", "rms"}),
    (re.compile(r"position_?embedding(_?type)?$|^rope_type$"), {"rope", "rotary", "default"}),
    (re.compile(r"(attn|attention)(_head)?_type$"), {"full", "full_attention", "causal", "gqa", "mha"}),
    (re.compile(r"mlp(_class_name|_type)$"), {"llamamlp", "swiglu", "gated"}),
)
FACTOR_OF_ONE = re.compile(
    r"^(logits?_scal(e|ing)|(embedding|residual|lm_head|logits?|rope)_multiplier|(scale_emb|emb(edding)?_scale)"
    r"|rope_(scaling_)?factor|rope_ratio|(rotary|rope)_(pct|percent)|routed_scaling_factor)$"
)
OTHER_NAMES = {  # of declared fields
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("n_kv_heads", "n_head_kv", "num_kv_heads"),
    "head_dim": ("head_size", "attention_head_dim", "attention_head_size", "attn_head_dim", "rotary_dim"),
    "rms_norm_eps": ("layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_eps", "norm_epsilon"),
    "rope_theta": ("rope_base", "rotary_base", "rotary_emb_base", "rope_freq_base"),
    "intermediate_size": ("ffn_hidden_size", "ffn_dim", "mlp_hidden_size"),
    "tie_word_embeddings": ("tie_embeddings", "tie_lm_head"),
}
DECLARED_AS = {other: name for name, others in OTHER_NAMES.items() for other in others}


def speaks_of_function(name: str) -> bool:
    """Whether the name of a field that we do not know says that it is about what the model computes."""
    if name in FUNCTION_NAMES:
        return True
    if NOTES.search(name) or OTHER_SENSES.search(name):
        return False
    words = re.split(r"[^a-z0-9]+", re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower())
    return any(word.startswith(FUNCTION_WORDS) and not ORDINARY_WORDS.match(word) for word in words)


def contradicts(name: str, value) -> bool:
    """Whether a field that is not set denies what every model of our families does."""
    return bool(ALWAYS.match(name)) and not value and (value is not None or name == "is_causal")


def says_the_same(name: str, value, config: PretrainedConfig, family: Family) -> bool:
    """Whether the value of an undeclared field is what a model of ``config`` computes without it."""
    if value is True:
        own = (family.qkv_bias and QKV_BIAS.match(name)) or (family.qk_norm and QK_NORM.match(name))
        if own or ALWAYS.match(name):
            return True
    if isinstance(value, str):
        return any(pattern.search(name) and value.lower() in texts for pattern, texts in SAME_TEXT)
    if name == "layer_types":
        return value == [attention_of_all_layers(config)] * config.num_hidden_layers
    if name in DECLARED_AS:
        return value == _declared_value(config, DECLARED_AS[name])
    return type(value) in (int, float) and value == 1 and bool(FACTOR_OF_ONE.match(name))


def attention_of_all_layers(config: PretrainedConfig) -> str:
    """The kind of every layer's attention, for a class that does not declare ``layer_types``."""
    return "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"


def _declared_value(config: PretrainedConfig, name: str):
    if name == "rope_theta":
        return config.rope_parameters["rope_theta"]
    if name == "head_dim":
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return getattr(config, name)
