"""Hugging Face -> Megatron-Core -> Hugging Face is bitwise the identity, and the models compute the same logits.

On every layout, for every family: tied and untied embeddings, QKV bias, q/k norm, llama3 and linear rope scaling, a
prime vocabulary (padded over TP), fewer key-value heads than TP ranks, fp32 and bf16 files, one file and many.
Logits: fp32, relative error 1e-5. Leaves out refusals of bad checkpoints and Transformer Engine's layers.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from distributed import LAYOUTS, groups_of
from g2r_megatron.config import Layout, Precision
from tiny_models import FAMILIES

LENGTHS = [90, 17, 64, 3]  # past the 64 positions from which llama3 rope scaling changes the angles
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
# name -> (family it is made from, changes to its config, dtype of the files, size of a file)
CHECKPOINTS = {family: (family, {}, torch.float32, "1GB") for family in FAMILIES} | {
    "qwen2_untied": ("qwen2", {"tie_word_embeddings": False}, torch.float32, "50KB"),
    "qwen3_tied_wide_heads": ("qwen3", {"tie_word_embeddings": True, "head_dim": 32}, torch.bfloat16, "1GB"),
    "llama_tied_linear_rope": (
        "llama3",
        {"tie_word_embeddings": True, "rope_parameters": LINEAR_ROPE},
        torch.bfloat16,
        "50KB",
    ),
    "qwen2_one_kv_head": ("qwen2", {"num_key_value_heads": 1, "vocab_size": 61}, torch.bfloat16, "1GB"),
}


@pytest.fixture(scope="module")
def checkpoint(tiny_hf, tmp_path_factory):
    """``checkpoint(name)`` -> the directory of one of CHECKPOINTS, written once by transformers."""
    written: dict[str, Path] = {}

    def get(name: str) -> Path:
        family, changes, dtype, shard = CHECKPOINTS[name]
        if name == family:
            return tiny_hf(family)
        if name not in written:
            config = AutoConfig.from_pretrained(tiny_hf(family), **changes)
            model = AutoModelForCausalLM.from_config(config)
            generator = torch.Generator().manual_seed(7)
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data = (0.1 * noise if parameter.dim() == 2 else 0.5 + 0.2 * noise).to(dtype)
            written[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(written[name], max_shard_size=shard)
        return written[name]

    return get


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def token_ids(vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, vocab, (length,), generator=generator).tolist() for length in LENGTHS]


def hf_logits(directory: Path, dtype: torch.dtype) -> list[torch.Tensor]:
    """[T, vocab] fp32 of every sequence, one at a time."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0].float() for ids in token_ids(model.config.vocab_size)]


# In the ranks.


def build(layout: Layout, path: str, dtype: str):
    from g2r_megatron.model.build import build_model
    from g2r_megatron.model.hf import open_hf_model

    return build_model("policy", open_hf_model(path, "policy.model"), groups_of(layout), Precision(dtype=dtype))


def export(layout: Layout, path: str, output: str, dtype: str) -> None:
    import torch.distributed as dist

    from g2r_megatron.model.weights import iterate_hf_tensors, save_hf

    model = build(layout, path, dtype)
    tensors = iterate_hf_tensors(model.gpt, model.hf, model.groups, model.layer_offset)
    if dist.get_rank() == 0:
        save_hf(tensors, model.hf, Path(output), model.config.params_dtype)
    else:
        assert list(tensors) == []


def logits(layout: Layout, path: str, selected: bool):
    """Logits of every sequence, two to a micro-batch: [(index, [T][vocab])] on the ranks that have them.

    ``selected``: asked for by ``logit_rows``, else the whole padded [b, s, vocab].
    """
    import torch.distributed as dist

    from g2r_megatron.model.schedule import run_schedule, token_batch

    model = build(layout, path, "fp32")
    vocab, pgs = model.geometry.vocab, model.groups.pgs
    ids = token_ids(vocab)
    batches = [token_batch(model, ids, [range(n) for n in LENGTHS], items) for items in ([0, 1], [2, 3])]

    def forward(batch):
        rows = batch.logit_rows if selected else None
        return model.module(batch.input_ids, None, None, logit_rows=rows)

    def collect(batch, output):
        shards = [torch.empty_like(output) for _ in range(pgs.tp.size())]
        dist.all_gather(shards, output.contiguous(), group=pgs.tp)
        full = torch.cat(shards, dim=-1)[..., :vocab]
        lengths = [LENGTHS[i] for i in batch.items]
        parts = full.split(lengths) if selected else [row[:n] for row, n in zip(full, lengths, strict=True)]
        return None, [(i, part.numpy().copy()) for i, part in zip(batch.items, parts, strict=True)]

    model.module.eval()
    with torch.no_grad():
        return [row for rows in run_schedule(model, batches, forward, collect, backward=False) for row in rows]


def bytes_read(layout: Layout, path: str) -> tuple[int, int, list[str]]:
    """(bytes asked of the files, bytes of this rank's weights without padded vocabulary rows, tensors read)."""
    from g2r_megatron.model.hf import SafetensorsReader

    read, log = SafetensorsReader.read, []

    def logged(self, name, *args):
        part = read(self, name, *args)
        log.append((name, part.nbytes))
        return part

    SafetensorsReader.read = logged
    try:
        model = build(layout, path, "fp32")
    finally:
        SafetensorsReader.read = read
    g, tp = model.geometry, model.groups.pgs.tp
    rows = g.padded_vocab(tp.size(), model.groups.dp_size) // tp.size()
    padding = max(0, (tp.rank() + 1) * rows - g.vocab)
    weights = 0
    for name, parameter in model.gpt.named_parameters():
        weights += parameter.nbytes
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            weights -= padding * g.hidden * parameter.element_size()
    return sum(size for _, size in log), weights, [name for name, _ in log]


# The tests.


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_is_bitwise(worlds, checkpoint, tmp_path, layout, name):
    """Loaded in the files' precision and written again: same tensors bit for bit, same logits in transformers."""
    source, dtype = checkpoint(name), CHECKPOINTS[name][2]
    worlds.on(layout, export, str(source), str(tmp_path / "out"), "fp32" if dtype == torch.float32 else "bf16")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == dtype and torch.equal(after[key], tensor), key
    if layout == "tp2pp2sp":
        for a, b in zip(hf_logits(source, dtype), hf_logits(tmp_path / "out", dtype), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["tp1pp1", "tp2pp2sp"])
def test_precision_other_than_the_files(worlds, checkpoint, tmp_path, layout):
    """bf16 files in an fp32 model keep their values; fp32 ones in a bf16 model are rounded once; config.json agrees."""
    for name, precision, dtype in (
        ("llama_tied_linear_rope", "fp32", torch.float32),
        ("qwen2", "bf16", torch.bfloat16),
    ):
        output = tmp_path / name
        worlds.on(layout, export, str(checkpoint(name)), str(output), precision)
        before, after = tensors_of(checkpoint(name)), tensors_of(output)
        assert before.keys() == after.keys()
        assert all(torch.equal(after[key], before[key].to(dtype)) for key in before)
        assert AutoConfig.from_pretrained(output).dtype == dtype


@pytest.mark.parametrize("selected", [True, False], ids=["selected_rows", "all_rows"])
@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_transformers(worlds, checkpoint, layout, name, selected):
    """fp32 logits through the pipeline schedule, padded micro-batches and all, to 1e-5 of their norm."""
    expected = hf_logits(checkpoint(name), torch.float32)
    found = [dict(part) for part in worlds.on(layout, logits, str(checkpoint(name)), selected) if part]
    processes, sizes = LAYOUTS[layout]
    assert len(found) == processes // sizes.pp  # each rank of the last stage
    worst = 0.0
    for part in found:
        for i, reference in enumerate(expected):
            worst = max(worst, ((torch.tensor(part[i]) - reference).norm() / reference.norm()).item())
    print({"logits": f"{worst:.1e}"})
    assert worst <= 1e-5


@pytest.mark.parametrize("name", ["qwen2", "qwen2_untied", "qwen3", "llama3"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_rank_reads_only_its_slices(worlds, checkpoint, layout, name):
    """Bytes asked of the files are exactly those of the rank's own weights; other stages' layers are not touched."""
    config = json.loads((checkpoint(name) / "config.json").read_text())
    per_stage = config["num_hidden_layers"] // LAYOUTS[layout][1].pp
    for read, weights, names in worlds.on(layout, bytes_read, str(checkpoint(name))):
        assert read == weights
        layers = {int(n.split(".")[2]) for n in names if n.startswith("model.layers.")}
        assert len(layers) == per_stage
