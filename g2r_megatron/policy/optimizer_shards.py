"""The sharded optimizer's state as each rank holds it. It is written without gathering and can be read on any layout.

Megatron-Core's distributed optimizer gives each data-parallel rank a range of the flat buffer of all parameters, so a
rank holds a flat range of a parameter's elements. In the parameter's shape that range is a few boxes: the end of a row,
whole rows, the beginning of a row. Each box is a shard of the parameter's global tensor, under the key that
Megatron-Core's ``fully_reshardable`` form has (optimizer.state.exp_avg.<weight>): a checkpoint of either kind is read
as the other. Megatron-Core 0.16.1 has no such form of its own: ``fully_reshardable`` gathers whole buffers on every
rank, ``dp_reshardable`` is read on the same TP and PP only, ``fully_sharded_model_space`` raises.
"""

from collections.abc import Iterator
from math import prod

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset and shape


def boxes(shape: tuple[int, ...], start: int, end: int) -> Iterator[Box]:
    """The flat range [start, end) of a contiguous tensor of ``shape``, in order, as boxes. None of an empty range."""
    if start >= end:
        return
    if len(shape) == 1:
        yield (start,), (end - start,)
        return
    row = prod(shape[1:])
    first, last = -(-start // row), end // row  # whole rows
    if first > last:  # begins and ends within one row
        yield from _in_row(shape, last, start - last * row, end - last * row)
        return
    if start < first * row:
        yield from _in_row(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if last * row < end:
        yield from _in_row(shape, last, 0, end - last * row)


def _in_row(shape: tuple[int, ...], row: int, start: int, end: int) -> Iterator[Box]:
    for offset, size in boxes(shape[1:], start, end):
        yield (row, *offset), (1, *size)


def owned_shards(optimizer: DistributedOptimizer, weights: dict) -> list[ShardedTensor]:
    """Views of this rank's main weights (fp32) and moments, as shards of global tensors; nothing is copied.

    ``weights``: the sharded state of the model's chunks (``sharded_weights``), whose data are the parameters themselves.
    """
    shards = nested_values(extract_sharded_tensors_and_factories(weights)[0])
    of_parameter = {shard.data: shard for shard in shards}
    found: list[ShardedTensor] = []
    for buckets in (bucket for ranges in optimizer.gbuf_ranges for bucket in ranges.values()):
        for parameter, owned in (pair for bucket in buckets for pair in bucket["param_map"].items()):
            tensors = optimizer._get_main_param_and_optimizer_states(parameter)
            tensors.pop("step", None)  # one number for all parameters: it is among the options of their groups
            for whole in _plain(of_parameter[parameter]):
                first = whole.data.storage_offset() - parameter.storage_offset()  # of the parameter's flat elements
                for name, tensor in tensors.items():
                    found += _parts(whole, first, name, tensor.detach(), owned["param"].start)
    return found


def _plain(shard: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """A parameter's shards, views of it: of a factory several (gate and up projection are two in one parameter)."""
    return shard.build() if isinstance(shard, ShardedTensorFactory) else [shard]


def _parts(whole: ShardedTensor, first: int, name: str, state: torch.Tensor, start: int) -> Iterator[ShardedTensor]:
    """The shards of ``state`` [n] (elements from ``start`` on) in ``whole`` (the parameter's elements from ``first``
    on)."""
    begin, end = max(start, first), min(start + len(state), first + whole.data.numel())
    key = f"optimizer.state.{name}.{whole.key}"
    axes = whole.prepend_axis_num  # of the global tensor, before the parameter's own
    for offset, shape in boxes(tuple(whole.data.shape), begin - first, end - first):
        data = state[begin - start :][: prod(shape)].view(*(1,) * axes, *shape)
        begin += prod(shape)
        place = tuple(a + b for a, b in zip(whole.global_offset, (*(0,) * axes, *offset), strict=True))
        yield ShardedTensor(
            key=key,
            data=data,
            dtype=data.dtype,
            local_shape=tuple(data.shape),
            global_shape=whole.global_shape,
            global_offset=place,
            axis_fragmentations=None,  # not a regular grid
            allow_shape_mismatch=whole.allow_shape_mismatch,  # a vocabulary that is padded for the layout
            replica_id=(*whole.replica_id[:2], 0),  # copies of a parameter on other TP or PP ranks, none on DP ranks
        )


def sharded_optimizer_state(optimizer, weights: dict, is_loading: bool, metadata: dict) -> dict:
    """Megatron-Core's ``optimizer.sharded_state_dict``, with ``owned_shards`` where the optimizer is sharded.

    ``optimizer`` is a ChainedOptimizer: experts have one of their own. Of one its state is not numbered.
    """
    parts = optimizer.chained_optimizers
    if not isinstance(parts[0], DistributedOptimizer):
        return optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)
    states = {}
    for i, part in enumerate(parts):
        if is_loading:
            part.load_state_dict(part.state_dict())  # makes moments if there has been no step yet
        states[i] = part.state_dict() | {"param_state": dict(enumerate(owned_shards(part, weights)))}
    return states if len(parts) > 1 else states[0]


@torch.no_grad()
def load_owned(optimizer: DistributedOptimizer, weights: dict, loaded: dict[int, torch.Tensor]) -> None:
    """Put the loaded ``param_state`` into the optimizer."""
    for i, shard in enumerate(owned_shards(optimizer, weights)):
        shard.data.copy_(loaded[i])  # a copy to itself if it was read in place
