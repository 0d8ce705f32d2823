"""Transformer Engine's own Python sources on a machine without a GPU: its compiled extension is a stub. Not a test.

    python tests/te_sources.py SOURCES MODEL_DIRECTORY     # prints one JSON object

Constructors, arguments, FP8 state and the checks of recipes are Transformer Engine's; the ``forward`` of its layers,
which would call kernels, is plain torch here, over a copy of the weights that is made when Transformer Engine would make
its FP8 copy. What a layer multiplies with is then seen to be of the weights as they are, or stale.
"""

import importlib
import importlib.util
import json
import os
import sys
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F

NOT_NEEDED = (
    "onnx",
    "onnxscript",
    "triton",
    "triton.language",
    "triton.language.standard",
)  # of its export to ONNX and of kernels


def import_transformer_engine(sources: str) -> None:
    """Import ``transformer_engine`` from ``sources`` without its shared libraries."""
    importlib.import_module("torch._inductor")  # before there is a stub of triton for it to find
    sys.path.insert(0, sources)
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its own way of not loading CUDA's libraries
    for compiled in ("transformer_engine_torch", *NOT_NEEDED):
        sys.modules[compiled] = MagicMock(name=compiled, __version__="3.7.0")
    extension = sys.modules["transformer_engine_torch"]
    extension.__all__ = ["get_cudnn_version"]
    extension.get_cudnn_version.return_value = 91400
    spec = importlib.util.find_spec("transformer_engine")
    package = importlib.util.module_from_spec(spec)
    sys.modules["transformer_engine"] = package
    importlib.import_module("transformer_engine.common").load_framework_extension = lambda framework: None
    spec.loader.exec_module(package)
    importlib.import_module("transformer_engine.pytorch")
    for stub in NOT_NEEDED:
        del sys.modules[stub]


@contextmanager
def gpu(major: int, minor: int, cuda: str):
    """Let Transformer Engine see a GPU of this compute capability, and a torch of this CUDA."""
    quantization = importlib.import_module("transformer_engine.pytorch.quantization")
    utils = importlib.import_module("transformer_engine.pytorch.utils")
    before = torch.cuda.get_device_properties, torch.version.cuda, torch.cuda.is_available
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(major=major, minor=minor)
    torch.version.cuda = cuda
    caches = [quantization.check_fp8_support, quantization.check_mxfp8_support]
    caches += [quantization.check_fp8_block_scaling_support, utils._get_device_compute_capability]
    for cached in caches:
        cached.cache_clear()
    try:
        yield
    finally:
        torch.cuda.get_device_properties, torch.version.cuda, torch.cuda.is_available = before
        for cached in caches:
            cached.cache_clear()


BUDGET = 64  # tokens of a row
RECIPES, MACHINES = (
    ("tensorwise", "blockwise", "mxfp8"),
    {
        "A100, CUDA 13.0": (8, 0, "13.0"),
        "H100, CUDA 12.8": (9, 0, "12.8"),
        "H100, CUDA 13.0": (9, 0, "13.0"),
        "B200, CUDA 13.0": (10, 0, "13.0"),
    },
)


def recipes() -> dict:
    """machine -> recipe -> what ``check_precision`` says: an empty string, or the error's line."""
    from g2r_megatron.config.options import Precision
    from g2r_megatron.errors import UserError
    from g2r_megatron.model.build import check_precision

    said: dict = {}
    for machine, properties in MACHINES.items():
        for recipe in RECIPES:
            with gpu(*properties):
                try:
                    check_precision("judge", Precision("bf16", recipe), "auto")
                    said.setdefault(machine, {})[recipe] = ""
                except UserError as error:
                    said.setdefault(machine, {})[recipe] = str(error)
    return said


class Layers:
    """Plain torch in place of kernels, and what is recorded of every product."""

    def __init__(self):
        self.products: list[tuple[bool, bool]] = []  # (a copy was made, the copy is of the weights as they are)
        self.attention: list[tuple[bool, str, int]] = []  # (training mode, layout of the tensors, queries)

    def weight(self, module, name: str, is_first_microbatch: bool | None) -> torch.Tensor:
        """The copy that the layer multiplies with: made anew in a first micro-batch, or when none is kept (None)."""
        current, kept = getattr(module, name), f"_copy_of_{name}"
        make = is_first_microbatch is not False or not hasattr(module, kept)
        if make:
            setattr(module, kept, current.detach().clone())
        self.products.append((make, torch.equal(getattr(module, kept), current)))
        return current

    def install(self) -> None:
        te = importlib.import_module("transformer_engine.pytorch")
        layers = self

        def linear(module, inp, is_first_microbatch=None, **_):
            out = F.linear(inp, layers.weight(module, "weight", is_first_microbatch))
            return (out, module.bias) if module.return_bias else out

        def norm(module, inp, *_, **__):
            return F.rms_norm(inp, inp.shape[-1:], module.weight, module.eps)

        def norm_linear(module, inp, is_first_microbatch=None, **_):
            normed = F.rms_norm(inp, inp.shape[-1:], module.layer_norm_weight, module.eps)
            return linear(module, normed, is_first_microbatch)

        def attend(module, query, key, value, *_, **options):
            layout = options.get("qkv_format", "sbhd")
            layers.attention.append((module.training, layout, query.size(0)))
            if layout == "sbhd":
                assert options["attn_mask_type"] == "causal"
                return causal(*(t.permute(1, 2, 0, 3) for t in (query, key, value))).permute(2, 0, 1, 3).flatten(2)
            ends = options["cu_seqlens_q"]
            lengths = ends.diff().tolist()
            assert options["attn_mask_type"] == "padding_causal" and ends.equal(options["cu_seqlens_kv"])
            assert ends.dtype == torch.int32 and ends[0] == 0 and ends[-1] == query.size(0)
            assert max(lengths) <= options["max_seqlen_q"] == options["max_seqlen_kv"] <= query.size(0)
            rows = zip(*(t.split(lengths) for t in (query, key, value)), strict=True)
            return torch.cat([causal(*(t.transpose(0, 1) for t in row)).transpose(0, 1) for row in rows]).flatten(1)

        def causal(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        te.Linear.forward, te.LayerNormLinear.forward, te.RMSNorm.forward = linear, norm_linear, norm
        te.DotProductAttention.forward = attend

    def since(self) -> dict:
        """What was recorded since the last call, counted."""
        found = {
            "products": len(self.products),
            "copies": sum(made for made, _ in self.products),
            "stale": sum(not fresh for _, fresh in self.products),
            "training": sorted({training for training, _, _ in self.attention}),
            "attention": sorted({(layout, queries) for _, layout, queries in self.attention}),
        }
        self.products, self.attention = [], []
        return found


def phases(path: str) -> dict:
    """phase -> what its products multiplied with; weights are changed before each phase but the update."""
    from g2r_megatron.config.options import JudgeConfig, Layout, Precision, RolloutConfig, TrainConfig
    from g2r_megatron.judge.frozen import FrozenJudge, Pass
    from g2r_megatron.judge.types import JudgeInput
    from g2r_megatron.model.build import build_model
    from g2r_megatron.model.hf import open_hf_model
    from g2r_megatron.parallel.groups import build_groups
    from g2r_megatron.policy.log_probs import TokenSequence, response_log_probs
    from g2r_megatron.policy.trainer import wrap_for_training
    from g2r_megatron.rollout.megatron import MegatronRolloutEngine
    from g2r_megatron.rollout.types import Request

    layers = Layers()
    layers.install()
    hf, groups = open_hf_model(path, "policy.model"), build_groups("policy", Layout())
    policy = build_model("policy", hf, groups, Precision("bf16", "tensorwise"), spec="te")
    judge = build_model("judge", hf, groups, Precision("bf16", "tensorwise"), spec="te")
    wrap_for_training(policy, TrainConfig().optimizer)
    engine = MegatronRolloutEngine(policy, RolloutConfig(max_response_tokens=4, batch_size=2), {-1})
    sequences = [TokenSequence(list(range(9)), list(range(7))) for _ in range(4)]
    micro_batches = [[0, 1], [2, 3]]

    def change() -> None:
        with torch.no_grad():
            for chunk in policy.chunks:
                for parameter in chunk.parameters():
                    parameter.mul_(1.01)

    def sample() -> None:
        engine.generate([Request(list(range(5)), str(i)) for i in range(4)])

    def old_log_probs() -> None:
        response_log_probs(policy, sequences, micro_batches, 1.0, BUDGET)

    def update() -> None:
        from g2r_megatron.model.schedule import forward_tokens, run_schedule
        from g2r_megatron.policy.log_probs import response_batch

        policy.train()
        batches = [response_batch(policy, sequences, items, BUDGET) for items in micro_batches]
        run_schedule(policy, batches, forward_tokens, lambda b, logits: (logits.sum(), None), backward=True)

    found = {}
    for name, work, changed in (
        ("sample", sample, True),
        ("old log-probs", old_log_probs, False),
        ("update", update, False),
        ("sample after an update", sample, True),
        ("old log-probs after an update", old_log_probs, True),
        ("update after an update", update, True),
    ):
        if changed:
            change()
        work()
        found[name] = layers.since()
    frozen = FrozenJudge(judge, JudgeConfig(target="logit_margin", attribution="grad_x_embed"), [5], [9])
    inputs = [JudgeInput(list(range(16 + i)), 4, 12, 15 + i) for i in range(2)]
    frozen.verdict_log_probs([[item] for item in inputs])
    found["verdicts"] = layers.since()
    frozen.token_gradients([Pass([item], [True], [1.0]) for item in inputs])
    found["attribution"] = layers.since()
    return found | {"layers": len(policy.chunks[0].decoder.layers)}


def arguments(path: str) -> dict:
    """What the layers of a model say of themselves once Megatron-Core has called their constructors."""
    from g2r_megatron.config.options import Layout, Precision
    from g2r_megatron.model.build import build_model
    from g2r_megatron.model.hf import open_hf_model
    from g2r_megatron.parallel.groups import build_groups

    groups = build_groups("judge", Layout())
    model = build_model("judge", open_hf_model(path, "judge.model"), groups, Precision("bf16", "blockwise"), spec="te")
    layer = model.chunks[0].decoder.layers[0]
    qkv, attention, down = layer.self_attention.linear_qkv, layer.self_attention.core_attention, layer.mlp.linear_fc2
    return {
        "classes": [type(m).__mro__[1].__module__.partition(".")[0] for m in (qkv, down)],
        "parameters": sorted(name for name, _ in layer.named_parameters()),
        "norm": [qkv.normalization, qkv.eps, qkv.zero_centered_gamma],
        "dtype": str(qkv.weight.dtype),
        "split": [qkv.parallel_mode, down.parallel_mode],
        "attention": [attention.num_attention_heads, attention.num_gqa_groups, attention.attn_mask_type],
        "dropout": attention.attention_dropout,
        "recipe": model.config.fp8_recipe,
        "token multiple": model.token_multiple,
    }


def packed_row(path: str) -> dict:
    """Attention of one layer over a row of sequences and one of trees: error against model/tree_attention.py, layouts."""
    from megatron.core.transformer.enums import AttnMaskType

    from g2r_megatron.config.options import Layout, Precision
    from g2r_megatron.model.build import build_model
    from g2r_megatron.model.hf import open_hf_model
    from g2r_megatron.model.tree_attention import row_structure, tree_attention
    from g2r_megatron.parallel.groups import build_groups

    layers, groups = Layers(), build_groups("policy", Layout())
    layers.install()
    model = build_model("policy", open_hf_model(path, "policy.model"), groups, Precision("bf16"), spec="te")
    attention = model.chunks[0].decoder.layers[0].self_attention.core_attention
    found = {}
    for name, trees in {"sequences": [(9, ()), (1, ()), (12, ())], "trees": [(9, (3, 4))]}.items():
        structure = row_structure(trees, 32)
        query, key, value = (torch.randn(32, 1, heads, 32, dtype=torch.bfloat16) for heads in (4, 2, 2))
        expected = tree_attention(*(t.permute(1, 2, 0, 3) for t in (query, key, value)), structure, None, None)
        got = attention(query, key, value, structure, AttnMaskType.causal)
        real = (structure[0] >= 0).view(-1, 1, 1)  # padding is 0 on a CPU
        error = (got * real - expected.permute(2, 0, 1, 3).flatten(2)).norm() / expected.norm()
        found[name] = {"error": error.item(), "attention": layers.since()["attention"]}
    return found


def main(sources: str, path: str) -> None:
    from g2r_megatron.parallel.cpu import import_megatron

    torch.cuda.is_bf16_supported = lambda *_, **__: True
    import_transformer_engine(sources)
    import_megatron()
    from g2r_megatron import device
    from g2r_megatron.model import build  # noqa: F401  has device's real functions
    from g2r_megatron.parallel.groups import initialize

    initialize(seed=1)
    device.on_cpu = lambda: True  # of device.py alone: tensors stay on the CPU when ``gpu`` shows one to all others
    found = {"recipes": recipes()}
    with gpu(*MACHINES["H100, CUDA 13.0"]):
        found |= {"arguments": arguments(path), "phases": phases(path), "packed": packed_row(path)}
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
