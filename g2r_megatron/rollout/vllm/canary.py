"""A check, before the first step, that every weight reaches the engine. It changes the weights visibly.

vLLM can report a successful update whose weights never reach its kernels, and an update of training moves log-probs by less
than bf16 rounds them. So here every tensor is changed visibly, synchronised, and the engine's log-probs are compared with the
trainer's; then everything is put back and compared again.
"""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist

from g2r_megatron.config.options import RolloutConfig
from g2r_megatron.errors import RunError
from g2r_megatron.model.build import MegatronModel
from g2r_megatron.model.weights import mapping_of, parameter_names

# A mean |log p engine - log p trainer| above this means other weights. Two implementations of bf16 differ by about 0.01.
BOUND = {torch.float32: 1e-3, torch.bfloat16: 0.1}
CHANGE = 0.3  # of a tensor's root mean square
SEQUENCES, LONGEST = 16, 64  # what log-probs are compared on: random tokens
LogProbs = Callable[[list[list[int]]], list[torch.Tensor]]


class WeightsTaker(Protocol):
    """One vLLM engine or several, in this program or in others."""

    model: MegatronModel  # the policy
    config: RolloutConfig

    def take_weights(self) -> None:
        """As ``RolloutEngine.take_weights``."""
        ...

    def log_probs(self, sequences: list[list[int]]) -> dict[str, list[torch.Tensor]]:
        """log p [T - 1] fp32 at temperature 1 of the tokens of each sequence after its first, by each engine of this rank."""
        ...


def check_weights_arrive(engine: WeightsTaker, trainer_log_probs: LogProbs) -> None:
    """Raise ``RunError`` naming the tensors that do not arrive in an engine (collective). Both have the start weights.

    ``trainer_log_probs``: those of the policy itself, on every rank. The weights are the same afterwards, bit for bit; in
    between they are kept in host memory. An expert that no random token is routed to is not seen.
    """
    model = engine.model
    sequences, bound = probes(engine), BOUND[model.config.params_dtype]

    def error() -> tuple[float, str]:
        engine.take_weights()
        return distance(engine.log_probs(sequences), trainer_log_probs(sequences))

    with changed(model, lambda name: True):
        all_changed, worst = error()
    put_back, worst_put_back = error()
    if max(all_changed, put_back) <= bound:
        return
    lost = []
    for parameter in parameter_names(model.hf):
        with changed(model, parameter.__eq__):
            if error()[0] > max(bound, 2 * put_back):
                lost.append(", ".join(mapping_of(model.hf, parameter).hf))
    raise RunError(
        f"{worst if all_changed > bound else worst_put_back} does not sample with the policy's weights: "
        f"mean |log p engine - log p trainer| is {all_changed:.3g} with every weight changed "
        f"and {put_back:.3g} with them put back (at most {bound:g}); "
        + (f"not arrived: {'; '.join(lost)}" if lost else "no single tensor explains it")
        + "; set rollout.engine megatron, or install a tested version of vLLM"
    )


def probes(engine: WeightsTaker) -> list[list[int]]:
    """Sequences of random tokens, the same on every rank."""
    length = min(LONGEST, engine.config.max_prompt_tokens + engine.config.max_response_tokens - 1)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(engine.model.geometry.vocab, (SEQUENCES, length), generator=generator).tolist()


def distance(engines: dict[str, list[torch.Tensor]], trainer: list[torch.Tensor]) -> tuple[float, str]:
    """Mean absolute difference of the engine where it is largest, and its name (collective); infinite if not finite."""
    means = [
        ((torch.cat(found) - torch.cat(trainer)).abs().mean().nan_to_num(nan=torch.inf).item(), name)
        for name, found in engines.items()
    ]
    of_all_ranks: list[list[tuple[float, str]]] = [[]] * dist.get_world_size()
    dist.all_gather_object(of_all_ranks, means)
    return max(mean for means in of_all_ranks for mean in means)


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
