"""Weights of a frozen model that stay in host memory and are on the device only while the model is used.

They never change, so they are copied to the host once. After that their device memory is freed, and later filled again
with the same bits. In between the parameters are empty: code that uses them gets an error, never zeros.
"""

import torch

from g2r_megatron.device import local_device, on_cpu
from g2r_megatron.model.build import MegatronModel


class HostWeights:
    """The weights of ``model``, on the host alone until ``load``."""

    def __init__(self, model: MegatronModel):
        """Copy the weights to the host (page-locked where there is a GPU) and free their device memory."""
        self._pairs: list[tuple[torch.nn.Parameter, torch.Tensor]] = []  # (parameter, its values on the host)
        for chunk in model.chunks:
            for parameter in chunk.parameters():
                host = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=not on_cpu())
                self._pairs.append((parameter, host.copy_(parameter.detach())))
            for module in chunk.modules():
                if hasattr(module, "disable_parameter_transpose_cache"):
                    # Transformer Engine would keep FP8 copies of the weights on the device from one pass to the next
                    module.disable_parameter_transpose_cache = True
        self.release()

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's weights."""
        return sum(host.nbytes for _, host in self._pairs)

    def load(self) -> None:
        """Copy the weights to the device; work that is queued there from now on uses them."""
        for parameter, host in self._pairs:
            parameter.data = torch.empty(host.shape, dtype=host.dtype, device=local_device()).copy_(
                host, non_blocking=True
            )

    def release(self) -> None:
        """Free the weights' device memory."""
        for parameter, _ in self._pairs:
            parameter.data = parameter.data.new_empty(0)
