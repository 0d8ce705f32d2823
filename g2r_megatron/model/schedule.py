"""One way to run a model over micro-batches: Megatron-Core's pipeline schedule with the model's own groups."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from g2r_megatron.model.build import MegatronModel
from g2r_megatron.parallel import cpu
from g2r_megatron.parallel.microbatches import balanced_shards, pack_by_tokens, padded


@dataclass
class TokenBatch:
    """Right-padded sequences of one micro-batch, on the model's device.

    ``input_ids`` int64 [b, s]; ``logit_rows`` int64 [n] into the flattened positions (row * s + position);
    ``items``: the indices of the caller's sequences, in row order.
    """

    input_ids: torch.Tensor
    logit_rows: torch.Tensor
    items: list[int]


def token_batch(
    model: MegatronModel, sequences: Sequence[list[int]], positions: Sequence, items: list[int]
) -> TokenBatch:
    """Pad ``sequences[i] for i in items`` to one length; ``positions[i]`` are the positions whose logits are wanted."""
    length = padded(max(len(sequences[i]) for i in items), model.length_multiple)
    # Right padding needs no mask: attention is causal and nothing after a sequence's end is read.
    ids = [list(sequences[i]) + [0] * (length - len(sequences[i])) for i in items]
    rows = [row * length + p for row, i in enumerate(items) for p in positions[i]]
    device = cpu.device()
    return TokenBatch(torch.tensor(ids, device=device), torch.tensor(rows, dtype=torch.int64, device=device), items)


def replica_plan(model: MegatronModel, lengths: Sequence[int], indices: list[int], budget: int) -> list[list[int]]:
    """This data-parallel replica's share of ``indices`` as micro-batches of at most ``budget`` padded tokens.

    ``lengths`` of the sequences ``indices``, in the same order. A pure function of its arguments and the layout.
    """
    mine = balanced_shards(list(lengths), model.groups.dp_size)[model.groups.dp_rank]
    packed = pack_by_tokens([lengths[i] for i in mine], budget, model.length_multiple)
    return [[indices[mine[i]] for i in rows] for rows in packed]


def forward_tokens(model: MegatronModel, batch: TokenBatch) -> torch.Tensor:
    """The model on a micro-batch: logits [n, v/tp] at its ``logit_rows`` on the last stage, hidden states before."""
    return model.module(batch.input_ids, None, None, logit_rows=batch.logit_rows)


def run_schedule(
    model: MegatronModel,
    batches: Sequence,
    forward: Callable[[Any], torch.Tensor],
    on_last_stage: Callable[[Any, torch.Tensor], tuple[torch.Tensor, Any]],
    backward: bool,
) -> list:
    """Run ``batches`` through the model's pipeline (collective over its model-parallel group).

    ``forward(batch)`` calls the module on any stage; ``on_last_stage(batch, output)`` returns (scalar loss, result).
    With ``backward``, the gradient of the plain sum of the losses is taken: no division by micro-batches, tokens
    or ranks happens anywhere. Returns the results, in order, on the last stage; [] elsewhere.
    """
    if not batches:
        return []

    def forward_step(iterator, module):
        batch = next(iterator)

        def loss_func(output, non_loss_data=False):
            loss, result = on_last_stage(batch, output)
            return result if non_loss_data else (loss, torch.zeros([], dtype=torch.int, device=loss.device), result)

        return forward(batch), loss_func

    schedule = get_forward_backward_func(pp_size=model.groups.pgs.pp.size(), vp_size=None)
    return schedule(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=model.module,
        num_microbatches=len(batches),
        seq_length=1,  # shapes travel with the tensors (variable_seq_lengths)
        micro_batch_size=1,
        forward_only=not backward,
        collect_non_loss_data=not backward,
        pg_collection=model.groups.pgs,
        p2p_communicator=P2PCommunicator(model.groups.pgs.pp, model.config),
    )
