"""Transformer Engine's building blocks, with attention over packed rows. Imported on GPU machines only."""

from functools import lru_cache

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.packed_seq_params import PackedSeqParams

from g2r_megatron.model.decode_attention import decode_attention, is_cache
from g2r_megatron.model.torch_layers import layer_window
from g2r_megatron.model.tree_attention import KEPT_ROWS, row_attention, sequence_lengths


class RowTEAttention(TEDotProductAttention):
    """Transformer Engine's attention for batches and for rows of sequences; other attention for the rest.

    Rows of trees go to FlexAttention (model/tree_attention.py). So do fp32 rows: Transformer Engine's kernels for
    packed sequences do not take fp32. Decoding goes to plain products (model/decode_attention.py).
    """

    def __init__(self, config, layer_number, *args, softmax_scale=None, pg_collection, **kwargs):
        super().__init__(
            config, layer_number, *args, softmax_scale=softmax_scale, pg_collection=pg_collection, **kwargs
        )
        self.row_scale, self.row_window = softmax_scale, layer_window(config, layer_number)
        self.row_cp_group, self.row_layer = pg_collection.cp, layer_number

    def forward(self, query, key, value, attention_mask, attn_mask_type, *args, **kwargs):
        """``query`` [sq, b, np, hn], ``key``/``value`` [sk, b, ng, hn] -> [sq, b, np * hn]."""
        if attention_mask is None:
            return super().forward(query, key, value, None, attn_mask_type, *args, **kwargs)
        if is_cache(attention_mask):
            return decode_attention(query, key, value, attention_mask, self.row_window, self.row_scale)
        lengths = None
        if query.dtype != torch.float32 and self.row_cp_group.size() == 1:
            lengths = sequence_lengths(attention_mask)
        if lengths is None:
            options = self.row_window, self.row_scale, self.row_cp_group, self.row_layer
            return row_attention(query, key, value, attention_mask, *options)
        packed = _packed_sequences(lengths, query.device)
        heads = (x.squeeze(1) for x in (query, key, value))  # thd: [tokens, heads, hn]
        return super().forward(*heads, None, attn_mask_type, packed_seq_params=packed).reshape(query.size(0), 1, -1)


@lru_cache(maxsize=KEPT_ROWS)
def _packed_sequences(lengths: tuple[int, ...], device: torch.device) -> PackedSeqParams:
    """Sequences of these lengths in one row, padding as one of them: made once a row, not once a layer.

    The longest is given as a power of two, at most the row's length: like the row's length it takes few values in a run.
    """
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
    longest = min(1 << (max(lengths) - 1).bit_length(), sum(lengths))
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )


class RowTESpecProvider(TESpecProvider):
    """Megatron-Core's provider with our core attention."""

    def core_attention(self) -> type:
        return RowTEAttention
