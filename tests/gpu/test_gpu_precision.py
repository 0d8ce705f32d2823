"""bf16 and FP8 on CUDA, plain torch layers and Transformer Engine's: close to fp32, exact where it must be exact.

fp32 on plain torch layers is the reference here; test_gpu_torch.py holds it against Hugging Face. Closeness is a rank
correlation (what attributions are for) or a cosine, each with the bound that its format is held to; the figures are
printed (pytest -s). Leaves out several GPUs, and speed (benchmarks/judge_gpu.py).
"""

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import test_checkpoint as checkpoints
import test_parity_judge as judging
import test_parity_rollout as rollouts
import test_parity_update as updates
from distributed import groups_of
from g2r_megatron.config.options import Layout, OptimizerConfig, PolicyConfig, Precision, RolloutConfig, TrainConfig
from g2r_megatron.data.tokenizer import load_tokenizer
from g2r_megatron.errors import UserError
from g2r_megatron.judge.prompt import JudgePrompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_te = pytest.mark.skipif(find_spec("transformer_engine") is None, reason="needs Transformer Engine")


@dataclass(frozen=True)
class Format:
    """Layers and number format, and what they are held to against fp32."""

    spec: str
    fp8: str
    contracted: float  # rank correlation of contracted attributions
    product: float  # and of g.e, a cancellation: |cos(g, e)| is 0.003 in these models
    cosine: float  # of the policy gradient
    near: float  # standard deviations of the logits that a greedy token may be below the best


FORMATS = {
    "torch bf16": Format("torch", "none", 0.99, 0.95, 0.995, 0.1),
    "te bf16": Format("te", "none", 0.99, 0.95, 0.995, 0.1),
    "te fp8 tensorwise": Format("te", "tensorwise", 0.85, 0.85, 0.95, 0.5),
    "te fp8 blockwise": Format("te", "blockwise", 0.85, 0.85, 0.95, 0.5),
}
formats = pytest.mark.parametrize(
    "format", [pytest.param(f, id=name, marks=needs_te if f.spec == "te" else ()) for name, f in FORMATS.items()]
)
# the target does not depend on the verdict, which rounding can turn
CONTRACTED = judging.Variant("contracted", "logit_margin", "none", 8192, True, "none", verdict="compare")
PRODUCT = judging.Variant("grad_x_embed", "logit_margin", "none", 150, True, "none", verdict="compare")


def build(path: str, spec: str, dtype: str = "bf16", fp8: str = "none", recompute: str = "none"):
    from g2r_megatron.model.build import build_model
    from g2r_megatron.model.hf import open_hf_model

    precision = Precision(dtype=dtype, fp8=fp8)
    try:
        return build_model(
            "policy", open_hf_model(path, "policy.model"), groups_of(Layout()), precision, recompute, spec
        )
    except UserError as error:
        if fp8 == "none":
            raise
        pytest.skip(str(error))  # this GPU does not have that recipe


def judged(model, path: str, variant) -> dict:
    from g2r_megatron.judge.frozen import FrozenJudge
    from g2r_megatron.judge.stage import JudgeStage

    config = variant.config()
    prompt = JudgePrompt(load_tokenizer(path), config)
    return judging.judge(JudgeStage(FrozenJudge(model, config, prompt.true_ids, prompt.false_ids), prompt, config))


@cache
def exact_judgement(path: str, variant) -> dict:
    return judged(build(path, "torch", "fp32"), path, variant)


def scores(result: dict) -> torch.Tensor:
    """b of every item, standardised, one after the other."""
    rows = [torch.tensor(item[3], dtype=torch.float64) for row in result["items"] for item in row]
    return torch.cat([(b - b.mean()) / b.std() for b in rows])


def rank_correlation(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Spearman's, for values without ties."""
    ranks = torch.stack([found.argsort().argsort(), expected.argsort().argsort()]).double()
    return torch.corrcoef(ranks)[0, 1].item()


def cosine(found: dict, expected: dict) -> float:
    """Of all tensors together."""
    a, b = (np.concatenate([tensors[name].ravel() for name in sorted(expected)]) for tensors in (found, expected))
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def trainer_of(model, distributed: bool = True):
    from g2r_megatron.policy.trainer import PolicyTrainer

    return PolicyTrainer(model, updates.VARIANTS["few"].config(distributed))


def advantages_and_log_probs(trainer):
    sequences = updates.token_sequences()
    return sequences, updates.advantages(), trainer.log_probs(sequences, updates.MINI_BATCHES)


@formats
@pytest.mark.parametrize("variant", [CONTRACTED, PRODUCT], ids=["contracted", "grad_x_embed"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_attributions_rank_tokens_as_fp32_does(gpu_hf, family, variant, format):
    """Everything is finite, verdict probabilities are near, tokens are in nearly the same order; weights stay frozen."""
    path = gpu_hf(family)
    expected, found = exact_judgement(path, variant), judged(build(path, format.spec, fp8=format.fp8), path, variant)
    a, b = (torch.tensor([item[0] for row in result["items"] for item in row]) for result in (expected, found))
    correlation = rank_correlation(scores(found), scores(expected))
    print({"rank correlation": round(correlation, 4), "p(True) off by": ((b - a).abs() / a).max().item()})
    assert torch.isfinite(scores(found)).all() and all(torch.isfinite(torch.tensor(r)).all() for r in found["rewards"])
    assert correlation >= (format.contracted if variant is CONTRACTED else format.product)
    assert found["trainable"] == found["gradients"] == 0


@formats
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recompute_changes_nothing(gpu_hf, recompute, format):
    path = gpu_hf("qwen3")
    plain, again = (judged(build(path, format.spec, "bf16", format.fp8, r), path, PRODUCT) for r in ("none", recompute))
    assert rank_correlation(scores(again), scores(plain)) >= 0.999


@formats
def test_first_ratio_is_exactly_1_and_gradient_is_near(gpu_hf, format):
    """Old log-probs come from the update's own micro-batches: exact in every format. Then a whole update."""
    path = gpu_hf("qwen3")
    gradients = {}
    for spec, dtype, fp8 in (("torch", "fp32", "none"), (format.spec, "bf16", format.fp8)):
        trainer = trainer_of(build(path, spec, dtype, fp8), distributed=False)
        sequences, advantages, old = advantages_and_log_probs(trainer)
        metrics = trainer.gradients(sequences, updates.MINI_BATCHES[0], advantages, old, old)
        assert metrics["ratio/mean"] == metrics["ratio/max"] == 1.0 and metrics["kl/k3"] == 0.0
        gradients[dtype] = updates.gradient_arrays(trainer.model)
    near = cosine(gradients["bf16"], gradients["fp32"])
    print({"cosine of the gradient": round(near, 5)})
    assert near >= format.cosine

    trainer = trainer_of(build(path, format.spec, "bf16", format.fp8))
    sequences, advantages, old = advantages_and_log_probs(trainer)
    metrics, _ = trainer.update(sequences, updates.MINI_BATCHES, advantages, old, old)
    assert metrics["ratio/first"] == 1.0 and metrics["ratio/max"] != 1.0 and np.isfinite(metrics["optimizer/grad_norm"])


@torch.no_grad()
def next_logits(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Logits [T, vocab] that predict the response's tokens, by one forward over the whole sequence."""
    from g2r_megatron.model.schedule import forward_tokens, row_batch, run_schedule

    positions = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    batch = row_batch(model, [prompt + response], [positions], [0], 64)
    model.train(False)
    return run_schedule(model, [batch], forward_tokens, lambda _, logits: (None, logits), backward=False)[0].float()


@formats
def test_greedy_rollouts_follow_the_whole_forward(gpu_hf, format):
    """Every token decoded with the KV cache is (nearly) the best of a forward without one; mixed prompt lengths."""
    from g2r_megatron.rollout.megatron import MegatronRolloutEngine

    model = build(gpu_hf("qwen3"), format.spec, fp8=format.fp8)
    engine = MegatronRolloutEngine(model, RolloutConfig(max_response_tokens=12, batch_size=3), {382})
    responses = engine.generate(rollouts.requests(rollouts.IN_ORDER), temperature=0.0)
    worst = 0.0
    for prompt, (response, *_) in zip(rollouts.prompts(), responses, strict=True):
        logits = next_logits(model, prompt, response)[:, : model.geometry.vocab]
        chosen = logits.gather(1, torch.tensor(response, device=logits.device)[:, None])[:, 0]
        worst = max(worst, ((logits.amax(1) - chosen) / logits.std(1)).max().item())
    print({"standard deviations below the best": round(worst, 4)})
    assert worst <= format.near


def fresh_trainer(path: str, spec: str, fp8: str = "none"):
    from g2r_megatron.policy.trainer import PolicyTrainer

    options = TrainConfig(policy=PolicyConfig(micro_batch_tokens=60), optimizer=OptimizerConfig(lr=1e-3), steps=6)
    return PolicyTrainer(build(path, spec, fp8=fp8), options)


@formats
def test_a_checkpoint_goes_on_bitwise(gpu_hf, tmp_path, monkeypatch, format):
    """bf16 with fp32 main weights: saved, loaded into fresh weights, the same next update (by deterministic kernels)."""
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    with sdpa_kernel(SDPBackend.MATH):
        first, second = (fresh_trainer(gpu_hf("qwen2"), format.spec, format.fp8) for _ in range(2))
        checkpoints.update(first)
        checkpoints.checkpointer_of(first, str(tmp_path)).save(1)
        before = checkpoints.go_on(first)
        assert checkpoints.checkpointer_of(second, str(tmp_path)).load_latest() == 1
        after = checkpoints.go_on(second)
    assert checkpoints.same(after["weights"], before["weights"]) and checkpoints.same(after["next"], before["next"])
    assert after["metrics"] == before["metrics"]


@needs_te
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("source, target", [("torch", "te"), ("te", "torch")])
def test_checkpoints_move_between_layers(gpu_hf, tmp_path, source, target, family):
    """What plain torch layers wrote loads into Transformer Engine's and the other way round: the same weights.

    Experts too, which are a module each in plain torch and one grouped product in Transformer Engine.
    """
    first, second = (fresh_trainer(gpu_hf(family), spec) for spec in (source, target))
    checkpoints.update(first)
    checkpoints.checkpointer_of(first, str(tmp_path)).save(1)
    assert checkpoints.checkpointer_of(second, str(tmp_path)).load_latest() == 1
    assert checkpoints.same(updates.hf_arrays(second.model), updates.hf_arrays(first.model))


@needs_te
@pytest.mark.parametrize("family", judging.DENSE_FAMILIES)
def test_transformer_engine_holds_the_same_parameters(gpu_hf, family):
    """Names, shapes, dtypes and values are the torch layers'; so is the way back to Hugging Face."""
    found, expected = (build(gpu_hf(family), spec) for spec in ("te", "torch"))
    shapes = [
        [(n, tuple(p.shape), p.dtype) for n, p in sorted(m.chunks[0].named_parameters())] for m in (found, expected)
    ]
    assert shapes[0] == shapes[1]
    assert checkpoints.same(updates.hf_arrays(found), updates.hf_arrays(expected))


@needs_te
@pytest.mark.parametrize("family", judging.DENSE_FAMILIES)
def test_transformer_engine_in_fp32_is_tf32(gpu_hf, family):
    """Log-probs to TF32's precision: the reason that ``spec: auto`` keeps fp32 models on plain torch layers."""
    found, expected = (
        torch.cat(
            trainer_of(build(gpu_hf(family), spec, "fp32")).log_probs(updates.token_sequences(), updates.MINI_BATCHES)
        )
        for spec in ("te", "torch")
    )
    error = ((found - expected).norm() / expected.norm()).item()
    print({"relative error of the log-probs": f"{error:.1e}"})
    assert error <= 5e-3


def test_auto_is_plain_torch_in_fp32_and_transformer_engine_in_bf16():
    """Without Transformer Engine ``auto`` with bf16 is refused, in a line that says what to ask for."""
    from g2r_megatron.model.build import spec_backend
    from g2r_megatron.model.torch_layers import TorchSpecProvider

    assert isinstance(spec_backend("judge", "auto", "fp32"), TorchSpecProvider)
    if find_spec("transformer_engine") is None:
        with pytest.raises(UserError, match="judge.spec torch"):
            spec_backend("judge", "auto", "bf16")
    else:
        assert not isinstance(spec_backend("judge", "auto", "bf16"), TorchSpecProvider)
