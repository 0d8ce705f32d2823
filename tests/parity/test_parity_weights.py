"""Hugging Face -> Megatron-Core -> Hugging Face is bitwise the identity, and the models compute the same logits.

On every layout, for every family: tied and untied embeddings, QKV bias, q/k norm, llama3 and linear rope scaling,
sliding windows in all layers or some, experts in all layers or some and stored one by one or together, a prime
vocabulary (padded over TP), fewer key-value heads than TP ranks, fp32 and bf16 files, one file and many. Logits: fp32,
relative error 1e-5. Leaves out refusals of bad checkpoints and Transformer Engine's layers.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from distributed import ALL_LAYOUTS, EXPERT_LAYOUTS, LAYOUTS, STAGE_LAYOUTS, fits, groups_of, padded_batch
from g2r_megatron.config.options import Layout, Precision
from tiny_models import FAMILIES

LENGTHS = [90, 17, 64, 3]  # past the 64 positions from which llama3 rope scaling changes the angles
FP32, BF16 = torch.float32, torch.bfloat16
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
MOE = ("qwen3_moe", "mixtral")
# name -> (family it is made from, changes to its config, dtype of the files, size of a file)
CHECKPOINTS = {family: (family, {}, FP32, "1GB") for family in FAMILIES} | {
    "qwen2_untied": ("qwen2", {"tie_word_embeddings": False}, FP32, "50KB"),
    "qwen3_tied_wide_heads": ("qwen3", {"tie_word_embeddings": True, "head_dim": 32}, BF16, "1GB"),
    "llama_tied_linear_rope": ("llama3", {"tie_word_embeddings": True, "rope_parameters": LINEAR_ROPE}, BF16, "50KB"),
    "qwen2_one_kv_head": ("qwen2", {"num_key_value_heads": 1, "vocab_size": 61}, BF16, "1GB"),
    "qwen2_half_windowed": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 20, "layer_types": ["full_attention", "sliding_attention"] * 2},
        FP32,
        "1GB",
    ),
    "qwen3_moe_some_layers": (
        "qwen3_moe",
        {"mlp_only_layers": [2], "norm_topk_prob": False, "tie_word_embeddings": True},
        BF16,
        "100KB",
    ),
    "mixtral_windowed": ("mixtral", {"sliding_window": 20, "num_key_value_heads": 4}, BF16, "1GB"),
    "qwen2_8": ("qwen2", {"num_hidden_layers": 8, "layer_types": ["full_attention"] * 8}, FP32, "1GB"),
    "qwen3_moe_8": ("qwen3_moe", {"num_hidden_layers": 8}, BF16, "1GB"),
}
FUSED = ("qwen3_moe_some_layers", "mixtral")  # also written with all experts of a layer in one tensor


def layers_of(name: str) -> int:
    return CHECKPOINTS[name][1].get("num_hidden_layers", 4)


CASES = [
    (layout, name)
    for layout in LAYOUTS | EXPERT_LAYOUTS | STAGE_LAYOUTS
    for name in CHECKPOINTS
    if fits(layout, layers=layers_of(name), moe=CHECKPOINTS[name][0] in MOE)
]


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
                parameter.data = (0.1 * noise if parameter.dim() > 1 else 0.5 + 0.2 * noise).to(dtype)
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


@pytest.fixture(scope="module")
def reference(checkpoint):
    """``reference(name)`` -> transformers' fp32 logits, computed once."""
    computed: dict[str, list[torch.Tensor]] = {}

    def get(name: str) -> list[torch.Tensor]:
        if name not in computed:
            computed[name] = hf_logits(checkpoint(name), FP32)
        return computed[name]

    return get


# In the ranks.


def build(layout: Layout, path: str, dtype: str):
    from g2r_megatron.model.build import build_model
    from g2r_megatron.model.hf import open_hf_model

    return build_model("policy", open_hf_model(path, "policy.model"), groups_of(layout), Precision(dtype=dtype))


def export(layout: Layout, path: str, output: str, dtype: str) -> None:
    import torch.distributed as dist

    from g2r_megatron.model.write_hf import iterate_hf_tensors, save_hf

    model = build(layout, path, dtype)
    tensors = iterate_hf_tensors(model)
    if dist.get_rank() == 0:
        save_hf(tensors, model.hf, Path(output), model.config.params_dtype)
    else:
        assert list(tensors) == []


def logits(layout: Layout, path: str, selected: bool):
    """Logits of every sequence, two to a micro-batch: [(index, [T][vocab])] on the ranks that have them.

    ``selected``: asked for by ``logit_rows``, else the whole padded [b, s, vocab].
    """
    import torch.distributed as dist

    from g2r_megatron.model.schedule import run_schedule

    model = build(layout, path, "fp32")
    vocab, pgs = model.geometry.vocab, model.groups.pgs
    ids = token_ids(vocab)
    plan = [[0, 1], [2, 3]] + [[]] * (pgs.pp.size() - 2 if layout.vpp else 0)  # as many as replica_plan would give
    batches = [padded_batch(model, ids, [range(n) for n in LENGTHS], items) for items in plan]

    def forward(module, batch):
        return module(batch.input_ids, None, None, logit_rows=batch.logit_rows if selected else None)

    def collect(batch, output):
        shards = [torch.empty_like(output) for _ in range(pgs.tp.size())]
        dist.all_gather(shards, output.contiguous(), group=pgs.tp)
        full = torch.cat(shards, dim=-1)[..., :vocab]
        lengths = [LENGTHS[i] for i in batch.items]
        parts = full.split(lengths) if selected else [row[:n] for row, n in zip(full, lengths, strict=True)]
        return None, [(i, part.numpy().copy()) for i, part in zip(batch.items, parts, strict=True)]

    model.train(False)
    with torch.no_grad():
        return [row for rows in run_schedule(model, batches, forward, collect, backward=False) for row in rows]


def bytes_read(layout: Layout, path: str) -> tuple[int, int, set[int]]:
    """(bytes asked of the files, bytes of this rank's weights without padded vocabulary rows, layers read)."""
    from g2r_megatron.model.safetensors_files import SafetensorsReader

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
    for name, parameter in model.named_parameters():
        weights += parameter.nbytes
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            weights -= padding * g.hidden * parameter.element_size()
    layers = {int(name.split(".")[2]) for name, _ in log if name.startswith("model.layers.")}
    return sum(size for _, size in log), weights, layers


def transfer_counts(layout: Layout, path: str) -> dict:
    """Of one passing of all weights to this rank's engine: most bytes held, bytes on a link of each group, the bucket's size.

    A link between two ranks of a group carries at most what the group's collectives carry. Counted are tensors, those of
    headers too, as torch's operations make them; what gloo holds itself is not seen.
    """
    import torch.distributed as dist
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from g2r_megatron.rollout.vllm.transfer import check_sum
    from g2r_megatron.rollout.vllm.weights import all_buckets, replica_buckets

    class Counts(TorchDispatchMode):
        def __init__(self, known):
            super().__init__()
            self.known, self.made, self.peak = {t.untyped_storage()._cdata for t in known}, {}, 0
            self.links: dict[str, int] = {}

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            name = str(function)
            tensors = [t for t in tree_leaves((args, result)) if isinstance(t, torch.Tensor)]
            for tensor in tensors:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            del tensor, tensors, storage
            self.made = {key: kept for key, kept in self.made.items() if not kept[0].expired()}
            self.peak = max(self.peak, sum(size for _, size in self.made.values()))
            if name.startswith("c10d."):
                group = next(a for a in args if type(a).__name__ == "ScriptObject")
                group = dist.ProcessGroup.unbox(group).group_name
                sent = [t for t in tree_leaves(args[0]) if isinstance(t, torch.Tensor)]
                self.links[group] = self.links.get(group, 0) + sum(t.nbytes for t in sent)
            return result

    model = build(layout, path, "fp32")
    largest = max(parameter.nbytes for _, parameter in model.named_parameters())
    total, size = sum(t.nbytes for bucket in all_buckets(model) for _, t, _ in bucket), 2 * 2 * largest
    with Counts([parameter for _, parameter in model.named_parameters()]) as counts, torch.no_grad():
        for bucket in replica_buckets(model, size):
            assert all(check_sum(tensor) == sent for _, tensor, sent in bucket)
    return {"held": counts.peak / size, "links": [count / total for count in counts.links.values()]}


# The tests.


@pytest.mark.parametrize(("layout", "name"), [("tp2pp2sp", "qwen2_untied"), ("pp2_ep2", "qwen3_moe")])
def test_what_passing_the_weights_to_engines_costs(worlds, checkpoint, layout, name):
    """At most two buckets are held beside the model, and no link carries more than 1.1 times the model's bytes."""
    for counts in worlds.on(layout, transfer_counts, str(checkpoint(name))):
        assert 0.1 < counts["held"] <= 2
        assert 0.1 < max(counts["links"]) <= 1.1


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_round_trip_is_bitwise(worlds, checkpoint, tmp_path, layout, name):
    """Loaded in the files' precision and written again: same tensors bit for bit, same logits in transformers."""
    source, dtype = checkpoint(name), CHECKPOINTS[name][2]
    worlds.on(layout, export, str(source), str(tmp_path / "out"), "fp32" if dtype == FP32 else "bf16")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == dtype and torch.equal(after[key], tensor), key
    if layout in ("tp2pp2sp", "tp2sp_ep2_etp2"):
        for a, b in zip(hf_logits(source, dtype), hf_logits(tmp_path / "out", dtype), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["tp1pp1", "ep2", "tp2sp_ep2_etp2", "pp2_uneven_etp2"])
@pytest.mark.parametrize("name", FUSED)
def test_experts_in_one_tensor_are_read_and_written_as_such(worlds, checkpoint, tmp_path, layout, name):
    """Files with transformers' own fused expert tensors: same values as one by one, same form after the round trip."""
    dtype, fused = CHECKPOINTS[name][2], tmp_path / "fused"
    model = AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype=dtype)
    model.config.save_pretrained(fused)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    save_file({n: t for n, t in model.state_dict().items() if n not in tied}, fused / "model.safetensors")
    worlds.on(layout, export, str(fused), str(tmp_path / "out"), "fp32" if dtype == FP32 else "bf16")
    before, after = tensors_of(fused), tensors_of(tmp_path / "out")
    assert any(key.endswith("experts.gate_up_proj") for key in before) and before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    if layout == "ep2":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).state_dict()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("layout", ["tp1pp1", "tp2pp2sp"])
def test_precision_other_than_the_files(worlds, checkpoint, tmp_path, layout):
    """bf16 files in an fp32 model keep their values; fp32 ones in a bf16 model are rounded once; config.json agrees."""
    for name, precision, dtype in (("llama_tied_linear_rope", "fp32", FP32), ("qwen2", "bf16", BF16)):
        output = tmp_path / name
        worlds.on(layout, export, str(checkpoint(name)), str(output), precision)
        before, after = tensors_of(checkpoint(name)), tensors_of(output)
        assert before.keys() == after.keys()
        assert all(torch.equal(after[key], before[key].to(dtype)) for key in before)
        assert AutoConfig.from_pretrained(output).dtype == dtype


def worst_error(found: list[dict], expected: list[torch.Tensor]) -> float:
    """Largest relative error of any sequence's logits on any rank."""
    errors = [
        ((torch.tensor(part[i]) - logits).norm() / logits.norm()).item()
        for part in found
        for i, logits in enumerate(expected)
    ]
    return max(errors)


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_logits_equal_transformers(worlds, reference, checkpoint, layout, name):
    """fp32 logits through the pipeline schedule, padded micro-batches and all, to 1e-5 of their norm."""
    processes, sizes = ALL_LAYOUTS[layout]
    for selected in (True, False) if name in ("qwen2", "qwen3_moe") else (True,):
        found = [dict(part) for part in worlds.on(layout, logits, str(checkpoint(name)), selected) if part]
        assert len(found) == processes // sizes.pp  # each rank of the last stage
        worst = worst_error(found, reference(name))
        print({"logits": f"{worst:.1e}"})
        assert worst <= 1e-5


@pytest.mark.parametrize(
    ("layout", "name"),
    [case for case in CASES if case[1] in ("qwen2", "qwen2_untied", "qwen3", "qwen3_moe", "qwen2_8")],
)
def test_each_rank_reads_only_its_slices(worlds, checkpoint, layout, name):
    """Bytes asked of the files are exactly those of the rank's own weights; other stages' layers are not touched."""
    layers = json.loads((checkpoint(name) / "config.json").read_text())["num_hidden_layers"]
    sizes = ALL_LAYOUTS[layout][1]
    touched = []
    for read, weights, of_rank in worlds.on(layout, bytes_read, str(checkpoint(name))):
        assert read == weights
        touched.append(of_rank)
    assert set().union(*touched) == set(range(layers))
    assert sum(map(len, touched)) * sizes.pp == layers * len(touched)
