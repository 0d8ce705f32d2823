"""GPTModel with two changes: logits at chosen positions only, and rotary positions that the caller gives.

A verdict needs logits at one position a sequence, a policy update needs them at the response positions. Logits of whole
sequences would be the largest tensor of a small model, and with a large vocabulary most of them would be unused.
Several sequences packed in one row each count their positions from 0, where GPTModel counts 0..S-1 whatever
``position_ids`` say.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from g2r_megatron.model.decode_layer import DenseStep
from g2r_megatron.model.elementwise import rotate, rotate_by


@contextmanager
def _global_tensor_parallel_group(group):
    """Let Megatron-Core code that reads the global tensor parallel group see ``group``."""
    previous = parallel_state._TENSOR_MODEL_PARALLEL_GROUP
    parallel_state._TENSOR_MODEL_PARALLEL_GROUP = group
    try:
        yield
    finally:
        parallel_state._TENSOR_MODEL_PARALLEL_GROUP = previous


class GroupAwareSelfAttention(SelfAttention):
    """SelfAttention with three changes.

    Queries and keys are rotated in fewer passes over memory (model/elementwise.py).

    Its QKV split also works with fewer key-value heads than TP ranks in a model with own groups: Megatron-Core 0.16
    gathers the QKV projection over the *global* TP group in that case. Its cache holds keys as they are read, rotated
    once (Megatron-Core 0.16 rotates all of them in every step), of sequences that are each at a position of their own, and
    is read in blocks (model/decode_attention.py).
    """

    def _adjust_key_value_for_inference(self, context, query, key, value, rotary_pos_emb, *args, **kwargs):
        if context is None:
            query, key = rotate(query, rotary_pos_emb[0]), rotate(key, rotary_pos_emb[1])
            return query, key, value, None, self.attn_mask_type, None
        turn = context.turn(rotary_pos_emb[1], key.size(0), key.dtype)
        key, value = context.update(self.layer_number, rotate_by(key, *turn), value)
        mask_type = AttnMaskType.no_mask if context.is_decode_only() else AttnMaskType.causal
        return rotate_by(query, *turn), key, value, None, mask_type, None

    def get_query_key_value_tensors(self, *args, **kwargs):
        if self.config.num_query_groups >= self.world_size:
            return super().get_query_key_value_tensors(*args, **kwargs)
        with _global_tensor_parallel_group(self.pg_collection.tp):
            return super().get_query_key_value_tensors(*args, **kwargs)


def _attention_spec(config, backend: BackendSpecProvider) -> ModuleSpec:
    qk_norm = backend.layer_norm(for_qk=True) if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=GroupAwareSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_layer_norm_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


class PrefixLayer(TransformerLayer):
    """A layer that can skip everything after its attention, if only keys and values are needed (``prefix_only``).

    Its step over a cache is a ``DenseStep``, if that can be.
    """

    prefix_only = False
    _step: DenseStep | None = None

    def forward(self, hidden_states, attention_mask=None, *, inference_context=None, rotary_pos_emb=None, **kwargs):
        if inference_context is None or not inference_context.is_decode_only() or not DenseStep.takes(self):
            options = dict(inference_context=inference_context, rotary_pos_emb=rotary_pos_emb)
            return super().forward(hidden_states, attention_mask, **options, **kwargs)
        self._step = self._step or DenseStep(self)
        return self._step(hidden_states, attention_mask, rotary_pos_emb, inference_context), None

    def _forward_mlp(self, hidden_states, *args, **kwargs):
        return hidden_states if self.prefix_only else super()._forward_mlp(hidden_states, *args, **kwargs)


@contextmanager
def keys_and_values_only(chunk: GPTModel):
    """Let the model's last layer, if this chunk has it, end with its attention: its output for a prefix is not used."""
    last = [layer for layer in chunk.decoder.layers if layer.layer_number == chunk.config.num_layers]
    for layer in last:
        layer.prefix_only = True
    try:
        yield
    finally:
        for layer in last:
            layer.prefix_only = False


def _layer_spec(config, backend: BackendSpecProvider, moe: bool) -> ModuleSpec:
    """One layer: pre-norm, RMSNorm fused into the products that follow it, SwiGLU or experts of it."""
    if moe:
        norm = backend.layer_norm(rms_norm=True)
        mlp = get_moe_module_spec_for_backend(backend, config.num_moe_experts, config.moe_grouped_gemm)
    else:
        norm = IdentityOp
        mlp = ModuleSpec(
            module=MLP,
            submodules=MLPSubmodules(
                linear_fc1=backend.column_parallel_layer_norm_linear(),
                linear_fc2=backend.row_parallel_linear(),
                activation_func=backend.activation_func() if config.use_te_activation_func else None,
            ),
        )
    return ModuleSpec(
        module=PrefixLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=_attention_spec(config, backend),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(config, backend: BackendSpecProvider, is_moe: list[bool]) -> TransformerBlockSubmodules:
    """The decoder layers of one (virtual) pipeline stage; ``is_moe`` says which of them have experts."""
    dense = _layer_spec(config, backend, moe=False)
    sparse = _layer_spec(config, backend, moe=True) if any(is_moe) else dense
    layers = [sparse if moe else dense for moe in is_moe]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=backend.layer_norm(rms_norm=True))


class SelectiveGPTModel(GPTModel):
    """GPTModel whose ``forward`` takes ``logit_rows`` and uses ``position_ids``.

    ``position_ids``: None (0..s-1), or int64 [s] for a batch of one row. Under context parallelism this rank's input and
    its ``position_ids`` are s of the row's positions, and there is no None. ``last_position``: the largest of them, to be
    given where it may be beyond the row's length.

    ``logit_rows``: int64 [n], indices into the flattened ``[b, s]`` positions (b * s_total + s). The last pipeline
    stage then returns logits ``[n, vocab / tp]``; other stages ignore it. Without it, GPTModel as it is.
    """

    _logit_rows = _last_position = None
    fp32_ids: list[int] | None = None  # tokens whose logits are computed in fp32 (``logits_in_fp32``)

    @contextmanager
    def logits_in_fp32(self, ids: list[int]):
        """In the block the logits at ``logit_rows`` of these tokens are fp32 products of hidden state and weight row.

        bf16 logits are so coarse that those of two verdicts are often equal. A model in fp32 is not changed.
        """
        self.fp32_ids = ids if self.config.params_dtype != torch.float32 else None
        try:
            yield
        finally:
            self.fp32_ids = None

    def forward(self, *args, logit_rows: torch.Tensor | None = None, last_position: int | None = None, **kwargs):
        self._logit_rows, self._last_position = logit_rows, last_position
        return super().forward(*args, **kwargs)

    def _preprocess(self, input_ids, position_ids, *args, **kwargs):
        decoder_input, rotary, *rest = super()._preprocess(input_ids, None, *args, **kwargs)
        if position_ids is not None and decoder_input is not None:
            # a row [s, 1, h] was [1, s, h]: with the strides of that, torch multiplies frozen weights row by row
            decoder_input = decoder_input.flatten().view(decoder_input.shape)
        # rotary: [s of the whole row, 1, 1, d], the angles of positions 0..s-1
        if self._last_position is not None:
            rotary = self.rotary_pos_emb(self._last_position + 1)
        return decoder_input, rotary if position_ids is None else rotary[position_ids], *rest

    def _postprocess(self, hidden_states, *args, **kwargs):
        rows, self._logit_rows = self._logit_rows, None
        if rows is None or not self.post_process:
            return super()._postprocess(hidden_states, *args, **kwargs)
        output = self.output_layer
        sequence_parallel = output.sequence_parallel
        selected = self._selected(hidden_states, rows, sequence_parallel).unsqueeze(1)  # [n, 1, h]
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        output.sequence_parallel = False
        # Without sequence parallelism the input gradient of a column-parallel product is all-reduced.
        allreduce, output.allreduce_dgrad = output.allreduce_dgrad, self.pg_collection.tp.size() > 1
        try:
            logits, _ = output(selected, weight=weight)
        finally:
            output.sequence_parallel, output.allreduce_dgrad = sequence_parallel, allreduce
        logits = logits.squeeze(1)
        if self.fp32_ids is None:
            return logits
        return self._with_fp32_logits(logits, selected.squeeze(1), output.weight if weight is None else weight)

    def _with_fp32_logits(self, logits: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``logits`` [n, v/tp] as fp32, those of ``fp32_ids`` made of ``hidden`` [n, h] and rows of ``weight`` [v/tp, h]."""
        tp, columns = self.pg_collection.tp, logits.size(1)
        mine = [i - tp.rank() * columns for i in self.fp32_ids if i // columns == tp.rank()]
        here = torch.tensor(mine, dtype=torch.int64, device=logits.device)
        hidden = copy_to_tensor_model_parallel_region(hidden, group=tp)  # backward: the sum over the ranks' columns
        return logits.float().index_copy(1, here, F.linear(hidden.float(), weight[here].float()))

    def _selected(self, hidden_states: torch.Tensor, rows: torch.Tensor, sequence_parallel: bool) -> torch.Tensor:
        """[n, h] at ``rows``, whole on every TP rank; ``hidden_states``: [s, b, h], a slice of s if so parallel.

        The next operations must give every TP rank the whole gradient of the result: the gather's backward only splits
        it.
        """
        if sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        length = hidden_states.size(0)
        return hidden_states[rows % length, rows // length]
