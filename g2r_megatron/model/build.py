"""A Megatron-Core GPT model from a Hugging Face directory, on any layout."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from g2r_megatron.config import Layout, Precision
from g2r_megatron.errors import UserError
from g2r_megatron.model.families import mapping_of
from g2r_megatron.model.gpt import SelectiveGPTModel, block_spec
from g2r_megatron.model.hf import Geometry, HFModel
from g2r_megatron.model.torch_layers import TorchSpecProvider
from g2r_megatron.model.weights import global_name, load_hf_weights
from g2r_megatron.parallel import cpu
from g2r_megatron.parallel.groups import ModelGroups
from g2r_megatron.parallel.layout import check_layout_for_model

# Rows (tokens) of an FP8 product come in multiples of this: the recipe's block of scales, at least 16.
FP8_TOKENS = {"tensorwise": 16, "blockwise": 128, "mxfp8": 32}


@dataclass
class MegatronModel:
    """One model on this rank's stage, with everything that is needed to run it.

    ``module`` is what the schedule calls (possibly wrapped for bf16, later by DDP); ``gpt`` the bare model.
    """

    module: torch.nn.Module
    gpt: SelectiveGPTModel
    config: TransformerConfig
    groups: ModelGroups
    hf: HFModel

    @property
    def geometry(self) -> Geometry:
        return self.hf.geometry

    @property
    def layer_offset(self) -> int:
        """Layers on earlier pipeline stages."""
        return get_transformer_layer_offset(self.config, None, self.groups.pgs.pp.rank())

    @property
    def token_multiple(self) -> int:
        """What runs through the layers at once must be a multiple of this many tokens; 1 without FP8."""
        return FP8_TOKENS[self.config.fp8_recipe] if self.config.fp8 else 1

    @property
    def length_multiple(self) -> int:
        """Sequence lengths are padded to this: sequence parallelism splits them over TP."""
        return self.token_multiple * (self.groups.layout.tp if self.groups.layout.sp else 1)


def spec_backend(name: str, spec: str, dtype: str) -> BackendSpecProvider:
    """The layers to build from: ``spec`` is "auto", "torch" or "te"; ``name`` the section, for errors.

    "auto" keeps fp32 models on plain torch: Transformer Engine multiplies fp32 matrices in TF32.
    """
    if spec == "torch" or (spec == "auto" and (cpu.on_cpu() or dtype == "fp32")):
        return TorchSpecProvider()
    if cpu.on_cpu():
        raise UserError(f"{name}.spec", "te without a CUDA device", "use torch or auto")
    try:
        import transformer_engine  # noqa: F401
    except ImportError:
        if spec == "te":
            raise UserError(
                f"{name}.spec", "te, but transformer_engine is not installed", "install the gpu extra or use torch"
            ) from None
        return TorchSpecProvider()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def check_precision(name: str, precision: Precision, spec: str) -> None:
    """Raise ``UserError`` for a precision that this machine or these layers cannot run."""
    if precision.fp8 == "none":
        return
    where = f"{name}.precision.fp8"
    if cpu.on_cpu():
        raise UserError(where, f"{precision.fp8} without a CUDA device", "FP8 needs a GPU; use none")
    if precision.dtype != "bf16":
        raise UserError(where, f"{precision.fp8} with dtype {precision.dtype}", f"set {name}.precision.dtype to bf16")
    if isinstance(spec_backend(name, spec, precision.dtype), TorchSpecProvider):
        raise UserError(
            where, f"{precision.fp8} with plain torch layers", "FP8 needs Transformer Engine; install the gpu extra"
        )
    import transformer_engine.pytorch as te

    available = {
        "tensorwise": te.is_fp8_available,
        "blockwise": te.is_fp8_block_scaling_available,
        "mxfp8": te.is_mxfp8_available,
    }
    can, reason = available[precision.fp8](return_reason=True)
    if not can:
        raise UserError(where, f"{precision.fp8} on this GPU ({reason})", "choose another recipe or none")


def check_model(name: str, hf: HFModel, layout: Layout, precision: Precision, spec: str) -> None:
    """Raise ``UserError`` unless the model's dimensions divide over the layout and the machine runs its precision."""
    g = hf.geometry
    check_layout_for_model(name, layout, heads=g.heads, kv_heads=g.kv_heads, ffn=g.ffn, layers=g.layers)
    spec_backend(name, spec, precision.dtype)
    check_precision(name, precision, spec)


def _recompute_options(recompute: str) -> dict:
    if recompute == "full":
        return dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    if recompute == "selective":
        return dict(recompute_granularity="selective", recompute_modules=["core_attn"])
    return {}


def transformer_config(hf: HFModel, layout: Layout, precision: Precision, recompute: str) -> TransformerConfig:
    """Megatron-Core's config for a dense pre-norm SwiGLU decoder; no dropout, no fused CUDA-only kernels."""
    g, dtype = hf.geometry, torch.bfloat16 if precision.dtype == "bf16" else torch.float32
    return TransformerConfig(
        num_layers=g.layers,
        hidden_size=g.hidden,
        num_attention_heads=g.heads,
        num_query_groups=g.kv_heads,
        kv_channels=g.head_dim,
        ffn_hidden_size=g.ffn,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=hf.config.rms_norm_eps,
        add_bias_linear=False,
        add_qkv_bias=hf.family.qkv_bias,
        qk_layernorm=hf.family.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        fp8="hybrid" if precision.fp8 != "none" else None,
        # "delayed" is not offered: its scales start at 1, move in passes with gradients only (never in rollouts, old
        # log-probs, verdicts) and are reduced together for all models of a process, whatever their groups.
        fp8_recipe=precision.fp8 if precision.fp8 != "none" else "tensorwise",
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sp,
        variable_seq_lengths=True,  # micro-batches differ in rows and length
        moe_token_dispatcher_type="alltoall",  # checked by variable_seq_lengths in dense models too
        batch_p2p_comm=not cpu.on_cpu(),  # gloo has no batched send/receive
        calculate_per_token_loss=True,  # the schedule then leaves the loss unscaled
        use_cpu_initialization=cpu.on_cpu(),
        perform_initialization=False,  # every weight is read from the checkpoint
        gradient_accumulation_fusion=False,
        deallocate_pipeline_outputs=True,
        **_recompute_options(recompute),
    )


def _mark_tensor_parallel(model: MegatronModel) -> None:
    """Tell the optimizer which parameters are shards, so that the gradient norm counts every rank's.

    Megatron-Core sets these marks only while it initialises weights at random, which we never do.
    """
    for name, parameter in model.gpt.named_parameters():
        rule = mapping_of(model.hf.family, global_name(name, model.layer_offset)).rule
        if rule != "replicated" and not getattr(parameter, "tensor_model_parallel", False):
            set_tensor_model_parallel_attributes(
                parameter, True, 1 if rule == "row" else 0, 2 if rule == "gate_up" else 1
            )


def build_model(
    name: str,
    hf: HFModel,
    groups: ModelGroups,
    precision: Precision,
    recompute: str = "none",
    spec: str = "auto",
    load: bool = True,
) -> MegatronModel:
    """Build this rank's stage and, with ``load``, read its weights. ``name`` ("policy", "judge") is for errors."""
    g, layout = hf.geometry, groups.layout
    check_model(name, hf, layout, precision, spec)
    config = transformer_config(hf, layout, precision, recompute)
    gpt = SelectiveGPTModel(
        config=config,
        transformer_layer_spec=block_spec(config, spec_backend(name, spec, precision.dtype), groups.pgs.pp.rank()),
        vocab_size=g.padded_vocab(layout.tp, groups.dp_size),
        max_sequence_length=hf.config.max_position_embeddings,
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=g.tied,
        position_embedding_type="rope",
        rotary_base=int(hf.config.rope_parameters["rope_theta"]),
        pg_collection=groups.pgs,
    ).to(cpu.device())
    # transformers' own frequencies: every rope type that open_hf_model accepts, with all its parameters.
    gpt.rotary_pos_emb.inv_freq = hf.inverse_frequencies().to(cpu.device())
    module = Float16Module(config, gpt) if config.bf16 else gpt
    model = MegatronModel(module, gpt, config, groups, hf)
    _mark_tensor_parallel(model)
    if load:
        load_hf_weights(gpt, hf, groups, model.layer_offset)
    return model
