"""Does every weight reach the engine? Asked before the first step, with changes that show.

vLLM can report a successful update whose weights never reach its kernels, and an update of training moves log-probs by less
than bf16 rounds them. So here every tensor is changed visibly, synchronised, and the engine's log-probs are compared with the
trainer's; then everything is put back and compared again.
"""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from g2r_megatron.device import local_device
from g2r_megatron.errors import RunError
from g2r_megatron.model.build import MegatronModel
from g2r_megatron.model.weights import mapping_of, parameter_names
from g2r_megatron.rollout.vllm.engine import VLLMRolloutEngine

# Mean |log p engine - log p trainer| above this means other weights; two implementations of bf16 differ by about 0.01.
BOUND = {torch.float32: 1e-3, torch.bfloat16: 0.1}
CHANGE = 0.3  # of a tensor's root mean square
SEQUENCES, LONGEST = 16, 64  # what log-probs are compared on: random tokens
LogProbs = Callable[[list[list[int]]], list[torch.Tensor]]


def check_weights_arrive(engine: VLLMRolloutEngine, trainer_log_probs: LogProbs) -> None:
    """Raise ``RunError`` naming the tensors that do not arrive in an engine (collective). Both have the start weights.

    ``trainer_log_probs``: as ``engine.log_probs``, by the policy itself, on every rank. The weights are the same
    afterwards, bit for bit; in between they are kept in host memory. An expert that no random token is routed to is not seen.
    """
    model = engine.model
    sequences, bound = probes(engine), BOUND[model.config.params_dtype]

    def error() -> float:
        engine.take_weights()
        return distance(engine.log_probs(sequences), trainer_log_probs(sequences))

    with changed(model, lambda name: True):
        all_changed = error()
    put_back = error()
    if max(all_changed, put_back) <= bound:
        return
    lost = []
    for parameter in parameter_names(model.hf):
        with changed(model, parameter.__eq__):
            if error() > max(bound, 2 * put_back):
                lost.append(", ".join(mapping_of(model.hf, parameter).hf))
    raise RunError(
        f"the vLLM engine does not sample with the policy's weights: mean |log p engine - log p trainer| is {all_changed:.3g} "
        f"with every weight changed and {put_back:.3g} with them put back (at most {bound:g}); "
        + (f"not arrived: {'; '.join(lost)}" if lost else "no single tensor explains it")
        + "; set rollout.engine megatron, or install a tested version of vLLM"
    )


def probes(engine: VLLMRolloutEngine) -> list[list[int]]:
    """Sequences of random tokens, the same on every rank."""
    length = min(LONGEST, engine.config.max_prompt_tokens + engine.config.max_response_tokens - 1)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(engine.model.geometry.vocab, (SEQUENCES, length), generator=generator).tolist()


def distance(engine: list[torch.Tensor], trainer: list[torch.Tensor]) -> float:
    """Mean absolute difference, of the rank where it is largest (collective); infinite where one is not finite."""
    mean = (torch.cat(engine) - torch.cat(trainer)).abs().mean().nan_to_num(nan=torch.inf).to(local_device())
    dist.all_reduce(mean, op=dist.ReduceOp.MAX)
    return mean.item()


@contextmanager
def changed(model: MegatronModel, chosen: Callable[[str], bool]) -> Iterator[None]:
    """In the block the chosen parameters (by canonical name) have noise added, alike on all ranks; then they are as before."""
    before = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "output_layer.weight" and model.geometry.tied:
                name = "embedding.word_embeddings.weight"  # its copy on the last stage
            if not chosen(name):
                continue
            before.append((parameter, parameter.detach().cpu().clone()))
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            scale = CHANGE * parameter.float().square().mean().sqrt().clamp_min(0.1 * CHANGE)
            parameter.add_((scale * noise.to(parameter.device)).to(parameter.dtype))
        try:
            yield
        finally:
            for parameter, values in before:
                parameter.copy_(values)
