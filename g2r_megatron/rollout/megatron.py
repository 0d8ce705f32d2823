"""The in-process rollout engine: Megatron-Core's static inference context (its KV cache) on the policy's own layout.

Sequences of different age share a batch (continuous batching): one that is finished leaves its row of the cache to
another one. Prompts of different length are run in one pass. The shorter ones are padded, and nothing reads the padding.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from g2r_megatron.config.options import RolloutConfig
from g2r_megatron.device import local_device
from g2r_megatron.model.build import MegatronModel
from g2r_megatron.model.decode_attention import CacheContext
from g2r_megatron.model.schedule import forward_once
from g2r_megatron.parallel.agreement import union
from g2r_megatron.parallel.microbatches import cache_block, few_length
from g2r_megatron.rollout.batch import Batch
from g2r_megatron.rollout.sampling import next_tokens
from g2r_megatron.rollout.types import Request, Sampled, by_length


@contextmanager
def without_sequence_parallel(model: MegatronModel):
    """In the block the weights run without sequence parallelism. Decoding feeds one position at a time, which cannot be split."""
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
    """Samples responses with the policy as it is (collective over the world)."""

    def __init__(self, model: MegatronModel, config: RolloutConfig, stop_ids: set[int]):
        self.model, self.config, self.stop_ids = model, config, stop_ids
        self.block = cache_block(config.max_prompt_tokens + config.max_response_tokens)

    def rest(self) -> None:
        """Nothing to do: a cache lives as long as a call, and the weights are the policy's."""

    def take_weights(self) -> None:
        """Nothing to do: the engine samples with the policy itself."""

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
        this rank. ``between_batches`` is called as often on every rank, before each ``batch_size`` sequences of a replica
        are begun, and may raise.
        """
        temperature = self.config.temperature if temperature is None else temperature
        groups, mine = self.model.groups, dict[int, Sampled]()
        order = by_length(requests)
        shares = [order[rank :: groups.dp_size] for rank in range(groups.dp_size)]  # near lengths meet, on every rank
        share = shares[groups.dp_rank]
        training = self.model.training
        self.model.train(False)
        self.model.weights_changed()  # since the last pass, by an update; decoding steps after the first keep the copies
        calls = iter(range(0, len(shares[0]), self.config.batch_size))  # of between_batches
        if share or (groups.replicas_share_experts and requests):
            # all replicas that share experts take the same steps, also one that has nothing to do
            batch = Batch(requests, share, self.config, self.stop_ids, self.model.token_multiple)
            with without_sequence_parallel(self.model):
                self._run(batch, calls, temperature, on_progress, between_batches)
            mine = batch.results
        for _ in calls:
            between_batches()
        self.model.train(training)
        merged = union(mine if groups.is_replica_writer else {})
        return [merged[i] for i in range(len(requests))]

    def _run(self, batch: Batch, calls: Iterator[int], temperature: float, on_progress, between_batches) -> None:
        """All of this replica's share, on its model-parallel ranks (which all find the same results).

        ``calls``: so many sequences are begun before each call of ``between_batches``.
        """
        context = CacheContext(len(batch.rows), batch.longest, self.block)
        due, found = next(calls, None), 0
        while True:
            refill, begun, active = self._agree(int(batch.wants_refill), batch.begun_after_refill, int(batch.is_active))
            if not (refill or active):
                break
            if refill:
                while due is not None and due < begun:
                    between_batches()
                    due = next(calls, None)
                self._read_prompts(batch, context)
                continue  # requests may still wait for free rows
            if (kept := batch.shrink()) is not None:
                context.keep(kept, local_device())
            batch.add(self._step(batch, context, temperature))
            if len(batch.results) > found:
                found = len(batch.results)
                on_progress(found)
        if due is not None:
            between_batches()

    def _agree(self, *numbers: int) -> list[int]:
        """The maximum of each number over all replicas that share this one's experts (collective over them)."""
        if not self.model.groups.replicas_share_experts:
            return list(numbers)
        largest = torch.tensor(numbers, device=local_device())
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.model.groups.pgs.dp)
        return largest.tolist()

    def _read_prompts(self, batch: Batch, context: CacheContext) -> None:
        """A pass over the prompts that come into the batch, each of them once: their keys and values go into the cache."""
        rows, sources, prompts = batch.refill()
        context.begin_prompts(rows, sources, local_device())
        length = min(few_length(max(map(len, prompts))), context.max_sequence_length)
        self._forward([prompt + [0] * (length - len(prompt)) for prompt in prompts], None, context)

    def _step(self, batch: Batch, context: CacheContext, temperature: float) -> list[int]:
        """The next token of every row, on all model-parallel ranks."""
        seen = context.begin_step(batch.positions, local_device())
        logits = self._forward([[token] for token in batch.last_tokens], seen, context)
        u = torch.tensor(batch.uniforms, dtype=torch.float64, device=local_device())
        return self._choose(logits, u, temperature).tolist()

    def _forward(self, ids: list[list[int]], seen: torch.Tensor | None, context: CacheContext) -> torch.Tensor | None:
        """Feed ids [b, s]; logits [b, vocab] of the last position on the last stage."""

        def forward(module, ids):
            return module(ids, None, seen, inference_context=context, runtime_gather_output=True)

        logits = forward_once(self.model, torch.tensor(ids, device=local_device()), forward)
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
