"""Megatron-Core 0.16 on machines without CUDA: the few CUDA names it insists on, redirected to the CPU.

This file only makes Megatron-Core run on a CPU; which device there is, is asked of device.py. ``install`` does nothing
where a CUDA device exists.
Every redirection has its reason beside it; none replaces arithmetic or communication.
"""

import contextlib
import functools
import importlib
import sys
import types

import torch

from g2r_megatron.device import on_cpu

_CPU = torch.device("cpu")
_installed = False

# Modules of Megatron-Core that write device="cuda" literally into torch factory calls.
_LITERAL_CUDA_MODULES = (
    "megatron.core.pipeline_parallel.schedules",  # total_num_tokens
    "megatron.core.optimizer.grad_scaler",  # loss scale
    "megatron.core.optimizer.optimizer",  # found_inf, scale
    "megatron.core.optimizer.clip_grads",  # norms
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.utils",  # parameter norms
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
)
_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange", "empty_like", "zeros_like")


def _without_cuda(factory):
    """The torch factory with a CUDA device argument answered by the CPU."""

    @functools.wraps(factory)
    def call(*args, **kwargs):
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return call


class _TorchOnCpu(types.ModuleType):
    """``torch`` as seen by one Megatron-Core module: factories map cuda to cpu, all else is torch itself.

    A module-level stand-in costs nothing in code outside those modules, unlike a TorchFunctionMode.
    """

    def __init__(self, **replaced):
        super().__init__("torch")
        vars(self).update(replaced)
        for name in _FACTORIES:
            setattr(self, name, _without_cuda(getattr(torch, name)))

    def __getattr__(self, name):
        return getattr(torch, name)


class _NoStream:
    """Stream and event in one: CPU work is done when the call returns, so there is nothing to order."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return None

    def _done(self, *args, **kwargs):
        return None

    wait_stream = wait_event = synchronize = record = wait = _done

    def record_event(self, *args, **kwargs):
        return self

    def query(self):
        return True


def _redirect_runtime():
    """Device queries, streams and synchronisation."""
    cuda = torch.cuda
    cuda.current_device = lambda: _CPU  # used as device= all over Megatron-Core
    cuda.synchronize = lambda *args, **kwargs: None  # CPU calls are synchronous
    cuda.set_device = lambda *args, **kwargs: None
    cuda.Stream = cuda.Event = _NoStream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _NoStream()
    torch.Tensor.record_stream = lambda self, stream: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # tied embeddings call weight.data.cuda()
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args, **kwargs: None


def _redirect_rng():
    """The CUDA RNG tracker keeps states of the CPU generator instead (recompute and model-parallel seeds)."""
    cuda = torch.cuda
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _redirect_tensor_type():
    """The optimizers sort parameters by ``param.type() == "torch.cuda.FloatTensor"``: answer that name."""
    original = torch.Tensor.type

    def tensor_type(self, *args, **kwargs):
        name = original(self, *args, **kwargs)
        if isinstance(name, str) and self.device.type == "cpu":
            return name.replace("torch.", "torch.cuda.", 1)
        return name

    torch.Tensor.type = tensor_type


def _redirect_moe():
    """Names that the mixture-of-experts layers use without CUDA or Transformer Engine in mind."""
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):  # never defined without Transformer Engine, later compared with None
        moe_utils.te_general_gemm = None
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    original = dispatcher.maybe_move_tensor_to_cpu

    def maybe_move_tensor_to_cpu(tensor, as_numpy=False, record_stream=False):
        """A tensor that is on the CPU already must still become numbers for ``all_to_all_single``."""
        if torch.is_tensor(tensor) and tensor.device == _CPU:
            return tensor.numpy() if as_numpy else tensor
        return original(tensor, as_numpy, record_stream)

    dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


class _UnevenCollectives(types.ModuleType):
    """``torch.distributed`` whose list collectives take parts of different length, which gloo's do not.

    Expert tensor parallel ranks exchange as many tokens as each happens to have. Parts are padded to the longest.
    """

    def __init__(self):
        super().__init__("torch.distributed")

    def __getattr__(self, name):
        return getattr(torch.distributed, name)

    @staticmethod
    def all_gather(outputs: list, tensor: torch.Tensor, group) -> None:
        longest = max(part.size(0) for part in outputs)
        padded = tensor.new_zeros(longest, *tensor.shape[1:])
        padded[: tensor.size(0)] = tensor
        gathered = [torch.empty_like(padded) for _ in outputs]
        torch.distributed.all_gather(gathered, padded, group=group)
        for output, part in zip(outputs, gathered, strict=True):
            output.copy_(part[: output.size(0)])

    @staticmethod
    def reduce_scatter(output: torch.Tensor, inputs: list, group) -> None:
        total = torch.cat(inputs)
        torch.distributed.all_reduce(total, group=group)
        output.copy_(total.split([part.size(0) for part in inputs])[group.rank()])


def _redirect_groups() -> None:
    """Megatron-Core's global groups with the same ranks become one group: each idle gloo group polls."""
    state = importlib.import_module("megatron.core.parallel_state")
    create, made = state.create_group, {}

    def create_group(ranks, **options):
        key = (torch.distributed.group.WORLD, tuple(ranks))
        if key not in made:
            made[key] = create(ranks, **options)
        return made[key]

    state.create_group = create_group


def import_megatron() -> None:
    """Import Megatron-Core; on CPU with its functions as they are written. To be called before any other import of it.

    Megatron-Core decorates with torch.compile, which imports the compiler: a second or two of a command's start. None of
    these functions is worth compiling for a CPU, and a laptop may have no C++ compiler. It also imports wandb, for an
    inference engine that is not used here: another third of a second, which runs with ``log.wandb`` spend later.
    """
    if not on_cpu():
        return
    compiled, torch.compile = torch.compile, lambda function: function
    hidden = "wandb" not in sys.modules
    if hidden:
        sys.modules["wandb"] = None  # type: ignore[assignment]  # an import of it fails, as if it were not installed
    try:
        importlib.import_module("megatron.core.jit").disable_jit_fuser()
    finally:
        torch.compile = compiled
        if hidden:
            del sys.modules["wandb"]


def install() -> None:
    """Redirect what Megatron-Core needs of CUDA; once a process, a no-op where CUDA exists."""
    global _installed
    if _installed or not on_cpu():
        return
    _redirect_runtime()
    _redirect_rng()
    _redirect_tensor_type()
    stand_in = _TorchOnCpu()
    for name in _LITERAL_CUDA_MODULES:
        importlib.import_module(name).torch = stand_in
    _redirect_moe()
    _redirect_groups()
    importlib.import_module("megatron.core.tensor_parallel.mappings").torch = _TorchOnCpu(
        distributed=_UnevenCollectives()
    )
    _installed = True
