"""Transformer Engine's building blocks, with attention over packed rows of trees. Imported on GPU machines only."""

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

from g2r_megatron.model.torch_layers import layer_window
from g2r_megatron.model.tree_attention import row_attention


class TreeTEAttention(TEDotProductAttention):
    """Transformer Engine's attention, and FlexAttention for a row with a structure (model/tree_attention.py)."""

    def __init__(self, config, layer_number, *args, softmax_scale=None, pg_collection, **kwargs):
        super().__init__(
            config, layer_number, *args, softmax_scale=softmax_scale, pg_collection=pg_collection, **kwargs
        )
        self.tree_scale, self.tree_window = softmax_scale, layer_window(config, layer_number)
        self.tree_cp_group, self.tree_layer = pg_collection.cp, layer_number

    def forward(self, query, key, value, attention_mask, *args, **kwargs):
        """``query`` [sq, b, np, hn], ``key``/``value`` [sk, b, ng, hn] -> [sq, b, np * hn]."""
        if attention_mask is None:
            return super().forward(query, key, value, attention_mask, *args, **kwargs)
        options = self.tree_window, self.tree_scale, self.tree_cp_group, self.tree_layer
        return row_attention(query, key, value, attention_mask, *options)


class TreeTESpecProvider(TESpecProvider):
    """Megatron-Core's provider with our core attention."""

    def core_attention(self) -> type:
        return TreeTEAttention
