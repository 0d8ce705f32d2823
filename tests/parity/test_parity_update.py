"""The policy's gradient and one full update equal Hugging Face autograd's, on every layout and micro-batch budget.

The reference is plain transformers in this process: the GRPO loss written out per sequence, autograd, gradient
clipping and torch's AdamW. fp32, 1e-5: of the whole gradient, and of each tensor's gradient (or of a thousandth of the
whole where a tensor's is smaller: the true gradient of a key bias is zero). Mixtures of experts on expert parallel
layouts and virtual pipeline stages too. Leaves out advantages, learning-rate schedules and checkpoints.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from distributed import EXPERT_LAYOUTS, LAYOUTS, STAGE_LAYOUTS, fits, groups_of
from g2r_megatron.config.options import (
    GrpoConfig,
    Layout,
    OptimizerConfig,
    PolicyConfig,
    Precision,
    RolloutConfig,
    TrainConfig,
)
from tiny_models import DENSE_FAMILIES, build_tiny_hf

MINI_BATCHES = [[0, 3, 4, 6], [1, 2, 5, 7]]
TEMPERATURE = 0.7
MOE = ("qwen3_moe", "mixtral")
MAX_RESPONSE = 20
# Adam divides by |g| + eps: with its usual 1e-8, rounding in a gradient that is truly zero becomes a full-size step.
OPTIMIZER = dict(lr=1e-3, weight_decay=0.1, eps=1e-4, clip_grad=0.5)


@dataclass(frozen=True)
class Variant:
    """One way to compute the loss and to cut the work; together they cover the options."""

    micro_batch_tokens: int  # 1: a sequence each; 60: a few; 8192: all in one
    recompute: str
    loss_aggregation: str
    kl_estimator: str
    kl_coef: float

    def config(self, distributed: bool, **optimizer) -> TrainConfig:
        loss = dict(loss_aggregation=self.loss_aggregation, kl_estimator=self.kl_estimator, kl_coef=self.kl_coef)
        return TrainConfig(
            policy=PolicyConfig(micro_batch_tokens=self.micro_batch_tokens),
            grpo=GrpoConfig(clip_low=0.2, clip_high=0.3, **loss),
            rollout=RolloutConfig(temperature=TEMPERATURE, max_response_tokens=MAX_RESPONSE),
            optimizer=OptimizerConfig(distributed=distributed, **OPTIMIZER | optimizer),
        )


VARIANTS = {
    "few": Variant(60, "none", "seq_mean", "k3", 0.1),
    "one_each_full_recompute": Variant(1, "full", "token_mean", "k2", 0.2),
    "all_selective_recompute": Variant(8192, "selective", "dr_grpo", "k1", 0.1),
}


def batch() -> list[tuple[list[int], list[int], torch.Tensor]]:
    """(prompt ids, response ids, advantages [T]) of eight responses of 1 to 17 tokens."""
    g = torch.Generator().manual_seed(5)

    def ids(low: int, high: int) -> list[int]:
        return torch.randint(0, 383, (int(torch.randint(low, high, (1,), generator=g)),), generator=g).tolist()

    rows = [(ids(3, 12), ids(1, 18)) for _ in range(8)]
    return [(prompt, response, torch.randn(len(response), generator=g)) for prompt, response in rows]


def noise(seed: int) -> list[torch.Tensor]:
    """What old and reference log-probs differ by from the current ones: ratios on both sides of the clip."""
    g = torch.Generator().manual_seed(seed)
    return [0.3 * torch.randn(len(response), generator=g) for _, response, _ in batch()]


# In the ranks. ``old`` and ``reference`` come as lists of numbers: the transformers' log-probs plus noise.


def trainer_of(layout: Layout, path: str, variant: str, distributed: bool, dtype: str = "fp32", **optimizer):
    from g2r_megatron.model.build import build_model
    from g2r_megatron.model.hf import open_hf_model
    from g2r_megatron.policy.trainer import PolicyTrainer

    groups, recompute = groups_of(layout), VARIANTS[variant].recompute
    model = build_model("policy", open_hf_model(path, "policy.model"), groups, Precision(dtype=dtype), recompute)
    return PolicyTrainer(model, VARIANTS[variant].config(distributed, **optimizer))


def token_sequences():
    from g2r_megatron.policy.log_probs import TokenSequence

    return [TokenSequence(prompt, response) for prompt, response, _ in batch()]


def advantages() -> list[torch.Tensor]:
    return [advantage for _, _, advantage in batch()]


def tensors(rows: list[list[float]]) -> list[torch.Tensor]:
    return [torch.tensor(row) for row in rows]


def hf_arrays(model) -> dict:
    """The model's weights under Hugging Face's names, fp32 numpy, on rank 0; {} elsewhere."""
    from g2r_megatron.model.write_hf import iterate_hf_tensors

    tensors = iterate_hf_tensors(model)
    return {name: tensor.detach().float().numpy().copy() for name, tensor in tensors}


def gradient_arrays(model) -> dict:
    """The gradient buffers as if they were weights: same shards, same names."""
    for _, parameter in model.named_parameters():
        parameter.data = parameter.main_grad
    return hf_arrays(model)


def gradients(layout: Layout, path: str, variant: str, mini_batch: list[int], old, reference) -> tuple[dict, dict]:
    trainer = trainer_of(layout, path, variant, distributed=False)  # its reduce-scatter would leave only shards
    metrics = trainer.gradients(token_sequences(), mini_batch, advantages(), tensors(old), tensors(reference))
    return metrics, gradient_arrays(trainer.model)


def log_probs(layout: Layout, path: str, variant: str) -> list[list[float]]:
    trainer = trainer_of(layout, path, variant, distributed=False)
    return [row.tolist() for row in trainer.log_probs(token_sequences(), MINI_BATCHES)]


def update(layout: Layout, path: str, variant: str, distributed: bool, old, reference) -> tuple[dict, dict]:
    trainer = trainer_of(layout, path, variant, distributed)
    metrics, _ = trainer.update(token_sequences(), MINI_BATCHES, advantages(), tensors(old), tensors(reference))
    return metrics, hf_arrays(trainer.model)


def train_and_export(layout: Layout, path: str, output: str, old, reference) -> list[list[float]]:
    """An update, the trained policy written to ``output``; its log-probs."""
    from g2r_megatron.policy.export import export_policy

    trainer = trainer_of(layout, path, "few", True)
    trainer.update(token_sequences(), MINI_BATCHES, advantages(), tensors(old), tensors(reference))
    export_policy(trainer.model, Path(output))
    return [row.tolist() for row in trainer.log_probs(token_sequences(), MINI_BATCHES)]


def first_update(layout: Layout, path: str, variant: str, dtype: str) -> tuple[dict, dict]:
    """Metrics of the first mini-batch and of a whole update. Old log-probs are its own, the reference another copy."""
    from g2r_megatron.policy.log_probs import response_log_probs

    trainer = trainer_of(layout, path, variant, True, dtype)
    frozen = trainer_of(layout, path, variant, True, dtype).model
    sequences = token_sequences()
    old = trainer.log_probs(sequences, MINI_BATCHES)
    plan = [items for mini_batch in MINI_BATCHES for items in trainer.plan(sequences, mini_batch)]
    reference = response_log_probs(frozen, sequences, plan, TEMPERATURE, trainer.budget)
    first = trainer.gradients(sequences, MINI_BATCHES[0], advantages(), old, reference)
    return first, trainer.update(sequences, MINI_BATCHES, advantages(), old, reference).metrics


def with_and_without_old_pass(layout: Layout, path: str, dtype: str) -> list[tuple[dict, list, dict]]:
    """(metrics, old log-probs, weights) of two updates of a single mini-batch, with a pass for old log-probs and without."""
    found = []
    for old_pass in (True, False):
        trainer, sequences = trainer_of(layout, path, "few", True, dtype), token_sequences()
        known = trainer.update_log_probs(sequences, trainer.model, old_pass)
        for _ in range(2):  # the second from weights that the first has moved
            metrics, old = trainer.update(sequences, known.mini_batches, advantages(), known.old, known.reference)
            known = trainer.update_log_probs(sequences, trainer.model, old_pass)
        found.append((metrics, [row.tolist() for row in old], hf_arrays(trainer.model)))
    return found


def bf16_run(layout: Layout, path: str, old, reference) -> dict:
    """Gradient in bf16 compute; then many steps of a size that bf16 weights alone would round away."""
    trainer = trainer_of(layout, path, "few", False, "bf16")
    sequences = token_sequences()
    found = trainer.log_probs(sequences, MINI_BATCHES)
    trainer.gradients(sequences, list(range(8)), advantages(), tensors(old), tensors(reference))
    gradient = gradient_arrays(trainer.model)
    trainer = trainer_of(layout, path, "few", True, "bf16", lr=1e-6, weight_decay=0.0, eps=1e-12)
    start = hf_arrays(trainer.model)
    changed, steps = [], []
    for _ in range(15):
        steps.append(trainer.update(sequences, [[0, 1]], advantages(), found, found).metrics["optimizer/grad_norm"])
        now = hf_arrays(trainer.model)
        changed.append(sum(int((now[name] != start[name]).sum()) for name in now))
    return {"log_probs": [row.tolist() for row in found], "gradient": gradient, "changed": changed, "norms": steps}


# The reference.


def hf_log_probs(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """log p [T] of the response tokens at the sampling temperature."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return (logits / TEMPERATURE).log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


def hf_loss(model, mini_batch: list[int], old, reference, variant: Variant) -> torch.Tensor:
    """docs/method.md step 7, sequence by sequence."""
    rows, total, tokens = batch(), 0.0, sum(len(batch()[i][1]) for i in mini_batch)
    for i in mini_batch:
        prompt, response, advantage = rows[i]
        log_p = hf_log_probs(model, prompt, response)
        ratio, difference = (log_p - old[i]).exp(), log_p - reference[i]
        clipped = ratio.clamp(0.8, 1.3)
        kl = {"k1": difference, "k2": difference**2 / 2, "k3": (-difference).exp() - 1 + difference}
        loss = (-torch.min(ratio * advantage, clipped * advantage) + variant.kl_coef * kl[variant.kl_estimator]).sum()
        scale = {"seq_mean": len(mini_batch) * len(response), "token_mean": tokens}
        total = total + loss / scale.get(variant.loss_aggregation, len(mini_batch) * MAX_RESPONSE)
    return total


@dataclass(frozen=True, eq=False)
class Reference:
    """What transformers finds for one family: log-probs and the disturbed ones that both sides start from."""

    path: str
    log_probs: list[torch.Tensor]
    old: list[torch.Tensor]
    reference: list[torch.Tensor]

    def model(self):
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()

    def lists(self) -> tuple[list, list]:
        return [row.tolist() for row in self.old], [row.tolist() for row in self.reference]


@cache
def hf_gradient(known: Reference, variant: str, mini_batch: tuple[int, ...]) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, gradient by name) of one mini-batch."""
    model = known.model()
    loss = hf_loss(model, list(mini_batch), known.old, known.reference, VARIANTS[variant])
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@cache
def hf_update(known: Reference, variant: str) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(gradient norms, weights before, weights after) of an optimizer step for each mini-batch."""
    model, norms = known.model(), []
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    decayed = [p for p in model.parameters() if p.dim() > 1]  # Megatron-Core spares norms and biases
    spared = [p for p in model.parameters() if p.dim() == 1]
    groups = [dict(params=decayed, weight_decay=OPTIMIZER["weight_decay"]), dict(params=spared, weight_decay=0.0)]
    adam = torch.optim.AdamW(groups, lr=OPTIMIZER["lr"], betas=(0.9, 0.95), eps=OPTIMIZER["eps"])
    for mini_batch in MINI_BATCHES:
        adam.zero_grad()
        hf_loss(model, mini_batch, known.old, known.reference, VARIANTS[variant]).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER["clip_grad"]).item())
        adam.step()
    return norms, before, {name: p.detach() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def reference(tiny_hf, tmp_path_factory):
    """``reference(family)`` -> Reference, computed once. ``family`` with "_8": of 8 layers, for virtual stages."""

    def directory(family: str) -> Path:
        base = family.removesuffix("_8")
        path = tiny_hf(family) if base == family else tmp_path_factory.mktemp(family)
        if base != family:
            build_tiny_hf(base, path, num_hidden_layers=8)
        if base in MOE:  # transformers' own names, as its gradients have them: experts in one tensor
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            path = tmp_path_factory.mktemp(family)
            model.save_pretrained(path, save_original_format=False)
        return path

    @cache
    @torch.no_grad()
    def compute(family: str) -> Reference:
        path = directory(family)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        found = [hf_log_probs(model, prompt, response) for prompt, response, _ in batch()]
        old, other = ([a + b for a, b in zip(found, noise(seed), strict=True)] for seed in (1, 2))
        return Reference(str(path), found, old, other)

    return compute


def check_close(found: dict, expected: dict[str, torch.Tensor], tolerance: float, floor: float = 1e-3) -> None:
    """Relative error of all tensors together, and of each one (those under ``floor`` of the whole count as that)."""
    assert found.keys() == expected.keys()
    errors = {name: (torch.from_numpy(found[name]) - value).norm() for name, value in expected.items()}
    whole = torch.stack([value.norm() for value in expected.values()]).norm()
    total = (torch.stack(list(errors.values())).norm() / whole).item()
    each = {name: (errors[name] / max(value.norm(), floor * whole)).item() for name, value in expected.items()}
    worst = max(each, key=each.get)
    print({"whole": f"{total:.1e}", "tensor": f"{each[worst]:.1e}"})
    assert total <= tolerance and each[worst] <= tolerance, (total, worst, each[worst])


# The tests.

EVERYTHING = tuple(range(8))
DENSE_CASES = [(layout, family) for layout in LAYOUTS for family in DENSE_FAMILIES]
EXPERT_CASES = [
    (layout, family) for layout in LAYOUTS | EXPERT_LAYOUTS for family in MOE if fits(layout, layers=4, moe=True)
]
STAGE_CASES = [
    (layout, family)
    for layout in STAGE_LAYOUTS
    for family, layers, moe in (("qwen2", 4, False), ("qwen2_8", 8, False), ("qwen3_moe_8", 8, True))
    if fits(layout, layers=layers, moe=moe)
]
CASES = [*DENSE_CASES, *EXPERT_CASES, *STAGE_CASES]


@pytest.mark.parametrize(
    ("layout", "family", "variant"),
    [
        *((*case, "few") for case in DENSE_CASES),
        *((layout, "qwen2", "one_each_full_recompute") for layout in LAYOUTS),
        *((layout, "qwen3", "all_selective_recompute") for layout in LAYOUTS),
        *((*case, variant) for case in STAGE_CASES for variant in ("few", "one_each_full_recompute")),
        *((*case, "few") for case in EXPERT_CASES),
        *((layout, "qwen3_moe", "one_each_full_recompute") for layout in ("tp1pp1", "ep2", "etp2", "tp2sp_ep2")),
    ],
)
def test_gradient_equals_hugging_face_autograd(worlds, reference, layout, family, variant):
    """Loss and gradient of one mini-batch with clipped ratios and a KL penalty; metrics are the same on every rank."""
    known = reference(family)
    results = worlds.on(layout, gradients, known.path, variant, list(EVERYTHING), *known.lists())
    loss, expected = hf_gradient(known, variant, EVERYTHING)
    metrics = results[0][0]
    assert all(result[0] == metrics for result in results)
    assert metrics["loss/policy"] + metrics["loss/kl"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert 0.1 < metrics["ratio/clip_share"] < 0.9
    check_close(results[0][1], expected, 1e-5)


@pytest.mark.parametrize("mini_batch", [(2,), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("world", [2, 4])
def test_gradient_with_more_replicas_than_responses(worlds, reference, world, mini_batch):
    """Data-parallel replicas without a response, or with fewer than others, change nothing."""
    known = reference("qwen2")
    results = worlds[world].run(gradients, Layout(), known.path, "few", list(mini_batch), *known.lists())
    check_close(results[0][1], hf_gradient(known, "few", mini_batch)[1], 1e-5)


@pytest.mark.parametrize(("layout", "family"), CASES)
def test_log_probs_equal_transformers(worlds, reference, layout, family):
    """log p of the response tokens at the sampling temperature, on every rank."""
    known = reference(family)
    for found in worlds.on(layout, log_probs, known.path, "few"):
        for row, expected in zip(found, known.log_probs, strict=True):
            assert ((torch.tensor(row) - expected).norm() / expected.norm()).item() <= 1e-5


@pytest.mark.parametrize(
    ("layout", "family", "distributed"),
    [
        *((*case, True) for case in CASES if case[1] != "mixtral" or "ep2" in case[0]),
        *((*case, False) for case in CASES if case[1] == "qwen2"),
        *((layout, "qwen3_moe", False) for layout in ("ep2", "tp2sp_ep2_etp2")),
    ],
)
def test_update_equals_hugging_face_and_adamw(worlds, reference, layout, family, distributed):
    """Two mini-batches: clipped by the global norm, decayed, stepped. Weights to 1e-5, their change to 1e-4."""
    known = reference(family)
    metrics, weights = worlds.on(layout, update, known.path, "few", distributed, *known.lists())[0]
    norms, before, after = hf_update(known, "few")
    assert min(norms) > OPTIMIZER["clip_grad"]  # the clip acts
    assert metrics["optimizer/grad_norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-5)
    assert metrics["optimizer/lr"] == OPTIMIZER["lr"]
    check_close(weights, after, 1e-5)
    change = {name: weights[name] - before[name].numpy() for name in weights}
    check_close(change, {name: after[name] - before[name] for name in after}, 1e-4)


@pytest.mark.parametrize(
    ("layout", "family"),
    [
        ("tp2pp2sp", "qwen2"),
        ("tp1pp1dp2", "llama3"),
        ("pp3_vpp2_uneven", "qwen3_moe_8"),
        ("tp2pp1", "mistral"),
        ("tp2sp_ep2_etp2", "qwen3_moe"),
        ("ep2", "mixtral"),
    ],
)
def test_trained_weights_exported_give_the_same_log_probs(worlds, reference, tmp_path, layout, family):
    """What training leaves in the Hugging Face directory is the policy that was trained, experts included."""
    known = reference(family)
    found = worlds.on(layout, train_and_export, known.path, str(tmp_path / "hf"), *known.lists())
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = [hf_log_probs(trained, prompt, response) for prompt, response, _ in batch()]
    for row, exact, before in zip(found[0], expected, known.log_probs, strict=True):
        assert ((torch.tensor(row) - exact).norm() / exact.norm()).item() <= 1e-5
        assert (exact - before).norm() > 1e-3  # the update changed it


@pytest.mark.parametrize("dtype, variant", [("fp32", "one_each_full_recompute"), ("fp32", "few"), ("bf16", "few")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_ratio_is_exactly_1_and_kl_exactly_0(worlds, reference, layout, dtype, variant):
    """Old log-probs come from the update's own micro-batches, and the reference has the same weights: exact, not close.

    The second mini-batch of the update has moved weights: its ratio is no longer 1, so the metrics are alive.
    """
    for first, whole in worlds.on(layout, first_update, reference("qwen3").path, variant, dtype):
        assert first["ratio/mean"] == first["ratio/max"] == whole["ratio/first"] == 1.0
        assert first["kl/k1"] == first["kl/k2"] == first["kl/k3"] == first["loss/kl"] == 0.0
        assert whole["ratio/max"] != 1.0 and whole["kl/k3"] > 0.0


@pytest.mark.parametrize(
    ("layout", "family", "dtype"),
    [
        *((layout, "qwen3", "fp32") for layout in LAYOUTS),
        ("tp2sp_ep2", "qwen3_moe", "fp32"),
        ("pp4_vpp2", "qwen2_8", "fp32"),
        ("tp2pp2sp", "qwen3", "bf16"),
    ],
)
def test_old_log_probs_of_the_update_itself_change_nothing(worlds, reference, layout, family, dtype):
    """One mini-batch: metrics, log-probs and weights after two updates are bit for bit those with a pass before each."""
    for with_pass, without in worlds.on(layout, with_and_without_old_pass, reference(family).path, dtype):
        assert without[0] == with_pass[0] and without[0]["ratio/first"] == without[0]["ratio/max"] == 1.0
        assert without[1] == with_pass[1]
        assert all((without[2][name] == value).all() for name, value in with_pass[2].items())


@pytest.mark.parametrize("layout", ["tp1pp1", "tp1pp1dp2", "tp2pp2sp"])
def test_bf16_is_close_and_keeps_fp32_main_weights(worlds, reference, layout):
    """Log-probs and gradients to a few percent of fp32; steps far below bf16's resolution add up."""
    known = reference("qwen2")
    result = worlds.on(layout, bf16_run, known.path, *known.lists())[0]
    for row, expected in zip(result["log_probs"], known.log_probs, strict=True):
        assert ((torch.tensor(row) - expected).norm() / expected.norm()).item() <= 0.03
    check_close(result["gradient"], hf_gradient(known, "few", EVERYTHING)[1], 0.1, floor=0.2)
    assert all(torch.isfinite(torch.tensor(result["norms"])))
    assert 4 * result["changed"][0] < result["changed"][-1]
