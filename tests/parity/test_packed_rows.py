"""The policy's packed rows compute what padded batches do, and attention meets few shapes in training and decoding.

fp32 to 1e-6: log-probs, the gradient, weights after an update of two mini-batches (each tensor alone to 3e-6). Shapes
are those that the layers' attention is called with. Leaves out Transformer Engine's kernels for packed rows
(test_te_sources.py, tests/gpu).
"""

import random
from contextlib import contextmanager

import pytest
import torch

from distributed import padded_batch
from g2r_megatron.config.options import Layout, OptimizerConfig, PolicyConfig, Precision, RolloutConfig, TrainConfig
from g2r_megatron.parallel.microbatches import row_length
from test_parity_update import (
    MINI_BATCHES,
    advantages,
    check_close,
    gradient_arrays,
    hf_arrays,
    noise,
    token_sequences,
    trainer_of,
)
from tiny_models import build_tiny_hf

STEPS, BUDGET = 20, 128


# In the ranks.


@contextmanager
def in_padded_batches():
    """Training runs the sequences of a micro-batch side by side, padded to the longest."""
    from g2r_megatron.policy import log_probs, trainer

    def padded(model, sequences, items, budget):
        return padded_batch(model, [s.ids for s in sequences], [s.logit_positions for s in sequences], items)

    packed = trainer.response_batch
    trainer.response_batch = log_probs.response_batch = padded
    try:
        yield
    finally:
        trainer.response_batch = log_probs.response_batch = packed


def trained(layout: Layout, path: str, variant: str) -> dict:
    """Log-probs, gradient and updated weights."""
    sequences, found = token_sequences(), {}
    trainer = trainer_of(layout, path, variant, distributed=False)
    old = trainer.log_probs(sequences, MINI_BATCHES)
    found["log_probs"] = {str(i): row.numpy() for i, row in enumerate(old)}
    old = [a + b for a, b in zip(old, noise(1), strict=True)]
    reference = [a + b for a, b in zip(old, noise(2), strict=True)]
    everything = list(range(len(sequences)))
    trainer.gradients(sequences, everything, advantages(), old, reference)
    found["gradient"] = gradient_arrays(trainer.model)
    trainer = trainer_of(layout, path, variant, distributed=True)
    trainer.update(sequences, MINI_BATCHES, advantages(), old, reference)
    return found | {"weights": hf_arrays(trainer.model)}


def packed_and_padded(layout: Layout, path: str, variant: str) -> tuple[dict, dict]:
    packed = trained(layout, path, variant)
    with in_padded_batches():
        return packed, trained(layout, path, variant)


def watch_attention(model) -> set:
    """The shapes of queries and keys that the model's attention is called with from here on."""
    shapes = set()
    for layer in model.chunks[0].decoder.layers:
        layer.self_attention.core_attention.register_forward_pre_hook(
            lambda module, args, kwargs: shapes.add((tuple(args[0].shape), tuple(args[1].shape))), with_kwargs=True
        )
    return shapes


def shapes_of_training(layout: Layout, path: str) -> tuple[set, set]:
    """(shapes of attention, lengths of rows before they are padded) of ``STEPS`` training steps."""
    from g2r_megatron.model.build import build_model
    from g2r_megatron.model.hf import open_hf_model
    from g2r_megatron.parallel.groups import build_groups
    from g2r_megatron.policy.log_probs import TokenSequence
    from g2r_megatron.policy.trainer import PolicyTrainer

    model = build_model("policy", open_hf_model(path, "policy.model"), build_groups("policy", layout), Precision())
    options = dict(policy=PolicyConfig(micro_batch_tokens=BUDGET), optimizer=OptimizerConfig(distributed=False))
    trainer, numbers, rows = PolicyTrainer(model, TrainConfig(**options)), random.Random(1), set()
    shapes = watch_attention(model)
    for _ in range(STEPS):
        lengths = [(numbers.randrange(3, 20), numbers.randrange(1, 60)) for _ in range(8)]
        sequences = [TokenSequence(list(range(p)), list(range(r))) for p, r in lengths]
        known = trainer.update_log_probs(sequences, None)
        credit = [torch.randn(r) for _, r in lengths]
        trainer.update(sequences, known.mini_batches, credit, known.old, None)
        for mini_batch in known.mini_batches:
            rows |= {sum(map(sum, (lengths[i] for i in row))) for row in trainer.plan(sequences, mini_batch)}
    return shapes, rows


def shapes_of_decoding(layout: Layout, path: str) -> set:
    """Of 5 rollouts of 10 prompts each, 4 of them at a time."""
    from g2r_megatron.model.build import build_model
    from g2r_megatron.model.hf import open_hf_model
    from g2r_megatron.parallel.groups import build_groups
    from g2r_megatron.rollout.megatron import MegatronRolloutEngine
    from g2r_megatron.rollout.types import Request

    model = build_model("policy", open_hf_model(path, "policy.model"), build_groups("policy", layout), Precision())
    config = RolloutConfig(max_prompt_tokens=200, max_response_tokens=60, batch_size=4)
    engine, numbers = MegatronRolloutEngine(model, config, set()), random.Random(1)
    shapes = watch_attention(model)
    for step in range(5):
        prompts = [list(range(numbers.randrange(1, 200))) for _ in range(10)]
        engine.generate([Request(ids, f"step {step}, response {i}") for i, ids in enumerate(prompts)])
    return shapes


# The tests.


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(build_tiny_hf("qwen3", tmp_path_factory.mktemp("two layers"), num_hidden_layers=2))


@pytest.mark.parametrize(
    ("layout", "family", "variant"),
    [
        ("tp1pp1", "qwen3", "few"),
        ("tp1pp1", "mistral", "few"),  # a window
        ("tp1pp1", "qwen2", "all_selective_recompute"),
        ("tp2pp1sp", "llama3", "few"),
        ("tp1pp1dp2", "qwen2", "few"),
        ("tp2pp2sp", "qwen3", "few"),
        ("tp1pp2", "qwen2", "one_each_full_recompute"),
        ("ep2", "qwen3_moe", "few"),
    ],
)
def test_packed_rows_equal_padded_batches(worlds, tiny_hf, layout, family, variant):
    """Log-probs, gradient and updated weights, over tensor, sequence, pipeline, data and expert parallel ranks."""
    packed, padded = worlds.on(layout, packed_and_padded, str(tiny_hf(family)), variant)[0]
    for name in ("log_probs", "gradient", "weights"):
        expected = {key: torch.from_numpy(value) for key, value in padded[name].items()}
        check_close(packed[name], expected, 3e-6, floor=1e-2)
        whole = [torch.cat([torch.as_tensor(x).flatten() for x in of[name].values()]) for of in (packed, padded)]
        assert (whole[0] - whole[1]).norm() <= 1e-6 * whole[1].norm()


def test_training_meets_few_shapes(worlds, directory):
    """20 steps of random lengths: far more sums of tokens than shapes."""
    shapes, rows = worlds.on("tp1pp1", shapes_of_training, directory)[0]
    assert len(rows) > 30 and 2 <= len(shapes) <= 8, shapes


def test_decoding_meets_few_shapes(worlds, directory):
    """Prompts of 1 to 200 tokens and responses of 60: rows in use are halved at the end; of one query at most 16 shapes."""
    shapes = worlds.on("tp1pp1", shapes_of_decoding, directory)[0]
    decoding = {shape for shape in shapes if shape[0][0] == 1}
    assert {query[1] for query, _ in decoding} == {4, 2} and len(decoding) <= 16
    assert len(shapes - decoding) <= 8


@pytest.mark.parametrize("multiple", [1, 8, 48])
@pytest.mark.parametrize("budget", [1, 60, 8192])
def test_row_lengths_are_few_and_fit(budget, multiple):
    """Enough for the tokens, a multiple, within a budget that is enough; five lengths up to it, one a quarter beyond."""
    lengths = {tokens: row_length(tokens, budget, multiple) for tokens in range(1, 2 * budget)}
    for tokens, length in lengths.items():
        assert length >= tokens and length % multiple == 0
        assert length <= budget or tokens > budget // multiple * multiple
    assert len(set(lengths.values())) <= 10
