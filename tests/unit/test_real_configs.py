"""Published models have exactly their published number of parameters, in transformers and in every rank of a layout.

The config.json files are the published ones. Megatron-Core models are built on the meta device by every rank of the
whole layout, one rank after the other in one process with fake process groups; what is counted are the parameters that
these ranks really have: shards once each, copies once, vocabulary padding not at all. Leaves out their values and what
they compute (test_parity_weights.py), and Transformer Engine's layers.
"""

import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from g2r_megatron.config.options import Layout, Precision

CONFIGS = Path(__file__).parents[1] / "real_configs"
SLOWEST_COUNT = 120.0  # seconds

PARAMETERS = {
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mixtral-8x7B-v0.1": 46_702_792_704,
}
# (model, ranks, layout): how one would run it
LAYOUTS = [
    ("Qwen2.5-1.5B", 4, Layout(tp=2, pp=2)),  # tied, over two stages
    ("Qwen2.5-7B", 8, Layout(tp=4, sp=True)),  # two data parallel replicas
    ("Qwen2.5-72B", 32, Layout(tp=8, pp=4, sp=True)),
    ("Qwen3-8B", 2, Layout(tp=2, sp=True)),
    ("Qwen3-30B-A3B", 8, Layout(tp=2, ep=8, sp=True)),
    ("Qwen3-235B-A22B", 64, Layout(tp=4, pp=8, ep=8, sp=True, stage_layers=[11, *[12] * 6, 11])),
    ("Llama-3.2-3B", 8, Layout(tp=4, sp=True)),
    ("Llama-3.1-8B", 8, Layout(tp=2, pp=4, vpp=2, sp=True)),
    ("Llama-3.1-70B", 32, Layout(tp=8, pp=4, vpp=5, sp=True)),
    ("Mistral-7B-v0.1", 4, Layout(tp=4)),
    ("Mixtral-8x7B-v0.1", 16, Layout(tp=2, pp=2, ep=4, etp=2, sp=True)),
]


@pytest.fixture(scope="module")
def process():
    """A process of its own for fake process groups: they are global, and other tests have real ones."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("forkserver")) as pool:
        yield pool


# In that process.


def real_shape(model, name: str, parameter: torch.Tensor) -> tuple[int, ...]:
    """The parameter's shape on this rank without rows that only pad the vocabulary."""
    if name not in ("embedding.word_embeddings.weight", "output_layer.weight"):
        return tuple(parameter.shape)
    rows, columns = parameter.shape
    first = model.groups.pgs.tp.rank() * rows
    return (max(0, min(rows, model.geometry.vocab - first)), columns)


def shards_of_rank(directory: str, layout: Layout) -> dict[tuple[str, int], tuple[int, ...]]:
    """{(name over the whole model, number of the tensor parallel shard): shape} of what this rank holds."""
    from g2r_megatron.model.build import build_empty_model
    from g2r_megatron.model.hf import open_hf_model
    from g2r_megatron.model.weights import is_expert
    from g2r_megatron.parallel.groups import build_groups, initialize

    initialize(seed=1)
    groups, hf = build_groups("policy", layout), open_hf_model(directory, "policy.model")
    with torch.device("meta"):
        model = build_empty_model("policy", hf, groups, Precision(dtype="bf16"), spec="torch")
    shards = {}
    for name, parameter in model.named_parameters():
        assert parameter.is_meta, name
        tp = groups.pgs.expt_tp if is_expert(name) else groups.pgs.tp
        if hf.geometry.tied and name == "output_layer.weight":  # the last stage's copy
            name = "embedding.word_embeddings.weight"
        shard = tp.rank() if getattr(parameter, "tensor_model_parallel", False) else 0
        shards[name, shard] = real_shape(model, name, parameter)
    return shards


def count(directory: str, ranks: int, layout: Layout) -> int:
    """Parameters of the whole model, from what each of ``ranks`` ranks holds."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    shards: dict[tuple[str, int], tuple[int, ...]] = {}
    for rank in range(ranks):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        try:
            for key, shape in shards_of_rank(directory, layout).items():
                assert shards.setdefault(key, shape) == shape, key  # copies agree
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
    return sum(torch.Size(shape).numel() for shape in shards.values())


# The tests.


def test_every_config_has_a_layout():
    assert {path.stem for path in CONFIGS.iterdir()} == PARAMETERS.keys() == {name for name, *_ in LAYOUTS}


@pytest.mark.parametrize("name", PARAMETERS)
def test_transformers_counts_the_published_parameters(name):
    """The files are the published ones as far as the count can tell, and transformers still reads them."""
    fields = json.loads((CONFIGS / f"{name}.json").read_text())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(("name", "ranks", "layout"), LAYOUTS, ids=[f"{n}-{r}_ranks" for n, r, _ in LAYOUTS])
def test_the_ranks_together_hold_the_published_parameters(process, tmp_path, name, ranks, layout):
    """On a layout that the model is run with; the config passes our own checks on the way."""
    shutil.copyfile(CONFIGS / f"{name}.json", tmp_path / "config.json")
    assert process.submit(count, str(tmp_path), ranks, layout).result(SLOWEST_COUNT) == PARAMETERS[name]
