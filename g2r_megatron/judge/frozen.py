"""The frozen judge on its own layout: verdict log-probs or scores forward, embedding gradients backward, gathered to all ranks.

Every rank passes the same global list of inputs; each data-parallel replica does its share. The results (scalars a
sequence, a few scalars a response token) are summed into place over the world. Tensors of the hidden size are never
sent.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from g2r_megatron.config.options import JudgeConfig
from g2r_megatron.device import local_device
from g2r_megatron.errors import UserError
from g2r_megatron.judge.activation_memory import check_memory, check_suffix_memory
from g2r_megatron.judge.gates import Gates
from g2r_megatron.judge.packing import Tree, build_trees
from g2r_megatron.judge.routing import Routing
from g2r_megatron.judge.suffixes import SuffixBatch, SuffixUnit, plan_suffixes, run_suffixes, suffix_batches
from g2r_megatron.judge.targets import ScoreTarget, VerdictTarget, require_finite
from g2r_megatron.judge.types import JudgeInput, Pass
from g2r_megatron.model.build import MegatronModel
from g2r_megatron.model.schedule import TokenBatch, forward_tokens, replica_plan, run_schedule
from g2r_megatron.model.tree_attention import row_structure
from g2r_megatron.parallel.microbatches import padded


@dataclass
class TokenGradients:
    """The result of one backward for T response tokens, reduced over the hidden dimension; fp32 on the CPU.

    ``d`` is the direction the gradient is contracted with: e_t, e_t - mean for ``contracted``, e_t - e_pad for ``null_token``.
    """

    dot: torch.Tensor  # [T] g_t . d_t
    l1: torch.Tensor  # [T] |g_t|_1
    l2: torch.Tensor  # [T] |g_t|_2
    d_norm: torch.Tensor  # [T] |d_t|_2
    product: torch.Tensor  # [T] L2 norm of the elementwise product of g_t and d_t

    def attribution(self, kind: str) -> torch.Tensor:
        """b_t of docs/method.md step 3: a norm of g or of g * d, or g.d."""
        return {"l1": self.l1, "l2": self.l2, "grad_norm_product": self.product}.get(kind, self.dot)

    @property
    def cos(self) -> float:
        """Median over tokens of |cos(g_t, d_t)|; nan without tokens or where the gradient vanishes."""
        return (self.dot.abs() / (self.l2 * self.d_norm)).median().item() if self.dot.numel() else float("nan")


@dataclass(kw_only=True)
class TreeBatch(TokenBatch):
    """One packed row of trees; ``items`` and ``logit_rows`` run over the sequences of all trees.

    ``starts``: the row position of each tree's first token. A filler has no trees. Under context parallelism
    ``input_ids`` and ``position_ids`` are this rank's positions of the row, and ``items`` and ``logit_rows`` the
    sequences whose verdict is at one of them; ``trees``, ``starts`` and ``structure`` are the whole row's.
    """

    trees: list[Tree]
    starts: list[int]


def tree_batch(model: MegatronModel, trees: Sequence[Tree]) -> TreeBatch:
    """``trees`` in one row on the model's device, padded to its length multiple at the end."""
    ids, verdicts, starts = [], [], []
    for tree in trees:
        starts.append(len(ids))
        verdicts += [(len(ids) + at, item) for at, item in zip(tree.verdicts, tree.items, strict=True)]
        ids += tree.ids
    length, device = padded(max(1, len(ids)), model.length_multiple), local_device()
    structure = row_structure([tree.shape for tree in trees], length)
    rank, ranks = model.groups.pgs.cp.rank(), model.groups.pgs.cp.size()
    mine = [(at, item) for at, item in verdicts if at % ranks == rank]
    return TreeBatch(
        input_ids=torch.tensor([(ids + [0] * (length - len(ids)))[rank::ranks]], device=device),
        logit_rows=torch.tensor([at // ranks for at, _ in mine], dtype=torch.int64, device=device),
        items=[item for _, item in mine],
        position_ids=structure[2, rank::ranks].long().to(device),
        structure=structure,
        trees=list(trees),
        starts=starts,
    )


class FrozenJudge:
    """A model that only judges. ``true_ids``/``false_ids``: the token spellings of the two verdicts; unused by a reward model.

    ``null_id``: the pad token, needed by ``judge.attribution=null_token``.
    """

    def __init__(
        self,
        model: MegatronModel,
        config: JudgeConfig,
        true_ids: Sequence[int],
        false_ids: Sequence[int],
        null_id: int | None = None,
    ):
        self.model, self.config = model, config
        is_reward_model = model.geometry.is_reward_model
        self.target = ScoreTarget() if is_reward_model else VerdictTarget(model, config.target, true_ids, false_ids)
        model.freeze()  # frozen linears take Megatron-Core's dgrad-only path
        self.routing = Routing(model)
        self._baseline = self._baseline_embedding(null_id)
        self.gates = Gates(model, config, self.target, self.routing) if config.attribution == "gate" else None

    def _baseline_embedding(self, null_id: int | None) -> torch.Tensor | None:
        """[h]: what embeddings are compared with, on the first stage; None: with nothing.

        ``contracted``: the mean over the real vocabulary rows (padded rows are zero and not counted); ``null_token``: the
        row of ``null_id``. Raises ``UserError`` if the model has no such row.
        """
        kind, vocab = self.config.attribution, self.model.geometry.vocab
        if kind == "null_token" and (null_id is None or null_id >= vocab):
            raise UserError(
                "judge.attribution",
                f"null_token, but the pad token is number {null_id} and the judge has {vocab} embeddings",
                "give the tokenizer a pad token that the judge knows, or use another attribution",
            )
        if kind not in ("contracted", "null_token") or not self.model.groups.is_first_stage:
            return None
        tp = self.model.groups.pgs.tp
        rows = self.model.chunks[0].embedding.word_embeddings.weight.detach().float()
        if kind == "null_token":  # of this rank's part of the vocabulary, none on the others
            first = max(0, null_id - tp.rank() * len(rows))
            rows = rows[first : max(0, null_id + 1 - tp.rank() * len(rows))]
        total = rows.sum(0)
        if tp.size() > 1:
            dist.all_reduce(total, group=tp)
        return total / vocab if kind == "contracted" else total

    def _micro_batches(self, trees: Sequence[Tree], backward: bool) -> list[TreeBatch]:
        """This replica's share of ``trees`` as packed rows; logits at the verdict positions only.

        Raises ``UserError`` with the numbers when the memory is not enough to run them.
        """
        lengths = [len(tree.ids) for tree in trees]
        plan = replica_plan(self.model, lengths, list(range(len(trees))), self.config.micro_batch_tokens)
        rows = [[trees[i] for i in row] for row in plan]
        check_memory(self.model, rows, self.config, backward)
        return [tree_batch(self.model, row) for row in rows]

    def verdict_log_probs(self, responses: Sequence[Sequence[JudgeInput]]) -> torch.Tensor:
        """(log p(True), log p(False)) of every input: fp32 [inputs, 2], see ``read``."""
        return self.read(responses)

    @torch.no_grad()
    def read(self, responses: Sequence[Sequence[JudgeInput]]) -> torch.Tensor:
        """What ``target`` reads of every input: fp32 [inputs, columns] on the CPU of every rank (collective).

        ``responses``: the inputs of each response, which share their beginning (judge/packing.py). Rows of the result
        are in the order of the inputs. Raises ``UserError`` when a row is not finite: then the judge's weights or its
        precision are wrong.
        """
        self.model.train(False)
        trees, everything = [], []
        for inputs in responses:
            trees += build_trees(inputs, self.config.max_length, len(everything))
            everything += inputs

        def collect(batch: TreeBatch, logits: torch.Tensor):
            return None, (batch.items, self.target.read(logits))

        with self.target.exact(), self.routing.recording(trees, everything) as forward:
            batches = self._micro_batches(trees, backward=False)
            results = run_schedule(self.model, batches, forward, collect, backward=False)
        table = torch.zeros(len(everything), self.target.columns, device=local_device())
        return self._gathered(table, results)

    @torch.no_grad()
    def read_suffixes(self, units: Sequence[SuffixUnit], inputs: Sequence[JudgeInput]) -> torch.Tensor:
        """What ``target`` reads at the end of every suffix of ``units``: fp32 [suffixes, columns], by their numbers (collective).

        Every rank passes the same units of ``inputs``; each prefix is run once. Raises ``UserError`` as ``read`` does.
        """
        self.model.train(False)
        plans = plan_suffixes(self.model, units, inputs, self.config.micro_batch_tokens)
        check_suffix_memory(self.model, plans, inputs, self.config, backward=False)
        batches = suffix_batches(self.model, plans, inputs, again=False)

        def run(module: torch.nn.Module, batch: SuffixBatch) -> torch.Tensor:
            return run_suffixes(self.model, module, batch, forward_tokens)

        def collect(batch: SuffixBatch, logits: torch.Tensor):
            return None, (batch.items, self.target.read(logits))

        results = run_schedule(self.model, batches, run, collect, backward=False)
        table = torch.zeros(sum(len(unit.suffixes) for unit in units), self.target.columns, device=local_device())
        return self._gathered(table, results)

    def _gathered(self, table: torch.Tensor, results: list) -> torch.Tensor:
        """``table`` with the rows of ``results``, (numbers, values) of this replica, on the CPU of every rank (collective)."""
        if self.model.groups.is_replica_writer:
            for numbers, values in results:
                table[numbers] = values
        dist.all_reduce(table)
        table = table.cpu()
        require_finite(table, self.target.noun)
        return table

    def token_gradients(self, passes: Sequence[Pass]) -> list[TokenGradients]:
        """Gradients of every pass at its response's embeddings, one leaf a pass (collective; all ranks get all).

        The target of an input: judge/targets.py.
        """
        trees, inputs, owners, verdicts, weights = [], [], [], [], []  # owners: the pass of each input
        for number, item in enumerate(passes):
            found = build_trees(item.inputs, self.config.max_length, len(owners))
            if len(found) != 1:
                raise ValueError(f"the {len(item.inputs)} inputs of pass {number} are not one sequence")
            trees += found
            inputs += item.inputs
            owners += [number] * len(item.inputs)
            verdicts += item.verdicts
            weights += item.weights
        lengths = [item.inputs[0].response_end - item.inputs[0].response_start for item in passes]
        table = torch.zeros(sum(lengths), 5, device=local_device())
        spans = table.split(lengths)  # of each pass
        batches = self._micro_batches(trees, backward=True)
        reduced: list[TreeBatch] = []

        def from_leaf(module: torch.nn.Module, batch: TreeBatch):
            leaf = None
            if self.model.groups.is_first_stage and module is self.model.modules[0]:
                leaf, direction = self._embedding_leaf(batch)

                def reduce(leaf: torch.Tensor) -> None:
                    """Reduce the gradient to scalars at once, so that only one micro-batch's gradient is held."""
                    self._reduce_into(
                        [spans[owners[tree.items[0]]] for tree in batch.trees], batch, leaf.grad, direction
                    )
                    leaf.grad = None
                    reduced.append(batch)

                leaf.register_post_accumulate_grad_hook(reduce)
            return forward(module, batch, leaf)

        def target(batch: TreeBatch, logits: torch.Tensor):
            targets = self.target.of(self.target.read(logits), [verdicts[i] for i in batch.items])
            return (targets * torch.tensor([weights[i] for i in batch.items], device=targets.device)).sum(), None

        # Megatron-Core recomputes activations in train mode only. Transformer Engine chooses attention kernels with a
        # backward in train mode only. The model has no dropout.
        self.model.train()
        with self.target.exact(), self.routing.replaying(inputs) as forward:
            run_schedule(self.model, batches, from_leaf, target, backward=True)
        self.model.train(False)
        if self.model.groups.is_first_stage and len(reduced) != len(batches):
            raise RuntimeError(f"{len(batches)} judge backward passes left {len(reduced)} gradients at the embeddings")
        dist.all_reduce(table)
        return [
            TokenGradients(rows[:, 0], rows[:, 1], rows[:, 2].sqrt(), rows[:, 3].sqrt(), rows[:, 4].sqrt())
            for rows in table.cpu().split(lengths)
        ]

    def _embedding_leaf(self, batch: TreeBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """(leaf, d): the decoder input [s, 1, h] of this rank's positions as a leaf, and the directions d."""
        with torch.no_grad():
            embedding = self.model.chunks[0].embedding(batch.input_ids, position_ids=None)
            leaf = direction = embedding
            if self._baseline is not None:
                baseline = self._baseline.to(embedding.dtype)
                direction = embedding - baseline
            if self.config.attribution == "contracted":
                leaf = embedding.clone()
                for _, _, here in self._local_spans(batch):
                    leaf[here] = baseline + self.config.contraction * direction[here]
        return leaf.detach().clone().requires_grad_(), direction

    def _local_spans(self, batch: TreeBatch) -> list[tuple[int, slice, slice]]:
        """Which response tokens are at this rank's positions of the row: (tree, tokens of the response, local positions)."""
        here = self.model.row_positions(batch.structure.size(1))
        spans = []
        for number, (tree, start) in enumerate(zip(batch.trees, batch.starts, strict=True)):
            begin = start + tree.response_start
            low, high = bisect_left(here, begin), bisect_left(here, start + tree.response_end)
            if low < high:
                tokens = slice(here[low] - begin, here[high - 1] - begin + 1, here.step)
                spans.append((number, tokens, slice(low, high)))
        return spans

    def _reduce_into(self, spans: list[torch.Tensor], batch: TreeBatch, grad, direction) -> None:
        """Write this rank's (g.d, |g|_1, |g|^2, |d|^2, |g * d|^2) of its response tokens into each tree's span [T, 5].

        Exactly one rank writes each token. It belongs to the context parallel rank that has the token's position. Of
        that rank's TP ranks it is the first one, or under SP the one that has the token's slice.
        """
        if self.model.groups.pgs.tp.rank() > 0 and not self.model.config.sequence_parallel:
            return
        for number, tokens, here in self._local_spans(batch):
            g, d = grad[here, 0].float(), direction[here, 0].float()
            product = g * d
            stats = [product.sum(-1), g.abs().sum(-1), g.square().sum(-1), d.square().sum(-1), product.square().sum(-1)]
            spans[number][tokens] = torch.stack(stats, dim=-1)
