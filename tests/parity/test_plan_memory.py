"""The planner's memory formulas against what a real update holds, on the CPU, in plain torch layers.

Weights, gradients and optimizer exactly; what a layer keeps for its backward within 5%; peaks of a forward pass and of
an update within 25% above and 5% below. One rank: shares of tensor parallel ranks are divisions. Leaves out
Transformer Engine's layers, the allocator and every other CUDA thing (tests/gpu).
"""

import weakref
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from g2r_megatron.config.options import Layout, Precision, TrainConfig
from g2r_megatron.plan.activations import Kind, in_flight, kv_cache_bytes, stage_keeps
from g2r_megatron.plan.models import PlannedModel
from g2r_megatron.plan.rank_memory import forward_bytes, training_state, update_bytes
from g2r_megatron.plan.stages import expected_stages
from g2r_megatron.plan.workload import Passes

ROWS, PROMPT, RESPONSE = 4, 64, 64
SIZES = dict(
    hidden_size=256,
    intermediate_size=640,
    moe_intermediate_size=96,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
)
KEPT_WITHIN, PEAK_BELOW, PEAK_ABOVE = 0.05, 0.05, 0.25


@dataclass(frozen=True)
class Case:
    family: str
    dtype: str = "fp32"
    recompute: str = "none"
    vocab: int = 384


UPDATES = [
    Case("qwen3"),
    Case("qwen3", "bf16"),
    Case("qwen3", "bf16", "selective"),
    Case("qwen3", "bf16", "full"),
    Case("qwen3_moe", "bf16"),
    Case("qwen3", "bf16", vocab=16384),  # logits are the largest
    Case("qwen2", "fp32", vocab=16384),
]


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made and that still live; ``peak`` of them. ``existing`` do not count."""

    def __init__(self, existing=()):
        super().__init__()
        self.existing = {tensor.untyped_storage()._cdata for tensor in existing}
        self.live, self.peak, self.seen = 0, 0, set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen or key in self.existing:
            return
        self.seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def config_directory(case: Case, path, layers: int = 4) -> str:
    from tiny_models import CONFIGS, SHAPE

    fields = SHAPE | CONFIGS[case.family] | SIZES | dict(vocab_size=case.vocab, num_hidden_layers=layers)
    for foreign in {"qwen2": ("head_dim", "moe_intermediate_size"), "qwen3": ("moe_intermediate_size",)}.get(
        case.family, ()
    ):
        del fields[foreign]
    directory = path / f"{case.family}_{case.vocab}_{layers}"
    AutoConfig.for_model(**fields).save_pretrained(directory)
    return str(directory)


# On the rank.


def real_and_planned(directory: str, case: Case, trains: bool):
    from g2r_megatron.model.build import build_empty_model
    from g2r_megatron.model.hf import open_hf_model
    from g2r_megatron.parallel.groups import build_groups

    hf = open_hf_model(directory, "policy.model")
    model = build_empty_model("policy", hf, build_groups("policy", Layout()), Precision(case.dtype), case.recompute)
    torch.manual_seed(1)
    for parameter in model.chunks[0].parameters():
        parameter.data.normal_(std=0.02)
    kind = Kind(case.dtype, te=False, trains=trains, recompute=case.recompute)
    stages = expected_stages(hf, Layout(), 1)
    return model, PlannedModel("policy", hf, Layout(), kind, False, 0, 1, stages)


def update_memory(directory: str, case: Case) -> dict[str, tuple[float, float]]:
    """(measured, planned) bytes of what is always there, of old log-probs and of the update."""
    from g2r_megatron.policy.log_probs import TokenSequence
    from g2r_megatron.policy.trainer import PolicyTrainer

    model, planned = real_and_planned(directory, case, trains=True)
    weights = sum(parameter.nbytes for parameter in model.chunks[0].parameters())
    config = TrainConfig()
    config.policy.micro_batch_tokens = ROWS * (PROMPT + RESPONSE)
    static = LiveBytes()
    with static:
        trainer = PolicyTrainer(model, config)
    (module,) = model.modules
    existing = [b.grad_data for b in module.buffers + module.expert_parallel_buffers] + list(module.parameters())
    sequences = [TokenSequence(list(range(PROMPT)), list(range(RESPONSE))) for _ in range(ROWS)]
    rows, passes = list(range(ROWS)), Passes(1, ROWS * (PROMPT + RESPONSE), PROMPT, ROWS * RESPONSE)
    forward, update = LiveBytes(existing), LiveBytes(existing)
    with forward:
        old = trainer.log_probs(sequences, [rows])
    model.config.finalize_model_grads_func = (
        None  # one rank has no others' gradients to add; gloo copies the buffer for it
    )
    with update:
        trainer.gradients(sequences, rows, [torch.randn(RESPONSE) for _ in rows], old, None)
    return {
        # DDP moves bf16 weights into a buffer of its own, fp32 ones too
        "static": (static.live, sum(training_state(planned, 0, True).values()) + planned.weight_bytes(0)),
        "weights": (weights, planned.weight_bytes(0)),
        "forward": (forward.peak, forward_bytes(planned, 0, passes)["activations"]),
        "update": (update.peak, update_bytes(planned, 0, passes)["activations"]),
    }


def kept_by_layers(small: str, large: str, case: Case, trains: bool) -> tuple[float, float]:
    """(measured, planned) bytes a token that one layer keeps: of 4 layers less those of 2."""
    kept, planned = [], []
    for directory in (large, small):
        model, plan = real_and_planned(directory, case, trains)
        kept.append(_saved_bytes(model, trains))
        planned.append(
            stage_keeps(plan.geometry, plan.topk, plan.hf.family.qk_norm, plan.stages[0], Layout(), plan.kind)
        )
    return (kept[0] - kept[1]) / 2, (planned[0] - planned[1]) / 2


def _saved_bytes(model, trains: bool) -> float:
    """Bytes a token of all storages that autograd saves in a forward pass, weights not counted."""
    if not trains:
        model.freeze()
    model.train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.chunks[0].parameters()}
    saved = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(0, 384, (1, 128))
    leaf = None if trains else model.chunks[0].embedding(ids, position_ids=None).detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        output = model.modules[0](ids, None, None, decoder_input=leaf, logit_rows=torch.arange(1))
    assert output.requires_grad
    return sum(storage.nbytes() for storage in saved.values()) / ids.numel()


class Operations(TorchDispatchMode):
    """Counts the operations that do more than give another view of a tensor or room for one."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        infos = [result.alias_info for result in operation._schema.returns]
        view = any(info is not None and not info.is_write for info in infos) or "empty" in operation.__name__
        self.count += not view
        return operation(*args, **(kwargs or {}))


def decoding_operations(small: str, large: str, case: Case) -> dict[str, tuple[float, float]]:
    """(counted, planned) operations of a layer and of what a step has besides its layers."""
    from g2r_megatron.config.options import RolloutConfig
    from g2r_megatron.plan.cost import STEP_OPERATIONS, stage_operations
    from g2r_megatron.rollout.megatron import MegatronRolloutEngine
    from g2r_megatron.rollout.types import Request

    steps, planned = [], []
    for directory in (small, large):
        model, plan = real_and_planned(directory, case, trains=True)
        planned.append(stage_operations(plan, 0))
        counted = []
        for limit in (4, 12):
            engine = MegatronRolloutEngine(model, RolloutConfig(max_response_tokens=limit), {-1})
            with Operations() as operations:
                engine.generate([Request(list(range(5)), str(i)) for i in range(4)])
            counted.append(operations.count)
        steps.append((counted[1] - counted[0]) / 8)
    layer = (steps[1] - steps[0]) / 2
    return {"layer": (layer, (planned[1] - planned[0]) / 2), "step": (steps[0] - 2 * layer, STEP_OPERATIONS)}


# The tests.


@pytest.mark.parametrize("case", UPDATES, ids=lambda c: f"{c.family}-{c.dtype}-{c.recompute}-{c.vocab}")
def test_an_update_holds_what_was_planned(worlds, tmp_path, case):
    """Weights, fp32 gradients and optimizer to 0.1%; peaks of old log-probs and the update within the stated margins."""
    (found,) = worlds[1].run(update_memory, config_directory(case, tmp_path), case)
    assert found["weights"][0] == found["weights"][1]
    measured, planned = found["static"]
    assert measured == pytest.approx(planned, rel=1e-3)
    for phase in ("forward", "update"):
        measured, planned = found[phase]
        assert (1 - PEAK_BELOW) * measured <= planned <= (1 + PEAK_ABOVE) * measured, phase


@pytest.mark.parametrize("trains", [True, False], ids=["trains", "frozen"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe"])
def test_layers_keep_what_was_planned(worlds, tmp_path, family, dtype, trains):
    """What autograd saves a layer and token, with and without weight gradients."""
    case = Case(family, dtype)
    directories = [config_directory(case, tmp_path, layers) for layers in (2, 4)]
    (found,) = worlds[1].run(kept_by_layers, *directories, case, trains)
    assert found[1] == pytest.approx(found[0], rel=KEPT_WITHIN)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_selective_recompute_keeps_what_was_planned(worlds, tmp_path, dtype):
    """Of a feed-forward part its input."""
    case = Case("qwen3", dtype, "selective")
    directories = [config_directory(case, tmp_path, layers) for layers in (2, 4)]
    (found,) = worlds[1].run(kept_by_layers, *directories, case, True)
    assert found[1] == pytest.approx(found[0], rel=KEPT_WITHIN)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe"])
def test_a_decoding_step_has_the_operations_that_were_planned(worlds, tmp_path, family):
    """Operations that are more than views, of a layer and of a step: the host's time is planned by their number."""
    case = Case(family, "bf16")
    directories = [config_directory(case, tmp_path, layers) for layers in (2, 4)]
    (found,) = worlds[1].run(decoding_operations, *directories, case)
    assert found["layer"][1] == pytest.approx(found["layer"][0], rel=0.1)
    assert found["step"][1] == pytest.approx(found["step"][0], rel=0.1)


def test_pipelines_hold_less_on_later_stages():
    """1F1B: stage p has pp - p micro-batches in flight, never more than there are; interleaved ones more on the first."""
    assert [in_flight(Layout(pp=4), stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert [in_flight(Layout(pp=4), stage, 2) for stage in range(4)] == [2, 2, 2, 1]
    # pp 4, vpp 2: 11 chunk passes on the first stage, of half a stage's layers each
    assert [in_flight(Layout(pp=4, vpp=2), stage, 8) for stage in range(4)] == [5.5, 4.5, 3.5, 2.5]


def test_kv_cache_is_megatron_s(tmp_path):
    """2 x layers x sequences x length x groups x head size numbers; more ranks than groups keep one group each."""
    from g2r_megatron.model.hf import open_hf_model

    hf = open_hf_model(config_directory(Case("qwen3"), tmp_path), "policy.model")
    kind = Kind("bf16", te=True, trains=True)
    for tp, groups in ((1, 2), (2, 1), (4, 1)):
        stage = expected_stages(hf, Layout(tp=tp), tp)[0]
        assert kv_cache_bytes(hf.geometry, stage, Layout(tp=tp), kind, 8, 100) == 2 * 2 * 4 * 8 * 100 * groups * 32
