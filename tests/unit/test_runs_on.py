"""What a run runs on: no silent fallback on a GPU, and a line that says which layers, experts and optimizer there are.

The GPU is torch.cuda.is_available's word. Leaves out Transformer Engine's classes (test_te_sources.py).
"""

import json

import pytest
import torch

from g2r_megatron import runs_on
from g2r_megatron.config.options import Layout, Precision, TrainConfig
from g2r_megatron.errors import UserError
from g2r_megatron.model.build import check_fp8_widths, spec_backend
from g2r_megatron.model.hf import open_hf_model
from g2r_megatron.model.torch_layers import TorchSpecProvider


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize(("spec", "dtype"), [("auto", "bf16"), ("te", "bf16"), ("te", "fp32")])
def test_a_gpu_without_transformer_engine_is_refused(gpu, spec, dtype):
    """Never plain torch by itself, whose experts run one after the other."""
    if runs_on.installed("transformer-engine"):
        pytest.skip("Transformer Engine is installed here")
    with pytest.raises(
        UserError, match=f"policy.spec: {spec} with {dtype} on a GPU needs Transformer Engine.*spec torch"
    ):
        spec_backend("policy", spec, dtype)


@pytest.mark.parametrize(("spec", "dtype"), [("torch", "bf16"), ("torch", "fp32"), ("auto", "fp32")])
def test_plain_torch_runs_where_it_is_asked_for(gpu, spec, dtype):
    assert isinstance(spec_backend("policy", spec, dtype), TorchSpecProvider)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=4)])
def test_fp8_widths(tiny_hf, layout):
    """A feed-forward size of 96 over 4 ranks is 24, which FP8 kernels do not take."""
    hf = open_hf_model(str(tiny_hf("qwen2")), "judge.model")
    check_fp8_widths("judge", hf, layout, Precision("bf16", "none"))
    if layout.tp == 1:
        check_fp8_widths("judge", hf, layout, Precision("bf16", "tensorwise"))
        return
    with pytest.raises(UserError, match="tensorwise with a feed-forward size over tp 4 of 24, not a multiple of 16"):
        check_fp8_widths("judge", hf, layout, Precision("bf16", "tensorwise"))


def test_the_line_and_the_record(tiny_hf, tmp_path, monkeypatch):
    """Experts are named by the class that they are built of, the optimizer by its module."""
    monkeypatch.setattr(runs_on.dist, "get_world_size", lambda: 3)
    dense, sparse = (open_hf_model(str(tiny_hf(family)), "policy.model") for family in ("qwen3", "qwen3_moe"))
    config = TrainConfig()
    config.judge.ranks = 2
    adam = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    facts = runs_on.runs_on(config, dense, sparse, adam)
    line = runs_on.line_of(facts)
    assert "runs on 5 x CPU, torch " + torch.__version__ in line and "\n" not in line
    assert "policy: plain torch, fp32; judge: plain torch, fp32, one by one (SequentialMLP)" in line
    assert line.endswith("Adam: torch.optim.adamw.AdamW")
    for _ in range(2):
        runs_on.record(tmp_path, facts)
    assert [json.loads(text) for text in (tmp_path / "runs_on.jsonl").read_text().splitlines()] == [facts, facts]
