"""Weights of a frozen model that live in host memory and are on the device only while the model is used.

What never changes is copied to the host once; from then on its device memory is given back and filled again, bit for bit.
Parameters keep their identity and shape meanwhile, with a storage of 0 bytes: whoever uses them then fails at once.
"""

import torch

from g2r_megatron.model.build import MegatronModel
from g2r_megatron.parallel import cpu


class HostWeights:
    """The weights of ``model``, on the host from here on until ``load``."""

    def __init__(self, model: MegatronModel):
        """Copy the weights to the host (page-locked where there is a GPU) and free their device memory."""
        storages = {}  # by identity: tied weights are one
        for chunk in model.chunks:
            for parameter in chunk.parameters():
                storage = parameter.untyped_storage()
                storages[storage.data_ptr()] = storage
        self._pairs: list[tuple[torch.UntypedStorage, torch.Tensor]] = []  # (on the device, bytes on the host)
        for storage in storages.values():
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=not cpu.on_cpu())
            host.copy_(_as_bytes(storage))
            self._pairs.append((storage, host))
        self.release()

    @property
    def nbytes(self) -> int:
        """Bytes of the weights on this rank."""
        return sum(host.nbytes for _, host in self._pairs)

    def load(self) -> None:
        """Bring the weights back to the device."""
        for storage, host in self._pairs:
            storage.resize_(host.nbytes)
            _as_bytes(storage).copy_(host, non_blocking=True)  # work queued later on the same stream sees them

    def release(self) -> None:
        """Free the weights' device memory; the host has them."""
        for storage, _ in self._pairs:
            storage.resize_(0)


def _as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """uint8 [n] that shares ``storage``."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
