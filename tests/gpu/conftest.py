"""What the GPU tests share: a world of one on NCCL in this process, and tiny models of shapes that GPU kernels take."""

from functools import cache

import pytest
import torch.distributed as dist

from tiny_models import build_tiny_hf

# Heads of 64 for fused attention, and every size a multiple of 128 for FP8's blocks of scales.
GPU_SIZES = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="session", autouse=True)
def world():
    """Join a world of one. Autouse, but a skipped test sets up no fixture: without a GPU nothing is started."""
    from g2r_megatron.parallel.groups import initialize

    initialize(seed=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def gpu_hf(tmp_path_factory):
    """``gpu_hf(family)`` -> a random Hugging Face directory of ``GPU_SIZES``, built once; read only."""

    @cache
    def get(family: str) -> str:
        # weights so large that 4 random layers do something, so small that bf16 can follow
        directory = tmp_path_factory.mktemp(f"gpu_{family}")
        return str(build_tiny_hf(family, directory, initializer_range=0.05, **GPU_SIZES))

    return get
