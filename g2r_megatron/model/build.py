"""A Megatron-Core GPT model from a Hugging Face directory, on any layout."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig

from g2r_megatron.config.layout import check_layout_for_model, stage_layers
from g2r_megatron.config.options import Layout, Precision
from g2r_megatron.device import local_device, on_cpu
from g2r_megatron.errors import UserError
from g2r_megatron.model.gpt import SelectiveGPTModel, block_spec
from g2r_megatron.model.hf import Geometry, HFModel
from g2r_megatron.model.reward_model import RewardModel
from g2r_megatron.model.torch_dist import read_checkpoint_weights
from g2r_megatron.model.torch_layers import TorchSpecProvider
from g2r_megatron.model.weights import canonical_name, first_expert, is_expert, mapping_of, read_hf_weights
from g2r_megatron.parallel.groups import ModelGroups

# Rows (tokens) of an FP8 product come in multiples of this: the recipe's block of scales, at least 16.
FP8_TOKENS = {"tensorwise": 16, "blockwise": 128, "mxfp8": 32}
FP8_WIDTHS = {"tensorwise": 16, "blockwise": 16, "mxfp8": 32}  # and the other sides of a product of these


@dataclass
class MegatronModel:
    """One model on this rank's stage, with everything that is needed to run it.

    ``modules`` is what the schedule calls (possibly wrapped for bf16, later by DDP), ``chunks`` the bare models: one,
    or one for each of the rank's virtual pipeline stages. ``layer_offsets``: layers before each chunk.
    """

    modules: list[torch.nn.Module]
    chunks: list[SelectiveGPTModel]
    layer_offsets: list[int]
    config: TransformerConfig
    groups: ModelGroups
    hf: HFModel

    @property
    def geometry(self) -> Geometry:
        return self.hf.geometry

    @property
    def token_multiple(self) -> int:
        """What runs through the layers at once must be a multiple of this many tokens; 1 without FP8."""
        return FP8_TOKENS[self.config.fp8_recipe] if self.config.fp8 else 1

    @property
    def length_multiple(self) -> int:
        """Sequence lengths are padded to this: context parallelism splits them, sequence parallelism again over TP."""
        layout = self.groups.layout
        return self.token_multiple * layout.cp * (layout.tp if layout.sp else 1)

    def row_positions(self, length: int) -> range:
        """Positions of a packed row of ``length`` tokens whose hidden states this rank has (model/tree_attention.py).

        Under sequence parallelism a slice of its context parallel rank's positions, else all of them.
        """
        cp, tp = self.groups.pgs.cp, self.groups.pgs.tp
        mine = range(length)[cp.rank() :: cp.size()]
        if not self.config.sequence_parallel:
            return mine
        part = len(mine) // tp.size()
        return mine[tp.rank() * part : (tp.rank() + 1) * part]

    @property
    def training(self) -> bool:
        return self.modules[0].training

    def train(self, mode: bool = True) -> None:
        """Training or evaluation mode of all chunks (models here have no dropout; recompute happens in training)."""
        for module in self.modules:
            module.train(mode)

    def weights_changed(self) -> None:
        """Make new FP8 copies of the weights in every chunk's next pass (the schedule does this by itself)."""
        for module in self.modules:
            module.set_is_first_microbatch()

    def freeze(self) -> None:
        """No weight gradients from here on."""
        for chunk in self.chunks:
            chunk.requires_grad_(False)
        self.train(False)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """(canonical name, parameter) of this rank; a tied last stage has the embedding as output_layer.weight too."""
        expert = first_expert(self.hf, self.groups)
        for chunk, offset in zip(self.chunks, self.layer_offsets, strict=True):
            for name, parameter in chunk.named_parameters():
                yield canonical_name(name, offset, expert), parameter


def spec_backend(name: str, spec: str, dtype: str) -> BackendSpecProvider:
    """The layers to build from: ``spec`` is "auto", "torch" or "te"; ``name`` the section, for errors.

    "auto" keeps fp32 models on plain torch: Transformer Engine multiplies fp32 matrices in TF32. A bf16 model on a GPU
    never falls back to plain torch by itself: it would be several times slower, its experts one after the other.
    """
    if spec == "torch" or (spec == "auto" and (on_cpu() or dtype == "fp32")):
        return TorchSpecProvider()
    if on_cpu():
        raise UserError(f"{name}.spec", "te without a CUDA device", "use torch or auto")
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # a compiled package for another torch or CUDA can raise any error
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name}.spec",
            f"{spec} with {dtype} on a GPU needs Transformer Engine, which cannot be imported ({reason})",
            f"install it (tools/install_gpu.sh), or ask for plain torch layers with {name}.spec torch",
        ) from error
    from g2r_megatron.model.te_layers import RowTESpecProvider

    return RowTESpecProvider()


def check_precision_options(name: str, precision: Precision, spec: str) -> None:
    """Raise ``UserError`` for FP8 options that no machine can run."""
    if precision.fp8 == "none":
        return
    where = f"{name}.precision.fp8"
    if precision.dtype != "bf16":
        raise UserError(where, f"{precision.fp8} with dtype {precision.dtype}", f"set {name}.precision.dtype to bf16")
    if spec == "torch":
        raise UserError(where, f"{precision.fp8} with {name}.spec torch", "FP8 needs Transformer Engine; set spec te")


def check_precision(name: str, precision: Precision, spec: str) -> None:
    """Raise ``UserError`` for a precision that this machine or these layers cannot run."""
    if precision.fp8 == "none":
        return
    where = f"{name}.precision.fp8"
    if on_cpu():
        raise UserError(where, f"{precision.fp8} without a CUDA device", "FP8 needs a GPU; use none")
    check_precision_options(name, precision, spec)
    spec_backend(name, spec, precision.dtype)  # Transformer Engine is there
    import transformer_engine.pytorch as te

    available = {
        "tensorwise": te.is_fp8_available,
        "blockwise": te.is_fp8_block_scaling_available,
        "mxfp8": te.is_mxfp8_available,
    }
    can, reason = available[precision.fp8](return_reason=True)
    if not can:
        raise UserError(where, f"{precision.fp8} on this GPU ({reason})", "choose another recipe or none")


def check_fp8_widths(name: str, hf: HFModel, layout: Layout, precision: Precision) -> None:
    """Raise ``UserError`` for a product whose sides on one rank FP8 kernels do not take."""
    if precision.fp8 == "none":
        return
    g, multiple = hf.geometry, FP8_WIDTHS[precision.fp8]
    widths = {
        "hidden size": g.hidden,
        f"query heads x head size over tp {layout.tp}": g.heads * g.head_dim // layout.tp,
        f"query and key-value heads x head size over tp {layout.tp}": (g.heads + 2 * max(g.kv_heads, layout.tp))
        * g.head_dim
        // layout.tp,
    }
    if not g.experts or g.dense_layers:
        widths[f"feed-forward size over tp {layout.tp}"] = g.ffn // layout.tp
    if g.experts:
        widths[f"expert feed-forward size over etp {layout.etp}"] = g.expert_ffn // layout.etp
    for what, width in widths.items():
        if width % multiple:
            raise UserError(
                f"{name}.precision.fp8",
                f"{precision.fp8} with a {what} of {width}, not a multiple of {multiple}",
                "choose a smaller tensor parallel size, or none",
            )


def check_model(name: str, hf: HFModel, layout: Layout, precision: Precision, spec: str) -> None:
    """Raise ``UserError`` unless the model's dimensions divide over the layout and the machine runs its precision."""
    g = hf.geometry
    check_layout_for_model(
        name,
        layout,
        heads=g.heads,
        kv_heads=g.kv_heads,
        ffn=g.ffn,
        layers=g.layers,
        experts=g.experts,
        expert_ffn=g.expert_ffn,
    )
    spec_backend(name, spec, precision.dtype)
    check_precision(name, precision, spec)
    check_fp8_widths(name, hf, layout, precision)


def _recompute_options(recompute: str, hf: HFModel) -> dict:
    """ "selective": the part whose recompute saves most memory for its cost, the feed-forward part of dense layers.

    If all layers have experts, attention is recomputed. That saves little, because fused attention keeps no scores.
    """
    if recompute == "full":
        return dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    if recompute == "selective":
        return dict(
            recompute_granularity="selective",
            recompute_modules=["mlp" if hf.geometry.has_dense_layers else "core_attn"],
        )
    return {}


class _StageLayout(PipelineParallelLayerLayout):
    """Megatron-Core's explicit split of the layers over stages, seen from one rank of *our* pipeline group.

    Megatron-Core 0.16 asks for a stage without naming the group, so its own split uses the global pipeline group.
    """

    def __init__(self, split: list[int], pp_size: int, pp_rank: int):
        stages = [["decoder"] * n for n in split]
        stages[0].insert(0, "embedding")
        stages[-1].append("loss")
        super().__init__(stages, pp_size)
        self._pp_rank = pp_rank

    def get_num_layers_to_build(self, layer_type=LayerType.decoder, vp_stage=None, pp_rank=None):
        return self.layout[self._pp_rank][vp_stage or 0].count(layer_type)

    def get_layer_offset(self, layer_type=LayerType.decoder, vp_stage=None, pp_rank=None):
        before = (vp_stage or 0) * self.pipeline_model_parallel_size + self._pp_rank
        stages = [
            self.layout[i % self.pipeline_model_parallel_size][i // self.pipeline_model_parallel_size]
            for i in range(before)
        ]
        return sum(stage.count(layer_type) for stage in stages)


def _moe_options(hf: HFModel, layout: Layout, backend: BackendSpecProvider) -> dict:
    """Experts without capacity limits or auxiliary losses: exactly the router's choice is computed."""
    g = hf.geometry
    if not g.experts:
        return {}
    return dict(
        num_moe_experts=g.experts,
        moe_router_topk=hf.config.num_experts_per_tok,
        moe_ffn_hidden_size=g.expert_ffn,
        moe_layer_freq=[int(g.is_moe(i)) for i in range(g.layers)] if g.dense_layers else 1,
        moe_router_pre_softmax=not getattr(hf.config, "norm_topk_prob", True),  # Mixtral always normalises
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_enable_routing_replay=True,  # does nothing until judge/routing.py turns it on
        moe_router_dtype="fp32",
        moe_grouped_gemm=not isinstance(backend, TorchSpecProvider),
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )


def _window_options(hf: HFModel) -> dict:
    if (window := hf.sliding_window) is None:
        return {}
    width, layers = window
    return dict(window_size=(width - 1, 0), window_attn_skip_freq=[int(windowed) for windowed in layers])


def transformer_config(
    hf: HFModel, layout: Layout, pp_rank: int, precision: Precision, recompute: str, backend: BackendSpecProvider
) -> TransformerConfig:
    """Megatron-Core's config for a pre-norm SwiGLU decoder; no dropout, no fused CUDA-only kernels."""
    g, dtype = hf.geometry, torch.bfloat16 if precision.dtype == "bf16" else torch.float32
    _, rope_factor = hf.rope_table()
    return TransformerConfig(
        num_layers=g.layers,
        hidden_size=g.hidden,
        num_attention_heads=g.heads,
        num_query_groups=g.kv_heads,
        kv_channels=g.head_dim,
        ffn_hidden_size=g.ffn,
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=isinstance(backend, TorchSpecProvider),  # our own counterpart, which keeps less
        normalization="RMSNorm",
        layernorm_epsilon=hf.config.rms_norm_eps,
        add_bias_linear=False,
        add_qkv_bias=hf.family.qkv_bias,
        qk_layernorm=hf.family.qk_norm,
        # YaRN's factor of sines and cosines is in queries and keys: its square is in their products
        softmax_scale=rope_factor**2 / math.sqrt(g.head_dim) if rope_factor != 1.0 else None,
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
        virtual_pipeline_model_parallel_size=layout.vpp,
        pipeline_model_parallel_layout=_StageLayout(stage_layers(layout, g.layers), layout.pp, pp_rank),
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sp,
        variable_seq_lengths=True,  # micro-batches differ in rows and length
        moe_token_dispatcher_type="alltoall",  # checked by variable_seq_lengths in dense models too
        # Virtual stages: each message on its own, as Megatron-LM runs them. Otherwise batched, which gloo cannot.
        batch_p2p_comm=layout.vpp is None and not on_cpu(),
        overlap_p2p_comm=layout.vpp is not None,
        calculate_per_token_loss=True,  # the schedule then leaves the loss unscaled
        use_cpu_initialization=on_cpu(),
        perform_initialization=False,  # every weight is read from the checkpoint
        gradient_accumulation_fusion=False,
        # gloo sends from the tensor itself: if it is freed too early, other data in its memory would be sent
        deallocate_pipeline_outputs=not on_cpu(),
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),  # groups.make_deterministic
        **_moe_options(hf, layout, backend),
        **_window_options(hf),
        **_recompute_options(recompute, hf),
    )


def _mark_for_optimizer(model: MegatronModel) -> None:
    """Tell the optimizer which parameters are shards, so that gradients are reduced and their norm counted rightly.

    Megatron-Core sets the first mark only while it initialises weights at random, which we never do, and takes experts
    for dense parameters when they are not spread over expert parallel ranks, though their replicas are others.
    """
    for name, parameter in model.named_parameters():
        rule = mapping_of(model.hf, name).rule
        if rule != "replicated" and not getattr(parameter, "tensor_model_parallel", False):
            set_tensor_model_parallel_attributes(
                parameter, True, 1 if rule == "row" else 0, 2 if rule == "gate_up" else 1
            )
        if is_expert(name):
            parameter.allreduce = False  # type: ignore[attr-defined]


def _build_chunk(hf: HFModel, config: TransformerConfig, backend, groups: ModelGroups, vp_stage: int | None):
    """(chunk, layers before it): the layers of one (virtual) stage, with embedding and output layer at the ends."""
    g, split = hf.geometry, config.pipeline_model_parallel_layout
    first = split.get_layer_offset(vp_stage=vp_stage)
    layers = split.get_num_layers_to_build(vp_stage=vp_stage)
    gpt = (RewardModel if g.is_reward_model else SelectiveGPTModel)(
        config=config,
        transformer_layer_spec=block_spec(config, backend, [g.is_moe(first + i) for i in range(layers)]),
        vocab_size=g.padded_vocab(groups.layout.tp, groups.dp_size),
        max_sequence_length=hf.config.max_position_embeddings,
        pre_process=groups.is_first_stage and not vp_stage,
        post_process=groups.is_last_stage and vp_stage in (None, groups.layout.vpp - 1 if groups.layout.vpp else None),
        parallel_output=True,
        share_embeddings_and_output_weights=g.tied,
        position_embedding_type="rope",
        rotary_base=int(hf.config.rope_parameters["rope_theta"]),
        pg_collection=groups.pgs,
        vp_stage=vp_stage,
    )
    return gpt, first


def build_model(
    name: str,
    hf: HFModel,
    groups: ModelGroups,
    precision: Precision,
    recompute: str = "none",
    spec: str = "auto",
) -> MegatronModel:
    """Build this rank's stage and read its weights. ``name`` ("policy", "judge") is for errors."""
    model = build_empty_model(name, hf, groups, precision, recompute, spec)
    if hf.checkpoint is None:
        read_hf_weights(model.named_parameters(), hf, groups)
    else:
        read_checkpoint_weights(model.chunks, hf, groups)
    return model


def build_empty_model(
    name: str, hf: HFModel, groups: ModelGroups, precision: Precision, recompute: str = "none", spec: str = "auto"
) -> MegatronModel:
    """``build_model`` without weights: their memory holds anything. Under ``torch.device("meta")`` they have none."""
    check_model(name, hf, groups.layout, precision, spec)
    backend = spec_backend(name, spec, precision.dtype)
    config = transformer_config(hf, groups.layout, groups.pgs.pp.rank(), precision, recompute, backend)
    device = torch.empty(()).device if torch.empty(()).is_meta else local_device()
    modules, chunks, offsets = [], [], []
    for vp_stage in range(groups.layout.vpp) if groups.layout.vpp else [None]:
        gpt, offset = _build_chunk(hf, config, backend, groups, vp_stage)
        gpt = gpt.to(device)
        # transformers' own frequencies: every rope type that open_hf_model accepts, with all its parameters.
        gpt.rotary_pos_emb.inv_freq = hf.rope_table()[0].to(device)
        gpt.rotary_pos_emb.cp_group = None  # all angles of the row: position_ids say which are this rank's
        modules.append(Float16Module(config, gpt) if config.bf16 else gpt)
        chunks.append(gpt)
        offsets.append(offset)
    model = MegatronModel(modules, chunks, offsets, config, groups, hf)
    _mark_for_optimizer(model)
    return model
