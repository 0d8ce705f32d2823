"""The trained policy: Megatron-Core DDP, its (distributed) optimizer and scheduler, one update a mini-batch."""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from g2r_megatron.config.options import OptimizerConfig, TrainConfig
from g2r_megatron.device import local_device
from g2r_megatron.errors import RunError, UserError
from g2r_megatron.model.build import MegatronModel
from g2r_megatron.model.schedule import TokenBatch, forward_tokens, run_schedule
from g2r_megatron.policy.log_probs import (
    TokenSequence,
    UpdateLogProbs,
    on_every_rank,
    plan_micro_batches,
    response_batch,
    response_log_probs,
    token_log_probs,
)
from g2r_megatron.policy.losses import LossOutput, aggregation_weights, loss_metrics, policy_loss
from g2r_megatron.policy.optimizer_shards import load_owned

# How far the first ratios of a run may be from 1: old log-probs and update run the same kernels on the same weights.
FIRST_RATIO = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
SUMS = ("tokens", "policy", "ratio", "clipped", "kl", "k1", "k2", "k3")


def wrap_for_training(model: MegatronModel, options: OptimizerConfig) -> None:
    """Put ``model.modules`` under Megatron-Core's DDP: gradients are *summed* over replicas, in fp32.

    ``finalize_model_grads`` runs without a token count: our losses are already normalised over the mini-batch.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=options.distributed
    )
    model.modules = [
        # as in Megatron-LM: only the first virtual stage's gradients are reduced at the end of the backward pass
        DistributedDataParallel(
            model.config, ddp_config, module, disable_bucketing=i > 0, pg_collection=model.groups.pgs
        )
        for i, module in enumerate(model.modules)
    ]
    model.config.finalize_model_grads_func = _finalize_gradients


def _finalize_gradients(modules, num_tokens, pg_collection, force_all_reduce=False):
    finalize_model_grads(modules, None, pg_collection=pg_collection, force_all_reduce=force_all_reduce)


def check_first_ratio(metrics: dict[str, float], dtype: torch.dtype) -> None:
    """Raise ``RunError`` unless the first mini-batch's ratios are 1, to the dtype's tolerance; ``metrics`` of an update.

    The ratios compare the policy with itself. Any other value means that old log-probs and update do not compute the
    same function (stale FP8 weights, other kernels). A ratio that is not finite is handled as a bad step.
    """
    mean, largest = metrics["ratio/first"], metrics["ratio/first_max"]
    off = max(abs(mean - 1.0), largest - 1.0)
    if off > FIRST_RATIO[dtype]:
        raise RunError(
            f"the first ratios of this run are off 1 by {off:.3g} (mean {mean:.6g}, largest {largest:.6g}; at most "
            f"{FIRST_RATIO[dtype]:g} in {str(dtype).removeprefix('torch.')}): old log-probs and update do not agree; "
            "run tools/gpu_check.sh, or try policy.spec torch"
        )


def build_optimizer(model: MegatronModel, options: OptimizerConfig):
    """Megatron-Core's Adam over the wrapped model; fp32 main weights when the model is bf16."""
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.beta1,
        adam_beta2=options.beta2,
        adam_eps=options.eps,
        bf16=model.config.bf16,
        params_dtype=model.config.params_dtype,
        use_distributed_optimizer=options.distributed,
        clip_grad=options.clip_grad or math.inf,  # inf: the norm is measured and nothing is clipped
    )
    optimizer = get_megatron_optimizer(
        config, model.modules, use_gloo_process_groups=False, pg_collection=model.groups.pgs
    )
    for inner in _torch_optimizers(optimizer):
        _allocate_adam_state(inner)
    _check_shards(optimizer, options)
    return optimizer


def _torch_optimizers(optimizer) -> list[torch.optim.Optimizer]:
    """The plain torch optimizers inside (none if Apex's or Transformer Engine's Adam is used)."""
    inner = [o.optimizer for o in optimizer.chained_optimizers]
    return [o for o in inner if isinstance(o, torch.optim.Adam | torch.optim.AdamW)]


def _allocate_adam_state(optimizer: torch.optim.Optimizer) -> None:
    """Zero moments from the start: Megatron-Core's checkpoint code reads ``step`` before the first update."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }


def load_optimizer_state(optimizer, state: dict, weights: dict) -> None:
    """``optimizer.load_state_dict(state)``, with the options of this run's config instead of the saved ones.

    (The scheduler sets the learning rate and weight decay of the next update.) ``state``: a loaded
    ``sharded_optimizer_state``; ``weights``: the model's ``sharded_weights``.
    """
    configured = [
        {name: group[name] for name in ("max_lr", "min_lr", "betas", "eps")} for group in optimizer.param_groups
    ]
    chained = optimizer.chained_optimizers  # experts have one of their own
    states = [state] if len(chained) == 1 else [state[i] for i in sorted(state)]
    for part, its_state in zip(chained, states, strict=True):
        _load_part(part, its_state, weights)
    for group, options in zip(optimizer.param_groups, configured, strict=True):
        group.update(options)


def _load_part(part, state: dict, weights: dict) -> None:
    """``part.load_state_dict(state)`` that also works for torch's Adam.

    Megatron-Core 0.16 loads one shared ``step`` tensor into all parameters, which Adam would then increment once a parameter.
    """
    shards = state.pop("param_state", None)
    part.load_state_dict(state)
    if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW):
        for adam in part.optimizer.state.values():
            adam["step"] = adam["step"].clone()
    if shards is not None:
        load_owned(part, weights, shards)


def _check_shards(optimizer, options: OptimizerConfig) -> None:
    """Raise an error unless every replica owns a share of a sharded optimizer state: Megatron-Core's checkpoints need
    it."""
    owned = min(sum(len(g["params"]) for g in o.optimizer.param_groups) for o in optimizer.chained_optimizers)
    smallest = torch.tensor([owned], device=local_device())
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    if smallest.item() == 0:
        raise UserError(
            "optimizer.distributed", "true, but some replica gets no parameter of so small a model", "set it false"
        )


def build_scheduler(optimizer, options: OptimizerConfig, steps: int) -> OptimizerParamScheduler:
    """Megatron-Core's scheduler, counted in training steps."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=options.warmup_steps,
        lr_decay_steps=max(steps, options.warmup_steps + 1),
        lr_decay_style=options.decay,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # the schedule follows the config also after a resume
    )


class Forward(NamedTuple):
    """Of a micro-batch with its gradient: the indices of its sequences, their log-probs (flat, detached) and the loss."""

    items: list[int]
    log_probs: torch.Tensor
    output: LossOutput


class Update(NamedTuple):
    """Metrics (the same on every rank), and the log-probs before the update: fp32 [T_i] a sequence, on the CPU."""

    metrics: dict[str, float]
    old: list[torch.Tensor]


class PolicyTrainer:
    """Owns the policy's gradients, optimizer and schedule."""

    def __init__(self, model: MegatronModel, config: TrainConfig):
        self.model, self.config = model, config
        wrap_for_training(model, config.optimizer)
        self.optimizer = build_optimizer(model, config.optimizer)
        self.scheduler = build_scheduler(self.optimizer, config.optimizer, config.steps)
        self.bad_in_a_row = 0  # optimizer steps that were skipped since the last one that was not
        model.train()

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        """The one whose kernels step this rank's weights: Transformer Engine's, Apex's or torch's."""
        return self.optimizer.chained_optimizers[0].optimizer

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    @property
    def budget(self) -> int:
        """Tokens of a row."""
        return self.config.policy.micro_batch_tokens

    def plan(self, sequences: list[TokenSequence], mini_batch: list[int]) -> list[list[int]]:
        """Micro-batches of this rank for one optimizer step over ``mini_batch``."""
        return plan_micro_batches(self.model, sequences, mini_batch, self.budget)

    def update_log_probs(
        self, sequences: list[TokenSequence], reference: MegatronModel | None, old_pass: bool = True
    ) -> UpdateLogProbs:
        """What ``update`` needs of the policy as it is, and of the frozen ``reference`` policy (collective).

        Without ``old_pass`` the update takes its own log-probs as the old ones, which needs a single mini-batch.
        """
        chunks = torch.arange(len(sequences)).chunk(self.config.grpo.mini_batches)
        mini_batches = [chunk.tolist() for chunk in chunks]
        old = self.log_probs(sequences, mini_batches) if old_pass else None
        of_reference = None
        if reference is not None:
            plans = [plan_micro_batches(reference, sequences, indices, self.budget) for indices in mini_batches]
            plan = [items for rows in plans for items in rows]
            of_reference = response_log_probs(reference, sequences, plan, self.config.rollout.temperature, self.budget)
        return UpdateLogProbs(mini_batches, old, of_reference)

    def log_probs(self, sequences: list[TokenSequence], mini_batches: list[list[int]]) -> list[torch.Tensor]:
        """Log-probs before the update, computed in the update's own micro-batches: the first ratio is exactly 1."""
        plan = [items for mini_batch in mini_batches for items in self.plan(sequences, mini_batch)]
        return response_log_probs(self.model, sequences, plan, self.config.rollout.temperature, self.budget)

    def gradients(
        self,
        sequences: list[TokenSequence],
        mini_batch: list[int],
        advantages: list[torch.Tensor],
        old: list[torch.Tensor] | None,
        reference: list[torch.Tensor] | None,
        kept: list[torch.Tensor] | None = None,
    ) -> dict[str, float]:
        """Fill the gradient buffers with the mini-batch's gradient; its loss metrics (same on every rank).

        ``advantages``, ``old``, ``reference``: one [T_i] tensor per entry of ``sequences`` (with the stop token). ``old``
        None: the log-probs of this very pass, detached. ``kept``: bool, the tokens that count (None: all). Means leave out
        the other tokens, and a response with no token that counts.
        """
        return self._reduce_metrics(self._backward(sequences, mini_batch, advantages, old, reference, kept))

    def _backward(self, sequences, mini_batch, advantages, old, reference, kept) -> list[Forward]:
        """``gradients`` without its metrics: what the micro-batches gave, on the last stage."""
        if kept is None:
            kept = [torch.ones(len(sequence.response_ids), dtype=torch.bool) for sequence in sequences]
        weighed = [i for i in mini_batch if kept[i].any() or not len(kept[i])]
        weights = aggregation_weights(
            [int(kept[i].sum()) for i in weighed],
            self.config.grpo.loss_aggregation,
            self.config.rollout.max_response_tokens,
        )
        weight_of = dict.fromkeys(mini_batch, 0.0) | dict(zip(weighed, weights, strict=True))
        plan = self.plan(sequences, mini_batch)
        for module in self.model.modules:
            module.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.model.train()

        def flat(tensors, batch: TokenBatch):
            return torch.cat([tensors[i] for i in batch.items]).to(local_device())

        def loss(batch: TokenBatch, logits: torch.Tensor):
            log_probs = token_log_probs(self.model, batch, logits, sequences, self.config.rollout.temperature)
            token_weights = [weight_of[i] * kept[i] for i in batch.items]
            output = policy_loss(
                log_probs,
                log_probs.detach() if old is None else flat(old, batch),
                flat(advantages, batch),
                torch.cat(token_weights).to(log_probs.device),
                self.config.grpo,
                None if reference is None else flat(reference, batch),
            )
            return output.loss, Forward(batch.items, log_probs.detach(), output)

        batches = [response_batch(self.model, sequences, items, self.budget) for items in plan]
        return run_schedule(self.model, batches, forward_tokens, loss, backward=True)

    def _reduce_metrics(self, forwards: list[Forward]) -> dict[str, float]:
        """Sum (and maximise) the micro-batches' totals over the world; every rank gets the metrics."""
        sums, maxima = torch.zeros(len(SUMS), device=local_device()), torch.zeros(1, device=local_device())
        present = torch.zeros(1, device=local_device())
        if self.model.groups.is_replica_writer:
            for _, _, output in forwards:
                sums += torch.stack([output.sums.get(name, sums.new_zeros(())) for name in SUMS])
                maxima = torch.maximum(maxima, output.maxima["ratio"])
                present += "kl" in output.sums
        dist.all_reduce(sums)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
        dist.all_reduce(present)
        totals = dict(zip(SUMS, sums.tolist(), strict=True))
        if not present.item():
            totals = {name: totals[name] for name in ("tokens", "policy", "ratio", "clipped")}
        return loss_metrics(totals, {"ratio": maxima.item()})

    def step(self, loss: float) -> tuple[float, bool]:
        """Apply the gradients, if they and the loss are finite on every rank.

        Returns their global norm before clipping, and whether they were applied: if not, weights and optimizer state
        are unchanged. (Megatron-Core checks for infinities only in fp16.)
        """
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        bad = torch.tensor(int(not (math.isfinite(loss) and math.isfinite(grad_norm))), device=local_device())
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        if bad.item():
            self.bad_in_a_row += 1
            return grad_norm, False
        self.bad_in_a_row = 0
        self.optimizer.step()
        return grad_norm, True

    def update(self, sequences, mini_batches, advantages, old, reference, kept=None) -> Update:
        """One training step: an optimizer step a mini-batch, then the schedule. Metrics are means over mini-batches.

        ``old`` None: the update's own log-probs, for a single mini-batch. The schedule is a function of the training step:
        it advances also if optimizer steps were skipped.
        """
        if old is None and len(mini_batches) > 1:
            raise ValueError("the second of several mini-batches needs the log-probs before the first")
        collected, skipped = [], 0
        for mini_batch in mini_batches:
            forwards = self._backward(sequences, mini_batch, advantages, old, reference, kept)
            if old is None:
                of_batches = [(items, log_probs) for items, log_probs, _ in forwards]
                old = on_every_rank(self.model, of_batches, sequences)
            metrics = self._reduce_metrics(forwards)
            metrics["optimizer/grad_norm"], applied = self.step(metrics["loss/policy"] + metrics.get("loss/kl", 0.0))
            skipped += not applied
            collected.append(metrics)
        means = {name: sum(m[name] for m in collected) / len(collected) for name in collected[0]}
        means["ratio/max"] = max(m["ratio/max"] for m in collected)
        means["ratio/first"], means["ratio/first_max"] = collected[0]["ratio/mean"], collected[0]["ratio/max"]
        means["optimizer/lr"] = self.learning_rate
        means["optimizer/skipped_steps"] = float(skipped)
        self.scheduler.step(increment=1)
        return Update(means, old)
