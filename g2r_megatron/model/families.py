"""One table a model family: which Hugging Face tensors make up which Megatron-Core parameter.

Parameter names are those of Transformer Engine's layers; "{i}" stands for the layer, "{e}" for the expert. Families
that Megatron-Core 0.16 cannot build are absent: Gemma 2 and 3 normalise after attention and MLP as well, and Gemma 3
has two rope bases.
"""

from collections.abc import Mapping as Table
from dataclasses import dataclass
from typing import Literal

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # the two are one tensor in a tied model

Rule = Literal["replicated", "column", "row", "qkv", "gate_up", "vocab"]


@dataclass(frozen=True)
class Mapping:
    """How one Megatron-Core parameter is cut out of Hugging Face tensors.

    replicated: the tensor itself; row: split over TP along its columns; qkv: q, k, v rows interleaved by key-value
    group, then split over TP; gate_up: each TP rank holds its gate rows, then its up rows; vocab: rows padded with
    zeros to a multiple of TP, then split. ``fused``: the tensors hold all experts of a layer, one after the other.
    """

    rule: Rule
    hf: tuple[str, ...]
    fused: bool = False


@dataclass(frozen=True)
class Family:
    """A family: its Hugging Face ``model_type`` and class, its tables, and what its layers have.

    ``dense``, ``experts`` and ``fused_experts`` follow "decoder.layers.{i}."; a mixture-of-experts layer has one of the
    latter two, depending on whether the files store experts one by one or all in one tensor.
    """

    model_type: str
    architecture: str
    attention: Table[str, Mapping]
    dense: Table[str, Mapping] | None = None
    experts: Table[str, Mapping] | None = None
    fused_experts: Table[str, Mapping] | None = None
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def reward_architecture(self) -> str:
        """The Hugging Face class of the family's reward models."""
        return self.architecture.replace("ForCausalLM", "ForSequenceClassification")


def _layer(*names: str) -> tuple[str, ...]:
    return tuple(f"model.layers.{{i}}.{name}" for name in names)


GLOBALS = {
    "embedding.word_embeddings.weight": Mapping("vocab", (EMBEDDING,)),
    "decoder.final_layernorm.weight": Mapping("replicated", ("model.norm.weight",)),
    "output_layer.weight": Mapping("vocab", (HEAD,)),
    "score.weight": Mapping("replicated", ("score.weight",)),  # a reward model's, in place of the output layer
}
_ATTENTION = {
    "self_attention.linear_qkv.layer_norm_weight": Mapping("replicated", _layer("input_layernorm.weight")),
    "self_attention.linear_qkv.weight": Mapping(
        "qkv", _layer("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
    ),
    "self_attention.linear_proj.weight": Mapping("row", _layer("self_attn.o_proj.weight")),
}
_QKV_BIAS = {
    "self_attention.linear_qkv.bias": Mapping(
        "qkv", _layer("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
    )
}
_QK_NORM = {
    "self_attention.q_layernorm.weight": Mapping("replicated", _layer("self_attn.q_norm.weight")),
    "self_attention.k_layernorm.weight": Mapping("replicated", _layer("self_attn.k_norm.weight")),
}
_DENSE = {
    "mlp.linear_fc1.layer_norm_weight": Mapping("replicated", _layer("post_attention_layernorm.weight")),
    "mlp.linear_fc1.weight": Mapping("gate_up", _layer("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": Mapping("row", _layer("mlp.down_proj.weight")),
}


def _experts(block: str, gate: str, up: str, down: str) -> dict[str, Mapping]:
    """A mixture-of-experts layer stored expert by expert."""
    return {
        "pre_mlp_layernorm.weight": Mapping("replicated", _layer("post_attention_layernorm.weight")),
        "mlp.router.weight": Mapping("replicated", _layer(f"{block}.gate.weight")),
        "mlp.experts.{e}.linear_fc1.weight": Mapping(
            "gate_up", _layer(f"{block}.experts.{{e}}.{gate}.weight", f"{block}.experts.{{e}}.{up}.weight")
        ),
        "mlp.experts.{e}.linear_fc2.weight": Mapping("row", _layer(f"{block}.experts.{{e}}.{down}.weight")),
    }


_FUSED_EXPERTS = {  # as transformers 5 holds them in memory, and some files on disk
    "pre_mlp_layernorm.weight": Mapping("replicated", _layer("post_attention_layernorm.weight")),
    "mlp.router.weight": Mapping("replicated", _layer("mlp.gate.weight")),
    "mlp.experts.{e}.linear_fc1.weight": Mapping("gate_up", _layer(*["mlp.experts.gate_up_proj"] * 2), fused=True),
    "mlp.experts.{e}.linear_fc2.weight": Mapping("row", _layer("mlp.experts.down_proj"), fused=True),
}

FAMILIES = {
    family.model_type: family
    for family in (
        Family("qwen2", "Qwen2ForCausalLM", {**_ATTENTION, **_QKV_BIAS}, _DENSE, qkv_bias=True),
        Family("qwen3", "Qwen3ForCausalLM", {**_ATTENTION, **_QK_NORM}, _DENSE, qk_norm=True),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            {**_ATTENTION, **_QK_NORM},
            _DENSE,  # layers of mlp_only_layers
            _experts("mlp", "gate_proj", "up_proj", "down_proj"),
            _FUSED_EXPERTS,
            qk_norm=True,
        ),
        Family("llama", "LlamaForCausalLM", _ATTENTION, _DENSE),
        Family("mistral", "MistralForCausalLM", _ATTENTION, _DENSE),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            _ATTENTION,
            experts=_experts("block_sparse_moe", "w1", "w3", "w2"),
            fused_experts=_FUSED_EXPERTS,
        ),
    )
}
