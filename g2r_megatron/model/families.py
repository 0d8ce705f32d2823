"""One table a model family: which Hugging Face tensors make up which Megatron-Core parameter.

Supported: Qwen2 / Qwen2.5, Qwen3 (dense), Llama 3. Parameter names are those of Transformer Engine's layers.
"""

from dataclasses import dataclass
from typing import Literal

Rule = Literal["replicated", "column", "row", "qkv", "gate_up", "vocab"]


@dataclass(frozen=True)
class Mapping:
    """How one Megatron-Core parameter is cut out of Hugging Face tensors.

    replicated: the tensor itself; column / row: split over TP along dimension 0 / 1; qkv: q, k, v rows interleaved by
    key-value group, then split over TP; gate_up: each TP rank holds its gate rows, then its up rows;
    vocab: rows padded with zeros to a multiple of TP, then split.
    """

    rule: Rule
    hf: tuple[str, ...]  # "{i}" stands for the layer number


@dataclass(frozen=True)
class Family:
    """A family: its Hugging Face ``model_type`` and class, and its two tables."""

    model_type: str
    architecture: str
    layer: dict[str, Mapping]  # after "decoder.layers.{i}."
    qkv_bias: bool = False
    qk_norm: bool = False
    globals: tuple = (
        ("embedding.word_embeddings.weight", Mapping("vocab", ("model.embed_tokens.weight",))),
        ("decoder.final_layernorm.weight", Mapping("replicated", ("model.norm.weight",))),
        ("output_layer.weight", Mapping("vocab", ("lm_head.weight",))),
    )


def _hf(*names: str) -> tuple[str, ...]:
    return tuple(f"model.layers.{{i}}.{name}" for name in names)


_DENSE = {
    "self_attention.linear_qkv.layer_norm_weight": Mapping("replicated", _hf("input_layernorm.weight")),
    "self_attention.linear_qkv.weight": Mapping(
        "qkv", _hf("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
    ),
    "self_attention.linear_proj.weight": Mapping("row", _hf("self_attn.o_proj.weight")),
    "mlp.linear_fc1.layer_norm_weight": Mapping("replicated", _hf("post_attention_layernorm.weight")),
    "mlp.linear_fc1.weight": Mapping("gate_up", _hf("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": Mapping("row", _hf("mlp.down_proj.weight")),
}
_QKV_BIAS = {
    "self_attention.linear_qkv.bias": Mapping(
        "qkv", _hf("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
    )
}
_QK_NORM = {
    "self_attention.q_layernorm.weight": Mapping("replicated", _hf("self_attn.q_norm.weight")),
    "self_attention.k_layernorm.weight": Mapping("replicated", _hf("self_attn.k_norm.weight")),
}

FAMILIES = {
    family.model_type: family
    for family in (
        Family("qwen2", "Qwen2ForCausalLM", {**_DENSE, **_QKV_BIAS}, qkv_bias=True),
        Family("qwen3", "Qwen3ForCausalLM", {**_DENSE, **_QK_NORM}, qk_norm=True),
        Family("llama", "LlamaForCausalLM", _DENSE),
    )
}


def mapping_of(family: Family, name: str) -> Mapping:
    """The mapping of a Megatron-Core parameter, ``name`` with *global* layer numbers, layer filled in.

    Raises ``KeyError`` naming a parameter that the family's table does not know.
    """
    prefix = "decoder.layers."
    if name.startswith(prefix):
        layer, _, rest = name[len(prefix) :].partition(".")
        mapping = family.layer[rest]
        return Mapping(mapping.rule, tuple(hf.format(i=layer) for hf in mapping.hf))
    return dict(family.globals)[name]
