"""The frozen judge on its own layout: verdict log-probs forward, embedding gradients backward, gathered to all ranks.

Every rank passes the same global list of inputs; data-parallel replicas each do their share, and the results (scalars a
sequence, a few scalars a response token) are summed into place over the world. Hidden-sized tensors never travel.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from g2r_megatron.config import JudgeConfig
from g2r_megatron.errors import UserError
from g2r_megatron.judge.prompt import JudgeInput
from g2r_megatron.model.build import MegatronModel
from g2r_megatron.model.schedule import TokenBatch, forward_tokens, replica_plan, run_schedule, token_batch
from g2r_megatron.parallel import cpu
from g2r_megatron.parallel.vocab import log_probs_at


@dataclass
class TokenGradients:
    """What one backward says of T response tokens, reduced over the hidden dimension; fp32 on the CPU.

    ``d`` is the direction the gradient is contracted with: e_t, or e_t - mean for ``contracted``.
    """

    dot: torch.Tensor  # [T] g_t . d_t
    l1: torch.Tensor  # [T] |g_t|_1
    l2: torch.Tensor  # [T] |g_t|_2
    d_norm: torch.Tensor  # [T] |d_t|_2

    def attribution(self, kind: str) -> torch.Tensor:
        """b_t of METHOD.md step 3: g.e (also for ``contracted``), or the L1 / L2 norm of g."""
        return {"l1": self.l1, "l2": self.l2}.get(kind, self.dot)

    @property
    def cos(self) -> float:
        """Median over tokens of |cos(g_t, d_t)|; nan without tokens or where the gradient vanishes."""
        return (self.dot.abs() / (self.l2 * self.d_norm)).median().item() if self.dot.numel() else float("nan")


class FrozenJudge:
    """A model that only judges. ``true_ids``/``false_ids``: the token spellings of the two verdicts."""

    def __init__(self, model: MegatronModel, config: JudgeConfig, true_ids: list[int], false_ids: list[int]):
        self.model, self.config = model, config
        self.true_ids, self.false_ids = true_ids, false_ids
        model.freeze()  # frozen linears take Megatron-Core's dgrad-only path
        self._mean_embedding = self._compute_mean_embedding() if config.attribution == "contracted" else None

    def _compute_mean_embedding(self) -> torch.Tensor | None:
        """Mean over the real vocabulary rows [h], on the first stage; padded rows are zero and not counted."""
        if not self.model.groups.is_first_stage:
            return None
        total = self.model.chunks[0].embedding.word_embeddings.weight.detach().float().sum(0)
        if self.model.groups.pgs.tp.size() > 1:
            dist.all_reduce(total, group=self.model.groups.pgs.tp)
        return total / self.model.geometry.vocab

    def _micro_batches(self, inputs: list[JudgeInput], indices: list[int]) -> list[TokenBatch]:
        """This replica's share of ``indices`` as micro-batches; logits at the verdict position only."""
        lengths = [len(inputs[i].input_ids) for i in indices]
        plan = replica_plan(self.model, lengths, indices, self.config.micro_batch_tokens)
        sequences = [item.input_ids for item in inputs]
        positions = [[item.verdict_position] for item in inputs]
        return [token_batch(self.model, sequences, positions, items) for items in plan]

    def _verdict_log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [b, v/tp] at the verdict position -> (log p(True), log p(False)) [b, 2], summed over spellings."""
        ids = torch.tensor(self.true_ids + self.false_ids, device=logits.device).expand(logits.size(0), -1)
        log_probs = log_probs_at(logits, ids, self.model.geometry.vocab, self.model.groups.pgs.tp)
        split = len(self.true_ids)
        return torch.stack([log_probs[:, :split].logsumexp(1), log_probs[:, split:].logsumexp(1)], dim=1)

    @torch.no_grad()
    def verdict_log_probs(self, inputs: list[JudgeInput]) -> torch.Tensor:
        """(log p(True), log p(False)) of every input: fp32 [len(inputs), 2] on the CPU of every rank (collective).

        Raises ``UserError`` when one is not finite: the judge's weights or its precision are broken.
        """
        self.model.train(False)

        def collect(batch: TokenBatch, logits: torch.Tensor):
            return None, (batch.items, self._verdict_log_probs(logits))

        batches = self._micro_batches(inputs, list(range(len(inputs))))
        results = run_schedule(self.model, batches, forward_tokens, collect, backward=False)
        table = torch.zeros(len(inputs), 2, device=cpu.device())
        if self.model.groups.is_replica_writer:
            for items, values in results:
                table[items] = values
        dist.all_reduce(table)
        if not torch.isfinite(table).all():
            bad = int((~torch.isfinite(table).all(1)).nonzero()[0])
            raise UserError(
                "judge.model",
                f"the verdict log-probs of input {bad} are not finite: {table[bad].tolist()}",
                "check the judge's weights and judge.precision",
            )
        return table.cpu()

    def token_gradients(self, inputs: list[JudgeInput], verdicts: dict[int, bool]) -> dict[int, TokenGradients]:
        """Gradients of the target of ``inputs[i]`` for the ``i`` in ``verdicts`` (collective; all ranks get all).

        Target: log p(verdict), or logit(True) - logit(False) = log p(True) - log p(False), which does not saturate
        (for several spellings, of their summed probabilities). METHOD.md steps 2 and 3.
        """
        indices = sorted(verdicts)
        offsets, total = {}, 0
        for i in indices:
            offsets[i] = total
            total += inputs[i].response_end - inputs[i].response_start
        table = torch.zeros(total, 4, device=cpu.device())
        batches = self._micro_batches(inputs, indices)
        reduced: list[TokenBatch] = []

        def forward(module: torch.nn.Module, batch: TokenBatch):
            leaf = None
            if self.model.groups.is_first_stage and module is self.model.modules[0]:
                leaf, direction = self._embedding_leaf(batch, inputs)

                def reduce(leaf: torch.Tensor) -> None:
                    """Scalars out of the gradient as soon as it is there: one micro-batch of it is ever held."""
                    self._reduce_into(table, offsets, inputs, batch, leaf.grad, direction)
                    leaf.grad = None
                    reduced.append(batch)

                leaf.register_post_accumulate_grad_hook(reduce)
            return module(batch.input_ids, None, None, decoder_input=leaf, logit_rows=batch.logit_rows)

        def target(batch: TokenBatch, logits: torch.Tensor):
            log_probs = self._verdict_log_probs(logits)  # [b, 2]
            if self.config.target == "logit_margin":
                return (log_probs[:, 0] - log_probs[:, 1]).sum(), None
            chosen = torch.tensor([0 if verdicts[i] else 1 for i in batch.items], device=log_probs.device)
            return log_probs.gather(1, chosen.unsqueeze(1)).sum(), None

        # Megatron-Core recomputes activations in train mode only, and Transformer Engine picks attention kernels that have a
        # backward only there; the model has no dropout.
        self.model.train()
        run_schedule(self.model, batches, forward, target, backward=True)
        self.model.train(False)
        if self.model.groups.is_first_stage and len(reduced) != len(batches):
            raise RuntimeError(f"{len(batches)} judge backward passes left {len(reduced)} gradients at the embeddings")
        dist.all_reduce(table)
        table = table.cpu()
        result = {}
        for i in indices:
            rows = table[offsets[i] : offsets[i] + inputs[i].response_end - inputs[i].response_start]
            result[i] = TokenGradients(rows[:, 0], rows[:, 1], rows[:, 2].sqrt(), rows[:, 3].sqrt())
        return result

    def _embedding_leaf(self, batch: TokenBatch, inputs: list[JudgeInput]) -> tuple[torch.Tensor, torch.Tensor]:
        """(leaf, d): the decoder input [s, b, h] (this TP rank's slice under SP) as a leaf, and the directions d."""
        with torch.no_grad():
            embedding = self.model.chunks[0].embedding(batch.input_ids, position_ids=None)
            if self._mean_embedding is None:
                leaf = direction = embedding
            else:
                mean = self._mean_embedding.to(embedding.dtype)
                direction = embedding - mean
                leaf = torch.where(
                    self._response_mask(batch, inputs, embedding.size(0)),
                    mean + self.config.contraction * direction,
                    embedding,
                )
        return leaf.detach().clone().requires_grad_(), direction

    def _response_mask(self, batch: TokenBatch, inputs: list[JudgeInput], local_length: int) -> torch.Tensor:
        """bool [s_local, b, 1]: positions inside each row's response, of this rank's slice of the sequence."""
        first = self._sequence_offset(local_length)
        position = torch.arange(first, first + local_length, device=batch.input_ids.device).view(-1, 1, 1)
        start, end = (
            torch.tensor([getattr(inputs[i], name) for i in batch.items] or [0], device=position.device).view(1, -1, 1)
            for name in ("response_start", "response_end")
        )
        return (position >= start) & (position < end)

    def _sequence_offset(self, local_length: int) -> int:
        """First position of this TP rank's slice (0 without sequence parallelism)."""
        return self.model.groups.pgs.tp.rank() * local_length if self.model.config.sequence_parallel else 0

    def _reduce_into(self, table, offsets, inputs, batch: TokenBatch, grad, direction) -> None:
        """Write this rank's (g.d, |g|_1, |g|^2, |d|^2) of its response tokens into the flat table [total, 4].

        Each token is written by exactly one rank: TP rank 0, or under SP the rank that holds its slice.
        """
        sequence_parallel = self.model.config.sequence_parallel
        if self.model.groups.pgs.tp.rank() > 0 and not sequence_parallel:
            return
        g, d = grad.float(), direction.float()
        stats = torch.stack([(g * d).sum(-1), g.abs().sum(-1), g.square().sum(-1), d.square().sum(-1)], dim=-1)
        first = self._sequence_offset(stats.size(0))
        for row, i in enumerate(batch.items):
            low = max(inputs[i].response_start, first)
            high = min(inputs[i].response_end, first + stats.size(0))
            if low < high:
                at = offsets[i] + low - inputs[i].response_start
                table[at : at + high - low] = stats[low - first : high - first, row]
