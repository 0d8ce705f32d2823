"""Plain torch layers on CUDA in fp32: what the CPU suite asserts against Hugging Face, to the same tolerances.

A world of one on NCCL. The references and the tolerances are the CPU suite's own (test_parity_*.py); transformers runs
on the CPU. Leaves out several GPUs, bf16, FP8 and Transformer Engine (test_gpu_precision.py).
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import test_checkpoint as checkpoints
import test_own_ranks as offloading
import test_packing as packing
import test_parity_judge as judging
import test_parity_rollout as rollouts
import test_parity_update as updates
import test_shared_prefix as sharing
from g2r_megatron.config.options import Layout
from tiny_models import DENSE_FAMILIES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
judge_reference = judging.reference
rollout_reference = rollouts.reference
update_reference = updates.reference
model_directory = rollouts.model_directory  # which rollout_reference asks for
directory, sharing_gradients = sharing.directory, sharing.gradients


@pytest.mark.parametrize("variant", judging.VARIANTS)
@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_judge_equals_hugging_face_autograd(tiny_hf, judge_reference, family, variant):
    """Verdicts, b_t and token rewards of every way to judge; no weight gets a gradient."""
    result = judging.judge_on(Layout(), str(tiny_hf(family)), variant)
    judging.compare([result], judge_reference(family, variant), judging.VARIANTS[variant].attribution)
    assert result["trainable"] == result["gradients"] == 0


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_rollouts_equal_transformers(tiny_hf, rollout_reference, family):
    """Greedy responses are ``generate``'s token for token; sampled ones what its logits give at the keys' own u."""
    stop, greedy, sampled = rollout_reference(family)
    path = str(tiny_hf(family))
    assert rollouts.generate(Layout(), path, stop, 3, True, rollouts.IN_ORDER) == greedy
    assert rollouts.generate(Layout(), path, stop, 64, False, rollouts.IN_ORDER) == sampled


@pytest.mark.parametrize("variant", updates.VARIANTS)
@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_gradient_equals_hugging_face_autograd(update_reference, family, variant):
    """Loss and gradient of a mini-batch with clipped ratios and a KL penalty, with and without recompute."""
    known = update_reference(family)
    everything = updates.EVERYTHING
    metrics, found = updates.gradients(Layout(), known.path, variant, list(everything), *known.lists())
    loss, expected = updates.hf_gradient(known, variant, everything)
    assert metrics["loss/policy"] + metrics["loss/kl"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
    updates.check_close(found, expected, 1e-5)


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed_optimizer", "plain_optimizer"])
@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_update_equals_hugging_face_and_adamw(update_reference, family, distributed):
    """Two mini-batches: clipped, decayed, stepped by whichever Adam Megatron-Core takes here."""
    known = update_reference(family)
    metrics, weights = updates.update(Layout(), known.path, "few", distributed, *known.lists())
    norms, before, after = updates.hf_update(known, "few")
    assert metrics["optimizer/grad_norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-5)
    updates.check_close(weights, after, 1e-5)
    change = {name: weights[name] - before[name].numpy() for name in weights}
    updates.check_close(change, {name: after[name] - before[name] for name in after}, 1e-4)


@pytest.mark.parametrize("variant", ["few", "one_each_full_recompute"])
def test_first_ratio_is_exactly_1_and_kl_exactly_0(update_reference, variant):
    first, whole = updates.first_update(Layout(), update_reference("qwen3").path, variant, "fp32")
    assert first["ratio/mean"] == first["ratio/max"] == whole["ratio/first"] == 1.0
    assert first["kl/k1"] == first["kl/k3"] == first["loss/kl"] == 0.0
    assert whole["ratio/max"] != 1.0 and whole["kl/k3"] > 0.0


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed_optimizer", "plain_optimizer"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])  # tied and untied embeddings
def test_a_checkpoint_goes_on_bitwise(tiny_hf, tmp_path, family, distributed):
    """Saved, loaded into fresh weights: the same random numbers, the same next update (by deterministic kernels)."""
    arguments = (Layout(), str(tiny_hf(family)), str(tmp_path), distributed, "fp32")
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels' backward adds up in any order
        before = checkpoints.save_and_go_on(*arguments)
        after = checkpoints.load_and_go_on(*arguments)
    assert after["step"] == 2 and after["random"] == before["random"]
    assert checkpoints.same(after["weights"], before["weights"])
    assert checkpoints.same(after["next"], before["next"]) and after["metrics"] == before["metrics"]


@pytest.mark.parametrize("share", [(0, 1), (1, 2)], ids=["whole row", "second of two context parallel ranks"])
@pytest.mark.parametrize("window", [None, 40])
def test_flex_attention_equals_attention_tree_by_tree(window, share):
    """A row of trees, fp32: FlexAttention, compiled, gives the CPU's output and gradients of query, key and value."""
    trees, structure, _ = packing.random_row(3)
    tokens = 3 * sum(len(tree.ids) for tree in trees) + 5
    structure = packing.row_structure([tree.shape for tree in trees] * 3, packing.padded(tokens, share[1]))
    query, key, value = packing.random_heads(1, structure.size(1))
    heads = [query.detach()[:, :, share[0] :: share[1]].requires_grad_(), key, value]
    on_gpu = [t.detach().cuda().requires_grad_() for t in heads]
    expected = packing.tree_attention(*heads, structure, window, None, share)
    found = packing.tree_attention(*on_gpu, structure, window, None, share)
    real = (structure[0, share[0] :: share[1]] >= 0).view(-1, 1)  # padding is 0 on a CPU
    pull = torch.randn(expected.shape) * real
    assert packing.relative(found.cpu() * real, expected) <= 1e-5
    wanted = torch.autograd.grad((expected * pull).sum(), heads)
    for gradient, want in zip(torch.autograd.grad((found * pull.cuda()).sum(), on_gpu), wanted, strict=True):
        assert packing.relative(gradient.cpu(), want) <= 1e-5


@pytest.mark.parametrize("way", sharing.WAYS)
@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_shared_prefixes_equal_separate_sequences(directory, sharing_gradients, family, way):
    """Items alone and pooled, with and without recompute, a sliding window."""
    found = sharing.judge_all(Layout(), directory(family, 4), "tp1pp1", sharing.WAYS[way])
    sharing.check(found, sharing_gradients, sharing.WAYS[way], family, 4)


def test_offloaded_memory_is_given_back(tmp_path):
    """The judge's weights are page-locked on the host, leave the GPU and come back bit for bit."""
    offloading.assert_given_back(*offloading.resident_after(offloading.large_model(tmp_path / "model")))
