"""The models of a job as the planner sees them: which ranks hold them, on which layout, with how many parameters."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from g2r_megatron.config.layout import data_parallel_size
from g2r_megatron.config.options import Dtype, Layout
from g2r_megatron.model.hf import Geometry, HFModel, open_hf_model
from g2r_megatron.plan import activations
from g2r_megatron.plan.activations import Kind
from g2r_megatron.plan.config import PlanConfig
from g2r_megatron.plan.stages import Stage

CountStages = Callable[[str, HFModel, Layout, Dtype, int], list[Stage]]


@dataclass(frozen=True)
class PlannedModel:
    """One model on ranks ``first`` .. ``first + ranks - 1`` of the job."""

    name: str
    hf: HFModel
    layout: Layout
    kind: Kind
    fp8: bool
    first: int
    ranks: int
    stages: list[Stage] = field(repr=False)

    @property
    def geometry(self) -> Geometry:
        return self.hf.geometry

    @property
    def topk(self) -> int:
        return self.hf.config.num_experts_per_tok if self.geometry.experts else 0

    @property
    def dp(self) -> int:
        return data_parallel_size(self.layout, self.ranks)

    @property
    def expert_dp(self) -> int:
        return self.ranks // (self.layout.etp * self.layout.ep * self.layout.pp)

    def stage_of(self, rank: int) -> int | None:
        """The pipeline stage of a rank of the job, None if the model is not there."""
        if not self.first <= rank < self.first + self.ranks:
            return None
        return (rank - self.first) // (self.ranks // self.layout.pp)

    def weight_bytes(self, stage: int) -> int:
        """Weights, with the FP8 copies (and their transposes) that Transformer Engine makes of the products'."""
        s = self.stages[stage]
        return s.total * self.kind.a + (2 * (s.dense + s.experts) if self.fp8 else 0)

    def keeps(self, stage: int) -> float:
        """Bytes a token that the stage's layers keep for the backward."""
        return activations.stage_keeps(
            self.geometry, self.topk, self.hf.family.qk_norm, self.stages[stage], self.layout, self.kind
        )

    def layer_keeps(self, stage: int) -> float:
        """Bytes a token of what is recomputed at once: the stage's largest layer, or its feed-forward part."""
        if self.kind.recompute == "selective":
            dense = self.geometry.has_dense_layers
            return activations.mlp_keeps(self.geometry, self.layout, self.kind) if dense else 0.0
        moe, g = self.stages[stage].moe_layers > 0, self.geometry
        extra = activations.qk_norm_keeps(g, self.layout, self.kind) if self.hf.family.qk_norm else 0.0
        return activations.kept_by_layer(g, self.topk, self.layout, self.kind, moe) + extra

    def works(self, stage: int, backward: bool, layout: Layout | None = None) -> float:
        """Bytes a token at work in one layer of the stage."""
        moe = self.stages[stage].moe_layers > 0
        return activations.layer_work(self.geometry, self.topk, layout or self.layout, self.kind, moe, backward)

    def logits_here(self, stage: int) -> int:
        """Columns of the logits on a rank of the stage; 0 before the last."""
        if stage < self.layout.pp - 1:
            return 0
        return self.geometry.padded_vocab(self.layout.tp, self.dp) // self.layout.tp


def uses_te(dtype: str, spec: str) -> bool:
    """Whether ``spec`` means Transformer Engine on a GPU machine that has it (model/build.py, ``spec_backend``)."""
    return spec == "te" or (spec == "auto" and dtype == "bf16")


@dataclass(frozen=True)
class Job:
    """All models of a job. ``reference`` is the frozen policy if KL needs a copy besides the judge; ``gold``: eval.judge."""

    config: PlanConfig
    ranks: int
    policy: PlannedModel
    judge: PlannedModel
    reference: PlannedModel | None
    gold: PlannedModel | None

    @property
    def shared(self) -> bool:
        """Policy and judge are on the same ranks."""
        return self.judge.first == 0

    @property
    def judge_is_reference(self) -> bool:
        return self.shared and self.config.judge.model is None and self.config.grpo.kl_coef > 0


def plan_job(config: PlanConfig, policy: HFModel, judge: HFModel, count: CountStages) -> Job:
    """The job of a checked config; ``count`` gives the stages (parameters.py). Raises ``UserError`` as ``count`` does."""
    world = config.nodes * config.gpus_per_node
    own = config.judge.ranks
    policy_world = world - own
    judge_world, judge_first = (own, policy_world) if own else (world, 0)

    def planned(name: str, hf: HFModel, section, first: int, ranks: int, trains: bool, recompute: str) -> PlannedModel:
        dtype = section.precision.dtype
        kind = Kind(dtype, uses_te(dtype, section.spec), trains, recompute)
        stages = count(name, hf, section.layout, dtype, ranks)
        return PlannedModel(name, hf, section.layout, kind, section.precision.fp8 != "none", first, ranks, stages)

    p, c = config.policy, config.judge
    reference = None
    if config.grpo.kl_coef > 0 and (c.model is not None or own):
        reference = planned("policy", policy, p, 0, policy_world, False, "none")
    gold = None
    if config.eval.judge.model is not None:
        gold = planned("eval.judge", _gold(config.eval.judge.model), config.eval.judge, 0, policy_world, False, "none")
    return Job(
        config,
        world,
        planned("policy", policy, p, 0, policy_world, True, p.recompute),
        planned("judge", judge, c, judge_first, judge_world, False, c.recompute),
        reference,
        gold,
    )


@cache
def _gold(path: str) -> HFModel:
    return open_hf_model(path, "eval.judge.model")
