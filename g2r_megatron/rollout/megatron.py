"""The in-process rollout engine: Megatron-Core's static inference context (its KV cache) on the policy's own layout."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from g2r_megatron.config.options import RolloutConfig
from g2r_megatron.device import local_device
from g2r_megatron.model.build import MegatronModel
from g2r_megatron.model.decode_attention import CacheContext
from g2r_megatron.model.schedule import forward_once
from g2r_megatron.parallel.agreement import union
from g2r_megatron.parallel.microbatches import cache_block, padded
from g2r_megatron.rollout.sampling import next_tokens, uniforms
from g2r_megatron.rollout.types import Request, Sampled, by_length

PROMPT_MULTIPLE = 32  # tokens of the pass over prompts come in multiples of this


@contextmanager
def without_sequence_parallel(model: MegatronModel):
    """Decoding feeds one position at a time, which cannot be split: run the same weights without sequence parallelism."""
    names = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
    switched = [
        (m, n) for chunk in model.chunks for m in chunk.modules() for n in names if getattr(m, n, False) is True
    ]
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

    Prompts of different length share a batch without padding: after one pass over as much as the shortest has, a longer
    prompt's own tokens are fed one by one until it ends, so every cached position that is read is a real one.
    """

    def __init__(self, model: MegatronModel, config: RolloutConfig, stop_ids: set[int]):
        self.model, self.config, self.stop_ids = model, config, stop_ids
        self.block = cache_block(config.max_prompt_tokens + config.max_response_tokens)

    def rest(self) -> None:
        """Nothing to do: a cache lives as long as a batch, and the weights are the policy's."""

    def take_weights(self) -> None:
        """Nothing to do: it samples with the policy itself."""

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        temperature: float | None = None,
        on_progress: Callable[[int], None] = lambda n: None,
        between_batches: Callable[[], None] = lambda: None,
    ) -> list[Sampled]:
        """What was sampled for every request, in order, on every rank; without log-probs.

        ``temperature`` overrides the config's (0: greedy). ``on_progress`` is called with finished sequences of
        this rank, ``between_batches`` at the same times on every rank, and may raise.
        """
        temperature = self.config.temperature if temperature is None else temperature
        groups, mine = self.model.groups, {}
        order = by_length(requests)
        shares = [order[rank :: groups.dp_size] for rank in range(groups.dp_size)]  # near lengths meet, on every rank
        training = self.model.training
        self.model.train(False)
        self.model.weights_changed()  # since the last pass, by an update; decoding steps after the first keep the copies
        with without_sequence_parallel(self.model):
            for first in range(0, len(shares[0]), self.config.batch_size):
                between_batches()
                batches = [share[first : first + self.config.batch_size] for share in shares]
                batch = batches[groups.dp_rank]
                if groups.replicas_share_experts:  # all replicas take the same steps, also one that has nothing to do
                    together, used = [i for part in batches for i in part], batch or batches[0][:1]
                else:
                    together = used = batch
                if not used:
                    continue
                lengths = [len(requests[i].prompt_ids) for i in together]
                results = self._generate_batch([requests[i] for i in used], temperature, min(lengths), max(lengths))
                mine |= zip(batch, results, strict=False)
                on_progress(len(mine))
        self.model.train(training)
        merged = union(mine if groups.is_replica_writer else {})
        return [merged[i] for i in range(len(requests))]

    def _generate_batch(self, requests: list[Request], temperature: float, start: int, longest: int) -> list[Sampled]:
        """One batch to the end, on this replica's model-parallel ranks (which all return the same).

        ``start``, ``longest``: lengths of the shortest and the longest prompt of all replicas that step together.
        """
        device, limit, wanted = local_device(), self.config.max_response_tokens, len(requests)
        # FP8 products need rows in multiples, also where one token a sequence is fed: repeat the last request.
        requests = requests + [requests[-1]] * (padded(wanted, self.model.token_multiple) - wanted)
        lengths = torch.tensor([len(r.prompt_ids) for r in requests], device=device)
        context = CacheContext(len(requests), longest + limit, self.block)
        tokens = torch.zeros(len(requests), context.max_sequence_length, dtype=torch.int64, device=device)
        for row, request in enumerate(requests):
            tokens[row, : len(request.prompt_ids)] = torch.tensor(request.prompt_ids, device=device)
        u = torch.stack([uniforms(r.key, limit) for r in requests]).to(device)  # [b, limit]
        stop = torch.tensor(sorted(self.stop_ids), device=device)
        ends = lengths + limit  # position after each response
        finished = torch.zeros(len(requests), dtype=torch.bool, device=device)
        # To one of few lengths; what this stores behind the shortest prompt is written over before it is read.
        self._step(tokens[:, : padded(start, PROMPT_MULTIPLE)], context)
        context.enable_decode_mode()
        position = start
        while position < longest + limit and not self._all_done(finished | (position >= ends)):
            context.sequence_len_offset = position - 1
            logits = self._step(tokens[:, position - 1 : position], context)
            drawn = u.gather(1, (position - lengths).clamp(0, limit - 1).unsqueeze(1)).squeeze(1)
            chosen = self._choose(logits, drawn, temperature)
            active = (position >= lengths) & (position < ends) & ~finished
            tokens[:, position] = torch.where(active, chosen, tokens[:, position])
            stopped = active & torch.isin(chosen, stop)
            ends = torch.where(stopped, torch.full_like(ends, position + 1), ends)
            finished |= stopped
            position += 1
        return [Sampled(tokens[row, lengths[row] : ends[row]].tolist(), bool(finished[row])) for row in range(wanted)]

    def _all_done(self, done: torch.Tensor) -> bool:
        """Whether every sequence is done, of this replica or of all that share its experts. ``done``: bool [b]."""
        every = done.all()
        if self.model.groups.replicas_share_experts:
            flag = every.to(torch.int32)
            dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self.model.groups.pgs.dp)
            every = flag
        return bool(every)

    def _step(self, ids: torch.Tensor, context: CacheContext) -> torch.Tensor | None:
        """Feed ids [b, s] at the context's offset; logits [b, vocab] of the last position on the last stage."""
        seen = context.distances(context.sequence_len_offset, ids.device) if context.is_decode_only() else None

        def forward(module, ids):
            return module(ids, None, seen, inference_context=context, runtime_gather_output=True)

        logits = forward_once(self.model, ids, forward)
        return None if logits is None else logits[:, -1, : self.model.geometry.vocab]

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
