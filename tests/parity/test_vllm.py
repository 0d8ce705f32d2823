"""The vLLM engine in the policy's ranks: after visible updates it says what the exported weights say, token for token.

Real vLLM on a CPU, tiny models with heads of 32, layouts of up to 4 ranks. The exported weights are run by transformers, and
for a tied model and one with experts by a fresh vLLM too. Log-probs of sampled tokens against the trainer's.
A weight that does not arrive is found by name. Leaves out GPUs, and training (tests/runs/test_vllm_training.py).
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from distributed import groups_of, server_with
from g2r_megatron.config.options import Layout, OptimizerConfig, Precision, RolloutConfig, TrainConfig, VLLMConfig
from g2r_megatron.rollout.vllm.environment import CPU_ENVIRONMENT, ENVIRONMENT
from tiny_models import build_tiny_hf

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make vllm)"),
]
HEADS_OF_32 = dict(hidden_size=128, head_dim=32, num_hidden_layers=2)
# name -> (family of tiny_models, what its config adds)
MODELS = {
    "qwen2": ("qwen2", {}),  # tied
    "qwen3": ("qwen3", {}),
    "llama": ("llama3", {}),
    "llama_tied": ("llama3", {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {"moe_intermediate_size": 64}),
    "mistral": ("mistral", {}),
}
LIMIT = 12
PROMPTS = [3, 150, 7, 7, 1, 140, 5]  # tokens; a block of the prefix cache has 128
UPDATES = 3
CASES = [
    *(("tp1pp1", name) for name in MODELS),
    ("tp2pp2sp", "qwen2"),  # tied, on stages of their own
    ("tp2sp_ep2", "qwen3_moe"),
]


@pytest.fixture(scope="module", autouse=True)
def vllm_is_imported_once() -> Iterator[None]:
    """Every engine below has processes of its own."""
    with server_with(
        "vllm", "vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker", **ENVIRONMENT, **CPU_ENVIRONMENT
    ):
        yield


# In the ranks.


def options_of(**options) -> RolloutConfig:
    options.setdefault("vllm", VLLMConfig(options={"max_num_batched_tokens": 160 + LIMIT}))  # no room for all at once
    return RolloutConfig(
        engine="vllm", max_prompt_tokens=160, max_response_tokens=LIMIT, temperature=0.7, batch_size=8, **options
    )


def policy_of(layout: Layout, path: str, **options):
    from g2r_megatron.model.build import build_model
    from g2r_megatron.model.hf import open_hf_model
    from g2r_megatron.policy.trainer import PolicyTrainer

    model = build_model("policy", open_hf_model(path, "policy.model"), groups_of(layout), Precision())
    config = TrainConfig(rollout=options_of(**options), optimizer=OptimizerConfig(distributed=False))
    return PolicyTrainer(model, config), config


def requests(vocab: int = 380):
    from g2r_megatron.rollout.types import Request

    generator = torch.Generator().manual_seed(5)
    texts = [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in PROMPTS]
    return [Request(ids, f"step 3, response {i}") for i, ids in enumerate(texts)]


def updated_engine(layout: Layout, path: str, export: str, vocab: int = 380, **options) -> dict:
    """Responses of an engine whose policy was changed three times, and its distance to the trainer; ``export`` is written.

    ``options``: of the rollout; ``vocab``: the prompts are of tokens below it.
    """
    from g2r_megatron.policy.correction import correct
    from g2r_megatron.policy.export import export_policy
    from g2r_megatron.policy.log_probs import TokenSequence
    from g2r_megatron.workers import build_engine

    trainer, config = policy_of(layout, path, **options)
    engine = build_engine(config, trainer, {2})
    prompts = requests(vocab)
    engine.generate(prompts, temperature=0.0)  # fills the prefix cache with what is about to be old
    with torch.no_grad():
        for update in range(UPDATES):
            for name, parameter in trainer.model.named_parameters():
                parameter.mul_(1.1 + 0.1 * update if "layers.1" in name else 0.95)
            engine.take_weights()
    export_policy(trainer.model, Path(export))
    sampled = engine.generate(prompts)
    sequences = [TokenSequence(r.prompt_ids, s.token_ids) for r, s in zip(prompts, sampled, strict=True)]
    ours = trainer.log_probs(sequences, [list(range(len(sequences)))])
    apart = correct(ours, [torch.tensor(s.log_probs) for s in sampled], config.rollout).metrics
    return {
        "greedy": [s[:2] for s in engine.generate(prompts, temperature=0.0)],
        "sampled": [s[:2] for s in sampled],
        "error": apart["rollout/sync_error"],
        "version": engine.version,
    }


def fresh_engine(export: str) -> list:
    """What a vLLM that loads the exported directory itself says, without any of our engine."""
    from g2r_megatron.rollout.vllm.environment import set_environment

    set_environment()
    from vllm import LLM, SamplingParams

    llm = LLM(
        export,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=192,
        kv_cache_memory_bytes=64 << 20,
        dtype="float32",
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=LIMIT, stop_token_ids=[2], ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": r.prompt_ids} for r in requests()], greedy, use_tqdm=False)
    return [(list(o.outputs[0].token_ids), o.outputs[0].finish_reason == "stop") for o in outputs]


def canary_message(path: str, sabotaged: str) -> str:
    """What the canary says when ``sabotaged`` is left out of a synchronisation; "" when it says nothing."""
    from g2r_megatron.errors import RunError
    from g2r_megatron.model.safetensors_files import SafetensorsReader
    from g2r_megatron.rollout.vllm import receiver
    from g2r_megatron.rollout.vllm.transfer import check_sum
    from g2r_megatron.workers import build_engine

    trainer, config = policy_of(Layout(), path)
    load, pack = receiver.WeightReceiver.g2r_load, receiver.pack_what_reload_leaves
    if sabotaged == "packing":
        receiver.pack_what_reload_leaves = lambda model: None
    else:
        start = SafetensorsReader(Path(path))

        def load_old(self, bucket):  # one tensor always has the content of the start weights, whose check sum it gets
            content = [(n, start.read(n, None, None) if n == sabotaged else t) for n, t, _ in bucket]
            load(self, [(n, t, check_sum(t)) for n, t in content])

        receiver.WeightReceiver.g2r_load = load_old
    try:
        build_engine(config, trainer, {2})
    except RunError as error:
        return str(error)
    finally:
        receiver.WeightReceiver.g2r_load, receiver.pack_what_reload_leaves = load, pack
    return ""


# The tests.


def by_transformers(export: str, vocab: int = 380) -> list:
    """What transformers generates greedily from the exported directory."""
    model, found = AutoModelForCausalLM.from_pretrained(export), []
    for request in requests(vocab):
        ids = torch.tensor([request.prompt_ids])
        mask = torch.ones_like(ids)  # else tokens 0 are taken for padding
        whole = model.generate(
            ids, attention_mask=mask, max_new_tokens=LIMIT, do_sample=False, eos_token_id=2, pad_token_id=0
        )
        response = whole[0, len(request.prompt_ids) :].tolist()
        found.append((response, response[-1] == 2))
    return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """``tiny(name)``: a model of ``MODELS``, built once."""
    built: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in built:
            family, more = MODELS[name]
            built[name] = build_tiny_hf(family, tmp_path_factory.mktemp(name), **HEADS_OF_32, **more)
        return built[name]

    return get


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_updated_engine_says_what_the_exported_weights_say(worlds, tiny, tmp_path, layout, name):
    """Greedy, after three visible updates and with a filled prefix cache; its log-probs are the trainer's to 1e-4."""
    export = str(tmp_path / "export")
    results = worlds.on(layout, updated_engine, str(tiny(name)), export)
    worlds.close()  # one engine a process: the end of one takes torch.distributed with it
    expected = by_transformers(export)
    if layout == "tp1pp1" and name in ("qwen2", "qwen3_moe"):
        assert worlds[1].run(fresh_engine, export)[0] == expected
        worlds.close()
    for result in results:
        assert result["greedy"] == expected
        assert result["sampled"] == results[0]["sampled"] != expected
        assert result["error"] < 1e-4
        assert result["version"] >= UPDATES


@pytest.mark.parametrize(
    ("name", "sabotaged", "named"),
    [
        ("qwen2", "packing", "model.embed_tokens.weight"),
        ("qwen3_moe", "model.layers.1.mlp.experts.3.down_proj.weight", "model.layers.1.mlp.experts.3.down_proj.weight"),
        ("qwen3", "model.layers.1.self_attn.k_norm.weight", "model.layers.1.self_attn.k_norm.weight"),
    ],
)
def test_a_weight_that_does_not_arrive_is_named(worlds, tiny, name, sabotaged, named):
    """A tied output layer that vLLM's own reload leaves out on a CPU, and tensors whose new content is lost."""
    message = worlds[1].run(canary_message, str(tiny(name)), sabotaged)[0]
    worlds.close()
    assert "does not sample with the policy's weights" in message
    assert named in message.split("not arrived: ")[1]
    assert "model.layers.0.self_attn.q_proj.weight" not in message


def test_experts_that_are_not_packed_are_seen(worlds, tiny):
    """Without our packing vLLM's reload leaves experts in a form that its kernels misread; no tensor alone explains it."""
    message = worlds[1].run(canary_message, str(tiny("qwen3_moe")), "packing")[0]
    worlds.close()
    assert "does not sample with the policy's weights" in message and "no single tensor explains it" in message
