"""The end of a weight transfer inside vLLM: tensors of this process, checked as they arrive, loaded, and made effective.

vLLM's own backends need a GPU. On a CPU vLLM packs weights after it has loaded them; its reload packs those of linear layers
anew, but neither a tied output layer nor the experts of a mixture, and says nothing: these would stay the old ones.
"""

from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from g2r_megatron.errors import RunError
from g2r_megatron.rollout.vllm.weights import Bucket, check_sum

BACKEND = "g2r"


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing is to be set up: both ends are one process."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Whole tensors under Hugging Face names, each with the check sum that its sender computed."""

    bucket: Bucket


class Receiver(WeightTransferEngine[InitInfo, UpdateInfo]):
    """vLLM calls ``start_weight_update``, ``update_weights`` once a bucket, ``finish_weight_update``. Full updates only."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Nothing."""

    def start_weight_update(self) -> None:
        """The model takes weights in the form of a checkpoint until ``finish_weight_update``."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict) -> None:
        """As vLLM's, whose end asks for an accelerator."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load one bucket. Raises ``RunError`` naming a tensor whose content is not what was sent."""
        for name, tensor, sent in update_info.bucket:
            if check_sum(tensor) != sent:
                raise RunError(f"weight synchronisation: {name} was changed on its way to the vLLM engine")
        self.model.load_weights([(name, tensor) for name, tensor, _ in update_info.bucket])

    def finish_weight_update(self) -> None:
        """All weights are there: make them what the kernels use."""
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            pack_what_reload_leaves(self.model)

    def shutdown(self) -> None:
        """Nothing is held."""


def pack_what_reload_leaves(model: torch.nn.Module) -> None:
    """Pack output layers and experts, as vLLM does when it first loads them (CPU). Once a full update: not idempotent."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(module, ParallelLMHead):
            method.process_weights_after_loading(module)
        if (kernel := getattr(method, "moe_kernel", None)) is not None:
            kernel.fused_experts.process_weights_after_loading(module)


def register() -> None:
    """Make the backend known to vLLM, once a process."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, Receiver)
