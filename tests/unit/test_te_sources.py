"""Our models over Transformer Engine's own Python sources, its compiled extension stubbed (tests/te_sources.py).

Every phase multiplies with FP8 copies of the weights as they are, made once a pass; constructors get the arguments that
were meant; a recipe that a GPU or CUDA cannot run is one line at the start. The sources are what pip downloads, a wheel
of 0.7 MB; without an index the tests are skipped. Leaves out every kernel (tests/gpu), and experts.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tiny_models import build_tiny_hf

ROOT = Path(__file__).parents[2]
WHEEL = "transformer-engine==2.11.0"
LAYERS, PRODUCTS = 4, 4  # of a layer: QKV, projection, gate and up, down
COPIES = LAYERS * PRODUCTS


@pytest.fixture(scope="module")
def sources(pytestconfig) -> Path:
    """Transformer Engine's sources, downloaded once a machine into pytest's cache."""
    directory = Path(pytestconfig.cache.mkdir("transformer_engine"))
    if not list(directory.glob("*.whl")):
        command = ["-m", "pip", "download", "--quiet", "--no-deps", "--timeout", "10", "--retries", "0"]
        done = subprocess.run(
            [sys.executable, *command, "--dest", str(directory), WHEEL], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"pip cannot download {WHEEL}: {done.stderr.strip().splitlines()[-1:]}")
    (wheel,) = directory.glob("*.whl")
    if not (directory / "sources").is_dir():
        zipfile.ZipFile(wheel).extractall(directory / "sources")
    return directory / "sources"


@pytest.fixture(scope="module")
def found(sources, tmp_path_factory) -> dict:
    """What tests/te_sources.py prints."""
    sizes = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2)
    model = build_tiny_hf("qwen3", tmp_path_factory.mktemp("model"), **sizes)
    command = [sys.executable, str(ROOT / "tests" / "te_sources.py"), str(sources), str(model)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_no_phase_multiplies_with_stale_weights(found):
    """Copies are made in the first of a phase's passes and kept for the others: sampling makes them once, not a token."""
    phases = found["phases"]
    assert phases.pop("layers") == LAYERS
    assert {name: phase["stale"] for name, phase in phases.items()} == dict.fromkeys(phases, 0)
    assert {name: phase["copies"] for name, phase in phases.items()} == dict.fromkeys(phases, COPIES)
    passes = {name: phase["products"] // COPIES for name, phase in phases.items()}
    # 4 requests in the 16 rows that FP8 products need: their prompts, then 4 tokens
    assert passes["sample"] == 1 + 4 and passes["old log-probs"] == passes["update"] == 2


def test_old_log_probs_run_in_the_mode_of_the_update(found):
    """Transformer Engine takes other attention kernels in evaluation."""
    modes = {name: phase["training"] for name, phase in found["phases"].items() if name != "layers"}
    assert modes["old log-probs"] == modes["update"] == [True] and modes["sample"] == [False]


def test_rows_of_sequences_are_packed_for_transformer_engine(found):
    """Its attention gets them as one row with the sequences' ends, and gives what ours gives; trees never reach it."""
    packed = found["packed"]
    assert packed["sequences"]["attention"] == [["thd", 32]] and packed["trees"]["attention"] == []
    assert packed["sequences"]["error"] <= 1e-2 and packed["trees"]["error"] == 0.0


def test_attention_meets_few_shapes(found):
    """Rows have the lengths that ``row_length`` gives; of sampling Transformer Engine sees the prompts' pass alone."""
    phases = found["phases"]
    assert phases["old log-probs"]["attention"] == phases["update"]["attention"] == [["thd", 32]]
    assert phases["sample"]["attention"] == phases["sample after an update"]["attention"] == [["sbhd", 32]]


def test_constructors_get_what_was_meant(found):
    arguments = found["arguments"]
    assert arguments["norm"][0] == "RMSNorm" and arguments["norm"][2] is False
    assert arguments["dtype"] == "torch.bfloat16" and arguments["split"] == ["column", "row"]
    assert arguments["attention"] == [4, 2, "causal"] and arguments["dropout"] == 0.0
    assert arguments["recipe"] == "blockwise" and arguments["token multiple"] == 128
    assert "self_attention.linear_qkv.layer_norm_weight" in arguments["parameters"]


@pytest.mark.parametrize(
    ("machine", "runs"),
    [
        ("A100, CUDA 13.0", set()),
        ("H100, CUDA 12.8", {"tensorwise"}),
        ("H100, CUDA 13.0", {"tensorwise", "blockwise"}),
        ("B200, CUDA 13.0", {"tensorwise", "blockwise", "mxfp8"}),
    ],
)
def test_recipes_that_a_machine_cannot_run_are_one_line(found, machine, runs):
    said = found["recipes"][machine]
    assert {recipe for recipe, error in said.items() if not error} == runs
    for recipe, error in said.items():
        if error:
            assert error.startswith(f"judge.precision.fp8: {recipe} on this GPU (") and "\n" not in error
