"""Nothing that a step does lacks a deterministic form on CUDA: --deterministic would stop there with an error of torch.

The ATen operations of training steps and of judging on tiny models, with gradients, are traced on the CPU and compared with
the list that torch.use_deterministic_algorithms documents. Leaves out kernels of Transformer Engine and of compiled
FlexAttention, which have switches of their own, and what moves data between ranks.
"""

import os
import re
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from g2r_megatron.config.options import Layout
from g2r_megatron.rollout.sampling import running_sum
from test_checkpoint import trainer_of, update
from test_train_loop import task as task  # a fixture
from test_train_loop import train_here

# "will throw a RuntimeError when mode=True" in torch's documentation, by ATen's names. By its arguments: see ``refused``.
REFUSED = re.compile(
    r"avg_pool3d_backward|_?adaptive_(avg|max)_pool[23]d_backward|fractional_max_pool[23]d_backward|max_unpool[23]d"
    r"|upsample_(linear1d|bilinear2d|bicubic2d|trilinear3d)_backward|reflection_pad[123]d_backward|nll_loss2d_forward"
    r"|_?ctc_loss_backward|put_?|_?histc|grid_sampler_[23]d_backward|kthvalue|_embedding_bag_dense_backward"
)

# Functions whose tensors are on the host, whatever the models run on: CPU operations repeat their bits.
ON_HOST = {"running_sum", "_token_return_advantages"}
PACKAGE = str(Path(__file__).parents[2] / "g2r_megatron")


def refused(name: str, overload: str, args: tuple, kwargs: dict) -> bool:
    """Whether torch has no deterministic CUDA form of the operation with these arguments."""
    if name in ("cumsum", "cumsum_", "logcumsumexp", "cumprod"):
        return args[0].is_floating_point()
    if name == "bincount":
        return (len(args) > 1 and args[1] is not None) or kwargs.get("weights") is not None
    if name in ("median", "nanmedian"):
        return overload.startswith("dim")
    if name in ("scatter_reduce", "scatter_reduce_"):
        return "prod" in args
    return REFUSED.fullmatch(name) is not None


def caller() -> str | None:
    """The innermost function of this project that is running."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return None if frame is None else frame.f_code.co_name


class Trace(TorchDispatchMode):
    """The operations in the block: all their names, and those that are refused."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()
        self.refused: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, overload = function.overloadpacket.__name__, function._overloadname
        self.seen.add(name)
        if refused(name, overload, args, kwargs or {}) and caller() not in ON_HOST:
            self.refused.add(f"{name}.{overload}")
        return function(*args, **kwargs or {})


# In the ranks.


def traced_run(arguments: list[str]) -> tuple[set[str], set[str]]:
    """(all, refused) operations of ``g2r train --deterministic true``: sampling, judging, credit, updates."""
    with patch.dict(os.environ):
        try:
            with Trace() as trace:
                train_here([*arguments, "--deterministic", "true"])
            assert torch.are_deterministic_algorithms_enabled()
        finally:
            torch.use_deterministic_algorithms(False)
    return trace.seen, trace.refused


def traced_update(layout: Layout, path: str) -> tuple[set[str], set[str]]:
    trainer = trainer_of(layout, path)
    with Trace() as trace:
        update(trainer)
    return trace.seen, trace.refused


# The tests.


@pytest.mark.parametrize("preset", ["robust", "paper"])
def test_a_run_is_traced(worlds, task, tmp_path, preset):
    (found,) = worlds[1].run(
        traced_run,
        [
            *(*task, "--grpo.preset", preset, "--steps", "1", "--output_dir", str(tmp_path / "run")),
            *("--rollout.prompts_per_step", "2", "--rollout.responses_per_prompt", "2"),
            *("--rollout.max_response_tokens", "12", "--checkpoint.export_hf", "false"),
        ],
    )
    # Megatron-Core's deterministic embedding is an index, whose backward torch has a deterministic form of
    assert {"mm", "index", "_softmax"} <= found[0], sorted(found[0])
    assert not found[1]


@pytest.mark.parametrize("family", ["qwen3_moe", "mistral"])
def test_an_update_of_each_kind_of_model(worlds, tiny_hf, family):
    """Experts with their router, sliding windows."""
    (found,) = worlds[1].run(traced_update, Layout(), str(tiny_hf(family)))
    assert {"mm", "embedding_dense_backward"} <= found[0], sorted(found[0])
    assert not found[1]


def test_sampling_sums_on_the_host():
    """A tensor that claims to be on a GPU: its running sum is taken on the CPU, if that was asked for, and goes back."""

    class Devices(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket.__name__ == "cumsum":
                found.append(args[0].device.type)
            return function(*args, **kwargs or {})

    found: list[str] = []
    with FakeTensorMode():
        x = torch.empty(2, 5, device="cuda")
        try:
            for asked in (True, False):
                torch.use_deterministic_algorithms(asked)
                with Devices():
                    assert running_sum(x).device.type == "cuda"
        finally:
            torch.use_deterministic_algorithms(False)
    assert found == ["cpu", "cuda"]


def test_the_trace_sees_what_is_refused():
    x = torch.rand(4, requires_grad=True)
    with Trace() as trace:
        x.cumsum(0).sum().backward()
        torch.arange(3).cumsum(0)
        torch.bincount(torch.tensor([1, 2]), torch.tensor([0.5, 0.5]))
        torch.bincount(torch.tensor([1, 2]))
        torch.rand(3, 2).median(0)
        torch.rand(3).put_(torch.tensor([1]), torch.tensor([1.0]))
    assert trace.refused == {"cumsum.default", "bincount.default", "median.dim", "put_.default"}
