"""The trained policy as a Hugging Face directory."""

import shutil
from pathlib import Path

import torch.distributed as dist

from g2r_megatron.model.build import MegatronModel
from g2r_megatron.model.write_hf import iterate_hf_tensors, save_hf


def export_policy(model: MegatronModel, output: Path) -> None:
    """Write ``output`` (collective): weights in the policy's own dtype, config and tokenizer of the start model.

    An earlier export of the same run is replaced once the new one is complete.
    """
    tensors = iterate_hf_tensors(model)
    if dist.get_rank() != 0:
        for _ in tensors:
            pass
    else:
        fresh = output.with_name(output.name + ".new")
        shutil.rmtree(fresh, ignore_errors=True)
        save_hf(tensors, model.hf, fresh, model.config.params_dtype)
        shutil.rmtree(output, ignore_errors=True)
        fresh.rename(output)
    dist.barrier()
