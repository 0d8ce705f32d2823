"""Parameters of each pipeline stage: counted in the real model on the meta device, or by formula for a search.

The formula is tested to give what the real model has, for every config and layout of the tests.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from g2r_megatron.config.layout import data_parallel_size, stage_layers
from g2r_megatron.config.options import Dtype, Layout
from g2r_megatron.model.hf import HFModel


@dataclass(frozen=True)
class Stage:
    """What one rank of a pipeline stage holds: its share of the parameters, by kind. All ranks of the stage are alike.

    ``vocabulary``: embedding and output layer; ``experts``: sharded over other ranks than the rest; ``layers``: of each
    virtual stage; ``moe_layers``: how many of them have experts.
    """

    dense: int
    vocabulary: int
    experts: int
    layers: tuple[int, ...]
    moe_layers: int

    @property
    def total(self) -> int:
        return self.dense + self.vocabulary + self.experts

    @property
    def layer_count(self) -> int:
        return sum(self.layers)


@contextmanager
def fake_world(rank: int, ranks: int) -> Iterator[None]:
    """A process group of ``ranks`` ranks in one process. It sends nothing and uses no device."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from g2r_megatron.parallel.groups import initialize

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        initialize(seed=1)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def built_stages(name: str, hf: HFModel, layout: Layout, dtype: Dtype, ranks: int) -> list[Stage]:
    """The model's stages on ``ranks`` ranks, each counted in the model that training builds, without its memory.

    Raises ``UserError`` where training would. The layers are the plain torch ones: Transformer Engine's have the same
    parameters. Stages with the same layers are built once.
    """
    stages: list[Stage] = []
    built: dict[tuple, Stage] = {}
    for stage in range(layout.pp):
        kind: tuple = ()  # of the first stage; building that one finds errors of the layout
        if stage:
            layers = [hf.geometry.is_moe(i) for i in _layers_of_stage(hf, layout, stage)]
            chunks = stage_layers(layout, hf.geometry.layers)[stage :: layout.pp]
            kind = (stage == layout.pp - 1, *layers, *chunks)
        if kind not in built:
            built[kind] = _built_stage(name, hf, layout, dtype, ranks, stage * (ranks // layout.pp))
        stages.append(built[kind])
    return stages


def _layers_of_stage(hf: HFModel, layout: Layout, stage: int) -> list[int]:
    """Numbers of the layers of a pipeline rank, of all its virtual stages."""
    split = stage_layers(layout, hf.geometry.layers)
    return [i for n in range(stage, len(split), layout.pp) for i in range(sum(split[:n]), sum(split[: n + 1]))]


def _built_stage(name: str, hf: HFModel, layout: Layout, dtype: Dtype, ranks: int, rank: int) -> Stage:
    import torch

    from g2r_megatron.config.options import Precision
    from g2r_megatron.model.build import build_empty_model
    from g2r_megatron.model.weights import is_expert
    from g2r_megatron.parallel.groups import build_groups

    with fake_world(rank, ranks):
        groups = build_groups(name, layout)
        with torch.device("meta"):
            model = build_empty_model(name, hf, groups, Precision(dtype=dtype), spec="torch")
        counts = {"dense": 0, "vocabulary": 0, "experts": 0}
        for parameter_name, parameter in model.named_parameters():
            if is_expert(parameter_name):
                kind = "experts"
            elif parameter_name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                kind = "vocabulary"
            else:
                kind = "dense"
            counts[kind] += parameter.numel()
        layers = tuple(len(chunk.decoder.layers) for chunk in model.chunks)
        moe = sum(
            hf.geometry.is_moe(offset + i)
            for offset, count in zip(model.layer_offsets, layers, strict=True)
            for i in range(count)
        )
    return Stage(**counts, layers=layers, moe_layers=moe)


def expected_stages(hf: HFModel, layout: Layout, ranks: int) -> list[Stage]:
    """What ``built_stages`` finds, from the sizes alone (in microseconds). Assumes a layout that fits the model."""
    g, t = hf.geometry, layout.tp
    query, key_value = g.heads * g.head_dim, g.kv_heads * g.head_dim
    attention = g.hidden * (2 * query + 2 * key_value) // t + g.hidden
    attention += (query + 2 * key_value) // t if hf.family.qkv_bias else 0
    attention += 2 * g.head_dim if hf.family.qk_norm else 0
    dense_mlp = 3 * g.hidden * g.ffn // t + g.hidden
    sparse_mlp = g.hidden * g.experts + g.hidden
    experts = 3 * g.hidden * (g.expert_ffn // layout.etp) * (g.experts // layout.ep)
    rows = g.padded_vocab(t, data_parallel_size(layout, ranks)) // t
    split = stage_layers(layout, g.layers)
    stages = []
    for p in range(layout.pp):
        layers = _layers_of_stage(hf, layout, p)
        moe = sum(g.is_moe(i) for i in layers)
        first, last = p == 0, p == layout.pp - 1
        copies = first + last - (first and last and g.tied)
        stages.append(
            Stage(
                dense=len(layers) * attention + moe * sparse_mlp + (len(layers) - moe) * dense_mlp + last * g.hidden,
                vocabulary=copies * rows * g.hidden,
                experts=moe * experts,
                layers=tuple(split[p :: layout.pp]),
                moe_layers=moe,
            )
        )
    return stages
