"""The policy's weights on every rank under Hugging Face names, in buckets. Engines get their weights from here."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist

from g2r_megatron.errors import RunError
from g2r_megatron.model.build import MegatronModel
from g2r_megatron.model.weights import hf_shapes
from g2r_megatron.model.write_hf import stage_tensors
from g2r_megatron.rollout.vllm.transfer import Bucket, check_sum

BUCKET_BYTES = 256 << 20


def buckets(tensors: Iterable[tuple[str, torch.Tensor]], size: int) -> Iterator[Bucket]:
    """Tensors in lists of at most ``size`` bytes, or of one that is larger; each is emptied when the next is asked for."""
    bucket: Bucket = []
    held = 0
    for name, tensor in tensors:
        if bucket and held + tensor.nbytes > size:
            yield bucket
            bucket.clear()  # else it would be kept while the next one fills
            held = 0
        bucket.append((name, tensor, check_sum(tensor)))
        held += tensor.nbytes
    if bucket:
        yield bucket
        bucket.clear()


def all_buckets(model: MegatronModel) -> Iterator[Bucket]:
    """``replica_buckets``; raises ``RunError`` naming a weight of the model that was in none of them."""
    missing = set(hf_shapes(model.hf))
    for bucket in replica_buckets(model):
        missing -= {name for name, _, _ in bucket}
        yield bucket
    if missing:
        raise RunError(f"weight synchronisation: {min(missing)} (of {len(missing)}) was not sent to vLLM")


def replica_buckets(model: MegatronModel, size: int = BUCKET_BYTES) -> Iterator[Bucket]:
    """Every weight of the model, on every rank of each replica (collective: all ranks exhaust it).

    Tensor and expert parallel ranks put their shards together stage by stage; each stage sends what it has to the other
    stages of its pipeline. A bucket is emptied when the next one is asked for. At most ``2 * size`` bytes are held on a rank
    if no parameter has more than ``size / 2``: a bucket, the next tensor, and the shards that it is made of. A larger
    parameter takes up to four times its own bytes.
    """
    pp = model.groups.pgs.pp
    if pp.size() == 1:
        yield from buckets(stage_tensors(model), size)
        return
    for stage in range(pp.size()):
        source = dist.get_global_rank(pp, stage)
        if stage == pp.rank():
            for bucket in buckets(stage_tensors(model), size // 2):  # ``size`` with the copy that is sent
                _broadcast([(name, tensor.dtype, total) for name, tensor, total in bucket], source, pp)
                dist.broadcast(_flat([tensor for _, tensor, _ in bucket]), source, group=pp)
                yield bucket
            _broadcast(None, source, pp)
        else:
            yield from _received(model, source, pp)


def _received(model: MegatronModel, source: int, pp: dist.ProcessGroup) -> Iterator[Bucket]:
    """The buckets that another stage sends."""
    shapes, device = hf_shapes(model.hf), next(model.chunks[0].parameters()).device
    while (header := _broadcast(None, source, pp)) is not None:
        sizes = [torch.Size(shapes[name]).numel() * dtype.itemsize for name, dtype, _ in header]
        flat = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        dist.broadcast(flat, source, group=pp)
        bucket = [
            (name, part.view(dtype).view(shapes[name]), total)
            for (name, dtype, total), part in zip(header, flat.split(sizes), strict=True)
        ]
        del flat
        yield bucket
        bucket.clear()


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.contiguous().view(torch.uint8).flatten() for tensor in tensors])


def _broadcast(value, source: int, group: dist.ProcessGroup):
    box = [value]
    dist.broadcast_object_list(box, src=source, group=group)
    return box[0]
