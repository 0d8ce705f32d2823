"""Methods for a worker of vLLM: receive weights, check them as they arrive, load them, and make the kernels use them.

vLLM makes ``WeightReceiver`` a base of its worker class (option ``worker_extension_cls``), in an engine of ours and in a server,
which needs torch and vLLM for it, but not Megatron-Core. On a CPU vLLM packs weights after it has loaded them; its reload
packs those of linear layers anew, but neither a tied output layer nor the experts of a mixture, and says nothing: these would
stay the old ones.
"""

import json
import socket
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from vllm import __version__
from vllm.config import set_current_vllm_config
from vllm.distributed.parallel_state import get_world_group
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from g2r_megatron.errors import RunError
from g2r_megatron.rollout.vllm.transfer import PROTOCOL, Bucket, check_sum, received_buckets


class WeightReceiver:
    """Mixed into vLLM's worker; ``collective_rpc`` calls these by name. Full updates only."""

    def g2r_start(self: Any) -> None:
        """The model takes weights in the form of a checkpoint until ``g2r_finish``."""
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.get_model())

    def g2r_load(self: Any, bucket: Bucket) -> None:
        """Load one bucket. Raises ``RunError`` naming a tensor whose content is not what was sent."""
        for name, tensor, sent in bucket:
            if check_sum(tensor) != sent:
                raise RunError(f"weight synchronisation: {name} was changed on its way to the vLLM engine")
        with set_current_vllm_config(self.vllm_config):
            self.get_model().load_weights([(name, tensor) for name, tensor, _ in bucket])

    def g2r_finish(self: Any) -> None:
        """All weights are there: make them what the kernels use."""
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(self.get_model(), self.model_config)
            if self.device.type == "cpu":
                pack_what_reload_leaves(self.get_model())
            else:  # copies to the device may not be complete
                torch.accelerator.synchronize()

    def g2r_receive(self: Any, host: str, port: int, token: str, timeout: float) -> None:
        """A whole update from the trainer that listens at ``host``; ``token`` shows it who connects.

        An update that breaks off leaves weights that are neither old nor new, and a worker that takes the next update.
        """
        self.g2r_start()
        try:
            for bucket in _on_all_workers(_buckets(host, port, token, timeout)):
                self.g2r_load(bucket)
        except BaseException:
            with set_current_vllm_config(self.vllm_config):  # else vLLM adds the next update to this one's result
                finalize_layerwise_reload(self.get_model(), self.model_config)
            raise
        self.g2r_finish()

    def g2r_describe(self: Any) -> dict[str, Any]:
        """What a trainer must know of this server before it uses it."""
        config = self.vllm_config
        return {
            "protocol": PROTOCOL,
            "vllm": __version__,
            "model": config.model_config.model,
            "config": json.loads(json.dumps(config.model_config.hf_text_config.to_dict(), default=str)),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "max_model_len": config.model_config.max_model_len,
            "logprobs_mode": config.model_config.logprobs_mode,
            "quantization": config.model_config.quantization,
            "data_parallel_size": config.parallel_config.data_parallel_size,
            "device": self.device.type,
        }


def pack_what_reload_leaves(model: torch.nn.Module) -> None:
    """Pack output layers and experts, as vLLM does when it first loads them (CPU). Once a full update: not idempotent."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(module, ParallelLMHead):
            method.process_weights_after_loading(module)
        if (kernel := getattr(method, "moe_kernel", None)) is not None:
            kernel.fused_experts.process_weights_after_loading(module)


def _buckets(host: str, port: int, token: str, timeout: float) -> Iterator[Bucket]:
    with socket.create_connection((host, port), timeout) as connection:
        connection.sendall(token.encode())
        yield from received_buckets(connection)


def _on_all_workers(buckets: Iterator[Bucket]) -> Iterator[Bucket]:
    """The ``buckets`` of the server's first worker, on every worker: the trainer sends them once."""
    world = get_world_group()
    if world.world_size == 1:
        yield from buckets
        return
    first = world.rank_in_group == 0
    while True:
        bucket: Bucket = []
        error = None
        if first:
            try:
                bucket = next(buckets, [])
            except OSError as caught:  # the others wait for the next bucket
                error = str(caught)
        header = [(name, tensor.dtype, tensor.shape, total) for name, tensor, total in bucket]
        header, error = world.broadcast_object((header, error))
        if error is not None:
            raise RunError(f"weight synchronisation: {error}")
        if not header:
            return
        if not first:
            bucket = [(name, torch.empty(shape, dtype=dtype), total) for name, dtype, shape, total in header]
        for _, tensor, _ in bucket:
            dist.broadcast(tensor, world.ranks[0], group=world.cpu_group)
        yield bucket
