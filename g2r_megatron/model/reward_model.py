"""GPTModel with a score of one number where a language model has its output layer."""

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch.nn.utils import skip_init

from g2r_megatron.model.gpt import SelectiveGPTModel


class RewardModel(SelectiveGPTModel):
    """V of chosen positions: ``score.weight`` [1, h], no bias, as transformers' ``...ForSequenceClassification``.

    The score is held whole by every TP rank and computed in fp32 from the final norm's output. ``forward`` returns
    [n, 1] at ``logit_rows``; without them [b, s, 1], where GPTModel returns logits.
    """

    def __init__(self, **options):
        super().__init__(**options)
        if self.post_process:
            del self.output_layer  # GPTModel always makes one
            shape = self.config.hidden_size, 1
            self.score = skip_init(torch.nn.Linear, *shape, bias=False, dtype=self.config.params_dtype)

    def _postprocess(self, hidden_states, *args, **kwargs):
        rows, self._logit_rows = self._logit_rows, None
        if not self.post_process:
            return hidden_states
        if rows is None:
            length = hidden_states.size(0) * (self.pg_collection.tp.size() if self.config.sequence_parallel else 1)
            rows = torch.arange(length * hidden_states.size(1), device=hidden_states.device)
            return self._scores(hidden_states, rows).view(hidden_states.size(1), length, 1)
        return self._scores(hidden_states, rows)

    def _scores(self, hidden_states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """fp32 [n, 1]. Every TP rank computes the same and so has the whole gradient: no reduction is needed."""
        selected = self._selected(hidden_states, rows, self.config.sequence_parallel)
        return F.linear(selected.float(), self.score.weight.float())

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Of all children by name: LanguageModule's own looks for an output layer."""
        return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)
