"""The in-process rollout engine: Megatron-Core's static inference context (its KV cache) on the policy's own layout."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext

from g2r_megatron.config import RolloutConfig
from g2r_megatron.model.build import MegatronModel
from g2r_megatron.model.schedule import run_schedule
from g2r_megatron.parallel import cpu
from g2r_megatron.parallel.microbatches import padded
from g2r_megatron.rollout.sampling import next_tokens, uniforms


@dataclass
class Request:
    """One response to sample. ``key`` seeds its random numbers: same key, same prompt, same weights, same response."""

    prompt_ids: list[int]
    key: str


@contextmanager
def without_sequence_parallel(model: MegatronModel):
    """Decoding feeds one position at a time, which cannot be split: run the same weights without sequence parallelism."""
    names = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
    switched = [(m, n) for m in model.gpt.modules() for n in names if getattr(m, n, False) is True]
    previous, model.config.sequence_parallel = model.config.sequence_parallel, False
    for module, name in switched:
        setattr(module, name, False)
    try:
        yield
    finally:
        model.config.sequence_parallel = previous
        for module, name in switched:
            setattr(module, name, True)


class MegatronRolloutEngine:
    """Samples responses with the policy as it is (collective over the world).

    Prompts of different length share a batch without padding: the batch starts at the shortest prompt, and a longer
    prompt's own tokens are fed until it ends, so every cached position is a real one.
    """

    def __init__(self, model: MegatronModel, config: RolloutConfig, stop_ids: set[int]):
        self.model, self.config, self.stop_ids = model, config, stop_ids

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        temperature: float | None = None,
        on_progress: Callable[[int], None] = lambda n: None,
    ) -> list[tuple[list[int], bool]]:
        """(token ids with the stop token, finished) of every request, in order, on every rank.

        ``temperature`` overrides the config's (0: greedy). ``on_progress`` is called with finished sequences of
        this rank.
        """
        temperature = self.config.temperature if temperature is None else temperature
        groups, mine = self.model.groups, {}
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt_ids), i))
        share = order[groups.dp_rank :: groups.dp_size]  # near lengths meet in a batch, on every rank
        training = self.model.module.training
        self.model.module.eval()
        with without_sequence_parallel(self.model):
            for first in range(0, len(share), self.config.batch_size):
                batch = share[first : first + self.config.batch_size]
                mine |= zip(batch, self._generate_batch([requests[i] for i in batch], temperature), strict=True)
                on_progress(len(mine))
        self.model.module.train(training)
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, mine if groups.is_replica_writer else {})
        merged = {i: result for part in gathered for i, result in part.items()}
        return [merged[i] for i in range(len(requests))]

    def _generate_batch(self, requests: list[Request], temperature: float) -> list[tuple[list[int], bool]]:
        """One batch to the end, on this replica's model-parallel ranks (which all return the same)."""
        device, limit, wanted = cpu.device(), self.config.max_response_tokens, len(requests)
        # FP8 products need rows in multiples, also where one token a sequence is fed: repeat the last request.
        requests = requests + [requests[-1]] * (padded(wanted, self.model.token_multiple) - wanted)
        lengths = torch.tensor([len(r.prompt_ids) for r in requests], device=device)
        longest, start = int(lengths.max()), int(lengths.min())
        tokens = torch.zeros(len(requests), longest + limit, dtype=torch.int64, device=device)
        for row, request in enumerate(requests):
            tokens[row, : len(request.prompt_ids)] = torch.tensor(request.prompt_ids, device=device)
        u = torch.stack([uniforms(r.key, limit) for r in requests]).to(device)  # [b, limit]
        stop = torch.tensor(sorted(self.stop_ids), device=device)
        ends = lengths + limit  # position after each response
        finished = torch.zeros(len(requests), dtype=torch.bool, device=device)
        context = StaticInferenceContext(len(requests), longest + limit)
        position, fed = start, 0
        while position < longest + limit and not bool((finished | (position >= ends)).all()):
            logits = self._step(tokens[:, fed:position], context)
            context.sequence_len_offset = fed = position
            context.enable_decode_mode()
            drawn = u.gather(1, (position - lengths).clamp(0, limit - 1).unsqueeze(1)).squeeze(1)
            chosen = self._choose(logits, drawn, temperature)
            active = (position >= lengths) & (position < ends) & ~finished
            tokens[:, position] = torch.where(active, chosen, tokens[:, position])
            stopped = active & torch.isin(chosen, stop)
            ends = torch.where(stopped, torch.full_like(ends, position + 1), ends)
            finished |= stopped
            position += 1
        return [(tokens[row, lengths[row] : ends[row]].tolist(), bool(finished[row])) for row in range(wanted)]

    def _step(self, ids: torch.Tensor, context: StaticInferenceContext) -> torch.Tensor | None:
        """Feed ids [b, s] at the context's offset; logits [b, vocab] of the last position on the last stage."""

        def forward(batch):
            return self.model.module(batch, None, None, inference_context=context, runtime_gather_output=True)

        results = run_schedule(self.model, [ids], forward, lambda batch, logits: (None, logits), backward=False)
        return results[0][:, -1, : self.model.geometry.vocab] if self.model.groups.is_last_stage else None

    def _choose(self, logits: torch.Tensor | None, u: torch.Tensor, temperature: float) -> torch.Tensor:
        """The last stage samples; the others of its pipeline are told. int64 [b]."""
        groups = self.model.groups
        if groups.is_last_stage:
            chosen = next_tokens(logits, u, temperature, self.config.top_k, self.config.top_p)
        else:
            chosen = torch.empty(u.size(0), dtype=torch.int64, device=u.device)
        if groups.pgs.pp.size() > 1:
            dist.broadcast(chosen, groups.last_stage_rank, group=groups.pgs.pp)
        return chosen
