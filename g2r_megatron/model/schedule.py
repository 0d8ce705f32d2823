"""One way to run a model over micro-batches: Megatron-Core's pipeline schedule with the model's own groups."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model

from g2r_megatron.device import local_device
from g2r_megatron.model.build import MegatronModel
from g2r_megatron.model.tree_attention import row_structure
from g2r_megatron.parallel.microbatches import balanced_shards, pack_rows, padded, row_length


@dataclass
class TokenBatch:
    """One micro-batch, on the model's device: sequences packed into one row.

    ``input_ids`` int64 [1, s]; ``logit_rows`` int64 [n] into its positions; ``items``: the indices of the caller's
    sequences, in row order. A filler (see ``replica_plan``) has no items, no logit rows and one row of padding.
    ``position_ids`` int64 [s] within each sequence, ``last_position`` where the largest of them may be beyond the row's
    length, and ``structure`` int32 [3, s] on the CPU (model/tree_attention.py). Without these two a batch [b, s] of
    sequences that all begin at position 0.
    """

    input_ids: torch.Tensor
    logit_rows: torch.Tensor
    items: list[int]
    position_ids: torch.Tensor | None = None
    structure: torch.Tensor | None = None
    last_position: int | None = None

    @property
    def has_targets(self) -> bool:
        """Whether the last stage is asked for a loss; of a filler it is not."""
        return bool(self.items)


def row_batch(
    model: MegatronModel,
    sequences: Sequence[list[int]] | Mapping[int, list[int]],
    positions: Sequence | Mapping[int, Any],
    items: list[int],
    budget: int,
) -> TokenBatch:
    """``sequences[i] for i in items`` in one row, padded to one of few lengths (``row_length`` of ``budget``).

    ``positions[i]`` are the positions whose logits are wanted, as sequence i counts them.
    """
    lengths, multiple, device = [len(sequences[i]) for i in items], model.length_multiple, local_device()
    length = row_length(sum(lengths), budget, multiple) if items else multiple
    ids = [token for i in items for token in sequences[i]]
    starts = accumulate(lengths, initial=0)
    rows = [start + p for start, i in zip(starts, items, strict=False) for p in positions[i]]
    structure = row_structure([(n, ()) for n in lengths], length)
    return TokenBatch(
        input_ids=torch.tensor([ids + [0] * (length - len(ids))], device=device),
        logit_rows=torch.tensor(rows, dtype=torch.int64, device=device),
        items=items,
        position_ids=structure[2].long().to(device),
        structure=structure,
    )


def replica_plan(model: MegatronModel, lengths: Sequence[int], indices: list[int], budget: int) -> list[list[int]]:
    """This data-parallel replica's share of ``indices`` as micro-batches: rows of at most ``budget`` tokens.

    ``lengths`` of the sequences ``indices``, in the same order. A pure function of its arguments and the layout.
    Every replica gets as many micro-batches, some of them empty: replicas share experts and exchange tokens in every
    layer. With virtual stages their number is a multiple of the pipeline's ranks, as the interleaved schedule needs it.
    """
    plans = []
    for share in balanced_shards(list(lengths), model.groups.dp_size):
        packed = pack_rows([lengths[i] for i in share], budget, model.length_multiple)
        plans.append([[indices[share[i]] for i in rows] for rows in packed])
    multiple = model.groups.pgs.pp.size() if len(model.chunks) > 1 else 1
    micro_batches = padded(max(len(plan) for plan in plans), multiple)
    mine = plans[model.groups.dp_rank]
    return mine + [[] for _ in range(micro_batches - len(mine))]


def forward_tokens(
    module: torch.nn.Module, batch: TokenBatch, decoder_input: torch.Tensor | None = None
) -> torch.Tensor:
    """A micro-batch through one chunk: logits [n, v/tp] at its ``logit_rows`` on the last stage, hidden states before.

    ``decoder_input`` [s, b, h] (a slice of s under sequence parallelism) stands for the embeddings on the first stage.
    """
    return module(
        batch.input_ids,
        batch.position_ids,
        batch.structure,
        decoder_input=decoder_input,
        logit_rows=batch.logit_rows,
        last_position=batch.last_position,
    )


Batch = TypeVar("Batch", bound=TokenBatch)


def run_schedule(
    model: MegatronModel,
    batches: Sequence[Batch],
    forward: Callable[[torch.nn.Module, Batch], torch.Tensor],
    on_last_stage: Callable[[Batch, torch.Tensor], tuple[torch.Tensor, Any]],
    backward: bool,
) -> list:
    """Run ``batches`` through the model's pipeline (collective over its model-parallel group).

    ``forward(module, batch)`` calls a chunk of the model on any stage; ``on_last_stage(batch, output)`` returns
    (scalar loss, result) and is not asked about fillers. With ``backward``, the gradient of the plain sum of the losses
    is taken: no division by micro-batches, tokens or ranks happens anywhere. Returns the results, in order, on the
    last stage; [] elsewhere.
    """
    if not batches:
        return []

    def forward_step(iterator, module):
        batch = next(iterator)

        def loss_func(output, non_loss_data=False):
            loss, result = on_last_stage(batch, output) if batch.has_targets else (output.sum(), _Filler)
            return result if non_loss_data else (loss, torch.zeros([], dtype=torch.int, device=loss.device), result)

        return forward(module, batch), loss_func

    vpp = len(model.modules) if len(model.modules) > 1 else None
    schedule = get_forward_backward_func(pp_size=model.groups.pgs.pp.size(), vp_size=vpp)
    results = schedule(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in model.modules] if vpp else iter(batches),
        model=model.modules if vpp else model.modules[0],
        num_microbatches=len(batches),
        seq_length=1,  # shapes travel with the tensors (variable_seq_lengths)
        micro_batch_size=1,
        forward_only=not backward,
        collect_non_loss_data=not backward,
        pg_collection=model.groups.pgs,
        p2p_communicator=P2PCommunicator(model.groups.pgs.pp, model.config),
    )
    return [result for result in results if result is not _Filler]


class _Filler:
    """The result of a micro-batch without items."""


def forward_once(
    model: MegatronModel, batch: Any, forward: Callable[[torch.nn.Module, Any], torch.Tensor]
) -> torch.Tensor | None:
    """One batch through the pipeline, stage after stage, without gradients: the output on the last stage, else None.

    A decoding step needs no more: with one micro-batch nothing can overlap, also with virtual stages.
    """
    p2p = P2PCommunicator(model.groups.pgs.pp, model.config)
    first, last, output = model.groups.is_first_stage, model.groups.is_last_stage, None
    for i, module in enumerate(model.modules):
        shape = (1, 1, model.config.hidden_size)  # the real one travels with the tensor
        received = p2p.recv_forward(shape, is_first_stage=first and i == 0)
        get_attr_wrapped_model(module, "set_input_tensor")([received])
        output = forward(module, batch)
        p2p.send_forward(output, is_last_stage=last and i == len(model.modules) - 1)
    return output if last else None
