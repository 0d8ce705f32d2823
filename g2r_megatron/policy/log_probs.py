"""Log-probs of response tokens under any model of ours, in the micro-batches the update will use."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from g2r_megatron.device import local_device
from g2r_megatron.model.build import MegatronModel
from g2r_megatron.model.schedule import TokenBatch, forward_tokens, replica_plan, row_batch, run_schedule
from g2r_megatron.parallel.vocab import log_probs_at


@dataclass(frozen=True)
class TokenSequence:
    """A prompt and its response; ``response_ids`` (with the stop token) are what log-probs are of."""

    prompt_ids: list[int]
    response_ids: list[int]

    @property
    def ids(self) -> list[int]:
        return self.prompt_ids + self.response_ids

    @property
    def logit_positions(self) -> range:
        """Positions whose logits predict the response tokens: each one before its token."""
        return range(len(self.prompt_ids) - 1, len(self.prompt_ids) + len(self.response_ids) - 1)


def plan_micro_batches(
    model: MegatronModel, sequences: Sequence[TokenSequence], indices: list[int], budget: int
) -> list:
    """This data-parallel rank's micro-batches of ``indices``: lists of indices into ``sequences``.

    The same plan serves old log-probs and the update, so that both see bit-identical arithmetic.
    """
    lengths = [len(sequences[i].ids) for i in indices]
    return replica_plan(model, lengths, indices, budget)


def response_batch(
    model: MegatronModel, sequences: Sequence[TokenSequence], items: list[int], budget: int
) -> TokenBatch:
    """The row of ``items``, planned with ``budget``, with logits at the positions that predict response tokens."""
    ids = {i: sequences[i].ids for i in items}
    return row_batch(model, ids, {i: sequences[i].logit_positions for i in items}, items, budget)


def token_log_probs(
    model: MegatronModel,
    batch: TokenBatch,
    logits: torch.Tensor,
    sequences: Sequence[TokenSequence],
    temperature: float,
) -> torch.Tensor:
    """log p of every response token of the micro-batch, flat in row order: fp32 [n], from logits [n, v/tp].

    ``temperature`` divides the logits, so that the policy optimised is the one that was sampled from.
    """
    ids = torch.tensor([t for i in batch.items for t in sequences[i].response_ids], device=logits.device)
    scaled = logits if temperature in (0.0, 1.0) else logits.float() / temperature
    return log_probs_at(scaled, ids.unsqueeze(1), model.geometry.vocab, model.groups.pgs.tp).squeeze(1)


@dataclass(frozen=True)
class UpdateLogProbs:
    """What an update needs besides advantages: its mini-batches (indices), and log-probs from the models themselves.

    ``old`` (None: the update's own, detached) and ``reference`` (None without a KL penalty): fp32 [T_i] a sequence, with
    the stop token, on the CPU.
    """

    mini_batches: list[list[int]]
    old: list[torch.Tensor] | None
    reference: list[torch.Tensor] | None


@torch.no_grad()
def response_log_probs(
    model: MegatronModel, sequences: Sequence[TokenSequence], plan: list, temperature: float, budget: int
) -> list[torch.Tensor]:
    """log p [T_i] fp32 (CPU) of every sequence in any rank's ``plan``, on every rank (collective over the world).

    ``plan``: of ``plan_micro_batches`` with this ``budget``.

    In training mode, as the update runs (models here have no dropout): Transformer Engine takes other attention kernels
    in evaluation, and these round differently.
    """
    training = model.training
    model.train()

    def collect(batch: TokenBatch, logits: torch.Tensor):
        return None, (batch.items, token_log_probs(model, batch, logits, sequences, temperature))

    batches = [response_batch(model, sequences, items, budget) for items in plan]
    results = run_schedule(model, batches, forward_tokens, collect, backward=False)
    model.train(training)
    return on_every_rank(model, results, sequences)


def on_every_rank(
    model: MegatronModel, results: list[tuple[list[int], torch.Tensor]], sequences: Sequence[TokenSequence]
) -> list[torch.Tensor]:
    """A value a response token, [T_i] fp32 (CPU) of every sequence (collective over the world).

    ``results``: of this rank's micro-batches, (indices of sequences, flat [n] in row order). A sequence of no rank gets 0.
    """
    lengths = [len(sequence.response_ids) for sequence in sequences]
    flat = torch.zeros(sum(lengths), device=local_device())
    pieces = flat.split(lengths)
    if model.groups.is_replica_writer:
        for items, values in results:
            for i, part in zip(items, values.split([lengths[i] for i in items]), strict=True):
                pieces[i].copy_(part)
    dist.all_reduce(flat)
    return list(flat.cpu().split(lengths))
