"""The rollout engine's responses: greedy ones are transformers' ``generate`` token for token, sampled ones are the same
on every layout, data-parallel size, batch size and order of requests.

fp32, prompts of different lengths in one batch, stop tokens in the middle; replicas that share experts, virtual stages,
sliding windows. Leaves out the sampling functions
(test_sampling.py) and speed.
"""

import random
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from distributed import EXPERT_LAYOUTS, LAYOUTS, fits, groups_of
from g2r_megatron.config.options import Layout, OptimizerConfig, Precision, RolloutConfig, TrainConfig
from g2r_megatron.rollout.sampling import uniforms
from tiny_models import build_tiny_hf

LIMIT = 12
SAMPLING = dict(temperature=0.9, top_p=0.9, top_k=40)
PROMPT_LENGTHS = [3, 11, 7, 7, 1, 70, 5]  # 70: past llama3's original 64 positions


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 380, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


# In the ranks.


def engine_of(layout: Layout, path: str, stop: list[int], batch_size: int):
    from g2r_megatron.model.build import build_model
    from g2r_megatron.model.hf import open_hf_model
    from g2r_megatron.rollout.megatron import MegatronRolloutEngine

    model = build_model("policy", open_hf_model(path, "policy.model"), groups_of(layout), Precision())
    config = RolloutConfig(max_response_tokens=LIMIT, batch_size=batch_size, **SAMPLING)
    return MegatronRolloutEngine(model, config, set(stop))


def requests(order: list[int]):
    from g2r_megatron.rollout.types import Request

    texts = prompts()
    return [Request(texts[i], f"step 3, response {i}") for i in order]


def generate(layout: Layout, path: str, stop: list[int], batch_size: int, greedy: bool, order: list[int]) -> list:
    engine = engine_of(layout, path, stop, batch_size)
    return [sampled[:2] for sampled in engine.generate(requests(order), temperature=0.0 if greedy else None)]


def generate_in_training(layout: Layout, path: str, stop: list[int]) -> dict:
    """Responses of a policy under DDP and its optimizer, and whether sampling them changed anything for the update."""
    from g2r_megatron.policy.log_probs import TokenSequence
    from g2r_megatron.policy.trainer import PolicyTrainer

    engine = engine_of(layout, path, stop, 3)
    trainer = PolicyTrainer(engine.model, TrainConfig(optimizer=OptimizerConfig(distributed=False)))
    sequences = [TokenSequence(ids, [5, 6, 7]) for ids in prompts()]
    everything = list(range(len(sequences)))
    before = trainer.log_probs(sequences, [everything])
    progress: list[int] = []
    responses = engine.generate(requests(everything), on_progress=progress.append)
    after = trainer.log_probs(sequences, [everything])
    return {
        "responses": [sampled[:2] for sampled in responses],
        "unchanged": all(torch.equal(a, b) for a, b in zip(before, after, strict=True)),
        "training": engine.model.training,
        "progress": progress,
    }


# The reference.


def hf_sample(model, prompt: list[int], stop: list[int], key: str) -> tuple[list[int], bool]:
    """One response by transformers' forward and filters, whole sequences, no cache; inverse of the cumulative at u."""
    temperature, top_k = TemperatureLogitsWarper(SAMPLING["temperature"]), TopKLogitsWarper(SAMPLING["top_k"])
    filters = LogitsProcessorList([temperature, top_k, TopPLogitsWarper(SAMPLING["top_p"])])
    ids = list(prompt)
    for u in uniforms(key, LIMIT).tolist():
        probabilities = filters(None, model(torch.tensor([ids])).logits[:, -1]).double().softmax(-1)[0]
        ids.append(int((probabilities.cumsum(0) <= u).sum()))
        if ids[-1] in stop:
            return ids[len(prompt) :], True
    return ids[len(prompt) :], False


@pytest.fixture(scope="module")
def model_directory(tiny_hf, tmp_path_factory):
    """``model_directory(family)``: tiny_hf's, and "qwen2_8", which has 8 layers for virtual stages."""
    long: list[Path] = []

    def get(family: str) -> Path:
        if family != "qwen2_8":
            return tiny_hf(family)
        if not long:
            long.append(build_tiny_hf("qwen2", tmp_path_factory.mktemp(family), num_hidden_layers=8))
        return long[0]

    return get


@pytest.fixture(scope="module")
def reference(model_directory):
    """``reference(family)`` -> (stop ids, greedy responses, sampled responses), each (token ids, finished)."""

    @cache
    @torch.no_grad()
    def compute(family: str):
        model = AutoModelForCausalLM.from_pretrained(model_directory(family), dtype=torch.float32).eval()

        def greedy(prompt, stop):
            ids, mask = torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.int64)
            options = dict(max_new_tokens=LIMIT, do_sample=False, eos_token_id=stop, pad_token_id=0)
            return model.generate(ids, attention_mask=mask, **options)[0, len(prompt) :].tolist()

        free = [greedy(prompt, [382]) for prompt in prompts()]
        stop = sorted({free[0][4], free[1][9]})  # tokens that do come up, in the middle
        found = [greedy(prompt, stop) for prompt in prompts()]
        sampled = [hf_sample(model, prompt, stop, f"step 3, response {i}") for i, prompt in enumerate(prompts())]
        return stop, [(ids, ids[-1] in stop) for ids in found], sampled

    return compute


# The tests.

IN_ORDER = list(range(len(PROMPT_LENGTHS)))
CASES = [
    *((layout, family) for layout in LAYOUTS for family in ("qwen2", "qwen3")),
    *((layout, "llama3") for layout in ("tp1pp1", "tp2pp1sp", "tp2pp2sp")),
    *((layout, "qwen3_moe") for layout in LAYOUTS | EXPERT_LAYOUTS if fits(layout, layers=4, moe=True)),
    ("tp1pp1", "mixtral"),
    ("ep2", "mixtral"),
    ("tp1pp1", "mistral"),  # a window that prompts and responses outgrow
    ("tp2pp2sp", "mistral"),
    ("pp2_uneven", "qwen2"),
    ("pp4_vpp2", "qwen2_8"),
    ("pp3_vpp2_uneven", "qwen2_8"),
]


@pytest.mark.parametrize(("layout", "family"), CASES)
def test_greedy_equals_generate(worlds, model_directory, reference, layout, family):
    """Token for token, stop token included, on every rank; some responses stop and some are cut at the limit."""
    stop, expected, _ = reference(family)
    assert {finished for _, finished in expected} == {True, False}
    for found in worlds.on(layout, generate, str(model_directory(family)), stop, 3, True, IN_ORDER):
        assert found == expected


@pytest.mark.parametrize(
    ("layout", "family"),
    [case for case in CASES if case[0] in ("tp1pp1", "ep2", "pp2_ep2") or case[1].startswith("qwen2")],
)
def test_sampled_responses_are_the_same_everywhere(worlds, model_directory, reference, layout, family):
    """Every layout and data-parallel size draws what transformers' logits and filters give at the keys' own u."""
    stop, _, expected = reference(family)
    for found in worlds.on(layout, generate, str(model_directory(family)), stop, 3, False, IN_ORDER):
        assert found == expected


@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize("layout", ["tp1pp1", "tp1pp1dp2", "tp2pp2sp"])
def test_company_does_not_matter(worlds, tiny_hf, reference, layout, batch_size):
    """A response depends on its prompt and key alone: not on the batch size, nor on the order of the requests."""
    stop, _, expected = reference("qwen3")
    order = random.Random(batch_size).sample(IN_ORDER, len(IN_ORDER))
    found = worlds.on(layout, generate, str(tiny_hf("qwen3")), stop, batch_size, False, order)[0]
    assert found == [expected[i] for i in order]


@pytest.mark.parametrize("layout", ["tp1pp1", "tp2pp1sp", "tp1pp1dp2", "tp2pp2sp"])
def test_sampling_in_training_disturbs_nothing(worlds, tiny_hf, reference, layout):
    """Under DDP the same responses; log-probs before and after are bit-equal (sequence parallelism is back on)."""
    stop, _, expected = reference("llama3")
    results = worlds.on(layout, generate_in_training, str(tiny_hf("llama3")), stop)
    for result in results:
        assert result["responses"] == expected
        assert result["unchanged"] and result["training"]
        assert result["progress"] == sorted(result["progress"])
    _, sizes = LAYOUTS[layout]
    assert sum(result["progress"][-1] for result in results) == len(expected) * sizes.tp * sizes.pp


def test_fewer_requests_than_replicas(worlds, tiny_hf, reference):
    """Replicas without a request still take part; no request at all is no response."""
    stop, _, expected = reference("qwen2")
    path = str(tiny_hf("qwen2"))
    assert worlds.on("tp1pp1dp2", generate, path, stop, 3, False, [1]) == [[expected[1]]] * 2
    assert worlds.on("tp1pp1dp2", generate, path, stop, 3, False, []) == [[], []]
